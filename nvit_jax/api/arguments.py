"""What the arguments of the library's functions may be, and what a misspelt one says, or one that is given twice."""

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from nvit_jax.api.recipe import Recipe
from nvit_jax.data.augmentation import Augment
from nvit_jax.errors import UserError, nearest, renamed
from nvit_jax.model.dims import Units
from nvit_jax.model.directory import Model, check_params
from nvit_jax.model.fitting import check_masks
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.schema import Choice, Each, Function, Made, Maybe, Number, Shape, Table, Text, checked_values, whole

P = ParamSpec("P")
R = TypeVar("R")
_COUNT, _PATH = whole(1, 10**9), Made(str | os.PathLike, "a path")  # type: ignore[arg-type]
_SHAPES: dict[str, Shape] = {  # of arguments, whose function they are
    **dict.fromkeys(("batch", "images", "image", "heads"), Maybe(_COUNT)),
    "classes": Maybe(whole(0, 2**24)),
    "seed": whole(0, 2**32 - 1, "from 0 to 2**32 - 1"),
    **dict.fromkeys(("macs", "params", "latency", "max_macs", "max_params", "max_ms"), Maybe(Number())),
    **dict.fromkeys(("repeats", "neighbours"), whole(1, 10**6)),
    "opset": whole(1, 1000),
    "epochs": Number(above=0, most=1e6),
    "learning_rate": Number(0, 1e30),
    "ema": Number(0, below=1),
    "evaluate_every": Maybe(whole(0, 10**9)),
    **dict.fromkeys(("loss", "callback"), Maybe(Function())),
    "say": Function(),
    "protect": Each(whole(0), every="must be numbers of blocks, from 0"),
    "snapshots": Each(Number()),
    "kinds": Maybe(Made(Sequence, "a tuple of kinds")),
    "floors": Maybe(Table(whole(0), "a dict of kinds")),
    "directory": Maybe(_PATH),
    **dict.fromkeys(("path", "checkpoint"), _PATH),
    **dict.fromkeys(("recipe", "training"), Maybe(Made(Recipe, "a Recipe"))),
    "augment": Maybe(Made(Augment, "an Augment")),
    "masks": Maybe(Made(Units, "Units")),
    "scores": Made(Units, "Units, such as nvit.saliency gives"),
}
_COMPUTED: dict[str, Shape] = {"dtype": Choice(("float32", "bfloat16"))}  # not of what is exported
_OF_DATA: dict[str, Shape] = {
    "name": Text(),
    **dict.fromkeys(("path", "train", "val", "classes"), Maybe(_PATH)),
    "holdout": Maybe(Number(above=0, below=1)),
    "preprocessing": Maybe(Made(Preprocessing, "a Preprocessing, such as model.preprocessing")),
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, with a UserError for an argument that it does not know, with the nearest name, and for a value of
    another type or range. NumPy's numbers become Python's."""
    known = list(inspect.signature(function).parameters)
    shapes = _OF_DATA if function.__name__ == "load_dataset" else _SHAPES
    if function.__name__ in ("evaluate", "benchmark", "measure_latency"):
        shapes = shapes | _COMPUTED
    kinds = {name: p.annotation for name, p in inspect.signature(function).parameters.items()}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise UserError(f"{function.__name__}() has no argument {name!r}{nearest(name, known)}")
        for name, value in (dict(zip(known, args, strict=False)) | kwargs).items():
            wanted = kinds.get(name) if kinds.get(name) in (Model, Model | None) else object
            if not isinstance(value, wanted):  # type: ignore[arg-type]
                raise UserError(f" is a {type(value).__name__}; it must be a Model, such as nvit.load gives", name)
            if isinstance(value, Model):
                _check_model(value, name)
        checked_values(dict(zip(known, args, strict=False)), shapes)
        return function(*args, **checked_values(kwargs, shapes))

    return call


def _check_model(model: Model, name: str) -> None:
    """UserError for parameters and masks of other shapes or types than the dims'; their values are not looked at."""
    check_params(model.params, model.dims, f"{name}.params")
    if model.masks is not None:
        with renamed({"masks": f"{name}.masks"}):
            check_masks(model.masks, model.dims, 1)


def only_recipe(function: Callable[..., Any], names: Sequence[str], given: Sequence[Any]) -> None:
    """UserError when one of these arguments of `function` is given beside a recipe, which has it, too."""
    parameters = inspect.signature(function).parameters
    for name, value in zip(names, given, strict=True):
        default = parameters[name].default
        if value is not default and value != default:
            raise UserError(" is given beside a recipe, which has it, too; set it there", name)
