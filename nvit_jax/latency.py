"""How long a model takes on this device: measured, and predicted from its dims.

The prediction is a non-negative combination of a few counts (`features`), fitted on models of random widths that
are compiled as they are deployed (unrolled, dense) and timed in turns, so that drift of the machine cancels.
Non-negative weights on counts that grow with every width make it monotone in every width.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from nvit_jax import models
from nvit_jax.dims import ViTDims, attention_macs, count_macs, mlp_macs
from nvit_jax.errors import UserError

FEATURES = ("constant", "attention_macs", "mlp_macs", "other_macs", "attention_weights", "widths", "stream")


def features(dims: ViTDims) -> np.ndarray:
    """[7] per image: 1, MACs of attention, of mlp and of the rest, softmax entries, activations, stream entries."""
    blocks = range(dims.depth)
    attention, mlp = sum(attention_macs(dims, i) for i in blocks), sum(mlp_macs(dims, i) for i in blocks)
    n = dims.tokens
    widths = sum(h * (2 * q + v) + m for h, q, v, m in zip(dims.heads, dims.qk, dims.v, dims.mlp, strict=True))
    return np.array(
        [
            1.0,
            attention,
            mlp,
            count_macs(dims) - attention - mlp,
            n * n * sum(dims.heads),
            n * widths,
            n * dims.embed * dims.depth,
        ]
    )


@dataclasses.dataclass(frozen=True)
class LatencyModel:
    """Milliseconds for one batch of `batch` images on `device`, as a function of dims."""

    weights: tuple[float, ...]  # ms per FEATURES entry
    batch: int
    device: str
    dtype: str

    def __call__(self, dims: ViTDims) -> float:
        return float(features(dims) @ np.array(self.weights))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"weights": dict(zip(FEATURES, self.weights, strict=True))}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LatencyModel":
        weights = tuple(float(values["weights"][name]) for name in FEATURES)
        return cls(weights, values["batch"], values["device"], values["dtype"])


def device_name() -> str:
    """The device and how much of it: "cpu x1 (2 cores)" or "NVIDIA H200 x8"."""
    import os

    device = jax.devices()[0]
    cores = f" ({len(os.sched_getaffinity(0))} cores)" if device.platform == "cpu" else ""
    return f"{device.device_kind} x{jax.device_count()}{cores}"


def compile_model(dims: ViTDims, batch: int, dtype: str) -> Callable[[], Any]:
    """The deployed form of a model on one device, as a call that waits for its result."""
    compute = jnp.dtype(dtype)
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), models.shapes(dims))
    images = jnp.full((batch, dims.image, dims.image, dims.channels), 0.1, jnp.float32)
    forward = jax.jit(lambda p, x: models.forward(dims, p, x, dtype=compute, unroll=True).mean(1))
    try:
        compiled = forward.lower(params, images).compile()
        jax.block_until_ready(compiled(params, images))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"latency: a batch of {batch} does not run on this device ({str(error)[:80]})") from error
    return lambda: jax.block_until_ready(compiled(params, images))


def time_in_turns(
    calls: Sequence[Callable[[], Any]], repeats: int, advance: Callable[[], None] = lambda: None
) -> np.ndarray:
    """[calls] median milliseconds. Each round times every call once; one round warms up."""
    times = np.zeros((repeats + 1, len(calls)))
    for row in times:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            row[i] = time.perf_counter() - start
        advance()
    return np.median(times[1:], axis=0) * 1e3


def measure(all_dims: Sequence[ViTDims], *, batch: int, dtype: str, repeats: int) -> list[float]:
    """Milliseconds of each model, timed in turns on one device. Equal dims are measured once."""
    unique = list(dict.fromkeys(all_dims))
    times = time_in_turns([compile_model(d, batch, dtype) for d in unique], repeats)
    return [float(times[unique.index(d)]) for d in all_dims]


def random_dims(dims: ViTDims, sizes: Mapping[str, int], rng: np.random.Generator) -> ViTDims:
    """Ragged widths as pruning leaves them, in steps of the group sizes.

    For each kind a fraction is drawn between a quarter and all of the width, and the blocks vary around it.
    """
    field = {"head": "heads", "qk": "qk", "v": "v", "mlp": "mlp"}

    def around(fraction: float, width: int, size: int) -> int:
        steps = round(width * fraction / size)
        return min(max(steps, 1) * size, width)

    changed: dict[str, Any] = {"embed": around(rng.uniform(0.25, 1), dims.embed, sizes["embed"])}
    for kind, name in field.items():
        centre, size = rng.uniform(0.25, 1), 1 if kind == "head" else sizes[kind]
        spread = np.clip(centre + rng.uniform(-0.25, 0.25, dims.depth), 0.1, 1)
        changed[name] = tuple(around(f, w, size) for f, w in zip(spread, getattr(dims, name), strict=True))
    return dataclasses.replace(dims, **changed)


def fit(
    dims: ViTDims,
    sizes: Mapping[str, int],
    *,
    batch: int,
    dtype: str,
    count: int,
    checks: int,
    repeats: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[LatencyModel, dict[str, Any]]:
    """Measure `count` + `checks` random models and the dense one; fit on the first, report the error on the checks.

    Returns the model and {"dense_latency_ms", "fit_error", "check_error", "check_worst"}: median (worst) absolute
    relative errors of latency ratios to the dense model.
    """
    rng = np.random.default_rng(0)
    candidates = [dims] + [random_dims(dims, sizes, rng) for _ in range(count + checks)]
    calls = []
    for candidate in candidates:
        calls.append(compile_model(candidate, batch, dtype))
        advance(1)
    times = time_in_turns(calls, repeats, lambda: advance(1))
    rows = np.stack([features(c) for c in candidates])
    fitted = slice(0, count + 1)
    scale = rows[fitted].max(0)
    scale[scale == 0] = 1.0
    # Relative errors count, so each row is divided by its time.
    solution, _ = nnls(rows[fitted] / scale / times[fitted, None], np.ones(count + 1))
    model = LatencyModel(tuple(solution / scale), batch, device_name(), dtype)
    ratios = np.array([model(c) for c in candidates]) / model(dims)
    errors = np.abs(ratios / (times / times[0]) - 1)
    report = {"dense_latency_ms": float(times[0]), "fit_error": float(np.median(errors[fitted]))}
    if checks:
        report |= {
            "check_error": float(np.median(errors[count + 1 :])),
            "check_worst": float(errors[count + 1 :].max()),
        }
    return model, report
