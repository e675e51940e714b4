"""The latency table: milliseconds of a model on one device as a function of its dims, measured piece by piece.

    ms(dims) = a * attention + m * (mlp + rest) + c * blocks with more than one head
    attention = sum over blocks attention(embed, heads, qk, v), mlp = sum over blocks mlp(embed, mlp), rest(embed)

The three functions are timed over a grid of widths and interpolated linearly. Of attention only the grids (embed,
heads, qk) at the full v and (embed, heads, v) at the full qk are timed: queries and keys cost the same whatever the
values cost, so attention(q, v) = attention(q, full) + attention(full, v) - attention(full, full). The factors a, m,
c >= 0 are fitted on a few whole models, because pieces alone leave out what happens between them: on a CPU ragged
models with several heads come out 10 to 15 % slower than their pieces, those with one head in every block do not.

Smoothing. Timings are noisy, and a wider piece may come out faster. Every grid is replaced by the mean of its running
maximum from below and its running minimum from above, over all axes; both are monotone in every width, so their mean
is, and linear interpolation and the factors keep it so. A grid that was monotone stays as it is.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import nvit_jax
from nvit_jax import schema
from nvit_jax.errors import UserError
from nvit_jax.files import check_shape, read_json, write_json
from nvit_jax.latency import timing
from nvit_jax.model.dims import ViTDims, attention_macs, count_macs, mlp_macs
from nvit_jax.model.vit import PARTS
from nvit_jax.paths import named

AXES = ("embed", "heads", "qk", "v", "mlp")
_KIND = {"embed": "embed", "heads": "head", "qk": "qk", "v": "v", "mlp": "mlp"}
_OBJECT = schema.Table(schema.ANYTHING)
_GROUP = 12  # cells that are compiled and timed together; what a kill loses
_DEPTH = 3  # blocks in a row in a timed piece: alone, one pays for fresh memory that a model's blocks use again
# What pruning changes, and what costs the same whatever its value. All else must be that of the measured model.
_FREE = ("embed", "heads", "qk", "v", "mlp", "qk_scale", "norm_eps")
_SAME = ("depth", *(field.name for field in dataclasses.fields(ViTDims) if field.name not in _FREE))
_LEAST = 0.01  # of the larger factor: a part that costs less has come out of the fit as free

_MOST_CELLS = 10**7  # of the grid over all axes; a measured one has a thousand
SHARED = (
    "the whole models do not tell what attention costs beside the rest, which would come out free; both share one "
    "factor, and the ratio between kinds is that of the pieces alone"
)

Cell = tuple[str, tuple[int, ...]]  # ("attention", (embed, heads, qk, v)), ("mlp", (embed, mlp)) or ("rest", (embed,))
Record = dict[str, Any]  # {"ms": median, "spread": half the interquartile range over the median} or {"skipped": why}


WRITTEN = "what a latency stage writes"
_TEXT, _WIDTHS = schema.Text(), schema.Each(schema.whole(1))
TABLE = schema.Record(  # what `LatencyTable.save` writes
    {
        **dict.fromkeys(("dims", "cells"), _OBJECT),
        **dict.fromkeys(("dtype", "device"), _TEXT),
        "batch": schema.whole(1),
        "axes": schema.Record(dict.fromkeys(AXES, _WIDTHS)),
        "models": schema.Each(_OBJECT),
    }
)


def check_axes(axes: Sequence[Sequence[int]], name: str) -> None:
    """UserError for a grid of which a few lines of a file would fill the memory."""
    if math.prod(len(axis) for axis in axes) > _MOST_CELLS:
        lengths = " x ".join(str(len(axis)) for axis in axes)
        raise UserError(f"{name}: a grid of {lengths} widths is not meant to be; at most {_MOST_CELLS:,} cells are")


class LatencyTable:
    """Milliseconds for one batch of `batch` images, as a function of dims; built from what `measure_table` returns.

    A width below the grid, which ends at one group, costs what the narrowest of the grid does; a part that a block does
    not have costs 0. Raises UserError for a
    missing, negative or non-finite cell, naming it, and when called with a width above the grid.
    """

    of_blocks = True  # a sum over the blocks, given embed

    def __init__(self, values: Mapping[str, Any], name: str = "the latency table") -> None:
        check_shape(name, values, TABLE, WRITTEN)
        self.values, self.name = values, name
        try:
            self.dims = ViTDims.from_json(values["dims"])
            self.batch, self.dtype, self.device = values["batch"], values["dtype"], values["device"]
            self.axes = {axis: tuple(int(width) for width in values["axes"][axis]) for axis in AXES}
            cells = {str(name): dict(record) for name, record in values["cells"].items()}
            whole = [(ViTDims.from_json(m["dims"]), float(m["ms"])) for m in values["models"] if "ms" in m]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{name} is not {WRITTEN} ({error!r})") from error
        for axis, widths in self.axes.items():
            if not widths or any(a >= b for a, b in itertools.pairwise((0, *widths))):
                raise UserError(f"{name}: the widths of {axis} must grow from above 0, they are {list(widths)}")
        check_axes(list(self.axes.values()), name)
        for number, (_, whole_ms) in enumerate(whole):
            if not 0 < whole_ms < np.inf:
                raise UserError(f"{name}: model {number} is {whole_ms}; it must be a positive number of ms")
        ms = _fill(self.dims, {cell: self._checked(cell, cells) for cell in plan(self.axes)})
        e, h, q, v, m = (self.axes[axis] for axis in AXES)
        by_qk = np.array([[[ms["attention", (d, n, k, v[-1])] for k in q] for n in h] for d in e])
        by_v = np.array([[[ms["attention", (d, n, q[-1], k)] for k in v] for n in h] for d in e])
        attention = by_qk[..., :, None] + by_v[..., None, :] - by_qk[..., -1:, None]
        # A sum of noisy cells may come out near 0 or below.
        attention = np.maximum(attention, 0.1 * min(by_qk.min(), by_v.min()))
        mlp = np.array([[ms["mlp", (d, k)] for k in m] for d in e])
        rest = np.array([ms["rest", (d,)] for d in e])
        self._grids = {"attention": attention, "mlp": mlp, "rest": rest}
        self.disorder = max(float(np.max(np.abs(monotone(g) / g - 1))) for g in self._grids.values())
        self._grids = {piece: monotone(grid) for piece, grid in self._grids.items()}
        self.piece_ms = functools.lru_cache(maxsize=None)(self._piece_ms)
        self.factors, self.shared = np.array([1.0, 1.0, 0.0]), False
        if whole:
            self.factors, self.shared = _fit_factors(*self._rows(whole))
        self.leave_one_out = self._leave_one_out(whole)

    def __call__(self, dims: ViTDims) -> float:
        return float(self._parts(dims) @ self.factors)

    def save(self, path: str | pathlib.Path) -> None:
        """Write it as JSON."""
        write_json(pathlib.Path(path), self.values)

    @classmethod
    def read(cls, path: str | pathlib.Path) -> "LatencyTable":
        """What `save` or a latency stage wrote. Raises UserError."""
        return cls(read_json(named(path), TABLE, WRITTEN), str(path))

    def _parts(self, dims: ViTDims) -> np.ndarray:
        """[3] ms of attention and of all else, as the pieces alone say, and the blocks with more than one head."""
        blocks = list(zip(dims.heads, dims.qk, dims.v, dims.mlp, strict=True))
        attention = sum(self.piece_ms("attention", (dims.embed, h, q, v)) for h, q, v, _ in blocks if h)
        mlp = sum(self.piece_ms("mlp", (dims.embed, m)) for *_, m in blocks if m)
        return np.array([attention, mlp + self.piece_ms("rest", (dims.embed,)), sum(h > 1 for h in dims.heads)])

    def _piece_ms(self, piece: str, widths: tuple[int, ...]) -> float:
        grid = self._grids[piece]
        for axis, width in zip(_axes(piece), widths, strict=True):
            places = self.axes[axis]
            if width > places[-1]:
                raise UserError(f"{self.name} knows {axis} from {places[0]} to {places[-1]}, not {width}")
            width = max(width, places[0])
            i = int(np.searchsorted(places, width))
            if places[i] == width:
                grid = grid[i]
            else:
                part = (width - places[i - 1]) / (places[i] - places[i - 1])
                grid = (1 - part) * grid[i - 1] + part * grid[i]
        return float(grid)

    def _checked(self, cell: Cell, cells: Mapping[str, Record]) -> float | None:
        if (record := cells.get(_name(cell))) is None:
            raise UserError(f"{self.name}: the cell {_name(cell)!r} is missing")
        if "skipped" in record:
            return None
        ms = record.get("ms")
        if not isinstance(ms, int | float) or not 0 < ms < np.inf:
            raise UserError(f"{self.name}: the cell {_name(cell)!r} is {ms}; it must be a positive number of ms")
        return float(ms)

    def _rows(self, whole: Sequence[tuple[ViTDims, float]]) -> tuple[np.ndarray, np.ndarray]:
        return np.stack([self._parts(d) for d, _ in whole]), np.array([ms for _, ms in whole])

    def _leave_one_out(self, whole: Sequence[tuple[ViTDims, float]]) -> float | None:
        """Median error of the ratio to the dense model (the first), each model predicted from the others."""
        if len(whole) < 5:
            return None
        rows, ms = self._rows(whole)
        errors = []
        for i in range(1, len(ms)):
            factors, _ = _fit_factors(np.delete(rows, i, 0), np.delete(ms, i))
            errors.append(abs((rows[i] @ factors) / (rows[0] @ factors) / (ms[i] / ms[0]) - 1))
        return float(np.median(errors))

    def check_for(self, dims: ViTDims, batch: int, dtype: str) -> None:
        """UserError when the table was measured for another model, batch or dtype: the first difference is named."""
        for field in _SAME:
            ours, asked = getattr(self.dims, field), getattr(dims, field)
            if ours != asked:
                raise UserError(f"{self.name} was measured for {field} {ours}, this model has {asked}; measure again")
        if (self.batch, self.dtype) != (batch, dtype):
            raise UserError(
                f"{self.name} was measured at batch {self.batch} in {self.dtype}, and is asked for {batch} in {dtype}; "
                "measure again"
            )
        self(dims)  # within the grid


def monotone(grid: np.ndarray) -> np.ndarray:
    """The mean of the running maximum from below and the running minimum from above, over all axes."""
    low, high = grid, grid
    for axis in range(grid.ndim):
        low = np.maximum.accumulate(low, axis)
        high = np.flip(np.minimum.accumulate(np.flip(high, axis), axis), axis)
    return (low + high) / 2


def _fit_factors(rows: np.ndarray, ms: np.ndarray) -> tuple[np.ndarray, bool]:
    """Non-negative least squares of relative errors, and whether attention and all else had to share one factor.

    The dense model, which is first, counts three times: all ratios are to it. Models which do not tell the two apart
    would leave one of them free, and then removing its units would save nothing: the two share one factor, as they do
    with fewer models than factors and one more.
    """
    one = np.array([1.0, 1.0, 0.0]) * np.median(ms / rows[:, :2].sum(1))
    if len(ms) < 4:
        return one, False
    from scipy.optimize import nnls  # half a second of imports

    weight = np.where(np.arange(len(ms)) == 0, 3.0, 1.0)
    scaled = rows * (weight / ms)[:, None]
    found = nnls(scaled, weight)[0]
    if found[:2].min() > _LEAST * found[:2].max():
        return found, False
    both, several = nnls(np.stack([scaled[:, 0] + scaled[:, 1], scaled[:, 2]], 1), weight)[0]
    return (np.array([both, both, several]) if both > 0 else one), True


def _fill(dims: ViTDims, ms: Mapping[Cell, float | None]) -> dict[Cell, float]:
    """Cells that did not fit in memory: the largest measured one below, scaled by MACs."""
    out = {}
    for (piece, widths), value in ms.items():
        if value is None:
            below = [
                (_macs(dims, c), v)
                for c, v in ms.items()
                if v is not None and c[0] == piece and all(a <= b for a, b in zip(c[1], widths, strict=True))
            ]
            if not below:
                raise UserError(f": no {piece} piece fits in memory at this batch; lower it", "batch")
            macs, measured = max(below)
            value = measured * _macs(dims, (piece, widths)) / macs
        out[piece, widths] = value
    return out


# ------------------------------------------------------------------------------------------------- the plan


def grid_axes(dims: ViTDims, sizes: Mapping[str, int], counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Widths to time: at most `counts[axis]` (and 2 at least), in steps of the group sizes, from one group to all."""
    axes = {}
    for axis in AXES:
        widths = getattr(dims, axis)
        top, size = (widths, sizes["embed"]) if axis == "embed" else (max(*widths, 1), sizes[_KIND[axis]])
        size = 1 if axis == "heads" else size
        places = np.linspace(min(size, top), top, max(2, counts[axis]))
        axes[axis] = tuple(sorted({min(max(size, size * round(p / size)), top) for p in places} | {top}))
    return axes


def plan(axes: Mapping[str, Sequence[int]]) -> list[Cell]:
    """The cells of a table."""
    e, h, q, v, m = (axes[axis] for axis in AXES)
    pairs = [(k, v[-1]) for k in q] + [(q[-1], k) for k in v[:-1]]
    cells: list[Cell] = [("attention", (d, n, *pair)) for d, n, pair in itertools.product(e, h, pairs)]
    return cells + [("mlp", pair) for pair in itertools.product(e, m)] + [("rest", (d,)) for d in e]


def _axes(piece: str) -> tuple[str, ...]:
    return {"attention": AXES[:4], "mlp": ("embed", "mlp"), "rest": ("embed",)}[piece]


def _name(cell: Cell) -> str:
    return f"{cell[0]} " + " ".join(f"{a}={w}" for a, w in zip(_axes(cell[0]), cell[1], strict=True))


def _blocks(dims: ViTDims, cell: Cell) -> ViTDims:
    """A model of a few blocks that have the cell's widths; the others do not matter."""
    widths = dict.fromkeys(AXES, 1) | dict(zip(_axes(cell[0]), cell[1], strict=True))
    per_block = {axis: (width,) * _DEPTH for axis, width in widths.items() if axis != "embed"}
    return dataclasses.replace(dims, embed=widths["embed"], **per_block)  # type: ignore[arg-type]


def _macs(dims: ViTDims, cell: Cell) -> int:
    block = _blocks(dims, cell)
    if cell[0] == "rest":
        return count_macs(block) - _DEPTH * (attention_macs(block, 0) + mlp_macs(block, 0))
    return attention_macs(block, 0) if cell[0] == "attention" else mlp_macs(block, 0)


def random_dims(dims: ViTDims, sizes: Mapping[str, int], rng: np.random.Generator) -> ViTDims:
    """Ragged widths as pruning leaves them, in steps of the group sizes.

    For each kind a fraction is drawn between a quarter and all of the width, and the blocks vary around it.
    """

    def around(fraction: float, width: int, size: int) -> int:
        steps = round(width * fraction / size)
        return min(max(steps, 1) * size, width)

    changed: dict[str, Any] = {"embed": around(rng.uniform(0.25, 1), dims.embed, sizes["embed"])}
    for axis in AXES[1:]:
        centre, size = rng.uniform(0.25, 1), 1 if axis == "heads" else sizes[_KIND[axis]]
        spread = np.clip(centre + rng.uniform(-0.25, 0.25, dims.depth), 0.1, 1)
        changed[axis] = tuple(around(f, w, size) for f, w in zip(spread, getattr(dims, axis), strict=True))
    return dataclasses.replace(dims, **changed)


# ---------------------------------------------------------------------------------------------- measurement


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a table is measured on."""

    sizes: Mapping[str, int]  # of the groups that pruning removes: widths lie in steps of them
    counts: Mapping[str, int]  # points of each axis
    models: int = 7  # whole models of random widths that, with the dense one, the pieces are corrected by


def measure_table(
    dims: ViTDims,
    grid: Grid,
    how: timing.Measurement,
    *,
    known: Mapping[str, Record] | None = None,
    keep: Callable[[dict[str, Record]], None] = lambda records: None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Time the pieces over a grid, then the dense model and random ones; the values of a LatencyTable.

    Args:
      known: records of an earlier, stopped measurement; `keep` takes all records after every group of cells.
      advance: is told how many programs of how many are done.
    """
    batch, dtype, repeats = how.batch, how.dtype, how.repeats
    sizes, known = grid.sizes, known or {}
    axes = grid_axes(dims, sizes, grid.counts)
    rng = np.random.default_rng(0)
    whole = [dims] + [random_dims(dims, sizes, rng) for _ in range(grid.models)]
    # What one factor is fitted for is timed with one anchor.
    jobs: dict[str, dict[str, tuple[ViTDims, str]]] = {"attention": {}, "mlp": {}, "model": {}}
    for cell in sorted(plan(axes), key=lambda c: -_macs(dims, c)):  # the widest that fits is what others are timed with
        jobs["mlp" if cell[0] == "rest" else cell[0]][_name(cell)] = (_blocks(dims, cell), cell[0])
    for d in whole:
        jobs["model"]["model " + json.dumps({a: getattr(d, a) for a in AXES})] = (d, "model")
    total = sum(len(pieces) for pieces in jobs.values())
    records = {name: record for name, record in known.items() if "skipped" not in record}  # there may be room now
    for pieces in jobs.values():
        _time_pieces(pieces, records, batch, dtype, repeats, keep, lambda: advance(len(records), total))
    return {
        "device": timing.device_name(),
        "batch": batch,
        "dtype": dtype,
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "python": platform.python_version(),
        "nvit_jax": nvit_jax.__version__,
        "dims": dims.to_json(),
        "axes": axes,
        "cells": {name: records[name] for piece in ("attention", "mlp") for name in jobs[piece]},
        "models": [{"dims": d.to_json()} | records[name] for name, (d, _) in jobs["model"].items()],
    }


def _time_pieces(
    pieces: Mapping[str, tuple[ViTDims, str]],
    records: dict[str, Record],
    batch: int,
    dtype: str,
    repeats: int,
    keep: Callable[[dict[str, Record]], None],
    advance: Callable[[], None],
) -> None:
    """Add the records that are missing, in groups, each timed in turns with the first piece that fits.

    What counts is the ratio to that piece, round by round, so that the machine's drift cancels; its own milliseconds
    are the median of its first group.
    """
    anchor: timing.Call | None = None

    def parts(name: str) -> int:  # of the same kind in a timed program
        return pieces[name][0].depth if pieces[name][1] in PARTS else 1

    anchor_ms = next((r["ms"] * parts(n) for n, r in records.items() if n in pieces and r.get("anchor")), None)
    names = [n for n in pieces if n not in records or records[n].get("anchor")]
    if all(n in records for n in names):
        return
    while names:
        group, names = names[:_GROUP], names[_GROUP:]
        calls = timing.compile_pieces([pieces[n] for n in group], batch, dtype)
        fitting = {n: c for n, c in zip(group, calls, strict=True) if not isinstance(c, timing.DoesNotFit)}
        records |= {n: {"skipped": str(c)} for n, c in zip(group, calls, strict=True) if n not in fitting}
        if fitting:
            anchor = anchor or next(iter(fitting.values()))
            times = timing.time_in_turns([anchor, *fitting.values()], repeats)
            first = anchor_ms is None
            anchor_ms = anchor_ms or float(np.median(times[:, 0]))
            for i, (name, column) in enumerate(zip(fitting, (times[:, 1:] / times[:, :1]).T, strict=True)):
                low, middle, high = np.percentile(column, (25, 50, 75))
                record: Record = {"ms": anchor_ms * middle / parts(name), "spread": (high - low) / 2 / middle}
                if name not in records:
                    records[name] = record | ({"anchor": True} if first and not i else {})
        keep(records)
        advance()


def skipped(values: Mapping[str, Any]) -> list[str]:
    """Cells and models that did not fit in memory, with the reason."""
    out = [f"{name}: {record['skipped']}" for name, record in values["cells"].items() if "skipped" in record]
    return out + [f"a model: {m['skipped']}" for m in values["models"] if "skipped" in m]


def spread(records: Iterable[Record]) -> float:
    """Median spread of the cells that were timed."""
    return float(np.median([r["spread"] for r in records if "spread" in r]))
