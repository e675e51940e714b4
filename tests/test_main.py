"""The command line: every stage, every file of the contract, every mistake in one line."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, call, read

import main
import nvit_jax
from nvit_jax import checkpoint
from nvit_jax.data import load_dataset
from nvit_jax.dims import ViTDims, count_macs, count_params

R_KEYS = {"top1", "top5", "params", "macs", "latency_ms", "latency_batch", "images"}


def test_files_and_keys_of_the_contract(finished):
    summary = read(finished / "summary.json")
    assert list(summary) == ["dense", "pruned", "finetuned"]
    assert all(set(r) == R_KEYS for r in summary.values())
    assert set(read(finished / "prune" / "metrics.json")) == {
        "criterion",
        "target",
        "latency_ratio",
        "predicted_latency_ratio",
        "macs_ratio",
        "params_ratio",
        "predicted_latency_ms",
        "measured_latency_ms",
        "dense_latency_ms",
        "masked_vs_compact_max_abs_diff",
        "calibration_overlap",
        "dims",
        "seconds",
    }
    evaluated = read(finished / "eval" / "metrics.json")
    assert set(evaluated) == R_KEYS | {"loss", "images_per_second", "device", "dtype", "calibration_overlap"}
    assert {k: evaluated[k] for k in R_KEYS} == summary["finetuned"]
    for stage in ("pretrain", "latency", "prune", "finetune", "eval", "report"):
        assert (finished / stage / "metrics.json").exists()
    for stage in ("pretrain", "prune", "finetune"):
        assert (finished / stage / "model" / "model.json").exists()
        assert list((finished / stage / "tensorboard").iterdir())
        assert (finished / stage / "log.jsonl").exists()
    config = read(finished / "config.json")
    assert config["config"]["prune.target.macs_ratio"] == 0.7
    assert {"jax", "python", "nvit_jax"} <= set(config["versions"])


def test_the_numbers_agree_with_the_files(finished):
    summary, metrics = read(finished / "summary.json"), read(finished / "prune" / "metrics.json")
    dims = ViTDims.from_json(metrics["dims"])
    assert summary["pruned"]["macs"] == count_macs(dims) and summary["pruned"]["params"] == count_params(dims)
    assert metrics["macs_ratio"] == summary["pruned"]["macs"] / summary["dense"]["macs"] <= 0.7
    assert metrics["latency_ratio"] == pytest.approx(metrics["measured_latency_ms"] / metrics["dense_latency_ms"])
    assert metrics["masked_vs_compact_max_abs_diff"] < 1e-4
    history = [json.loads(line) for line in (finished / "prune" / "history.jsonl").read_text().splitlines()]
    assert [line["pruning"] for line in history] == list(range(1, len(history) + 1))
    assert [line["step"] for line in history] == [6 * i for i in range(len(history))] and len(history) > 1
    assert history[-1]["met"] and history[-1]["macs"] == summary["pruned"]["macs"]
    assert {"threshold", "removed", "dims", "predicted_latency_ms", "params", "val_top1", "val_loss"} <= set(history[0])
    removed = sum(line["removed"]["embed"] for line in history)
    assert removed == 32 - dims.embed
    assert [64 - sum(line["removed"]["mlp"][i] for line in history) for i in range(2)] == list(dims.mlp)


def test_the_python_api_gives_the_accuracy_of_the_report(finished):
    model = nvit_jax.load_model(finished / "finetune" / "model")
    test = load_dataset("digits").splits["test"]
    facts = model.info["preprocessing"]
    images = (test.images / facts["scale"] - facts["mean"]) / facts["std"]
    logits = model.apply(model.params, images.astype(np.float32))
    assert logits.shape == (360, 10)
    top1 = float((np.asarray(logits).argmax(1) == test.labels).mean())
    assert top1 == pytest.approx(read(finished / "summary.json")["finetuned"]["top1"], abs=1e-9)
    masked = nvit_jax.load_model(finished / "prune" / "masked")
    compact = nvit_jax.load_model(finished / "prune" / "model")
    difference = masked.apply(masked.params, images[:8]) - compact.apply(compact.params, images[:8])
    assert float(np.abs(difference).max()) < 1e-4


def test_the_report_is_one_page_without_outside_links(finished):
    page = (finished / "report.html").read_text()
    assert page.count("<svg") == 6 and "<table>" in page
    for word in ("src=", 'href="http', "@import", "<script"):
        assert word not in page
    for word in (
        "finetuned",
        "Widths per block",
        "Sensitivity",
        "Saliency of the model before",
        "magnitude",
        "prune.target.macs_ratio",
    ):
        assert word in page


def test_the_comparison_reaches_the_same_target(finished):
    other = read(finished / "compare" / "magnitude" / "prune" / "metrics.json")
    assert other["criterion"] == "magnitude" and other["macs_ratio"] <= 0.7


def test_a_finished_stage_is_left_alone_and_changed_keys_are_refused(finished, capsys, tmp_path):
    workdir = tmp_path / "W"
    shutil.copytree(finished, workdir, symlinks=True)
    before = (workdir / "pretrain" / "metrics.json").stat().st_mtime_ns
    compare = "--config.compare=('magnitude',)"
    assert call("--workdir", workdir, compare) == 0
    out = capsys.readouterr().out
    assert out.count("finished before") == 9
    # A key of a later stage may differ; one of the stage itself may not.
    assert call("--workdir", workdir, "--stage", "pretrain", "--config.prune.steps=9") == 0
    assert call("--workdir", workdir, "--stage", "pretrain", "--config.pretrain.epochs=3") == 2
    assert "pretrain.epochs: 2.0 -> 3.0" in capsys.readouterr().err
    assert (workdir / "config.json").read_text() == (finished / "config.json").read_text()
    assert (workdir / "pretrain" / "metrics.json").stat().st_mtime_ns == before
    # --force redoes it and makes the later stages stale.
    assert call("--workdir", workdir, "--stage", "prune", "--force") == 0
    assert read(workdir / "finetune" / "stage.json")["status"] == "stale"
    assert read(workdir / "pretrain" / "stage.json")["status"] == "done"
    assert call("--workdir", workdir, "--stage", "finetune") == 0
    assert read(workdir / "finetune" / "stage.json")["status"] == "done"


def test_other_modes_and_a_model_directory(finished, tmp_path):
    """One pretrained model serves many prunings; a pruned model is pruned again; from_scratch."""
    first = tmp_path / "one_shot"
    model = f"--config.model={finished / 'finetune' / 'model'}"
    arguments = (
        model,
        "--config.prune.mode=one_shot",
        "--config.prune.criterion=fisher",
        "--config.prune.score.loss=drawn",
    )
    assert call("--workdir", first, *arguments, "--stage", "prune") == 0
    assert read(first / "prune" / "metrics.json")["predicted_latency_ratio"] is None
    assert call("--workdir", first, *arguments, "--stage", "finetune", "--config.finetune.from_scratch=True") == 0
    assert call("--workdir", first, *arguments, "--stage", "eval") == 0
    assert list(read(first / "summary.json")) == ["dense", "pruned", "finetuned"]
    # A masked model directory is as good as its compact one.
    masked = f"--config.model={finished / 'prune' / 'masked'}"
    assert call("--workdir", tmp_path / "masked", masked, "--stage=eval") == 0
    again = read(tmp_path / "masked" / "summary.json")["dense"]
    assert again["top1"] == read(finished / "summary.json")["pruned"]["top1"]
    second = tmp_path / "iterative"
    model = f"--config.model={finished / 'pretrain' / 'model'}"
    table = f"--config.latency.table={finished / 'latency' / 'metrics.json'}"
    arguments = ("mode=iterative", "groups_per_step=1", "target.macs_ratio=0.4", "align=shared", "rule=eta")
    overrides = [f"--config.prune.{a}" for a in (*arguments, "criterion=taylor")]
    assert call("--workdir", second, model, table, "--stage=prune", "--config.parallel=pmap", *overrides) == 0
    history = (second / "prune" / "history.jsonl").read_text().splitlines()
    assert all(json.loads(line)["groups"] <= 1 for line in history) and len(history) > 2


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
        (["--config.vit.preset=deit_huge"], "unknown model preset"),
        (["--config.vit.classes=5"], "the model has 5 classes, the data 10"),
        (["--config.data.name=imagenet"], 'is not "digits", "npz" or "folder"'),
        (["--config.dtype=int8"], "config.dtype='int8'"),
        (["--config.pretrain.batch=0"], "config.pretrain.batch=0"),
        (["--config.pretrain.batch=6"], "does not divide over 4 devices"),
        (["--config.pretrain.batch=4096"], "larger than the split"),
        (["--config.parallel=fsdp"], "config.parallel='fsdp'"),
        (["--config.model=/nowhere/model"], "it does not exist"),
        (["--config.latency.table=/nowhere/t.json"], "is missing"),
        (["surplus"], "unexpected argument"),
        (["--config.prune.target.macs_ratio=None"], "set at least one of"),
        (["--config.seed=None"], "cannot be unset"),
        (["--config.prune.protected=(7,)"], "there is no block 7"),
        (["--config.prune.score.loss=entropy"], "config.prune.score.loss='entropy'"),
        (["--config.compare=('guess',)"], "'guess' is not one of"),
        (["--config.pretrain.log_every=0"], "config.pretrain.log_every=0"),
        (["--config.vit.heads=0"], "must be at least 1"),
        (["--config.latency.batch=64"], "was measured at batch 32"),
        (["--processes=2"], "go with --distributed"),
        (["--config.pretrain.learning_rate=1e30"], "is nan at step"),
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
    from nvit_jax.cli import parse

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
            "from nvit_jax.config import default_config\n"
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


def test_help_names_the_stages_and_answers_fast():
    start = time.monotonic()
    done = subprocess.run([sys.executable, "main.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 1.5
    for stage in ("pretrain", "latency", "prune", "finetune", "eval", "report"):
        assert stage in done.stdout


def test_permission_and_full_disk_keep_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model"
    with checkpoint.new_directory(path) as beside:
        (beside / "a").write_text("old")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "mkdir", refuse)
        with pytest.raises(nvit_jax.UserError, match="no permission to write"), checkpoint.new_directory(path):
            pass

    # A child that may write files of at most 4 KiB stands for a full disk.
    code = f"""
import pathlib, resource, signal, numpy as np
from nvit_jax import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
saver = checkpoint.StateSaver(pathlib.Path({str(tmp_path / "state")!r}))
for where in (lambda: saver.save(2, {{"x": np.random.rand(10000)}}), ):
    try:
        where()
    except Exception as error:
        print(type(error).__name__, error)
try:
    with checkpoint.new_directory(pathlib.Path({str(path)!r})) as beside:
        checkpoint.save_arrays(beside / "params", {{"x": np.random.rand(10000)}})
except Exception as error:
    print(type(error).__name__, error)
"""
    saver = checkpoint.StateSaver(tmp_path / "state")
    saver.save(1, {"x": np.arange(3.0)})
    saver.close()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2 and all(line.startswith("UserError") and "could not write" in line for line in lines), done
    assert (path / "a").read_text() == "old"
    saver = checkpoint.StateSaver(tmp_path / "state")
    step, state = saver.restore({"x": np.zeros(3)}, print)
    assert step == 1 and state["x"].tolist() == [0, 1, 2]


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path):
    saver = checkpoint.StateSaver(tmp_path)
    for step in (3, 5):
        saver.save(step, {"x": np.full(5000, float(step)), "n": np.int32(step)})
    biggest = max((f for f in (tmp_path / "5").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(biggest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    biggest.write_bytes(content)
    said = []
    step, state = saver.restore({"x": np.zeros(5000), "n": np.int32(0)}, said.append)
    assert step == 3 and state["n"] == 3 and "is damaged" in said[0]
    saver.save(5, {"x": np.full(5000, 5.0), "n": np.int32(5)})
    assert saver.restore({"x": np.zeros(5000), "n": np.int32(0)}, said.append)[0] == 5
