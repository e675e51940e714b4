"""to_rmsnorm and rotate: the same function, and what may be done with a model afterwards."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import random_params, small_dims

import nvit_jax as nvit
from nvit_jax.errors import UserError
from nvit_jax.model.groups import flatten
from nvit_jax.model.masks import full_masks


@pytest.fixture(scope="module")
def digits():
    return nvit.load_dataset("digits").split("train").read(slice(0, 80))


@pytest.fixture(scope="module")
def turned(digits_model, digits):
    return nvit.rotate(digits_model, digits[0], progress=False)


def same(ours, theirs):
    """float32 sums in another order; ten times the project's tolerance, since the weights are rounded anew, too."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * max(1.0, np.abs(theirs).max()))


def without(model, channels):
    """The small model without these embed channels."""
    masks = full_masks(model.dims)
    masks.embed[channels] = 0
    return nvit.reshape(model, masks)


def test_the_function_stays_and_the_last_channels_carry_little(digits_model, turned, digits):
    assert turned.dims.norm == "rms" and turned.info == digits_model.info
    before = digits_model(digits[0])
    same(turned(digits[0]), before)
    same(without(turned, [31])(digits[0]), before)  # the mean over the channels is gone from the stream
    wrong = [np.abs(np.asarray(without(turned, c)(digits[0]) - before)).mean() for c in (slice(24, 32), slice(0, 8))]
    assert 4 * wrong[0] < wrong[1]


def test_a_model_with_rmsnorm_is_itself(digits_model, turned):
    assert nvit.to_rmsnorm(turned) is turned
    sparse = dataclasses.replace(digits_model, info=digits_model.info | {"sparsity": "2:4"})
    assert "sparsity" not in nvit.to_rmsnorm(sparse).info  # its matrices are dense now


def test_a_masked_model_is_made_compact_first(digits_model, digits):
    masks = full_masks(digits_model.dims)
    masks.embed[::3] = 0
    masked = dataclasses.replace(digits_model, masks=masks)
    found = nvit.to_rmsnorm(masked)
    assert found.masks is None and found.dims.norm_count == found.dims.embed == masks.embed.sum()
    same(found(digits[0]), masked(digits[0]))


@pytest.mark.parametrize(
    "options",
    [{"macs": 0.6}, {"macs": 0.6, "criterion": "fisher", "kinds": ("embed", "head", "qk", "v", "mlp")}],
    ids=["obs", "embed channels as well"],
)
def test_pruning_compensates_and_masked_is_reshaped(turned, digits, options):
    found = nvit.prune(turned, digits[0], measure=None, progress=False, **options)
    r = found.record
    assert r["macs_ratio"] <= 0.6 and r["divergence_compensated"] < r["divergence_cut"]
    assert found.model.dims.norm_count == 32 and (found.model.dims.embed < 32) == ("kinds" in options)
    same(found.model(digits[0]), found.masked(digits[0]))


def test_it_trains_and_goes_out_and_comes_back(turned, digits, tmp_path):
    small = without(turned, slice(24, 32))
    trained = nvit.finetune(small, digits, teacher=turned, epochs=1, batch=40, progress=False)
    assert trained.dims == small.dims
    trained.save(tmp_path / "model")
    nvit.export(trained, tmp_path / "out", ("safetensors",), say=lambda line: None)
    for again in (nvit.load(tmp_path / "model"), nvit.load(tmp_path / "out" / "safetensors" / "model.safetensors")):
        assert again.dims == trained.dims
        theirs = dict(flatten(again.params))
        for path, leaf in flatten(trained.params):
            np.testing.assert_array_equal(theirs[path], leaf, err_msg=str(path))


def test_without_a_classifier_it_is_refused(digits):
    dims = small_dims(classes=0)
    model = nvit.Model(dims, jax.tree.map(np.float32, random_params(dims)))
    for call in (nvit.to_rmsnorm, lambda m: nvit.rotate(m, digits[0], progress=False)):
        with pytest.raises(UserError, match="without a classifier"):
            call(model)
