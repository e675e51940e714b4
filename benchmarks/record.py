"""What every benchmark shares: its options, and the JSON file of its result.

A result is benchmarks/results/NAME_PLATFORM.json: {"benchmark", "rows"}. A row is what was measured of one thing, and
its "run": device, versions, date, load, command. Another run replaces the rows that it measures again and leaves the
others, so that a result can be made in parts. Rows are written as they come: what a stopped run has measured is kept.
"""

import argparse
import datetime
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import nvit_jax as nvit
from benchmarks.plots import draw
from benchmarks.specs import TABLES
from benchmarks.tables import RESULTS, table
from nvit_jax.files import read_json, write_json
from nvit_jax.latency.timing import device_name

PACKAGES = ("jax", "jaxlib", "flax", "torch", "onnxruntime", "torch-pruning", "numpy")
_SETTINGS = ("XLA_FLAGS", "OMP_NUM_THREADS", "MALLOC_ARENA_MAX", "JAX_PLATFORMS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
Row = dict[str, Any]


def make_parser(module: str, doc: str | None, *, result: bool = True) -> argparse.ArgumentParser:
    """The options that all benchmarks have; `result`: it writes one."""
    found = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--tiny", action="store_true", help="models of two narrow blocks, to rehearse in seconds")
    if result:
        text = "the JSON file; by default one for each platform in benchmarks/results"
        found.add_argument("--out", type=Path, help=text)
    return found


class Record:
    """The result file of one run. The keys of its table say what a row was measured of."""

    def __init__(self, name: str, options: argparse.Namespace, words: Sequence[str]) -> None:
        self.name, self.keys = name, TABLES[name].keys
        self.path = options.out or RESULTS / f"{name}_{jax.default_backend()}.json"
        if options.tiny and options.out is None:
            raise nvit.UserError(" is a rehearsal; it needs --out", "--tiny")
        self.command = shlex.join(["python", "-m", f"benchmarks.{name}", *words])
        self.rows: list[Row] = read_json(self.path)["rows"] if self.path.exists() else []
        self.began = time.monotonic(), time.process_time()
        print(f"{self.command}: {device_name()}, load {load():.2f}, {cores()} cores", flush=True)

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in self.keys)

    def add(self, **facts: Any) -> None:
        """One row, written at once; printed as it is."""
        facts["run"] = self._run()
        self.rows = [row for row in self.rows if self._key(row) != self._key(facts)] + [facts]
        write_json(self.path, {"benchmark": self.name, "rows": self.rows})
        shown = [f"{key}={facts[key]}" for key in self.keys if key in facts]
        shown += [f"{name} {value:.4g}" for name, value in facts.items() if isinstance(value, float)]
        print(", ".join(shown), flush=True)

    def finish(self) -> None:
        """Print the table and draw the picture, beside the JSON file."""
        print(f"\n{table(self.name, '', self.rows)}\n\n{self.path}")
        draw(self.name, self.keys, self.rows, self.path.with_suffix(".png"))

    def _run(self) -> dict[str, Any]:
        return {
            "device": device_name(),
            "processor": processor(),
            "versions": versions(),
            "settings": {name: os.environ[name] for name in _SETTINGS if os.environ.get(name)},
            "date": f"{datetime.date.today()}",
            "load": round(load(), 2),
            "cores": cores(),
            "command": self.command,
            "seconds": round(time.monotonic() - self.began[0], 1),
            "cpu_seconds": round(time.process_time() - self.began[1], 1),
        }


def load() -> float:
    """Processes that run or wait for a core, averaged over a minute, this one included."""
    return os.getloadavg()[0]


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The CPU's name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, str]:
    """Of what takes part; packages that are not installed are left out."""
    found = {"nvit_jax": nvit.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def run(main: Callable[[Sequence[str]], None]) -> None:
    """What `python -m benchmarks.NAME` does: mistakes are one line."""
    try:
        main(sys.argv[1:])
    except nvit.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
