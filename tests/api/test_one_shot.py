"""prune(method="one_shot") as it is by default: scores that know of compensation, compensation, its check."""

import jax
import numpy as np
import pytest
import torch

import nvit_jax as nvit
from nvit_jax.formats import torch_vit
from nvit_jax.model import vit
from nvit_jax.model.groups import flatten
from nvit_jax.model.preprocessing import normalise
from nvit_jax.pruning import cross, one_shot, statistics
from nvit_jax.pruning.compensation import Compensated
from nvit_jax.training.monitor import Monitor


@pytest.fixture(scope="module")
def digits():
    return nvit.load_dataset("digits").split("train").read(slice(0, 160))


class Heard(Monitor):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def warn(self, text: str) -> None:
        self.lines.append(text)


def prune(*arguments, **options):
    return nvit.prune(*arguments, **{"measure": None, "progress": False} | options)


def divergence(a: nvit.Model, b: nvit.Model, images) -> float:
    p, q = (np.asarray(m(images), np.float64) for m in (a, b))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_the_default_keeps_more_than_the_cut_alone(digits_model, digits):
    """On images that were not calibrated on; and what the record says is what was asked for."""
    images = nvit.load_dataset("digits").split("val").read(slice(0, 160))[0]
    ours = prune(digits_model, digits[0], macs=0.6)
    cut = prune(digits_model, digits[0], macs=0.6, criterion="fisher", compensate=False)
    r = ours.record
    assert r["criterion"] == "obs" and r["compensated"] and r["macs_ratio"] <= 0.6
    assert r["divergence_compensated"] < r["divergence_cut"]
    assert r["images_fitted"] + r["images_held_back"] == 160
    assert divergence(digits_model, ours.model, images) < divergence(digits_model, cut.model, images)


def test_masked_is_reshaped_and_a_model_may_be_pruned_twice(digits_model, digits):
    images = digits[0]
    first = prune(digits_model, images, macs=0.8, kinds=("head", "qk", "v", "mlp"))
    second = prune(first.model, images, macs=0.8)
    for found in (first, second):
        # Sums of at most 200 float32 terms in another order, of logits of about 10.
        np.testing.assert_allclose(found.masked(images), found.model(images), atol=2e-4)
    assert second.record["macs_ratio"] <= 0.8 and second.record["compensated"]


@pytest.fixture(scope="module")
def rotary_model(digits_model):
    """With rotary positions and a norm of queries and keys."""
    values = {"image": 8, "patch": 4, "channels": 1, "classes": 10, "embed": 32, "depth": 2, "heads": 2, "mlp": 64}
    dims = nvit.ViTDims.uniform(**values, rotary=16, v=16, qk_norm_count=32, positions="none")
    return nvit.Model(dims, vit.init(dims, jax.random.key(0), std=0.1), info=digits_model.info)


def test_rotary_pairs_are_selected(rotary_model, digits):
    """They have no other basis. Each keeps its number, and what is masked is what is left."""
    found = prune(rotary_model, digits[0], macs=0.7, kinds=("qk", "v"))
    assert found.record["compensated"] and found.record["macs_ratio"] <= 0.7 and min(found.model.dims.qk) < 16
    np.testing.assert_allclose(found.masked(digits[0]), found.model(digits[0]), atol=2e-4)
    for block in (b for name, b in found.model.params.items() if name.startswith("block_") and "rotary" in b):
        assert all(len(set(row)) == len(row) and set(row) <= set(range(16)) for row in np.asarray(block["rotary"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary": 16, "v": 16, "rotary_grid": 2, "gated": True, "activation": "silu"}
        | {"proj_norm_count": 32, "fc2_norm_count": 64},
        {"relative": True, "positions": "none", "pool": "mean", "norm_after_pool": True},
    ],
    ids=["eva02", "beit"],
)
def test_norms_and_positions_inside_of_the_parts(changes, digits_model, digits, tmp_path):
    """What is left is compensated behind norms that see it alone, goes out, and is what PyTorch computes."""
    values = {"image": 8, "patch": 4, "channels": 1, "classes": 10, "embed": 32, "depth": 2, "heads": 2, "mlp": 64}
    dims = nvit.ViTDims.uniform(**values | changes)
    model = nvit.Model(dims, vit.init(dims, jax.random.key(0), std=0.1, position_std=0.5), info=digits_model.info)
    found = prune(model, digits[0], macs=0.6)
    assert found.record["compensated"] and found.record["divergence_compensated"] < found.record["divergence_cut"]
    np.testing.assert_allclose(found.masked(digits[0]), found.model(digits[0]), atol=2e-4)
    small = found.model.dims
    assert sum(small.mlp) < 128 and (small.proj_norm_count, small.fc2_norm_count) == (
        dims.proj_norm_count,
        dims.fc2_norm_count,
    )
    nvit.export(found.model, tmp_path, ("safetensors",), say=lambda line: None)
    twin = torch_vit.load(tmp_path / "safetensors" / "model.safetensors")
    pixels = np.asarray(normalise(digits[0], found.model.preprocessing), np.float32)
    with torch.inference_mode():
        expected = twin(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(found.model(digits[0]), expected, atol=2e-4)


def test_compensated_models_go_out_and_come_back(rotary_model, digits, tmp_path):
    found = prune(rotary_model, digits[0], macs=0.7).model
    nvit.export(found, tmp_path / "out", ("safetensors",), say=lambda line: None)
    again = nvit.load(tmp_path / "out" / "safetensors" / "model.safetensors")
    ours, theirs = dict(flatten(found.params)), dict(flatten(again.params))
    assert found.dims == again.dims
    for path, leaf in ours.items():
        np.testing.assert_array_equal(theirs[path], leaf, err_msg=str(path))


def test_snapshots_are_what_each_size_gives_alone(digits_model, digits, tmp_path):
    """Also of a call that finds the pruning finished."""
    alone = prune(digits_model, digits[0], macs=0.8)
    for _ in range(2):
        found = prune(digits_model, digits[0], macs=0.6, snapshots=(0.8,), directory=tmp_path / "out")
        assert found.record["macs_ratio"] <= 0.6
        snapshot = found.snapshots[0.8]
        for ours, theirs in zip(snapshot.masks, alone.masks, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for path, leaf in flatten(snapshot.params):
            np.testing.assert_array_equal(leaf, dict(flatten(alone.masked.params))[path], err_msg=str(path))


def test_compensation_goes_with_every_criterion(digits_model, digits):
    found = prune(digits_model, digits, macs=0.6, criterion="fisher", compensate=True)
    assert found.record["compensated"] and found.record["divergence_compensated"] < found.record["divergence_cut"]
    np.testing.assert_allclose(found.masked(digits[0]), found.model(digits[0]), atol=2e-4)


@pytest.mark.parametrize("kinds", [("embed",), ("embed", "qk")])
def test_removed_embed_channels_are_made_good_for(kinds, digits_model, digits):
    """By every reader of the stream; the check sees them, too."""
    images = nvit.load_dataset("digits").split("val").read(slice(0, 160))[0]
    choices = {"macs": 0.7, "kinds": kinds, "criterion": "magnitude"}
    found, cut = (prune(digits_model, digits[0], compensate=c, **choices) for c in (True, False))
    r = found.record
    assert found.model.dims.embed < digits_model.dims.embed and r["compensated"]
    # The held-back images and others are alike: about 32 and 160 of them.
    assert r["divergence_cut"] == pytest.approx(divergence(digits_model, cut.model, images), rel=0.5)
    assert divergence(digits_model, found.model, images) < 0.8 * divergence(digits_model, cut.model, images)
    np.testing.assert_allclose(found.masked(digits[0]), found.model(digits[0]), atol=2e-4)


def test_a_finished_pruning_remembers_what_compensation_found(digits_model, digits, tmp_path):
    first, again = (prune(digits_model, digits[0], macs=0.7, directory=tmp_path / "out") for _ in range(2))
    assert first.record["compensated"]
    for key in one_shot.CHECKED:
        assert again.record.get(key) == first.record.get(key)


@pytest.mark.parametrize("where", ["sensitivities", "score", "compensate"])
def test_killed_inside_calibration_it_ends_as_undisturbed(where, digits_model, digits, tmp_path, monkeypatch):
    """The second run begins the calibration again, and finds the same, bit for bit."""

    class Killed(BaseException):
        pass

    def kill(*arguments, **options):
        raise Killed

    undisturbed = prune(digits_model, digits[0], macs=0.7)
    with monkeypatch.context() as patched:
        home = {"sensitivities": statistics.Walk, "score": one_shot.obs, "compensate": one_shot}[where]
        patched.setattr(home, where, kill)
        with pytest.raises(Killed):
            prune(digits_model, digits[0], macs=0.7, directory=tmp_path / "out")
    found = prune(digits_model, digits[0], macs=0.7, directory=tmp_path / "out")
    assert found.model.dims == undisturbed.model.dims
    for (path, ours), (_, theirs) in zip(flatten(found.model.params), flatten(undisturbed.model.params), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=str(path))


def test_sets_go_through_the_front(digits_model, digits):
    """Only what may go has scores, and the record has the weight; with compensation and without, labels or none."""
    options = {"macs": 0.85, "criterion": "fisher_set", "kinds": ("mlp", "v"), "protect": (0,), "floors": {"v": 1}}
    cut = prune(digits_model, digits[0], compensate=False, **options)
    ours = prune(digits_model, digits[0], **options)
    assert ours.record["compensated"] and not cut.record["compensated"]
    assert cut.record["cross_weight"] == ours.record["cross_weight"] and cut.record["cross_weight"] in cross.WEIGHTS
    assert not any(np.asarray(s).any() for s in (cut.scores.embed, cut.scores.head, cut.scores.qk, cut.scores.mlp[0]))
    assert (cut.scores.mlp[1] > 0).all() and cut.record["removed"]["mlp"][0] == 0 < cut.record["removed"]["mlp"][1]
    np.testing.assert_array_equal(cut.masks.mlp, ours.masks.mlp)
    np.testing.assert_allclose(cut.masked(digits[0]), cut.model(digits[0]), atol=2e-4)
    labels = nvit.Scoring(criterion="fisher_set", loss="labels")
    scores = nvit.saliency(digits_model, digits, criterion=labels, progress=False)
    assert all((np.asarray(s) > 0).all() for s in scores)


def test_what_is_worse_is_left_out(digits_model, digits, monkeypatch):
    """The guard: a compensation that does harm is reported, and the model that is only cut stays."""
    real = one_shot.compensate

    def harmful(*arguments, **options):
        found = real(*arguments, **options)
        return Compensated(found.params, found.masks, [-x for x in found.logits])

    monkeypatch.setattr(one_shot, "compensate", harmful)
    heard = Heard()
    found = nvit.prune(
        digits_model, digits[0], macs=0.7, criterion="magnitude", compensate=True, progress=heard, measure=None
    )
    plain = prune(digits_model, digits[0], macs=0.7, criterion="magnitude", compensate=False)
    assert not found.record["compensated"]
    assert any("compensation is left out" in line for line in heard.lines)
    np.testing.assert_allclose(found.model(digits[0]), plain.model(digits[0]), atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_images(count, digits_model, digits):
    heard = Heard()
    found = nvit.prune(digits_model, digits[0][:count], macs=0.7, progress=heard, measure=None)
    assert np.isfinite(np.asarray(found.model(digits[0]))).all()
    if count == 1:
        assert any("cannot be checked" in line for line in heard.lines) and not found.record["compensated"]


def test_what_does_not_go_together_is_said(digits_model, digits):
    for options, text in (
        ({"method": "gradual", "criterion": "obs"}, 'criterion="obs" goes with method="one_shot"'),
        ({"method": "iterative", "criterion": "fisher_set"}, 'criterion="fisher_set" goes with method="one_shot"'),
        ({"method": "gradual", "compensate": True}, 'compensate=True goes with method="one_shot"'),
        ({"kinds": ("embed", "mlp")}, 'kinds: "obs" has no scores for embed'),
        ({"method": "gradual", "snapshots": (0.8,)}, 'snapshots go with method="one_shot"'),
        ({"params": 0.8, "snapshots": (0.8,)}, "snapshots need one limit, macs and params are given"),
        ({"snapshots": (1.5,)}, "must be ratios between 0 and 1"),
    ):
        with pytest.raises(nvit.UserError, match=text):
            prune(digits_model, digits, macs=0.7, **options)
    with pytest.raises(nvit.UserError, match='"obs" scores the units'):
        nvit.saliency(digits_model, digits, criterion="obs", progress=False)
