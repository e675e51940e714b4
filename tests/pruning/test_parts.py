"""Whole attention and mlp parts that go: what makes good for them, what they cost, and a model without them at work."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import random_params
from test_compensation import ANEW, KEEP, host, logits, model, sensitivities, walk

import nvit_jax as nvit
from nvit_jax.model.dims import count_macs
from nvit_jax.model.groups import flatten
from nvit_jax.model.masks import check_masks, full_masks, kept_dims
from nvit_jax.model.reshape import reshape
from nvit_jax.pruning import cross, obs, saliency
from nvit_jax.pruning.compensation import compensate, part_moments
from nvit_jax.pruning.leastsquares import POWERS

NONE = {"head": 0, "mlp": 0}  # floors


def any_part(kind, block):
    """What Policy.whole is with these floors."""
    return kind in NONE


def without(dims, *parts):
    """Masks without the parts ("head" or "mlp", block)."""
    masks = full_masks(dims)
    for kind, block in parts:
        getattr(masks, kind)[block] = 0
    return check_masks(masks, dims)


def test_of_a_part_that_goes_the_mean_stays():
    """The bias is the mean of what is missing to the dense stream, over tokens weighted in one of the known ways."""
    dims, params = model()
    steps, params = walk(dims), host(params)
    felt = sensitivities(steps, params)
    masks = without(dims, ("head", 0), ("mlp", 1))
    found = compensate(steps, params, params, masks, felt, ANEW, use_held=True)
    assert not found.params["block_0"]["proj"]["kernel"].any() and not found.params["block_1"]["fc2"]["kernel"].any()
    before = steps.begin(params)
    block = params["block_0"]
    after = steps.advance("attention", block, before)
    moments = part_moments(steps, block, full_masks(dims), 0, "attention", before, after)
    means = [(moments[0] + moments[1]).together(felt[0].shares(power)).y for power in POWERS]
    errors = [np.abs(found.params["block_0"]["proj"]["bias"] - mean).max() for mean in means]
    assert min(errors) < 1e-6 * max(1, np.abs(means).max())  # float32


@pytest.mark.parametrize("chosen", [KEEP, ANEW])
def test_parts_that_write_a_constant_cost_nothing(chosen):
    dims, params = model(layer_scale=True)
    params = host(params)
    for block, leaf in (("block_0", "v"), ("block_1", "fc1")):
        params[block][leaf]["kernel"][:] = 0
    masks = without(dims, ("head", 0), ("mlp", 1))
    steps = walk(dims, images=80)
    felt = sensitivities(steps, params)
    before = logits(dims, params, steps)
    found = compensate(steps, params, params, masks, felt, chosen, use_held=True)
    scale = np.abs(before).max()
    assert np.abs(logits(dims, params, steps, masks) - before).max() > 1e-2 * scale
    np.testing.assert_allclose(logits(dims, found.params, steps, found.masks), before, atol=1e-5 * scale)


def test_a_part_is_worth_what_its_removal_does():
    """With floors of 0 the scores of all its neurons, or heads, make what its real removal does to the outputs."""
    dims, params = model(heads=3, qk=4, v=4)
    steps, params = walk(dims, images=80), host(params)
    params["head"]["kernel"] *= 30
    params["block_1"]["fc2"]["kernel"][:] = 0
    felt = sensitivities(steps, params)
    usual = obs.score(steps, params, felt)
    found = obs.score(steps, params, felt, whole=any_part)
    real = {(c["block"], c["kind"]): c["divergence"] for c in found.cuts if c["width"] == 0 and c["kind"] != "head"}
    assert set(real) == {(block, kind) for block in (0, 1) for kind in ("v", "mlp")}
    for block in (0, 1):
        assert found.scores.head[block].sum() == pytest.approx(real[block, "v"], rel=1e-5)
        assert (np.argsort(found.scores.head[block]) == np.argsort(usual.scores.head[block])).all()
    assert found.scores.mlp[0].sum() == pytest.approx(real[0, "mlp"], rel=1e-5)
    assert found.scores.mlp[1].sum() < 0.1 * real[0, "mlp"]  # it writes nothing but its bias
    np.testing.assert_array_equal(found.scores.qk, usual.scores.qk)


@pytest.mark.parametrize("widths", [{"heads": (2, 0), "mlp": (0, 24)}, {"heads": (0, 0), "mlp": (24, 0)}])
def test_a_model_without_parts_is_scored_and_compensated(widths):
    """Also when no block has an attention at all."""
    dims = dataclasses.replace(model(heads=2, qk=4, v=4)[0], **widths)
    params = host(jax.tree.map(lambda p: (0.5 * p).astype(np.float32), random_params(dims)))
    steps = walk(dims)
    felt = sensitivities(steps, params)
    before, masks = logits(dims, params, steps), full_masks(dims)
    same = compensate(steps, params, params, host(masks), felt, ANEW, use_held=True)
    scale = max(np.abs(before).max(), 1)
    np.testing.assert_allclose(logits(dims, same.params, steps), before, atol=1e-5 * scale)
    scored = obs.score(steps, params, felt, whole=any_part)
    np.testing.assert_allclose(logits(dims, scored.params, steps), before, atol=1e-4 * scale)
    of = cross.candidates(dims, lambda kind, block: True, any_part)
    assert len(of.units) == sum(int(m.sum()) for m in masks) and (of.saving > 0).all()
    loss = lambda params, masks, batch: nvit.Model(dims, params).logits(params, batch["image"]).sum(-1)  # noqa: E731
    batch = {"image": steps.images.batches[0]["image"]}
    everything = [scored.scores, saliency.taylor(loss, params, masks, batch, align="shared")]
    everything.append(saliency.magnitude(None, params, masks))
    for scores in everything:
        for score, mask in zip(scores, masks, strict=True):
            assert np.isfinite(score).all() and not np.asarray(score)[mask == 0].any()
    masks.embed[:3], masks.mlp[:, 5:9] = 0, 0
    cut = compensate(steps, params, params, check_masks(masks, dims), felt, KEEP, use_held=False)
    small_of, small = reshape(cut.params, cut.masks, dims)
    np.testing.assert_allclose(
        logits(small_of, small, steps), logits(dims, cut.params, steps, cut.masks), atol=1e-4 * scale
    )


@pytest.mark.parametrize(
    ("heads", "whole", "expected"),
    [
        ([2.0, 1, 4], 10.0, [2, 1, 7]),
        ([2, 1, 4], 6, [2, 1, 3]),
        ([1, 1, 1], 2, [2 / 3] * 3),
        ([3], 1, [1]),
        ([3], 5, [5]),
    ],
)
def test_the_scores_of_heads_add_up_to_the_part(heads, whole, expected):
    np.testing.assert_allclose(obs._of_part(np.array(heads, float), float(whole)), expected, rtol=1e-9)


# ------------------------------------------------------------------------------------------- from the front


@pytest.fixture(scope="module")
def digits():
    return nvit.load_dataset("digits").split("train").read(slice(0, 160))


@pytest.fixture(scope="module")
def planted(digits_model):
    """Attention of block 0 and the mlp of block 1 write their biases and nothing else."""
    params = jax.tree.map(np.array, digits_model.params)
    params["block_0"]["proj"]["kernel"][:] = params["block_1"]["fc2"]["kernel"][:] = 0
    params["block_0"]["proj"]["bias"][:] = params["block_1"]["fc2"]["bias"][:] = np.linspace(-1, 1, 32)
    return dataclasses.replace(digits_model, params=params)


def ratio_without(model, *parts) -> float:
    """What its MACs are without these parts."""
    small = kept_dims(without(model.dims, *parts), model.dims)
    return count_macs(small) / count_macs(model.dims)


@pytest.mark.parametrize("options", [{}, {"criterion": "fisher", "compensate": False}])
def test_parts_without_use_go_first(options, planted, digits):
    useless = (("head", 0), ("mlp", 1))
    found = nvit.prune(
        planted, digits[0], macs=ratio_without(planted, *useless), floors=NONE, measure=None, progress=False, **options
    )
    assert (found.model.dims.heads, found.model.dims.mlp) == ((0, 2), (64, 0))
    expected = np.asarray(planted(digits[0]))
    np.testing.assert_allclose(found.model(digits[0]), expected, atol=1e-4 * np.abs(expected).max())  # float32


def test_a_target_that_takes_whole_parts(digits_model, digits):
    """Reached with floors of 0 alone."""
    options = {"measure": None, "progress": False}
    with pytest.raises(nvit.UserError, match="smallest reachable"):
        nvit.prune(digits_model, digits[0], macs=0.1, **options)
    found = nvit.prune(digits_model, digits[0], macs=0.1, floors=NONE, **options)
    assert 0 in (*found.model.dims.heads, *found.model.dims.mlp) and found.record["macs_ratio"] <= 0.1
    np.testing.assert_allclose(found.masked(digits[0]), found.model(digits[0]), atol=2e-4)


def test_a_model_without_parts_at_work(digits_model, digits, tmp_path):
    """It is saved, exported, read, described, trained and pruned again."""
    images, labels = (x[:64] for x in digits)
    masked = dataclasses.replace(digits_model, masks=without(digits_model.dims, ("head", 0), ("mlp", 1)))
    model = masked.compact()
    for kept in (model, masked):
        kept.save(tmp_path / "model")
        again = nvit.load(tmp_path / "model")
        assert again.dims == kept.dims
        np.testing.assert_array_equal(again(images), kept(images))
    nvit.export(model, tmp_path / "out", ("safetensors",), say=lambda line: None)
    again = nvit.load(tmp_path / "out" / "safetensors" / "model.safetensors")
    ours, theirs = dict(flatten(model.params)), dict(flatten(again.params))
    assert again.dims == model.dims and ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours)
    assert "0" in model.summary().splitlines()[3].split()[1:5]
    trained = nvit.finetune(model, (images, labels), epochs=1, progress=False)
    assert trained.dims == model.dims and np.isfinite(np.asarray(trained(images))).all()
    moved = trained.params["block_0"]["proj"]["bias"] - np.asarray(model.params["block_0"]["proj"]["bias"])
    assert np.abs(moved).max() > 0
    options = {"criterion": "magnitude", "compensate": False, "floors": NONE, "measure": None, "progress": False}
    second = nvit.prune(model, images, macs=0.4, **options)
    np.testing.assert_allclose(second.masked(images), second.model(images), atol=2e-4)
