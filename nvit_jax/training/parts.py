"""A batch in parts, which go through a device one after the other: it needs the memory of one.

On a CPU small parts are faster, too. XLA asks the system for the memory of a program whenever it runs, and the system
clears that page by page, which took DeiT-Tiny's gradient of 24 images as long as half of its products. What is small is
given again without that, and stays in the caches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims
from nvit_jax.parallel import Parallel
from nvit_jax.training.losses import Batch

_BYTES = 3e8  # of a part on a CPU; `python -m tests.ablations.parts`
_LEAST = 2  # images of a part: products of a single one are slower again


def usual_parts(dims: ViTDims, images: int) -> int:
    """In how many parts a device takes that many images."""
    if jax.default_backend() != "cpu":
        return 1
    most = max(_LEAST, int(_BYTES / vit.kept_bytes(dims)))
    return images // max((size for size in range(_LEAST, most + 1) if images % size == 0), default=images)


def mean_over_parts(find: Callable[[Any, Batch], Any], weights: Any, batch: Batch, count: int,
                    parallel: Parallel | None = None) -> Any:  # fmt: skip
    """The mean of `find(weights, batch)` over `count` parts of the batch. A device takes every count-th of its rows.

    Sums stay apart for each device of `parallel` until the last part is done: gradients are exchanged once. All weights
    are then on each device, and so are sums of all gradients.
    """
    if count == 1:
        return find(weights, batch)
    apart: Callable[[Any], Any] = parallel.apart if parallel else lambda tree: tree
    devices = parallel.seen if parallel else 1
    shared = {name: value for name, value in batch.items() if jnp.ndim(value) == 0}
    rows = {
        name: jnp.moveaxis(value.reshape(devices, -1, count, *value.shape[1:]), 2, 0)
        for name, value in batch.items()
        if name not in shared
    }
    weights = parallel.whole(weights) if parallel else weights

    def each(number: Any) -> Any:
        """[devices, ...]"""
        here = apart(jax.tree.map(lambda x: x[number], rows))
        if devices == 1:  # not vmap: an axis of 1 costs a CPU a third of its speed
            found = find(weights, jax.tree.map(lambda x: x[0], here) | shared)
            return jax.tree.map(lambda x: x[None], found)
        return apart(jax.vmap(lambda rows: find(weights, rows | shared))(here))

    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(each, 0))

    def add(total: Any, number: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, each(number)), None

    total, _ = jax.lax.scan(add, apart(zero), jnp.arange(count))
    return jax.tree.map(lambda x: x.mean(0) / count, total)
