"""What the prune section of a config means: the criterion, the groups and their rule, and where latency comes from."""

import pathlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from nvit_jax import latency, nvit, prune, ranking, saliency
from nvit_jax.checkpoint import read_json
from nvit_jax.dims import Units, ViTDims
from nvit_jax.errors import UserError
from nvit_jax.stages.common import Run


def policy(p: ConfigDict, predict_ms: Callable[[ViTDims], float] | None) -> ranking.Policy:
    """How units are grouped and compared."""
    return ranking.Policy(
        sizes=ranking.group_sizes(p.profile),
        floors=dict(p.floors),
        kinds=tuple(p.kinds),
        protected=tuple(p.protected),
        align=p.align,
        rule="per_cost" if p.rule == "nvit" else p.rule,
        eta=p.eta,
        latency=predict_ms,
    )


def ranker(
    p: ConfigDict,
    dims: ViTDims,
    policy: ranking.Policy,
    targets: list[ranking.Target],
    plan: prune.Plan,
    predict: Callable[[ViTDims], float] | None,
) -> Callable[[Units, Units, int], ranking.Ranking]:
    """(scores, masks, pruning) -> what is left, by the configured rule."""
    if p.rule != "nvit":
        return lambda scores, masks, pruning: ranking.rank(
            scores, masks, dims, policy, plan.targets(pruning, targets), plan.max_groups
        )
    if predict is None:
        raise UserError('prune.rule="nvit" needs a latency model: run the latency stage, or set config.latency.table')
    return lambda scores, masks, pruning: nvit.rank(
        scores,
        masks,
        dims,
        policy.sizes,
        targets,
        predict,
        eta=p.eta,
        done=pruning,
        groups=plan.groups_per_step,
    )


def criterion(p: ConfigDict) -> Callable[..., Any]:
    """The saliency criterion with its options."""
    options: dict[str, Any] = {}
    if p.criterion in ("hvp", "obd"):
        options = {"scheme": p.score.scheme, "chunk": p.score.chunk, "probes": p.score.probes}
    elif p.criterion == "taylor":
        options = {"align": p.align}
    return saliency.criterion(p.criterion, **options)


def latency_model(run: Run, dims: ViTDims) -> latency.LatencyModel | nvit.ReleasedTable | None:
    """From config.latency.table (metrics.json of a latency stage, or the released NViT's JSON), else this run's."""
    table = run.config.latency.table
    if not table and not run.other("latency").done():
        return None
    path = pathlib.Path(table) if table else run.workdir / "latency" / "metrics.json"
    metrics = read_json(path)
    if isinstance(metrics, dict) and any(str(key).startswith("EMB_") for key in metrics):
        return _released_table(run, path, dims)
    try:
        model = latency.LatencyModel.from_json(metrics["model"])
        measured = ViTDims.from_json(metrics["dims"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not what a latency stage writes ({error!r})") from error
    if measured != dims:
        raise UserError(f"{path} was measured for another model; redo it with --stage latency --force")
    c = run.config
    if (model.batch, model.dtype) != (c.latency.batch, c.dtype):
        raise UserError(
            f"{path} was measured at batch {model.batch} in {model.dtype}, the config says {c.latency.batch} in "
            f"{c.dtype}; redo it with --stage latency --force"
        )
    if model.device != latency.device_name():
        run.stage.say(f"warning: latency was measured on {model.device}, this is {latency.device_name()}")
    return model


def _released_table(run: Run, path: pathlib.Path, dims: ViTDims) -> nvit.ReleasedTable:
    found = nvit.ReleasedTable.read(path)
    found(dims)  # a model outside of the table is refused here
    if (dims.image, dims.patch, dims.depth) != (224, 16, 12):
        raise UserError(
            f"{path} was measured for 12 blocks at 224 pixels in patches of 16; this model has {dims.depth} at "
            f"{dims.image} in patches of {dims.patch}"
        )
    run.stage.say(f"warning: latency was measured on {found.device}, this is {latency.device_name()}")
    return found
