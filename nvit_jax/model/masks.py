"""The life of a mask: all ones, checked, counted, turned into the indices that stay and the dims they leave."""

import dataclasses

import numpy as np

from nvit_jax.errors import NotFinite, UserError
from nvit_jax.model.dims import KINDS, Units, ViTDims
from nvit_jax.model.groups import Kept

_LARGEST = 1e200  # score


def full_masks(dims: ViTDims) -> Units:
    """Ones for every unit of the model, zeros for the padding of narrow blocks. float32 NumPy arrays."""
    masks = Units(*(np.zeros(shape, np.float32) for shape in dims.unit_shapes()))
    masks.embed[:] = 1
    for i, (h, q, v, m) in enumerate(zip(dims.heads, dims.qk, dims.v, dims.mlp, strict=True)):
        masks.head[i, :h] = 1
        masks.qk[i, :h, :q] = 1
        masks.v[i, :h, :v] = 1
        masks.mlp[i, :m] = 1
    return masks


def normalize(masks: Units) -> Units:
    """A query/key or value dim of a removed head counts as removed."""
    head = masks.head[..., None]
    return masks._replace(qk=masks.qk * head, v=masks.v * head)


def to_numpy(units: Units) -> Units:
    """Host copies."""
    return Units(*(np.asarray(u) for u in units))


def check_masks(masks: Units, dims: ViTDims) -> Units:
    """`masks` as normalised NumPy arrays; UserError when they do not fit the model or leave no dense model.

    A dense model needs at least one embed channel, and in all live heads of a block the same number of query/key dims
    (and of value dims), at least one. A block without heads or without mlp neurons has lost that part.
    """
    masks = to_numpy(masks)
    limits = full_masks(dims)
    for kind, mask, limit in zip(KINDS, masks, limits, strict=True):
        if mask.shape != limit.shape:
            raise UserError(f"masks do not fit the model: {kind} has shape {mask.shape}, the model {limit.shape}")
        if mask.dtype.kind in "cOSUmM" or not np.isin(mask, (0, 1)).all():
            raise UserError(f"masks: {kind} holds values other than 0 and 1")
    masks = normalize(masks)
    for kind, mask, limit in zip(KINDS, masks, limits, strict=True):
        if (mask > limit).any():
            raise UserError(f"masks: {kind} keeps a unit that the model does not have (padding)")
    if not masks.embed.any():
        raise UserError("masks: embed keeps no channel")
    for i in range(dims.depth):
        for kind in ("qk", "v"):
            if masks.head[i].any() and not getattr(masks, kind)[i].any():
                raise UserError(f"masks: block {i} keeps heads, and no {kind} dim of them")
            counts = getattr(masks, kind)[i].sum(-1)[masks.head[i] > 0]
            if len(set(counts.tolist())) > 1:
                raise UserError(
                    f"masks: block {i} keeps {[int(c) for c in counts]} {kind} dims in its heads; they must be equal"
                )
    return masks


def kept_dims(masks: Units, dims: ViTDims) -> ViTDims:
    """Dims of the compact model that these (valid) masks leave."""
    live_heads = masks.head.sum(-1)
    each = np.maximum(live_heads, 1)
    return dataclasses.replace(
        dims,
        embed=int(masks.embed.sum()),
        heads=tuple(int(n) for n in live_heads),
        qk=tuple(int(n) for n in masks.qk.sum((-1, -2)) / each),
        v=tuple(int(n) for n in masks.v.sum((-1, -2)) / each),
        mlp=tuple(int(n) for n in masks.mlp.sum(-1)),
    )


def kept_indices(masks: Units, dims: ViTDims) -> list[Kept]:
    """For each block the indices that stay, ascending: embed [d], head [h], qk [h, q], v [h, v], mlp [m].

    Without heads qk and v are [0, 0].
    """
    embed = np.flatnonzero(masks.embed)
    out: list[Kept] = []
    for i in range(dims.depth):
        head = np.flatnonzero(masks.head[i])
        live = {kind: [np.flatnonzero(getattr(masks, kind)[i, h]) for h in head] for kind in ("qk", "v")}
        rows = {kind: np.stack(found) if found else np.zeros((0, 0), int) for kind, found in live.items()}
        out.append({"embed": embed, "head": head, "mlp": np.flatnonzero(masks.mlp[i]), **rows})
    return out


def unit_name(kind: str, index: tuple[int, ...]) -> str:
    """A unit in words: "block 3 mlp 17", "block 0 head 2 qk 5", "embed 9"."""
    if kind == "embed":
        return f"embed {index[0]}"
    if kind in ("qk", "v"):
        return f"block {index[0]} head {index[1]} {kind} {index[2]}"
    return f"block {index[0]} {kind} {index[1]}"


def check_scores(scores: Units, dims: ViTDims) -> Units:
    """`scores` as float64 NumPy arrays. UserError for other shapes than the model's; else as `check_finite`."""
    for kind, given, wanted in zip(KINDS, scores, dims.unit_shapes(), strict=True):
        if (shape := getattr(given, "shape", None)) != wanted:
            raise UserError(f": {kind} has the shape {shape}, the model {wanted}", "scores")
        if np.asarray(given).dtype.kind not in "fiub" and np.asarray(given).dtype.name != "bfloat16":
            raise UserError(f": {kind} is of type {given.dtype}; scores are real numbers", "scores")
    check_finite(scores)
    for kind, values in zip(KINDS, scores, strict=True):
        if (largest := float(np.abs(np.asarray(values, np.float64)).max(initial=0))) > _LARGEST:
            raise UserError(
                f": a {kind} unit has {largest:g}; beyond {_LARGEST:g} sums of scores are not finite", "scores"
            )
    return Units(*(np.asarray(s, np.float64) for s in scores))


def check_finite(scores: Units) -> None:
    """NotFinite that names the first unit whose score is not finite."""
    for kind, values in zip(KINDS, scores, strict=True):
        bad = np.argwhere(~np.isfinite(np.asarray(values)))
        if len(bad):
            raise NotFinite(
                f"saliency: the score of {unit_name(kind, tuple(int(i) for i in bad[0]))} is not finite "
                f"({len(bad)} {kind} unit(s) in all)"
            )
