"""What a misspelt argument of the library's functions says, and one that is given twice."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from nvit_jax.errors import UserError, nearest
from nvit_jax.model.directory import Model

P = ParamSpec("P")
R = TypeVar("R")
_MODELS = (Model, Model | None)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, with a UserError that has the nearest name for a keyword that it does not know."""
    known = list(inspect.signature(function).parameters)
    models = [name for name, p in inspect.signature(function).parameters.items() if p.annotation in _MODELS]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise UserError(f"{function.__name__}() has no argument {name!r}{nearest(name, known)}")
        for name, value in (dict(zip(known, args, strict=False)) | kwargs).items():
            if name in models and value is not None and not isinstance(value, Model):
                raise UserError(f" is a {type(value).__name__}; it must be a Model, such as nvit.load gives", name)
        return function(*args, **kwargs)

    return call


def only_recipe(function: Callable[..., Any], names: Sequence[str], given: Sequence[Any]) -> None:
    """UserError when one of these arguments of `function` is given beside a recipe, which has it, too."""
    parameters = inspect.signature(function).parameters
    for name, value in zip(names, given, strict=True):
        default = parameters[name].default
        if value is not default and value != default:
            raise UserError(" is given beside a recipe, which has it, too; set it there", name)
