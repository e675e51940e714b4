"""evaluate: how good a model is, by its answers, or by its features where it has no classifier."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from nvit_jax.api.arguments import checked
from nvit_jax.data.datasets import Dataset
from nvit_jax.data.feed import Feed, make_feed
from nvit_jax.errors import UserError
from nvit_jax.model import vit
from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.model.directory import Model
from nvit_jax.model.groups import Params
from nvit_jax.model.parts import forward_in_parts
from nvit_jax.parallel import Parallel
from nvit_jax.training import similarity
from nvit_jax.training.distill import Stopped
from nvit_jax.training.evaluate import evaluate as run_evaluation
from nvit_jax.training.evaluate import make_eval_step
from nvit_jax.training.monitor import Console, Monitor

DATABASE = 10_000  # images of a train split, at most, that nearest neighbours are looked for in
Evaluator = Callable[[Params, Units | None], dict[str, Any]]


@checked
def evaluate(
    model: Model,
    batches: Any,
    *,
    reference: Model | None = None,
    database: Any = None,
    neighbours: int = similarity.NEIGHBOURS,
    batch: int = 256,
    dtype: str = "float32",
    parallel: str = "jit",
    progress: bool | Monitor = True,
) -> dict[str, Any]:
    """{"top1", "top5", "loss", "images"}: fractions in [0, 1], mean cross-entropy, and how many images were counted.

    Every image counts once, whatever the batches and devices. Of a Dataset the test split is taken, or val where there
    is none; give `dataset.split(name)` for another one. An iterator is fine: one pass is needed.

    Of a model without a classifier {"cosine", "error", "loss", "knn", "images"}. The first three compare its features
    with those of `reference`: the mean cosine similarity, the squared error as a part of their variance, the mean of
    the distance that pruning and finetuning take. "knn" is the top-1 accuracy of the nearest neighbours; it is there
    where images have labels, and None where no image has a neighbour of its class.

    Args:
      reference: the unpruned model, without a classifier.
      database: labelled images that neighbours are looked for in; None: in the train split of a Dataset (10,000 images
        at most), else in `batches` themselves, without the image itself.
      neighbours: how many of them vote, weighted by exp(cosine similarity / 0.07).

    Raises UserError.

        >>> nvit.evaluate(model, (images, labels))
        {'top1': 0.7680, 'top5': 0.9360, 'loss': 0.98, 'images': 500}
    """
    monitor = progress if isinstance(progress, Monitor) else Console("evaluate") if progress else Monitor()
    split = "test" if "test" in getattr(batches, "splits", {}) else "val"
    feed = make_feed(batches, model.dims, model.preprocessing, split=split, passes=False, classes=model.classes)
    backend, kind = Parallel.create(parallel), jnp.dtype(dtype)
    if model.dims.classes:
        for name, value in (("reference", reference), ("database", database)):
            if value is not None:
                raise UserError(" is for models without a classifier", name)
        run = evaluator(model.dims, feed, backend, batch, kind, monitor)
        with monitor.progress(feed.images(), unit="image"):
            return run(model.params, model.masks)
    if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
        raise UserError(f"={neighbours!r}: it must be a whole number, at least 1", "neighbours")
    if database is None and isinstance(batches, Dataset) and "train" in batches.splits:
        database = batches.split("train").some(DATABASE)
    others = None if database is None else make_feed(database, model.dims, model.preprocessing, passes=False)
    return _by_features(model, feed, others, neighbours, reference, (backend, batch, kind, monitor))


def _by_features(
    model: Model, feed: Feed, others: Feed | None, neighbours: int, reference: Model | None, how: Any
) -> dict[str, Any]:
    monitor: Monitor = how[-1]
    state: Any = (model.params, model.masks, None)
    if reference is not None:
        reference = check_reference(reference, model.dims, "reference")
        same = model.masks is None and reference.dims == model.dims and reference.params is model.params
        state = (model.params, model.masks, () if same else reference.params)
    with monitor.progress(feed.images(), unit="image"):
        found = _gathered(model.dims, feed, reference, *how)(state)
    out: dict[str, Any] = {} if reference is None else similarity.likeness(found)
    if found.labels is not None:
        there = None
        if others is not None:
            with monitor.progress(others.images(), what="neighbours", unit="image"):
                there = _gathered(model.dims, others, None, *how)((*state[:2], None))
        if there is None or there.labels is not None:
            out["knn"] = similarity.neighbours_tell(found, there, neighbours)
            if out["knn"] is None:
                monitor.say("no image has a neighbour of its class, so that nearest neighbours tell nothing")
    if not out:
        raise UserError(" has no classifier: give a reference, the unpruned model, or images with labels", "model")
    return out | {"images": len(found.ours)}


def check_reference(reference: Model, dims: ViTDims, argument: str) -> Model:
    """The unpruned model, compact. UserError unless it gives features of the same kind as a model of these dims."""
    reference = reference.compact()
    theirs = reference.dims
    for name in ("classes", "image", "channels", "classifiers", "embed"):
        if getattr(theirs, name) != getattr(dims, name):
            ours = f"{getattr(theirs, name)} is the {name} of it, and {getattr(dims, name)} of the model"
            raise UserError(f" gives other features: {ours}", argument)
    return reference


def evaluator(
    dims: ViTDims,
    feed: Feed,
    parallel: Parallel,
    batch: int,
    dtype: Any,
    monitor: Monitor,
    *,
    reference: Model | None = None,
    shown: bool = True,
) -> Evaluator:
    """(params, masks) -> top1, top5, loss, images on a feed; compiled once.

    Without a classifier: cosine, error, loss, images, from the features of `reference`.
    `shown`: the monitor's task is this evaluation, so it is told how many images are done, and may stop it.
    """
    if not dims.classes:
        assert reference is not None
        known = check_reference(reference, dims, "teacher")
        gathered = _gathered(dims, feed, known, parallel, batch, dtype, monitor, shown=shown)

        def alike(params: Params, masks: Units | None) -> dict[str, Any]:
            found = gathered((params, masks, known.params))
            return similarity.likeness(found) | {"images": len(found.ours)}

        return alike
    forward = functools.partial(_forward, dims, feed, dtype)
    step = make_eval_step(forward, parallel)

    def run(params: Params, masks: Units | None) -> dict[str, Any]:
        found = feed.once(batch, parallel, monitor.warn)
        state = parallel.place((params, masks))
        return run_evaluation(step, state, found, _advance(monitor, shown=shown))

    return run


def _advance(monitor: Monitor, *, shown: bool) -> Callable[[int], None]:
    def advance(images: int) -> None:
        monitor.advance(images)
        if monitor.stopping:
            raise Stopped("stopped while evaluating")

    return advance if shown else lambda images: None


def _forward(dims: ViTDims, feed: Feed, dtype: Any, state: tuple[Params, Units | None], images: Any) -> Any:
    def forward(images: Any) -> Any:
        return vit.forward(dims, state[0], feed.normalise(images), state[1], dtype=dtype)

    return forward_in_parts(forward, dims, images)


def _gathered(
    dims: ViTDims,
    feed: Feed,
    reference: Model | None,
    parallel: Parallel,
    batch: int,
    dtype: Any,
    monitor: Monitor,
    *,
    shown: bool = True,
) -> Callable[[Any], similarity.Features]:
    """(params, masks, the reference's params; None for none, () where they are the same) -> features; compiled once."""
    parallel = Parallel.create("jit", parallel.devices)  # the one backend that gives rows back

    def pair(state: Any, images: Any) -> Any:
        params, masks, other = state

        def both(images: Any) -> Any:
            images = feed.normalise(images)
            ours = vit.forward(dims, params, images, masks, dtype=dtype)
            if other is None or reference is None:
                return ours, None
            return ours, ours if other == () else vit.forward(reference.dims, other, images, dtype=dtype)

        return forward_in_parts(both, dims, images)

    step = similarity.make_feature_step(pair, parallel)

    def run(state: Any) -> similarity.Features:
        found = feed.once(batch, parallel, monitor.warn, labels=False)
        return similarity.gather(step, parallel.place(state), found, _advance(monitor, shown=shown))

    return run
