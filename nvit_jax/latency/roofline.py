"""An estimate of latency for a device that is not here, from its peak and its bandwidth. Not a measurement.

Every operation takes the longer of its compute and its memory time (Williams et al. 2009, "Roofline"). Operations
are the matrix products, with their elementwise followers fused into them, and the softmax and LayerNorms, which only
move memory. Widths are rounded up to the tile of the matrix unit. What this leaves out (launches, cache, clocks,
imperfect kernels) makes absolute times too short; ratios between models are what it is for.
"""

import dataclasses
import math

from nvit_jax.model.dims import ViTDims


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

    @property
    def device(self) -> str:
        return f"estimate (roofline of {self.tflops:g} TFLOP/s, {self.gbs:g} GB/s)"

    def _matmul(self, rows: int, inner: int, columns: int, count: int = 1, shared: bool = True) -> float:
        """Seconds of `count` products [rows, inner] x [inner, columns] an image; `shared` weights are read once."""
        images = self.batch * count
        k, m = self._padded(inner), self._padded(columns)
        n = self._padded(rows * images) / images if shared else self._padded(rows)  # shared: images are more rows
        weights = inner * columns * (count if shared else images)
        moved = (images * rows * (inner + columns) + weights) * self.itemsize
        return max(2 * images * n * k * m / (self.tflops * 1e12), moved / (self.gbs * 1e9))

    def _padded(self, width: int) -> int:
        return math.ceil(width / self.tile) * self.tile

    def _moved(self, numbers: float) -> float:
        """Seconds of reading and writing that many numbers for each image."""
        return 2 * numbers * self.batch * self.itemsize / (self.gbs * 1e9)

    def _attention(self, dims: ViTDims, h: int, q: int, v: int) -> float:
        n, d = dims.tokens, dims.embed
        projections = self._matmul(n, d, h * (2 * q + v)) + self._matmul(n, h * v, d)
        products = self._matmul(n, q, n, h, shared=False) + self._matmul(n, n, v, h, shared=False)
        return projections + products + self._moved(h * n * n) + self._moved(n * d)

    def _mlp(self, dims: ViTDims, m: int) -> float:
        n, d = dims.tokens, dims.embed
        return self._matmul(n, d, m) + self._matmul(n, m, d) + self._moved(n * d)

    def __call__(self, dims: ViTDims) -> float:
        blocks = zip(dims.heads, dims.qk, dims.v, dims.mlp, strict=True)
        total = sum(self._attention(dims, h, q, v) + self._mlp(dims, m) for h, q, v, m in blocks)
        total += self._matmul(dims.patches, dims.patch**2 * dims.channels, dims.embed) + self._moved(
            dims.tokens * dims.embed
        )
        features = dims.pre_logits or dims.embed
        total += dims.classifiers * self._matmul(1, features, max(dims.classes, 1))
        if dims.pre_logits:
            total += self._matmul(1, dims.embed, dims.pre_logits)
        return 1e3 * total
