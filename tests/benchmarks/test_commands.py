"""Every benchmark on models of two narrow blocks: what it writes, prints and draws. Nothing is asked of the times."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import nvit_jax as nvit
from benchmarks import check, models, programs, rivals, tables
from benchmarks.__main__ import COMMANDS
from benchmarks.specs import TABLES
from nvit_jax.files import read_json
from nvit_jax.model.dims import count_macs, preset

FACTS = {"device", "processor", "versions", "settings", "date", "load", "cores", "command", "seconds", "cpu_seconds"}
WORDS = {
    "inference": ["--batch=4", "--pruned", "nvit_b", "--against", "eager", "fused", "--rounds=1"],
    "training": ["--batch=4", "--rounds=1", "--steps", "pretrain", "score fisher", "--against", "PyTorch eager"],
    "scores": ["--images=8", "--batch=4", "--ours", "fisher", "--theirs", "Torch-Pruning Taylor"],
    "decision": ["--models", "deit_base", "--rounds=1", "--limits", "macs"],
    "waiting": ["--configs", "--words", "help", "--rounds=1"],
    "growth": ["--axes", "units", "--rounds=1"],
    "parts": ["--work", "forward", "score fisher", "--batch=8", "--rounds=1"],
    "attention": ["--widths", "16x8", "--rounds=1"],
    "memory": ["--stages", "pretrain", "eval", "--batch=4", "--dtype=float32", "--widths", "dense"],
}


@pytest.mark.parametrize("name", WORDS)
def test_a_benchmark_runs(name, tmp_path, capsys):
    path = tmp_path / "found.json"
    words = ["--tiny", *WORDS[name], f"--out={path}"]
    module = importlib.import_module(f"benchmarks.{name}")
    module.main(words)
    found = read_json(path)
    assert found["benchmark"] == name and found["rows"]
    for row in found["rows"]:
        assert row["run"].keys() == FACTS
        assert row["run"]["command"] == shlex.join(["python", "-m", f"benchmarks.{name}", *words])
        assert set(TABLES[name].keys) & row.keys()
    timed = [row for row in found["rows"] if "ms" in row or "times" in row]
    assert name == "memory" or (timed and all("cpu_noise" in row and "noise" in row for row in timed))
    assert tables.table(name, "", found["rows"]) in capsys.readouterr().out
    assert path.with_suffix(".png").stat().st_size > 1000
    keys = [tuple(row.get(k) for k in TABLES[name].keys) for row in found["rows"]]
    assert len(set(keys)) == len(keys)


def test_a_second_run_replaces_what_it_measures_and_leaves_the_rest(tmp_path):
    from benchmarks import decision

    path = tmp_path / "found.json"
    words = ["--tiny", "--rounds=1", "--models", "deit_base", "--limits", "macs", f"--out={path}", "--rules"]
    decision.main([*words, "per_cost"])
    decision.main([*words, "solve"])
    first = read_json(path)["rows"]
    decision.main([*words, "solve"])
    rows = read_json(path)["rows"]
    assert [row["rule"] for row in rows] == ["per_cost", "solve"]
    assert rows[0] == first[0] and rows[1] != first[1]


def test_a_rehearsal_needs_a_place_of_its_own():
    from benchmarks import decision

    with pytest.raises(nvit.UserError, match="--tiny is a rehearsal; it needs --out"):
        decision.main(["--tiny"])


def test_the_list_names_every_command():
    said = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=ROOT, check=True, capture_output=True, text=True)
    listed = re.findall(r"^python -m benchmarks\.(\w+) +\S.*", said.stdout, re.MULTILINE)
    assert listed == list(COMMANDS) and {*WORDS, "check", "tables", "finetuned"} == set(COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(f"benchmarks.{name}").parser().parse_args(["--help"])


@pytest.mark.parametrize("tiny", ["", "1"])
def test_the_script_for_a_gpu_has_commands_that_exist(tiny, tmp_path):
    script = (ROOT / "benchmarks" / "gpu.sh").read_text().replace('echo "$*"', "printf '%s\\x1f' \"$@\"; echo")
    environment = os.environ | {"DRY": "1", "TINY": tiny, "OUT": str(tmp_path)}
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu.sh").write_text(script)
    words = ["bash", str(tmp_path / "benchmarks" / "gpu.sh")]
    said = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    seen = set()
    for line in said.stdout.splitlines():
        command = line.strip("\x1f").split("\x1f")
        command = command[command.index("-m") + 1 :]
        module = command[0]
        if module == "pytest":
            assert all((ROOT / word).exists() for word in command if word.startswith("tests/"))
            continue
        options = importlib.import_module(module).parser().parse_args(command[1:])
        assert options.tiny == bool(tiny) and options.out.parent == tmp_path
        seen.add(module.removeprefix("benchmarks."))
    assert seen == {"inference", "training", "scores", "attention", "memory", "waiting"}


@pytest.mark.parametrize("seconds", ["3000", "10"])
def test_the_script_goes_on_after_a_failure_and_begins_nothing_without_time(seconds, tmp_path):
    python, wheels = tmp_path / "python", tmp_path / "wheels"
    python.write_text(
        '#!/bin/sh\necho "$@" >> "$(dirname "$0")/called"\ncase "$2" in benchmarks.scores) exit 3;; esac\n'
    )
    python.chmod(0o755)
    wheels.mkdir()
    (wheels / "some.whl").touch()
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "WHEELS": str(wheels)}
    environment["SECONDS_IN_ALL"] = seconds
    words = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    said = subprocess.run(words, capture_output=True, text=True, env=environment)
    called = (tmp_path / "called").read_text().splitlines()
    assert called[0].startswith("-m pip install --quiet --no-index --no-deps --target ")
    steps = re.findall(r"^bench|^step", (ROOT / "benchmarks" / "gpu.sh").read_text(), re.MULTILINE)
    if seconds == "10":
        assert len(called) == 1 and said.stdout.count("not run, no time is left") == len(steps) - 2
    else:
        assert len(called) == 1 + len(steps) - 2  # of the names, two are where the functions are defined
        assert re.search(r"not whole: 2\n   scores --model deit_base", said.stdout)
    assert said.returncode == 1


@pytest.mark.slow
def test_the_script_for_a_gpu_is_rehearsed(tmp_path):
    environment = os.environ | {"TINY": "1", "OUT": str(tmp_path), "PYTHON": sys.executable, "SECONDS_IN_ALL": "3000"}
    words = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    said = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert said.returncode == 0, said.stdout + said.stderr
    names = {path.name for path in tmp_path.glob("*.json")}
    assert names == {
        f"{name}_cpu.json" for name in ("inference", "training", "scores", "attention", "memory", "waiting")
    }


@pytest.mark.parametrize("name", ["deit_tiny", "deit_base"])
@pytest.mark.parametrize("multiple", [8, 1])
def test_narrowed_models_have_the_macs_that_are_asked_for(name, multiple):
    dims = preset(name)
    for part in (*models.NVIT.values(), 0.8):
        found = models.narrowed(dims, part, multiple)
        assert 0.85 * part < count_macs(found) / count_macs(dims) <= part
        for width in (found.embed, *found.qk, *found.v, *found.mlp):
            assert width % 8 == 0 if multiple == 8 else width % 2 == 1 or width in (dims.embed, dims.qk[0], dims.mlp[0])


def test_gradients_are_reduced_once_whatever_the_devices_and_parts():
    import jax

    from nvit_jax.model.dims import count_params
    from nvit_jax.parallel import Parallel

    dims, found = models.TINY, {}
    for devices, parts in ((1, 1), (2, 1), (4, 1), (4, 2)):
        parallel = Parallel.create("jit", tuple(jax.devices("cpu")[:devices]))
        step, inputs = programs.train_step(dims, parallel=parallel, accumulate=parts)
        shapes = programs.spread(parallel, inputs, programs.batch_shapes(dims, 8))
        compiled = parallel.compile_training(step).lower(*shapes).compile()
        found[devices, parts] = programs.collective_bytes(compiled.as_text())[0] / (4 * count_params(dims))
    assert found[1, 1] == 0
    # The gradients, and a few numbers of the metrics; XLA adds up some biases from others that it has sent.
    assert all(0.98 < found[key] < 1.01 for key in ((2, 1), (4, 1), (4, 2))), found


@pytest.mark.parametrize(("told", "expected"), [([10, 20], 20), ([20, 20], None), ([None], None)])
def test_a_peak_is_measured_where_the_device_tells_a_new_one(told, expected):
    import jax

    from benchmarks.memory import measured_peak

    shape = {"x": jax.ShapeDtypeStruct((3,), "float32")}
    compiled = jax.jit(lambda a, b: a["x"] + b).lower(shape, jax.ShapeDtypeStruct((3,), "float32")).compile()
    assert measured_peak(compiled, iter(told).__next__) == expected


def test_a_rival_that_fails_is_not_run():
    def broken():
        raise ValueError("no compiler\nand more")

    with pytest.raises(rivals.NotRun, match="^ValueError: no compiler$"):
        rivals.tried(lambda: broken)


def test_the_check_tells_what_has_fallen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "one_thread", lambda: None)  # this process has begun with more
    path, name = tmp_path / "floors.json", "decision, a loop in Python"
    check.main(["--tiny", "--set", "--only", name, f"--floors={path}"])
    found = read_json(path)[name]
    assert found["floor"] == pytest.approx(check.MARGIN * found["measured"], abs=1e-3)
    path.write_text(path.read_text().replace(str(found["floor"]), "1e9"))
    with pytest.raises(nvit.UserError, match=f"slower than their floors in .*: {name}"):
        check.main(["--tiny", "--only", name, f"--floors={path}"])
    assert f"{name}: " in capsys.readouterr().out


def test_every_check_has_a_floor():
    floors = read_json(check.FLOORS)
    assert floors.keys() == check.CHECKS.keys()
    assert all(0 < floor["floor"] <= floor["measured"] for floor in floors.values())


def test_the_page_shows_the_results():
    tables.main(["--check"])
