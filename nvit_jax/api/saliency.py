"""saliency and rank: what `prune` does in one call, step by step for research."""

from collections.abc import Mapping, Sequence
from typing import Any

from nvit_jax.api.arguments import checked
from nvit_jax.api.prune import scoring_of
from nvit_jax.api.pruner import Pruner, Setup
from nvit_jax.api.recipe import Loss, Recipe
from nvit_jax.api.targets import Choice, Limits, check_images, choice_of, find_latency, reachable_targets
from nvit_jax.data.feed import make_feed
from nvit_jax.errors import UserError
from nvit_jax.model.dims import Units
from nvit_jax.model.directory import Model, check_weights
from nvit_jax.model.masks import check_finite, check_scores, full_masks
from nvit_jax.pruning.loop import Plan
from nvit_jax.pruning.ranking import Ranking
from nvit_jax.pruning.rules import ranker
from nvit_jax.pruning.scoring import Scoring
from nvit_jax.training import distill
from nvit_jax.training.losses import Objective
from nvit_jax.training.monitor import Console, Monitor


@checked
def saliency(
    model: Model,
    batches: Any,
    *,
    criterion: str | Scoring = "fisher",
    loss: Loss | None = None,
    images: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    parallel: str = "jit",
    progress: bool | Monitor = True,
) -> Units:
    """Scores of all units, float64, averaged over the batches of one pass; the arguments are those of `prune`.

    Raises UserError, and FloatingPointError that names the first unit whose score is not finite.
    """
    monitor = progress if isinstance(progress, Monitor) else Console("saliency") if progress else Monitor()
    check_images(images)
    if (criterion.criterion if isinstance(criterion, Scoring) else criterion) == "obs":
        raise UserError('="obs" scores the units of a model in another basis; nvit.prune makes both', "criterion")
    model = model.compact()
    feed = make_feed(batches, model.dims, model.preprocessing, classes=model.classes)
    recipe = Recipe(objective=Objective(own=loss), seed=seed, stream=2, parallel=parallel)
    scoring = scoring_of(criterion, loss, batch).for_model(model.dims)
    setup = Setup(targets=[], rank=_no_ranking, plan=Plan(), scoring=scoring, recipe=recipe, images=images)
    pruner = Pruner(model, feed, None, setup, monitor)
    state = distill.new_state(model.params, pruner.optimizer, seed, masks=pruner.masks)
    try:
        scores = pruner.score(state, 0)
    finally:
        pruner.close()
    check_finite(scores)
    return scores


@checked
def rank(
    scores: Units,
    model: Model,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    max_macs: float | None = None,
    max_params: float | None = None,
    max_ms: float | None = None,
    rule: str | Choice | None = None,
    kinds: Sequence[str] | None = None,
    protect: Sequence[int] = (),
    profile: str = "cpu",
    floors: Mapping[str, int] | None = None,
    latency_table: Any = None,
) -> Ranking:
    """Which units go, given their scores: `.masks`, compact `.dims`, what was `.removed`, and `.met`: the limits hold.

    `nvit.reshape(model, found.masks)` makes the small model. The arguments are those of `prune`. A masked model is
    ranked from its masks on. Raises UserError.
    """
    choice = choice_of(rank, rule, kinds, protect, profile, floors).usual("", model.dims)
    limits = Limits(macs=macs, params=params, latency=latency, max_macs=max_macs, max_params=max_params, max_ms=max_ms)
    if limits.need_latency and latency_table is None:
        raise UserError(" is needed for a limit on latency; nvit.measure_latency(model) makes one", "latency_table")
    masks = full_masks(model.dims) if model.masks is None else model.masks
    check_weights(model.params, "model")
    if not any(score.any() for score in check_scores(scores, model.dims)):
        raise UserError(": all are 0, which tells nothing; nvit.saliency gives scores of a trained model", "scores")
    table = find_latency(latency_table, model)
    policy = choice.policy(table)
    targets = reachable_targets(limits, policy, model.dims, table)
    return ranker(model.dims, policy, targets, Plan())(scores, masks, 0)


def _no_ranking(scores: Units, masks: Units, pruning: int) -> Ranking:
    raise AssertionError("scores only")
