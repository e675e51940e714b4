"""Layers of the Vision Transformer: linear, norms over kept channels, gates, dropout, stochastic depth.

Random draws take one key per example, so that they do not depend on the number of devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Dtype = Any
STD = 0.02
kernel_init = nn.initializers.truncated_normal(STD)


def wide(dtype: Dtype) -> Dtype:
    """Statistics, softmax and losses run in at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def _below(x: jax.Array) -> jax.Array:
    """The part of a normal distribution that lies below x."""
    return 0.5 * (1 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x times the part of a normal distribution that lies below x.

    Its derivative is written out, so that a backward pass keeps one array of it where the parts of the product are
    several, the largest arrays of a block.
    """
    y = x.astype(wide(x.dtype))
    return (y * _below(y)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (t,) = primals, tangents
    y = x.astype(wide(x.dtype))
    below = _below(y)
    slope = below + y * jnp.exp(-0.5 * jnp.square(y)) * np.sqrt(0.5 / np.pi).astype(y.dtype)
    return (y * below).astype(x.dtype), t * slope.astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {  # of the mlp, by the names of `ViTDims.activation`
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, dtype: Dtype) -> jax.Array:
    """[..., I] @ [I, O] with factors in `dtype`, the sums, the result and the kernel's gradient in float32."""
    return jax.lax.dot_general(
        x.astype(dtype), kernel.astype(dtype), (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def _product_forward(x: jax.Array, kernel: jax.Array, dtype: Dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, kernel, dtype), (x, kernel)


def _product_backward(dtype: Dtype, kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    g, rows = g.astype(dtype), tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(
        g, kernel.astype(dtype), (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    dkernel = jax.lax.dot_general(x.astype(dtype), g, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


class Dense(nn.Module):
    """A linear layer over the last `axes` axes: kernel [*inputs, *features], bias [*features].

    In bfloat16 factors and result are rounded: sums, and gradients over the devices, are float32.
    """

    features: tuple[int, ...]
    axes: int = 1
    use_bias: bool = True
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = x.shape[x.ndim - self.axes :]
        kernel = self.param("kernel", kernel_init, (*inputs, *self.features))
        bias = self.param("bias", nn.initializers.zeros, self.features) if self.use_bias else None
        flat = x.reshape(*x.shape[: x.ndim - self.axes], -1)
        y = multiply(flat, kernel.reshape(flat.shape[-1], -1), self.dtype)
        y = y if bias is None else y + bias.reshape(-1)
        return y.reshape(*flat.shape[:-1], *self.features).astype(self.dtype or y.dtype)


class Constant(nn.Module):
    """What is left of a part without units: the bias [D] of its last layer, for every token of x [B, N, D]."""

    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return jnp.broadcast_to(bias.astype(self.dtype or bias.dtype), x.shape)


def multiply(x: jax.Array, kernel: jax.Array, dtype: Dtype) -> jax.Array:
    """[..., I] @ [I, O]; the plain product wherever it is not narrower than float32, of any order of derivatives.

    All rows are one axis: XLA for CPUs takes the kernel's gradient as it is then, and transposes a copy otherwise.
    """
    rows = x.reshape(-1, x.shape[-1])
    narrow = dtype is not None and jnp.dtype(dtype).itemsize < 4
    y = _product(rows, kernel, dtype) if narrow else rows @ kernel
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


class LayerNorm(nn.Module):
    """LayerNorm over the kept channels; removed channels come out as 0."""

    eps: float
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array, gate: jax.Array | None) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        y = x.astype(wide(x.dtype))
        if gate is None:
            centred = y - y.mean(-1, keepdims=True)
            variance = jnp.square(centred).mean(-1, keepdims=True)
            out = centred * jax.lax.rsqrt(variance + self.eps) * scale + bias
        else:
            kept = jax.lax.stop_gradient(gate).astype(y.dtype)[..., None, :]
            count = kept.sum(-1, keepdims=True)
            centred = (y - (y * kept).sum(-1, keepdims=True) / count) * kept
            variance = jnp.square(centred).sum(-1, keepdims=True) / count
            out = (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias) * kept
        return out.astype(self.dtype or x.dtype)


class AttentionPool(nn.Module):
    """What a learned query, the probe, sees of all tokens, and an mlp behind it: [B, N, D] -> [B, 1, W].

    It is SigLIP's "map" head (Zhai et al. 2022, "Scaling Vision Transformers"; timm's AttentionPoolLatent). The pooled
    vector has a width W of its own: of a pruned stream the keys and values read less, and all features stay.
    """

    width: int
    heads: int
    mlp: int
    activation: str
    eps: float
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(Dense, dtype=self.dtype)
        size = self.width // self.heads
        probe = self.param("probe", kernel_init, (self.width,))
        q = dense((self.heads, size), name="q")(probe[None].astype(x.dtype))[0]
        k = dense((self.heads, size), name="k")(x)
        v = dense((self.heads, size), name="v")(x)
        logits = jnp.einsum("hd,bnhd->bhn", q * size**-0.5, k)
        weights = jax.nn.softmax(logits.astype(wide(logits.dtype))).astype(v.dtype)
        y = dense((self.width,), axes=2, name="proj")(jnp.einsum("bhn,bnhv->bhv", weights, v)[:, None])
        hidden = dense((self.mlp,), name="fc1")(LayerNorm(self.eps, self.dtype, name="norm")(y, None))
        return y + dense((self.width,), name="fc2")(ACTIVATIONS[self.activation](hidden))


class RMSNorm(nn.Module):
    """x / sqrt(sum of x^2 over the channels / count + eps).

    It has no gain and no bias: what reads it can hold them. `count` is the number of channels before pruning, so that
    what is left is scaled as it was (Zhang and Sennrich 2019, but for that). Removed channels are 0 in x already, and
    need no gate.
    """

    count: int
    eps: float
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array, gate: jax.Array | None) -> jax.Array:
        del gate
        y = x.astype(wide(x.dtype))
        out = y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) / self.count + self.eps)
        return out.astype(self.dtype or x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """softmax(q k' + bias) v of each head: q, k [B, N, H, Q], v [B, N, H, V], bias [H, N, N] -> [B, N, H, V].

    Plain products of matrices with the heads in front are what a CPU has fast kernels for. The sum of the weights
    divides their product with the values, which is smaller than the weights.
    """
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    logits = q @ jnp.swapaxes(k, 2, 3)
    logits = logits.astype(wide(logits.dtype))
    logits = logits if bias is None else logits + bias.astype(logits.dtype)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    z = weights.astype(v.dtype) @ v / weights.sum(-1, keepdims=True)
    return jnp.swapaxes(z.astype(v.dtype), 1, 2)


class HeadNorm(nn.Module):
    """The norm of queries or keys, in each head: x / sqrt(sum of x^2 over its dims / count + eps) * scale + bias.

    x is [B, N, H, Q], or [B, N, H, Q, 2] of rotary pairs. `count` is the head's dims before pruning, so that what is
    left is scaled as it was. Removed dims are to be 0 in x. A LayerNorm is one, of dims without their mean, which the
    layer in front can leave out.
    """

    count: int
    eps: float
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[2:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[2:])
        y = x.astype(wide(x.dtype))
        squares = jnp.square(y).sum(tuple(range(3, y.ndim)), keepdims=True)
        out = y * jax.lax.rsqrt(squares / self.count + self.eps) * scale + bias
        return out.astype(self.dtype or x.dtype)


class InnerNorm(nn.Module):
    """LayerNorm inside of a part, in front of its last layer: over the value dims of all heads, x [B, N, H, V], or over
    the neurons, x [B, N, M] (NormFormer, Shleifer et al. 2021).

    `count` is their number before pruning. Those that are removed are to be 0 in x, and stay in mean and variance as
    such, so that what is left is scaled as it was.
    """

    count: int
    eps: float
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[2:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[2:])
        y = x.astype(wide(x.dtype))
        axes = tuple(range(2, y.ndim))
        mean = y.sum(axes, keepdims=True) / self.count
        centred = y - mean
        gone = self.count - np.prod(x.shape[2:])
        variance = (jnp.square(centred).sum(axes, keepdims=True) + gone * jnp.square(mean)) / self.count
        out = centred * jax.lax.rsqrt(variance + self.eps) * scale + bias
        return out.astype(self.dtype or x.dtype)


def turn(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotary positions: the pairs of x [B, N, H, Q, 2], each turned by the angle of its token [N, H, Q]."""
    first, second = x[..., 0], x[..., 1]
    turned = jnp.stack([first * cosines - second * sines, second * cosines + first * sines], -1)
    return turned.astype(x.dtype)


def gate(x: jax.Array, gate: jax.Array | None) -> jax.Array:
    """Multiply [B, N, ...units] by a gate [...units] or, per sample, [B, ...units]."""
    if gate is None:
        return x
    return x * (gate if gate.ndim == x.ndim - 2 else gate[:, None]).astype(x.dtype)


def layer_keys(keys: jax.Array, data: jax.Array | int) -> jax.Array:
    """Every example's key [B] folded with the number of a layer."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def dropout(x: jax.Array, keys: jax.Array | None, rate: float) -> jax.Array:
    """Elementwise dropout drawn from one key per example, so that it does not depend on the device count."""
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


def drop_path(x: jax.Array, keys: jax.Array | None, rate: jax.Array | float) -> jax.Array:
    """Stochastic depth: drop the branch of whole examples."""
    if keys is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate))(keys)
    return jnp.where(keep[:, None, None], x / jnp.asarray(1 - rate, x.dtype), 0)
