"""The pruning loop: score, rank, mask, train on; again until the targets hold.

Methods: "one_shot" removes everything at once and trains nothing. "gradual" reaches the targets in `steps` prunings
along a cubic schedule. "iterative" (NViT) removes `groups_per_step` groups at a time until the targets hold.
Pruning number p happens before optimizer step p * interval; the weights train in between with the mask in place.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from nvit_jax.errors import UserError, check_choice
from nvit_jax.model.dims import KINDS, Units, ViTDims, count_macs, count_params
from nvit_jax.model.masks import check_finite, kept_dims, normalize
from nvit_jax.parallel import fetch
from nvit_jax.pruning.ranking import Ranking, Target
from nvit_jax.schema import Flag, Number, Shape, check_fields, whole
from nvit_jax.training.distill import Stopped, TrainState
from nvit_jax.training.monitor import Monitor

METHODS = ("one_shot", "gradual", "iterative")
_SHAPES: dict[str, Shape] = {
    **dict.fromkeys(("interval", "steps", "groups_per_step", "warmup"), whole()),
    "ema": Number(),
    **dict.fromkeys(("reset_scores", "plain_first"), Flag()),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """When prunings happen, and how much goes in each. Raises UserError for values that make no plan."""

    method: str = "one_shot"
    interval: int = 100  # optimizer steps between prunings
    steps: int = 8  # prunings of "gradual"
    groups_per_step: int = 2  # of "iterative"
    warmup: int = 0  # optimizer steps before the first pruning
    ema: float = 0.0  # momentum of the scores from pruning to pruning (NViT 0.9)
    reset_scores: bool = False  # forget the average after the first pruning (NViT)
    plain_first: bool = False  # no KL before the first pruning, no drop path after it (NViT)

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_fields(self, _SHAPES)
        for name, least in (("interval", 0), ("steps", 1), ("groups_per_step", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise UserError(f"={getattr(self, name)}: it must be at least {least}", name)
        if not 0 <= self.ema < 1:
            raise UserError(f"={self.ema}: it must be in [0, 1)", "ema")
        for name in ("plain_first", "warmup"):
            if getattr(self, name) and not self.trains:
                raise UserError(f'={getattr(self, name)} is about training, and "one_shot" trains nothing', name)

    @property
    def trains(self) -> bool:
        """Whether weights train between prunings."""
        return self.method != "one_shot"

    def targets(self, pruning: int, targets: Sequence[Target]) -> list[Target]:
        """The targets of one pruning: those of the end, or on the way there for "gradual"."""
        if self.method != "gradual":
            return list(targets)
        left = (1 - min((pruning + 1) / self.steps, 1)) ** 3
        return [t._replace(limit=t.limit + (t.dense - t.limit) * left) for t in targets]

    @property
    def max_groups(self) -> int | None:
        return self.groups_per_step if self.method == "iterative" else None


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


@dataclasses.dataclass(frozen=True)
class Task:
    """What the loop is asked for."""

    dims: ViTDims  # before pruning
    plan: Plan
    targets: Sequence[Target]  # when they hold, the loop ends
    rank: Callable[[Units, Units, int], Ranking]  # (scores, masks, pruning) -> what that pruning leaves
    latency: Callable[[ViTDims], float] | None = None  # milliseconds, for the record


class Pruning(NamedTuple):
    """What one pruning did."""

    line: dict[str, Any]  # of history.jsonl
    scores: Units  # that it went by
    before: ViTDims  # compact
    after: ViTDims
    state: TrainState  # with the masks that it left


class Work(Protocol):
    """Who does it."""

    def score(self, state: TrainState, pruning: int) -> Units:
        """Scores averaged over that pruning's batches."""

    def remove(self, state: TrainState, masks: Units) -> tuple[TrainState, Mapping[str, Any]]:
        """The train state with these masks and weights that make good for what they remove; facts for the record."""

    def train(self, state: PruneState, until: int) -> TrainState:
        """The train state at that optimizer step."""

    def evaluate(self, state: TrainState) -> Mapping[str, float]:
        """Of the masked model, for the record."""

    def pruned(self, pruning: Pruning) -> None:
        """Is told of each pruning."""


def prune_loop(state: PruneState, task: Task, work: Work, monitor: Monitor) -> PruneState:
    """Prune until the targets hold. The state is saved after every pruning. Raises UserError when they cannot hold."""
    plan = task.plan
    while not state.met:
        pruning = int(state.prunings)
        state = state._replace(train=work.train(state, plan.warmup + pruning * plan.interval))
        monitor.advance(int(state.train.step), f"scoring for pruning {pruning + 1}")
        fresh = Units(*(np.asarray(s, np.float64) for s in work.score(state.train, pruning)))
        check_finite(fresh)
        scores = fresh if pruning == 0 else _averaged(state.scores, fresh, plan, pruning)
        before = fetch(state.train.masks)
        ranking = task.rank(scores, before, pruning)
        met = all(t.holds(ranking.dims) for t in task.targets)
        if not met and ranking.exhausted:
            raise UserError(": no group is left to remove and the targets do not hold; lower the floors", "floors")
        trained, facts = work.remove(state.train, ranking.masks)
        state = PruneState(trained, scores, np.int32(pruning + 1), np.bool_(met))
        line = history_line(ranking, task, pruning + 1, int(trained.step)) | {"met": met, **facts}
        line |= {f"val_{name}": value for name, value in work.evaluate(trained).items()}
        monitor.history(line)
        work.pruned(Pruning(line, scores, kept_dims(normalize(before), task.dims), ranking.dims, trained))
        monitor.advance(int(trained.step), f"pruning {pruning + 1}: {line['macs_ratio']:.0%} of MACs")
        monitor.save(save_number(state), state)
        if monitor.stopping:
            raise Stopped(f"stopped after pruning {pruning + 1}")
    return state


def _averaged(average: Units, fresh: Units, plan: Plan, pruning: int) -> Units:
    """NViT multiplies the average by 0 once, after the first pruning; the new part keeps its weight."""
    momentum = 0.0 if plan.reset_scores and pruning == 1 else plan.ema
    return Units(*(momentum * a + (1 - plan.ema) * b for a, b in zip(average, fresh, strict=True)))


def save_number(state: PruneState) -> int:
    """Saves count optimizer steps and prunings: a pruning and the step before it are two saves."""
    return int(state.train.step) + int(state.prunings)


def history_line(ranking: Ranking, task: Task, pruning: int, step: int) -> dict[str, Any]:
    """What one pruning removed from where, and what is left."""
    dims = task.dims
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
        "predicted_latency_ms": None if task.latency is None else task.latency(now),
    }
