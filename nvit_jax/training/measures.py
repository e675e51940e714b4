"""What models are compared by: the numbers of an evaluation, and how they are shown."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from nvit_jax.model.dims import ViTDims

Row = Mapping[str, Any]  # what an evaluation has found of one model


class Measure(NamedTuple):
    """One number of an evaluation; more is better but for the relative error."""

    key: str
    title: str
    words: str  # in a sentence
    form: str


CLASSIFIER = (Measure("top1", "top-1", "top-1", "{:.2%}"), Measure("top5", "top-5", "top-5", "{:.2%}"))
FEATURES = (  # of a model without a classifier; see similarity.py
    Measure("cosine", "cosine", "mean cosine similarity to the unpruned model's features", "{:.4f}"),
    Measure("error", "relative error", "squared error relative to the variance of these features", "{:.4f}"),
    Measure("knn", "kNN top-1", "nearest neighbours' top-1", "{:.2%}"),
)
KEYS = tuple(measure.key for measure in (*CLASSIFIER, *FEATURES))


def watched(dims: ViTDims) -> Measure:
    """The one that the best of several models of these dims is found by."""
    return (CLASSIFIER if dims.classes else FEATURES)[0]


def of(rows: Collection[Row]) -> list[Measure]:
    """Those that there is something to say of; the first is the one that is watched."""
    if not any("cosine" in row for row in rows):
        return list(CLASSIFIER)
    return [m for m in FEATURES if any(row.get(m.key) is not None for row in rows)]


def shown(row: Row, measure: Measure) -> str:
    """One number as text."""
    value = row.get(measure.key)
    return "none" if value is None else measure.form.format(value)
