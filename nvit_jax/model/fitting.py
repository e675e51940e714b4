"""Whether images, parameters and masks fit dims. Shapes alone are looked at: a compiled program pays nothing."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.model import groups
from nvit_jax.model.dims import KINDS, Units, ViTDims
from nvit_jax.model.groups import Params

_FIELD = {"head": "heads", "qk": "qk", "v": "v", "mlp": "mlp"}


def check_images(images: Any, dims: ViTDims) -> None:
    """UserError unless they are [B, height, width, channels]."""
    wanted = (*dims.sides, dims.channels)
    if np.ndim(images) != 4 or np.shape(images)[1:] != wanted:
        shown = ", ".join(map(str, wanted))
        raise UserError(f" have the shape {np.shape(images)}; the model takes [B, {shown}]", "images")


def check_masks(masks: Units, dims: ViTDims, batch: int) -> None:
    """UserError unless they are of the padded widths, for all samples or with an axis of `batch` samples.

    Values are looked at where they are there: without a channel there is no mean of channels, and nothing but NaN.
    """
    if not isinstance(masks, Units):
        raise UserError(f" are a {type(masks).__name__}; they must be Units", "masks")
    for kind, mask, shape in zip(KINDS, masks, dims.unit_shapes(), strict=True):
        each = (batch, *shape) if kind == "embed" else (shape[0], batch, *shape[1:])
        if not hasattr(mask, "dtype") or np.dtype(mask.dtype).kind not in "biufV":
            what = getattr(mask, "dtype", type(mask).__name__)
            raise UserError(f": {kind} is of type {what}; masks are arrays of real numbers", "masks")
        if np.shape(mask) not in (shape, each):
            raise UserError(f": {kind} has the shape {np.shape(mask)}, the model {shape}", "masks")
    if any(isinstance(mask, jax.core.Tracer) or not getattr(mask, "is_fully_addressable", True) for mask in masks):
        return
    for kind, mask in zip(KINDS, masks, strict=True):
        values = np.asarray(mask, np.float32)
        if not np.isfinite(values).all() or (values < 0).any():
            raise UserError(f": {kind} holds values that are not finite, or below 0", "masks")
    if not np.asarray(masks.embed).any(-1).all():
        raise UserError(": embed keeps no channel", "masks")


def check_params(params: Params, dims: ViTDims, *, padded: bool = False) -> None:
    """UserError that names the first parameter which is surplus or of another shape, or the block that is missing.

    With `padded` narrow blocks may have the widths of the widest. What else is missing is told by who reads it.
    """
    models, fixed, absent = [dims, dims.padded()] if padded else [dims], _fixed(dims), _absent(dims)
    blocks: set[int | None] = set()
    for path, leaf in sorted(groups.flatten(params), key=lambda pair: pair[0]):
        block = groups.block_of(path)
        blocks.add(block)
        try:
            axes = groups.axes_of(path, inside=bool(dims.pre_logits) or dims.pool == "map")
            pair = (2,) if dims.rotary and block is not None and path.split("/")[1] in groups.PAIRED else ()
            wanted = [_shape(axes, fixed.get(path, ()), model, block) + pair for model in models]
        except (KeyError, IndexError, StopIteration):
            wanted = []
        if not wanted or path.removeprefix(f"block_{block}/") in absent:
            raise UserError(f": {path} is no parameter of these dims", "params")
        if np.shape(leaf) not in wanted:
            raise UserError(f": {path} has the shape {np.shape(leaf)}, the dims ask for {wanted[0]}", "params")
    if missing := [i for i in range(dims.depth) if i not in blocks]:
        raise UserError(f": block_{missing[0]} is missing; the dims have {dims.depth} blocks", "params")


def _shape(axes: groups.Axes, fixed: Sequence[int], dims: ViTDims, block: int | None) -> tuple[int, ...]:
    """StopIteration and IndexError for a parameter that the dims do not have."""
    others = iter(fixed)
    return tuple([next(others) if kind is None else _width(dims, kind, block) for kind in axes])


def _absent(dims: ViTDims) -> set[str]:
    """What models with other options have, of a block without its number."""
    normed = dims.qk_norm_count
    options: dict[str, Any] = {
        "cls_token": dims.cls_token,
        "dist_token": dims.dist_token,
        "registers": dims.registers,
        "positions": dims.positions != "none",
        "patch_embed/bias": dims.patch_bias,
        **dict.fromkeys(("pre_norm/scale", "pre_norm/bias"), dims.pre_norm),
        **dict.fromkeys((path for path in groups.AXES if path.startswith("pool/")), dims.pool == "map"),
        "projection/kernel": dims.projection,
        **dict.fromkeys(("scale1", "scale2"), dims.layer_scale),
        **dict.fromkeys(("q/bias", "k/bias", "v/bias"), dims.qkv_bias),
        **dict.fromkeys((f"{norm}/{leaf}" for norm in ("q_norm", "k_norm") for leaf in ("scale", "bias")), normed),
        "rotary": dims.rotary,
        "relative": dims.relative,
        **dict.fromkeys(("proj_norm/scale", "proj_norm/bias"), dims.proj_norm_count),
        **dict.fromkeys(("fc2_norm/scale", "fc2_norm/bias"), dims.fc2_norm_count),
        **dict.fromkeys(("fc1_gate/kernel", "fc1_gate/bias"), dims.gated),
        **dict.fromkeys(("head/kernel", "head/bias"), dims.classes),
        **dict.fromkeys(("head_dist/kernel", "head_dist/bias"), dims.classes and dims.dist_token),
        "head_mean/kernel": dims.pool == "class_mean",
    }
    return {path for path, there in options.items() if not there}


def _fixed(dims: ViTDims) -> dict[str, tuple[int, ...]]:
    """Sizes of the axes that are no units."""
    inside = (dims.pre_logits,) if dims.pre_logits else (dims.pool_width,) if dims.pool == "map" else ()
    return {
        **_pool(dims),
        "projection/kernel": (*inside, dims.projection),
        "patch_embed/kernel": (*dims.patch_sides, dims.channels),
        **dict.fromkeys((f"block_{i}/relative" for i in range(dims.depth)), (dims.distances,)),
        "registers": (dims.registers,),
        "positions": (dims.tokens if dims.positions == "all" else dims.patches,),
        "pre_logits/kernel": (dims.pre_logits,),
        "pre_logits/bias": (dims.pre_logits,),
        **dict.fromkeys(("head/kernel", "head_dist/kernel", "head_mean/kernel"), (*inside, dims.classes)),
        **dict.fromkeys(("head/bias", "head_dist/bias"), (dims.classes,)),
    }


def _pool(dims: ViTDims) -> dict[str, tuple[int, ...]]:
    """Of attention pooling."""
    if dims.pool != "map":
        return {}
    w, h, m = dims.pool_width, dims.pool_heads, dims.pool_mlp
    heads = (h, w // h)
    return {
        **dict.fromkeys(("pool/probe", "pool/norm/scale", "pool/norm/bias", "pool/proj/bias", "pool/fc2/bias"), (w,)),
        **dict.fromkeys(("pool/k/kernel", "pool/v/kernel", "pool/q/bias", "pool/k/bias", "pool/v/bias"), heads),
        "pool/q/kernel": (w, *heads),
        "pool/proj/kernel": (*heads, w),
        "pool/fc1/kernel": (w, m),
        "pool/fc1/bias": (m,),
        "pool/fc2/kernel": (m, w),
    }


def _width(dims: ViTDims, kind: str, block: int | None) -> int:
    if kind == "embed":
        return dims.embed
    assert block is not None
    widths: tuple[int, ...] = getattr(dims, _FIELD[kind])
    return widths[block]
