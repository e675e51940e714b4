"""GELU and attention are written for speed: their results and derivatives are those of the plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erfc

from nvit_jax.model.layers import attend, gelu

pytestmark = pytest.mark.usefixtures("x64")


def exact_gelu(x):
    return 0.5 * x * erfc(-x / np.sqrt(2))


@pytest.mark.parametrize(("dtype", "rounding"), [("float64", 2.0**-52), ("float32", 2.0**-23), ("bfloat16", 2.0**-8)])
def test_gelu_is_x_times_the_normal_distribution(dtype, rounding):
    x = jnp.asarray(np.linspace(-12, 12, 4001), dtype)
    wide = np.asarray(x, np.float64)
    found = gelu(x)
    assert found.dtype == x.dtype
    # Of a sum of 1 and erf a few roundings of 1 are left, times x.
    assert np.all(np.abs(np.asarray(found, np.float64) - exact_gelu(wide)) <= 4 * rounding * np.abs(wide))


def test_derivatives_of_gelu_are_exact_of_first_and_second_order_in_both_modes():
    x = np.linspace(-6, 6, 101)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    first, second = exact_gelu(x) / np.where(x == 0, 1, x) + (x == 0) * 0.5 + x * density, (2 - x**2) * density
    ones = np.ones_like(x)

    def gradient(x):
        return jax.grad(lambda x: gelu(x).sum())(x)

    for found, wanted in (
        (gradient(x), first),
        (jax.jvp(gelu, (x,), (ones,))[1], first),
        (jax.jvp(gradient, (x,), (ones,))[1], second),
        (jax.grad(lambda x: gradient(x).sum())(x), second),
    ):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-14)


def test_gelu_keeps_one_array_for_the_backward_pass():
    x = jnp.ones((5, 7), jnp.float32)
    assert sum(np.size(kept) for kept in jax.tree.leaves(jax.vjp(gelu, x)[1])) == x.size


def plain(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhv->bqhv", weights, v)


def drawn(scale=1.0):
    rng = np.random.default_rng(0)
    shapes = ((2, 5, 3, 4), (2, 5, 3, 4), (2, 5, 3, 6))
    return tuple(jnp.asarray(scale * rng.standard_normal(shape)) for shape in shapes)


def test_attention_and_its_derivatives_are_those_of_the_softmax():
    units, at = drawn(), drawn()

    def losses(attention):
        def loss(inputs):
            return jnp.sin(attention(*inputs)).sum()

        product = jax.jvp(jax.grad(loss), (at,), (units,))
        return attention(*at), product, jax.jvp(loss, (at,), (units,))

    for found, wanted in zip(*(jax.tree.leaves(losses(f)) for f in (attend, plain)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * max(1, float(np.abs(wanted).max())))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_of_large_logits_is_finite_in_the_type_of_the_values(dtype):
    found = attend(*(x.astype(dtype) for x in drawn(100.0)))
    assert found.dtype == dtype and jnp.isfinite(found).all()
