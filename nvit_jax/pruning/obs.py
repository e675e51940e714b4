"""The criterion "obs": what a unit is worth once the others make good for it (optimal brain surgeon).

Each block's attention is put into the bases of rebasis.py, its neurons into the order of leastsquares.removal. That
gives a curve for each kind of unit in each block: the loss when the first 0, 1, 2, ... are gone and the rest is fitted
anew, estimated to second order. Such an estimate holds for small cuts. A few real ones tell how far it is off for large
ones: one part is cut to a width and compensated, the rest of the model stays, and the divergence of the outputs on
held-back images scales the curve. A unit's score is what the curve rises by when it goes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nvit_jax.model import vit
from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.model.groups import Params
from nvit_jax.model.masks import full_masks, normalize
from nvit_jax.pruning import compensation, rebasis
from nvit_jax.pruning.compensation import ORDER, TOKENS, Chosen
from nvit_jax.pruning.leastsquares import removal, solve
from nvit_jax.pruning.moments import Moments, Sensitivity, TokenMoments
from nvit_jax.pruning.statistics import Streams, Walk, padded_block

CUTS = (0.625, 0.375, 0.125)  # widths that are really cut to, of the whole
_JUDGED = 60  # held-back images, about, that are looked at after a real cut
_LEAST = 1e-7  # divergence that rounding makes
_KEEP = Chosen(values=False, neurons=False)


@dataclasses.dataclass(frozen=True)
class Scored:
    """A model in the bases of its scores."""

    params: Params  # the same function
    scores: Units
    cuts: list[dict[str, Any]]  # the real ones: block, kind, width, estimate, divergence


def score(
    walk: Walk,
    params: Params,
    felt: list[Sensitivity],
    *,
    turned: bool = True,
    calibrated: bool = True,
    told: Callable[[int], None] = lambda done: None,
) -> Scored:
    """Scores of all units but embed's, which are 0.

    Args:
      turned: change the bases; otherwise query/key and value dims are scored where they are.
      calibrated: scale by real cuts.
      told: hears of every block that is done.
    """
    dims = walk.dims
    masks = full_masks(dims)
    scores = Units(*(np.zeros(np.shape(m)) for m in masks))
    out = dict(params)
    cuts: list[dict[str, Any]] = []
    stream = walk.begin(params)
    judge = _Judge(walk, params) if calibrated else None
    for index in range(dims.depth):
        name = f"block_{index}"
        padded = padded_block(dims, params[name])
        middle = walk.advance("attention", padded, stream)
        after = walk.advance("mlp", padded, middle)
        streams, feel = (stream, middle, after), (felt[2 * index], felt[2 * index + 1])
        curves, found = _curves(walk, params[name], index, streams, feel, turned=turned)
        if judge is not None:
            curves = {kind: judge.scaled(kind, curve, found, streams, feel, cuts) for kind, curve in curves.items()}
        _spread(scores, curves, found.order, index, dims)
        out[name], stream = found.block, after
        told(index + 1)
    return Scored(out, scores, cuts)


class _Block(NamedTuple):
    """One block in its new bases."""

    number: int
    block: Params
    order: np.ndarray  # in which its neurons go
    moments: dict[str, tuple[TokenMoments, TokenMoments]]  # of both parts, in the new bases


def _curves(
    walk: Walk,
    block: Params,
    index: int,
    streams: tuple[Streams, Streams, Streams],
    felt: tuple[Sensitivity, Sensitivity],
    *,
    turned: bool,
) -> tuple[dict[str, np.ndarray], _Block]:
    """Of one block: the estimated loss when the first 0, 1, ... are gone, of qk, v and mlp; of each head alone."""
    dims, (before, middle, after) = walk.dims, streams
    masks = full_masks(dims)
    heads, qk, width = dims.heads[index], dims.qk[index], dims.v[index]
    curves = {}
    queries, keys = walk.queries_and_keys(padded_block(dims, block), felt[0].shares(TOKENS), before)
    found = [rebasis.logit_basis(queries[h, :qk, :qk], keys[h, :qk, :qk]) for h in range(heads)]
    power = np.sum([squares for _, _, squares in found], 0)
    curves["qk"] = np.concatenate([[0], np.cumsum(power[::-1])])

    attention = compensation.part_moments(walk, block, masks, index, "attention", before, middle)
    both = (attention[0] + attention[1]).together(felt[0].shares(TOKENS))
    bases, curves["v"] = rebasis.value_basis(both, felt[0].metric, np.ones(heads), width, ORDER)
    curves["head"] = _head_losses(both, felt[0].metric, heads)
    if turned:
        block = rebasis.change(block, bases, (np.stack([f[0] for f in found]), np.stack([f[1] for f in found])))
        features = compensation.value_features(bases, np.ones((heads, width)))
        attention = attention[0].mapped(features), attention[1].mapped(features)

    mlp = compensation.part_moments(walk, block, masks, index, "mlp", middle, after)
    both = (mlp[0] + mlp[1]).together(felt[1].shares(TOKENS))
    order, curves["mlp"] = removal(both, felt[1].metric, np.ones(dims.mlp[index]), ORDER)
    return curves, _Block(index, block, order, {"attention": attention, "mlp": mlp})


def _head_losses(moments: Moments, metric: np.ndarray, heads: int) -> np.ndarray:
    """[H] half the error when one head goes and the others make good for it."""
    c = moments.covariance
    scale = max(float(np.trace(c)) / len(c), np.finfo(float).tiny)
    inverse = solve(c + ORDER * scale * np.eye(len(c)), np.eye(len(c)))
    weights = inverse @ moments.cross
    width = len(c) // heads
    losses = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        error = weights[own].T @ solve(inverse[own, own], weights[own])
        losses.append(max(float((metric * error).sum()), 0.0) / 2)
    return np.array(losses)


class _Judge:
    """Real cuts, and what they do to the outputs on held-back images, or on all where none are."""

    def __init__(self, walk: Walk, params: Params) -> None:
        self.walk = walk
        self.params = walk.parallel.place(vit.stack_blocks(params))
        everything = walk.begin(params)
        held = [i for i, back in enumerate(walk.images.held) if back or not any(walk.images.held)]
        size = len(walk.images.batches[0]["image"])
        self.held = held[: max(_JUDGED // size, 1)]
        self.dense = walk.finish(self.params, [everything[i] for i in self.held], 0)

    def scaled(
        self,
        kind: str,
        curve: np.ndarray,
        found: _Block,
        streams: tuple[Streams, Streams, Streams],
        felt: tuple[Sensitivity, Sensitivity],
        cuts: list[dict[str, Any]],
    ) -> np.ndarray:
        """The curve through what was measured; between the real cuts the factor is interpolated in its logarithm."""
        if kind == "head":  # each alone
            if len(curve) == 1:
                return curve
            return np.array([self._cut(kind, h, found, streams, felt, float(x), cuts) for h, x in enumerate(curve)])
        full = len(curve) - 1
        gone, factors = [], []
        for width in sorted({max(round(full * ratio), 1) for ratio in CUTS} - {full}, reverse=True):
            estimate = float(curve[full - width])
            divergence = self._cut(kind, width, found, streams, felt, estimate, cuts)
            gone.append(full - width)
            factors.append(np.log(max(divergence, _LEAST)) - np.log(max(estimate, np.finfo(float).tiny)))
        if not gone:
            return curve
        factor = np.exp(np.interp(np.arange(full + 1), gone, factors))
        return np.maximum.accumulate(curve * factor)

    def _cut(
        self,
        kind: str,
        width: int,
        found: _Block,
        streams: tuple[Streams, Streams, Streams],
        felt: tuple[Sensitivity, Sensitivity],
        estimate: float,
        cuts: list[dict[str, Any]],
    ) -> float:
        """What a cut to a width does to the outputs; of a head, what its removal does."""
        walk, index, masks = self.walk, found.number, full_masks(self.walk.dims)
        if kind == "mlp":
            masks.mlp[index, found.order[: len(found.order) - width]] = 0
        elif kind == "head":
            masks.head[index, width] = 0
        else:
            getattr(masks, kind)[index, :, width:] = 0
        masks = normalize(masks)
        at = int(kind == "mlp")
        part, before, after = vit.PARTS[at], streams[at], streams[at + 1]
        moments = found.moments[part]
        if kind == "qk":  # other logits, other features
            moments = compensation.part_moments(walk, found.block, masks, index, part, before, after)
        block, masks = compensation.compensate_part(
            walk.dims, found.block, masks, index, part, moments, felt[at], _KEEP, use_held=False
        )
        ready = padded_block(walk.dims, compensation.masked_block(block, masks, index))
        x = walk.advance(part, ready, [before[i] for i in self.held])
        x = walk.advance("mlp", ready, x) if part == "attention" else x
        divergence = walk.divergence(walk.finish(self.params, x, index + 1), self.dense)
        cuts.append({"block": index, "kind": kind, "width": width, "estimate": estimate, "divergence": divergence})
        return divergence


def _spread(scores: Units, curves: dict[str, np.ndarray], order: np.ndarray, index: int, dims: ViTDims) -> None:
    """The rises of the curves as scores of units; those that go later have strictly more."""

    def rises(curve: np.ndarray) -> np.ndarray:
        found = np.maximum.accumulate(np.maximum(np.diff(curve), 0))
        floor = max(float(curve[-1]), np.finfo(float).tiny) * 1e-12
        return np.asarray(found + floor * np.arange(1, len(found) + 1))

    heads = dims.heads[index]
    for kind in ("qk", "v"):
        rows = rises(curves[kind])[::-1] / heads
        getattr(scores, kind)[index, :heads, : len(rows)] = rows
    scores.mlp[index, order] = rises(curves["mlp"])
    scores.head[index, :heads] = curves["head"]
