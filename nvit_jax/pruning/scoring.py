"""How units are scored: the criterion with its options, the loss, and the batches that scores are averaged over."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nvit_jax.data.feed import Draws, Feed
from nvit_jax.errors import UserError, check_choice
from nvit_jax.model import vit
from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.model.groups import Params
from nvit_jax.model.parts import gradient_parts, mean_over_parts
from nvit_jax.parallel import Parallel, device_bytes, fetch
from nvit_jax.pruning import saliency
from nvit_jax.schema import Flag, Maybe, Shape, check_fields, whole
from nvit_jax.training import optim
from nvit_jax.training.distill import Inputs, Stopped, TrainState
from nvit_jax.training.losses import FEATURES, Batch, Objective, draw_directions, draw_labels, objective_loss
from nvit_jax.training.monitor import Monitor

CALIBRATED = ("obs", "fisher_set")  # no functions of a batch: obs.py, cross.py
CRITERIA = (*CALIBRATED, *saliency.CRITERIA)
LOSSES = ("labels", "kl", "mix", "drawn", "features", "own")
# Second order takes the KL to the unpruned model, whose Hessian is positive there; its gradient is 0 there, so
# first order takes labels.
_USUAL = {"hvp": "kl", "obd": "kl", "hvp_joint": "kl", "fisher": "drawn", **dict.fromkeys(CALIBRATED, "drawn")}

_SHAPES: dict[str, Shape] = {
    **dict.fromkeys(("batch", "batches"), Maybe(whole())),
    **dict.fromkeys(("chunk", "probes"), whole()),
    "remat": Maybe(Flag()),
    "from_training": Flag(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """What a score is. Raises UserError for unknown names, and for pairs that score 0 at the unpruned model.

    loss: "labels"; "kl" to the unpruned model; "mix", the training's objective; "drawn", cross-entropy with labels
    drawn from the unpruned model; "features", the distance of the pooled features from the unpruned model's
    (losses.feature_distance; fisher, fisher_set and obs take random projections, losses.draw_directions); "own", a loss
    of the user's. None is the criterion's usual one: "kl" for hvp, obd and hvp_joint, "drawn" for fisher, fisher_set
    and obs, "labels" for taylor; for a model without a classifier "features".
    """

    criterion: str = "fisher"
    loss: str | None = None
    batch: int | None = None  # images; None: 64, or all that there are
    batches: int | None = None  # of a pruning, at most one pass over the data; None: one pass
    scheme: str = "chunk"  # hvp, obd: probes are confined to all, kind, block, part (kind in a block), chunk, unit
    chunk: int = 16  # units that are probed together by "chunk"
    probes: int = 1  # per example and confinement
    align: str = "per_head"  # taylor: or "shared", one query/key and value index for all heads of a block (NViT)
    remat: bool | None = None  # compute blocks again in the backward pass; None: where memory asks for it
    from_training: bool = False  # taylor: from the gradients of the training steps since the last pruning (NViT)

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, CRITERIA)
        check_choice("loss", self.loss, (None, *LOSSES))
        check_choice("scheme", self.scheme, saliency.SCHEMES)
        check_fields(self, _SHAPES)
        if self.loss == "kl" and self.criterion in ("taylor", "fisher", *CALIBRATED):
            raise UserError(
                f'="{self.criterion}" with loss="kl" is 0 at the unpruned model, where the KL has no gradient; take '
                '"labels", "mix" or "drawn"',
                "criterion",
            )
        if self.loss == "features" and self.criterion == "taylor":
            raise UserError(
                '="taylor" with loss="features" is 0 at the unpruned model, where the distance has no gradient; take '
                '"fisher", "hvp", "obd" or "obs"',
                "criterion",
            )
        for name in ("batch", "batches", "probes", "chunk"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"={value}: it must be at least 1", name)

    @property
    def usual_loss(self) -> str:
        """The loss that is differentiated."""
        return self.loss or _USUAL.get(self.criterion, "labels")

    def for_model(self, dims: ViTDims) -> "Scoring":
        """As a model of these dims is scored. UserError for a loss that a model without a classifier does not have."""
        if dims.classes or not self.needs_data:
            return self
        if self.loss is None and self.criterion != "taylor":
            return dataclasses.replace(self, loss="features")
        if self.usual_loss in ("features", "own"):
            return self
        if self.loss is None:
            text = '="taylor" takes labels, which a model without a classifier has not; take "fisher", "hvp" or "obs"'
            raise UserError(text, "criterion")
        text = f'="{self.loss}" takes answers of a classifier, and the model has none; take "features"'
        raise UserError(text, "loss")

    @property
    def calibrated(self) -> bool:
        """From all calibration images at once, of the unpruned model alone."""
        return self.criterion in CALIBRATED

    @property
    def needs_data(self) -> bool:
        return self.criterion not in ("magnitude", "random")

    def function(self) -> Callable[..., Units]:
        """The criterion with its options bound."""
        options: dict[str, Any] = {}
        if self.criterion in ("hvp", "obd"):
            options = {"scheme": self.scheme, "chunk": self.chunk, "probes": self.probes}
        elif self.criterion == "taylor":
            options = {"align": self.align}
        return saliency.criterion(self.criterion, **options)


def make_score_step(
    dims: ViTDims,
    scoring: Scoring,
    mix: Objective,
    *,
    label_teacher: Callable[[Any, jax.Array], jax.Array] | None = None,
    criterion: Callable[..., Units] | None = None,
    unpruned: bool = False,
    accumulate: int | None = None,
    parallel: Parallel | None = None,
) -> Callable[..., Units]:
    """`step(inputs, batch, mean)` -> scores of one batch, in float32 at full matmul precision.

    Args:
      mix: the training's objective, which the losses "mix" and "own" are made of.
      label_teacher: (params, images) -> logits [B, C], where `mix` has a teacher_alpha.
      criterion: in the place of `scoring.function()`.
      unpruned: the state is the unpruned model: its answers are those that the loss is made of.
      accumulate: parts that a batch goes through a device in; None: the usual ones, and one with a loss of the user's.
      parallel: what compiles the step; None: one device.
    """
    name, criterion = scoring.usual_loss, criterion or scoring.function()
    if name == "mix" and mix.label_weight == 0 and scoring.criterion in ("taylor", "fisher"):
        raise UserError(f'="{scoring.criterion}" with loss="mix" needs a label_weight > 0', "criterion")
    objective = {
        "labels": Objective(),
        "drawn": Objective(),
        "kl": Objective(label_weight=0.0, kl_weight=float(max(dims.classes, 1))),  # the per-sample KL
        "mix": mix,
        "features": FEATURES,
        "own": Objective(own=mix.own),
    }[name]
    forward = vit.features if name == "features" else vit.forward
    needs_answers = name not in ("labels", "own")

    def step(inputs: Inputs, batch: Batch, mean: Callable[[Any], Any]) -> Units:
        state = inputs.state
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def with_answers(batch: Batch, logits: jax.Array) -> Batch:
            """With the unpruned model's logits, or features, and what is drawn for them."""
            batch = batch | {"teacher": logits}
            if name == "drawn":
                batch |= {"label": draw_labels(logits, key, batch["index"])}
            if name == "features" and scoring.criterion == "fisher":
                batch |= {"direction": draw_directions(logits, key, batch["index"])}
            return batch

        def complete(batch: Batch) -> Batch:
            """With what the loss needs of the teachers."""
            if needs_answers and not unpruned:
                batch = with_answers(batch, forward(dims, inputs.teacher, batch["image"]))
            if objective.teacher_alpha:
                assert label_teacher is not None
                batch = batch | {"label_teacher": label_teacher(inputs.label_teacher, batch["image"])}
            return batch

        def loss(params: Params, masks: Units, batch: Batch) -> jax.Array:
            remat = _asks_for_remat(scoring, dims, len(batch["image"])) if scoring.remat is None else scoring.remat
            out = forward(dims, params, batch["image"], masks, remat=remat)
            if needs_answers and unpruned:
                batch = with_answers(batch, jax.lax.stop_gradient(out))
            if "direction" in batch:
                return (batch["direction"] * out).sum((1, 2))
            return objective_loss(objective, out, batch)[0]

        count = accumulate or (1 if objective.own else gradient_parts(dims, batch, parallel))

        def average(find: Callable[[Batch], Any], batch: Batch) -> Any:
            return mean(mean_over_parts(lambda _, part: find(complete(part)), None, batch, count, parallel))

        with jax.default_matmul_precision("float32"):
            return criterion(loss, state.params, state.masks, batch, jax.random.fold_in(key, 1), average=average)

    return step


def _memory(scoring: Scoring) -> float:
    """Of a batch's scoring, in what its backward pass keeps of the blocks (`python -m benchmarks.memory`)."""
    return 5 if scoring.criterion in ("hvp", "obd", "hvp_joint") else 1.5


def _asks_for_remat(scoring: Scoring, dims: ViTDims, images: int) -> bool:
    """Whether a batch would take more than half of a device's memory: what its backward pass keeps, or products with
    the Hessian, which take about five times as much (`python -m benchmarks.memory`).

    Several processes must compile one program, and may have unlike devices: there always.
    """
    return jax.process_count() > 1 or _memory(scoring) * vit.kept_bytes(dims) * images > device_bytes() / 2


def from_training(state: TrainState, steps: int) -> Units:
    """The mean of what the training steps since the last pruning have scored (`optim.collecting`)."""
    assert isinstance(state.opt_state, optim.Collected)
    return Units(*(np.asarray(s, np.float64) / steps for s in fetch(state.opt_state.scores)))


@dataclasses.dataclass
class BatchScores:
    """Scores averaged over batches of their own, pruning after pruning.

    `steps` are compiled, (inputs, batch on the devices) -> Units: for the first pruning and for the others.
    """

    feed: Feed
    draws: Draws
    steps: Sequence[Callable[[Inputs, Batch], Units]]
    batches: int | None
    monitor: Monitor

    @functools.cached_property
    def _reader(self) -> Any:
        return self.feed.reader(self.draws)

    @functools.cached_property
    def count(self) -> int:
        """Batches of a pruning."""
        whole = max(1, self.feed.steps(self.draws.batch))
        return whole if self.batches is None else min(self.batches, whole)

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.close()

    def __call__(self, inputs: Inputs, pruning: int) -> Units:
        """Scores of one pruning, counted from 0. Raises Stopped when asked to, between batches."""
        total: Any = None
        with self.monitor.progress(self.count, what="scoring", unit="batch"):
            for i in range(self.count):
                if i % 8 == 0 and self.monitor.stopping:
                    raise Stopped(f"stopped while scoring for pruning {pruning + 1}")
                number = pruning * self.count + i
                batch = self._reader(number)
                batch["index"] = batch["index"] + number * self.draws.batch  # its own probes and drawn labels
                found = self.steps[pruning > 0](inputs, self.draws.parallel.shard(batch))
                part = jax.tree.map(lambda s: np.asarray(s, np.float64), found)
                total = part if total is None else jax.tree.map(np.add, total, part)
                self.monitor.advance(i + 1)
        return jax.tree.map(lambda s: s / self.count, total)
