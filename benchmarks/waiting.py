"""Waiting: seconds from a command to its help, to an import, and to the first training step, cold and warm.

    python -m benchmarks.waiting --configs demo deit_tiny deit_base

"cold" compiles everything; "warm" finds the compiled programs of the run before in JAX's cache. A run counts as begun
when the first line of its log is written. "import jax" is what no program with JAX is faster than.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import nvit_jax as nvit
from benchmarks import models
from benchmarks.record import Record, make_parser, run
from benchmarks.timing import Clock, alternate

ROOT = Path(__file__).parent.parent
WORDS = {
    "import jax": ["-c", "import jax; jax.devices()"],
    "import nvit_jax": ["-c", "import nvit_jax"],
    "nvit_jax's functions": ["-c", "import nvit_jax as nvit; nvit.prune, nvit.finetune, nvit.evaluate"],
    "help": ["main.py", "--help"],
    "run help": ["main.py", "run", "--help"],
}
_CONFIG = """\
from nvit_jax.run.config import default_config

def get_config():
    c = default_config()
    c.vit.update({dims})
    c.data.update(name="npz", path={path!r})
    c.pretrain.update(epochs=1.0, batch=8)
    return c
"""
_LONGEST, _CLASSES = 600.0, 10  # seconds


def with_children() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


def start(words: Sequence[str]) -> None:
    """A Python process, until it ends."""
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def write_config(name: str, folder: Path, *, tiny: bool) -> str:
    """The name of a built-in config, or the path of one that trains a preset on random images."""
    if name == "demo":
        return "demo:fast"
    dims = models.dense(name, tiny=tiny)
    arrays = {}
    for seed, split in enumerate(("train", "val", "test")):
        images, _ = models.random_batch(dims, 40, seed)
        arrays |= {f"{split}_images": images, f"{split}_labels": np.arange(40) % _CLASSES}
    np.savez(folder / "data.npz", **arrays)
    size = {"image": dims.image, "patch": dims.patch, "channels": dims.channels, "classes": _CLASSES}
    size |= {"embed": dims.embed, "depth": dims.depth, "heads": dims.heads[0], "mlp": dims.mlp[0]}
    words = ", ".join(f"{key}={value}" for key, value in size.items())
    path = folder / "config.py"
    path.write_text(_CONFIG.format(dims=words, path=str(folder / "data.npz")), encoding="utf-8")
    return str(path)


def first_step(config: str, workdir: Path, cache: Path) -> None:
    """A run until its first step is logged, then it is ended. UserError when it ends before."""
    log, words = workdir / "pretrain" / "log.jsonl", ["--config.pretrain.log_every=1", "--config.pretrain.eval_every=0"]
    settings = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    process = subprocess.Popen(
        [
            sys.executable,
            "main.py",
            "run",
            "--config",
            config,
            "--workdir",
            str(workdir),
            "--stage",
            "pretrain",
            *words,
        ],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    begin = time.monotonic()
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() - begin < _LONGEST:
        time.sleep(0.01)
    began = log.exists() and log.stat().st_size > 0
    process.kill()
    _, said = process.communicate()
    if not began:
        raise nvit.UserError(
            f"={config}: no step was made: {said.decode(errors='replace').strip()[-300:]}", "--configs"
        )


def run_of(config: str, folder: Path, *, cold: bool) -> Any:
    """`first_step` in a fresh workdir; a cold one has a cache of its own, warm ones share one."""
    counter = iter(range(10**6))

    def call() -> None:
        number = next(counter)
        workdir = folder / f"{'cold' if cold else 'warm'}_{number}"
        first_step(config, workdir, folder / (f"cache_{number}" if cold else "cache"))

    return call


def parser() -> Any:
    """Of the command line."""
    found = make_parser("waiting", __doc__)
    found.add_argument("--configs", nargs="*", default=["demo", "deit_tiny"], help="demo, or presets")
    found.add_argument("--words", nargs="*", choices=list(WORDS), default=list(WORDS))
    found.add_argument("--rounds", type=int, default=3)
    return found


def main(words: Sequence[str]) -> None:
    """Measure the short ones in turns, then each config, cold and warm."""
    options = parser().parse_args(words)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process and the ones that it starts share
    record, clock = Record("waiting", options, words), Clock(cpu=with_children)
    if options.words:
        times = alternate(
            {name: lambda name=name: start(WORDS[name]) for name in options.words}, options.rounds, clock=clock
        )
        for name in options.words:
            record.add(what=name, config="", **times.row(name))
    for config in options.configs:
        with tempfile.TemporaryDirectory() as name:
            path = write_config(config, Path(name), tiny=options.tiny)
            calls = {kind: run_of(path, Path(name), cold=kind == "cold") for kind in ("warm", "cold")}
            calls["warm"]()  # fills the cache
            times = alternate(calls, max(1, options.rounds // 2), warm=False, clock=clock)
            for kind in calls:
                record.add(what=kind, config=config, **times.row(kind))
    record.finish()


if __name__ == "__main__":
    run(main)
