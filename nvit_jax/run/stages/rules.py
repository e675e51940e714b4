"""What the prune section of a config means: the criterion, the groups and their rule, and where latency comes from."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from nvit_jax.errors import UserError
from nvit_jax.files import read_json
from nvit_jax.latency import roofline, timing
from nvit_jax.latency import table as latency
from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.pruning import allocation, loop, ranking, released, saliency
from nvit_jax.run.stages.common import Run

_RELEASED_GROUP = 16  # units by which the released engine counts what one of its iterations removes
_DISORDER = 0.1  # a change by smoothing that is worth a warning


def policy(p: ConfigDict, predict_ms: Callable[[ViTDims], float] | None) -> ranking.Policy:
    """How units are grouped and compared."""
    sizes = ranking.group_sizes(p.profile)
    return ranking.Policy(
        sizes=sizes,
        floors=sizes if p.rule == "nvit" else dict(p.floors),  # the released engine keeps one group of each
        kinds=tuple(p.kinds),
        protected=tuple(p.protected),
        align=p.align,
        rule="eta" if p.rule == "eta" else "per_cost",  # solve and nvit have their own
        eta=p.eta,
        latency=predict_ms,
    )


def ranker(
    p: ConfigDict,
    dims: ViTDims,
    policy: ranking.Policy,
    targets: list[ranking.Target],
    plan: loop.Plan,
    predict: Callable[[ViTDims], float] | None,
) -> Callable[[Units, Units, int], ranking.Ranking]:
    """(scores, masks, pruning) -> what is left, by the configured rule."""
    if p.rule == "solve":
        return lambda scores, masks, pruning: allocation.allocate(
            scores, masks, dims, policy, plan.targets(pruning, targets)
        )
    if p.rule != "nvit":
        return lambda scores, masks, pruning: ranking.rank(
            scores, masks, dims, policy, plan.targets(pruning, targets), plan.max_groups
        )
    if predict is None:
        raise UserError('prune.rule="nvit" needs a latency model: run the latency stage, or set config.latency.table')
    return lambda scores, masks, pruning: released.rank(
        scores,
        masks,
        dims,
        policy.sizes,
        targets,
        predict,
        eta=p.eta,
        done=pruning,
        per_iteration=_RELEASED_GROUP * plan.groups_per_step,
    )


def criterion(p: ConfigDict) -> Callable[..., Any]:
    """The saliency criterion with its options."""
    options: dict[str, Any] = {}
    if p.criterion in ("hvp", "obd"):
        options = {"scheme": p.score.scheme, "chunk": p.score.chunk, "probes": p.score.probes}
    elif p.criterion == "taylor":
        options = {"align": p.align}
    return saliency.criterion(p.criterion, **options)


LatencyModel = latency.LatencyTable | released.ReleasedTable | roofline.Roofline


def latency_model(run: Run, dims: ViTDims) -> LatencyModel | None:
    """The roofline of the config, or config.latency.table (table.json of a latency stage, or the released NViT's
    JSON), else this run's table."""
    c, given = run.config, run.config.latency.table
    if c.latency.roofline.tflops:
        estimate = roofline_of(c)
        run.stage.say(f"warning: latency is an {estimate.device}, not measured")
        return estimate
    if not given and not run.other("latency").done():
        return None
    path = pathlib.Path(given) if given else run.workdir / "latency" / "table.json"
    values = read_json(path)
    if isinstance(values, dict) and any(str(key).startswith("EMB_") for key in values):
        found: latency.LatencyTable | released.ReleasedTable = _released_table(path, dims)
    else:
        found = latency.LatencyTable(values, str(path))
        found.check_for(dims, c.latency.batch, c.dtype)
    if found.disorder > _DISORDER:
        run.stage.say(
            f"warning: {path}: a wider piece is faster than a narrower one, smoothing would change a cell by "
            f"{found.disorder:.0%}; measure again on a quiet machine"
        )
    if found.device != timing.device_name():
        run.stage.say(f"warning: latency was measured on {found.device}, this is {timing.device_name()}")
    return found


def roofline_of(c: ConfigDict) -> roofline.Roofline:
    """From config.latency.roofline, at latency.batch in config.dtype."""
    r = c.latency.roofline
    return roofline.Roofline(r.tflops, r.gbs, c.latency.batch, jnp.dtype(c.dtype).itemsize, r.tile)


def _released_table(path: pathlib.Path, dims: ViTDims) -> released.ReleasedTable:
    found = released.ReleasedTable.read(path)
    found(dims)  # a model outside of the table is refused here
    if (dims.image, dims.patch, dims.depth) != (224, 16, 12):
        raise UserError(
            f"{path} was measured for 12 blocks at 224 pixels in patches of 16; this model has {dims.depth} at "
            f"{dims.image} in patches of {dims.patch}"
        )
    return found
