"""The life of a mask: all ones, checked, counted, turned into the indices that stay and the dims they leave."""

import dataclasses

import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.model.dims import KINDS, Units, ViTDims
from nvit_jax.model.groups import Kept


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

    A dense model needs at least one unit of each kind in each block, and the same number of query/key dims
    (and of value dims) in all live heads of a block.
    """
    masks = to_numpy(masks)
    limits = full_masks(dims)
    for kind, mask, limit in zip(KINDS, masks, limits, strict=True):
        if mask.shape != limit.shape:
            raise UserError(f"masks do not fit the model: {kind} has shape {mask.shape}, the model {limit.shape}")
        if not np.isin(mask, (0, 1)).all():
            raise UserError(f"masks: {kind} holds values other than 0 and 1")
    masks = normalize(masks)
    for kind, mask, limit in zip(KINDS, masks, limits, strict=True):
        if (mask > limit).any():
            raise UserError(f"masks: {kind} keeps a unit that the model does not have (padding)")
    if not masks.embed.any():
        raise UserError("masks: embed keeps no channel")
    for i in range(dims.depth):
        for kind in ("head", "qk", "v", "mlp"):
            if not getattr(masks, kind)[i].any():
                raise UserError(f"masks: block {i} keeps no {kind}")
        for kind in ("qk", "v"):
            counts = getattr(masks, kind)[i].sum(-1)[masks.head[i] > 0]
            if len(set(counts.tolist())) > 1:
                raise UserError(
                    f"masks: block {i} keeps {[int(c) for c in counts]} {kind} dims in its heads; they must be equal"
                )
    return masks


def kept_dims(masks: Units, dims: ViTDims) -> ViTDims:
    """Dims of the compact model that these (valid) masks leave."""
    live_heads = masks.head.sum(-1)
    return dataclasses.replace(
        dims,
        embed=int(masks.embed.sum()),
        heads=tuple(int(n) for n in live_heads),
        qk=tuple(int(n) for n in masks.qk.sum((-1, -2)) / live_heads),
        v=tuple(int(n) for n in masks.v.sum((-1, -2)) / live_heads),
        mlp=tuple(int(n) for n in masks.mlp.sum(-1)),
    )


def kept_indices(masks: Units, dims: ViTDims) -> list[Kept]:
    """For each block the indices that stay, ascending: embed [d], head [h], qk [h, q], v [h, v], mlp [m]."""
    embed = np.flatnonzero(masks.embed)
    out: list[Kept] = []
    for i in range(dims.depth):
        head = np.flatnonzero(masks.head[i])
        rows = {kind: np.stack([np.flatnonzero(getattr(masks, kind)[i, h]) for h in head]) for kind in ("qk", "v")}
        out.append({"embed": embed, "head": head, "mlp": np.flatnonzero(masks.mlp[i]), **rows})
    return out


def unit_name(kind: str, index: tuple[int, ...]) -> str:
    """A unit in words: "block 3 mlp 17", "block 0 head 2 qk 5", "embed 9"."""
    if kind == "embed":
        return f"embed {index[0]}"
    if kind in ("qk", "v"):
        return f"block {index[0]} head {index[1]} {kind} {index[2]}"
    return f"block {index[0]} {kind} {index[1]}"
