"""Exports compute what the model computes, wherever they are loaded; the stage, its files, and what can be wrong."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from conftest import ROOT, call, random_params, read
from PIL import Image

from nvit_jax import load_model, save_model
from nvit_jax.formats import export
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.directory import Model

PREPROCESSING = {
    "size": 16,
    "scale": 255.0,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
    "resize": 20,
    "interpolation": "bicubic",
}


def ragged(**changes) -> Model:
    values = {
        "image": 16, "patch": 4, "classes": 7, "embed": 18, "heads": (2, 1), "qk": (5, 3), "v": (4, 6), "mlp": (9, 20),
        "qk_scale": 0.3, "dist_token": True,
    }  # fmt: skip
    dims = ViTDims(**(values | changes))
    info = {"preprocessing": PREPROCESSING, "classes": [f"class {i}" for i in range(7)], "variant": None}
    return Model(dims, random_params(dims, dtype=np.float32), info=info)


@pytest.mark.parametrize(
    "changes",
    [{}, {"dist_token": False, "pool": "mean", "norm_after_pool": True, "pre_logits": 6, "activation": "gelu_tanh"}],
)
def test_every_format_computes_the_same(changes, tmp_path):
    model, said = ragged(**changes), []
    records = export.export_model(model, tmp_path / "export", tuple(export.FORMATS), ("float32",), said.append)
    assert [r["format"] for r in records] == ["safetensors", "stablehlo", "onnx"] and len(said) == 3
    for record in records:
        assert record["max_abs_diff"] <= 1e-4 * max(1, record["max_abs_logit"])
        assert (tmp_path / record["path"]).stat().st_size == record["bytes"]
    assert records[0]["run_with"].startswith("PyTorch")
    # Again from the files alone, as another program reads them, at a batch size of its own.
    images = np.random.default_rng(3).standard_normal((5, 16, 16, 3)).astype(np.float32)
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
    from nvit_jax.data.datasets import Preprocessing

    pre = Preprocessing.from_json(PREPROCESSING)
    raw = pre.crop()((place / "photo.png").read_bytes())
    expected = model.apply(model.params, pre(raw[None]))[0]
    assert np.abs(np.array(found) - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    told = subprocess.run([sys.executable, "vit.py", "model.safetensors", "photo.png"], **run).stdout
    assert f"class {int(np.argmax(found))} class {int(np.argmax(found))}" in told.splitlines()[1]


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
    from nvit_jax.formats import torch_vit

    twin = torch_vit.load(str(tmp_path / "W" / "export" / "safetensors" / "model.safetensors"))
    assert twin.dims == model.dims.to_json() and twin.classes == model.info["classes"]
    assert load_model(tmp_path / "model").dims == model.dims
    with torch.inference_mode():
        assert twin(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    assert (ROOT / "nvit_jax" / "torch_vit.py").read_text() == (
        tmp_path / "W" / "export" / "safetensors" / "vit.py"
    ).read_text()
