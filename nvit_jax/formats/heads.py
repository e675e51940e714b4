"""What the heads of a block share in a file, and each has of its own here: their norm, the pairs of rotary positions.

Pruning takes other dims from each head, so each head has its own gains. A LayerNorm over a head's dims is an RMSNorm
over dims that have no mean: queries and keys are written without it.
"""

import re
from collections.abc import Callable

import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.model.dims import ViTDims

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], np.ndarray]


def per_head(dims: ViTDims, shapes: Shapes, read: Read, where: str, *, neighbours: bool = False) -> tuple[Shapes, Read]:
    """The same tensors under timm's names, as `interchange` takes them. UserError for a norm of another width.

    `neighbours`: in the file the two dims of a rotary pair lie side by side, as in EVA-02; else halves of a head apart.
    """
    read = _apart(dims, read) if neighbours else read
    made: dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]] = {}
    layer_norm = any(name.endswith((".attn.q_norm.bias", ".attn.k_norm.bias")) for name in shapes)
    for i, (heads, units) in enumerate(zip(dims.heads, dims.qk, strict=True)):
        name, width = f"blocks.{i}.attn", dims.paired * units
        if dims.rotary:
            made[f"{name}.rotary"] = (heads * units,), _numbers(heads, units)
        if not dims.qk_norm_count:
            continue
        for norm in (f"{name}.q_norm", f"{name}.k_norm"):
            for leaf in ("weight", "bias"):
                own = f"{norm}.{leaf}"
                if own not in shapes and (leaf == "weight" or layer_norm):
                    continue  # interchange says that it is missing
                if shapes.get(own, (width,)) != (width,):
                    raise UserError(f"{where}: {own} has shape {shapes[own]}, and a head has {width} query/key dims")
                made[own] = (heads * width,), _tiled(read, own if own in shapes else None, heads, width)
        if layer_norm:
            for leaf in ("weight", "bias"):
                if (own := f"{name}.qkv.{leaf}") in shapes:
                    made[own] = shapes[own], _centred(read, own, heads, width)
    if not made:
        return shapes, read
    found = {name: shape for name, (shape, _) in made.items()}
    return shapes | found, lambda name: made[name][1]() if name in made else read(name)


def _numbers(heads: int, pairs: int) -> Callable[[], np.ndarray]:
    return lambda: np.tile(np.arange(pairs, dtype=np.float32), heads)


def _tiled(read: Read, name: str | None, heads: int, width: int) -> Callable[[], np.ndarray]:
    return lambda: np.tile(np.zeros(width, np.float32) if name is None else read(name), heads)


def _apart(dims: ViTDims, read: Read) -> Read:
    """Of each head all first dims of the pairs, then all second ones."""

    def moved(name: str) -> np.ndarray:
        values, found = read(name), _PAIRED.fullmatch(name)
        if found is None:
            return values
        pairs, values = dims.qk[int(found[1])], np.array(values)
        rows = 2 * pairs * (2 * dims.heads[int(found[1])] if found[2] == "qkv" else 1)
        places = values[:rows].reshape(-1, pairs, 2, *values.shape[1:]).swapaxes(1, 2)
        values[:rows] = places.reshape(rows, *values.shape[1:])
        return values

    return moved


_PAIRED = re.compile(r"blocks\.(\d+)\.attn\.(qkv|q_norm|k_norm)\.(weight|bias)")


def _centred(read: Read, name: str, heads: int, width: int) -> Callable[[], np.ndarray]:
    """Rows of queries and keys without their mean over the dims of a head."""

    def make() -> np.ndarray:
        values = np.array(read(name), np.float64)
        for first in (0, heads * width):
            rows = values[first : first + heads * width].reshape(heads, width, *values.shape[1:])
            rows -= rows.mean(1, keepdims=True)
        return values

    return make
