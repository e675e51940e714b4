"""What the prune and latency sections of a config mean in the library's words."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
from ml_collections import ConfigDict

from nvit_jax.api.targets import NAMES, Choice, Limits, usual_criterion
from nvit_jax.errors import UserError, renamed
from nvit_jax.latency.roofline import Roofline
from nvit_jax.latency.sources import Latency, check_latency, of_another_device, read_latency
from nvit_jax.latency.table import LatencyTable
from nvit_jax.latency.timing import Measurement, device_name
from nvit_jax.model.dims import ViTDims
from nvit_jax.pruning.loop import Plan
from nvit_jax.pruning.scoring import Scoring
from nvit_jax.run.stages.common import Run, keys_of

_DISORDER = 0.5  # a change by smoothing that is worth a warning: half of a cell


@contextlib.contextmanager
def prune_keys() -> Iterator[None]:
    """Errors of the library about a pruning speak of the config's keys."""
    names = {ours: f"config.prune.target.{key}" for ours, key in NAMES.items()}
    names |= {
        "method": "config.prune.mode",
        "protect": "config.prune.protected",
        "criterion.batch": "config.prune.score.batch",
    }
    names |= {key: f"config.prune.score.{key}" for key in ("scheme", "chunk", "probes", "batches")}
    names |= {
        key: f"config.prune.{key}"
        for key in ("criterion", "rule", "compensate", "snapshots", "profile", "kinds", "floors", "align", "eta")
    }
    names |= {key: f"config.prune.{key}" for key in ("interval", "steps", "groups_per_step", "plain_first")}
    with keys_of("prune"), renamed(names):
        yield


def limits(p: ConfigDict, *, latency: bool) -> Limits:
    """config.prune.target. UserError when nothing is asked for, and for a latency where no model of it is known."""
    asked = {name: p.target[key] for name, key in NAMES.items()}
    if all(value is None for value in asked.values()):
        raise UserError("config.prune.target: set at least one of " + ", ".join(NAMES.values()))
    found = Limits(**asked)
    if found.need_latency and not latency:
        key = NAMES["latency" if found.latency is not None else "max_ms"]
        raise UserError(
            f"config.prune.target.{key} needs a latency model: run --stage latency first, or set config.latency.table"
        )
    if p.rule in ("nvit", "eta") and not latency:
        raise UserError(
            f'prune.rule="{p.rule}" needs a latency model: run the latency stage, or set config.latency.table'
        )
    if p.snapshots and p.mode == "iterative" and not latency:
        raise UserError("prune.snapshots needs a latency model: run the latency stage, or set config.latency.table")
    return found


def choice(p: ConfigDict, dims: ViTDims) -> Choice:
    """Which units may go, in which groups, by which rule."""
    return Choice(
        rule=p.rule,
        kinds=None if p.kinds is None else tuple(p.kinds),
        protect=tuple(p.protected),
        profile=p.profile,
        floors=dict(p.floors),
        align=p.align,
        eta=p.eta,
    ).usual(criterion(p), dims)


def criterion(p: ConfigDict) -> str:
    """By name."""
    return str(p.criterion or usual_criterion(p.mode))


def plan(p: ConfigDict) -> Plan:
    """When prunings happen."""
    return Plan(
        method=p.mode,
        interval=p.interval,
        steps=p.steps,
        groups_per_step=p.groups_per_step,
        warmup=p.interval if p.plain_first else 0,
        ema=p.ema,
        reset_scores=p.reset_scores,
        plain_first=p.plain_first,
    )


def scoring(p: ConfigDict) -> Scoring:
    """What a score is."""
    s = p.score
    return Scoring(
        criterion=criterion(p),
        loss=s.loss,
        batch=s.batch,
        batches=s.batches,
        scheme=s.scheme,
        chunk=s.chunk,
        probes=s.probes,
        align=p.align,
        remat=s.remat,
        from_training=s.from_training,
    )


def measurement(c: ConfigDict) -> Measurement:
    """How this run times models."""
    return Measurement(batch=c.latency.batch, dtype=c.dtype, repeats=c.latency.repeats)


def roofline_of(c: ConfigDict) -> Roofline:
    """From config.latency.roofline, at latency.batch in config.dtype."""
    r = c.latency.roofline
    return Roofline(r.tflops, r.gbs, c.latency.batch, jnp.dtype(c.dtype).itemsize, r.tile)


def latency_model(run: Run, dims: ViTDims) -> Latency | None:
    """The roofline of the config, or config.latency.table, else this run's table; None when there is none."""
    c, given = run.config, run.config.latency.table
    if c.latency.roofline.tflops:
        estimate = roofline_of(c)
        run.stage.say(f"warning: latency is an {estimate.device}, not measured")
        return estimate
    if not given and not run.other("latency").done():
        return None
    path = pathlib.Path(given) if given else run.workdir / "latency" / "table.json"
    found = read_table(path, dims, c)
    if isinstance(found, LatencyTable) and found.disorder > _DISORDER:
        run.stage.say(
            f"warning: {path}: a wider piece is faster than a narrower one, smoothing would change a cell by "
            f"{found.disorder:.0%}; measure again on a quiet machine"
        )
    if of_another_device(found):
        run.stage.say(f"warning: latency was measured on {found.device}, this is {device_name()}")
    return found


def read_table(path: pathlib.Path, dims: ViTDims, c: ConfigDict) -> Latency:
    """A table that fits the model, the batch and the type of this run. UserError."""
    found = read_latency(path)
    with renamed({"latency_table": str(path)}):
        check_latency(found, dims, c.latency.batch, c.dtype)
    return found
