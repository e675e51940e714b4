"""masked forward == reshaped forward, for every kind of unit, every variant, ragged blocks, and again."""

import jax
import numpy as np
import pytest
from conftest import VARIANTS, random_images, random_masks, random_params, run_forward, small_dims
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvit_jax.errors import UserError
from nvit_jax.model import vit
from nvit_jax.model.dims import KINDS, ViTDims, count_params
from nvit_jax.model.groups import AXES, PAIRED, axes_of, expand, flatten
from nvit_jax.model.masks import check_masks, full_masks
from nvit_jax.model.reshape import reshape
from nvit_jax.pruning.saliency import per_sample

# 1e-10 in float64 proves the equality; in float32 the sums run in another order, 1e-5 of the largest logit is
# about 100 units in the last place.
TOLERANCE = {np.float64: 1e-10, np.float32: 1e-5}


def assert_equal_models(dims, masks, seed=0):
    """The contract, in both types; returns what reshape made in float64."""
    result = None
    for dtype, tolerance in TOLERANCE.items():
        with jax.enable_x64(dtype is np.float64), jax.default_matmul_precision("float32"):
            params, images = random_params(dims, seed, dtype), random_images(dims, seed=seed, dtype=dtype)
            masked = run_forward(dims, params, images, masks)
            compact_dims, compact = reshape(params, masks, dims)
            out = run_forward(compact_dims, compact, images)
            assert out.dtype == dtype
            assert np.abs(out - masked).max() <= tolerance * max(1.0, np.abs(masked).max())
            assert sum(x.size for x in jax.tree.leaves(compact)) == count_params(compact_dims)
            result = result or (compact_dims, compact)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone(kind):
    dims = small_dims(dist_token=True, layer_scale=True, heads=4, qk=5, v=6)
    for seed in range(2):
        masks = random_masks(dims, np.random.default_rng(seed), (kind,))
        assert_equal_models(dims, masks, seed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant):
    dims = small_dims(**VARIANTS[variant])
    assert_equal_models(dims, random_masks(dims, np.random.default_rng(3)), 3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_parts_of_every_variant(variant):
    """One attention and one mlp, then the rest of two models; in the end every block is two constants."""
    dims = small_dims(**VARIANTS[variant])
    masks = random_masks(dims, np.random.default_rng(5))
    masks.head[0] = masks.mlp[1] = 0
    once_dims, once = assert_equal_models(dims, check_masks(masks, dims), 5)
    assert once_dims.heads[0] == once_dims.qk[0] == once_dims.v[0] == once_dims.mlp[1] == 0
    assert set(once["block_0"]["proj"]) == set(once["block_1"]["fc2"]) == {"bias"}
    assert "norm1" not in once["block_0"] and "norm2" not in once["block_1"]
    if variant not in ("plain", "layer_scale"):
        return
    masks = full_masks(once_dims)
    nothing = masks._replace(head=0 * masks.head, mlp=0 * masks.mlp)
    bare, _ = assert_equal_models(once_dims, nothing, 5)
    assert bare.heads == bare.mlp == (0, 0) and bare.is_uniform


@st.composite
def any_dims(draw) -> ViTDims:
    """Ragged or uniform dims of any variant."""
    depth = draw(st.integers(1, 3))
    widths, parts = (st.lists(st.integers(least, 4), min_size=depth, max_size=depth).map(tuple) for least in (1, 0))
    base = small_dims(**VARIANTS[draw(st.sampled_from(sorted(VARIANTS)))])
    values = base.to_json() | {"embed": draw(st.integers(2, 9)), "qk_scale": draw(st.floats(0.1, 1.0))}
    own = {"heads": draw(parts), "qk": draw(widths), "v": draw(widths), "mlp": draw(parts)}
    return ViTDims.from_json(values | own)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(dims=any_dims(), seed=st.integers(0, 2**20), kinds=st.sets(st.sampled_from((*KINDS, "part")), min_size=1))
def test_random_dims_masks_and_a_second_pruning(dims, seed, kinds):
    rng = np.random.default_rng(seed)
    once_dims, once = assert_equal_models(dims, random_masks(dims, rng, kinds), seed)
    # A pruned model is pruned again: its blocks are ragged, the masked forward pads them.
    masks = random_masks(once_dims, rng)
    with jax.enable_x64(True):
        images = random_images(dims, seed=seed)
        masked = run_forward(once_dims, once, images, masks)
        twice_dims, twice = reshape(once, masks, once_dims)
        out = run_forward(twice_dims, twice, images)
    assert np.abs(out - masked).max() <= 1e-10 * max(1.0, np.abs(masked).max())


def test_scan_padding_and_unrolled_are_one_model(x64):
    uniform = small_dims(dist_token=True)
    ragged = ViTDims.from_json(uniform.to_json() | {"heads": [2, 1], "qk": [3, 4], "v": [2, 5], "mlp": [12, 7]})
    no_parts = ViTDims.from_json(ragged.to_json() | {"heads": [0, 1], "mlp": [12, 0]})
    for dims in (uniform, ragged, no_parts):
        params, images = random_params(dims), random_images(dims)
        outs = [
            run_forward(dims, params, images, unroll=True),
            run_forward(dims, params, images),
            run_forward(dims, params, images, remat=True),
            run_forward(dims, params, images, full_masks(dims)),
            run_forward(dims, params, images, full_masks(dims), remat=True),
        ]
        for out in outs[1:]:
            np.testing.assert_allclose(out, outs[0], rtol=0, atol=1e-12)


def test_mask_values_do_not_recompile():
    dims = small_dims()
    params, images = random_params(dims, dtype=np.float32), random_images(dims, dtype=np.float32)
    traces = []

    @jax.jit
    def forward(params, images, masks):
        traces.append(1)
        return vit.forward(dims, params, images, masks)

    for seed in range(3):
        forward(params, images, random_masks(dims, np.random.default_rng(seed)))
    assert len(traces) == 1


def test_the_gate_of_a_rotary_pair_has_the_gradient_of_the_true_loss(x64):
    """By central differences, whose error is about 1e-9. And other numbers of the pairs are another function."""
    dims = small_dims(**VARIANTS["rotary"])
    params, images, step = random_params(dims), random_images(dims), 1e-5
    masks = jax.tree.map(lambda m: np.asarray(m, np.float64), full_masks(dims))
    mean = jax.jit(lambda p, qk: vit.forward(dims, p, images, masks._replace(qk=qk)).mean())
    by_weight, gradient = jax.jit(jax.grad(mean, (0, 1)))(params, masks.qk)
    assert not by_weight["block_0"]["rotary"].any()  # training leaves the numbers alone
    each = jax.jit(jax.grad(lambda m: vit.forward(dims, params, images, m).mean()))(per_sample(masks, len(images)))
    np.testing.assert_allclose(each.qk.sum(1), gradient, atol=1e-12)
    for at in ((0, 0, 1), (1, 1, 3)):
        e = np.zeros_like(masks.qk)
        e[at] = step
        true = float(mean(params, masks.qk + e) - mean(params, masks.qk - e)) / (2 * step)
        np.testing.assert_allclose(gradient[at], true, atol=1e-7)
    other = params | {"block_0": params["block_0"] | {"rotary": params["block_0"]["rotary"][:, ::-1]}}
    assert abs(float(mean(other, masks.qk) - mean(params, masks.qk))) > 1e-6


def test_the_table_knows_every_parameter_and_nothing_else():
    seen = set()
    for changes in VARIANTS.values():
        for path, leaf in flatten(vit.shapes(small_dims(**changes))):
            axes = axes_of(path, inside="pre_logits" in changes or changes.get("pool") == "map")
            first, _, rest = path.partition("/")
            pair = "rotary" in changes and first.startswith("block_") and rest.split("/")[0] in PAIRED
            assert len(axes) + pair == len(leaf.shape), path
            seen.add(f"block/{rest}" if first.startswith("block_") else path)
    assert seen == set(AXES)


def test_expand_marks_exactly_what_reshape_keeps():
    for changes in ({}, {"pre_logits": 4, "registers": 2, "dist_token": True}):
        dims = small_dims(**changes)
        params = random_params(dims)
        masks = random_masks(dims, np.random.default_rng(1))
        masks.head[0] = masks.mlp[1] = 0  # and two parts
        masks = check_masks(masks, dims)
        kept = expand(masks, params)
        _, compact = reshape(params, masks, dims)
        small = dict(flatten(compact))
        for (path, keep), (_, value) in zip(flatten(kept), flatten(params), strict=True):
            np.testing.assert_array_equal(value[keep > 0], small.pop(path, np.zeros(0)).ravel(), err_msg=path)
        assert not small and "block_0/norm1/scale" in dict(flatten(params))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: m._replace(mlp=m.mlp[:, :-1]), r"mlp has shape \(2, 11\), the model \(2, 12\)"),
        (lambda m: m._replace(embed=m.embed * 0.5), "other than 0 and 1"),
        (lambda m: m._replace(embed=m.embed * 0), "embed keeps no channel"),
        (lambda m: m._replace(qk=m.qk * np.array([[[1]], [[0]]])), "block 1 keeps heads, and no qk dim"),
        (lambda m: m._replace(v=m.v * np.array([[[0]], [[1]]])), "block 0 keeps heads, and no v dim"),
        (lambda m: m._replace(qk=m.qk * np.array([[1, 1, 1, 1], [1, 1, 1, 0]])), r"\[4, 3\] qk dims"),
    ],
)
def test_masks_that_leave_no_dense_model_are_refused(damage, words):
    dims = small_dims()
    with pytest.raises(UserError, match=words):
        reshape(random_params(dims), damage(full_masks(dims)), dims)


def test_padding_cannot_be_kept():
    dims = ViTDims.from_json(small_dims().to_json() | {"mlp": [12, 7]})
    masks = full_masks(dims)
    masks.mlp[1, 9] = 1
    with pytest.raises(UserError, match="padding"):
        reshape(random_params(dims), masks, dims)
