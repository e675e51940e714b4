"""The pruning loop: score, rank, mask, train on; again until the targets hold.

Modes: "one_shot" removes everything at once and trains nothing. "gradual" reaches the targets in `steps` prunings
along a cubic schedule. "iterative" (NViT) removes `groups_per_step` groups at a time until the targets hold.
Pruning number p happens before optimizer step p * interval; the weights train in between with the mask in place.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.model import vit
from nvit_jax.model.dims import KINDS, Units, ViTDims, count_macs, count_params
from nvit_jax.model.groups import Params
from nvit_jax.model.masks import kept_dims, normalize
from nvit_jax.parallel import fetch
from nvit_jax.pruning.ranking import Ranking, Target
from nvit_jax.pruning.saliency import check_finite
from nvit_jax.training.distill import Inputs, Monitor, Stopped, TrainState
from nvit_jax.training.losses import Batch, Objective, draw_labels, objective_loss
from nvit_jax.training.optim import zero_removed

MODES = ("one_shot", "gradual", "iterative")
SCORE_LOSSES = ("labels", "kl", "mix", "drawn")
# Second order takes the KL to the unpruned model, whose Hessian is positive there; its gradient is 0 there, so
# first order takes labels.
_OWN_LOSS = {"hvp": "kl", "obd": "kl", "hvp_joint": "kl", "fisher": "drawn"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """When and how much."""

    mode: str
    warmup: int = 0  # optimizer steps before the first pruning
    interval: int = 0  # and between prunings
    steps: int = 1  # prunings of "gradual"
    groups_per_step: int = 1  # of "iterative"
    ema: float = 0.0  # momentum of the scores from pruning to pruning
    reset_scores: bool = False  # forget the average after the first pruning

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"prune.mode={self.mode!r} is not one of {', '.join(MODES)}")
        if self.warmup < 0 or self.interval < 0 or self.steps < 1 or self.groups_per_step < 1 or not 0 <= self.ema < 1:
            raise UserError(
                "prune: warmup >= 0, interval >= 0, steps >= 1, groups_per_step >= 1 and 0 <= ema < 1 are needed"
            )

    def targets(self, pruning: int, targets: Sequence[Target]) -> list[Target]:
        """The targets of one pruning: those of the end, or on the way there for "gradual"."""
        if self.mode != "gradual":
            return list(targets)
        left = (1 - min((pruning + 1) / self.steps, 1)) ** 3
        return [t._replace(limit=t.limit + (t.dense - t.limit) * left) for t in targets]

    @property
    def max_groups(self) -> int | None:
        return self.groups_per_step if self.mode == "iterative" else None


class PruneState(NamedTuple):
    """The train state, and what the prunings carry."""

    train: TrainState
    scores: Units  # float64 moving average, host
    prunings: Any  # int, how many are done
    met: Any  # bool, the targets hold


def new_prune_state(train: TrainState) -> PruneState:
    """The state before the first pruning; `train` carries the masks to start from."""
    assert train.masks is not None
    zeros = Units(*(np.zeros(np.shape(m), np.float64) for m in train.masks))
    return PruneState(train, zeros, np.int32(0), np.bool_(False))


def make_score_step(
    dims: ViTDims,
    name: str,
    criterion: Callable[..., Units],
    loss_name: str | None,
    mix: Objective,
    *,
    label_teacher: Callable[[Any, jax.Array], jax.Array] | None = None,
    remat: bool = True,
) -> Callable[..., Units]:
    """`step(inputs, batch, mean)` -> scores of one batch, in float32 at full matmul precision.

    loss_name: "labels", "kl" to the unpruned model, "mix" (the training objective), or "drawn" (cross-entropy with
    labels drawn from the unpruned model); None is the criterion's own (`_OWN_LOSS`). Pairs that would score 0
    everywhere at the unpruned model are refused.
    """
    loss_name = loss_name or _OWN_LOSS.get(name, "labels")
    if loss_name not in SCORE_LOSSES:
        raise UserError(f"prune.score.loss={loss_name!r} is not one of {', '.join(SCORE_LOSSES)}")
    if loss_name == "kl" and name in ("taylor", "fisher"):
        raise UserError(
            f'prune.criterion="{name}" with prune.score.loss="kl" is 0 at the unpruned model, where the KL has no '
            'gradient; take "labels", "mix" or "drawn"'
        )
    if loss_name == "mix" and mix.label_weight == 0 and name in ("taylor", "fisher"):
        raise UserError(f'prune.criterion="{name}" with prune.score.loss="mix" needs prune.label_weight > 0')
    objective = {
        "labels": Objective(),
        "drawn": Objective(),
        "kl": Objective(label_weight=0.0, kl_weight=float(dims.classes)),  # the ordinary per-sample KL
        "mix": mix,
    }[loss_name]

    def loss(params: Params, masks: Units, batch: Batch) -> jax.Array:
        logits = vit.forward(dims, params, batch["image"], masks, remat=remat)
        return objective_loss(objective, logits, batch)[0]

    def step(inputs: Inputs, batch: Batch, mean: Callable[[Any], Any]) -> Units:
        state = inputs.state
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        with jax.default_matmul_precision("float32"):
            if loss_name != "labels":
                batch = batch | {"teacher": vit.forward(dims, inputs.teacher, batch["image"])}
            if objective.teacher_alpha:
                assert label_teacher is not None
                batch = batch | {"label_teacher": label_teacher(inputs.label_teacher, batch["image"])}
            if loss_name == "drawn":
                batch = batch | {"label": draw_labels(batch["teacher"], key, batch["index"])}
            return criterion(loss, state.params, state.masks, batch, jax.random.fold_in(key, 1), mean=mean)

    return step


def prune_loop(
    state: PruneState,
    *,
    dims: ViTDims,
    plan: Plan,
    rank: Callable[[Units, Units, int], Ranking],
    targets: Sequence[Target],
    score: Callable[[TrainState, int], Units],
    train: Callable[[PruneState, int], TrainState],
    monitor: Monitor,
    evaluate: Callable[[TrainState], Mapping[str, float]],
    predict_ms: Callable[[ViTDims], float] | None,
    record: Callable[[Mapping[str, Any]], None],
    pruned: Callable[[TrainState, ViTDims, ViTDims], None] = lambda state, before, after: None,
) -> PruneState:
    """Prune until the targets hold. The state is saved after every pruning.

    Args:
      rank: (scores, masks, pruning) -> what that pruning leaves.
      targets: when they hold, the loop ends.
      score: (train state, pruning) -> scores averaged over that pruning's batches.
      train: (state, until) -> the train state at that optimizer step.
      record: takes one line of history.jsonl.
      pruned: is told the masked state and the compact dims before and after each pruning.
    """
    while not state.met:
        pruning = int(state.prunings)
        state = state._replace(train=train(state, plan.warmup + pruning * plan.interval))
        monitor.advance(int(state.train.step), f"scoring for pruning {pruning + 1}")
        fresh = Units(*(np.asarray(s, np.float64) for s in score(state.train, pruning)))
        check_finite(fresh)
        if pruning == 0:
            scores = fresh
        else:  # NViT multiplies the average by 0 once, after the first pruning; the new part keeps its weight
            momentum = 0.0 if plan.reset_scores and pruning == 1 else plan.ema
            scores = Units(*(momentum * a + (1 - plan.ema) * b for a, b in zip(state.scores, fresh, strict=True)))
        before = fetch(state.train.masks)
        ranking = rank(scores, before, pruning)
        met = all(t.holds(ranking.dims) for t in targets)
        if not met and ranking.exhausted:
            raise UserError("prune: no group is left to remove and the targets do not hold; lower prune.floors")
        masks = Units(*(jnp.asarray(m) for m in ranking.masks))
        trained = state.train._replace(masks=masks, opt_state=zero_removed(state.train.opt_state, masks))
        state = PruneState(trained, scores, np.int32(pruning + 1), np.bool_(met))
        line = history_line(ranking, dims, pruning + 1, int(trained.step), predict_ms) | {"met": met}
        record(line | {f"val_{name}": value for name, value in evaluate(trained).items()})
        pruned(trained, kept_dims(normalize(before), dims), ranking.dims)
        monitor.advance(int(trained.step), f"pruning {pruning + 1}: {line['macs_ratio']:.0%} of MACs")
        monitor.save(save_number(state), state)
        if monitor.stopping:
            raise Stopped(f"stopped after pruning {pruning + 1}")
    return state


def save_number(state: PruneState) -> int:
    """Saves count optimizer steps and prunings: a pruning and the step before it are two saves."""
    return int(state.train.step) + int(state.prunings)


def history_line(
    ranking: Ranking, dims: ViTDims, pruning: int, step: int, predict_ms: Callable[[ViTDims], float] | None
) -> dict[str, Any]:
    """What one pruning removed from where, and what is left."""
    units: Counter[tuple[str, int]] = Counter()
    for removal in ranking.removed:
        units[removal.kind, removal.block] += removal.units
    removed: dict[str, Any] = {kind: [units[kind, i] for i in range(dims.depth)] for kind in KINDS[1:]}
    now = ranking.dims
    return {
        "pruning": pruning,
        "step": step,
        "groups": len(ranking.removed),
        "nonpositive_groups": ranking.nonpositive,
        "threshold": ranking.threshold,
        "removed": {"embed": units["embed", 0]} | removed,
        "dims": {k: v for k, v in now.to_json().items() if k in ("embed", "heads", "qk", "v", "mlp")},
        "macs": count_macs(now),
        "macs_ratio": count_macs(now) / count_macs(dims),
        "params": count_params(now),
        "predicted_latency_ms": None if predict_ms is None else predict_ms(now),
    }
