"""README.md of an exported folder: a model card, filled with what is known and what was measured of the model."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nvit_jax.errors import UserError
from nvit_jax.formats import libraries
from nvit_jax.model.dims import count_macs, count_params
from nvit_jax.model.directory import Model
from nvit_jax.model.summary import one_line
from nvit_jax.schema import Each, Maybe, Number, Record, Shape, Text, whole
from nvit_jax.training import measures
from nvit_jax.training.measures import Measure

MARK = "Written by nvit_jax."  # by which a card is known as one of ours
_ROW: dict[str, Shape] = {
    "top1": Number(0, 1),
    "top5": Number(0, 1),
    "cosine": Number(-1, 1),
    "error": Maybe(Number(0)),
    "knn": Maybe(Number(0, 1)),
    "images": whole(1),
    "params": whole(0),
    "macs": whole(0),
    "latency_ms": Number(above=0),
    "latency_batch": whole(1),
}
_RESULTS = Record(
    {},
    _ROW
    | {
        "device": Text(),
        "dtype": Text(),
        "data": Text(),
        "commands": Each(Text()),
        "dense": Maybe(Record({}, _ROW)),
    },
)
_NEEDS = {**dict.fromkeys(measures.KEYS, ("images",)), "latency_ms": ("latency_batch", "device")}


def check_results(results: Mapping[str, Any]) -> None:
    """UserError, about the argument `results`, for what no measurement gives, and for a number without its conditions.

    {"top1", "top5", "images", "latency_ms", "latency_batch", "device", "dtype", "data", "commands", "dense"}: what
    nvit.evaluate returns has the first three; "cosine", "error" and "knn" in their place without a classifier. "dense"
    holds the same numbers of the unpruned model.
    """
    if (fault := _RESULTS.fault(results)) is not None:
        raise UserError(f": {fault.text}", "results")
    for key, needed in _NEEDS.items():
        for other in needed:
            if key in results and other not in results:
                raise UserError(f": {key} says nothing without {other}; give that, too", "results")


def model_card(model: Model, results: Mapping[str, Any], library: str, use: Sequence[str]) -> str:
    """The text. `library` is the hub's name of what loads the folder; `use` are paragraphs that say how."""
    task = "image-classification" if model.dims.classes else "image-feature-extraction"
    front = [f"library_name: {library}", f"pipeline_tag: {task}", "tags:", "- nvit_jax", "- pruning"]
    name = model.info.get("variant")
    parts = [
        "\n".join(("---", *front, "---")),
        f"# {f'{name}, pruned' if name and results.get('dense') else name or 'Vision Transformer'}",
        f"{one_line(model.dims, None, name)}. {MARK}",
        _measured(model, results),
        "## Use",
        *use,
        "## Images",
        _images(model),
    ]
    if results.get("commands"):
        parts += ["## How it was made", "```sh\n" + "\n".join(results["commands"]) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _measured(model: Model, results: Mapping[str, Any]) -> str:
    """A table. What was not measured is said to be so."""
    own = dict(results) | {"params": count_params(model.dims), "macs": count_macs(model.dims)}
    columns = [("this model", own)] + ([("before pruning", results["dense"])] if results.get("dense") else [])
    lines = [["", *(name for name, _ in columns)], ["---"] * (1 + len(columns))]
    known = measures.CLASSIFIER if model.dims.classes else measures.FEATURES
    judged = [m for m in known if m.key != "knn" or results.get("knn") is not None]
    lines += [[m.words, *(_judged(row, m) for _, row in columns)] for m in judged]
    lines += [[label, *(show(row) for _, row in columns)] for label, show in _LINES]
    said = {*_KNOWN, *(m.key for m in known)}
    others = [key for key, value in results.items() if key not in said and type(value) in (int, float)]
    lines += [[key, *(f"{row[key]:.4g}" if key in row else "" for _, row in columns)] for key in others]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    where = []
    if "images" in results:
        data = f" ({results['data']})" if "data" in results else ""
        where.append(f"Measured on {results['images']:,} images{data}")
    if "latency_ms" in results:
        kind = f" in {results['dtype']}" if "dtype" in results else ""
        where.append(f"Latency is of a batch of {results['latency_batch']} images{kind} on {results['device']}")
    return "## Measured\n\n" + text + ("\n\n" + ". ".join(where) + "." if where else "")


_KNOWN = {*_RESULTS.optional, "loss"} - {*measures.KEYS}


def _judged(row: Mapping[str, Any], measure: Measure) -> str:
    return measures.shown(row, measure) if measure.key in row else "not measured"


_LINES: tuple[tuple[str, Any], ...] = (
    ("images", lambda row: f"{row['images']:,}" if "images" in row else "not measured"),
    ("parameters", lambda row: f"{row['params']:,}" if "params" in row else "not counted"),
    ("MACs of an image", lambda row: f"{row['macs']:,}" if "macs" in row else "not counted"),
    (
        "latency",
        lambda row: (
            f"{row['latency_ms']:.2f} ms for {row['latency_batch']}"
            if {"latency_ms", "latency_batch"} <= row.keys()
            else "not measured"
        ),
    ),
)


def _images(model: Model) -> str:
    pre, dims = model.preprocessing, model.dims
    if pre is None:
        return f"How images are prepared is not known; the model takes {dims.sides[0]} x {dims.sides[1]} pixels."
    text = f"Pixels are divided by {pre.scale:g}; {pre.describe()}. As numbers: `{json.dumps(pre.to_json())}`."
    if dims.channels != 3 or libraries.processor_config(pre) is None:
        return text
    return text + (
        " preprocessor_config.json says the same to transformers, whose crop lies a pixel beside it where its margin "
        "is odd."
    )
