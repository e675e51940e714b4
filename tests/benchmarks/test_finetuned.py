"""benchmarks/finetuned.py on made images and a model of two narrow blocks; the docs have the table that it prints."""

import importlib.util
import json

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from safetensors.numpy import save_file
from sources import numpy_state, small_vit

import nvit_jax as nvit
from nvit_jax.files import read_json

SIZES = {"image": 24, "patch": 8, "classes": 5, "embed": 128, "depth": 2, "heads": 2, "mlp": 64}  # heads of 64


@pytest.fixture(scope="module")
def finetuned():
    spec = importlib.util.spec_from_file_location("finetuned", ROOT / "benchmarks" / "finetuned.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path):
    """A checkpoint of another size with other classes, and three classes of images."""
    save_file(numpy_state(small_vit(**SIZES).state_dict()), tmp_path / "vit.safetensors")
    rng = np.random.default_rng(0)
    for name, count in (("train", 12), ("test", 4)):
        for label, kind in enumerate(("cat", "dog", "frog")):
            folder = tmp_path / "images" / name / kind
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(80 * label, 80 * label + 60, (12, 12, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    words = ["--checkpoint", tmp_path / "vit.safetensors", "--images", tmp_path / "images", "--out", tmp_path / "out"]
    small = [
        "--heads",
        2,
        "--image",
        16,
        "--batch",
        8,
        "--train-images",
        32,
        "--epochs",
        2,
        "--seeds",
        1,
        "--ratios",
        0.5,
    ]
    return [str(word) for word in words + small]


def names(out):
    return sorted(path.parent.name for path in out.glob("*/*/result.json"))


def test_runs_resumes_and_repeats_nothing(finetuned, arguments, tmp_path, capsys):
    out = tmp_path / "out"
    finetuned.main([*arguments, "--methods", "one_shot", "nvit", "scratch"])
    printed = capsys.readouterr().out
    assert names(out) == ["dense", "nvit_0.5", "one_shot_0.5", "scratch_0.5"]
    table = finetuned.report(read_json(out / "results.json"))
    assert printed.endswith(table + "\n")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    missing = table.splitlines()[-1].removeprefix("Not run yet: ").split("; ")
    assert len(rows) == 1 + 4 and len(missing) == 2 * 6 - 3  # 1: the titles
    cells = {path.parent.name: read_json(path) for path in out.glob("*/*/result.json")}
    steps = {name: cell["finetuning_steps"] + cell.get("pruning_steps", 0) for name, cell in cells.items()}
    assert set(steps.values()) == {2 * 32 // 8}  # NViT's loop has no more than the others
    assert cells["nvit_0.5"]["pruning_steps"] > 0
    assert cells["scratch_0.5"]["dims"] == cells["one_shot_0.5"]["dims"]
    assert all(cell["macs_ratio"] <= 0.5 for name, cell in cells.items() if name != "dense")
    assert all(cell["test_images"] == 12 and not cell["stopped"] for cell in cells.values())

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "results.json"}
    finetuned.main([*arguments, "--methods", "one_shot", "nvit", "scratch"])
    assert "4 of 4 cells are finished" in (printed := capsys.readouterr().out) and printed.endswith(table + "\n")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "results.json"} == before

    (out / "0" / "scratch_0.5" / "result.json").write_text('{"method": "scra')
    (out / "0" / "one_shot_0.5" / "result.json").unlink()
    finetuned.main([*arguments, "--methods", "one_shot", "nvit", "scratch"])
    assert "2 of 4 cells are finished" in capsys.readouterr().out
    for name in ("scratch_0.5", "one_shot_0.5"):
        again = read_json(out / "0" / name / "result.json")
        assert again["stopped"] and again["top1"] == cells[name]["top1"]
    assert "at least" in finetuned.report(read_json(out / "results.json"))


def test_mistakes_are_told(finetuned, arguments, tmp_path):
    for words, told in (
        ([], "--checkpoint is needed"),
        ([*arguments, "--methods", "scratch"], "--methods: scratch takes its widths from one_shot"),
        (["--table", str(tmp_path / "results.json")], "results.json is missing"),
    ):
        with pytest.raises(nvit.UserError, match=told):
            finetuned.main(words)
    (tmp_path / "out").mkdir()
    options = finetuned.parser().parse_args(arguments)
    (tmp_path / "out" / "settings.json").write_text(json.dumps(finetuned.claim(options) | {"epochs": 7.0}))
    with pytest.raises(nvit.UserError, match="begun with epochs=7.0, not 2.0; take another one"):
        finetuned.main(arguments)


def test_the_table_in_the_docs_is_the_one_that_is_printed(finetuned, tmp_path, capsys):
    results = ROOT / "benchmarks" / "results" / "finetuned_deit_tiny_cpu.json"
    finetuned.main(["--table", str(results)] if results.exists() else ["--table", "--out", str(tmp_path)])
    assert capsys.readouterr().out in (ROOT / "docs" / "results.md").read_text()


def test_rows_are_means_over_seeds(finetuned):
    one = {"method": "dense", "ratio": None, "seed": 0, "top1": 0.90, "seconds": 60.0, "stopped": False}
    other = one | {"seed": 1, "top1": 0.92, "seconds": 120.0, "stopped": True}
    row = finetuned._columns([one, other])
    assert row == ["1.000", "1.000", "1.000", "", "91.00 ± 1.41 %", "2", "at least 1.5"]
