"""An estimate of latency for a device that is not here, from its peak and its bandwidth. Not a measurement.

Every operation takes the longer of its compute and its memory time (Williams et al. 2009, "Roofline"). Operations
are the matrix products, with their elementwise followers fused into them, and the softmax and LayerNorms, which only
move memory. Widths are rounded up to the tile of the matrix unit. What this leaves out (launches, cache, clocks,
imperfect kernels) makes absolute times too short; ratios between models are what it is for.
"""

import dataclasses
from typing import Any

import numpy as np

from nvit_jax.model.dims import ViTDims
from nvit_jax.model.values import real, whole


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Milliseconds for `batch` images as a function of dims.

    tflops: peak of the compute dtype, 10^12 floating-point operations a second, a multiply-accumulate counting two.
    gbs: memory bandwidth, 10^9 bytes a second. itemsize: bytes of a number. tile: multiple that every width of a matrix
    product is padded to.
    """

    tflops: float
    gbs: float
    batch: int
    itemsize: int
    tile: int = 1

    def __post_init__(self) -> None:
        """UserError for numbers that are of no device."""
        for name in ("tflops", "gbs"):
            real(name, getattr(self, name), 1e-9, 1e12)
        for name in ("batch", "itemsize", "tile"):
            whole(name, getattr(self, name), 1, 2**24)

    @property
    def of_blocks(self) -> bool:
        """It is a sum over the blocks, given embed."""
        return True

    @property
    def of_arrays(self) -> bool:
        """Widths may be arrays, that stand for many models."""
        return True

    @property
    def device(self) -> str:
        return f"estimate (roofline of {self.tflops:g} TFLOP/s, {self.gbs:g} GB/s)"

    def _matmul(self, rows: int, inner: int, columns: int, count: int = 1, shared: bool = True) -> float:
        """Seconds of `count` products [rows, inner] x [inner, columns] an image; `shared` weights are read once."""
        images = self.batch * (count + (count == 0))  # what has none costs nothing, see `_attention`
        k, m = self._padded(inner), self._padded(columns)
        n = self._padded(rows * images) / images if shared else self._padded(rows)  # shared: images are more rows
        weights = inner * columns * (count if shared else images)
        moved = (images * rows * (inner + columns) + weights) * self.itemsize
        return _larger(2 * images * n * k * m / (self.tflops * 1e12), moved / (self.gbs * 1e9))

    def _padded(self, width: int) -> int:
        return -(-width // self.tile) * self.tile

    def _moved(self, numbers: float) -> float:
        """Seconds of reading and writing that many numbers for each image."""
        return 2 * numbers * self.batch * self.itemsize / (self.gbs * 1e9)

    def _attention(self, dims: ViTDims, h: int, q: int, v: int) -> float:
        n, d, q = dims.tokens, dims.embed, dims.paired * q
        projections = self._matmul(n, d, h * (2 * q + v)) + self._matmul(n, h * v, d)
        products = self._matmul(n, q, n, h, shared=False) + self._matmul(n, n, v, h, shared=False)
        return (h > 0) * (projections + products + self._moved(h * n * n) + self._moved(n * d))

    def _mlp(self, dims: ViTDims, m: int) -> float:
        n, d = dims.tokens, dims.embed
        return (m > 0) * ((1 + dims.gated) * self._matmul(n, d, m) + self._matmul(n, m, d) + self._moved(n * d))

    def _pool(self, dims: ViTDims) -> float:
        """Attention pooling: one query for each image, the same for all of them."""
        n, w, h = dims.pooled, dims.pool_width, dims.pool_heads
        products = self._matmul(1, w // h, n, h, shared=False) + self._matmul(1, n, w // h, h, shared=False)
        mlp = self._matmul(1, w, dims.pool_mlp) + self._matmul(1, dims.pool_mlp, w)
        return self._matmul(n, dims.embed, 2 * w) + products + self._matmul(1, w, w) + mlp

    def __call__(self, dims: ViTDims) -> float:
        blocks = zip(dims.heads, dims.qk, dims.v, dims.mlp, strict=True)
        total = sum(self._attention(dims, h, q, v) + self._mlp(dims, m) for h, q, v, m in blocks)
        total += self._matmul(dims.patches, dims.patch_values, dims.embed) + self._moved(dims.tokens * dims.embed)
        if dims.pre_norm:
            total += self._moved(dims.tokens * dims.embed)
        if dims.pool == "map":
            total += self._pool(dims)
        if dims.projection:
            total += self._matmul(1, dims.pool_width or dims.embed, dims.projection)
        total += dims.classifiers * self._matmul(1, dims.features, max(dims.classes, 1))
        if dims.pool == "class_mean":
            total += self._matmul(1, dims.embed, dims.classes)
        if dims.pre_logits:
            total += self._matmul(1, dims.embed, dims.pre_logits)
        return 1e3 * total


def _larger(a: Any, b: Any) -> Any:
    """Of two numbers, or of the entries of two arrays; NumPy's is slow for numbers."""
    return np.maximum(a, b) if isinstance(a, np.ndarray) else max(a, b)
