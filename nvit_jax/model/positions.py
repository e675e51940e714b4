"""Position embeddings of a checkpoint: bicubic interpolation to another image size, and tables that are not stored."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.model import sizes
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.sizes import Size

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], np.ndarray]


class Bicubic(NamedTuple):
    """How a publisher interpolates positions."""

    antialias: bool = False  # PyTorch's kernel for that, as Pillow's: a = -0.5, wider where the grid becomes smaller
    offset: float = 0.0  # added to the new side where the scale is computed (official DINOv2: 0.1)


DEIT = Bicubic()


def interpolated(
    dims: ViTDims, shapes: Shapes, read: Read, image: Size, how: Bicubic = DEIT
) -> tuple[ViTDims, Shapes, Read, str]:
    """The same checkpoint for another image size, and a line that says so. UserError where that cannot be."""
    if not dims.divides(image):
        raise UserError(f"--image={sizes.words(image)} is not divisible by the patch size {sizes.words(dims.patch)}")
    if dims.relative:
        raise UserError(
            f"--image={sizes.words(image)}: the model has relative positions for {sizes.words(dims.image)} pixels, "
            "whose interpolation is not built"
        )
    if dims.positions == "none" and dims.rotary:
        return dataclasses.replace(dims, image=image), shapes, read, "rotary positions take any image size"
    if dims.positions == "none":
        raise UserError("--image: the model has no position embeddings to interpolate")
    new = dataclasses.replace(dims, image=image)
    prefix = dims.prefix if dims.positions == "all" else 0
    rows, columns = new.grid

    def read_new(name: str) -> np.ndarray:
        value = read(name)
        if name != "pos_embed":
            return value
        grid = value[0, prefix:].reshape(*dims.grid, -1)
        resized = interpolate_positions(grid, rows, columns, how).reshape(1, rows * columns, -1)
        return np.concatenate([value[:, :prefix], resized.astype(value.dtype)], axis=1)

    resized = shapes | {"pos_embed": (1, prefix + rows * columns, dims.embed)}
    before, after = ("x".join(map(str, grid)) for grid in (dims.grid, new.grid))
    note = f"position embeddings interpolated from {before} to {after} (bicubic)"
    return new, resized, read_new, note


def interpolate_positions(grid: np.ndarray, rows: int, columns: int, how: Bicubic = DEIT) -> np.ndarray:
    """[R, S, D] -> [rows, columns, D], bicubic as PyTorch does it: half-pixel centres, borders repeated (with
    antialiasing cut off); in float64."""
    down, across = (_weights(*sides, how) for sides in zip(grid.shape[:2], (rows, columns), strict=True))
    return np.einsum("ys,xt,std->yxd", down, across, grid.astype(np.float64))


def _weights(size: int, side: int, how: Bicubic) -> np.ndarray:
    """[side, size]: how a line of `size` values becomes one of `side`."""
    places = (np.arange(side) + 0.5) * size / (side + how.offset) - 0.5
    taps = np.arange(size) if how.antialias else np.arange(-3, size + 3)
    wider = max(size / side, 1.0) if how.antialias else 1.0
    weights = _cubic(np.abs(places[:, None] - taps) / wider, -0.5 if how.antialias else -0.75)
    if how.antialias:
        return np.asarray(weights / weights.sum(1, keepdims=True))
    inside = np.clip(taps, 0, size - 1)
    return np.stack([weights[:, inside == i].sum(1) for i in range(size)], 1)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The kernel of bicubic interpolation (Keys 1981) at distances x."""
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def rotary_angles(dims: ViTDims) -> np.ndarray:
    """[N, rotary] in radians: by how much the pairs of queries and keys are turned at each token.

    As in DINOv3: the centres of the patches lie between -1 and 1. Half of the pairs follow the row, half the column,
    the j-th of such a half by 2 pi base^(-j / half) times the place. With `rotary_grid`, as in EVA-02, rows and columns
    are numbered from 0, stretched to that grid, and turn by base^(-j / half) times the number. Class tokens and
    registers are not turned. Places and frequencies are rounded to float32, as published.
    """
    if not dims.rotary:
        return np.zeros((dims.tokens, 0))
    half, (rows, columns) = dims.rotary // 2, dims.grid
    exponents = (np.arange(half) / half).astype(np.float32)
    frequencies = np.float32(1) / (dims.rotary_base ** exponents.astype(np.float64)).astype(np.float32)

    def along(side: int) -> np.ndarray:
        if dims.rotary_grid:
            numbers = np.arange(side, dtype=np.float32) / np.float32(side) * np.float32(dims.rotary_grid)
            return numbers.astype(np.float64)[:, None] * frequencies.astype(np.float64)
        centres = np.float32(2) * (np.arange(0.5, side, dtype=np.float32) / np.float32(side)) - np.float32(1)
        return (np.float32(2 * np.pi) * centres).astype(np.float64)[:, None] * frequencies.astype(np.float64)

    down, across = np.repeat(along(rows), columns, 0), np.tile(along(columns), (rows, 1))
    return np.concatenate([np.zeros((dims.prefix, dims.rotary)), np.concatenate([down, across], 1)])


def relative_index(dims: ViTDims) -> np.ndarray:
    """[N, N] whole numbers: which of the `dims.distances` biases a query (row) adds to its logit of a key (column).

    As in BEiT (Bao et al. 2022): for patches by how many rows and columns the query lies behind the key. The last three
    are of the class token to a patch, of a patch to the class token, and of the class token to itself.
    """
    rows, columns = dims.grid
    row, column = (places.reshape(-1) for places in np.mgrid[:rows, :columns])
    down, across = (place[:, None] - place[None, :] for place in (row, column))
    index = np.empty((dims.tokens, dims.tokens), np.int32)
    index[1:, 1:] = (down + rows - 1) * (2 * columns - 1) + across + columns - 1
    index[0, :], index[:, 0], index[0, 0] = dims.distances - 3, dims.distances - 2, dims.distances - 1
    return index


def with_sincos(shapes: Shapes, read: Read) -> tuple[Shapes, Read]:
    """big_vision's "sincos2d": nothing is stored, so the 224-pixel table is computed (MoCo v3, temperature 10,000)."""
    d, _, *patch = shapes["patch_embed.proj.weight"]
    y, x = np.mgrid[: 224 // patch[0], : 224 // patch[1]].reshape(2, -1, 1)
    frequencies = 10_000.0 ** -(np.arange(d // 4) / (d // 4 - 1))
    table = np.concatenate(
        [np.sin(x * frequencies), np.cos(x * frequencies), np.sin(y * frequencies), np.cos(y * frequencies)], 1
    )
    table = table[None].astype(np.float32)
    return shapes | {"pos_embed": table.shape}, lambda name: table if name == "pos_embed" else read(name)
