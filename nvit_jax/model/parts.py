"""A batch in parts, which go through a device one after the other, so that it needs the memory of one part.

On a CPU small parts are faster, too (`python -m benchmarks.parts`). XLA allocates a program's memory anew at each run.
The system clears it page by page, which for a large batch takes half as long as its products. Small parts have fewer
pages, and stay in the caches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims
from nvit_jax.parallel import Parallel

Batch = dict[str, Any]
_KEPT = 3e8  # bytes that a backward pass on a CPU may keep of a part
_TOKENS = 3200  # of a part that only goes forward; the same for all widths, so that latencies can be compared
_LEAST = {"gradient": 2, "forward": 4}  # images of a part: products of fewer are slower again


def gradient_parts(dims: ViTDims, batch: Batch, parallel: Parallel | None = None) -> int:
    """In how many parts a device takes a batch for a gradient, or for products with the Hessian.

    `batch` lies over the devices that `parallel` sees, or on one.
    """
    images = len(batch["image"]) // (parallel.seen if parallel else 1)
    return _count(images, _LEAST["gradient"], int(_KEPT / vit.kept_bytes(dims)))


def forward_in_parts(forward: Callable[[jax.Array], Any], dims: ViTDims, rows: jax.Array) -> Any:
    """`in_parts`, in the usual number of them; a row is an image, or the tokens of one."""
    if jax.device_count() > 1:  # rows may lie on all of them
        return forward(rows)
    return in_parts(forward, rows, _count(len(rows), _LEAST["forward"], _TOKENS // dims.tokens))


def in_parts(forward: Callable[[jax.Array], Any], rows: jax.Array, count: int) -> Any:
    """`forward(rows)` from `count` parts of the rows; what it returns has their axis, too."""
    if count == 1:
        return forward(rows)
    found = jax.lax.map(forward, rows.reshape(count, -1, *rows.shape[1:]))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def _count(images: int, least: int, most: int) -> int:
    """On a CPU parts of the largest size from `least` to `most` (or of `least`) that divides the images, else one."""
    if jax.default_backend() != "cpu" or images <= most:
        return 1
    return images // max((size for size in range(least, max(least, most) + 1) if images % size == 0), default=images)


def mean_over_parts(
    find: Callable[[Any, Batch], Any], weights: Any, batch: Batch, count: int, parallel: Parallel | None = None
) -> Any:
    """The mean of `find(weights, batch)` over `count` parts of the batch. A part is every count-th row of each device.

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
