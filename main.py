"""The program `nvit-jax` of a clone, installed or not: `python main.py COMMAND ...`; without a command it is `run`.

python main.py --config configs/demo.py --workdir runs/demo
python main.py --help
"""

from nvit_jax.run import cli


def main(argv: list[str]) -> int:
    """The exit code of a command line, the program's name first."""
    return cli.main(argv[1:])


if __name__ == "__main__":
    cli.command()
