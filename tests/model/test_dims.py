"""Widths, presets, parameter counts and MACs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import VARIANTS, small_dims

from nvit_jax.errors import UserError
from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims, count_macs, count_params, preset, preset_names
from nvit_jax.model.masks import full_masks, kept_dims

GOLDEN_PARAMS = {
    "deit_tiny": 5_717_416,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
    "deit_base_distilled": 87_338_192,
}


@pytest.mark.parametrize("name", GOLDEN_PARAMS)
def test_published_parameter_counts(name):
    dims = preset(name)
    assert count_params(dims) == GOLDEN_PARAMS[name]
    assert sum(math.prod(s.shape) for s in jax.tree.leaves(vit.shapes(dims))) == GOLDEN_PARAMS[name]


def test_every_preset_builds():
    for name in preset_names():
        dims = preset(name)
        assert dims.image == (384 if name.endswith("384") else 518 if name.startswith("dinov2") else 224)
        assert ViTDims.from_json(dims.to_json()) == dims


def _multiply_adds(jaxpr) -> int:
    """MACs of every dot_general and conv of a jaxpr, those inside calls included."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total += math.prod(eqn.outvars[0].aval.shape) * depth
        elif eqn.primitive.name == "conv_general_dilated":
            out_channels = eqn.params["dimension_numbers"].rhs_spec[0]
            kernel = eqn.invars[1].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[out_channels]
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += _multiply_adds(inner)
    return total


@pytest.mark.parametrize("variant", VARIANTS)
def test_macs_are_those_of_the_jaxpr(variant):
    dims = small_dims(**VARIANTS[variant])
    rng = np.random.default_rng(0)
    masks = full_masks(dims)
    masks.mlp[0, :5] = 0
    masks.head[1, 0] = 0
    masks.embed[rng.permutation(dims.embed)[:3]] = 0
    for d in (dims, kept_dims(masks, dims)):
        assert sum(math.prod(s.shape) for s in jax.tree.leaves(vit.shapes(d))) == count_params(d)
        images = jax.ShapeDtypeStruct((1, d.image, d.image, d.channels), jnp.float32)
        jaxpr = jax.make_jaxpr(lambda p, x, d=d: vit.forward(d, p, x, unroll=True))(vit.shapes(d), images)
        assert _multiply_adds(jaxpr.jaxpr) == count_macs(d)


def test_macs_of_the_published_model_and_xla_total(capsys):
    dims = preset("deit_tiny")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)

    def forward(p, x):
        return vit.forward(dims, p, x, unroll=True)

    assert _multiply_adds(jax.make_jaxpr(forward)(vit.shapes(dims), images).jaxpr) == count_macs(dims)
    flops = jax.jit(forward).lower(vit.shapes(dims), images).cost_analysis()["flops"]
    # XLA counts two operations for a multiply-add, and the elementwise work besides: under a tenth here.
    assert 2 * count_macs(dims) < flops < 2.2 * count_macs(dims)
    print(
        f"MACs {count_macs(dims):,}; XLA's total {flops:,.0f} operations = {flops / 2 / count_macs(dims):.3f} x 2 MACs"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": 9}, "not divisible by patch"),
        ({"embed": 9}, "not divisible by heads"),
        ({"pool": "max"}, "'max' is not one of"),
        ({"cls_token": False}, "needs cls_token"),
        ({"pool": "mean", "dist_token": True}, "distillation token"),
        ({"classes": -1}, "classes=-1"),
        ({"mlp": 0}, "mlp"),
    ],
)
def test_impossible_dims_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        small_dims(**changes)


def test_unknown_preset_and_damaged_json():
    with pytest.raises(UserError, match="deit_tiny"):
        preset("deit_huge")
    values = small_dims().to_json()
    with pytest.raises(UserError, match="unknown field.*colour"):
        ViTDims.from_json(values | {"colour": 1})
    with pytest.raises(UserError, match="missing field.*embed"):
        ViTDims.from_json({k: v for k, v in values.items() if k != "embed"})
