"""Attention: nvit_jax's products against JAX's dot_product_attention, as XLA and as cuDNN compute it.

    python -m benchmarks.attention --widths 64x64 48x48 40x24
    python -m benchmarks.attention --heads 12 --batch 256 --dtype bfloat16

A width is that of a head's queries and keys, then of its values. All kernels run in turns at each, forward and with the
gradient in queries, keys and values. JAX's take one width for all three: the narrower is padded with zeros, for cuDNN
all to a multiple of 8. Of these types cuDNN takes only bfloat16, on a GPU. It has no second derivative, which `hvp`
needs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rivals
from benchmarks.record import Record, make_parser, run
from benchmarks.timing import Call, alternate
from nvit_jax.errors import UserError
from nvit_jax.model.layers import attend

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
OURS = "nvit_jax"
KERNELS = (OURS, "xla", "cudnn")


def kernel(how: str) -> Attention:
    """Of queries and keys [B, N, H, Q] and values [B, N, H, V], queries already scaled: [B, N, H, V]."""
    if how == OURS:
        return attend

    def padded(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        width = max(q.shape[-1], v.shape[-1])
        width = -(-width // 8) * 8 if how == "cudnn" else width
        q, k, wide = (jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, wide, scale=1.0, implementation=how)[..., : v.shape[-1]]  # type: ignore[call-overload,no-any-return]

    return padded


def make(how: str, of: str, inputs: tuple[jax.Array, ...]) -> Call:
    """A kernel's call, "forward" or with its "gradient". NotRun where JAX has no such kernel for the device."""
    attention = kernel(how)

    def gradient(*inputs: jax.Array) -> Any:
        return jax.grad(lambda x: jnp.square(attention(*x).astype(jnp.float32)).sum())(inputs)

    fn = jax.jit(gradient if of == "gradient" else attention)
    return rivals.tried(lambda: functools.partial(lambda: jax.block_until_ready(fn(*inputs))))


def widths(text: str) -> tuple[int, int]:
    """ "48x32" -> (48, 32). UserError."""
    try:
        qk, v = (int(part) for part in text.split("x"))
    except ValueError as error:
        raise UserError(f" {text!r} is not two numbers such as 48x32", "--widths") from error
    return qk, v


def parser() -> Any:
    """Of the command line."""
    found = make_parser("attention", __doc__)
    found.add_argument("--widths", nargs="+", default=["64x64", "48x48", "40x24", "33x57"])
    found.add_argument("--heads", type=int, default=3)
    found.add_argument("--tokens", type=int, default=197)
    found.add_argument("--batch", type=int, default=16)
    found.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    found.add_argument("--rounds", type=int, default=9)
    return found


def main(words: Sequence[str]) -> None:
    """Measure, width by width."""
    options = parser().parse_args(words)
    record = Record("attention", options, words)
    batch, heads = (2, 2) if options.tiny else (options.batch, options.heads)
    rng = np.random.default_rng(0)
    for qk, v in map(widths, options.widths):
        shapes = [(batch, options.tokens, heads, width) for width in (qk, qk, v)]
        inputs = tuple(jnp.asarray(0.3 * rng.standard_normal(s, np.float32), options.dtype) for s in shapes)
        for of in ("forward", "gradient"):
            facts = {"of": of, "qk": qk, "v": v, "heads": heads, "dtype": options.dtype, "batch": batch}
            calls: dict[str, Call] = {}
            for how in KERNELS if jax.default_backend() == "gpu" else KERNELS[:2]:
                try:
                    calls[how] = make(how, of, inputs)
                except rivals.NotRun as error:
                    record.add(how=how, not_run=str(error), **facts)
            times = alternate(calls, options.rounds)
            for how in calls:
                record.add(how=how, **times.row(how, OURS), **facts)
    record.finish()


if __name__ == "__main__":
    run(main)
