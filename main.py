"""The program `nvit-jax` of a clone, installed or not: `python main.py COMMAND ...`; without a command it is `run`.

python main.py --config configs/demo.py --workdir runs/demo
python main.py --help
"""

import os
import signal


def main(argv: list[str]) -> int:
    """The exit code of a command line, the program's name first."""
    from nvit_jax.run import cli

    return cli.main(argv[1:])


def _interrupted(number: int, frame: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _interrupted)  # before anything is imported, which would make a traceback of Ctrl-C
    from nvit_jax.run import cli

    cli.command()
