"""Runs that are killed end with the same parameters, masks and logs, bit for bit, as one that was not."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, call

import nvit_jax
from nvit_jax.model.groups import flatten

# Long enough loops, with frequent saves, for kills to fall into them and into the saves themselves.
ARGUMENTS = [
    "--config=tests/tiny.py",
    "--config.stages=('pretrain','prune','finetune')",
    "--config.pretrain.epochs=4",
    "--config.pretrain.keep=best",
    "--config.finetune.epochs=4",
    "--config.prune.target.macs_ratio=0.5",
    "--config.prune.steps=4",
    "--config.prune.interval=20",
]
SAME = [f"{stage}/log.jsonl" for stage in ("pretrain", "prune", "finetune")] + ["prune/history.jsonl"]


def start(workdir: pathlib.Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "main.py", *ARGUMENTS, "--workdir", str(workdir), *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(workdir: pathlib.Path, *more: str) -> str:
    process = start(workdir, *more)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "W"
    finish(workdir)
    return workdir


def assert_same_run(workdir: pathlib.Path, undisturbed: pathlib.Path) -> None:
    for name in SAME:
        assert (workdir / name).read_text() == (undisturbed / name).read_text(), name
    for name in ("pretrain/model", "prune/masked", "prune/model", "finetune/model"):
        ours, theirs = (nvit_jax.load_model(place / name) for place in (workdir, undisturbed))
        assert ours.dims == theirs.dims
        for (path, a), (_, b) in zip(flatten(ours.params), flatten(theirs.params), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{name}: {path}")
        if ours.masks is not None:
            for a, b in zip(ours.masks, theirs.masks, strict=True):
                np.testing.assert_array_equal(a, b)


def wait_for_a_state(process: subprocess.Popen, directory: pathlib.Path) -> bool:
    """Until the stage has saved something, completely; False when the process ended first."""
    while process.poll() is None:
        if directory.is_dir() and any(place.name.isdigit() for place in directory.iterdir()):
            return True
        time.sleep(0.005)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_sigkill_anywhere(undisturbed, tmp_path, seed):
    """Kills at random moments of each stage, inside saves too; then it is let through."""
    draw = random.Random(seed)
    workdir = tmp_path / "W"
    killed, output = set(), ""
    for stage in ("pretrain", "prune", "finetune"):
        process = start(workdir)
        if wait_for_a_state(process, workdir / stage / "state"):
            time.sleep(draw.uniform(0, 0.3))
            if process.poll() is None:
                killed.add(stage)
        process.kill()
        output += process.communicate()[0]
    output += finish(workdir)
    assert killed == {"pretrain", "prune", "finetune"} and "resumes at step" in output, (killed, output)
    assert_same_run(workdir, undisturbed)


@pytest.mark.slow
def test_sigterm_saves_and_exits(undisturbed, tmp_path):
    workdir = tmp_path / "W"
    process = start(workdir)
    assert wait_for_a_state(process, workdir / "pretrain" / "state")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    assert "stopped at step" in output and "Traceback" not in output
    stopped = int(output.split("stopped at step ")[1].split(";")[0])
    assert (workdir / "pretrain" / "state" / str(stopped)).is_dir()
    assert f"resumes at step {stopped}" in finish(workdir)
    assert_same_run(workdir, undisturbed)


@pytest.mark.slow
def test_where_and_how_a_run_goes_on_may_change(undisturbed, tmp_path):
    """What changes no numbers may be another after a stop; the other keys may not."""
    workdir = tmp_path / "W"
    process = start(workdir)
    assert wait_for_a_state(process, workdir / "pretrain" / "state")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    process = start(workdir, "--config.pretrain.batch=32")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2 and "(pretrain.batch: 64 -> 32)" in output
    keys = ("data.threads=1", "data.max_bad_fraction=0.5", "pretrain.save_every=11", "finetune.save_every=9")
    assert "resumes at step" in finish(workdir, *(f"--config.{key}" for key in keys))
    assert_same_run(workdir, undisturbed)
    assert "finished before" in finish(workdir)


@pytest.mark.slow
def test_damaged_states_are_not_taken_for_a_fresh_start(tmp_path):
    workdir = tmp_path / "W"
    process = start(workdir, "--stage=pretrain")
    assert wait_for_a_state(process, workdir / "pretrain" / "state")
    process.terminate()  # a kill may come before the first state is marked complete: a fresh start, rightly
    process.communicate()
    for file in (workdir / "pretrain" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    for _ in range(2):  # the second time, too
        process = start(workdir, "--stage=pretrain")
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 2 and "--force" in output and "Traceback" not in output, output
    assert "380 steps" not in output and finish(workdir, "--stage=pretrain", "--force")


@pytest.mark.slow
def test_one_run_at_a_time_in_a_workdir(tmp_path):
    workdir = tmp_path / "W"
    process = start(workdir, "--stage=pretrain", "--config.pretrain.epochs=400")
    assert wait_for_a_state(process, workdir / "pretrain" / "state")
    second = start(workdir, "--stage=pretrain", "--config.pretrain.epochs=400")
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 2 and "another run is at work there" in output and "Traceback" not in output, output
    process.terminate()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output


def test_sigterm_between_and_in_other_stages(finished, tmp_path, capsys, monkeypatch):
    import shutil

    from nvit_jax.run.stages import measure
    from nvit_jax.run.workdir import STOP

    shutil.copytree(finished, tmp_path / "W", symlinks=True)
    shutil.rmtree(tmp_path / "W" / "eval")
    evaluate = measure.evaluate

    def stopped_later(*arguments, **options):
        STOP.received = True
        return evaluate(*arguments, **options)

    monkeypatch.setattr(measure, "evaluate", stopped_later)
    assert call("--workdir", tmp_path / "W", "--config.compare=('magnitude',)") == 143
    assert "stopped while evaluating; the same command resumes" in capsys.readouterr().err
    monkeypatch.undo()
    assert call("--workdir", tmp_path / "W", "--config.compare=('magnitude',)") == 0


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path):
    """A learning rate that blows up: the step is named, and nothing after it is saved or logged."""
    workdir = tmp_path / "W"
    keys = ("learning_rate=1e18", "warmup_epochs=4", "save_every=1", "log_every=1")
    process = start(workdir, "--stage=pretrain", *(f"--config.pretrain.{key}" for key in keys))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2 and "is nan at step" in output and "Traceback" not in output, output
    step = int(output.split("at step ")[1].split(";")[0])
    states = [int(p.name) for p in (workdir / "pretrain" / "state").glob("[0-9]*")]
    assert states and max(states) == step - 1
    lines = [json.loads(line) for line in (workdir / "pretrain" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, step))
    assert all(np.isfinite(line["loss"]) for line in lines)
