"""evaluate: accuracy and loss of a model."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from nvit_jax.api.arguments import checked
from nvit_jax.data.feed import Feed, make_feed
from nvit_jax.errors import UserError
from nvit_jax.model import vit
from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.model.directory import Model
from nvit_jax.model.groups import Params
from nvit_jax.parallel import Parallel
from nvit_jax.training.distill import Stopped
from nvit_jax.training.evaluate import evaluate as run_evaluation
from nvit_jax.training.evaluate import make_eval_step
from nvit_jax.training.monitor import Console, Monitor

Evaluator = Callable[[Params, Units | None], dict[str, Any]]


@checked
def evaluate(
    model: Model,
    batches: Any,
    *,
    batch: int = 256,
    dtype: str = "float32",
    parallel: str = "jit",
    progress: bool | Monitor = True,
) -> dict[str, Any]:
    """{"top1", "top5", "loss", "images"}: fractions in [0, 1], mean cross-entropy, and how many images were counted.

    Every image counts once, whatever the batches and devices. Of a Dataset the test split is taken, or val where there
    is none; give `dataset.split(name)` for another one. An iterator is fine: one pass is needed.

        >>> nvit.evaluate(model, (images, labels))
        {'top1': 0.7680, 'top5': 0.9360, 'loss': 0.98, 'images': 500}
    """
    monitor = progress if isinstance(progress, Monitor) else Console("evaluate") if progress else Monitor()
    split = "test" if "test" in getattr(batches, "splits", {}) else "val"
    feed = make_feed(batches, model.dims, model.preprocessing, split=split, passes=False)
    if not model.dims.classes:
        raise UserError(" has no classifier", "model")
    run = evaluator(model.dims, feed, Parallel.create(parallel), batch, jnp.dtype(dtype), monitor)
    with monitor.progress(feed.images(), unit="image"):
        return run(model.params, model.masks)


def evaluator(
    dims: ViTDims, feed: Feed, parallel: Parallel, batch: int, dtype: Any, monitor: Monitor, *, shown: bool = True
) -> Evaluator:
    """(params, masks) -> top1, top5, loss, images on a feed; compiled once.

    `shown`: the monitor's task is this evaluation, so it is told how many images are done, and may stop it.
    """
    forward = functools.partial(_forward, dims, feed, dtype)
    step = make_eval_step(forward, parallel)

    def advance(images: int) -> None:
        monitor.advance(images)
        if monitor.stopping:
            raise Stopped("stopped while evaluating")

    def run(params: Params, masks: Units | None) -> dict[str, Any]:
        found = feed.once(batch, parallel, monitor.warn)
        state = parallel.place((params, masks))
        return run_evaluation(step, state, found, advance if shown else lambda images: None)

    return run


def _forward(dims: ViTDims, feed: Feed, dtype: Any, state: tuple[Params, Units | None], images: Any) -> Any:
    return vit.forward(dims, state[0], feed.normalise(images), state[1], dtype=dtype)
