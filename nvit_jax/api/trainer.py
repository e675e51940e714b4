"""A recipe at work on one model: its batches, its optimizer, its compiled steps, its best model."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from nvit_jax.api.recipe import Recipe
from nvit_jax.data.feed import Draws, Feed, Reader, SplitFeed
from nvit_jax.data.mixing import prepare
from nvit_jax.errors import UserError
from nvit_jax.latency.timing import free_bytes
from nvit_jax.model.dims import ViTDims, count_params
from nvit_jax.model.directory import Model
from nvit_jax.model.groups import Params
from nvit_jax.parallel import Parallel, fetch
from nvit_jax.pruning import sparsity
from nvit_jax.training import distill
from nvit_jax.training.losses import Objective
from nvit_jax.training.monitor import Monitor

Step = Callable[[distill.TrainState, Any], tuple[distill.TrainState, dict[str, jax.Array]]]


class Trainer:
    """Raises UserError when recipe, batches, devices and teachers do not fit each other."""

    def __init__(self, dims: ViTDims, feed: Feed, recipe: Recipe, teacher: Model | None, monitor: Monitor) -> None:
        """`teacher` is the unpruned model."""
        _check_memory(dims)
        self.dims, self.feed, self.recipe, self.monitor = dims, feed, recipe, monitor
        self.parallel = Parallel.create(recipe.parallel)
        self.batch = usual_batch(recipe.batch, feed, self.parallel)
        if isinstance(feed, SplitFeed):
            self.parallel.check_batch(self.batch // (recipe.accumulate or 1), "batch / accumulate")
        self._pixels = recipe.augment.pixels(getattr(feed, "preprocessing", None))
        self._shards = recipe.augment.local_shards(self.parallel)
        self._teacher_dims = teacher.dims if teacher else None
        self._teachers = [
            None if one is None else self.parallel.place(one.params) for one in (teacher, recipe.label_teacher)
        ]

    def draws(self, *more: int) -> Draws:
        """Its batches; with `more` in the seed, others."""
        r = self.recipe
        seed = (r.seed, r.stream, *more)
        labels = r.objective.needs_labels
        return Draws(self.batch, seed, self.parallel, self.monitor.warn, self._pixels, r.augment.repeats, labels)

    @contextlib.contextmanager
    def reader(self, *more: int) -> Iterator[Reader]:
        """Batches, read ahead inside of the block."""
        with contextlib.closing(self.feed.reader(self.draws(*more))) as reader:
            yield reader

    def inputs(self, state: distill.TrainState) -> distill.Inputs:
        """What compiled steps take beside the batch."""
        return distill.Inputs(state, *self._teachers)

    def compiled(
        self, optimizer: optax.GradientTransformation, *, objective: Objective | None = None, drop_path: float = 0.0
    ) -> Step:
        """(state on the devices, from `Parallel.begin`, and host batch) -> (state, metrics)."""
        r, teacher = self.recipe, self.recipe.label_teacher
        train = distill.make_train_step(
            self.dims,
            optimizer,
            objective or r.objective,
            teacher_dims=self._teacher_dims,
            label_teacher=functools.partial(teacher.logits, dtype=r.compute_dtype) if teacher else None,
            dtype=r.compute_dtype,
            drop_path=drop_path,
            dropout=r.dropout,
            ema_decay=r.ema,
            accumulate=r.accumulate,
            parallel=self.parallel,
            remat=r.remat,
        )
        step = self.parallel.compile_training(prepare(self.feed.normalise, train, r.augment.mixing, self._shards))
        return lambda state, batch: step(self.inputs(state), self.parallel.shard(batch))

    def compiled_plain(self, step: Callable[..., Any]) -> Callable[[distill.Inputs, Any], Any]:
        """A step on images as evaluated: (inputs, batch on the devices) -> what it returns."""
        return self.parallel.compile(prepare(self.feed.normalise, step))

    def squared_gradients(self, params: Params, batches: int) -> Params:
        """Mean over batches of (dl/dw)^2."""
        optimizer, batches = sparsity.sum_of_squares(), min(batches, self.feed.steps(self.batch))
        state = self.parallel.begin(distill.new_state(params, optimizer, self.recipe.seed))
        step = self.compiled(optimizer)
        with self.recipe.precision(), self.reader(1) as batch:
            for number in range(batches):
                state, _ = step(state, batch(number))
        return jax.tree.map(lambda s: s / batches, fetch(state.opt_state))


def _check_memory(dims: ViTDims) -> None:
    """UserError for a model whose weights, gradients and moments do not fit: a host ends a process without a word."""
    need = 16 * count_params(dims)  # float32, with AdamW
    if jax.default_backend() == "cpu" and need > (free := free_bytes()):
        raise UserError(
            f"training {count_params(dims):,} parameters takes {need / 2**30:.1f} GiB at least, and "
            f"{free / 2**30:.1f} GiB are free; take a smaller model"
        )


def check_objective(objective: Objective, dims: ViTDims, argument: str) -> None:
    """UserError for an objective that a model of these dims cannot have."""
    if dims.classes and objective.feature_weight:
        text = " has a feature_weight, which is for models without a classifier; take a kl_weight"
        raise UserError(text, argument)
    if not dims.classes and (objective.needs_labels or objective.kl_weight or objective.teacher_alpha):
        text = (
            " takes answers of a classifier, and the model has none; take Objective(label_weight=0, feature_weight=1)"
        )
        raise UserError(text, argument)


def usual_batch(batch: int | None, feed: Feed, parallel: Parallel) -> int:
    """`batch`, or 64, or what there is, in equal parts for the devices."""
    if batch is not None:
        return batch
    devices, images = len(parallel.devices), feed.images()
    found = 64 if images is None else min(64, images)
    return max(found // devices, 1) * devices


def trained(state: distill.TrainState) -> Params:
    """The weights that a training ends with: their average where there is one."""
    return state.params if state.average is None else state.average


def cost(monitor: Monitor, began: float, images: int) -> dict[str, Any]:
    """What a training loop of this process took, evaluations included."""
    seconds = time.monotonic() - began
    return {
        "loop_seconds": seconds,
        "images_per_second": images / max(seconds, 1e-9),
        "input_wait": monitor.input_wait / max(seconds, 1e-9),  # the part in which the device had no images
        "peak_memory_bytes": peak_memory(),
    }


def peak_memory() -> int | None:
    """Of the first device of this process; None where it does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
