"""Exported folders as hubs have them: loaded again bit for bit, and by timm and transformers where they can be."""

import dataclasses
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
import sources
import torch
import transformers
from conftest import PREPROCESSING, VARIANTS, call, ragged, random_params, small_dims
from PIL import Image

import nvit_jax as nvit
from nvit_jax.formats import libraries
from nvit_jax.model.dims import count_params
from nvit_jax.model.groups import flatten
from nvit_jax.model.masks import full_masks

IMAGES = np.random.default_rng(0).standard_normal((3, 16, 16, 3)).astype(np.float32)
FILES = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "vit.py"}


def alike(**changes) -> nvit.Model:
    """A model whose blocks all have the same widths."""
    values = {"image": 16, "patch": 4, "classes": 7, "embed": 24, "depth": 2, "heads": 3, "mlp": 37}
    dims = nvit.ViTDims.uniform(**(values | changes))
    info = {"preprocessing": PREPROCESSING, "classes": [f"class {i}" for i in range(dims.classes)], "variant": None}
    return nvit.Model(dims, random_params(dims, dtype=np.float32), info=info)


def quiet(function, *args, **kwargs):
    return function(*args, say=lambda text: None, **kwargs)


def check_same(model: nvit.Model, again: nvit.Model) -> None:
    """Every bit, and what is known of it."""
    assert model.dims == again.dims
    ours, theirs = dict(flatten(model.params)), dict(flatten(again.params))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert value.dtype == theirs[path].dtype and np.array_equal(value, theirs[path]), path
    for name in ("preprocessing", "classes", "variant"):
        assert (model.info.get(name) or None) == (again.info.get(name) or None), name


ROUND_TRIPS = {
    "ragged": {},
    "without an attention and an mlp": {"heads": (0, 1), "mlp": (9, 0), "layer_scale": True},
    "without any block": {"heads": (0, 0), "mlp": (0, 0)},
    "rms": {"norm": "rms", "norm_count": 20},
    "features": {"classes": 0, "dist_token": False},
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_a_folder_comes_back_bit_for_bit(case, tmp_path):
    model = ragged(**ROUND_TRIPS[case])
    if not model.dims.classes:
        model.info.pop("classes")
    before = os.umask(0o022)
    try:
        quiet(nvit.save, model, tmp_path / "folder")
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "folder").iterdir()} == dict.fromkeys(
        FILES, "0o644"
    )
    check_same(model, nvit.load(tmp_path / "folder"))
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["model_type"] == "nvit_jax" and config["dims"] == model.dims.to_json()


def test_nothing_needs_to_be_known(tmp_path):
    model = nvit.Model(ragged().dims, ragged().params)
    quiet(nvit.save, model, tmp_path / "folder")
    check_same(model, nvit.load(tmp_path / "folder"))
    assert {path.name for path in (tmp_path / "folder").iterdir()} == FILES - {"preprocessor_config.json"}


def test_masks_are_made_compact(tmp_path):
    """Through masks that take an attention and an mlp away: reshaped, saved, loaded, and saved as a model directory."""
    model = ragged()
    masks = full_masks(model.dims)
    masks.head[0], masks.mlp[1], masks.embed[3] = 0, 0, 0
    masked = nvit.Model(model.dims, model.params, masks, model.info)
    quiet(nvit.save, masked, tmp_path / "folder")
    again = nvit.load(tmp_path / "folder")
    assert again.dims.heads == (0, 1) and again.dims.mlp == (9, 0)
    check_same(masked.compact(), again)
    again.save(tmp_path / "directory")
    check_same(again, nvit.load(tmp_path / "directory"))
    # float32: the order of additions differs.
    assert np.abs(np.asarray(masked(IMAGES)) - np.asarray(again(IMAGES))).max() <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_goes_out_and_comes_back(variant, tmp_path):
    """As a folder that PyTorch runs, and as a program that is called with its weights, after one block lost a part.

    Bit for bit. The exports compare their numbers with the model's, at two batch sizes.
    """
    dims = small_dims(**VARIANTS[variant])
    masks = full_masks(dims)
    masks.head[0], masks.embed[3] = 0, 0
    model = nvit.Model(dims, random_params(dims, dtype=np.float32), masks).compact()
    assert model.dims.heads == (0, 2)
    for record in quiet(nvit.export, model, tmp_path, ("safetensors", "stablehlo"), weights="arguments"):
        assert record["max_abs_diff"] <= 1e-4 * max(1, record["max_abs_logit"])
    for name in ("safetensors", "stablehlo/model.safetensors"):
        check_same(model, nvit.load(tmp_path / name))


# -------------------------------------------------------------------------------------------------- libraries

TIMM = {
    "plain": {},
    "distilled": {"dist_token": True},
    "registers": {"registers": 2, "layer_scale": True},
    "patch positions": {"registers": 1, "positions": "patches", "qkv_bias": False},
    "no positions": {"positions": "none", "activation": "relu"},
    "mean": {"pool": "mean", "cls_token": False, "activation": "gelu_tanh"},
    "max": {"pool": "max", "norm_after_pool": True},
    "avgmax": {"pool": "avgmax", "mean_over": "all"},
    "mean over all": {"pool": "mean", "mean_over": "all", "norm_after_pool": True, "activation": "quick_gelu"},
    "features": {"classes": 0},
}
TRANSFORMERS = {
    "plain": {},
    "distilled": {"dist_token": True, "norm_eps": 1e-12},
    "pruned": {"heads": 2, "qk": 8, "v": 8, "norm_eps": 1e-3},  # 2 heads of 8 are not 24 channels
    "activation": {"activation": "gelu_tanh", "qkv_bias": False},
    "quick_gelu": {"activation": "quick_gelu"},
}
NEITHER = {  # -> words of the reason
    "ragged": (ragged, {}, "heads is not the same in all blocks (1 to 2)"),
    "parts": (ragged, {"heads": (0, 1)}, "blocks have lost their attention or mlp part"),
    "qk": (alike, {"qk": 6, "v": 8}, "queries have 6 dims and values 8"),
    "scale": (alike, {"qk": 8, "v": 8, "qk_scale": 0.2}, "queries are scaled by 0.2, not by 8 ** -0.5"),
    "tanh": (alike, {"pre_logits": 5}, "pre_logits is 5"),
    "rms": (alike, {"norm": "rms"}, "norm is 'rms'"),
}


def logits(model: nvit.Model) -> np.ndarray:
    with jax.default_matmul_precision("float32"):
        return np.asarray(model(IMAGES))


@pytest.mark.parametrize("case", TIMM)
def test_timm_loads_the_folder(case, tmp_path):
    timm = sources.import_timm()
    if timm is None:
        pytest.skip("timm is not installed: pip install --no-deps timm (without torchvision)")
    model = alike(**TIMM[case])
    if not model.dims.classes:
        model.info.pop("classes")
    said = []
    nvit.save(model, tmp_path / "folder", say=said.append)
    assert "timm.create_model" in said[-1]
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    with torch.inference_mode():
        found = theirs(sources.nchw(IMAGES, torch.float32)).numpy()
    assert np.abs(found - logits(model)).max() <= 1e-4
    cfg = theirs.pretrained_cfg
    assert tuple(cfg["mean"]) == pytest.approx(PREPROCESSING["mean"]) and int(16 / cfg["crop_pct"]) == 20
    check_same(model, nvit.load(tmp_path / "folder"))


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers_loads_the_folder(case, tmp_path):
    model = alike(**TRANSFORMERS[case])
    said = []
    record = nvit.save(model, tmp_path / "folder", format="transformers", say=said.append)
    assert record["run_with"].startswith("transformers") and "from_pretrained(FOLDER) loads it" in said[-1]
    name = json.loads((tmp_path / "folder" / "config.json").read_text())["architectures"][0]
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "folder").eval()
    with torch.inference_mode():
        found = theirs(sources.nchw(IMAGES, torch.float32)).logits.numpy()
    assert np.abs(found - logits(model)).max() <= 1e-4
    assert list(theirs.config.id2label.values()) == model.info["classes"]
    check_same(model, nvit.load(tmp_path / "folder"))
    if case == "pruned":  # what transformers itself writes of it is read, too
        theirs.save_pretrained(tmp_path / "theirs")
        again = nvit.load(tmp_path / "theirs")
        check_same(model, dataclasses.replace(again, info=again.info | {"preprocessing": PREPROCESSING}))


@pytest.mark.parametrize("case", NEITHER)
def test_what_no_class_can_say_is_said(case, tmp_path):
    make, changes, words = NEITHER[case]
    model = make(**changes)
    for home in (libraries.timm_config(model), libraries.transformers_config(model)):
        assert home.config is None and words in home.why
    with pytest.raises(nvit.UserError, match=re.escape(words)) as caught:
        quiet(nvit.save, model, tmp_path / "folder", format="transformers")
    assert '"safetensors" holds it' in str(caught.value) and not (tmp_path / "folder").exists()


PROCESSORS = {
    "center": {},
    "squash": {"crop_mode": "squash", "resize": 16, "interpolation": "bilinear"},
    "squash and crop": {"crop_mode": "squash"},
    "none": {"crop_mode": "none", "resize": 16},
    "other scale": {"scale": 127.5},
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_transformers_prepares_images_alike(case, tmp_path):
    model = alike()
    model.info["preprocessing"] = PREPROCESSING | PROCESSORS[case]
    settings = libraries.processor_config(model.preprocessing)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    for size in ((24, 32, 3), (32, 24, 3)):  # crops with even margins, see the card
        image = Image.fromarray(rng.integers(0, 256, size, np.uint8))
        found = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert np.abs(found - model.preprocess([image])[0]).max() <= 1e-5  # float32 of another order


# ------------------------------------------------------------------------------------------------------- card


def test_the_card_holds_what_was_measured(tmp_path):
    results = {"top1": 0.512, "top5": 0.75, "images": 500, "loss": 1.0, "latency_ms": 3.25, "latency_batch": 32}
    results |= {"device": "a device", "dtype": "float32", "commands": ["nvit-jax prune x"], "knn": 0.25}
    results["dense"] = {"top1": 0.6, "images": 500, "params": 1000, "macs": 12345}
    quiet(nvit.save, ragged(), tmp_path, results=results)
    text = (tmp_path / "README.md").read_text()
    for words in (
        "| top-1 | 51.20% | 60.00% |",
        "| top-5 | 75.00% | not measured |",
        "| images | 500 | 500 |",
        f"| parameters | {count_params(ragged().dims):,} | 1,000 |",
        "| latency | 3.25 ms for 32 | not measured |",
        "| knn | 0.25 |",
        "Latency is of a batch of 32 images in float32 on a device.",
        "nvit-jax prune x",
        "vit.py",
    ):
        assert words in text, words
    quiet(nvit.save, ragged(), tmp_path)  # over one of ours
    assert "| top-1 | not measured |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"format": "onnx"}, "format='onnx' is not one of safetensors, transformers"),
        ({"dtype": "int8"}, "dtype='int8' is not one of"),
        ({"results": {"top1": 51.2, "images": 5}}, "results: top1 must be in [0, 1]"),
        ({"results": {"top1": 0.5}}, "results: top1 says nothing without images"),
        ({"results": {"latency_ms": 2.0, "latency_batch": 1}}, "results: latency_ms says nothing without device"),
        ({"results": 3}, "results: must be an object"),
    ],
)
def test_mistakes_of_save(arguments, words, tmp_path):
    with pytest.raises(nvit.UserError) as caught:
        nvit.save(ragged(), tmp_path / "folder", **arguments)
    assert words in str(caught.value) and not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"opset": 16}, "opset=16: it must be a whole number from 17 to 25"),
        ({"opset": 26}, "opset=26: it must be"),
        ({"opset": True}, "opset=True: it must be"),
        ({"opset": "20"}, "opset='20': it must be"),
        ({"weights": "inside"}, "weights='inside' is not one of constants, arguments"),
        ({"formats": ("onnx",), "dtypes": ("bfloat16",)}, 'dtypes="bfloat16": ONNX runtimes lack it'),
        ({"formats": ("safetensors", "transformers")}, "heads is not the same in all blocks"),
    ],
)
def test_mistakes_of_export(arguments, words, tmp_path):
    with pytest.raises(nvit.UserError) as caught:
        nvit.export(ragged(), tmp_path / "E", **arguments)
    assert words in str(caught.value) and not (tmp_path / "E").exists()


def test_other_peoples_files_stay(tmp_path):
    nvit.save_model(tmp_path / "directory", ragged())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "README.md").write_text("mine")
    quiet(nvit.save, ragged(), tmp_path / "own")
    (tmp_path / "own" / "README.md").write_text("mine")
    taken = "holds README.md, which would be replaced"
    for place, words in (("directory", "is a model directory"), ("taken", taken), ("own", taken)):
        with pytest.raises(nvit.UserError, match=words):
            quiet(nvit.save, ragged(), tmp_path / place)
    assert (tmp_path / "taken" / "README.md").read_text() == "mine"


# -------------------------------------------------------------------------------------------------- StableHLO


@pytest.mark.parametrize("changes", [{}, {"heads": (0, 1), "mlp": (9, 0), "layer_scale": True}])
def test_weights_inside_and_outside_of_the_program(changes, tmp_path):
    """The same numbers; the weights' file is one that everything else reads; bytes are stated."""
    from safetensors.numpy import load_file

    model, said = ragged(**changes), []
    inside = nvit.export(model, tmp_path / "a", ("stablehlo",), say=said.append)[0]
    outside = nvit.export(model, tmp_path / "b", ("stablehlo",), weights="arguments", say=said.append)[0]
    programs = {}
    for name in "ab":
        content = (tmp_path / name / "stablehlo" / "model.stablehlo").read_bytes()
        programs[name] = jax.export.deserialize(bytearray(content))
    weights = load_file(tmp_path / "b" / "stablehlo" / "model.safetensors")
    found = np.asarray(programs["b"].call(weights, IMAGES))
    assert np.abs(found - np.asarray(programs["a"].call(IMAGES))).max() <= 1e-5  # float32 of one program and another
    assert outside["bytes"] == outside["program_bytes"] + outside["weights_bytes"]
    sizes = [(tmp_path / "b" / "stablehlo" / f"model.{s}").stat().st_size for s in ("stablehlo", "safetensors")]
    assert [outside["program_bytes"], outside["weights_bytes"]] == sizes and inside["bytes"] > 0
    assert f"{sizes[1]:,} bytes of weights in model.safetensors" in said[1]
    check_same(model, nvit.load(tmp_path / "b" / "stablehlo" / "model.safetensors"))
    doubled = {name: 2 * value for name, value in weights.items()}
    assert np.abs(np.asarray(programs["b"].call(doubled, IMAGES)) - found).max() > 1e-3  # they are not inside, too


def test_weights_that_no_program_holds(monkeypatch, tmp_path):
    monkeypatch.setattr("nvit_jax.formats.export.MOST_CONSTANTS", 10_000)
    with pytest.raises(nvit.UserError, match='weights="constants": a StableHLO program holds at most') as caught:
        quiet(nvit.export, ragged(), tmp_path, ("stablehlo",))
    assert '"arguments" puts them into a file of their own' in str(caught.value)
    quiet(nvit.export, ragged(), tmp_path, ("stablehlo",), weights="arguments")


# -------------------------------------------------------------------------------------------------- the stage


def test_the_stage_fills_the_card(finished, tmp_path):
    """With what eval has measured of the same model, and the commands that made it; an older evaluation is not told."""
    workdir = tmp_path / "W"
    shutil.copytree(finished, workdir, symlinks=True)
    one = ("--stage", "export", "--config.export.formats=('safetensors',)")
    assert call("--workdir", workdir, *one) == 0
    card = (workdir / "export" / "safetensors" / "README.md").read_text()
    summary = json.loads((workdir / "summary.json").read_text())
    assert f"| top-1 | {summary['finetuned']['top1']:.2%} | {summary['dense']['top1']:.2%} |" in card
    assert f"{summary['finetuned']['latency_ms']:.2f} ms for 32" in card and "the test split of digits" in card
    device = json.loads((workdir / "eval" / "metrics.json").read_text())["device"]
    assert f"on {device}" in card and f"--workdir {workdir} --stage export" in card
    shutil.rmtree(workdir / "finetune")  # the evaluation was of that one
    assert call("--workdir", workdir, *one, "--force") == 0
    card = (workdir / "export" / "safetensors" / "README.md").read_text()
    assert "| top-1 | not measured |" in card and "Latency is of" not in card
