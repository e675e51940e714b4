"""Arguments of the library's functions: another type, another range, or not finite; each is named in one line."""

import math

import jax
import numpy as np
import pytest
from conftest import random_images, random_params, small_dims

import nvit_jax as nvit
from nvit_jax.files import locked
from nvit_jax.model.groups import flatten
from nvit_jax.model.masks import full_masks
from nvit_jax.paths import named

DIMS = small_dims()
NAN = math.nan
IMAGES, LABELS = random_images(DIMS, 8, dtype=np.float32), np.zeros(8, np.int32)
BROKEN = np.where(np.arange(8)[:, None, None, None] == 3, np.nan, IMAGES)


@pytest.fixture(scope="module")
def model():
    return nvit.Model(DIMS, random_params(DIMS, dtype=np.float32))


CALLS = [
    ("evaluate", {"batch": 0}, "batch=0: it must be >= 1"),
    ("evaluate", {"batch": 2.5}, "batch=2.5: it must be a whole number >= 1 and <= 1,000,000,000"),
    ("evaluate", {"batch": True}, "batch=True: it must be a whole number >= 1 and <= 1,000,000,000"),
    ("evaluate", {"dtype": "int8"}, "dtype='int8': it must be float32 or bfloat16"),
    ("prune", {"macs": NAN}, "macs=nan: it must be a finite number"),
    ("prune", {"macs": 0.9, "images": "all"}, "images='all': it must be a whole number >= 1 and <= 1,000,000,000"),
    ("prune", {"macs": 0.9, "seed": -1}, "seed=-1: it must be from 0 to 2**32 - 1"),
    ("prune", {"macs": 0.9, "kinds": 3}, "kinds=3: it must be a tuple of kinds"),
    ("prune", {"macs": 0.9, "protect": 0}, "protect=0: it must be a list, each a whole number >= 0"),
    ("prune", {"macs": 0.9, "floors": {"mlp": NAN}}, "floors.mlp must be a whole number >= 0"),
    ("prune", {"macs": 0.9, "floors": [8]}, "floors=[8]: it must be a dict of kinds"),
    ("prune", {"macs": 0.9, "snapshots": 3}, "snapshots=3: it must be a list, each a number"),
    ("prune", {"macs": 0.9, "measure": "here"}, "measure='here': it must be a whole number >= 1 and <= 1,000,000,000"),
    ("prune", {"macs": 0.9, "loss": "ce"}, "loss='ce': it must be a function"),
    ("prune", {"macs": 0.9, "training": {}}, "training={}: it must be a Recipe"),
    (
        "prune",
        {"latency": 0.9, "latency_table": lambda dims: "fast"},
        "latency: the unpruned model costs 'fast', of which nothing can be saved",
    ),
    ("finetune", {"epochs": "many"}, "epochs='many': it must be a number > 0 and <= 1,000,000"),
    ("finetune", {"epochs": math.inf}, "epochs=inf: it must be a finite number > 0 and <= 1,000,000"),
    ("finetune", {"learning_rate": 1e38}, "learning_rate=1e+38: it must be <= 1e+30"),
    ("finetune", {"augment": "deit"}, "augment='deit': it must be an Augment"),
    ("finetune", {"recipe": {"epochs": 1}}, "recipe={'epochs': 1}: it must be a Recipe"),
    ("finetune", {"batch": 100}, "batch=100: there are 8 images"),
    ("finetune", {"directory": 3}, "directory=3: it must be a path"),
    ("saliency", {"images": 1.5}, "images=1.5: it must be a whole number >= 1 and <= 1,000,000,000"),
    ("rotate", {"images": 0}, "images=0: it must be >= 1"),
]


@pytest.mark.parametrize(("name", "given", "line"), CALLS, ids=range(len(CALLS)))
def test_an_argument_of_another_kind_is_named(model, name, given, line):
    with pytest.raises(nvit.UserError) as caught:
        getattr(nvit, name)(model, (IMAGES, LABELS), progress=False, **given)
    assert str(caught.value) == line


BATCHES = [
    ((BROKEN, LABELS), "batches: images: 1 of 8 are not finite, 3 is the first"),
    ((IMAGES + 1j, LABELS), "batches: images are of type complex64; they must be real numbers"),
    ((IMAGES, np.eye(3)[LABELS]), "batches: images: labels are float64 (8, 3); they must be integers [B]"),
    ([(IMAGES, LABELS), (IMAGES[:0], LABELS[:0])], "batches: batch 1 has no images"),
    ([(IMAGES, LABELS - 1)], "batches: batch 0: images: labels go from -1 to -1; the model has 5 classes, from 0"),
]


@pytest.mark.parametrize(("batches", "line"), BATCHES, ids=range(len(BATCHES)))
def test_batches_that_are_none(model, batches, line):
    with pytest.raises(nvit.UserError) as caught:
        nvit.evaluate(model, batches, progress=False)
    assert str(caught.value) == line


def masks_with(value):
    return full_masks(DIMS)._replace(mlp=np.full((DIMS.depth, max(DIMS.mlp)), value))


def with_head(model, kind):
    """The model, the classifier's bias as numbers of another type."""
    head = model.params["head"]
    return nvit.Model(DIMS, model.params | {"head": head | {"bias": head["bias"].astype(kind)}})


FLOATS = "parameters are arrays of floating-point numbers"
OTHERS = [
    (lambda m: nvit.Augment(mixup=-1), "mixup=-1: it must be 0, or a number >= 0.001 and <= 1,000"),
    (lambda m: nvit.Augment(crop=5), "crop=5: it must be in (0, 1]"),
    (lambda m: nvit.Augment(erasing="0.5"), "erasing='0.5': it must be a number in [0, 1]"),
    (lambda m: nvit.Objective(tau=0), "tau=0: it must be >= 0.001"),
    (lambda m: nvit.Objective(smoothing=2), "smoothing=2: it must be in [0, 1)"),
    (lambda m: nvit.Objective(kl_weight=NAN), "kl_weight=nan: it must be a finite number >= 0 and <= 1,000,000,000"),
    (lambda m: nvit.Plan(method="gradual", steps=2.5), "steps=2.5: it must be a whole number"),
    (lambda m: nvit.Scoring(probes="1"), "probes='1': it must be a whole number"),
    (lambda m: nvit.Recipe(clip_norm=0), "clip_norm=0: it must be >= 1e-09"),
    (lambda m: nvit.Recipe(objective={}), "objective={}: it must be an Objective"),
    (lambda m: nvit.Measurement(batch=2.5), "batch=2.5: it must be a whole number >= 1 and <= 1,000,000,000"),
    (lambda m: nvit.benchmark(3), "models is a int; give a Model, or several"),
    (lambda m: nvit.Model(DIMS.to_json(), m.params), "dims is a dict; it must be ViTDims, such as nvit.preset gives"),
    (
        lambda m: nvit.load_dataset("digits", preprocessing={}),
        "preprocessing={}: it must be a Preprocessing, such as model.preprocessing",
    ),
    (lambda m: nvit.load_dataset("digits").split("val").some(1.5), "count=1.5: it must be a whole number, at least 1"),
    (
        lambda m: nvit.saliency(
            m, (IMAGES, LABELS), criterion="taylor", loss=lambda logits, batch: None, progress=False
        ),
        "loss returns the shape None; it must be [B], one number an example",
    ),
    (lambda m: nvit.benchmark([None]), "models[0] is a NoneType; it must be a Model, or dims"),
    (lambda m: nvit.to_rmsnorm(None), "model is a NoneType; it must be a Model, such as nvit.load gives"),
    (lambda m: nvit.load(None), "path=None: it must be a path"),
    (lambda m: nvit.load_dataset("digits", holdout=2), "holdout=2: it must be in (0, 1)"),
    (lambda m: nvit.reshape(m, [1]), "masks=[1]: it must be Units"),
    (lambda m: nvit.rank([1], m, macs=0.9), "scores=[1]: it must be Units, such as nvit.saliency gives"),
    (lambda m: nvit.rank(masks_with(1j), m, macs=0.9), "scores: mlp is of type complex128; scores are real numbers"),
    (lambda m: m.apply(m.params, IMAGES, masks_with(NAN)), "masks: mlp holds values that are not finite, or below 0"),
    (lambda m: m.apply(m.params, IMAGES, masks_with(-1.0)), "masks: mlp holds values that are not finite, or below 0"),
    (lambda m: m.apply(m.params, IMAGES, tuple(full_masks(DIMS))), "masks are a tuple; they must be Units"),
    (
        lambda m: m.apply(m.params, IMAGES, masks_with("1")),
        "masks: mlp is of type <U1; masks are arrays of real numbers",
    ),
    (lambda m: nvit.reshape(m, masks_with(1j)), "masks: mlp holds values other than 0 and 1"),
    (
        lambda m: nvit.reshape(m, {"mlp": np.ones((2, 2))}),
        "masks={'mlp': array([[1., 1.], [1., 1.]])}: it must be Units",
    ),
    (lambda m: m(IMAGES[:0]), "images: there are none"),
    (lambda m: m.apply([1], IMAGES), "params: a list; parameters are nested dicts of arrays"),
    (lambda m: with_head(m, str)(IMAGES), f"params: head/bias is of type <U32; {FLOATS}"),
    (
        lambda m: nvit.saliency(with_head(m, complex), IMAGES),
        f"model.params: head/bias is of type complex128; {FLOATS}",
    ),
    (
        lambda m: nvit.Model(DIMS, m.params | {"head": {}})(IMAGES),
        "params: head/bias has shape none (missing), the dims ask for (5,)",
    ),
    (lambda m: with_head(m, int).save("none"), f"save_model: head/bias is of type int64; {FLOATS}"),
    (lambda m: nvit.evaluate(with_head(m, int), IMAGES), f"model.params: head/bias is of type int64; {FLOATS}"),
    (lambda m: nvit.to_rmsnorm(with_head(m, object)), f"model.params: head/bias is of type object; {FLOATS}"),
    (
        lambda m: nvit.evaluate(m.__class__(DIMS, m.params, full_masks(DIMS)[:4]), IMAGES),
        "model.masks are a tuple; they must be Units",
    ),
    (
        lambda m: nvit.Objective(label_weight=0),
        "label_weight=0: no other weight is above 0, so that nothing would be learnt",
    ),
    (lambda m: m.save(None), "None is a NoneType, not a path"),
    (lambda m: nvit.LatencyTable(3), "the latency table is not what a latency stage writes: must be an object"),
]


@pytest.mark.parametrize(("call", "line"), OTHERS, ids=range(len(OTHERS)))
def test_other_values_of_another_kind(model, call, line):
    with pytest.raises(nvit.UserError) as caught:
        call(model)
    assert str(caught.value) == line


def test_numbers_of_numpy_are_numbers(model):
    assert nvit.Recipe(epochs=np.float32(0.5), batch=np.int64(8)) == nvit.Recipe(epochs=0.5, batch=8)
    with pytest.raises(nvit.UserError, match=r"^macs=2.0: it must be in \(0, 1\]"):
        nvit.prune(model, (IMAGES, LABELS), macs=np.float32(2), progress=False)


@pytest.mark.parametrize("index", [[-1], [10**9], [0.5]])
def test_examples_that_are_not_there(index):
    with pytest.raises(nvit.UserError, match="^index: give whole numbers of examples, from 0 to"):
        nvit.load_dataset("digits").split("val").take(index)


def test_facts_that_no_json_holds(model, tmp_path):
    odd = nvit.Model(DIMS, model.params, info={"mine": object()})
    with pytest.raises(nvit.UserError, match="^save_model: info cannot be written as JSON"):
        odd.save(tmp_path / "odd")
    assert not any(tmp_path.iterdir())


def test_a_model_that_overflows_is_not_exported(model, tmp_path):
    params = dict(flatten(model.params))
    large = nvit.Model(
        DIMS,
        random_params(DIMS, dtype=np.float32)
        | {"head": {"kernel": 1e6 * params["head/kernel"], "bias": params["head/bias"]}},
    )
    with pytest.raises(nvit.UserError, match="this model overflows in float16; take float32 or bfloat16"):
        nvit.export(large, tmp_path / "x", ("safetensors",), ("float16",), say=str)
    assert not (tmp_path / "x" / "safetensors").exists()


def test_a_model_whose_answers_overflow(model, tmp_path):
    """Finite weights, and nothing finite comes out."""
    large = nvit.Model(DIMS, jax.tree.map(lambda leaf: leaf + np.float32(1e37), model.params))
    with pytest.raises(nvit.UserError, match="^export: the model's answers are not finite; look at its weights"):
        nvit.save(large, tmp_path / "x", say=str)
    with pytest.raises(nvit.UserError, match="^calibration: what flows in the model is not finite"):
        nvit.prune(large, (IMAGES, LABELS), macs=0.9, batch=2, measure=None, progress=False)
    assert not any(tmp_path.iterdir())


def test_paths_that_are_none():
    for path, line in ((3, "3 is a int, not a path"), ("", "'': the path is empty")):
        with pytest.raises(nvit.UserError) as caught:
            named(path)
        assert str(caught.value) == line


def test_two_calls_in_one_directory(model, tmp_path):
    with locked(tmp_path, "free"), pytest.raises(nvit.UserError) as caught:
        nvit.finetune(model, (IMAGES, LABELS), epochs=1, batch=8, directory=tmp_path, progress=False)
    assert str(caught.value) == f"directory={tmp_path}: another call is at work there; wait for it, or take another one"
