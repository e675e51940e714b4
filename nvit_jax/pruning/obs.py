"""The criterion "obs": what a unit is worth once the others make good for it (optimal brain surgeon).

Each block's attention is put into the bases of rebasis.py, its neurons into the order of leastsquares.removal. That
gives a curve for each kind of unit in each block: the loss when the first 0, 1, 2, ... are gone and the rest is fitted
anew, estimated to second order. Such an estimate holds for small cuts. A few real ones tell how far it is off for large
ones: one part is cut to a width and compensated, the rest of the model stays, and the divergence of the outputs on
held-back images scales the curve. A unit's score is what the curve rises by when it goes.

Where a part may go whole, it really is removed once, too: all but the mean of what it writes. What that does to the
outputs is the sum of the scores of its neurons, or of its heads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

from nvit_jax.model import vit
from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.model.groups import Params
from nvit_jax.model.masks import full_masks, normalize
from nvit_jax.pruning import compensation, rebasis
from nvit_jax.pruning.compensation import NORMS, ORDER, TOKENS
from nvit_jax.pruning.leastsquares import inverse, removal, solve
from nvit_jax.pruning.moments import Moments, Sensitivity, TokenMoments
from nvit_jax.pruning.statistics import Streams, Walk, padded_block

CUTS = (0.625, 0.375, 0.125)  # widths that are really cut to, of the whole
_JUDGED = 60  # held-back images, about, that are looked at after a real cut
_LEAST = 1e-7  # divergence that rounding makes


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
    whole: Callable[[str, int], bool] = lambda kind, block: False,
    turned: bool = True,
    calibrated: bool = True,
    told: Callable[[int], None] = lambda done: None,
) -> Scored:
    """Scores of all units but embed's, which are 0.

    Args:
      whole: which parts may go, as ranking.Policy.whole.
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
        gone = float(curves["v"][-1]) if "v" in curves and whole("head", index) else None
        if judge is not None:
            curves = {
                kind: judge.scaled(kind, curve, found, streams, feel, cuts, whole=kind == "mlp" and whole(kind, index))
                for kind, curve in curves.items()
            }
            if gone is not None:
                gone = judge.attention(found, streams, feel, gone, cuts)
        if gone is not None:
            curves["head"] = _of_part(curves["head"], gone)
        _spread(scores, curves, found.order, index, dims, whole=whole("mlp", index))
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
    dims, order = walk.dims, np.zeros(0, int)
    curves: dict[str, np.ndarray] = {}
    moments: dict[str, tuple[TokenMoments, TokenMoments]] = {}
    if dims.heads[index]:
        curves, block, moments["attention"] = _attention_curves(walk, block, index, streams[:2], felt[0], turned=turned)
    if dims.mlp[index]:
        masks = full_masks(dims)
        moments["mlp"] = mlp = compensation.part_moments(walk, block, masks, index, "mlp", *streams[1:])
        both = (mlp[0] + mlp[1]).together(felt[1].shares(TOKENS))
        order, curves["mlp"] = removal(both, felt[1].metric, np.ones(dims.mlp[index]), ORDER)
    return curves, _Block(index, block, order, moments)


def _attention_curves(
    walk: Walk,
    block: Params,
    index: int,
    streams: tuple[Streams, Streams],
    felt: Sensitivity,
    *,
    turned: bool,
) -> tuple[dict[str, np.ndarray], Params, tuple[TokenMoments, TokenMoments]]:
    """The curves of qk, v and head; the block in its new bases, and the moments of its attention in them."""
    dims, (before, middle) = walk.dims, streams
    curves = {}
    heads, qk, width = dims.heads[index], dims.qk[index], dims.v[index]
    queries, keys = walk.queries_and_keys(padded_block(dims, block), felt.shares(TOKENS), before)
    own = slice(0, dims.paired * qk)
    power, turn = _of_logits(dims, [(queries[h, own, own], keys[h, own, own]) for h in range(heads)])
    curves["qk"] = np.concatenate([[0], np.cumsum(power[::-1])])

    attention = compensation.part_moments(walk, block, full_masks(dims), index, "attention", before, middle)
    both = (attention[0] + attention[1]).together(felt.shares(TOKENS))
    fixed = "proj_norm" in block
    bases, curves["v"] = rebasis.value_basis(both, felt.metric, np.ones(heads), width, ORDER, fixed=fixed)
    curves["head"] = _head_losses(both, felt.metric, heads)
    if turned:
        block = turn(rebasis.change(block, bases, None))
        features = compensation.value_features(bases, np.ones((heads, width)))
        attention = attention[0].mapped(features), attention[1].mapped(features)
    return curves, block, attention


def _of_logits(
    dims: ViTDims, moments: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, Callable[[Params], Params]]:
    """[Q] squares of what query/key units add to the logits of all heads, the largest first; and what puts the units of
    a block into that order: another basis, or where a norm or rotary positions see dims one by one, another order.

    `moments`: of queries and keys, of each head.
    """
    if dims.rotary or dims.qk_norm_count:
        ordered = [rebasis.logit_order(*pair, dims.paired) for pair in moments]
        orders = np.stack([order for order, _ in ordered])
        return np.sum([squares for _, squares in ordered], 0), lambda block: rebasis.reorder(block, orders)
    found = [rebasis.logit_basis(*pair) for pair in moments]
    logits = np.stack([f[0] for f in found]), np.stack([f[1] for f in found])
    return np.sum([f[2] for f in found], 0), lambda block: rebasis.change(block, None, logits)


def _head_losses(moments: Moments, metric: np.ndarray, heads: int) -> np.ndarray:
    """[H] half the error when one head goes and the others make good for it."""
    c = moments.covariance
    scale = max(float(np.trace(c)) / len(c), np.finfo(float).tiny)
    inverted = inverse(c + ORDER * scale * np.eye(len(c)))
    weights = inverted @ moments.cross
    width = len(c) // heads
    losses = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        error = weights[own].T @ solve(inverted[own, own], weights[own])
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
        *,
        whole: bool,
    ) -> np.ndarray:
        """The curve through what was measured; between the real cuts the factor is interpolated in its logarithm.

        `whole`: also with everything gone.
        """
        if kind == "head":  # each alone
            if len(curve) == 1:
                return curve
            return np.array([self._cut(kind, h, found, streams, felt, float(x), cuts) for h, x in enumerate(curve)])
        full = len(curve) - 1
        gone, factors = [], []
        widths = {max(round(full * ratio), 1) for ratio in CUTS} | ({0} if whole else set())
        for width in sorted(widths - {full}, reverse=True):
            estimate = float(curve[full - width])
            divergence = self._cut(kind, width, found, streams, felt, estimate, cuts)
            gone.append(full - width)
            factors.append(np.log(max(divergence, _LEAST)) - np.log(max(estimate, np.finfo(float).tiny)))
        if not gone:
            return curve
        factor = np.exp(np.interp(np.arange(full + 1), gone, factors))
        return np.maximum.accumulate(curve * factor)

    def attention(
        self,
        found: _Block,
        streams: tuple[Streams, Streams, Streams],
        felt: tuple[Sensitivity, Sensitivity],
        estimate: float,
        cuts: list[dict[str, Any]],
    ) -> float:
        """What removing all value dims, and so the part, does to the outputs."""
        return self._cut("v", 0, found, streams, felt, estimate, cuts)

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
        if kind == "qk" or NORMS[part][0] in found.block:  # other logits, or another norm: other features
            moments = compensation.part_moments(walk, found.block, masks, index, part, before, after, cut=True)
        block = compensation.fit_part(
            walk.dims, found.block, masks, index, part, moments, felt[at], use_held=False, powers=(TOKENS,)
        )
        ready = padded_block(walk.dims, compensation.masked_block(block, masks, index))
        x = walk.advance(part, ready, [before[i] for i in self.held])
        x = walk.advance("mlp", ready, x) if part == "attention" else x
        divergence = walk.divergence(walk.finish(self.params, x, index + 1), self.dense)
        cuts.append({"block": index, "kind": kind, "width": width, "estimate": estimate, "divergence": divergence})
        return divergence


def _of_part(heads: np.ndarray, whole: float) -> np.ndarray:
    """Scores of heads [H] in their order, evened out so that all together make what the part costs.

    Where that is more than their sum, the dearest has the rest.
    """
    whole, order = max(whole, 0.0), np.argsort(heads, kind="stable")
    curve = np.append(np.minimum(np.cumsum(heads[order]), whole)[:-1], whole)
    found = np.empty(len(heads))
    found[order] = isotonic_regression(np.diff(curve, prepend=0)).x + 1e-12 * whole * np.arange(len(heads))
    return found


def _spread(
    scores: Units, curves: dict[str, np.ndarray], order: np.ndarray, index: int, dims: ViTDims, *, whole: bool
) -> None:
    """The rises of the curves as scores of units; those that go later have strictly more.

    Where the curve flattens, a unit has the largest rise so far. Where the mlp may go `whole`, its rises are evened out
    instead, so that all of them make what the part costs.
    """

    def rises(curve: np.ndarray, *, whole: bool = False) -> np.ndarray:
        found = np.maximum(np.diff(curve), 0)
        found = isotonic_regression(found).x if whole else np.maximum.accumulate(found)
        floor = max(float(curve[-1]), np.finfo(float).tiny) * 1e-12
        return np.asarray(found + floor * np.arange(1, len(found) + 1))

    if heads := dims.heads[index]:
        for kind in ("qk", "v"):
            rows = rises(curves[kind])[::-1] / heads
            getattr(scores, kind)[index, :heads, : len(rows)] = rows
        scores.head[index, :heads] = curves["head"]
    if dims.mlp[index]:
        scores.mlp[index, order] = rises(curves["mlp"], whole=whole)
