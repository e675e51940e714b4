"""Exact evaluation: every image of a split counted once, for any batch size and number of devices."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.parallel import AXIS, Parallel
from nvit_jax.training.losses import cross_entropy

Forward = Callable[[Any, jax.Array], jax.Array]


def make_eval_step(forward: Forward, parallel: Parallel) -> Callable[[Any, Any], dict[str, jax.Array]]:
    """Compile (state, batch) -> sums over the valid examples of each shard, `forward(state, images)` giving [B, T, C].

    "broken" counts the logits that are not finite, "before" the examples in front of the first of them.
    """
    shards = len(parallel.devices) if parallel.backend == "pmap" else 1

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
        broken = ~jnp.isfinite(logits).all(-1) & (valid > 0)
        sums |= {"broken": broken.sum(), "before": (valid * (jnp.arange(len(valid)) < broken.argmax())).sum()}
        own = jnp.arange(shards) == (jax.lax.axis_index(AXIS) if shards > 1 else 0)
        return mean(jax.tree.map(lambda x: jnp.where(own, x, 0), sums))

    compiled = parallel.compile(step)
    # Under pmap `mean` averages the shards' sums; times their number it is the sum again.

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

    `advance` is told how many images are done. Raises UserError for logits that are not finite: they tell no class.
    """
    total = {"top1": 0.0, "top5": 0.0, "loss": 0.0, "images": 0.0}
    for found in _late(lambda batch: step(state, batch), batches):
        sums = {name: np.asarray(value) for name, value in found.items()}
        _check_finite(sums, round(total["images"]))
        total = {name: total[name] + float(sums[name].sum()) for name in total}
        advance(round(total["images"]))
    images = round(total["images"])
    if not images:
        raise UserError(": there is no image to evaluate", "batches")
    return {name: total[name] / images for name in ("top1", "top5", "loss")} | {"images": images}


def _late(step: Callable[[Any], Any], batches: Iterable[Any]) -> Iterator[Any]:
    """What `step` returns for each batch, two batches late: the device works on while the host reads what it found."""
    running: collections.deque[Any] = collections.deque()
    for batch in batches:
        running.append(step(batch))
        if len(running) > 2:
            yield running.popleft()
    yield from running


def _check_finite(sums: Mapping[str, np.ndarray], done: int) -> None:
    """UserError for a batch with logits that are not finite, `done` images after the first."""
    if sums["broken"].any():
        shard = int(np.argmax(sums["broken"] > 0))
        place = done + round(float(sums["images"][:shard].sum() + sums["before"][shard]))
        broken, images = (round(float(sums[name].sum())) for name in ("broken", "images"))
        raise UserError(
            f"the logits of {broken} of {images} images are not finite, image {place} (from 0) is the first; the "
            "weights or the preprocessing of this model are no good"
        )
