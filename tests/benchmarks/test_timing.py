"""The arithmetic of the benchmarks on made-up clocks, compiled programs and results."""

import importlib
import itertools
import re
import shlex

import numpy as np
import pytest

from benchmarks import check, programs
from benchmarks.specs import TABLES, Column
from benchmarks.tables import cell, table
from benchmarks.timing import Clock, Ratio, alternate, fit_exponent, noise


class Machine:
    """A machine on which a call takes what it says, times a speed that changes between rounds; it counts CPU apart."""

    def __init__(self, speeds=(1.0,)):
        self.now = self.used = 0.0
        self.speeds, self.order = itertools.cycle(speeds), []
        self.speed = 1.0

    def call(self, name, seconds, threads=1.0):
        def run():
            self.order.append(name)
            self.now += seconds * self.speed
            self.used += seconds * threads

        return run

    def sleep(self, seconds):
        self.speed = next(self.speeds)  # the machine changes between two timings
        self.now += seconds

    @property
    def clock(self):
        return Clock(lambda: self.now, lambda: self.used, self.sleep)


def test_calls_run_in_turns_and_the_first_one_twice():
    machine = Machine()
    times = alternate({"a": machine.call("a", 1.0), "b": machine.call("b", 2.0, 2.0)}, 4, clock=machine.clock)
    assert machine.order == ["a", "a", "b", "b", *["a", "b", "a"] * 4]  # compiled, measured, then four rounds
    assert times.seconds("a") == pytest.approx(1.0) and times.seconds("b", "cpu") == pytest.approx(4.0)
    assert times.ratio("a", "b").value == pytest.approx(2.0)  # a is twice as fast
    assert times.ratio("a", "b", "cpu").value == pytest.approx(4.0)
    assert times.noise() == pytest.approx(0.0, abs=1e-9)
    row = times.row("b", "a")
    assert row["ms"] == pytest.approx(2000.0) and row["speed"] == pytest.approx(0.5) and row["cpu_ms"] == 4000.0


def test_short_calls_are_repeated_and_counted_once():
    machine = Machine()
    times = alternate({"a": machine.call("a", 0.001)}, 2, clock=machine.clock)
    assert len(machine.order) == 2 + 2 * 2 * 20
    assert times.seconds("a") == pytest.approx(0.001)
    machine = Machine()
    alternate({"a": machine.call("a", 0.001)}, 2, warm=False, clock=machine.clock)
    assert len(machine.order) == 2 * 2


def test_a_machine_that_changes_its_speed_shows_as_noise_of_wall_time_alone():
    speeds = np.random.default_rng(0).uniform(1.0, 2.0, 1000)
    machine = Machine(speeds)
    times = alternate({"a": machine.call("a", 1.0), "b": machine.call("b", 1.5)}, 25, clock=machine.clock)
    found = times.ratio("a", "b")
    assert 0.02 < found.noise < 0.5
    assert abs(np.log(found.value / 1.5)) < found.noise  # the truth lies within it
    assert times.ratio("a", "b", "cpu") == pytest.approx((1.5, 0.0))


def test_noise_is_the_offset_and_two_standard_errors():
    assert noise(np.full(9, 0.1)) == pytest.approx(0.1)
    rng = np.random.default_rng(0)
    found = [noise(rng.normal(0, 0.1, 100)) for _ in range(200)]
    # Two standard errors of a median of 100: 2 * 1.2533 * 0.1 / 10; the offset adds 0.8 of one on average.
    assert np.mean(found) == pytest.approx(1.4 * 2 * 1.2533 * 0.01, rel=0.1)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_exponents_are_found(power):
    sizes = [1.0, 2.0, 4.0, 8.0]
    found = fit_exponent(sizes, [3.0 * size**power for size in sizes])
    assert found == pytest.approx((power, power), abs=1e-9)
    with_constant = fit_exponent(sizes, [10.0 + size**2 for size in sizes])
    assert with_constant.exponent < with_constant.last < 2  # what is constant hides the growth of small sizes


# --------------------------------------------------------------------------------------------- collectives

HLO = """\
HloModule step, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body.1 (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %part = f32[8]{0} get-tuple-element(%state), index=1
  %inner = f32[8]{0} all-reduce(%part), replica_groups={{0,1}}, to_apply=%add
  ROOT %out = (s32[], f32[8]{0}) tuple(%number, %inner)
}

%cond.1 (state: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] constant(true)
}

ENTRY %main.9 (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %loop = (s32[], f32[8]{0}) while(%init), body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %both = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), to_apply=%add
  ROOT %all = f32[4]{0} copy(%a)
}
"""


def test_what_devices_exchange_is_read_from_the_program():
    assert programs.collective_bytes(HLO) == (3 * 8 * 4 + 4 * 4 + 6 * 2, 4)  # a loop's count once a turn


# --------------------------------------------------------------------------------------------------- check


def test_a_ratio_fails_below_its_floor_by_more_than_the_noise():
    assert not check.failed(Ratio(0.70, 0.0), 0.70)
    assert check.failed(Ratio(0.69, 0.0), 0.70)
    assert not check.failed(Ratio(0.69, 0.02), 0.70)
    assert check.failed(Ratio(0.5, 0.1), 0.70)


def test_a_fallen_ratio_is_measured_again_for_longer(monkeypatch):
    asked = []

    class Found:
        def ratio(self, *words):
            return Ratio([0.5, 0.6, 0.9][len(asked) - 1], 0.0)

    monkeypatch.setattr(check, "alternate", lambda calls, rounds: asked.append(rounds) or Found())
    assert check.measure((None, None), 0.8, 4) == Ratio(0.9, 0.0) and asked == [4, 8, 12]
    asked.clear()
    assert check.measure((None, None), 0.95, 4) == Ratio(0.9, 0.0) and len(asked) == check.TRIES
    asked.clear()
    assert check.measure((None, None), 0.4, 4) == Ratio(0.5, 0.0) and asked == [4]


# -------------------------------------------------------------------------------------------------- tables

RUN = {
    "device": "a machine", "versions": {"jax": "1", "torch": "2"}, "date": "2026-01-02", "settings": {}, "load": 0.5,
    "command": "python -m benchmarks.decision",
}  # fmt: skip


@pytest.mark.parametrize(("name", "platform"), [(n, p) for n, spec in TABLES.items() for p in spec.expected])
def test_a_table_that_nobody_has_run_is_its_commands(name, platform):
    text = table(name, platform, [])
    found = re.findall(r"^Not run yet: `python -m benchmarks\.(\w+)(.*)`$", text, re.MULTILINE)
    assert found and "|" not in text
    for module, words in found:
        assert module == name
        importlib.import_module(f"benchmarks.{module}").parser().parse_args(shlex.split(words))


def test_a_table_has_every_row_that_is_asked_for():
    expected = TABLES["decision"].expected["cpu"]
    text = table("decision", "cpu", [expected[0] | {"run": RUN}])
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(expected)
    assert all(line.count("not run") == 1 and line.count("|") == rows[0].count("|") for line in rows[1:])
    assert text.endswith("\n\nNot run yet: `python -m benchmarks.decision`")
    assert "Not run yet" not in table("decision", "cpu", [key | {"run": RUN} for key in expected])


def test_a_cell_says_its_run():
    key = TABLES["decision"].expected["cpu"][0]
    text = table("decision", "cpu", [key | {"ms": 1500.0, "units": 39312, "run": RUN}])
    line = next(line for line in text.splitlines() if "39,312" in line)
    assert "| 1.500 |" in line and line.endswith("| 0.5 | 1 |")
    assert "1. a machine; jax 1, torch 2; 2026-01-02: `python -m benchmarks.decision`" in text


def test_a_missing_rival_says_why():
    row = {"times": {}, "not_run": {"onnx": "onnxruntime is not installed"}}
    assert cell(row, Column("onnxruntime", "over.onnx.wall", rival="onnx")) == "not run: onnxruntime is not installed"
    assert cell(row, Column("eager", "over.eager.wall", rival="eager")) == ""
