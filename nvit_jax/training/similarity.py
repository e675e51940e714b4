"""Evaluation without a classifier: how like the unpruned model's the features are, and what their neighbours tell."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.parallel import Parallel, fetch
from nvit_jax.training.losses import feature_distance

NEIGHBOURS = 20  # that vote, and their temperature: Caron et al. 2021 (DINO), section 4.1; Wu et al. 2018
TEMPERATURE = 0.07
_ROWS = 256  # images whose neighbours are looked for together

Pair = Callable[[Any, jax.Array], tuple[jax.Array, jax.Array | None]]  # (state, images) -> ours, theirs, [B, T, D]


class Features(NamedTuple):
    """Of n images, on the host."""

    ours: np.ndarray  # [n, D], a mean over the T tokens that classifiers would read
    theirs: np.ndarray | None  # of the unpruned model
    loss: np.ndarray | None  # [n], feature_distance
    labels: np.ndarray | None  # [n], where all images have one


def make_feature_step(pair: Pair, parallel: Parallel) -> Callable[[Any, Any], dict[str, Any]]:
    """Compile (state, batch) -> rows of the batch on the host."""

    def step(state: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
        ours, theirs = pair(state, batch["image"])
        found = {"ours": ours.mean(1)} | {name: batch[name] for name in ("label", "valid") if name in batch}
        if theirs is None:
            return found
        return found | {"theirs": theirs.mean(1), "loss": feature_distance(theirs, ours)}

    compiled = parallel.compile_walk(step, rows=True)
    return lambda state, batch: fetch(compiled(state, parallel.shard(batch)))


def gather(
    step: Callable[[Any, Any], dict[str, Any]],
    state: Any,
    batches: Iterable[Any],
    advance: Callable[[int], None] = lambda images: None,
) -> Features:
    """The features of all images once. UserError for features that are not finite, and where there is no image."""
    found: dict[str, list[np.ndarray]] = {}
    done = 0
    for batch in batches:
        rows = step(state, batch)
        valid = rows.pop("valid") > 0
        for name, values in rows.items():
            found.setdefault(name, []).append(values[valid])
        for name in ("ours", "theirs"):
            if name in rows:
                _check_finite(rows[name][valid], done, "model" if name == "ours" else "reference")
        done += int(valid.sum())
        advance(done)
    if not done:
        raise UserError(": there is no image to evaluate", "batches")
    whole = {name: np.concatenate(parts) for name, parts in found.items()}
    labels = whole.get("label")
    return Features(
        whole["ours"].astype(np.float32),
        whole["theirs"].astype(np.float32) if "theirs" in whole else None,
        whole.get("loss"),
        labels if labels is not None and len(labels) == done and (labels >= 0).all() else None,
    )


def _check_finite(features: np.ndarray, done: int, argument: str) -> None:
    broken = np.flatnonzero(~np.isfinite(features).all(-1))
    if len(broken):
        raise UserError(
            f": the features of {len(broken)} of {len(features)} images are not finite, image {done + broken[0]} (from "
            "0) is the first; the weights or the preprocessing of this model are no good",
            argument,
        )


def likeness(found: Features) -> dict[str, float | None]:
    """{"cosine", "error", "loss"} of the features f and the unpruned model's f0 of n images.

    cosine: mean of <f, f0> / (|f| |f0|). error: sum of |f - f0|^2 / sum of |f0 - mean f0|^2, the part of their variance
    that is lost: 0 for equal ones, 1 for a model that always gives their mean; None where all f0 are the same. loss:
    mean of `feature_distance`.
    """
    assert found.theirs is not None and found.loss is not None
    ours, theirs = found.ours.astype(np.float64), found.theirs.astype(np.float64)
    cosine = 1 - np.square(_unit(ours) - _unit(theirs)).sum(1) / 2  # exactly 1 for equal ones
    variance = np.square(theirs - theirs.mean(0)).sum()
    error = float(np.square(ours - theirs).sum() / variance) if variance > 0 else None
    return {"cosine": float(cosine.mean()), "error": error, "loss": float(found.loss.astype(np.float64).mean())}


def neighbours_tell(found: Features, database: Features | None, k: int) -> float | None:
    """Top-1 accuracy of the k nearest neighbours, a fraction; None where no image has one of its class.

    `database`: the images that neighbours are looked for in; None: the same images without the one itself (leave one
    out). Both have labels. The k of the highest cosine similarity s vote for their classes with the weight
    exp(s / TEMPERATURE); of equal classes the first one counts.
    """
    alone, others = database is None, found if database is None else database
    labels = found.labels
    assert labels is not None and others.labels is not None
    names, targets = np.unique(others.labels, return_inverse=True)
    counts = dict(zip(names.tolist(), np.bincount(targets).tolist(), strict=True))
    if not any(counts.get(label, 0) > alone for label in labels.tolist()):
        return None
    queries, keys = _unit(found.ours), _unit(others.ours)
    k = min(k, len(keys) - alone)
    right = 0
    for start in range(0, len(queries), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(queries)))
        similar = queries[rows] @ keys.T
        if alone:
            similar[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argpartition(-similar, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(similar, nearest, 1) / TEMPERATURE)
        votes = np.zeros((len(rows), len(names)))
        np.add.at(votes, (np.arange(len(rows))[:, None], targets[nearest]), weights)
        right += int((names[votes.argmax(1)] == labels[rows]).sum())
    return right / len(queries)


def _unit(features: np.ndarray) -> np.ndarray:
    wide = features.astype(np.float64)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.finfo(np.float64).tiny))
