"""The pruning loop at work on one model, and what comes out of it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nvit_jax.api.evaluate import evaluator
from nvit_jax.api.recipe import Recipe
from nvit_jax.api.trainer import Trainer, check_objective, peak_memory, usual_batch
from nvit_jax.data.feed import Draws, Feed, Reader
from nvit_jax.errors import UserError
from nvit_jax.latency import timing
from nvit_jax.latency.sources import Milliseconds, source
from nvit_jax.latency.table import SHARED, LatencyTable
from nvit_jax.latency.timing import Measurement
from nvit_jax.model import vit
from nvit_jax.model.dims import KINDS, Units, ViTDims, count_macs, count_params
from nvit_jax.model.directory import Model, check_weights
from nvit_jax.model.masks import full_masks, kept_dims, normalize, to_numpy
from nvit_jax.model.preprocessing import normalise
from nvit_jax.parallel import check_same, fetch
from nvit_jax.pruning import saliency, scoring
from nvit_jax.pruning.loop import Plan, PruneState, Pruning, Task, new_prune_state, prune_loop
from nvit_jax.pruning.one_shot import CHECKED, OneShot, calibration_images
from nvit_jax.pruning.ranking import Ranking, Target
from nvit_jax.pruning.rules import Ranker
from nvit_jax.pruning.scoring import BatchScores, Scoring, make_score_step
from nvit_jax.pruning.statistics import Walk
from nvit_jax.training import distill, optim
from nvit_jax.training.losses import Objective, objective_loss
from nvit_jax.training.monitor import Monitor, Recorder, read_lines
from nvit_jax.training.optim import zero_removed

_WIDTHS = {"head": "heads", "qk": "qk", "v": "v", "mlp": "mlp"}
_COMPARED = 64  # images that the masked and the compact model are compared on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that a pruning is told, checked against the model."""

    targets: list[Target]
    rank: Ranker
    plan: Plan
    scoring: Scoring
    recipe: Recipe
    latency: Milliseconds | None = None
    measurement: Measurement | None = None
    images: int | None = None
    compensate: bool = False  # one_shot: the weights that stay make good for what goes
    snapshots: Mapping[float, Ranker] = dataclasses.field(default_factory=dict)  # one_shot: other sizes as well
    may_go: Callable[[str, int], bool] = lambda kind, block: True  # fisher_set: what sets are made of
    whole: Callable[[str, int], bool] = lambda kind, block: False  # which parts may go: see ranking.Policy


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What `prune` found."""

    model: Model  # small and dense
    masked: Model  # of full size, with its masks: the same function
    scores: Units | None  # of the model before pruning; None when a resumed run had found them before
    record: dict[str, Any]  # what was asked, what went, costs predicted and measured, seconds
    snapshots: dict[float, Model] = dataclasses.field(default_factory=dict)  # masked models of other sizes, by ratio

    @property
    def masks(self) -> Units:
        """1 for every unit that is kept."""
        assert self.masked.masks is not None
        return self.masked.masks


class Pruner:
    """Does the work of `pruning.loop.Work` for one model."""

    def __init__(self, model: Model, feed: Feed, held: Feed | None, setup: Setup, monitor: Monitor) -> None:
        self.model, self.dims, self.setup, self.monitor = model, model.dims, setup, monitor
        self.feed, self.held = feed, held
        _check(setup, model)
        check_weights(model.params, "model")
        self.trainer = Trainer(model.dims, feed, setup.recipe, model, monitor)
        self.masks = full_masks(model.dims)
        recipe = setup.recipe
        self.optimizer = recipe.make_optimizer(recipe.learning_rate)
        if setup.scoring.from_training:
            criterion = functools.partial(saliency.taylor_of, align=setup.scoring.align)
            self.optimizer = optim.collecting(self.optimizer, criterion, self.masks)
        self.steps = [self._phase(first=True), self._phase(first=False)]
        self.lines: list[dict[str, Any]] = []
        self.scores: Units | None = None
        self._told: Callable[[Pruning], None] | None = None
        self._reader: Reader | None = None
        self._facts: dict[str, Any] = {}  # what scoring has found, for the record
        self._evaluate = None
        if held is not None:
            batch = 4 * self.trainer.batch
            self._evaluate = evaluator(
                self.dims,
                held,
                self.trainer.parallel,
                batch,
                recipe.compute_dtype,
                monitor,
                reference=model,
                shown=False,
            )

    def _phase(self, *, first: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The compiled train and score steps up to the first pruning, and after it (Plan.plain_first)."""
        recipe, plain = self.setup.recipe, self.setup.plan.plain_first
        objective, drop_path = recipe.objective, recipe.drop_path
        if plain and first:
            objective = dataclasses.replace(objective, kl_weight=0.0)
        elif plain:
            drop_path = 0.0
        teacher = recipe.label_teacher
        train = self.trainer.compiled(self.optimizer, objective=objective, drop_path=drop_path)
        if self.setup.scoring.calibrated:
            return train, _no_training
        score = make_score_step(
            self.dims,
            self.setup.scoring,
            objective,
            label_teacher=teacher.logits if teacher else None,
            unpruned=first and not self.setup.plan.warmup,
            parallel=self.trainer.parallel,
        )
        return train, self.trainer.compiled_plain(score)

    # ------------------------------------------------------------------------------------- the loop's work

    @functools.cached_property
    def _from_batches(self) -> BatchScores:
        trainer, chosen = self.trainer, self.setup.scoring
        feed = self.feed.some(self.setup.images)
        size = usual_batch(chosen.batch, feed, trainer.parallel)
        trainer.parallel.check_batch(size, "criterion.batch")
        seed = (self.setup.recipe.seed, self.setup.recipe.stream, 1)
        labels = chosen.usual_loss == "labels" or (
            chosen.usual_loss == "mix" and self.setup.recipe.objective.needs_labels
        )
        draws = Draws(size, seed, trainer.parallel, self.monitor.warn, labels=labels and chosen.needs_data)
        batches = chosen.batches if chosen.needs_data else 1
        return BatchScores(feed, draws, [phase[1] for phase in self.steps], batches, self.monitor)

    def close(self) -> None:
        """Stop reading batches to score ahead."""
        if "_from_batches" in self.__dict__:
            self._from_batches.close()

    def score(self, state: distill.TrainState, pruning: int) -> Units:
        found = self._scored(state, pruning)
        saliency.check_telling(found, self._may_go(normalize(to_numpy(fetch(state.masks)))), self.model.params)
        return found

    def _may_go(self, masks: Units) -> Units:
        """1 for the units that may go. The only one of a block may not, and some criteria give it no score."""
        now, live = kept_dims(masks, self.dims), []
        for kind, mask in zip(KINDS, masks, strict=True):
            widths = (now.embed,) if kind == "embed" else getattr(now, _WIDTHS[kind])
            goes = [width > 1 and self.setup.may_go(kind, i) for i, width in enumerate(widths)]
            live.append(mask * np.reshape(goes, (-1,) + (1,) * (mask.ndim - 1)))
        return Units(*live)

    def _scored(self, state: distill.TrainState, pruning: int) -> Units:
        plan = self.setup.plan
        if self.setup.scoring.criterion == "obs":
            return self._one_shot.score(self.setup.whole)
        if self.setup.scoring.criterion == "fisher_set":
            scores, found = self._one_shot.score_sets(self.setup.may_go, self.setup.whole)
            self._facts |= found
            return scores
        if self.setup.scoring.from_training:
            return scoring.from_training(state, plan.interval if pruning else plan.warmup)
        return self._from_batches(self.trainer.inputs(state), pruning)

    @functools.cached_property
    def _one_shot(self) -> OneShot:
        """The calibration on its images."""
        setup, chosen = self.setup, self.setup.scoring
        given = chosen.usual_loss in ("labels", "own") and chosen.calibrated
        limit = setup.images
        if limit is None and chosen.batch and chosen.batches:
            limit = chosen.batch * chosen.batches
        seed = (setup.recipe.seed, setup.recipe.stream, 1)
        labels = given and chosen.usual_loss == "labels"
        images = calibration_images(self.feed, limit, chosen.batch, seed, self.monitor, labels=labels)
        objective = Objective(own=setup.recipe.objective.own) if chosen.usual_loss == "own" else Objective()
        loss = (lambda logits, batch: objective_loss(objective, logits, batch)[0]) if given else None
        features = not self.dims.classes or chosen.usual_loss == "features"
        walk = Walk(self.dims, images, self.feed.normalise, features=features)
        return OneShot(walk, fetch(self.model.params), setup.recipe.seed, loss, self.monitor)

    def remove(self, state: distill.TrainState, masks: Units) -> tuple[distill.TrainState, Mapping[str, Any]]:
        params, found = state.params, masks
        facts = dict(self._facts)
        if self.setup.compensate:
            params, found, check = self._one_shot.compensate(masks)
            facts |= check
            check_same((params, found), "compensated weights")
        elif self.setup.scoring.criterion == "obs":
            params = self._one_shot.ready
        placed = Units(*(jnp.asarray(m) for m in found))
        opt_state = zero_removed(state.opt_state, placed)
        return state._replace(params=params, masks=placed, opt_state=opt_state), facts

    def train(self, state: PruneState, until: int) -> distill.TrainState:
        recipe, step = self.setup.recipe, self.steps[int(state.prunings) > 0][0]
        reader = self._reader
        return distill.fit(
            self.trainer.parallel.begin(state.train),
            step,
            reader if reader is not None else _no_training,
            until,
            self.monitor,
            log_every=recipe.log_every,
            save_every=recipe.save_every,
            pack=lambda trained: state._replace(train=trained),
            save_offset=int(state.prunings),
        )

    def evaluate(self, state: distill.TrainState) -> Mapping[str, float]:
        return {} if self._evaluate is None else self._evaluate(state.params, state.masks)

    def pruned(self, pruning: Pruning) -> None:
        self.lines.append(pruning.line)
        if pruning.line["pruning"] == 1:
            self.scores = pruning.scores
        if self._told is not None:
            self._told(pruning)

    def _rank(self, scores: Units, masks: Units, pruning: int) -> Ranking:
        found = self.setup.rank(scores, masks, pruning)
        check_same((scores, found.masks), f"scores or masks of pruning {pruning + 1}")
        return found

    # ------------------------------------------------------------------------------------------- the run

    def run(self, told: Callable[[Pruning], None] | None = None) -> Pruned:
        """Prune until the targets hold, resuming from a saved state; `told` hears of each pruning."""
        setup, plan, monitor = self.setup, self.setup.plan, self.monitor
        self._told = told
        for target in setup.targets:
            if target.is_loose:
                monitor.warn(
                    f"warning: the limit {target.limit:.6g} on {target.name} asks for nothing: the unpruned model has "
                    f"{target.dense:.6g}"
                )
        if isinstance(setup.latency, LatencyTable) and setup.latency.shared:
            monitor.warn(f"warning: {setup.latency.name}: {SHARED}")
        state = self._begin_or_resume()
        first = int(state.train.step)
        total = plan.warmup + (plan.steps - 1) * plan.interval if plan.method == "gradual" else None
        task = Task(self.dims, plan, setup.targets, self._rank, setup.latency)
        with setup.recipe.precision(), monitor.progress(total, first), contextlib.ExitStack() as stack:
            if plan.trains:
                self._reader = stack.enter_context(self.trainer.reader(0))
            if not (setup.scoring.from_training or setup.scoring.calibrated):
                stack.callback(self.close)
            state = prune_loop(state, task, self, monitor)
            masked, small = cut(state.train, self.model)
            snapshots = self._snapshots(state.scores)
        return Pruned(small, masked, self.scores, self._record(state, masked, small), snapshots)

    def _snapshots(self, scores: Units) -> dict[float, Model]:
        """Masked models of other sizes, from the same calibration."""
        found = {}
        for ratio, rank in self.setup.snapshots.items():
            if self.setup.scoring.criterion == "obs" and self._one_shot.turned is None:
                self._one_shot.score(self.setup.whole)  # the run was resumed: the bases of its scores are found again
            self.monitor.say(f"snapshot {ratio:g}")
            ranking = rank(scores, self.masks, 0)
            found[ratio] = cut(self.remove(self._unpruned().train, ranking.masks)[0], self.model)[0]
        return found

    def _unpruned(self) -> PruneState:
        """The state before the first step."""
        seed = self.setup.recipe.seed
        return new_prune_state(distill.new_state(self.model.params, self.optimizer, seed, masks=self.masks))

    def _begin_or_resume(self) -> PruneState:
        state = self._unpruned()
        if (found := self.monitor.restore(state)) is not None:
            restored = found[1]
            state = PruneState(distill.TrainState(*restored[0]), Units(*restored[1]), *restored[2:])
            self.monitor.say(f"resumes at step {int(state.train.step)} after {int(state.prunings)} prunings")
        self.monitor.resume(int(state.train.step), int(state.prunings))
        return state

    def _record(self, state: PruneState, masked: Model, small: Model) -> dict[str, Any]:
        dims, now, predict, history = self.dims, small.dims, self.setup.latency, self._history()
        predicted = predict(now) if predict else None
        return {
            "criterion": self.setup.scoring.criterion,
            "method": self.setup.plan.method,
            "prunings": int(state.prunings),
            "compensated": False,
            **{key: history[-1][key] for key in CHECKED if key in history[-1]},
            "removed": _removed(dims, now),
            "dims": now.to_json(),
            "macs_ratio": count_macs(now) / count_macs(dims),
            "params_ratio": count_params(now) / count_params(dims),
            "predicted_latency_ms": predicted,
            "predicted_latency_ratio": predicted / predict(dims) if predict and predicted else None,
            "latency_source": source(predict),
            **self._measured(now),
            "masked_vs_compact_max_abs_diff": self._difference(masked, small),
            "history": history,
            "peak_memory_bytes": peak_memory(),
            "seconds": self.monitor.seconds(),
        }

    def _history(self) -> list[dict[str, Any]]:
        """A line of each pruning; those before a resumed run come from its directory."""
        kept = self.monitor.path / "history.jsonl" if isinstance(self.monitor, Recorder) else None
        return self.lines if kept is None else read_lines(kept)

    def _measured(self, now: ViTDims) -> dict[str, Any]:
        names = ("dense_latency_ms", "measured_latency_ms", "latency_ratio", "latency_spread")
        if self.setup.measurement is None:
            return dict.fromkeys(names)
        dense, small = timing.measure([self.dims, now], self.setup.measurement)
        spread = [dense.spread, small.spread]
        return dict(zip(names, (dense.ms, small.ms, small.ms / dense.ms, spread), strict=True))

    def _difference(self, masked: Model, small: Model) -> float:
        """The largest difference of the logits, on images at hand. RuntimeError beyond what float32 explains."""
        feed = (self.held or self.feed).some(_COMPARED)
        found = next(iter(feed.once(_COMPARED, self.trainer.parallel, self.monitor.warn, labels=False)))
        images = normalise(found["image"], getattr(feed, "preprocessing", None))
        with jax.default_matmul_precision("float32"):
            ours = np.asarray(vit.forward(masked.dims, masked.params, images, masked.masks))
            theirs = np.asarray(vit.forward(small.dims, small.params, images))
        difference = float(np.abs(ours - theirs).max())
        # Ten times what float32 explains: beyond it the two are not the same function.
        if not difference <= 1e-4 * max(1.0, float(np.abs(ours).max())):
            raise RuntimeError(f"the compact model differs from the masked one by {difference}")
        return difference


def cut(state: distill.TrainState, model: Model) -> tuple[Model, Model]:
    """(the masked model of full size, the compact one), on the host, with the facts of `model`."""
    assert state.masks is not None
    masked = Model(model.dims, fetch(state.params), to_numpy(fetch(state.masks)), model.info)
    return masked, masked.compact()


def _check(setup: Setup, model: Model) -> None:
    """UserError when parts of a setup do not go together."""
    plan, chosen = setup.plan, setup.scoring
    if plan.trains:
        check_objective(setup.recipe.objective, model.dims, "training.objective")
    if chosen.from_training and not (
        chosen.criterion == "taylor" and plan.warmup > 0 and plan.interval > 0 and plan.trains and chosen.loss is None
    ):
        raise UserError(
            ".from_training needs the criterion taylor without a loss of its own, and a plan with warmup, interval and "
            "training: their steps are scored",
            "criterion",
        )


def _removed(before: ViTDims, after: ViTDims) -> dict[str, Any]:
    """How many units went, of each kind: embed, and a list over the blocks for the others."""
    gone = {
        kind: [a - b for a, b in zip(getattr(before, name), getattr(after, name), strict=True)]
        for kind, name in _WIDTHS.items()
    }
    return {"embed": before.embed - after.embed} | gone


def _no_training(step: int) -> Any:
    raise AssertionError(f"one_shot asks for the batch of step {step}")
