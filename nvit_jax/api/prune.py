"""prune: score the units of a model, remove the ones that matter least, cut them out."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvit_jax.api.arguments import checked
from nvit_jax.api.benchmark import measure_latency
from nvit_jax.api.pruner import Pruned, Pruner, Setup
from nvit_jax.api.recipe import Loss, Recipe
from nvit_jax.api.recording import open_monitor
from nvit_jax.api.targets import (
    Choice,
    Limits,
    check_images,
    check_without_latency,
    choice_of,
    find_latency,
    reachable_targets,
    usual_criterion,
)
from nvit_jax.data.feed import make_feed
from nvit_jax.errors import UserError, renamed
from nvit_jax.latency.timing import Measurement
from nvit_jax.model.dims import KINDS, ViTDims
from nvit_jax.model.directory import Model
from nvit_jax.pruning.loop import Plan, Pruning
from nvit_jax.pruning.rules import ranker
from nvit_jax.pruning.scoring import Scoring
from nvit_jax.training.losses import FEATURES, Objective
from nvit_jax.training.monitor import Monitor


@checked
def prune(
    model: Model,
    batches: Any,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    max_macs: float | None = None,
    max_params: float | None = None,
    max_ms: float | None = None,
    criterion: str | Scoring | None = None,
    method: str | Plan = "one_shot",
    rule: str | Choice | None = None,
    compensate: bool | None = None,
    snapshots: Sequence[float] = (),
    loss: Loss | None = None,
    kinds: Sequence[str] | None = None,
    protect: Sequence[int] = (),
    profile: str = "cpu",
    floors: Mapping[str, int] | None = None,
    latency_table: Any = None,
    training: Recipe | None = None,
    images: int | None = None,
    batch: int | None = None,
    evaluate_on: Any = None,
    measure: int | Measurement | None = 32,
    seed: int = 0,
    directory: str | Path | None = None,
    progress: bool | Monitor = True,
    callback: Callable[[Pruning], None] | None = None,
) -> Pruned:
    """A smaller dense model that costs at most what is asked for, and masks that tell what went.

    Args:
      batches: images to score with, and to train on between prunings; see the guide for what may be given.
      macs, params, latency: what the small model may cost, as a ratio in (0, 1] to `model`.
      max_macs, max_params, max_ms: the same as absolute numbers: an image's MACs, parameters, milliseconds of a batch
        of the latency table. Every limit that is given holds in the end.
      criterion: "obs" (usual for one_shot), "fisher" (usual otherwise), "fisher_set", "hvp", "obd", "taylor",
        "hvp_joint", "magnitude", "random", or a `nvit.Scoring`.
      method: "one_shot" removes everything at once without a gradient step; "gradual" prunes in steps and trains
        between them; "iterative" (NViT) removes a few groups at a time. Or a `nvit.Plan`.
      rule: "per_cost" (usual) removes the group with the least score for the cost that it saves; "solve" (usual for
        obs) finds the widths with the least sum of scores; "eta" and "nvit" are NViT's. Or a `nvit.Choice`.
      compensate: fit the weights that stay anew, so that they make good for what goes; usual for one_shot, and possible
        there alone. Where it does worse than no compensation on held-back images, it says so and the weights stay.
      snapshots: one_shot with one limit: other sizes from the same calibration, as ratios of what is limited, between 1
        and the limit; `Pruned.snapshots[ratio]` is the masked model.
      loss: your own, (logits [B, C], batch) -> [B]. It is a function of the logits and not of the parameters: the
        library makes the masked forward pass itself, since a loss that forgot the masks would score every unit 0.
      kinds, protect, profile, floors: which kinds of units may go, blocks that stay whole, the sizes of the groups that
        go together ("cpu", "gpu", "tpu", "nvit"), and the units that stay at least, such as {"mlp": 64}. With 0 for
        "head" or "mlp" a block may lose its attention or its mlp whole.
      latency_table: a `nvit.LatencyTable`, `nvit.Roofline`, the path of a table, or a function from ViTDims to
        milliseconds. Where a latency is asked for and none is given, this device is measured first: minutes.
      training: how weights train between prunings (gradual, iterative).
      images: score with so many images; None: with all, or with 2,048 for obs and compensation.
      batch: images that are scored together (default 64; 20 for obs and compensation, which may take fewer so that some
        can be held back), where `batches` are no batches yet.
      evaluate_on: images and labels that the masked model is evaluated on after each pruning, for the record.
      measure: time both models at this batch size for the record, in turns; None: do not.
      directory: where states are saved, and from where a stopped run resumes; without it nothing touches the disk.
      callback: is called after each pruning.

    Raises UserError for arguments that are none or do not go together, before anything is scored.

        >>> found = nvit.prune(model, (images, labels), macs=0.6)
        >>> found.model
        Model(12 blocks of embed 176, ...)
    """
    limits = Limits(macs=macs, params=params, latency=latency, max_macs=max_macs, max_params=max_params, max_ms=max_ms)
    plan = method if isinstance(method, Plan) else Plan(method=method)
    if criterion is None:
        criterion = usual_criterion(plan.method)
    check_images(images)
    model = model.compact()
    scoring = scoring_of(criterion, loss, batch).for_model(model.dims)
    choice = choice_of(prune, rule, kinds, protect, profile, floors).usual(scoring.criterion, model.dims)
    check_method(plan, scoring, choice, compensate, model.dims)
    recipe = _recipe(training, model, loss, seed)
    feed = make_feed(batches, model.dims, model.preprocessing, classes=model.classes)
    held = None
    if evaluate_on is not None:
        held = make_feed(evaluate_on, model.dims, model.preprocessing, split="val", classes=model.classes)
    if measure is not None and not isinstance(measure, Measurement):
        with renamed({"batch": "measure"}):
            measure = Measurement(batch=measure)

    def measured() -> Any:
        check_without_latency(limits, choice, plan, model.dims)
        return measure_latency(model, batch=measure.batch if measure else 32, profile=choice.profile, progress=progress)

    table = find_latency(latency_table, model, measured if limits.need_latency else None)
    policy = choice.policy(table)
    targets = reachable_targets(limits, policy, model.dims, table)
    others = {
        ratio: ranker(model.dims, policy, reachable_targets(limit, policy, model.dims, table), plan)
        for ratio, limit in family(limits, snapshots, plan).items()
    }
    setup = Setup(
        targets=targets,
        rank=ranker(model.dims, policy, targets, plan),
        plan=plan,
        scoring=scoring,
        recipe=recipe,
        latency=table,
        measurement=measure,
        images=images,
        compensate=not plan.trains if compensate is None else compensate,
        snapshots=others,
        may_go=policy.may_go,
        whole=policy.whole,
    )
    with open_monitor(progress, directory, "prune", None, (model, limits, plan, choice, scoring, recipe)) as monitor:
        found = Pruner(model, feed, held, setup, monitor).run(callback)
    asked = {name: value for name, value in dataclasses.asdict(limits).items() if value is not None}
    return dataclasses.replace(found, record={"asked": asked} | found.record)


def family(limits: Limits, ratios: Sequence[float], plan: Plan) -> dict[float, Limits]:
    """The limit of each snapshot. Raises UserError for what is no family of the target."""
    given = [name for name, value in dataclasses.asdict(limits).items() if value is not None]
    if not ratios:
        return {}
    if plan.trains:
        raise UserError(' go with method="one_shot"', "snapshots")
    if len(given) != 1:
        raise UserError(f" need one limit, {' and '.join(given)} are given", "snapshots")
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
            raise UserError(f"={tuple(ratios)}: they must be ratios between 0 and 1", "snapshots")
    name = given[0].removeprefix("max_")
    return {float(ratio): Limits(**{"latency" if name == "ms" else name: float(ratio)}) for ratio in ratios}


def check_method(plan: Plan, scoring: Scoring, choice: Choice, compensate: bool | None, dims: ViTDims) -> None:
    """UserError for a method that cannot do what is asked for."""
    if dims.gives_channels and scoring.usual_loss != "own":
        if "embed" in (choice.kinds or ()):
            text = ": embed channels are the features of a model without a classifier, and stay; leave out embed"
            raise UserError(text, "kinds")
        if choice.rule == "nvit":
            text = '="nvit" removes embed channels, too, which are the features of a model without a classifier'
            raise UserError(f'{text}; take "per_cost"', "rule")
    if plan.trains and compensate:
        raise UserError('=True goes with method="one_shot"; otherwise training makes good for what goes', "compensate")
    name = scoring.criterion
    if not scoring.calibrated:
        return
    if plan.trains:
        raise UserError(f'="{name}" goes with method="one_shot"; "fisher" goes with every method', "criterion")
    if scoring.usual_loss == "mix":
        raise UserError(f'="{name}" takes the losses drawn, labels, features and own', "criterion")
    if name == "obs" and "embed" in (choice.kinds or ()):
        raise UserError(f': "obs" has no scores for embed, only for {", ".join(KINDS[1:])}', "kinds")


def scoring_of(criterion: str | Scoring, loss: Loss | None, batch: int | None) -> Scoring:
    """A criterion by name, or a Scoring, with what is given beside it. Raises UserError."""
    if not isinstance(criterion, Scoring):
        return Scoring(criterion=criterion, loss="own" if loss else None, batch=batch)
    if batch is not None:
        raise UserError(" is given beside a Scoring, which has it, too; set it there", "batch")
    if loss is not None and criterion.loss not in (None, "own"):
        raise UserError(f': your own does not go with Scoring(loss="{criterion.loss}")', "loss")
    return dataclasses.replace(criterion, loss="own") if loss else criterion


def _recipe(training: Recipe | None, model: Model, loss: Loss | None, seed: int) -> Recipe:
    """Between prunings weights learn from labels and from the unpruned model; without a classifier from it alone."""
    if training is not None:
        if loss is not None and training.objective.own is None:
            objective = dataclasses.replace(training.objective, own=loss)
            return dataclasses.replace(training, objective=objective)
        return training
    objective = Objective(own=loss, kl_weight=4.0 * model.dims.classes, tau=2.0)
    if not model.dims.classes and loss is None:
        objective = FEATURES
    return Recipe(learning_rate=1e-4, objective=objective, seed=seed, stream=2)
