"""What this device can do at best: products of large matrices, and moving memory. Measured beside what is judged."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.timing import Call, alternate
from nvit_jax.latency.roofline import Roofline
from nvit_jax.model.dims import ViTDims


class Peaks(NamedTuple):
    """10^12 floating-point operations a second (a multiply-accumulate counts two), and 10^9 bytes moved a second."""

    tflops: float
    gbs: float

    def roofline_ms(self, dims: ViTDims, batch: int, dtype: str) -> float:
        """The least milliseconds that a forward pass can take, see nvit_jax/latency/roofline.py."""
        itemsize = jnp.dtype(dtype).itemsize
        return Roofline(tflops=self.tflops, gbs=self.gbs, batch=batch, itemsize=itemsize)(dims)

    def part(self, macs: float, seconds: float) -> float:
        """Of the matrix peak, that so many multiply-accumulates in so many seconds are."""
        return 2 * macs / seconds / (self.tflops * 1e12)


_PASSES = 64  # over an array, in one program: at each run a CPU's memory is new, and the system has to clear it


def measure_peaks(dtype: str, *, tiny: bool = False, rounds: int = 5) -> Peaks:
    """The best of JAX's product of square matrices and, where PyTorch is on the same device, PyTorch's."""
    large = jax.default_backend() != "cpu"
    side = 64 if tiny else 8192 if large else 1536
    count = 2**14 if tiny else 2**30 if large else 2**26  # bytes: far more than any cache
    key = jax.random.key(0)
    a = jax.random.normal(key, (side, side), jnp.dtype(dtype))
    x = jax.random.normal(key, (count // 4,), jnp.float32)
    product = jax.jit(jnp.matmul)
    add = jax.jit(lambda x: jax.lax.fori_loop(0, _PASSES, lambda _, x: x + 1, x))
    calls: dict[str, Call] = {
        "add": lambda: add(x).block_until_ready(),
        "jax": lambda: product(a, a).block_until_ready(),
    }
    theirs = _torch_product(side, dtype)
    if theirs is not None:
        calls["torch"] = theirs
    times = alternate(calls, rounds)
    fastest = min(float(times.wall[name].min()) for name in calls if name != "add")
    return Peaks(2 * side**3 / fastest / 1e12, 2 * count * _PASSES / float(times.wall["add"].min()) / 1e9)


def _torch_product(side: int, dtype: str) -> Call | None:
    from benchmarks import rivals

    try:
        torch = rivals.import_torch()
        a = torch.randn(side, side, dtype=getattr(torch, dtype), device=rivals.torch_device())
    except rivals.NotRun:
        return None
    return lambda: (a @ a, rivals.wait())
