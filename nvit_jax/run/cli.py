"""The program `nvit-jax`: one of its commands, its exit code, and one line for everything that goes wrong.

What needs JAX is imported by a command that runs: --help, --version and most mistakes are answered at once.
"""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from nvit_jax import __version__
from nvit_jax.errors import UserError, nearest
from nvit_jax.run import failures
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

With --debug a command that fails prints the traceback, too.
To see it work, in about 4 minutes on 2 CPU cores: nvit-jax run --config demo --workdir runs/demo
In a clone that is not installed, `python main.py` is the same program. Without a command it is `run`.
"""


def command() -> NoReturn:
    """The program."""
    failures.program(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; default: sys.argv's).

    Exit code: 0 done, 2 a mistake or what the system says of a file (one line), 143 stopped by a signal after saving,
    1 a fault of ours or a lost process.
    """
    return failures.guard(_dispatch, sys.argv[1:] if argv is None else argv)


def parse(argv: list[str]) -> tuple[Any, Any, tuple[str, ...]]:
    """(flags, config, stages) of a command line of `run`, the program's name first; see flags.parse."""
    from nvit_jax.run import flags

    return flags.parse(argv)


def _hint(name: str) -> str:
    """What may have been meant: a command, or a stage, such as "evaluate"."""
    from nvit_jax.run.config import STAGES

    stage = next((stage for stage in STAGES if name.startswith(stage)), "")
    return nearest(name, list(COMMANDS)) or (f"; the stage is nvit-jax run --stage {stage}" if stage else "")


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if words[0] == "--version":
        print(f"nvit-jax {__version__}")
        return 0
    name, rest = ("run", words) if words[0].startswith("-") else (words[0], words[1:])
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{_hint(name)} (known: {', '.join(COMMANDS)})")
    if "-h" in rest or "--help" in rest:
        print(COMMANDS[name].usage(), end="")
        return 0
    return COMMANDS[name].execute(rest)
