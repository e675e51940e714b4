"""The one exception that means "the user can fix this"."""

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class UserError(ValueError):
    """A mistake in an argument, a path, a config value or a file. One line: what is wrong, where, and what to do.

    `argument` is the name of the argument that the text begins with, where it is about one. Who calls a function
    under another name for it (a config key) says so with `renamed`. The command line prints the line and exits with 2.
    """

    def __init__(self, text: str, argument: str | None = None) -> None:
        super().__init__(text if argument is None else f"{argument}{text}")
        self.text, self.argument = text, argument


class NotFinite(UserError, FloatingPointError):
    """A number that is NaN or infinite, where it would be worked with. Both kinds of error, to be caught as either."""


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Inside of the block errors about the arguments `names` speak of the names that they have outside."""
    try:
        yield
    except UserError as error:
        if error.argument is None or error.argument not in names:
            raise
        raise UserError(error.text, names[error.argument]) from error.__cause__


def first_line(error: BaseException, most: int = 200) -> str:
    """What an error says, of another library or the system, in one line of at most `most` characters."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:most]


def nearest(name: str, known: Sequence[str]) -> str:
    """ "; did you mean 'fisher'?" for a misspelt name, "" when nothing known is like it."""
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_choice(argument: str, value: Any, choices: Sequence[Any]) -> None:
    """UserError, with the nearest one, when `value` is none of the choices."""
    if value not in choices:
        shown = ", ".join(str(choice) for choice in choices)
        near = nearest(str(value), [str(choice) for choice in choices])
        raise UserError(f"={value!r} is not one of {shown}{near}", argument)
