"""Position embeddings of a checkpoint: bicubic interpolation to another image size, and tables that are not stored."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.model.dims import ViTDims

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], np.ndarray]


def interpolated(dims: ViTDims, shapes: Shapes, read: Read, image: int) -> tuple[ViTDims, Shapes, Read, str]:
    """The same checkpoint for another image size, and a line that says so. UserError where that cannot be."""
    if image % dims.patch:
        raise UserError(f"--image={image} is not divisible by the patch size {dims.patch}")
    if dims.positions == "none":
        raise UserError("--image: the model has no position embeddings to interpolate")
    new = dataclasses.replace(dims, image=image)
    prefix = dims.prefix if dims.positions == "all" else 0
    old_side, side = dims.image // dims.patch, image // dims.patch

    def read_new(name: str) -> np.ndarray:
        value = read(name)
        if name != "pos_embed":
            return value
        grid = value[0, prefix:].reshape(old_side, old_side, -1)
        resized = interpolate_positions(grid, side).reshape(1, side * side, -1)
        return np.concatenate([value[:, :prefix], resized.astype(value.dtype)], axis=1)

    resized = shapes | {"pos_embed": (1, prefix + side * side, dims.embed)}
    note = f"position embeddings interpolated from {old_side}x{old_side} to {side}x{side} (bicubic)"
    return new, resized, read_new, note


def interpolate_positions(grid: np.ndarray, side: int) -> np.ndarray:
    """[S, S, D] -> [side, side, D], bicubic as DeiT does it: PyTorch's kernel (a = -0.75), half-pixel centres,
    borders repeated, no antialiasing; in float64."""
    size, a = len(grid), -0.75
    places = (np.arange(side) + 0.5) * size / side - 0.5
    weights = np.zeros((side, size))
    for row, place in enumerate(places):
        first = math.floor(place)
        for tap in range(first - 1, first + 3):
            x = abs(place - tap)
            if x <= 1:
                w = (a + 2) * x**3 - (a + 3) * x**2 + 1
            else:
                w = a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[row, min(max(tap, 0), size - 1)] += w
    return np.einsum("ys,xt,std->yxd", weights, weights, grid.astype(np.float64))


def with_sincos(shapes: Shapes, read: Read) -> tuple[Shapes, Read]:
    """big_vision's "sincos2d": nothing is stored, so the 224-pixel table is computed (MoCo v3, temperature 10,000)."""
    d, _, patch, _ = shapes["patch_embed.proj.weight"]
    side = 224 // patch
    y, x = np.mgrid[:side, :side].reshape(2, -1, 1)
    frequencies = 10_000.0 ** -(np.arange(d // 4) / (d // 4 - 1))
    table = np.concatenate(
        [np.sin(x * frequencies), np.cos(x * frequencies), np.sin(y * frequencies), np.cos(y * frequencies)], 1
    )
    table = table[None].astype(np.float32)
    return shapes | {"pos_embed": table.shape}, lambda name: table if name == "pos_embed" else read(name)
