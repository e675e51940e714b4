"""An argparse parser whose mistakes are one line, with the nearest option for a misspelt one."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from nvit_jax.errors import UserError, nearest
from nvit_jax.model.sizes import Size, parse


class Parser(argparse.ArgumentParser):
    """Of one command. `description` says what it does, `examples` how it is called."""

    def __init__(self, name: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"nvit-jax {name}",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,  # cli.py answers --help before anything is parsed
            allow_abbrev=False,
        )
        self._names = ["-h", "--help"]
        self.option("-h", "--help", action="store_true", help="print this")

    def option(self, *names: str, **how: Any) -> None:
        """As add_argument; `read` knows the names."""
        self._names += names
        self.add_argument(*names, **how)

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The arguments. UserError for everything that is wrong with them."""
        for word in words:
            name = word.split("=", 1)[0]
            if name.startswith("--") and name not in self._names:
                raise UserError(f"unknown option {name}{nearest(name, self._names)} (see {self.prog} --help)")
        return self.parse_args(words)

    def error(self, message: str) -> NoReturn:
        """What argparse finds, as one line of ours."""
        raise UserError(f"{message} (see {self.prog} --help)")


def at_least_one(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, at least 1")
    return int(text)


def at_least_zero(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, at least 0")
    return int(text)


def image_size(text: str) -> Size:
    """A whole number, or height and width with an x between them."""
    size = parse(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, at least 1, or two as in 256x128")
    return size


def positive(text: str) -> float:
    """A number > 0."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0")
    return value


def ratio(text: str) -> float:
    """A part of the dense model, in (0, 1]."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give the part that stays, above 0 and at most 1, such as 0.6")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
