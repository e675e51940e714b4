"""What a long run meets: kills at many random moments, a full disk, a second Ctrl-C. `pytest -m fault`, minutes."""

import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_resume import ARGUMENTS, assert_same_run, finish, start, undisturbed, wait_for_a_state  # noqa: F401

pytestmark = pytest.mark.fault
KILLS = 20


def test_sigkill_at_many_random_moments(undisturbed, tmp_path):  # noqa: F811
    """In turns in pretrain, prune and finetune, in and between saves; every third time the run is let through."""
    draw, stages = random.Random(1), ("pretrain", "prune", "finetune")
    kills = []
    for number in range(KILLS + 1):
        workdir, stage = tmp_path / str(number // 3), stages[number % 3]
        known = set((workdir / stage / "state").glob("[0-9]*"))
        process = start(workdir)
        while process.poll() is None and not set((workdir / stage / "state").glob("[0-9]*")) - known:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.4))
        if process.poll() is None:
            kills.append(stage)
        process.kill()
        process.communicate()
        if number % 3 == 2:
            finish(workdir)
            assert_same_run(workdir, undisturbed)
    counts = {stage: kills.count(stage) for stage in stages}
    print(f"{len(kills)} kills, {counts}: all runs ended as the undisturbed one")
    assert len(kills) >= KILLS - 2 and all(counts.values())


def test_a_full_disk_and_then_space_again(undisturbed, tmp_path):  # noqa: F811
    """A process that may write files of 40 KB at most stands for a full disk: one line, and the rest resumes."""
    workdir = tmp_path / "W"
    process = start(workdir)
    assert wait_for_a_state(process, workdir / "pretrain" / "state")
    process.terminate()
    process.communicate()
    command = [sys.executable, "main.py", *ARGUMENTS, "--workdir", str(workdir)]
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"
    limited = [sys.executable, "-c", f"{limit}; os.execv(sys.argv[1], sys.argv[1:])", *command]
    full = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert full.returncode == 2, full
    assert "could not write" in full.stderr.splitlines()[-1] and "Traceback" not in full.stderr, full.stderr
    assert "resumes at step" in finish(workdir)
    assert_same_run(workdir, undisturbed)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_clock_that_jumps(undisturbed, tmp_path, seed):  # noqa: F811
    """By days, forth and back, many times. Orbax gives up a save that seems to take days: one line, and it resumes."""
    code = f"""
import random, runpy, sys, time
real, draw, offset = time.time, random.Random(int(sys.argv[1])), 0.0
def jumping():
    global offset
    if draw.random() < 0.002:
        offset = draw.choice((-3e5, 0.0, 3e5))
    return real() + offset
time.time, time.time_ns = jumping, lambda: int(1e9 * jumping())
sys.argv = ["main.py", *{ARGUMENTS!r}, "--workdir", {str(tmp_path / "W")!r}]
runpy.run_path("main.py", run_name="__main__")
"""
    attempts = 0
    while not (tmp_path / "W" / "finetune" / "metrics.json").exists():
        attempts += 1
        assert attempts <= 10
        command = [sys.executable, "-c", code, f"{seed}{attempts}"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
        assert run.returncode == 0 or "could not write" in run.stderr.splitlines()[-1], run.stderr
    print(f"ended in run {attempts}")
    assert_same_run(tmp_path / "W", undisturbed)


def test_the_second_interrupt_forces(tmp_path):
    workdir = tmp_path / "W"
    process = start(workdir)
    assert wait_for_a_state(process, workdir / "pretrain" / "state")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(1)  # two that have not arrived yet are one
    output, _ = process.communicate(timeout=200)  # a busy machine; an idle one takes a second
    assert process.returncode in (130, 143), output  # 143: it had saved before the second came
    assert "resumes at step" in finish(workdir, "--stage=pretrain")
