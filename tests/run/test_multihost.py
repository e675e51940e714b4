"""Two processes of two devices end with what one process of four ends with."""

import json
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, read

import nvit_jax
from nvit_jax.model.groups import flatten

pytestmark = pytest.mark.slow

ARGUMENTS = [
    "--config=tests/tiny.py",
    "--config.stages=('pretrain','prune','finetune','eval','report')",
    "--config.pretrain.epochs=1",
    "--config.finetune.epochs=1",
    "--config.prune.interval=2",
]


def start(workdir: pathlib.Path, devices: int, *more: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = ENVIRONMENT | {"XLA_FLAGS": flags}
    given = {argument.split("=")[0] for argument in more}
    arguments = [argument for argument in ARGUMENTS if argument.split("=")[0] not in given]
    config_first = sorted((*arguments, *more), key=lambda argument: not argument.startswith("--config="))
    command = [sys.executable, "main.py", *config_first, "--workdir", str(workdir)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def launch(workdir: pathlib.Path, *more: str) -> list[subprocess.Popen]:
    """Two processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ("--distributed", f"--coordinator=127.0.0.1:{port}", "--processes=2")
    return [start(workdir, 2, *flags, f"--process_id={i}", *more) for i in range(2)]


def pair(workdir: pathlib.Path, *more: str) -> list[tuple[int, str]]:
    """Both processes' exit codes and outputs."""
    processes = launch(workdir, *more)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def wait_for_a_save(workdir: pathlib.Path, processes: list[subprocess.Popen]) -> None:
    """Until the first state of pretrain is complete."""
    state = workdir / "pretrain" / "state"
    while not (state.is_dir() and any(place.name.isdigit() for place in state.iterdir())):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.01)


def assert_same_weights(a: nvit_jax.Model, b: nvit_jax.Model, what: str = "") -> None:
    """As good as sums in another order allow: logits, and weights within 1e-5 of the largest.

    Adam divides a gradient by its own size. A weight whose gradient is hardly more than the rounding of the sums (of a
    neuron that is almost never on) therefore makes steps of that rounding: a weight in a thousand of an array may
    differ by a tenth of one step of 3e-3. The bias of the keys has no gradient at all (softmax does not see it).
    """
    assert a.dims == b.dims
    for (path, x), (_, y) in zip(flatten(a.params), flatten(b.params), strict=True):
        if not path.endswith("k/bias"):
            off = np.abs(y - x)
            assert (off > 1e-5 * np.abs(x).max()).mean() <= 1e-3 and off.max() <= 3e-4, f"{what} {path}: {off.max()}"
    images = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 1)).astype(np.float32)
    logits = np.asarray(a.apply(a.params, images))
    np.testing.assert_allclose(b.apply(b.params, images), logits, rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """Of one process, and of two."""
    one, two = (tmp_path_factory.mktemp(name) / "W" for name in ("one", "two"))
    process = start(one, 4)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    for code, output in pair(two):
        assert code == 0, output
    return one, two


def test_the_same_models_and_logs(workdirs):
    one, two = workdirs
    for name in ("pretrain/model", "prune/masked", "prune/model", "finetune/model"):
        a, b = (nvit_jax.load_model(place / name) for place in (one, two))
        assert_same_weights(a, b, name)
    histories = [(place / "prune" / "history.jsonl").read_text().splitlines() for place in workdirs]
    for x, y in zip(*histories, strict=True):
        assert json.loads(x)["removed"] == json.loads(y)["removed"]
    summaries = [json.loads((place / "summary.json").read_text()) for place in workdirs]
    for name in ("dense", "pruned", "finetuned"):
        assert summaries[1][name]["images"] == 360
        assert summaries[1][name]["top1"] == pytest.approx(summaries[0][name]["top1"], abs=1 / 360)
    assert (two / "report.html").exists()


def test_scores_from_training_steps(workdirs, tmp_path):
    """NViT's loop from one dense model: the same prunings, the spread state included."""
    keys = ("criterion=taylor", "score.from_training=True", "plain_first=True", "mode=iterative")
    more = ["--stage=prune", f"--config.model={workdirs[0] / 'pretrain' / 'model'}"]
    more += [f"--config.prune.{key}" for key in (*keys, "target.macs_ratio=0.5")]
    output = start(tmp_path / "one", 1, *more).communicate(timeout=300)[0]
    assert "[prune] taylor" in output, output
    for code, output in pair(tmp_path / "two", *more, "--config.parallel=fsdp"):
        assert code == 0, output
    lines = [(tmp_path / n / "prune" / "history.jsonl").read_text().splitlines() for n in ("one", "two")]
    removed = [[json.loads(line)["removed"] for line in text] for text in lines]
    assert len(removed[0]) >= 2 and removed[0] == removed[1]
    assert_same_weights(*(nvit_jax.load_model(tmp_path / name / "prune" / "model") for name in ("one", "two")))


def test_one_shot(workdirs, tmp_path):
    """Calibration, scores and compensation: the same units go, and the same weights are fitted."""
    more = ["--stage=prune", "--config.prune.mode=one_shot", "--config.prune.criterion=obs"]
    more.append(f"--config.model={workdirs[0] / 'pretrain' / 'model'}")
    output = start(tmp_path / "one", 4, *more).communicate(timeout=300)[0]
    assert "[prune] obs" in output, output
    for code, output in pair(tmp_path / "two", *more):
        assert code == 0, output
    one, two = (nvit_jax.load_model(tmp_path / name / "prune" / "masked") for name in ("one", "two"))
    for a, b in zip(one.masks, two.masks, strict=True):
        np.testing.assert_array_equal(a, b)
    assert read(tmp_path / "two" / "prune" / "metrics.json")["compensated"]
    images = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 1)).astype(np.float32)
    logits = np.asarray(one(images))
    # Fits multiply the rounding of their float32 moments by the condition of a covariance, which a ridge bounds.
    np.testing.assert_allclose(two(images), logits, rtol=0, atol=1e-4 * np.abs(logits).max())


def test_sigterm_on_one_stops_both_at_the_same_step(tmp_path):
    workdir = tmp_path / "W"
    more = ("--stage=pretrain", "--config.pretrain.epochs=200", "--config.pretrain.save_every=5")
    processes = launch(workdir, *more)
    wait_for_a_save(workdir, processes)
    processes[1].terminate()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    steps = {output.split("stopped at step ")[1].split(";")[0] for output in outputs}
    assert [process.returncode for process in processes] == [143, 143] and len(steps) == 1, outputs
    assert (workdir / "pretrain" / "state" / steps.pop()).is_dir()


def test_a_spread_training_state(tmp_path):
    """fsdp on two processes, saved and all, against jit on one: an mlp that is wide enough to be spread."""
    more = ("--stage=pretrain", "--config.vit.mlp=1024")
    process = start(tmp_path / "one", 1, *more)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    for code, output in pair(tmp_path / "two", *more, "--config.parallel=fsdp"):
        assert code == 0, output
    assert_same_weights(*(nvit_jax.load_model(tmp_path / name / "pretrain" / "model") for name in ("one", "two")))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_lost_process_ends_the_other_and_the_run_resumes(tmp_path, killed):
    """Within a minute, and says why: in a line of ours where the loss comes back as an error, else JAX does."""
    workdir = tmp_path / "W"
    more = ("--stage=pretrain", "--config.pretrain.epochs=4", "--config.pretrain.save_every=5")
    processes = launch(workdir, *more)
    wait_for_a_save(workdir, processes)
    processes[killed].kill()
    began = time.monotonic()
    output = processes[1 - killed].communicate(timeout=120)[0]
    processes[killed].communicate()
    assert time.monotonic() - began < 60 and processes[1 - killed].returncode not in (0, None)
    ours, jaxs = "error: a process of this run failed or was lost", "JAX distributed service detected fatal errors"
    assert ours in output or jaxs in output, output
    (code, output), (other, _) = pair(workdir, *more)
    assert (code, other) == (0, 0) and "resumes at step" in output, output


@pytest.mark.parametrize("devices", [1, 2])
def test_resumed_on_fewer_devices(workdirs, tmp_path, devices):
    """Saved on 4 devices, finished on fewer: the run of one process on 4, but for the order of sums (1e-5)."""
    workdir, more = tmp_path / "W", ("--stage=pretrain", "--config.pretrain.save_every=5")
    process = start(workdir, 4, *more)
    wait_for_a_save(workdir, [process])
    process.terminate()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143, output
    process = start(workdir, devices, *more)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "resumes at step" in output, output
    assert_same_weights(*(nvit_jax.load_model(place / "pretrain" / "model") for place in (workdirs[0], workdir)))


def test_a_failure_in_one_ends_both_with_its_traceback(tmp_path):
    """What is neither a mistake nor a lost process, in one of them: the other does not wait for ever."""
    config = tmp_path / "config.py"
    config.write_text(
        "import jax\nfrom tests.tiny import get_config\nfrom nvit_jax.training import optim\nold = optim.schedule\n"
        "def schedule(*a):\n    if jax.process_index() == 1: raise TypeError('a fault of one')\n    return old(*a)\n"
        "optim.schedule = schedule\n"
    )
    began = time.monotonic()
    (code, _), (other, output) = pair(tmp_path / "W", f"--config={config}", "--stage=pretrain")
    assert time.monotonic() - began < 100 and code != 0 and other == 1
    assert "TypeError: a fault of one" in output and "ends the others" in output


def test_a_mistake_ends_both(workdirs):
    _, two = workdirs
    for code, output in pair(two, "--stage=pretrain", "--config.pretrain.learning_rate=1"):
        assert code == 2 and "Traceback" not in output, output
