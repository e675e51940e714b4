"""The rules by name: how one pruning chooses what goes."""

import functools
from collections.abc import Callable, Sequence

from nvit_jax.errors import UserError
from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.pruning import allocation, ranking, released
from nvit_jax.pruning.loop import Plan
from nvit_jax.pruning.ranking import Policy, Ranking, Target

Ranker = Callable[[Units, Units, int], Ranking]  # (scores, masks, pruning) -> what that pruning leaves
_RELEASED_GROUP = 16  # units by which the released engine counts what one of its iterations removes


def ranker(dims: ViTDims, policy: Policy, targets: Sequence[Target], plan: Plan) -> Ranker:
    """What `plan` calls at each pruning. Raises UserError for a rule that does not go with the plan."""
    if policy.rule == "solve":
        if plan.method == "iterative":
            raise UserError('="solve" solves for a target and cannot go a few groups at a time', "rule")
        return lambda scores, masks, pruning: allocation.allocate(
            scores, masks, dims, policy, plan.targets(pruning, targets)
        )
    if policy.rule != "nvit":
        return lambda scores, masks, pruning: ranking.rank(
            scores, masks, dims, policy, plan.targets(pruning, targets), plan.max_groups
        )
    if policy.align != "shared" or plan.method != "iterative":
        raise UserError('="nvit" needs align="shared" and the method "iterative", as the released engine works', "rule")
    if policy.protected or set(policy.kinds) != set(ranking.KINDS):
        raise UserError('="nvit" removes all kinds from all blocks, as the released engine does', "rule")
    return functools.partial(_released, dims, policy, targets, _RELEASED_GROUP * plan.groups_per_step)


def _released(
    dims: ViTDims,
    policy: Policy,
    targets: Sequence[Target],
    per_iteration: int,
    scores: Units,
    masks: Units,
    pruning: int,
) -> Ranking:
    assert policy.latency is not None
    return released.rank(
        scores,
        masks,
        dims,
        policy.sizes,
        targets,
        policy.latency,
        eta=policy.eta,
        done=pruning,
        per_iteration=per_iteration,
    )
