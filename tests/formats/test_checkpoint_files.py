"""convert_deit_weights.py on files as they come: wrappers, formats, what a user may ask for, and all that is wrong."""

import argparse
import json
import pathlib
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.numpy import save_file
from sources import SIZES, numpy_state, small_vit

import convert_deit_weights
import nvit_jax
from nvit_jax.formats.convert import Options, convert
from nvit_jax.formats.weights import open_checkpoint
from nvit_jax.model.groups import flatten
from nvit_jax.model.positions import interpolate_positions

HEADS = Options(heads=SIZES["heads"])


@pytest.fixture(scope="module")
def state():
    return small_vit().state_dict()


def command(*arguments) -> int:
    return convert_deit_weights.main(["convert_deit_weights.py", *[str(a) for a in arguments]])


def same(model, other):
    return all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(flatten(model.params), flatten(other.params), strict=True)
    )


def test_wrappers_and_formats(state, tmp_path):
    plain = tmp_path / "plain.pth"
    torch.save(state, plain)
    expected = convert(plain, HEADS).model
    doubled = {k: 2 * v for k, v in state.items()}
    arguments = argparse.Namespace(lr=1e-3, model="deit_tiny_patch16_224")
    for name, content in {
        "official": {"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 299, "args": arguments},
        "ema": {"model": doubled, "model_ema": state, "args": arguments},
        "timm": {"state_dict": doubled, "state_dict_ema": state},
        "data_parallel": {"model": {f"module.{k}": v for k, v in state.items()}},
        "dino": {"teacher": {f"module.backbone.{k}": v for k, v in state.items()}, "student": doubled, "epoch": 1},
        "parameters": {"model": {k: torch.nn.Parameter(v) for k, v in state.items()}},
    }.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        assert same(convert(path, HEADS).model, expected), name
    assert "'model_ema'" in convert(tmp_path / "ema.pth", HEADS).notes[0]
    chosen = convert(tmp_path / "ema.pth", HEADS._replace(entry="model")).model
    assert np.array_equal(chosen.params["head"]["bias"], 2 * expected.params["head"]["bias"])
    torch.save({"model": state}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "legacy.pth")
    assert same(convert(tmp_path / "legacy.pth", HEADS).model, expected)
    save_file(numpy_state(state), tmp_path / "w.safetensors")
    assert same(convert(tmp_path / "w.safetensors", HEADS).model, expected)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(state, tmp_path, kind):
    from safetensors.torch import save_file as save_torch

    half = {k: v.to(kind) for k, v in state.items()}
    torch.save(half, tmp_path / "w.pth")
    save_torch(half, tmp_path / "w.safetensors")
    models = [convert(tmp_path / f"w.{suffix}", HEADS).model for suffix in ("pth", "safetensors")]
    assert same(*models) and models[0].params["head"]["kernel"].dtype == np.float32
    assert np.array_equal(models[0].params["head"]["bias"], half["head.bias"].float().numpy())


def test_safetensors_need_no_torch(state, tmp_path):
    save_file(numpy_state(state), tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    code = """
import importlib.abc, sys
class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("No module named 'torch'")
sys.meta_path.insert(0, NoTorch())
import convert_deit_weights
for name in ("w.safetensors", "w.pth"):
    place = f"{sys.argv[1]}/{name}"
    print(convert_deit_weights.main(["c", f"--checkpoint={place}", f"--out={place}.d", "--heads=3"]))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("2")
    assert "needs PyTorch: pip install torch" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert (tmp_path / "w.safetensors.d" / "model.json").exists() and not (tmp_path / "w.pth.d").exists()


def test_the_command_says_what_it_found(state, tmp_path, capsys):
    torch.save({"model": state}, tmp_path / "w.pth")
    out = tmp_path / "model"
    assert command("--checkpoint", tmp_path / "w.pth", "--out", out, "--heads=3", "--verify") == 0
    said = capsys.readouterr().out
    for words in (
        "official DeiT",
        "embed 24, 3 blocks, heads 3",
        "mean (0.485",
        "verified: largest difference",
        "written",
    ):
        assert words in said
    assert float(said.split("difference to PyTorch ")[1].split()[0]) < 1e-4
    model = nvit_jax.load_model(out)
    assert (
        model.info["preprocessing"]["interpolation"] == "bicubic" and model.info["provenance"]["checkpoint"] == "w.pth"
    )
    assert command("--checkpoint", tmp_path / "w.pth", "--out", out, "--heads=3") == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    # A failure leaves the old directory as it was; a success replaces it whole.
    (tmp_path / "bad.pth").write_bytes(b"x")
    assert command("--checkpoint", tmp_path / "bad.pth", "--out", out, "--overwrite") == 2
    assert nvit_jax.load_model(out).dims == model.dims
    assert command("--checkpoint", tmp_path / "w.pth", "--out", out, "--heads=3", "--overwrite", "--image=32") == 0
    assert nvit_jax.load_model(out).dims.image == 32
    assert "interpolated from 4x4 to 8x8" in capsys.readouterr().out


def test_interpolated_positions_equal_pytorch(tmp_path):
    """DeiT's own call: F.interpolate(mode="bicubic", align_corners=False)."""
    grid = np.random.default_rng(0).standard_normal((14, 14, 5))
    for sides in ((7, 7), (14, 14), (24, 9), (13, 37)):
        theirs = torch.nn.functional.interpolate(
            torch.from_numpy(grid.transpose(2, 0, 1)[None]), size=sides, mode="bicubic", align_corners=False
        )
        assert np.abs(interpolate_positions(grid, *sides) - theirs[0].numpy().transpose(1, 2, 0)).max() <= 1e-12
    module = small_vit(dist_token=True)
    torch.save(module.state_dict(), tmp_path / "w.pth")
    old = convert(tmp_path / "w.pth", HEADS).model
    new = convert(tmp_path / "w.pth", HEADS._replace(image=24)).model
    assert new.params["positions"].shape == (2 + 36, 24)
    assert np.array_equal(new.params["positions"][:2], old.params["positions"][:2])
    wide = convert(tmp_path / "w.pth", HEADS._replace(image=[8, 24])).model
    assert wide.dims.image == (8, 24) and wide.params["positions"].shape == (2 + 12, 24)
    assert wide.preprocessing.size == (8, 24) and wide.preprocessing.resize == (9, 27)


def test_a_new_classifier(tmp_path):
    for classes in (0, 7):
        torch.save(small_vit(classes=classes).state_dict(), tmp_path / "w.pth")
        found = convert(tmp_path / "w.pth", HEADS._replace(classes=10))
        assert found.model.dims.classes == 10 and not found.model.params["head"]["kernel"].any()
        assert any("holds zeros" in note for note in found.notes)
    torch.save(small_vit(classes=0).state_dict(), tmp_path / "w.pth")
    features = convert(tmp_path / "w.pth", HEADS).model
    assert features.apply(features.params, np.zeros((2, 16, 16, 3), np.float32)).shape == (2, 24)


def test_variants_and_preprocessing(tmp_path, capsys):
    """The published name is found, or must fit; whose pixels they are follows from it."""
    from nvit_jax.formats import torch_vit
    from nvit_jax.model.dims import preset

    def written(name, stem, **changes):
        dims = preset(name, **changes)
        path = tmp_path / f"{stem}.pth"
        torch.save(torch_vit.ViT(dims.to_json()).state_dict(), path)
        return path

    path = written("deit_tiny", "weights", classes=3)
    assert convert(path).model.info["variant"] == "deit_tiny"
    found = convert(path, Options(variant="vit_tiny")).model
    assert found.info["variant"] == "vit_tiny" and found.info["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert found.info["preprocessing"]["resize"] == 248
    found = convert(written("deit_tiny", "vit_tiny_patch16_384", classes=3, image=384)).model
    assert found.info["variant"] == "vit_tiny_384" and found.info["preprocessing"]["resize"] == 384
    found = convert(written("deit_tiny_distilled_384", "d", classes=3)).model
    assert found.info["variant"] == "deit_tiny_distilled_384" and found.info["preprocessing"]["resize"] == 438
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"crop_pct": 0.875, "mean": [0.4] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = convert(path).model.info["preprocessing"]
    assert facts["resize"] == 256 and facts["mean"] == [0.4] * 3 and facts["std"] == [0.5] * 3
    (tmp_path / "config.json").unlink()
    assert command("--checkpoint", path, "--out", tmp_path / "o", "--variant=deit_small") == 2
    assert "contradicts" in capsys.readouterr().err


class Code:
    """What an attacker would put into a pickle."""

    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path(__file__).with_name("pwned"),))


def damaged(state, tmp_path) -> dict:
    """File name -> (content writer, words that the message must have)."""
    numpy = numpy_state(state)

    def saved(content):
        return lambda path: torch.save(content, path)

    def text(data):
        return lambda path: path.write_bytes(data)

    def cut(path):
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def cut_safetensors(path):
        save_file(numpy, path)
        path.write_bytes(path.read_bytes()[:-100])

    def cut_npz(path):
        np.savez(path, **numpy)
        path.write_bytes(path.read_bytes()[:1000])

    def pickled(path):
        path.write_bytes(pickle.dumps({"model": Code()}))

    def changed(**changes):
        out = dict(state) | changes
        return saved({k: v for k, v in out.items() if v is not None})

    nan = state["blocks.1.mlp.fc1.weight"].clone()
    nan[3, 4] = float("nan")
    return {
        "cut.pth": (cut, "truncated or not a PyTorch checkpoint"),
        "cut.safetensors": (cut_safetensors, "truncated or not a safetensors file"),
        "cut.npz": (cut_npz, "truncated, or not an .npz file"),
        "objects.npz": (lambda p: np.savez(p, x=np.array([{}], object)), "holds Python objects"),
        "text.pth": (text(b"hello world"), "not a PyTorch checkpoint"),
        "empty.pth": (text(b""), "not a PyTorch checkpoint"),
        "code.pth": (pickled, "could run code: refused"),
        "code_zip.pth": (saved({"model": state, "x": Code()}), "could run code: refused"),
        "list.pth": (saved([1, 2]), "holds a list, not named tensors"),
        "none.pth": (saved({"epoch": 3}), "holds no tensors"),
        "two.pth": (saved({"a": dict(state), "b": dict(state)}), "choose one with --entry"),
        "w.onnx": (text(b"x"), "ends in none of"),
        "missing.pth": (changed(**{"norm.bias": None}), "missing for the model: norm.bias"),
        "left.pth": (changed(extra=torch.ones(3)), "left over in the file: extra"),
        "both.pth": (changed(extra=torch.ones(3), **{"norm.bias": None}), "extra; missing for the model: norm.bias"),
        "shape.pth": (changed(**{"norm.bias": torch.ones(9)}), "norm.bias has shape (9,), the model asks for (24,)"),
        "attention.pth": (changed(**{"blocks.1.attn.qkv.weight": torch.ones(70, 24)}), "are not 3 heads"),
        "positions.pth": (changed(pos_embed=torch.ones(1, 19, 24)), "no square of patches"),
        "no_positions.pth": (changed(pos_embed=None), "no position embeddings"),
        "qk_norm.pth": (
            changed(**{"blocks.0.attn.q_norm.weight": torch.ones(8)}),
            "missing for the model: blocks.0.attn.k_norm.weight",
        ),
        "nan.pth": (changed(**{"blocks.1.mlp.fc1.weight": nan}), "block_1/fc1/kernel holds values that are not finite"),
        "resnet.pth": (saved({"layer1.0.conv1.weight": torch.ones(2)}), "a ResNet"),
        "swin.pth": (saved({"layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(2)}), "a Swin"),
        "other.pth": (saved({"a.weight": torch.ones(2)}), "not a plain Vision Transformer of a known layout"),
        "cfg.safetensors": (lambda p: save_file(numpy, p, {"nvit_jax": "{"}), "its metadata cannot be read"),
    }


@pytest.mark.filterwarnings("ignore:Unable to retrieve source:UserWarning")
def test_mistakes_are_one_line_and_nothing_is_written(state, tmp_path, capsys):
    cases = damaged(state, tmp_path)
    for name, (write, words) in cases.items():
        write(tmp_path / name)
        out = tmp_path / f"{name}.out"
        assert command("--checkpoint", tmp_path / name, "--out", out, "--heads=3") == 2, name
        error = capsys.readouterr().err.strip()
        assert words in error and len(error.splitlines()) == 1, (name, error)
        assert not out.exists(), name
    assert not pathlib.Path(__file__).with_name("pwned").exists()
    torch.save(state, tmp_path / "good.pth")
    for arguments, words in (
        (["--checkpoint", tmp_path / "nowhere.pth"], "there is no such file"),
        (["--checkpoint", tmp_path], "not a file"),
        (["--checkpoint", tmp_path / "good.pth", "--entry=ema"], "has no entry 'ema'"),
        (["--checkpoint", tmp_path / "good.pth", "--variant=deit_huge", "--heads=3"], "unknown model preset"),
        (["--checkpoint", tmp_path / "good.pth", "--heads=5"], "are not 5 heads"),
        (["--checkpoint", tmp_path / "good.pth"], "say --heads=N"),
        (["--checkpoint", tmp_path / "good.pth", "--heads=3", "--image=30"], "not divisible by the patch size"),
        (["--checkpoint", tmp_path / "good.pth", "--image=many"], "image"),
        (["--checkpoint", tmp_path / "good.pth", "--imagesize=3"], "imagesize"),
        (["surplus", "--checkpoint", tmp_path / "good.pth"], "unexpected argument"),
        ([], "--checkpoint is missing"),
    ):
        assert command(*arguments, "--out", tmp_path / "x") == 2
        error = capsys.readouterr().err.strip()
        assert words in error and len(error.splitlines()) == 1, error
    assert command("--checkpoint", tmp_path / "good.pth") == 2 and "--out is missing" in capsys.readouterr().err


def test_help_and_tensors_by_name(tmp_path, capsys):
    assert command("--help") == 0 and "--checkpoint FILE" in capsys.readouterr().out
    np.savez(tmp_path / "w.npz", a=np.ones((2, 3)), b=np.zeros(4))
    with open_checkpoint(tmp_path / "w.npz") as tensors:
        assert tensors.shapes == {"a": (2, 3), "b": (4,)} and tensors.read("a").sum() == 6


@pytest.mark.slow
def test_deit_b_is_converted_in_little_time_and_memory(tmp_path):
    """In a process of its own: under 20 s, and less than 3 times the file above what the imports take."""
    code = """
import sys, time, pathlib
import torch
from nvit_jax.formats import torch_vit
from nvit_jax.model.dims import preset
path = pathlib.Path(sys.argv[1]) / "w.pth"
if not path.exists():
    torch.save({"model": torch_vit.ViT(preset("deit_base_distilled").to_json()).state_dict()}, path)
    sys.exit()
import orbax.checkpoint
from nvit_jax.formats.convert import convert_checkpoint
def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
before, start = memory("VmRSS"), time.monotonic()
convert_checkpoint(path, path.with_name("model"), say=lambda text: None)
print(time.monotonic() - start, (memory("VmHWM") - before) / path.stat().st_size)
"""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
        )
    seconds, ratio = (float(x) for x in done.stdout.split())
    assert seconds < 20 and ratio < 3, (seconds, ratio)
