"""`nvit-jax run`: the stages of a config, in a workdir."""

import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nvit_jax.run.configfile import builtin_names

if TYPE_CHECKING:  # help does not wait for it
    from ml_collections import ConfigDict

_USAGE = """\
usage: nvit-jax run --config CONFIG --workdir DIR [--stage STAGE] [--force] [--config.KEY=VALUE ...]

Run the stages of a config. CONFIG is a Python file or the name of a built-in one, with :VARIANT if it has variants.
Built in: {names}.

Stages, in order (all of config.stages without --stage):
  pretrain  train a dense ViT                    -> DIR/pretrain/model
  latency   measure this device                  -> DIR/latency/table.json
  prune     score, rank, mask, reshape           -> DIR/prune/model (compact), DIR/prune/masked
  finetune  distill from the unpruned model      -> DIR/finetune/model
  eval      accuracy, MACs, parameters, latency  -> DIR/eval/metrics.json, DIR/summary.json
  export    safetensors + PyTorch, StableHLO, ONNX -> DIR/export
  report    one page with the plots              -> DIR/report.html
  preview   one page of augmented images (not in config.stages) -> DIR/preview.html

A finished stage is left alone, a killed one resumes. --force starts one anew (with --stage) and marks the later
ones stale. --config.KEY=VALUE overrides a key of the config, =None unsets one.

Several hosts: the same command on each, with --distributed and a DIR that all of them see; where JAX does not find
the others by itself (it does on Cloud TPU, SLURM, Open MPI, Kubernetes), add --coordinator=HOST:PORT --processes=N
--process_id=I, and --local_devices=0,1 for a part of a host's devices.

Exit code: 0 done, 2 a mistake (one line says which), 143 stopped by a signal after saving (the same command resumes),
130 interrupted before anything was begun, 1 anything else. With --debug the traceback is printed, too.

examples:
  nvit-jax run --config demo --workdir runs/demo
  nvit-jax run --config demo:fast --workdir runs/fast --stage prune --force --config.prune.target.macs_ratio=0.3
  nvit-jax run --config my_config.py --workdir runs/mine --config.seed=1
"""


def usage() -> str:
    """What --help prints."""
    return _USAGE.format(names=", ".join(builtin_names()))


def execute(words: Sequence[str]) -> int:
    """Run stages; the exit code. UserError for mistakes."""
    from nvit_jax.run import flags

    values, config, names = flags.parse(["nvit-jax", *words])
    if values.distributed:
        flags.join(values)
    command = shlex.join(["nvit-jax", "run", *words])
    return run_all(config, pathlib.Path(values.workdir), names, force=values.force, command=command)


def run_all(config: "ConfigDict", workdir: pathlib.Path, names: tuple[str, ...], *, force: bool, command: str) -> int:
    """The stages, with signals caught: exit code 0, or 143 when one of them came and the work is saved."""
    from nvit_jax.run.runner import run_stages
    from nvit_jax.run.workdir import STOP
    from nvit_jax.training.distill import Stopped

    sys.unraisablehook = _quiet
    with STOP.listen():
        try:
            run_stages(config, workdir, names, force=force, command=command)
        except Stopped as stopped:
            print(f"{stopped}; the same command resumes", file=sys.stderr)
            return 143
    return 0


def _quiet(unraisable: Any) -> None:
    """Tensorstore's threads say this, once a file, after a save that failed and was reported."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
