"""A user's mistakes: one line that says what is wrong, exit code 2, and nothing lost."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, call, read

import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stage", "prun"], "did you mean 'prune'"),
        (["--config.prune.target.macs_ration=0.5"], "did you mean 'prune.target.macs_ratio'"),
        (["--config.prune.steps=many"], "many"),
        (["--config.stages=('pretrain','shrink')"], "unknown stage 'shrink'"),
        (["--config.prune.target.macs_ratio=0"], "must be in (0, 1]"),
        (["--config.prune.target.macs_ratio=1.5"], "must be in (0, 1]"),
        (["--config.prune.target.macs_ratio=0.01"], "smallest reachable is"),
        (["--config.prune.criterion=guess"], "config.prune.criterion='guess'"),
        (["--config.prune.mode=never"], "prune.mode='never'"),
        (["--config.prune.profile=phone"], "prune.profile='phone'"),
        (["--config.vit.patch=3"], "not divisible by patch"),
        (["--config.vit.image=8x12"], "or a list of height and width"),
        (["--config.vit.image=(8,12,3)"], "or a list of height and width"),
        (["--config.vit.image=(8,10)"], "image size 8 x 10 is not divisible by patch"),
        (["--config.vit.preset=deit_huge"], "unknown model preset"),
        (["--config.vit.classes=5"], "the model has 5 classes, the data 10"),
        (["--config.data.name=imagenet"], 'is not "digits", "npz", "folder" or "tfds:SET"'),
        (["--config.dtype=int8"], "config.dtype='int8'"),
        (["--config.pretrain.batch=0"], "config.pretrain.batch=0"),
        (["--config.pretrain.batch=6"], "does not divide over 4 devices"),
        (["--config.pretrain.batch=4096"], "larger than the split"),
        (["--config.parallel=ddp"], "config.parallel='ddp'"),
        (["--config.model=/nowhere/model"], "it does not exist"),
        (["--config.latency.table=/nowhere/t.json"], "is missing"),
        (["surplus"], "unexpected argument"),
        (["--config.prune.target.macs_ratio=None"], "set at least one of"),
        (["--config.seed=None"], "cannot be unset"),
        (["--config.prune.protected=(7,)"], "there is no block 7"),
        (["--config.prune.protected=('a',)"], "must be numbers of blocks"),
        (["--config.prune.snapshots=('a',)"], "must decrease from below 1"),
        (["--config.prune.snapshots=(0.9,)"], "do not go with prune.mode=gradual"),
        (["--config.prune.score.from_training=True"], "score.from_training=True: needs prune.criterion=taylor"),
        (["--config.prune.ema=2.0"], "config.prune.ema=2.0: must be in [0, 1)"),
        (["--config.prune.steps=0"], "config.prune.steps=0: must be >= 1"),
        (["--config.prune.floors.qk=0"], "config.prune.floors.qk=0: must be >= 1"),
        (["--config.prune.floors.head=-1"], "config.prune.floors.head=-1: must be >= 0"),
        (["--config.pretrain.keep=first"], "must be last or best"),
        (["--config.pretrain.teacher_tau=0.0"], "config.pretrain.teacher_tau=0.0: must be >= 0.001"),
        (["--config.prune.score.loss=entropy"], "config.prune.score.loss='entropy'"),
        (["--config.compare=('guess',)"], "'guess' is not one of"),
        (["--config.pretrain.log_every=0"], "config.pretrain.log_every=0"),
        (["--config.vit.heads=0"], "must be at least 1"),
        (["--config.latency.batch=64"], "was measured at batch 32"),
        (["--config.latency.roofline.tflops=100.0"], "set tflops and gbs, both > 0, or none"),
        (["--config.latency.widths.embed=1"], "config.latency.widths.embed=1: must be at least 2"),
        (["--config.prune.rule=solve", "--config.prune.mode=iterative"], "solves for a target"),
        (["--processes=2"], "go with --distributed"),
        (["--distributed", "--coordinator=nohost"], "give HOST:PORT"),
        (["--config.seed=-1"], "config.seed=-1: must be from 0"),
        (["--config.matmul_precision=foo"], "must be default, bfloat16"),
        (["--config.pretrain.dropout=1.0"], "config.pretrain.dropout=1.0: must be in [0, 1)"),
        (["--config.pretrain.clip_norm=-1.0"], "config.pretrain.clip_norm=-1.0: must be >= 1e-20"),
        (["--config.pretrain.warmup_epochs=-1.0"], "must be >= 0"),
        (["--config.prune.accumulate=3"], "does not divide batch=64"),
        (["--config.pretrain.learning_rate=1e30"], "is nan at step"),
        (["--config.pretrain.epochs=0.02"], "config.pretrain.epochs=0.02 is not one step (19 batches"),
        (["--config.vit.norm_eps=-1.0"], "config.vit.norm_eps=-1.0: must be >= 1e-20"),
        (["--config.vit.depth=1000000000"], "config.vit.depth=1000000000: must be <= 65,536"),
        (
            ["--config.prune.mode=one_shot", "--config.prune.plain_first=True"],
            "plain_first=True is about training, and",
        ),
        (
            ["--config.prune.target.macs_ratio=None", "--config.prune.target.macs=1e9"],
            "prune.target.macs=1e+09 is more than the unpruned model's",
        ),
    ],
)
def test_mistakes_are_one_line(finished, tmp_path, capsys, arguments, words):
    """Exit code 2, one line, and the run that was there is as it was."""
    workdir = tmp_path / "W"
    in_pretrain = any(a.startswith(("--config.vit", "--config.data", "--config.pretrain")) for a in arguments)
    if not in_pretrain and "--config.model=/nowhere/model" not in arguments:
        shutil.copytree(finished / "pretrain", workdir / "pretrain")
        shutil.copytree(finished / "latency", workdir / "latency")
    stage = [] if arguments[0] == "--stage" else ["--stage", "pretrain" if in_pretrain else "prune"]
    assert call("--workdir", workdir, *stage, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and error.startswith("error: ") and len(error.splitlines()) == 1, error
    assert not (workdir / "prune" / "metrics.json").exists()


def test_mistakes_with_files(finished, tmp_path, capsys, monkeypatch):
    def fails(*arguments, words, **options):
        assert call(*arguments, **options) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and len(error.splitlines()) == 1, error

    file = tmp_path / "file"
    file.write_text("x")
    fails("--workdir", file, words="is not a directory")
    fails("--workdir", "/proc/nvit", words="cannot be written")
    fails("--workdir", tmp_path / "W", config=str(tmp_path / "none.py"), words="there is no such file")
    bad = tmp_path / "bad.py"
    bad.write_text("x = 1\n")
    fails("--workdir", tmp_path / "W", config=str(bad), words="has no function get_config")
    bad.write_text("def get_config(:\n")
    fails("--workdir", tmp_path / "W", config=str(bad), words="cannot be imported")
    assert main.main(["main.py", "--workdir", "W"]) == 2 and "--config is missing" in capsys.readouterr().err
    assert main.main(["main.py", "--config", TINY]) == 2 and "--workdir is missing" in capsys.readouterr().err
    fails("--workdir", tmp_path / "W", "--stage", "prune", words="run --stage pretrain first")
    fails("--workdir", tmp_path / "W", "--stage", "report", words="run --stage eval first")

    damaged = tmp_path / "damaged"
    shutil.copytree(finished / "finetune" / "model", damaged)
    for data_file in (damaged / "params").rglob("*"):
        if data_file.is_file() and data_file.stat().st_size > 1000:
            data_file.write_bytes(data_file.read_bytes()[:100])
    fails("--workdir", tmp_path / "W", "--stage", "prune", f"--config.model={damaged}", words="is damaged")
    (damaged / "model.json").write_text("{")
    fails("--workdir", tmp_path / "W", "--stage", "prune", f"--config.model={damaged}", words="cannot be read")
    fails("--workdir", tmp_path / "W", "--stage", "prune", f"--config.model={file}", words="not a directory")

    other = tmp_path / "other"
    shutil.copytree(finished / "pretrain" / "model", other)
    info = read(other / "model.json")
    info["dims"]["mlp"] = [64, 16]
    (other / "model.json").write_text(json.dumps(info))
    fails(
        "--workdir", tmp_path / "W", "--stage", "prune", f"--config.model={other}", words="block_1/fc1/bias has shape"
    )


def test_keys_are_unset_and_files_checked(tmp_path, capsys):
    from nvit_jax.run.cli import parse

    base = ["main.py", f"--config={ROOT / 'configs' / 'demo.py'}", f"--workdir={tmp_path}"]
    sys.modules.pop("config_config", None)
    _, config, _ = parse([*base, "--config.prune.target.latency_ratio=None", "--config.vit.depth=None"])
    assert config.prune.target.latency_ratio is None and config.vit.depth is None
    _, config, _ = parse([*base, "--config.model=None", "--config.vit.dist_token=True"])
    assert config.model is None and config.vit.dist_token is True
    _, config, _ = parse([*base[:1], base[1] + ":fast", base[2], "--config.prune.target.latency_ratio=0.7"])
    assert config.pretrain.epochs == 3 and config.prune.target.latency_ratio == 0.7
    for text, words in (
        ("import no_such_module\n", "cannot be imported: ModuleNotFoundError"),
        ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'seed': 1})\n", "lacks"),
        (
            "from nvit_jax.run.config import default_config\n"
            "def get_config():\n    c = default_config()\n    c.prune.stepz = 3\n    return c\n",
            "did you mean 'prune.steps'",
        ),
    ):
        (tmp_path / "c.py").write_text(text)
        assert call("--workdir", tmp_path / "W", config=str(tmp_path / "c.py")) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1, error


def test_npz_data_and_its_mistakes(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 64), ("val", 16), ("test", 16)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 10
    path = tmp_path / "data.npz"

    def run(content, stage="pretrain"):
        np.savez(path, **content)
        workdir = tmp_path / f"W{len(list(tmp_path.iterdir()))}"
        arguments = ("--config.data.name=npz", f"--config.data.path={path}", "--config.pretrain.batch=16")
        code = call("--workdir", workdir, "--stage", stage, *arguments)
        return code, capsys.readouterr().err

    assert run(arrays)[0] == 0
    for change, words in (
        ({"train_labels": np.zeros(64, int)}, "one class"),
        ({"val_images": arrays["val_images"][:0], "val_labels": arrays["val_labels"][:0]}, "val split of .* is empty"),
        ({"test_images": arrays["test_images"].astype(float)}, "must be uint8"),
        ({"test_labels": arrays["test_labels"][:3]}, "must be integers"),
        (
            {f"{s}_images": np.zeros((n, 9, 9, 1), np.uint8) for s, n in (("train", 64), ("val", 16), ("test", 16))},
            "the model takes",
        ),
    ):
        code, error = run(arrays | change)
        assert code == 2 and len(error.strip().splitlines()) == 1
        assert __import__("re").search(words, error), error
    path.write_bytes(b"not a zip")
    assert (
        call("--workdir", tmp_path / "X", "--config.data.name=npz", f"--config.data.path={path}", "--stage=pretrain")
        == 2
    )
    assert "not a readable .npz" in capsys.readouterr().err
