"""Exact evaluation: every image of a split counted once, for any batch size and number of devices."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.parallel import Parallel
from nvit_jax.training.losses import cross_entropy

Forward = Callable[[Any, jax.Array], jax.Array]


def make_eval_step(forward: Forward, parallel: Parallel) -> Callable[[Any, Any], dict[str, jax.Array]]:
    """Compile (state, batch) -> sums over the valid examples, `forward(state, images)` giving logits [B, T, C]."""

    def step(state: Any, batch: dict[str, jax.Array], mean: Callable[[Any], Any]) -> dict[str, jax.Array]:
        logits = forward(state, batch["image"]).mean(1)
        label, valid = batch["label"], batch["valid"]
        order = jnp.argsort(-logits, axis=-1, stable=True)[:, :5]  # at most C
        hits = order == label[:, None]
        sums = {
            "top1": (hits[:, 0] * valid).sum(),
            "top5": (hits.any(-1) * valid).sum(),
            "loss": (cross_entropy(logits, label) * valid).sum(),
            "images": valid.sum(),
        }
        return mean(sums)

    compiled = parallel.compile(step)
    # Under pmap `mean` averages the shards' sums; times their number it is the sum again.
    shards = len(parallel.devices) if parallel.backend == "pmap" else 1

    def run(state: Any, batch: Any) -> dict[str, jax.Array]:
        return jax.tree.map(lambda x: x * shards, compiled(state, parallel.shard(batch)))

    return run


def evaluate(
    step: Callable[[Any, Any], dict[str, jax.Array]],
    state: Any,
    batches: Iterable[Any],
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """{"top1", "top5", "loss"} as means over "images" examples. top1 and top5 are fractions in [0, 1].

    `advance` is told how many images are done.
    """
    total = {"top1": 0.0, "top5": 0.0, "loss": 0.0, "images": 0.0}
    for batch in batches:
        sums = step(state, batch)
        total = {name: total[name] + float(np.asarray(sums[name])) for name in total}
        advance(round(total["images"]))
    images = round(total["images"])
    if not images:
        raise UserError(": there is no image to evaluate", "batches")
    return {name: total[name] / images for name in ("top1", "top5", "loss")} | {"images": images}
