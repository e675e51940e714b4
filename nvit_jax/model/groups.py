"""ONE table: which axis of which parameter belongs to which kind of unit.

Everything that couples parameters to units reads it: `expand` (masks -> 0/1 arrays shaped like the parameters),
`reduce` (sums over a parameter's entries, per unit), `take` (cut the kept entries out).

A parameter is named by its path, blocks by "block_<i>": "block_3/q/kernel". An axis is a kind of unit or None.
"qk" and "v" axes always stand right behind a "head" axis: they are per head. With rotary positions parameters of PAIRED
have one more axis, the last, of the two dims of a pair.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nvit_jax.model.dims import Units, ViTDims

Params = dict[str, Any]  # nested dicts of arrays, one layout everywhere: in memory, in training and on disk
Axes = tuple[str | None, ...]

_STREAM: Axes = ("embed",)
AXES: dict[str, Axes] = {
    "patch_embed/kernel": (None, None, None, "embed"),  # [P, P, channels, D]
    "patch_embed/bias": _STREAM,
    "cls_token": _STREAM,
    "dist_token": _STREAM,
    "registers": (None, "embed"),  # [R, D]
    "positions": (None, "embed"),  # [N or patches, D]
    "pre_norm/scale": _STREAM,
    "pre_norm/bias": _STREAM,
    "block/norm1/scale": _STREAM,
    "block/norm1/bias": _STREAM,
    "block/q/kernel": ("embed", "head", "qk"),
    "block/q/bias": ("head", "qk"),
    "block/k/kernel": ("embed", "head", "qk"),
    "block/k/bias": ("head", "qk"),
    "block/q_norm/scale": ("head", "qk"),
    "block/q_norm/bias": ("head", "qk"),
    "block/k_norm/scale": ("head", "qk"),
    "block/k_norm/bias": ("head", "qk"),
    "block/rotary": ("head", "qk"),  # which of the pairs before pruning it is: a constant
    "block/relative": ("head", None),  # [H, distances] biases of the logits
    "block/v/kernel": ("embed", "head", "v"),
    "block/v/bias": ("head", "v"),
    "block/proj_norm/scale": ("head", "v"),
    "block/proj_norm/bias": ("head", "v"),
    "block/proj/kernel": ("head", "v", "embed"),
    "block/proj/bias": _STREAM,
    "block/scale1": _STREAM,  # LayerScale
    "block/norm2/scale": _STREAM,
    "block/norm2/bias": _STREAM,
    "block/fc1/kernel": ("embed", "mlp"),
    "block/fc1/bias": ("mlp",),
    "block/fc1_gate/kernel": ("embed", "mlp"),  # a gated mlp's
    "block/fc1_gate/bias": ("mlp",),
    "block/fc2_norm/scale": ("mlp",),
    "block/fc2_norm/bias": ("mlp",),
    "block/fc2/kernel": ("mlp", "embed"),
    "block/fc2/bias": _STREAM,
    "block/scale2": _STREAM,
    "norm/scale": _STREAM,
    "norm/bias": _STREAM,
    "pool/probe": (None,),
    "pool/q/kernel": (None, None, None),
    "pool/q/bias": (None, None),
    "pool/k/kernel": ("embed", None, None),  # keys and values read the stream; the pooled vector is not pruned
    "pool/k/bias": (None, None),
    "pool/v/kernel": ("embed", None, None),
    "pool/v/bias": (None, None),
    "pool/proj/kernel": (None, None, None),
    "pool/proj/bias": (None,),
    "pool/norm/scale": (None,),
    "pool/norm/bias": (None,),
    "pool/fc1/kernel": (None, None),
    "pool/fc1/bias": (None,),
    "pool/fc2/kernel": (None, None),
    "pool/fc2/bias": (None,),
    "projection/kernel": ("embed", None),  # (None, None) behind "pool", as the classifiers
    "pre_logits/kernel": ("embed", None),
    "pre_logits/bias": (None,),
    "head/kernel": ("embed", None),  # (None, None) behind pre_logits and "pool", see `axes_of`
    "head/bias": (None,),
    "head_mean/kernel": ("embed", None),  # reads the mean beside the class token
    "head_dist/kernel": ("embed", None),
    "head_dist/bias": (None,),
}

PAIRED = ("q", "k", "q_norm", "k_norm")  # of a block
# What goes with the last head ("head") or neuron ("mlp") of a block. The biases behind the parts stay, and LayerScale.
_PARTS = dict.fromkeys(("norm1", *PAIRED, "rotary", "relative", "v", "proj_norm", "proj/kernel"), "head")
_PARTS |= dict.fromkeys(("norm2", "fc1", "fc1_gate", "fc2_norm", "fc2/kernel"), "mlp")


def part_of(path: str) -> str | None:
    """ "head" or "mlp": a block without units of that kind does not have the parameter; None for all others."""
    first, _, rest = path.partition("/")
    return _PARTS.get(rest, _PARTS.get(rest.split("/")[0])) if first.startswith("block_") else None


def classifier_readers(dims: ViTDims) -> tuple[str, ...]:
    """The layers that read the stream behind the last norm; under attention pooling those of "pool"."""
    if dims.pool == "map":
        return ("k", "v")
    if dims.projection:
        return ("projection",)
    if not dims.classes:
        return ()
    if dims.pre_logits:
        return ("pre_logits",)
    return ("head", "head_mean") if dims.pool == "class_mean" else ("head", "head_dist")[: dims.classifiers]


def flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of a nested dict, paths joined by "/"."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def unflatten(leaves: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    out: Params = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return out


def block_of(path: str) -> int | None:
    """Block index of a parameter, None outside the blocks."""
    first = path.split("/", 1)[0]
    return int(first.removeprefix("block_")) if first.startswith("block_") else None


def inside(params: Mapping[str, Any]) -> bool:
    """Whether the last layer reads another one, which is not pruned (pre_logits, attention pooling)."""
    return "pre_logits" in params or "pool" in params


def axes_of(path: str, *, inside: bool = False) -> Axes:
    """Kinds of the axes of one parameter; `inside` as the function. KeyError for what the table does not know."""
    if inside and path in ("head/kernel", "head_dist/kernel", "projection/kernel"):
        return (None, None)
    first, _, rest = path.partition("/")
    return AXES[f"block/{rest}" if first.startswith("block_") else path]


def _at(units: Units, kind: str, block: int | None) -> Any:
    value = getattr(units, kind)
    return value if kind == "embed" else value[block]


def expand(masks: Units, params: Mapping[str, Any]) -> Params:
    """0/1 arrays shaped like `params`: 1 where every unit that owns the entry is kept.

    Blocks narrower than the padding read the leading entries of their masks. The norm of a part without units is 0.
    """
    own = inside(params)
    out = {}
    for path, leaf in flatten(params):
        axes, block = axes_of(path, inside=own), block_of(path)
        gate, part = np.ones((), np.float32), part_of(path)
        if part is not None:
            gate = gate * _at(masks, part, block).max()
        for position, kind in enumerate(axes):
            if kind is None:
                continue
            mask, span = _at(masks, kind, block), 1
            if kind in ("qk", "v"):
                span = 2  # the mask is [H, Q]: it covers the head axis in front, too
            first = position - span + 1
            mask = mask[tuple(slice(0, n) for n in leaf.shape[first : position + 1])]
            gate = gate * mask.reshape((1,) * first + mask.shape + (1,) * (leaf.ndim - position - 1))
        out[path] = gate * np.ones(leaf.shape, np.float32)
    return unflatten(out)


def reduce(values: Any, axes: Axes, kind: str) -> Any:
    """Sum the entries of one parameter-shaped array over all axes but those of `kind` ([H, Q] for qk, [H, V] for v)."""
    keep = {axes.index(kind)} | ({axes.index("head")} if kind in ("qk", "v") else set())
    return values.sum(axis=tuple(a for a in range(values.ndim) if a not in keep))


def take(params: Mapping[str, Any], kept: "list[Kept]") -> Params:
    """Cut the kept entries out of every parameter; `kept` has one entry per block. Of a part without units the rest of
    its parameters go as well."""
    own = inside(params)
    out = {}
    for path, leaf in flatten(params):
        block, part = block_of(path), part_of(path)
        index = kept[0 if block is None else block]
        if part is not None and not len(index[part]):
            continue
        value = leaf
        for position, kind in enumerate(axes_of(path, inside=own)):
            if kind in ("embed", "head", "mlp"):
                value = value.take(index[kind], axis=position)
            elif kind in ("qk", "v"):  # [h, q] indices, one row for each kept head; the head axis is cut already
                rows = index[kind]
                shape = [1] * value.ndim
                shape[position - 1 : position + 1] = rows.shape
                value = _take_along(value, rows.reshape(shape), position)
        out[path] = value
    return unflatten(out)


Kept = dict[str, np.ndarray]  # embed [d], head [h], qk [h, q], v [h, v], mlp [m]: indices that stay


def _take_along(value: Any, index: np.ndarray, axis: int) -> Any:
    if isinstance(value, jax.Array):
        return jax.numpy.take_along_axis(value, jax.numpy.asarray(index), axis=axis)
    return np.take_along_axis(value, index, axis=axis)
