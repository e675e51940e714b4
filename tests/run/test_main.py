"""The command line: every stage, every file of the contract, every mistake in one line."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, call, read

import nvit_jax
from nvit_jax.data.datasets import load_dataset
from nvit_jax.model.dims import ViTDims, count_macs, count_params

R_KEYS = {"top1", "top5", "params", "macs", "latency_ms", "latency_batch", "images"}


def test_files_and_keys_of_the_contract(finished):
    summary = read(finished / "summary.json")
    assert list(summary) == ["dense", "pruned", "finetuned"]
    assert all(set(r) == R_KEYS for r in summary.values())
    assert set(read(finished / "prune" / "metrics.json")) == {
        "criterion",
        "target",
        "latency_ratio",
        "latency_source",
        "predicted_latency_ratio",
        "macs_ratio",
        "params_ratio",
        "predicted_latency_ms",
        "measured_latency_ms",
        "dense_latency_ms",
        "masked_vs_compact_max_abs_diff",
        "calibration_overlap",
        "bad_images",
        "input_wait_seconds",
        "peak_memory_bytes",
        "dims",
        "seconds",
    }
    evaluated = read(finished / "eval" / "metrics.json")
    assert set(evaluated) == R_KEYS | {
        "loss",
        "images_per_second",
        "device",
        "dtype",
        "calibration_overlap",
        "bad_images",
    }
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
    raw, labels = test.read()
    images = (raw / facts["scale"] - facts["mean"]) / facts["std"]
    logits = model.apply(model.params, images.astype(np.float32))
    assert logits.shape == (360, 10)
    top1 = float((np.asarray(logits).argmax(1) == labels).mean())
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


def test_a_workdir_older_than_a_config_key(finished, tmp_path, capsys):
    workdir = tmp_path / "W"
    shutil.copytree(finished, workdir, symlinks=True)
    record = read(workdir / "pretrain" / "stage.json")
    del record["keys"]["pretrain.keep"]  # the version that made it did not know the key
    record["keys"]["pretrain.no_more"] = 1  # and this version does not know that one
    (workdir / "pretrain" / "stage.json").write_text(json.dumps(record))
    assert call("--workdir", workdir, "--stage=pretrain") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{workdir}: pretrain; on cpu") and "finished before" in out
    assert call("--workdir", workdir, "--stage=pretrain", "--config.pretrain.keep=best") == 2
    assert "(pretrain.keep: 'last' -> 'best')" in capsys.readouterr().err


def test_the_best_evaluated_model_is_kept(finished, tmp_path):
    """A learning rate that ruins a good model, but for its first step, whose rate is 0: the best is the first."""
    keys = ("keep=best", "eval_every=1", "log_every=1", "epochs=1", "warmup_epochs=1", "learning_rate=10.0")
    start = f"--config.pretrain.start={finished / 'pretrain' / 'model'}"
    arguments = ["--stage=pretrain", start, *(f"--config.pretrain.{key}" for key in keys)]
    assert call("--workdir", tmp_path / "W", *arguments) == 0
    place = tmp_path / "W" / "pretrain"
    lines = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    best = max(line["val_top1"] for line in lines)
    metrics = read(place / "metrics.json")
    assert metrics["val_top1"] == best > lines[-1]["val_top1"] + 0.2
    assert metrics["step"] == next(line["step"] for line in lines if line["val_top1"] == best) < metrics["steps"]
    model, data = nvit_jax.load_model(place / "model"), load_dataset("digits")
    images, labels = data.split("val").read()
    found = np.asarray(model.apply(model.params, data.preprocessing(images))).argmax(1)
    assert (found == labels).mean() == pytest.approx(best)


@pytest.mark.slow
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
    table = f"--config.latency.table={finished / 'latency' / 'table.json'}"
    arguments = ("mode=iterative", "groups_per_step=1", "target.macs_ratio=0.4", "align=shared", "rule=eta")
    overrides = [f"--config.prune.{a}" for a in (*arguments, "criterion=taylor")]
    assert call("--workdir", second, model, table, "--stage=prune", "--config.parallel=pmap", *overrides) == 0
    history = (second / "prune" / "history.jsonl").read_text().splitlines()
    assert all(json.loads(line)["groups"] <= 1 for line in history) and len(history) > 2


def test_a_device_that_is_not_here(finished, tmp_path, capsys):
    """The roofline takes the table's place, solved for; what is measured here is said to be another matter."""
    arguments = [f"--config.model={finished / 'pretrain' / 'model'}", "--config.latency.roofline.tflops=0.1"]
    arguments += ["--config.latency.roofline.gbs=10.0", "--config.prune.rule=solve", "--config.prune.mode=one_shot"]
    arguments += ["--config.prune.criterion=fisher", "--config.prune.target.latency_ratio=0.6"]
    assert call("--workdir", tmp_path, *arguments, "--stage=latency") == 0
    assert read(tmp_path / "latency" / "metrics.json")["device"].startswith("estimate (roofline of 0.1 TFLOP/s")
    assert call("--workdir", tmp_path, *arguments, "--stage=prune") == 0
    assert "latency is an estimate (roofline of 0.1 TFLOP/s, 10 GB/s), not measured" in capsys.readouterr().out
    found = read(tmp_path / "prune" / "metrics.json")
    assert found["predicted_latency_ratio"] <= 0.6 and found["macs_ratio"] <= 0.7


def test_help_names_the_stages_and_answers_fast():
    start = time.monotonic()
    done = subprocess.run([sys.executable, "main.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 1.5
    for stage in ("pretrain", "latency", "prune", "finetune", "eval", "report"):
        assert stage in done.stdout
