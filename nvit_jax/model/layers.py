"""Layers of the Vision Transformer: linear, LayerNorm over kept channels, gates, dropout, stochastic depth.

Random draws take one key per example, so that they do not depend on the number of devices.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = Any
STD = 0.02
kernel_init = nn.initializers.truncated_normal(STD)


def wide(dtype: Dtype) -> Dtype:
    """Statistics, softmax and losses run in at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


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

    In bfloat16 only the factors are rounded: gradients come out, and are summed over devices, in float32.
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
        y = multiply(flat, kernel.reshape(flat.shape[-1], -1), self.dtype).reshape(*flat.shape[:-1], *self.features)
        y = y if bias is None else y + bias
        return y.astype(self.dtype or y.dtype)


def multiply(x: jax.Array, kernel: jax.Array, dtype: Dtype) -> jax.Array:
    """[..., I] @ [I, O]; the plain product wherever it is not narrower than float32, of any order of derivatives."""
    if dtype is None or jnp.dtype(dtype).itemsize >= 4:
        return x @ kernel
    return _product(x, kernel, dtype)


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
