"""The program's commands: help without JAX, the nearest name for what is misspelt, configs by name, the short way."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, random_params, read, small_dims
from PIL import Image
from sources import small_vit

import main
import nvit_jax
from nvit_jax import save_model
from nvit_jax.errors import UserError
from nvit_jax.formats.export import write_safetensors
from nvit_jax.model.directory import Model
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.run import cli
from nvit_jax.run.commands.prune import make_plan
from nvit_jax.run.configfile import builtin_names, find_config, load_config


def fails(capsys, *words) -> str:
    """The one line that a command line with a mistake prints."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    out, error = capsys.readouterr()
    assert not out and error.startswith("error: ") and len(error.splitlines()) == 1, (out, error)
    return error


@pytest.fixture
def images(tmp_path) -> pathlib.Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 256, (20, 22, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{name}{i}.png")
    return tmp_path / "images"


@pytest.fixture
def model(tmp_path) -> Model:
    dims = small_dims(image=16, channels=3, classes=3, embed=24, heads=3, mlp=40)
    facts = Preprocessing.imagenet(16).to_json()
    return Model(dims, random_params(dims, dtype=np.float32), info={"preprocessing": facts, "classes": []})


# ------------------------------------------------------------------------------------------- help and version


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--version"], f"nvit-jax {nvit_jax.__version__}\n"),
        (["--help"], "nvit-jax convert FILE DIR"),
        ([], "nvit-jax convert FILE DIR"),
        (["run", "--help"], "examples:\n  nvit-jax run --config demo"),
        (["--config", "demo", "-h"], "examples:\n  nvit-jax run --config demo"),
        (["prune", "--help"], "examples:\n  nvit-jax prune"),
        (["convert", "x.pth", "-h"], "examples:\n  nvit-jax convert"),
    ],
)
def test_help_and_version_import_nothing_large(words, expected):
    code = f"""
import sys
from nvit_jax.run import cli
assert cli.main({words!r}) == 0
print(sorted({{"jax", "absl", "ml_collections", "numpy", "flax"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert expected in done.stdout and done.stdout.endswith("[]\n") and not done.stderr


def test_main_py_is_the_same_program(capsys):
    assert main.main(["main.py", "--version"]) == 0
    assert capsys.readouterr().out == f"nvit-jax {nvit_jax.__version__}\n"
    done = subprocess.run([sys.executable, "main.py", "prnue"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "did you mean 'prune'" in done.stderr


def test_the_help_of_run_names_every_flag_stage_and_config():
    from nvit_jax.run.commands.run import usage
    from nvit_jax.run.config import STAGES
    from nvit_jax.run.flags import _define

    assert all(f"--{name}" in usage() for name in ("config", *_define()))
    assert all(f"\n  {name} " in usage() for name in STAGES)
    assert all(name in usage() for name in builtin_names())


# ----------------------------------------------------------------------------------------------- misspelt


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prnue deit.pth", "unknown command 'prnue'; did you mean 'prune'?"),
        ("measure", "unknown command 'measure' (known: run, prune, convert)"),
        ("export W", "unknown command 'export'; the stage is nvit-jax run --stage export (known: run"),
        ("evaluate W", "unknown command 'evaluate'; the stage is nvit-jax run --stage eval (known: run"),
        ("--verison", "unknown option --verison; did you mean '--version'?"),
        ("run --config demo --workdri W", "unknown option --workdri; did you mean '--workdir'?"),
        ("run --workdir W", "--config is missing"),
        ("run --config", "--config is missing"),
        ("run --config demo", "--workdir is missing"),
        ("run --config demo --workdir W --stage", "Missing value for flag --stage"),
        ("run --config demo --workdir W --stage foo", "unknown stage 'foo' (known: pretrain, latency, prune"),
        ("run --config demo --workdir W --stage finetun", "unknown stage 'finetun'; did you mean 'finetune'?"),
        ("run --config dmeo --workdir W", "did you mean 'demo'? (built in: checkpoint, demo, "),
        ("run --config xyz --workdir W", "no built-in config of that name (built in: checkpoint, demo, "),
        ("run --config none.py --workdir W", "--config=none.py: there is no such file\n"),
        ("run --config nowhere/demo.py --workdir W", "there is a built-in one: --config demo"),
        ("run --config demo:fsat --workdir W", "unknown variant 'fsat'; did you mean 'fast'? (known: fast, gradual)"),
        ("run --config nvit_b:x --workdir W", "unknown variant 'x' (known: tiny)"),
        ("run --config revit_t:x --workdir W", "unknown variant 'x' (known: tiny)"),
        ("run --config transfer:cifar --workdir W", "did you mean 'cifar10'?"),
        ("run --config transfer: --workdir W", "unknown variant '' (known: cifar10, "),
        ("run --config checkpoint:x --workdir W", "this config has no variants"),
        ("run --config demo --workdir W --config.xyz=1", "unknown config key 'xyz'; nvit_jax/run/config.py lists all"),
        ("run --config demo --workdir W --config.xyz=None", "unknown config key 'xyz'"),
        ("run --config demo --workdir W --config.macs_ratio=1", "did you mean 'prune.target.macs_ratio'?"),
        ("run --config demo --workdir W --config.prune.stesp 3", "did you mean 'prune.steps'?"),
        ("run --config demo --workdir W --config.prune.steps=x", "--config.prune.steps=x: must be a whole number"),
        ("run --config demo --workdir W --flagfile=none.txt", "none.txt"),
        ("convert deit.pth", "required: DIR"),
        ("convert deit.pth d e", "unrecognized arguments: e"),
        ("convert deit.pth d --overwrit", "unknown option --overwrit; did you mean '--overwrite'?"),
        ("convert deit.pth d --image 0", "--image: '0': give a whole number, at least 1"),
        ("convert none.pth d", "none.pth: there is no such file"),
        ("prune deit.pth --dta d --out W --macs 0.5", "unknown option --dta; did you mean '--data'?"),
        ("prune deit.pth --data d", "required: --out"),
        ("prune deit.pth --data d --out W", "say how small: --macs, --latency or --params"),
        ("prune deit.pth --data d --out W --macs 60", "--macs: '60': give the part that stays"),
        ("prune deit.pth --data d --out W --macs half", "--macs: 'half': give the part that stays"),
        ("prune deit.pth --data d --out W --macs 0.5 --finetune 0", "'0': give a number above 0"),
        ("prune deit.pth --data d --out W --macs 0.5 --batch 8", "--batch goes with --finetune"),
        ("prune deit.pth --data d --out W --macs 0.5 --config.seed 1", "write --config.seed=VALUE"),
        ("prune none.pth --data d --out W --macs 0.5", "none.pth: there is no such file or directory"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, *line.split())
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- configs


def test_every_builtin_config_loads_by_its_name():
    names = builtin_names()
    assert {"demo", "checkpoint", "transfer", "nvit_b", "revit_t"} <= set(names)
    for name in names:
        assert find_config(name).samefile(ROOT / "configs" / f"{name}.py")
        assert "prune" in load_config(name)
    assert load_config("demo:fast").pretrain.epochs == 3 and load_config("demo").pretrain.epochs == 20
    assert load_config(f"{ROOT / 'configs' / 'demo.py'}:fast").pretrain.epochs == 3


def test_a_file_comes_before_a_builtin_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "from nvit_jax.run.config import default_config\ndef get_config():\n    return default_config()\n"
    (tmp_path / "demo").write_text(text)
    assert find_config("demo").samefile(tmp_path / "demo") and load_config("demo").vit.image is None


@pytest.mark.parametrize("switch", ["pretrain.remat", "prune.score.remat", "prune.compensate"])
def test_a_switch_takes_no_value_even_where_it_may_be_unset(switch):
    from nvit_jax.run.flags import parse

    words = [f"--config={ROOT / 'tests' / 'tiny.py'}", f"--config.{switch}", "--workdir=new"]
    found = parse(["nvit-jax", *words])[1]
    for name in switch.split("."):
        found = found[name]
    assert found is True


def test_overrides_may_stand_anywhere_and_the_last_config_counts():
    words = "x --config.seed=1 --config demo --workdir W --force --config.prune.steps 2 --config=demo:fast --noforce"
    flags, config, names = cli.parse([*words.split(), "--config.latency.roofline.tflops=None"])
    assert (config.seed, config.prune.steps, config.pretrain.epochs) == (1, 2, 3)
    assert flags.workdir == "W" and not flags.force and names == tuple(config.stages)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sys\nsys.exit('wrong machine')\n", "cannot be imported: it calls sys.exit('wrong machine')"),
        ("import sys\ndef get_config(): sys.exit()\n", "get_config() fails: it calls sys.exit()"),
        ("def get_config(): raise KeyError('a\\nb')\n", "get_config() fails: KeyError: 'a"),
        ("def get_config(): return None\n", "returns a NoneType, not a ConfigDict"),
        ("def get_config(variant): return None\n", "needs a variant"),
        ("get_config = 1\n", "has no function get_config()"),
    ],
)
def test_a_config_file_that_fails(capsys, tmp_path, text, words):
    (tmp_path / "c.py").write_text(text)
    assert words in fails(capsys, "run", "--config", tmp_path / "c.py", "--workdir", tmp_path / "W")


# ---------------------------------------------------------------------------------------------- the commands


def test_convert(capsys, tmp_path):
    torch.save(small_vit().state_dict(), tmp_path / "w.pth")
    words = [str(tmp_path / "w.pth"), str(tmp_path / "model"), "--heads", "3"]
    assert cli.main(["convert", *words]) == 0
    assert f"written: {tmp_path / 'model'}" in capsys.readouterr().out
    assert nvit_jax.load_model(tmp_path / "model").dims.heads == (3, 3, 3)
    assert "model exists; --overwrite replaces it" in fails(capsys, "convert", *words)
    assert main.main(["main.py", "convert", *words, "--overwrite", "--classes=5", "--verify"]) == 0
    assert "and the check says nothing" in capsys.readouterr().out  # its new classifier is 0
    assert nvit_jax.load_model(tmp_path / "model").dims.classes == 5


def test_the_plan_of_prune(tmp_path, images, model):
    save_model(tmp_path / "model", model)
    (tmp_path / "w.pth").write_bytes(b"not opened")
    classes = str(tmp_path / "c.tsv")
    pathlib.Path(classes).write_text("not read")
    data = ["--data", str(images), "--out", str(tmp_path / "W")]
    plan = make_plan([str(tmp_path / "model"), *data, "--macs", "0.6"])
    c = plan.config
    assert plan.names == ("eval", "prune", "eval", "report") and plan.checkpoint is None and not plan.force
    assert c.model == str(tmp_path / "model") and plan.workdir == tmp_path / "W"
    assert (c.data.name, c.data.train, c.data.val, c.data.holdout) == ("folder", str(images), None, 0.2)
    assert c.prune.target.to_dict() == {
        "macs_ratio": 0.6, "latency_ratio": None, "params_ratio": None, "macs": None, "latency_ms": None, "params": None
    }  # fmt: skip
    more = ["--latency=0.5", "--params", "0.7", "--val", str(images), "--classes", classes, "--criterion", "magnitude"]
    more += ["--finetune", "5", "--batch", "16", "--export", "safetensors,stablehlo", "--config.seed=3"]
    plan = make_plan([str(tmp_path / "w.pth"), *data, *more, "--config.finetune.warmup_epochs=2"])
    c = plan.config
    assert plan.names == ("latency", "eval", "prune", "eval", "finetune", "eval", "export", "report")
    assert plan.checkpoint == tmp_path / "w.pth" and c.model == str(tmp_path / "W" / "model")
    assert (c.data.train, c.data.val, c.data.holdout, c.data.classes) == (str(images), str(images), None, classes)
    assert (c.prune.target.latency_ratio, c.prune.target.params_ratio, c.prune.target.macs_ratio) == (0.5, 0.7, None)
    assert (c.prune.criterion, c.finetune.epochs, c.finetune.batch, c.seed) == ("magnitude", 5.0, 16, 3)
    assert c.finetune.warmup_epochs == 2.0 and tuple(c.export.formats) == ("safetensors", "stablehlo")
    assert make_plan([str(tmp_path / "w.pth"), *data, "--macs=1", "--finetune=1"]).config.finetune.warmup_epochs == 0.1
    plan = make_plan([str(tmp_path / "model"), *data, "--macs", "0.6", "--finetune", "1", "--force"])
    assert plan.names == ("prune", "finetune", "eval", "report") and plan.force


def test_prune_takes_a_folder_of_train_and_val(tmp_path, images, model):
    save_model(tmp_path / "model", model)
    for name in ("train", "val"):
        (tmp_path / "set" / name).mkdir(parents=True)
    c = make_plan([str(tmp_path / "model"), "--data", str(tmp_path / "set"), "--out=W", "--macs=0.5"]).config
    assert (c.data.train, c.data.val) == (str(tmp_path / "set" / "train"), str(tmp_path / "set" / "val"))
    assert c.data.holdout is None


def test_mistakes_of_prune_with_files(tmp_path, images, model, capsys):
    save_model(tmp_path / "model", model)
    base = [str(tmp_path / "model"), "--data", str(images), "--out", str(tmp_path / "W"), "--macs", "0.5"]
    for more, words in (
        (["--data", "none"], "--data=none: there is no such directory"),
        (["--val", "none"], "--val=none: there is no such directory"),
        (["--criterion", "fihser"], "prune.criterion='fihser'"),
        (["--export", "tflite"], "'tflite' is not one of"),
        (["--config.prune.stesp=3"], "did you mean 'prune.steps'?"),
    ):
        with pytest.raises(UserError) as caught:
            make_plan([*base, *more])
        assert words in str(caught.value)
    torch.save(small_vit().state_dict(), tmp_path / "w.pth")
    assert cli.main(["prune", str(tmp_path / "w.pth"), *base[1:]]) == 2
    assert "say --heads=N, with nvit-jax convert" in capsys.readouterr().err


@pytest.mark.slow
def test_prune_from_a_checkpoint_to_a_finetuned_model(tmp_path, images, model):
    """Half a minute each: pruned; the same again with finetuning; another file is refused."""
    (tmp_path / "exported").mkdir()
    write_safetensors(model, tmp_path / "exported")
    checkpoint = str(tmp_path / "exported" / "model.safetensors")

    def prune(*words):
        command = [sys.executable, str(ROOT / "main.py"), "prune", *words, "--data=images", "--out=W", "--macs=0.7"]
        return subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)

    done = prune(checkpoint)
    assert done.returncode == 0, done.stderr
    assert "no --val: 0.2 of the images in images are kept for evaluation" in done.stdout
    assert "the small model: W/prune/model\nnext, to train it: nvit-jax prune " in done.stdout
    assert list(read(tmp_path / "W" / "summary.json")) == ["dense", "pruned"]
    provenance = json.loads((tmp_path / "W" / "model" / "model.json").read_text())["provenance"]
    assert provenance["checkpoint"] == "model.safetensors" and len(provenance["content"]) == 8
    done = prune(checkpoint, "--finetune=1", "--batch=16")
    assert done.returncode == 0, done.stderr
    assert "W/model: converted before" in done.stdout and "[prune] finished before" in done.stdout
    assert "the small model: W/finetune/model" in done.stdout
    assert list(read(tmp_path / "W" / "summary.json")) == ["dense", "pruned", "finetuned"]
    torch.save(small_vit().state_dict(), tmp_path / "w.pth")
    done = prune("w.pth")
    assert done.returncode == 2 and "W/model was made from model.safetensors, not from this w.pth" in done.stderr
