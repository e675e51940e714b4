"""benchmark and measure_latency: what models cost on this device."""

from collections.abc import Sequence
from typing import Any

from nvit_jax.api.arguments import checked
from nvit_jax.errors import UserError
from nvit_jax.latency import timing
from nvit_jax.latency.table import Grid, LatencyTable, measure_table
from nvit_jax.latency.timing import Measurement
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.directory import Model
from nvit_jax.pruning.ranking import group_sizes
from nvit_jax.training.monitor import Console, Monitor

WIDTHS = {"embed": 5, "heads": 4, "qk": 3, "v": 3, "mlp": 5}  # grid points of each axis


@checked
def benchmark(
    models: Sequence[Model | ViTDims] | Model, *, batch: int = 32, dtype: str = "float32", repeats: int = 15
) -> list[dict[str, float]]:
    """{"ms", "spread", "ratio"} of each model: the median of `repeats` runs of a batch, half the interquartile range
    over the median, and the ratio to the first.

    The models run in turns, so that a drift of the machine hits all alike. Masked models are timed as what their masks
    leave. Raises UserError for a batch that does not fit in memory.

        >>> nvit.benchmark([model, small], batch=32)
        [{'ms': 41.2, 'spread': 0.01, 'ratio': 1.0}, {'ms': 22.9, 'spread': 0.02, 'ratio': 0.56}]
    """
    if not isinstance(models, Model | Sequence):
        raise UserError(f" is a {type(models).__name__}; give a Model, or several", "models")
    several = [models] if isinstance(models, Model) else list(models)
    if not several:
        raise UserError(": there are none", "models")
    for number, one in enumerate(several):
        if not isinstance(one, Model | ViTDims):
            raise UserError(f"[{number}] is a {type(one).__name__}; it must be a Model, or dims", "models")
    dims = [one.compact().dims if isinstance(one, Model) else one for one in several]
    found = timing.measure(dims, Measurement(batch=batch, dtype=dtype, repeats=repeats))
    return [{"ms": one.ms, "spread": one.spread, "ratio": one.ms / found[0].ms} for one in found]


@checked
def measure_latency(
    model: Model,
    *,
    batch: int = 32,
    dtype: str = "float32",
    profile: str = "cpu",
    repeats: int = 15,
    progress: bool | Monitor = True,
) -> LatencyTable:
    """The latency table of this device for models cut out of `model`; takes minutes. Save it with `.save(path)`.

    `profile` says in which steps widths are timed: the sizes of the groups that pruning removes. A table called with
    ViTDims gives milliseconds of a batch.
    """
    monitor = progress if isinstance(progress, Monitor) else Console("latency") if progress else Monitor()
    how = Measurement(batch=batch, dtype=dtype, repeats=repeats)
    with monitor.progress(None, what="timing", unit="piece"):
        values: dict[str, Any] = measure_table(
            model.compact().dims,
            Grid(group_sizes(profile), WIDTHS),
            how,
            advance=lambda done, total: monitor.advance(done, total=total),
        )
    return LatencyTable(values)
