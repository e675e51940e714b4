"""Exports compute what the model computes, wherever they are loaded; the stage, its files, and what can be wrong."""

import io
import json
import os
import shutil
import stat
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from conftest import PREPROCESSING, ROOT, call, ragged, read
from PIL import Image

from nvit_jax import load_model, save_model
from nvit_jax.formats import export, programs, torch_vit
from nvit_jax.model.preprocessing import Preprocessing

ANY = ("safetensors", "stablehlo", "onnx")  # formats for any model


@pytest.mark.parametrize(
    ("changes", "opset"),
    [
        ({}, None),
        (
            {"dist_token": False, "pool": "mean", "norm_after_pool": True, "pre_logits": 6, "activation": "gelu_tanh"},
            18,  # 17 has no mean over given axes that the exporter could write
        ),
        ({"norm": "rms", "norm_count": 20}, 25),
        ({"rotary": 6, "qk_norm_count": 12, "positions": "none", "registers": 1}, 20),
        ({"dist_token": False, "pool": "class_mean", "gated": True, "activation": "silu", "registers": 2}, 20),
        ({"heads": (0, 1), "mlp": (9, 0), "layer_scale": True}, 18),  # without an attention, without an mlp
        ({"heads": (1, 0), "mlp": (9, 0)}, 20),  # without a block
        (  # what CLIP, SigLIP and rectangles have
            {
                **{"image": (16, 8), "patch": (4, 2), "pre_norm": True, "patch_bias": False, "dist_token": False},
                **{"pool": "map", "pool_width": 21, "pool_heads": 3, "pool_mlp": 8, "classes": 0, "projection": 6},
            },
            20,
        ),
    ],
)
def test_every_format_computes_the_same(changes, opset, tmp_path):
    model, said = ragged(**changes), []
    options = programs.Options() if opset is None else programs.Options(opset=opset)
    records = export.export_model(model, tmp_path / "export", ANY, ("float32",), said.append, options)
    assert [r["format"] for r in records] == list(ANY) and len(said) == 4
    assert "vit.py runs it" in said[1]
    for record in records:
        assert record["max_abs_diff"] <= 1e-4 * max(1, record["max_abs_logit"])
        assert (tmp_path / record["path"]).stat().st_size == record["bytes"]
    assert records[0]["run_with"].startswith("PyTorch")
    # Again from the files alone, as another program reads them, at a batch size of its own.
    images = np.random.default_rng(3).standard_normal((5, *model.dims.sides, 3)).astype(np.float32)
    with jax.default_matmul_precision("float32"):
        expected = np.asarray(model.apply(model.params, images))
    limit = 1e-4 * max(1, np.abs(expected).max())
    serialized = (tmp_path / "export" / "stablehlo" / "model.stablehlo").read_bytes()
    program = jax.export.deserialize(bytearray(serialized))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert np.abs(np.asarray(program.call(images)) - expected).max() <= limit
    import onnx

    graph = onnx.load(tmp_path / "export" / "onnx" / "model.onnx")
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # a name, not a number
    assert [entry.version for entry in graph.opset_import if not entry.domain] == [opset or 20]


def test_half_precision(tmp_path):
    model = ragged()
    records = export.export_model(
        model, tmp_path / "a", ("safetensors", "stablehlo"), ("float16", "bfloat16"), lambda text: None
    )
    records += export.export_model(model, tmp_path / "b", ("onnx",), ("float16",), lambda text: None)
    assert [r["dtype"] for r in records] == ["float16", "bfloat16"] * 2 + ["float16"]
    for record in records:  # 11 and 8 bits
        limit = 0.02 if record["dtype"] == "float16" else 0.15
        assert 0 < record["max_abs_diff"] <= limit * record["max_abs_logit"], record
    full = export.export_model(model, tmp_path / "c", ("safetensors",), ("float32",), lambda text: None)
    assert records[0]["bytes"] < 0.7 * full[0]["bytes"]


def test_the_pytorch_file_stands_alone(tmp_path):
    """vit.py and the weights in a directory of their own, in a process without this project."""
    model = ragged()
    export.export_model(model, tmp_path / "export", ("safetensors",), ("float32",), lambda text: None)
    place = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "export" / "safetensors", place)
    pixels = np.random.default_rng(0).integers(0, 256, (25, 31, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(place / "photo.png")
    code = """
import sys, vit, torch
assert not any(name.startswith(("jax", "nvit")) for name in sys.modules)
model = vit.load("model.safetensors")
print(model(vit.read_image("photo.png", model.preprocessing)[None])[0].tolist())
"""
    run = {"cwd": place, "capture_output": True, "text": True, "check": True}
    found = json.loads(subprocess.run([sys.executable, "-c", code], **run).stdout)
    pre = Preprocessing.from_json(PREPROCESSING)
    raw = pre.crop()((place / "photo.png").read_bytes())
    expected = model.apply(model.params, pre(raw[None]))[0]
    assert np.abs(np.array(found) - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    told = subprocess.run([sys.executable, "vit.py", "model.safetensors", "photo.png"], **run).stdout
    assert f"class {int(np.argmax(found))} class {int(np.argmax(found))}" in told.splitlines()[1]


def encoded(image: Image.Image, kind: str, orientation: int = 1) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, kind, exif=exif)
    return buffer.getvalue()


def photos():
    rng = np.random.default_rng(5)
    colours = Image.fromarray(rng.integers(0, 256, (25, 31, 3), np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (25, 31), np.uint16))
    yield from ((f"turned {i}", encoded(colours, "JPEG", i)) for i in range(1, 9))
    yield "turned PNG", encoded(colours, "PNG", 6)
    yield "CMYK", encoded(colours.convert("CMYK"), "JPEG")
    yield "palette", encoded(colours.quantize(16), "PNG")
    yield "16 bits", encoded(deep, "PNG")
    yield "16 bits, turned", encoded(deep, "PNG", 8)
    yield "grey", encoded(colours.convert("L"), "PNG")
    yield "alpha", encoded(colours.convert("RGBA"), "PNG")


PHOTOS = dict(photos())


@pytest.mark.parametrize(
    "facts",
    [
        PREPROCESSING,
        PREPROCESSING | {"interpolation": "bilinear", "resize": 25},
        PREPROCESSING | {"mean": [0.4], "std": [0.2], "resize": None, "interpolation": None},
    ],
)
@pytest.mark.parametrize("name", PHOTOS)
def test_photos_are_read_as_in_evaluation(name, facts, tmp_path):
    (tmp_path / "photo").write_bytes(PHOTOS[name])
    found = torch_vit.read_image(tmp_path / "photo", facts).permute(1, 2, 0).numpy()
    pre = Preprocessing.from_json(facts)
    np.testing.assert_allclose(found, pre(pre.crop()(PHOTOS[name])[None])[0], atol=1e-6)


def test_pillow_turns_tiff_itself(tmp_path):
    """And it is not turned twice."""
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (25, 31, 3), np.uint8))
    for kind in ("TIFF", "PNG"):
        (tmp_path / kind).write_bytes(encoded(image, kind, 6))
    found, expected = (torch_vit.read_image(tmp_path / kind, PREPROCESSING) for kind in ("TIFF", "PNG"))
    assert torch.equal(found, expected)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The path of a safetensors file; vit.py lies beside it."""
    place = tmp_path_factory.mktemp("exported")
    export.export_model(ragged(), place, ("safetensors",), ("float32",), lambda text: None)
    return place / "safetensors" / "model.safetensors"


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_the_pytorch_file_helps(argument, capsys):
    assert torch_vit.main([argument]) == 0
    told = capsys.readouterr()
    assert "python vit.py model.safetensors photo.jpg" in told.out and not told.err


@pytest.mark.parametrize("arguments", [[], ["model.safetensors"]])
def test_the_pytorch_file_wants_a_model_and_photos(arguments, capsys):
    assert torch_vit.main(arguments) == 2
    told = capsys.readouterr()
    assert "python vit.py model.safetensors photo.jpg" in told.err and not told.out


def damage(kind: str, model, place):
    """(model file, photo, words of the error), one of the two as `kind` says."""
    from safetensors.torch import load_file, save_file

    photo, other = place / "photo.png", place / "other"
    photo.write_bytes(encoded(Image.new("RGB", (20, 20)), "PNG"))
    facts = json.dumps({"dims": ragged().dims.to_json(), "preprocessing": PREPROCESSING})
    if kind == "no model":
        return other, photo, "other cannot be read as safetensors: No such file or directory"
    if kind == "a folder":
        return place, photo, "cannot be read as safetensors: "
    if kind == "no safetensors":
        other.write_bytes(b"\x10" + b"x" * 100)
        return other, photo, "other cannot be read as safetensors: "
    if kind == "cut":
        other.write_bytes(model.read_bytes()[:-10])
        return other, photo, "other cannot be read as safetensors: "
    if kind in ("no metadata", "other metadata"):
        save_file({"a": torch.zeros(1)}, other, metadata={"format": "pt"} if kind == "other metadata" else None)
        return other, photo, "other was not exported by nvit_jax"
    if kind == "other tensors":
        save_file({"a": torch.zeros(1)}, other, metadata={"nvit_jax": facts})
        return other, photo, "other: its tensors are not those that its metadata describes"
    if kind == "broken facts":
        save_file({"a": torch.zeros(1)}, other, metadata={"nvit_jax": "{"})
        return other, photo, "other: its tensors are not those that its metadata describes"
    if kind == "no preprocessing":
        save_file(load_file(model), other, metadata={"nvit_jax": json.dumps({"dims": ragged().dims.to_json()})})
        return other, photo, "does not say how images are prepared"
    if kind == "no photo":
        return model, other, "other cannot be read as an image: No such file or directory"
    other.write_bytes(photo.read_bytes()[:50] if kind == "cut photo" else b"text")
    return model, other, "other cannot be read as an image: "


@pytest.mark.parametrize(
    "kind",
    [
        *("no model", "a folder", "no safetensors", "cut", "no metadata", "other metadata", "other tensors"),
        *("broken facts", "no preprocessing", "no photo", "cut photo", "no image"),
    ],
)
def test_the_pytorch_file_says_what_is_wrong_in_one_line(kind, exported, tmp_path, capsys):
    model, photo, words = damage(kind, exported, tmp_path)
    assert torch_vit.main([str(model), str(photo)]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and words in told.err and not told.out


def test_files_are_as_open_as_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        export.export_model(ragged(), tmp_path / "E", ANY, ("float32",), lambda text: None)
        save_model(tmp_path / "E" / "directory", ragged())
        (tmp_path / "new").touch()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "E").rglob("*") if path.is_file()]
    beside = {"vit.py", "config.json", "README.md", "preprocessor_config.json", "model.json"}
    assert {"model.safetensors", "model.onnx", "model.stablehlo", *beside} <= {path.name for path in files}
    expected = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {
        path.name: oct(expected) for path in files
    }
    assert expected == 0o640


def test_without_pytorch_the_file_is_checked_by_flax(tmp_path, monkeypatch):
    monkeypatch.delattr("nvit_jax.formats.torch_vit")
    monkeypatch.setitem(sys.modules, "nvit_jax.formats.torch_vit", None)
    record = export.export_model(ragged(), tmp_path, ("safetensors",), ("float32",), lambda text: None)[0]
    assert record["run_with"].startswith("Flax") and record["max_abs_diff"] <= 1e-5 * record["max_abs_logit"]


def test_the_stage(finished, tmp_path, capsys):
    """Exports the last model of a run, follows when a later one appears, and says what is missing."""
    workdir = tmp_path / "W"
    shutil.copytree(finished, workdir, symlinks=True)
    shutil.move(workdir / "finetune", tmp_path / "finetune")
    formats = "--config.export.formats=('safetensors','stablehlo')"
    assert call("--workdir", workdir, "--stage", "export", formats) == 0
    assert read(workdir / "export" / "metrics.json")["model"] == "prune"
    shutil.move(tmp_path / "finetune", workdir / "finetune")
    assert call("--workdir", workdir, "--stage", "export", formats) == 0
    metrics = read(workdir / "export" / "metrics.json")
    assert metrics["model"] == "finetune" and len(metrics["files"]) == 2
    assert all((workdir / file["path"]).is_file() for file in metrics["files"])
    assert "finished before" not in capsys.readouterr().out
    for arguments, words in (
        (["--config.export.formats=('tflite',)"], "'tflite' is not one of"),
        (["--config.export.dtypes=('int8',)"], "'int8' is not"),
        (["--config.export.formats=('onnx',)", "--config.export.dtypes=('bfloat16',)"], "lack bfloat16"),
    ):
        assert call("--workdir", workdir, "--stage", "export", "--force", *arguments) == 2
        assert words in capsys.readouterr().err
    assert call("--workdir", tmp_path / "X", "--stage", "export") == 2
    assert "run --stage pretrain first" in capsys.readouterr().err


def test_a_dense_model_is_exported_from_its_directory(tmp_path):
    model = ragged()
    save_model(tmp_path / "model", model)
    place = f"--config.model={tmp_path / 'model'}"
    assert (
        call("--workdir", tmp_path / "W", place, "--stage", "export", "--config.export.formats=('safetensors',)") == 0
    )
    twin = torch_vit.load(str(tmp_path / "W" / "export" / "safetensors" / "model.safetensors"))
    assert twin.dims == model.dims.to_json() and twin.classes == model.info["classes"]
    assert load_model(tmp_path / "model").dims == model.dims
    with torch.inference_mode():
        assert twin(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    assert (ROOT / "nvit_jax" / "formats" / "torch_vit.py").read_text() == (
        tmp_path / "W" / "export" / "safetensors" / "vit.py"
    ).read_text()
