"""The JSON files of a workdir: what each holds, and one reader. Damage is named, with the key."""

from pathlib import Path
from typing import Any

from nvit_jax.errors import UserError
from nvit_jax.files import read_json
from nvit_jax.schema import ANYTHING, Alike, Choice, Each, Either, Maybe, Number, Record, Shape, Table, Text, whole

_NUMBER, _MAYBE = Number(), Maybe(Number())
_COSTS: dict[str, Shape] = {"params": Number(0), "macs": Number(0), "latency_ms": Number(0), "images": whole(1)}
_MORE: dict[str, Shape] = {"latency_batch": whole(1), "nonzero_params": whole(0)}
_ALIKE: dict[str, Shape] = {"error": Maybe(Number(0)), "knn": Maybe(Number(0, 1))}
_ROW = Either(  # one model of summary.json
    "cosine",
    Record({"cosine": Number(-1, 1), **_COSTS}, _ALIKE | _MORE),
    Record({"top1": Number(0, 1), **_COSTS}, {"top5": Number(0, 1), **_MORE}),
)
_WIDTHS = Alike(("heads", "qk", "v", "mlp"), {"embed": whole(1)}, Each(whole(0)))
_METRICS = Record({}, {**dict.fromkeys(("val_top1", "val_cosine", "dense_val_top1", "dense_latency_ms"), _MAYBE)})
_PRUNED = Record(
    {
        "criterion": Text(),
        "target": Table(_NUMBER),
        "dims": _WIDTHS,
        **dict.fromkeys(("macs_ratio", "params_ratio", "masked_vs_compact_max_abs_diff"), _NUMBER),
        **dict.fromkeys(("predicted_latency_ratio", "predicted_latency_ms"), _MAYBE),
    },
    {"dense_val_top1": _MAYBE, "latency_source": Maybe(Text())},
)
_TIME = Record({"ms": Number(above=0), "spread": Number(0)})
_TIMED = Record({"ms": Number(above=0), "spread": Number(0), "dims": Table(ANYTHING)})
SHAPES: dict[str, Shape] = {
    "config.json": Record({"config": Table(ANYTHING), "versions": Table(Text()), "device": Text()}),
    "summary.json": Record({"dense": _ROW}, {"pruned": _ROW, "finetuned": _ROW}),
    "stage.json": Record(
        {
            "status": Choice(("running", "done", "stale")),
            "id": Text(),
            "keys": Table(ANYTHING),
            "inputs": Table(Text()),
        },
        {"files": Each(Text()), "command": Text()},
    ),
    "metrics.json": _METRICS,
    "prune/metrics.json": _PRUNED,
    "prune/latency.json": Record({"device": Text(), "how": Table(ANYTHING), "models": Table(_TIMED)}),
    "cells.json": Table(ANYTHING),
    "eval/latency.json": Table(_TIME),
    "scores.json": Table(
        Either(
            "cosine",
            Record({"id": Text(), "cosine": Number(-1, 1), "images": whole(1)}, _ALIKE),
            Record({"id": Text(), "top1": Number(0, 1), "images": whole(1)}),
        )
    ),
    "masked/model.json": Record({"dims": _WIDTHS}),
    "model.json": Record({}, {"variant": Maybe(Text())}),
}
_PRUNING: dict[str, Shape] = {"pruning": whole(0), "dims": _WIDTHS, "macs_ratio": _NUMBER}
_WHEN: dict[str, Shape] = {"step": whole(0), "predicted_latency_ms": _MAYBE}
HISTORY = Either(  # a line of history.jsonl
    "val_cosine",
    Record(_PRUNING | {"val_cosine": _NUMBER}, _WHEN),
    Record(_PRUNING | {"val_top1": _NUMBER}, _WHEN),
)
LOG = Record({"step": whole(0), "loss": _NUMBER}, {"val_top1": _NUMBER, "val_cosine": _NUMBER})  # of log.jsonl


def read(path: Path, *, part: bool = False) -> dict[str, Any]:
    """What a stage has written into one of the files of SHAPES. UserError when it is not there, or is not that.

    With `part`, keys may be missing: another version may have written it.
    """
    shape = SHAPES.get(f"{path.parent.name}/{path.name}") or SHAPES[path.name]
    if part and isinstance(shape, Record):
        shape = Record({}, {**shape.needed, **shape.optional})
    try:
        return dict(read_json(path, shape, "what a stage writes"))
    except UserError as error:
        if not path.exists():
            raise
        raise UserError(f"{error}; move it away or use another --workdir") from error


def read_optional(path: Path) -> dict[str, Any]:
    """A part of the same; {} where there is no such file."""
    return read(path, part=True) if path.exists() else {}
