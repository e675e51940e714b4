"""What a misspelt argument of the library's functions says, and one that is given twice."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from nvit_jax.errors import UserError, nearest

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, with a UserError that has the nearest name for a keyword that it does not know."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise UserError(f"{function.__name__}() has no argument {name!r}{nearest(name, known)}")
        return function(*args, **kwargs)

    return call


def only_recipe(function: Callable[..., Any], names: Sequence[str], given: Sequence[Any]) -> None:
    """UserError when one of these arguments of `function` is given beside a recipe, which has it, too."""
    parameters = inspect.signature(function).parameters
    for name, value in zip(names, given, strict=True):
        default = parameters[name].default
        if value is not default and value != default:
            raise UserError(" is given beside a recipe, which has it, too; set it there", name)
