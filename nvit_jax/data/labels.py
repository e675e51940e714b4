"""What the numbers of a data set's labels stand for, and which of a model's classes they are."""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from nvit_jax.data.listing import normal
from nvit_jax.errors import UserError

MAX_CLASSES = 2**20


@dataclasses.dataclass(frozen=True)
class Labels:
    """Of a source. `kind` says where its numbers come from.

    numbers: they are the source's, and have no names. named: they are the source's, with names. folders: folders were
    counted in alphabetical order. listed: a file names the classes in the order of the model's labels. none: the images
    have no labels, `where` says why, and all of their numbers are -1.
    """

    kind: Literal["numbers", "named", "folders", "listed", "none"] = "numbers"
    names: tuple[str, ...] = ()  # for people, by label
    folders: tuple[str, ...] = ()  # by label, of folders and listed
    where: str = "the data"


NUMBERS = Labels()


class Match(NamedTuple):
    """A data set's labels as a model's."""

    table: np.ndarray | None  # [classes of the data] -> the model's label; None: as they are
    labels: Labels
    words: str  # the mapping, for a person; "" where labels are numbers
    doubt: bool = False  # whether it rests on an order that nobody has confirmed


def match(labels: Labels, model: Sequence[str], count: int, *, fresh: bool = False) -> Match:
    """Which of a model's `count` classes the data's are: by name where the model's names are known. UserError.

    `fresh`: the model is to be trained for these data, so that it may have known other classes.
    """
    if labels.kind == "none":
        raise UserError(f"{labels.where}, which tell the classes; only a model without a classifier can do without")
    model = tuple(map(str, model)) if len(model) == count and len(set(map(str, model))) > 1 else ()
    own = labels.folders or labels.names
    found = _by_name(own, model)
    if fresh and len(found) < len(own):
        model, found = (), {}
    if labels.kind == "listed":
        return _listed(labels, model, count)
    if found and labels.kind != "numbers":
        if len(found) == len(own):
            words = f"labels: the {len(own)} classes of {labels.where} are the model's of the same names"
            return Match(_table(own, found), Labels("named", model, where=labels.where), words)
        _refuse_some(labels, own, found, model)
    if len(own) > count:
        raise UserError(f"the model has {count} classes, the data {len(own)}")
    if labels.kind == "numbers":
        return Match(None, dataclasses.replace(labels, names=model or labels.names), "")
    if labels.kind == "folders" and len(own) < count:
        raise UserError(
            f"the model has {count} classes, the data {len(own)} folders, which do not tell its labels: set "
            "--config.data.classes=FILE.tsv, one class folder's name a line in the order of the model's labels"
        )
    how = "in alphabetical order" if labels.kind == "folders" else "in the order of the set"
    words = f"labels: the classes of {labels.where} {how}, {_ends(own)}"
    if model:
        words += f"; the model's classes have other names, {_ends(model)}, so see whether these are the same"
    elif labels.kind == "folders" and (numbers := _other_order(own)):
        words += f"; by number {numbers[0]!r} would come before {numbers[1]!r}: if that is meant, set data.classes=FILE"
        return Match(None, labels, words, True)
    return Match(None, labels, words, bool(model))


def _listed(labels: Labels, model: tuple[str, ...], count: int) -> Match:
    own = labels.folders
    if len(own) != count:
        hint = f"its first line is {own[0]!r}, its last {own[-1]!r}"
        raise UserError(
            f"{labels.where} names {len(own)} classes, the model has {count}; it needs one line for each ({hint})"
        )
    words = f"labels: by {labels.where}, {_ends(own)}"
    for names in (own, labels.names):
        found = _by_name(names, model)
        elsewhere = [name for i, name in enumerate(names) if found.get(name, i) != i]
        if elsewhere and len(found) == count == len(set(names)):
            words = f"labels: by the model's names of classes, which {labels.where} has in another order"
            return Match(_table(names, found), Labels("named", model, where=labels.where), words, True)
        if 2 * len(elsewhere) <= count:  # such as the two cranes of ImageNet, which lists spell differently
            continue
        name = elsewhere[0]
        raise UserError(
            f"{labels.where}: line {list(names).index(name) + 1} is {name!r}, which is class {found[name]} of the "
            "model (from 0); it must name the classes in the model's order"
        )
    return Match(None, labels, words)


def _loose(name: str) -> str:
    return " ".join(normal(name).casefold().replace("_", " ").replace("-", " ").split())


def _by_name(own: Sequence[str], model: Sequence[str]) -> dict[str, int]:
    """{name: the model's label}. Case, blanks, "_" and "-" count only where names differ by nothing else."""
    found: dict[str, int] = {}
    for spell in (normal, _loose):
        known = [spell(name) for name in model]
        if len(set(known)) != len(known):  # two classes of one name, such as ImageNet's cranes
            often = collections.Counter(known)
            known = [name if often[name] == 1 else "" for name in known]
        place = {name: i for i, name in enumerate(known) if name}
        found |= {name: place[spell(name)] for name in own if name not in found and spell(name) in place}
    return found if len(set(found.values())) == len(found) else {}


def _refuse_some(labels: Labels, own: Sequence[str], found: dict[str, int], model: Sequence[str]) -> None:
    """UserError for names of which the model knows some, unless all of those stand where they are in the model."""
    unknown = next(name for name in own if name not in found)
    if labels.kind == "named" and all(own[i] == name for name, i in found.items() if i < len(own)):
        return
    what = "folder" if labels.kind == "folders" else "class"
    raise UserError(
        f"{labels.where}: the {what} {unknown!r} is no class of the model, while {next(iter(found))!r} is; it has "
        f"{_ends(model)}. Rename the {what}, or set --config.data.classes=FILE, a line for each class of the model"
    )


def _table(own: Sequence[str], found: dict[str, int]) -> np.ndarray:
    return np.array([found[name] for name in own], np.int32)


def _other_order(own: Sequence[str]) -> tuple[str, str] | None:
    """Two folders whose numbers, such as "10" or "class10", are in another order than the alphabet's."""
    if len({re.sub(r"[0-9]+", "0", name) for name in own}) != 1:
        return None
    order = sorted(own, key=lambda name: [int(number) for number in re.findall(r"[0-9]{1,18}", name)])
    place = next((i for i, (a, b) in enumerate(zip(own, order, strict=True)) if a != b), None)
    return None if place is None else (order[place], own[place])


def _ends(names: Sequence[str]) -> str:
    """The first and the last of them, with their numbers."""
    if len(names) <= 4:
        return ", ".join(f"{i} {name!r}" for i, name in enumerate(names))
    first = ", ".join(f"{i} {name!r}" for i, name in enumerate(names[:3]))
    return f"{first}, ..., {len(names) - 1} {names[-1]!r}"
