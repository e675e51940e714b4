"""How long things take on this device: pieces of a model compiled as they are deployed, timed in turns."""

import dataclasses
import functools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nvit_jax.data.datasets import cores
from nvit_jax.errors import UserError, check_choice, first_line
from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.parts import forward_in_parts
from nvit_jax.parallel import machine_bytes
from nvit_jax.schema import check_fields, whole

Call = Callable[[], Any]
_MEMORY = threading.Lock()  # one program at a time is held against the free memory and takes its part of it


class DoesNotFit(Exception):
    """The device has too little memory for a program."""


def device_name() -> str:
    """The device and how much of it: "cpu x1 (2 cores)" or "NVIDIA H200 x8"."""
    device = jax.devices()[0]
    detail = f" ({cores()} cores)" if device.platform == "cpu" else ""
    return f"{device.device_kind} x{jax.device_count()}{detail}"


def free_bytes() -> int:
    """Memory that a program may still take on the first device of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    if sys.platform != "linux":
        return machine_bytes()  # what is free is not to be had as easily
    with open("/proc/meminfo", encoding="ascii") as file:
        facts = dict(line.split(":", 1) for line in file)
    return 1024 * int(facts["MemAvailable"].split()[0])


def compile_piece(dims: ViTDims, name: str, batch: int, dtype: str) -> Call:
    """`vit.piece` on one device, as a call that waits for its result. DoesNotFit before memory is exhausted."""
    fn, shapes, example = vit.piece(dims, name, jnp.dtype(dtype))
    example = jax.ShapeDtypeStruct((batch, *example.shape[1:]), example.dtype)
    rng = np.random.default_rng(0)  # random: on a GPU constant inputs draw less power and run faster

    def draw(shape: Any) -> jax.Array:
        return jnp.asarray(0.02 * rng.standard_normal(shape.shape, np.float32), shape.dtype)

    try:
        run = jax.jit(lambda params, inputs: forward_in_parts(functools.partial(fn, params), dims, inputs))
        compiled = run.lower(shapes, example).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        with _MEMORY:
            if needed > (free := free_bytes()):
                raise DoesNotFit(f"needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free")
            params, inputs = jax.tree.map(draw, shapes), draw(example)
            jax.block_until_ready(compiled(params, inputs))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
            raise DoesNotFit(first_line(error, 120)) from error
        raise
    return lambda: jax.block_until_ready(compiled(params, inputs))


def compile_pieces(pieces: Sequence[tuple[ViTDims, str]], batch: int, dtype: str) -> list[Call | DoesNotFit]:
    """`compile_piece` of each, side by side on the host's cores; one by one where several processes must keep step."""

    def attempt(piece: tuple[ViTDims, str]) -> Call | DoesNotFit:
        try:
            return compile_piece(*piece, batch, dtype)
        except DoesNotFit as error:
            return error

    if jax.process_count() > 1:
        return [attempt(piece) for piece in pieces]
    with ThreadPoolExecutor(min(8, cores())) as pool:
        return list(pool.map(attempt, pieces))


def time_in_turns(calls: Sequence[Call], repeats: int) -> np.ndarray:
    """[repeats, calls] milliseconds. Each round times every call once, so that drift hits all; one round warms up."""
    times = np.zeros((repeats + 1, len(calls)))
    for row in times:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            row[i] = time.perf_counter() - start
    return times[1:] * 1e3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """How something is timed."""

    batch: int = 32  # images
    dtype: str = "float32"
    repeats: int = 15  # rounds; the median counts

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_fields(self, dict.fromkeys(("batch", "repeats"), whole(1, 10**9)))


class Time(NamedTuple):
    """Of one model: the median in milliseconds, and half the interquartile range over it."""

    ms: float
    spread: float


def measure(all_dims: Sequence[ViTDims], how: Measurement) -> list[Time]:
    """The time of each whole model for a batch, timed in turns. Equal dims are measured once.

    Raises UserError for a batch that does not fit in memory.
    """
    unique = list(dict.fromkeys(all_dims))
    calls = compile_pieces([(d, "model") for d in unique], how.batch, how.dtype)
    if failed := [c for c in calls if isinstance(c, DoesNotFit)]:
        raise UserError(f"={how.batch} does not fit on this device ({failed[0]}); lower it", "batch")
    times = time_in_turns([c for c in calls if not isinstance(c, DoesNotFit)], how.repeats)
    low, middle, high = np.percentile(times, (25, 50, 75), axis=0)
    found = [Time(float(m), float((b - a) / 2 / m)) for a, m, b in zip(low, middle, high, strict=True)]
    return [found[unique.index(d)] for d in all_dims]
