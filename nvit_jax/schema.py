"""What a value may be, declared: of a config key, or of a place in a JSON file. Needs no JAX.

Every shape answers two questions: `fault(value)`, what is wrong with a value, and `words`, what is right, for a page of
the documentation. Numbers are finite everywhere.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from nvit_jax.errors import UserError, nearest
from nvit_jax.paths import named


class Fault(NamedTuple):
    """What is wrong, and where inside of the value: "" or ".heads[2]"."""

    words: str
    where: str = ""

    @property
    def text(self) -> str:
        """Both: "heads[2] must be a whole number"."""
        return f"{self.where.removeprefix('.')} {self.words}".lstrip()

    def inside(self, where: str) -> "Fault":
        """The same, seen from outside."""
        return Fault(self.words, f"{where}{self.where}")


class Shape(Protocol):
    """A kind of value."""

    @property
    def words(self) -> str:
        """What such a value is: "a whole number >= 1"."""

    def fault(self, value: Any) -> Fault | None:
        """None for a value of this shape."""


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number. `least` and `most` belong to it, `above` and `below` do not; `said` is the range in words."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    whole: bool = False
    said: str = ""

    @property
    def words(self) -> str:
        return f"a {'whole ' if self.whole else ''}number {self._range}".rstrip()

    @property
    def _range(self) -> str:
        low, high = (self.above if self.least is None else self.least), (self.below if self.most is None else self.most)
        if self.said:
            return self.said
        if low is not None and high is not None and self._is_short:
            ends = "(" if self.least is None else "[", ")" if self.most is None else "]"
            return f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
        at_least = "" if low is None else f"{'>' if self.least is None else '>='} {low:g}"
        shown = "" if high is None else f"{high:,.0f}" if high < 1e15 else f"{high:g}"
        at_most = "" if high is None else f"{'<' if self.most is None else '<='} {shown}"
        return " and ".join(filter(None, (at_least, at_most)))

    def fault(self, value: Any) -> Fault | None:
        kinds = int if self.whole else int | float
        if not isinstance(value, kinds) or isinstance(value, bool):
            return Fault(f"must be {self.words}")
        if not _is_finite(value):
            return Fault(f"must be {self.words.replace('number', 'finite number', 1)}")
        good = (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        if good:
            return None
        if self.said or self._is_short:
            return Fault(f"must be {self._range}")
        too_high = self.most is not None and value > self.most
        side = Number(most=self.most) if too_high else Number(self.least, above=self.above)
        return Fault(f"must be {side._range}")

    @property
    def _is_short(self) -> bool:
        """Whether both ends fit into a message."""
        high = self.below if self.most is None else self.most
        return high is None or high < 1000


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False


def whole(least: int | None = None, most: int | None = None, said: str = "") -> Number:
    """A whole number; bool is none."""
    return Number(least, most, whole=True, said=said)


@dataclasses.dataclass(frozen=True)
class Sides:
    """The size of an image: a whole number, or a list of two, height and width."""

    of: Number

    @property
    def words(self) -> str:
        return f"{self.of.words}, or a list of height and width"

    def fault(self, value: Any) -> Fault | None:
        if isinstance(value, list | tuple) and len(value) == 2:
            return Each(self.of).fault(value)
        return self.of.fault(value) if type(value) is int else Fault(f"must be {self.words}")


@dataclasses.dataclass(frozen=True)
class Flag:
    """True or False."""

    words: str = "True or False"

    def fault(self, value: Any) -> Fault | None:
        return None if isinstance(value, bool) else Fault(f"must be {self.words}")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text."""

    words: str = "a text"

    def fault(self, value: Any) -> Fault | None:
        return None if isinstance(value, str) else Fault(f"must be {self.words}")


@dataclasses.dataclass(frozen=True)
class Place:
    """A path of this machine, whether something is there or not."""

    words: str = "a path"

    def fault(self, value: Any) -> Fault | None:
        if not isinstance(value, str):
            return Fault(f"must be {self.words}")
        try:
            named(value)
        except UserError as error:
            return Fault(str(error).rpartition(": ")[2])
        return None


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of a few."""

    choices: Sequence[Any]

    @property
    def words(self) -> str:
        *others, last = map(str, self.choices)
        return f"{', '.join(others)} or {last}" if others else last

    def fault(self, value: Any) -> Fault | None:
        if any(value is choice or (type(value) is type(choice) and value == choice) for choice in self.choices):
            return None
        near = nearest(value, [c for c in self.choices if isinstance(c, str)]) if isinstance(value, str) else ""
        return Fault(f"must be {self.words}{near}")


@dataclasses.dataclass(frozen=True)
class Maybe:
    """Something, or None."""

    of: Shape

    @property
    def words(self) -> str:
        return f"{self.of.words}, or None"

    def fault(self, value: Any) -> Fault | None:
        return None if value is None else self.of.fault(value)


@dataclasses.dataclass(frozen=True)
class ZeroOr:
    """0, which switches something off, or a number."""

    of: Number

    @property
    def words(self) -> str:
        return f"0, or {self.of.words}"

    def fault(self, value: Any) -> Fault | None:
        zero = isinstance(value, int | float) and not isinstance(value, bool) and value == 0
        return None if zero or self.of.fault(value) is None else Fault(f"must be {self.words}")


@dataclasses.dataclass(frozen=True)
class Each:
    """A tuple or list of one kind.

    `what` an unknown one is called, `empty` says what is wrong with none, `every` what is wrong when one is.
    """

    of: Shape
    what: str = ""
    empty: str | None = None
    every: str | None = None

    @property
    def words(self) -> str:
        return f"a list, each {self.of.words}"

    def fault(self, value: Any) -> Fault | None:
        if isinstance(value, str) or not isinstance(value, Sequence):
            return Fault(f"must be {self.words}")
        if self.empty is not None and not value:
            return Fault(self.empty)
        for number, item in enumerate(value):
            if (fault := self.of.fault(item)) is not None:
                if isinstance(self.of, Choice):
                    choices = self.of.choices
                    near = nearest(str(item), choices)
                    return Fault(f"{self.what}{item!r} is not one of {', '.join(choices)}{near}")
                return fault.inside(f"[{number}]") if self.every is None else Fault(self.every)
        return None


@dataclasses.dataclass(frozen=True)
class Record:
    """An object of JSON: keys that must be there, keys that may be; others are not looked at."""

    needed: Mapping[str, Shape]
    optional: Mapping[str, Shape] = dataclasses.field(default_factory=dict)
    words: str = "an object"

    def fault(self, value: Any) -> Fault | None:
        if not isinstance(value, Mapping):
            return Fault(f"must be {self.words}")
        for key, shape in (self.needed | self.optional).items():  # type: ignore[operator]
            if key not in value:
                if key in self.needed:
                    return Fault("is missing", f".{key}")
            elif (fault := shape.fault(value[key])) is not None:
                return fault.inside(f".{key}")
        return None


@dataclasses.dataclass(frozen=True)
class Alike:
    """An object some of whose keys hold lists of one length."""

    lists: Sequence[str]
    others: Mapping[str, Shape]
    of: Each
    words: str = "an object"

    def fault(self, value: Any) -> Fault | None:
        fault = Record({**self.others, **dict.fromkeys(self.lists, self.of)}).fault(value)
        if fault is None and len({len(value[key]) for key in self.lists}) > 1:
            return Fault(f"must be as long as {self.lists[0]}", f".{self.lists[-1]}")
        return fault


@dataclasses.dataclass(frozen=True)
class Either:
    """Two kinds of object: `one` where it has the key, else `other`."""

    key: str
    one: Record
    other: Record
    words: str = "an object"

    def fault(self, value: Any) -> Fault | None:
        has = isinstance(value, Mapping) and self.key in value
        return (self.one if has else self.other).fault(value)


@dataclasses.dataclass(frozen=True)
class Table:
    """An object of JSON whose values are alike."""

    of: Shape
    words: str = "an object"

    def fault(self, value: Any) -> Fault | None:
        if not isinstance(value, Mapping):
            return Fault(f"must be {self.words}")
        for key, item in value.items():
            if (fault := self.of.fault(item)) is not None:
                return fault.inside(f".{key}")
        return None


@dataclasses.dataclass(frozen=True)
class Anything:
    """Whatever it is."""

    words: str = "anything"

    def fault(self, value: Any) -> Fault | None:
        return None


ANYTHING = Anything()


@dataclasses.dataclass(frozen=True)
class Function:
    """Something that can be called."""

    words: str = "a function"

    def fault(self, value: Any) -> Fault | None:
        return None if callable(value) else Fault(f"must be {self.words}")


@dataclasses.dataclass(frozen=True)
class Made:
    """An object of a class."""

    of: type
    words: str

    def fault(self, value: Any) -> Fault | None:
        return None if isinstance(value, self.of) else Fault(f"must be {self.words}")


def checked_values(values: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The values, by name, with NumPy's and JAX's numbers as Python's. UserError about the first of another shape."""
    found = {name: _plain(value) for name, value in values.items()}
    for name, value in found.items():
        if name in shapes and (fault := shapes[name].fault(value)) is not None:
            shown = " ".join(repr(value).split())  # of an array it has lines
            shown = shown if len(shown) <= 100 else f"{shown[:97]}..."
            raise UserError(f"={shown}: it {fault.words}" if not fault.where else f"{fault.where} {fault.words}", name)
    return found


def check_fields(instance: Any, shapes: Mapping[str, Shape]) -> None:
    """`checked_values` of a dataclass, also a frozen one."""
    values = {name: getattr(instance, name) for name in shapes}
    for name, value in checked_values(values, shapes).items():
        if value is not values[name]:
            object.__setattr__(instance, name, value)


def _plain(value: Any) -> Any:
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
