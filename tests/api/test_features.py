"""Models without a classifier: scored, pruned, trained and evaluated by their features, with images alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import PREPROCESSING, ROOT, call, random_images, random_params, read, run_forward, small_dims
from PIL import Image
from safetensors.numpy import save_file

import nvit_jax as nvit
from nvit_jax.errors import UserError
from nvit_jax.formats import interchange
from nvit_jax.formats.card import check_results, model_card
from nvit_jax.model import vit
from nvit_jax.model.directory import load_model
from nvit_jax.model.groups import flatten
from nvit_jax.model.masks import full_masks
from nvit_jax.pruning import saliency
from nvit_jax.training.losses import FEATURES, draw_directions, feature_distance
from nvit_jax.training.similarity import Features, neighbours_tell

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def digits():
    return nvit.load_dataset("digits")


@pytest.fixture(scope="module")
def images(digits):
    """Of the train split, without labels."""
    return digits.split("train").read(slice(0, 160))[0]


@pytest.fixture(scope="module")
def headless(digits_model):
    dims, params = vit.without_classifier(digits_model.dims, digits_model.params)
    return nvit.Model(dims, params, info=digits_model.info)


def prune(*arguments, **options):
    return nvit.prune(*arguments, **{"measure": None} | QUIET | options)


# ------------------------------------------------------------------------------------------------- the loss


def test_the_distance_is_the_relative_squared_error_and_its_hessian_is_what_directions_draw(x64):
    theirs = np.random.default_rng(0).standard_normal((2, 2, 3)) + 1
    ours = theirs + 0.1 * np.random.default_rng(1).standard_normal((2, 2, 3))
    expected = [
        np.mean([((o - t) ** 2).sum() / (t**2).sum() for o, t in zip(*pair, strict=True)])
        for pair in zip(ours, theirs, strict=True)
    ]
    np.testing.assert_allclose(feature_distance(theirs, ours), expected, rtol=1e-12)
    assert np.all(np.asarray(jax.grad(lambda f: feature_distance(theirs, f).sum())(theirs)) == 0)
    one = theirs[:1]
    hessian = jax.hessian(lambda f: feature_distance(one, f.reshape(one.shape)).sum())(one.reshape(-1))
    count = 10_000
    draws = draw_directions(np.repeat(one, count, 0), jax.random.key(0), np.arange(count))
    found = np.einsum("bi,bj->ij", *[np.asarray(draws).reshape(count, -1)] * 2) / count
    # The standard deviation of an entry is at most sqrt(2 / count) = 1.4 % of the largest.
    np.testing.assert_allclose(found, hessian, atol=0.07 * float(np.max(hessian)))


def test_random_projections_estimate_the_gauss_newton_diagonal(x64):
    """J' H J, from the features' Jacobian J in the gates, is the mean of fisher over the draws."""
    dims = small_dims(classes=0)
    params, image = random_params(dims), random_images(dims, 1)
    masks = jax.tree.map(np.float64, full_masks(dims))
    theirs = run_forward(dims, params, image)
    jacobian = jax.jit(jax.jacrev(lambda gates: vit.features(dims, params, image, gates)))(masks)
    exact = [2 * (np.asarray(j) ** 2).sum((0, 1, 2)) / float((theirs**2).sum()) for j in jacobian]

    def projected(params, masks, batch):
        return (batch["direction"] * vit.features(dims, params, batch["image"], masks)).sum((1, 2))

    count = 1000
    batch = {"image": np.repeat(image, count, 0), "index": np.arange(count)}
    batch["direction"] = draw_directions(np.repeat(theirs, count, 0), jax.random.key(1), batch["index"])
    found = jax.jit(functools.partial(saliency.fisher, projected))(params, masks, batch)
    for ours, wanted in zip(found, exact, strict=True):
        # One direction: the mean of squares of a normal value has the standard deviation sqrt(2 / count) = 4.5 %.
        np.testing.assert_allclose(ours, wanted, rtol=0.22, atol=1e-12)


# -------------------------------------------------------------------------------------------------- pruning


def test_one_shot_with_images_alone(headless, images):
    found = prune(headless, images, macs=0.6)
    r = found.record
    assert r["criterion"] == "obs" and r["compensated"] and r["macs_ratio"] <= 0.6
    assert r["divergence_compensated"] < r["divergence_cut"]
    assert found.model.dims.embed == 32 and found.model.dims.classes == 0
    # Sums of at most 200 float32 terms in another order, of features of about 2.
    np.testing.assert_allclose(found.masked(images), found.model(images), atol=1e-4)
    cut = prune(headless, images, macs=0.6, criterion="magnitude", compensate=False)
    assert cut.model.dims.embed == 32  # of all kinds but embed
    ours, theirs = (nvit.evaluate(m.model, images, reference=headless, **QUIET) for m in (found, cut))
    assert set(ours) == {"cosine", "error", "loss", "images"} and ours["images"] == 160
    assert ours["cosine"] > theirs["cosine"] and ours["error"] < theirs["error"]


def test_finetuning_learns_the_features_without_labels(headless, images, digits):
    masks = full_masks(headless.dims)
    masks.mlp[:, ::2] = 0
    small = nvit.reshape(headless, masks)
    options = {"batch": 32, "learning_rate": 1e-3, "evaluate_on": digits.split("val"), "keep": "best"}
    trained = nvit.finetune(small, images, teacher=headless, epochs=8, evaluate_every=20, **options, **QUIET)
    before, after = (nvit.evaluate(m, digits, reference=headless, **QUIET) for m in (small, trained))
    assert after["loss"] < 0.8 * before["loss"] and after["cosine"] > before["cosine"]
    assert trained.info["training"]["val_cosine"] == pytest.approx(after["cosine"], abs=0.01)


def test_a_classifier_can_be_scored_by_its_features(digits_model, headless, images):
    """The same scores as without the classifier, which has no part in them."""
    by = nvit.Scoring(criterion="fisher", loss="features", batch=32)
    ours, theirs = (nvit.saliency(m, images, criterion=by, images=64, **QUIET) for m in (digits_model, headless))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)
    assert ours.mlp.min() >= 0 and ours.mlp.max() > 0
    found = prune(digits_model, images, macs=0.7, criterion=nvit.Scoring(criterion="obs", loss="features"))
    assert found.model.dims.classes == 10 and found.record["macs_ratio"] <= 0.7


# ----------------------------------------------------------------------------------------------- evaluation


def slow_neighbours(ours, labels, others, their_labels, k):
    """Image by image, as the docstring says it."""
    right = 0
    for number, feature in enumerate(ours):
        cosines = others @ feature / np.linalg.norm(others, axis=1) / np.linalg.norm(feature)
        if others is ours:
            cosines[number] = -np.inf
        votes: dict[int, float] = {}
        for place in np.argsort(-cosines)[: min(k, len(others) - (others is ours))]:
            votes[their_labels[place]] = votes.get(their_labels[place], 0) + np.exp(cosines[place] / 0.07)
        right += max(sorted(votes), key=votes.__getitem__) == labels[number]
    return right / len(ours)


@pytest.mark.parametrize("k", [1, 3, 20, 1000])
def test_nearest_neighbours(k):
    rng = np.random.default_rng(k)
    labels, more = rng.integers(0, 4, 300) * 7, rng.integers(0, 4, 50) * 7
    centres = rng.standard_normal((30, 6))
    queries, keys = (centres[y] + rng.standard_normal((len(y), 6)) for y in (labels, more))
    one, other = Features(queries, None, None, labels), Features(keys, None, None, more)
    assert neighbours_tell(one, None, k) == slow_neighbours(queries, labels, queries, labels, k)
    assert neighbours_tell(one, other, k) == slow_neighbours(queries, labels, keys, more, k)


def test_neighbours_tell_nothing_where_no_class_has_two_images():
    features = np.random.default_rng(0).standard_normal((4, 3))
    alone = Features(features, None, None, np.arange(4))
    assert neighbours_tell(alone, None, 20) is None
    assert neighbours_tell(alone, alone._replace(labels=np.arange(4, 8)), 20) is None
    assert neighbours_tell(alone, alone, 1) == 1.0  # each is its own neighbour in a database
    assert neighbours_tell(alone._replace(labels=np.array([0, 0, 1, 2])), None, 1) is not None


def test_evaluation_is_what_numpy_finds(headless, digits):
    """For any batch size, that of a masked model, and without labels."""
    masks = full_masks(headless.dims)
    masks.mlp[:, ::2] = 0
    masked = nvit.Model(headless.dims, headless.params, masks, headless.info)
    some, labels = digits.split("val").read(slice(0, 50))
    ours, theirs = (np.asarray(m(some), np.float64) for m in (masked, headless))
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    expected = {
        "cosine": ((ours * theirs).sum(1) / norms).mean(),
        "error": ((ours - theirs) ** 2).sum() / ((theirs - theirs.mean(0)) ** 2).sum(),
        "loss": (((ours - theirs) ** 2).sum(1) / (theirs**2).sum(1)).mean(),
        "images": 50,
    }
    for batch in (16, 50):
        found = nvit.evaluate(masked, some, reference=headless, batch=batch, **QUIET)
        assert found == pytest.approx(expected, rel=1e-4) and "knn" not in found
    knn = nvit.evaluate(masked, [(some[:20], labels[:20]), (some[20:], labels[20:])], neighbours=5, **QUIET)
    assert knn == {"knn": slow_neighbours(ours, labels, ours, labels, 5), "images": 50}
    itself = nvit.evaluate(headless, some, reference=headless, **QUIET)
    assert (itself["cosine"], itself["error"], itself["loss"]) == (1.0, 0.0, 0.0)
    one = nvit.evaluate(masked, some[:1], reference=headless, **QUIET)
    assert one["error"] is None and one["images"] == 1  # one image has no variance


# ------------------------------------------------------------------------------------------- bad combinations


def other(model, **changes):
    dims = dataclasses.replace(model.dims, **changes)
    params = random_params(dims, dtype=np.float32)
    return nvit.Model(dims, params, info=model.info)


CASES = {
    "labels": (lambda m, x: prune(m, x, macs=0.6, criterion=nvit.Scoring(loss="labels")), 'loss=.*take "features"'),
    "kl": (lambda m, x: prune(m, x, macs=0.6, criterion=nvit.Scoring(criterion="hvp", loss="kl")), "classifier"),
    "drawn": (lambda m, x: nvit.saliency(m, x, criterion=nvit.Scoring(loss="drawn"), **QUIET), "classifier"),
    "mix": (lambda m, x: prune(m, x, macs=0.6, criterion=nvit.Scoring(criterion="obd", loss="mix")), "classifier"),
    "taylor": (lambda m, x: prune(m, x, macs=0.6, criterion="taylor"), "takes labels"),
    "embed": (lambda m, x: prune(m, x, macs=0.6, criterion="fisher", kinds=("embed", "mlp")), "are the features"),
    "nvit": (lambda m, x: prune(m, x, macs=0.6, criterion="fisher", rule="nvit"), "embed"),
    "objective": (
        lambda m, x: prune(m, x, macs=0.6, method="gradual", training=nvit.Recipe()),
        r"training.objective .*feature_weight=1",
    ),
    "no teacher": (lambda m, x: nvit.finetune(m, x, **QUIET), "has no classifier.*teacher"),
    "kl training": (
        lambda m, x: nvit.finetune(
            m, x, teacher=m, recipe=nvit.Recipe(objective=nvit.Objective(kl_weight=1.0)), **QUIET
        ),
        "objective takes answers of a classifier",
    ),
    "another width": (lambda m, x: nvit.finetune(m, x, teacher=other(m, embed=16), **QUIET), "24|16.*embed"),
    "another reference": (lambda m, x: nvit.evaluate(m, x, reference=other(m, classes=3), **QUIET), "3 is the classes"),
    "nothing to say": (lambda m, x: nvit.evaluate(m, x, **QUIET), "give a reference"),
    "no neighbours": (lambda m, x: nvit.evaluate(m, x, reference=m, neighbours=0, **QUIET), "neighbours=0"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_model_without_a_classifier_cannot_do_is_one_line(name, headless, images):
    call, words = CASES[name]
    with pytest.raises(UserError, match=words) as error:
        call(headless, images)
    assert "\n" not in str(error.value)


def test_what_a_classifier_cannot_do_is_one_line(digits_model, headless, images):
    with pytest.raises(UserError, match="no gradient"):
        nvit.Scoring(criterion="taylor", loss="features")
    with pytest.raises(UserError, match="reference is for models without a classifier"):
        nvit.evaluate(digits_model, (images, np.zeros(160, int)), reference=headless, **QUIET)
    with pytest.raises(UserError, match="objective has a feature_weight"):
        recipe = nvit.Recipe(objective=FEATURES)
        nvit.finetune(digits_model, images, teacher=digits_model, recipe=recipe, **QUIET)


# ----------------------------------------------------------------------------------------------- files, folders


def test_a_classifier_is_left_out_by_a_conversion(tmp_path):
    """With both tokens of a distilled model; the file that goes out gives the same features and comes back."""
    uniform = nvit.ViTDims.uniform(image=16, patch=4, classes=7, embed=16, depth=2, heads=2, mlp=20, dist_token=True)
    model = nvit.Model(uniform, random_params(uniform, dtype=np.float32), info={"preprocessing": PREPROCESSING})
    save_file(interchange.to_torch(uniform, model.params), tmp_path / "timm.safetensors")
    found = nvit.load(tmp_path / "timm.safetensors", classes=0, heads=2)
    assert found.dims == dataclasses.replace(uniform, classes=0)
    pixels = random_images(uniform, 3, dtype=np.float32)
    expected = run_forward(*vit.without_classifier(uniform, model.params), pixels).mean(1)
    np.testing.assert_allclose(np.asarray(found(pixels)), expected, atol=1e-5)
    (record,) = nvit.export(found, tmp_path / "again", say=lambda line: None)
    assert record["max_abs_diff"] < 1e-4
    again = nvit.load(tmp_path / "again/safetensors/model.safetensors")
    for path, leaf in flatten(found.params):
        np.testing.assert_array_equal(dict(flatten(again.params))[path], leaf)


def test_a_model_card_says_how_like_the_features_are(headless):
    found = {"cosine": 0.98765, "error": 0.0432, "loss": 0.01, "images": 360}
    for results, lines in (
        ({}, ["| mean cosine similarity to the unpruned model's features | not measured |"]),
        (found, ["features | 0.9877 |", "variance of these features | 0.0432 |", "Measured on 360 images"]),
        (found | {"knn": 0.5, "dense": {"knn": 0.6}}, ["| nearest neighbours' top-1 | 50.00% | 60.00% |"]),
        (found | {"knn": None}, ["features | 0.9877 |"]),
    ):
        check_results(results)
        text = model_card(headless, results, "nvit_jax", [])
        assert all(line in text for line in lines) and ("neighbours" in text) == bool(results.get("knn"))
        assert "| top-1" not in text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """flat/train/IMAGE, one/train/CLASS/IMAGE with a single class, and the same for val."""
    place = tmp_path_factory.mktemp("folders")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for name in ("flat", "one/single"):
            first, *rest = name.split("/")
            folder = place.joinpath(first, split, *rest)
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    return place


def test_every_stage_of_a_run_without_labels(folders, tmp_path):
    """The loop, distillation and evaluation, from configs/checkpoint.py; summary and report say what there is."""
    dims = small_dims(image=16, patch=8, channels=3, classes=0, embed=16, mlp=32)
    nvit.Model(dims, random_params(dims, dtype=np.float32), info={"preprocessing": PREPROCESSING}).save(tmp_path / "m")
    keys = {
        "model": tmp_path / "m", "data.path": folders / "flat", "stages": "('prune','finetune','eval','report')",
        "prune.mode": "gradual", "prune.steps": 2, "prune.interval": 2, "prune.batch": 8, "prune.score.batch": 8,
        "prune.floors.mlp": 4, "prune.floors.qk": 2, "prune.floors.v": 2, "prune.target.macs_ratio": 0.7,
        "finetune.epochs": 1.0, "finetune.warmup_epochs": 0.0, "finetune.batch": 8, "augment.mixup": 0.8,
        "latency.batch": 4, "latency.repeats": 2, "eval.batch": 8,
    }  # fmt: skip
    words = [f"--config.{key}={value}" for key, value in keys.items()]
    assert call("--workdir", tmp_path / "W", *words, config=str(ROOT / "configs" / "checkpoint.py")) == 0
    summary = read(tmp_path / "W" / "summary.json")
    assert set(summary) == {"dense", "pruned", "finetuned"}
    assert (summary["dense"]["cosine"], summary["dense"]["error"], summary["dense"]["images"]) == (1.0, 0.0, 8)
    for row in summary.values():
        assert set(row) == {"cosine", "error", "params", "macs", "latency_ms", "latency_batch", "images"}
    assert summary["pruned"]["macs"] <= 0.7 * summary["dense"]["macs"] and summary["pruned"]["cosine"] < 1
    page = (tmp_path / "W" / "report.html").read_text()
    assert "relative error" in page and "Mean cosine similarity" in page and "top-1" not in page
    assert load_model(tmp_path / "W" / "finetune" / "model").dims.embed == dims.embed


@pytest.mark.parametrize("name", ["flat", "one", "npz"])
def test_images_without_labels_are_data(name, folders):
    path, kind = folders / name, "folder"
    if name == "npz":
        path, kind = folders / "images.npz", "npz"
        pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3)).astype(np.uint8)
        np.savez(path, train_images=pixels, val_images=pixels[:8], test_images=pixels[:2])
    data = nvit.load_dataset(kind, str(path))
    assert [len(data.split(s)) for s in ("train", "val")] == [24, 8]
    with pytest.raises(UserError, match="CLASS/IMAGE.JPEG|one class|holds no labels"):
        nvit.saliency(other_classifier(), data, **QUIET)


def other_classifier():
    dims = small_dims(image=16, patch=8, channels=3, classes=1)
    return nvit.Model(dims, random_params(dims, dtype=np.float32), info={"preprocessing": PREPROCESSING})
