"""nvit_jax: prune Vision Transformers with Hessian-aware saliency.

    python main.py --config CONFIG.py --workdir DIR [--stage STAGE] [--force] [--config.KEY=VALUE ...]

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
ones stale. Several hosts: the same command on each, with --distributed and a DIR that all of them see; where JAX
does not find the others by itself (it does on Cloud TPU, SLURM, Open MPI, Kubernetes), add --coordinator=HOST:PORT
--processes=N --process_id=I, and --local_devices=0,1 for a part of a host's devices.
"""

import os
import pathlib
import sys
import traceback
from typing import Any


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 a mistake or a value that is not finite (one line), 143 stopped by a signal after saving."""
    if "--help" in argv or "-h" in argv or len(argv) == 1:
        print(__doc__)
        return 0
    from nvit_jax.errors import UserError

    try:
        return _run(argv)
    except (UserError, FloatingPointError) as error:
        return _failed(str(error), 2)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if "RESOURCE_EXHAUSTED" in first:
            more = "lower the batch, or set accumulate or remat in its section, or config.parallel=fsdp"
            return _failed(f"the device has too little memory ({first[:200]}); {more}", 2)
        if not _several():
            raise
        if any(word in str(error) for word in _LOST):
            more = "the same command on all hosts resumes"
            return _failed(f"a process of this run failed or was lost ({first}); {more}", 1)
        traceback.print_exc()
        return _failed("this process failed (see above) and ends the others; the same command on all hosts resumes", 1)


# What JAX says when another process does not answer any more.
_LOST = ("UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "Gloo", "heartbeat", "arrier", "Connection")


def _quiet(unraisable: Any) -> None:
    """Tensorstore's threads say this, once a file, after a save that failed and was reported."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _several() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def _failed(message: str, code: int) -> int:
    """Say it and leave. With several processes at once: an orderly end would wait for those that wait for this one."""
    print(f"error: {message}", file=sys.stderr)
    if _several():
        import time

        import jax

        if jax.process_index() == 0:
            time.sleep(3)  # the others' connections hang on this one: let them say what they have to
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(argv: list[str]) -> int:
    from nvit_jax.latency.timing import keep_memory
    from nvit_jax.run.cli import join, parse
    from nvit_jax.run.workdir import STOP

    keep_memory()

    flags, config, names = parse(argv)
    if flags.distributed:
        join(flags)
    from nvit_jax.run.stages import run_stages
    from nvit_jax.training.distill import Stopped

    sys.unraisablehook = _quiet
    with STOP.listen():
        try:
            run_stages(config, pathlib.Path(flags.workdir), names, force=flags.force)
        except Stopped as stopped:
            print(f"{stopped}; the same command resumes", file=sys.stderr)
            return 143
    return 0


if __name__ == "__main__":
    code = main(sys.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # everything is closed; a thread of Orbax whose save has failed would be waited for
    sys.exit(0)
