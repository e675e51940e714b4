"""The program `nvit-jax`: one of its commands, its exit code, and one line for everything that goes wrong.

What needs JAX is imported by a command that runs: --help, --version and most mistakes are answered at once.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from nvit_jax import __version__
from nvit_jax.errors import UserError, nearest
from nvit_jax.run.commands import convert, prune, run

COMMANDS = {"run": run, "prune": prune, "convert": convert}
_USAGE = """\
nvit-jax: prune Vision Transformers with Hessian-aware saliency.

  nvit-jax prune CHECKPOINT --data FOLDER --macs 0.6 --out DIR      the short way: convert, prune, evaluate [--finetune]
  nvit-jax run --config CONFIG --workdir DIR [--config.KEY=VALUE]   the stages of a config: pretrain, latency, prune,
                                                                    finetune, eval, export, report, preview
  nvit-jax convert FILE DIR                                         a checkpoint made elsewhere -> a model directory
  nvit-jax COMMAND --help                                           all about one of them, with examples
  nvit-jax --version

To see it work, in about 3 minutes on 2 CPU cores: nvit-jax run --config demo --workdir runs/demo
In a clone that is not installed, `python main.py` is the same program. Without a command it is `run`.
"""


def command() -> NoReturn:
    """The program."""
    try:
        code = main()
    except KeyboardInterrupt:  # where nothing listens: a run saves and says 143
        code = _failed("interrupted", 130)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # everything is closed; a thread of Orbax whose save has failed would be waited for
    sys.exit(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; default: sys.argv's).

    Exit code: 0 done, 2 a mistake or a value that is not finite (one line), 143 stopped by a signal after saving.
    """
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
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


def parse(argv: list[str]) -> tuple[Any, Any, tuple[str, ...]]:
    """(flags, config, stages) of a command line of `run`, the program's name first; see flags.parse."""
    from nvit_jax.run import flags

    return flags.parse(argv)


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if words[0] == "--version":
        print(f"nvit-jax {__version__}")
        return 0
    name, rest = ("run", words) if words[0].startswith("-") else (words[0], words[1:])
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest(name, list(COMMANDS))} (known: {', '.join(COMMANDS)})")
    if "-h" in rest or "--help" in rest:
        print(COMMANDS[name].usage(), end="")
        return 0
    return COMMANDS[name].execute(rest)


# What JAX says when another process does not answer any more.
_LOST = ("UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "Gloo", "heartbeat", "arrier", "Connection")


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
