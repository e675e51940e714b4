"""RMSNorm instead of LayerNorm and a rotated stream are the same function; everything after them works as before."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import VARIANTS, random_images, random_masks, random_params, run_forward, small_dims

from nvit_jax.errors import UserError
from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims, count_params, preset
from nvit_jax.model.groups import flatten
from nvit_jax.model.masks import full_masks
from nvit_jax.model.reshape import reshape
from nvit_jax.parallel import Parallel
from nvit_jax.pruning import rotation
from nvit_jax.pruning.statistics import Images, Walk, parts

# The variants with LayerNorm, one whose blocks differ in every width, and one with everything at once.
RAGGED = {"heads": (2, 1), "qk": (3, 4), "v": (2, 5), "mlp": (12, 7)}
KEEP_LAYER_NORM = ("rms", "clip", "max", "avgmax")
CASES = {name: small_dims(**changes) for name, changes in VARIANTS.items() if name not in KEEP_LAYER_NORM}
CASES["ragged"] = ViTDims.from_json(small_dims(dist_token=True, norm_eps=0.1).to_json() | RAGGED)
CASES["everything"] = small_dims(
    dist_token=True, registers=2, layer_scale=True, qkv_bias=False, pre_logits=7, channels=3, depth=3
)


def orthogonal(size, seed=0):
    return np.linalg.qr(np.random.default_rng([seed, 2]).standard_normal((size, size)))[0]


def converted(dims, seed=0, *, turned=True):
    """(parameters with LayerNorm, dims and parameters with RMSNorm)."""
    params = random_params(dims, seed)
    rms, made = rotation.to_rmsnorm(dims, params)
    return params, rms, rotation.rotate(rms, made, orthogonal(dims.embed, seed)) if turned else made


def same(ours, theirs, tolerance=1e-10):
    """To the project's tolerance of an equality in float64."""
    assert np.abs(ours - theirs).max() <= tolerance * max(1.0, np.abs(theirs).max())


def forward(dims):
    """One compiled program for all parameters and masks of these dims."""
    run = jax.jit(lambda params, images, masks: vit.forward(dims, params, images, masks))
    return lambda *arguments: np.asarray(run(*arguments))


@pytest.mark.parametrize("name", CASES)
def test_the_function_stays_and_masked_is_reshaped(name, x64):
    """Converted, rotated, masked, cut."""
    dims, images = CASES[name], random_images(CASES[name])
    params, rms, made = converted(dims, turned=False)
    assert rms.norm == "rms" and rms.norm_count == dims.embed and not rms.layer_scale
    assert {path: x.shape for path, x in flatten(made)} == {path: x.shape for path, x in flatten(random_params(rms))}
    assert sum(x.size for x in jax.tree.leaves(made)) == count_params(rms)
    before, run, all_ones = run_forward(dims, params, images), forward(rms), full_masks(rms)
    assert before.dtype == np.float64 and np.ptp(before) > 0.1
    turned = rotation.rotate(rms, made, orthogonal(dims.embed))
    same(run(made, images, all_ones), before)
    same(run(turned, images, all_ones), before)
    masks = random_masks(rms, np.random.default_rng(1))
    small, cut = reshape(turned, masks, rms)
    assert small.norm_count == dims.embed > small.embed == masks.embed.sum()
    same(run_forward(small, cut, images), run(turned, images, masks))


def test_a_model_may_be_pruned_twice(x64):
    """And is scaled by its first width: what reshape keeps goes through a second reshape."""
    _, dims, params = converted(CASES["ragged"])
    images = random_images(dims)
    for seed in (3, 4):
        masks = random_masks(dims, np.random.default_rng(seed), ("embed", "v", "mlp") if seed == 3 else ("embed",))
        masked = run_forward(dims, params, images, masks)
        dims, params = reshape(params, masks, dims)
        assert dims.norm_count == 8
        same(run_forward(dims, params, images), masked)


def test_a_rotation_moves_every_channel(x64):
    _, rms, made = converted(CASES["everything"], turned=False)
    turned = dict(flatten(rotation.rotate(rms, made, orthogonal(rms.embed))))
    stay = {"pre_logits/bias", "head/kernel", "head/bias", "head_dist/kernel", "head_dist/bias"}
    for path, leaf in flatten(made):
        inside = path.endswith(("q/bias", "k/bias", "v/bias", "fc1/bias"))
        assert (path in stay or inside) == np.array_equal(turned[path], leaf), path


def test_what_is_left_is_scaled_as_it_was(x64):
    """The sum of squares is over the kept channels, and its divisor that of the whole model: a channel of 0 is free."""
    dims = small_dims()
    params, rms, made = converted(dims, turned=False)
    basis = rotation.principal(np.eye(8) - np.full((8, 8), 1 / 8))  # the mean of the channels, 0 by now, is the last
    turned, images = rotation.rotate(rms, made, basis), random_images(dims)
    masks = full_masks(rms)
    masks.embed[-1] = 0
    small, cut = reshape(turned, masks, rms)
    same(run_forward(small, cut, images), run_forward(dims, params, images))
    other = dataclasses.replace(small, norm_count=small.embed + 2)
    assert np.abs(run_forward(other, cut, images) - run_forward(dims, params, images)).max() > 1e-3


def test_an_embed_gate_has_the_gradient_of_the_true_loss(x64):
    """RMSNorm has no statistics that a gate could hide from: by central differences, whose error is about 1e-9."""
    _, dims, params = converted(small_dims())
    images, step = random_images(dims), 1e-5
    masks = jax.tree.map(lambda m: np.asarray(m, np.float64), full_masks(dims))
    mean = jax.jit(lambda embed: vit.forward(dims, params, images, masks._replace(embed=embed)).mean())
    true = [float(mean(1 + step * e) - mean(1 - step * e)) / (2 * step) for e in np.eye(8)]
    np.testing.assert_allclose(jax.jit(jax.grad(mean))(masks.embed), true, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d, p: rotation.to_rmsnorm(dataclasses.replace(d, classes=0), p), "without a classifier"),
        (lambda d, p: rotation.to_rmsnorm(dataclasses.replace(d, classes=0, projection=3), p), "nothing with a bias"),
        (lambda d, p: rotation.to_rmsnorm(dataclasses.replace(d, pre_norm=True), p), r"\(pre_norm, as CLIP has it\)"),
        (lambda d, p: rotation.to_rmsnorm(dataclasses.replace(d, pool="max"), p), 'pool="max" keeps LayerNorm'),
        (lambda d, p: rotation.rotate(d, p, np.eye(8)), "LayerNorm cannot be rotated"),
        (lambda d, p: rotation.rotate(*rotation.to_rmsnorm(d, p), np.eye(7)), "8 x 8"),
        (lambda d, p: rotation.rotate(*rotation.to_rmsnorm(d, p), 1.1 * np.eye(8)), "orthogonal"),
        (lambda d, p: dataclasses.replace(d, norm="rms"), "norm_count"),
        (lambda d, p: dataclasses.replace(d, norm="rms", norm_count=7), "less than embed 8"),
        (lambda d, p: dataclasses.replace(d, norm_count=8), 'goes with norm="rms"'),
        (lambda d, p: dataclasses.replace(d, norm="batch"), "layer, rms"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, words):
    dims = small_dims()
    with pytest.raises(UserError, match=words) as caught:
        call(dims, random_params(dims))
    assert "\n" not in str(caught.value)


def test_a_model_with_rmsnorm_can_be_made_from_nothing():
    """Its divisor is its own width, whatever makes the dims; JSON has it; there are weights to train."""
    for dims in (small_dims(norm="rms"), preset("deit_tiny", norm="rms"), preset("revit_t", norm="rms")):
        assert dims.norm_count == dims.embed and ViTDims.from_json(dims.to_json()) == dims
    dims = small_dims(norm="rms")
    assert sum(x.size for x in jax.tree.leaves(vit.init(dims, jax.random.key(0)))) == count_params(dims)


def test_the_moments_are_their_definition_on_any_number_of_devices():
    _, dims, params = converted(small_dims(dist_token=True))
    params = jax.tree.map(np.float32, params)
    images = random_images(dims, 8, dtype=np.float32)
    x, expected = vit.stem(dims, params, images), np.zeros((8, 8))
    for block, name in parts(dims):
        x, _ = vit.part(dims, name, params[f"block_{block}"], x)
        y = np.asarray(x, np.float64) / np.sqrt(np.square(x, dtype=np.float64).mean(-1, keepdims=True))
        expected += np.einsum("bni,bnj->ij", y, y) / 8
    for devices in (1, 4):
        parallel = Parallel.create("jit", tuple(jax.devices()[:devices]))
        batches = [parallel.shard({"image": images[i : i + 4]}) for i in (0, 4)]
        walk = Walk(dims, Images(batches, [False, True], parallel), lambda image: image)
        # Sums of 48 products in float32.
        np.testing.assert_allclose(walk.stream_moments(params), expected, atol=1e-5 * np.abs(expected).max())


def test_principal_directions_are_ordered_and_unique():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 6)) * [1, 3, 0.1, 2, 0, 5]
    basis = rotation.principal(x.T @ x)
    power = np.square(x @ basis).sum(0)
    assert (np.diff(power) <= 1e-9).all()
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-12)
    np.testing.assert_array_equal(rotation.principal(np.diag([1.0, 2.0])), [[0, 1], [1, 0]])
