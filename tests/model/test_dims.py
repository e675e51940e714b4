"""Widths, presets, parameter counts and MACs."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import VARIANTS, small_dims

from nvit_jax.errors import UserError
from nvit_jax.model import vit
from nvit_jax.model.dims import (
    ViTDims,
    attention_macs,
    count_macs,
    count_params,
    mlp_macs,
    preset,
    preset_names,
)
from nvit_jax.model.masks import full_masks, kept_dims, normalize

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
    no_parts = ViTDims.from_json(dims.to_json() | {"heads": [0, 1], "mlp": [7, 0]})
    for d in (dims, kept_dims(normalize(masks), dims), no_parts):
        assert sum(math.prod(s.shape) for s in jax.tree.leaves(vit.shapes(d))) == count_params(d)
        images = jax.ShapeDtypeStruct((1, *d.sides, d.channels), jnp.float32)
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
        ({"image": (8, 9)}, "image size 8 x 9 is not divisible by patch 4"),
        ({"image": (8, 0)}, r"image\[1\]=0 is too small"),
        ({"image": (8, 8, 8)}, "must be a whole number"),
        ({"embed": 9}, "not divisible by heads"),
        ({"pool": "last"}, "'last' is not one of"),
        ({"pool": "map", "pool_heads": 3}, "pool_width that pool_heads divides"),
        ({"pool": "map", "pre_logits": 3}, "goes with neither pre_logits nor"),
        ({"pool_mlp": 3}, 'go with pool="map"'),
        ({"projection": 3}, "goes with classes=0"),
        ({"cls_token": False}, "needs cls_token"),
        ({"pool": "mean", "dist_token": True}, "distillation token"),
        ({"classes": -1}, "classes=-1"),
        ({"mlp": -1}, "mlp"),
        ({"heads": 0, "qk": 4, "v": 4}, "heads=0"),
        ({"rotary": 3}, "rotary=3 must be even"),
        ({"rotary": 2, "qk": 4}, "no less than qk"),
        ({"qk_norm_count": 3}, "qk_norm_count=3 is less than the 4 query/key dims"),
        ({"rotary": 4, "qk": 4, "rotary_base": 0.5}, "rotary_base=0.5"),
        ({"rotary_grid": 4}, "rotary_grid=4 goes with rotary positions"),
        ({"relative": True, "registers": 1}, "relative=True needs a class token"),
        ({"proj_norm_count": 3}, "proj_norm_count=3 is less than the 8 value dims of all heads"),
        ({"fc2_norm_count": 3}, "fc2_norm_count=3 is less than the 12 neurons"),
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


def test_a_block_may_lack_a_part():
    values = small_dims().to_json() | {"heads": [2, 0], "qk": [4, 3], "v": [4, 5], "mlp": [0, 12]}
    dims = ViTDims.from_json(values)
    assert (dims.qk, dims.v) == ((4, 0), (4, 0))  # there is nothing that could have dims
    assert ViTDims.from_json(json.loads(json.dumps(dims.to_json()))) == dims
    assert attention_macs(dims, 1) == mlp_macs(dims, 0) == 0
    for kind in ("qk", "v"):
        with pytest.raises(UserError, match=f"{kind}=.* where there are heads, as in block 0"):
            ViTDims.from_json(values | {kind: [0, 4]})
    assert dims.padded().heads == (2, 2) and not dims.is_uniform


def test_old_dims_are_read_as_they_were():
    """As every version until now has written them."""
    text = (
        '{"image": 8, "patch": 4, "channels": 1, "classes": 5, "embed": 8, "heads": [2, 1], "qk": [4, 2], "v": [4, 3], '
        '"mlp": [12, 5], "qk_scale": 0.5}'
    )
    dims = ViTDims.from_json(json.loads(text))
    assert dims == dataclasses.replace(small_dims(), heads=(2, 1), qk=(4, 2), v=(4, 3), mlp=(12, 5))


def test_embed_channels_that_come_out_as_features_are_told():
    """They stay when a model is pruned by its features; behind a projection or attention pooling they may go."""
    assert small_dims(classes=0).gives_channels and not small_dims().gives_channels
    for name, width in (("clip", 6), ("siglip", 8)):
        dims = small_dims(**VARIANTS[name])
        assert not dims.gives_channels and dims.features == width
