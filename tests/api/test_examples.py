"""The examples run, on the demo's data and on models of two narrow blocks."""

import importlib.util
import json

import numpy as np
from conftest import ROOT
from PIL import Image

import nvit_jax as nvit


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prune_the_demo_in_ten_lines(digits_model, tmp_path, capsys):
    digits_model.save(tmp_path / "model")
    example("prune_demo").main(str(tmp_path / "model"), epochs=0.1)
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "%  Model(" in line] == ["dense", "pruned", "finetuned"]


def test_a_checkpoint_with_an_own_loss_and_arrays(digits_model, tmp_path, capsys):
    nvit.export(digits_model, tmp_path, ("safetensors",), say=lambda line: None)
    rng = np.random.default_rng(0)
    photos = []
    for i in range(9):
        photos.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(rng.integers(0, 17, (12, 10), np.uint8)).save(photos[-1])
    small = example("own_loss").main(str(tmp_path / "safetensors" / "model.safetensors"), photos, macs=0.9)
    assert "agrees with the dense model on" in capsys.readouterr().out
    assert small.dims != digits_model.dims


def test_nvits_loop_with_an_own_loader(digits_model, tmp_path, capsys):
    digits_model.save(tmp_path / "model")
    found = example("nvit_loop").main(str(tmp_path / "model"), macs=0.5)
    assert "pruning 1: " in capsys.readouterr().out
    assert found.record["macs_ratio"] <= 0.5 and found.record["prunings"] > 1
    json.dumps(found.record)  # plain values
