"""The models that are measured: dense ones, and ones as pruning leaves them, at a part of their MACs."""

import dataclasses
from typing import Any

import jax
import numpy as np

from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims, count_macs, preset
from nvit_jax.model.groups import Params

# MACs of the four models of the NViT paper (table 1), as parts of DeiT-B's.
NVIT = {"nvit_b": 1 / 2.57, "nvit_h": 1 / 2.85, "nvit_s": 1 / 4.24, "nvit_t": 1 / 13.55}
TINY = ViTDims.uniform(image=16, patch=8, classes=10, embed=32, depth=2, heads=2, mlp=64)
# How much more than the others the blocks in the middle keep, from the first to the last (as in the paper's figure 4).
_KEEPS = (0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.3, 1.2, 1.0, 0.8, 0.6)


def dense(name: str, *, tiny: bool = False) -> ViTDims:
    """A preset; with `tiny` two narrow blocks in the place of every one."""
    return TINY if tiny else preset(name)


def narrowed(dims: ViTDims, macs: float, multiple: int = 8) -> ViTDims:
    """`dims` narrowed to at most the part `macs` of its MACs, all widths multiples of `multiple` where it is not 1.

    Blocks in the middle keep more, embed keeps more than what lies inside of the blocks, as in NViT's results. With a
    multiple of 1 widths are odd, which no kernel likes.
    """

    def shrink(width: int, part: float, step: int) -> int:
        kept = min(width, max(step, round(width * part / step) * step))
        return kept - 1 if step == 1 and kept < width and kept % 2 == 0 and kept > 1 else kept

    def at(scale: float) -> ViTDims:
        keeps = np.interp(np.linspace(0, 1, dims.depth), np.linspace(0, 1, len(_KEEPS)), _KEEPS) * scale
        inside: dict[str, Any] = {
            "heads": tuple(shrink(w, min(1, k**0.5), 1) for w, k in zip(dims.heads, keeps, strict=True)),
            "qk": tuple(shrink(w, min(1, k**0.5), multiple) for w, k in zip(dims.qk, keeps, strict=True)),
            "v": tuple(shrink(w, min(1, k**0.5), multiple) for w, k in zip(dims.v, keeps, strict=True)),
            "mlp": tuple(shrink(w, min(1, k), multiple) for w, k in zip(dims.mlp, keeps, strict=True)),
        }
        return dataclasses.replace(dims, embed=shrink(dims.embed, min(1, scale**0.5), multiple), **inside)

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if count_macs(at(middle)) <= macs * count_macs(dims) else (low, middle)
    return at(low)


def random_params(dims: ViTDims, seed: int = 0) -> Params:
    """Float32 weights of a usual size."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: 0.02 * rng.standard_normal(s.shape, np.float32), vit.shapes(dims))


def random_images(dims: ViTDims, batch: int, seed: int = 0) -> np.ndarray:
    """[batch, image, image, channels] float32, normalised."""
    shape = (batch, *dims.sides, dims.channels)
    return np.random.default_rng([seed, 1]).standard_normal(shape, np.float32)


def random_batch(dims: ViTDims, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [count, image, image, channels] and labels [count], as a data set has them."""
    rng = np.random.default_rng([seed, 2])
    shape = (count, *dims.sides, dims.channels)
    return rng.integers(0, 256, shape, np.uint8), rng.integers(0, dims.classes, count).astype(np.int32)
