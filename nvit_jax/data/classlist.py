"""A file that names the class folders, one a line, in the order of the labels: as people have it.

Columns are separated by tabs, commas, semicolons or a first blank (Kaggle's LOC_synset_mapping.txt). Which column names
the folders is found out by the folders that are there.
"""

import csv
import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from nvit_jax import paths
from nvit_jax.data.listing import normal
from nvit_jax.errors import UserError

MAX_BYTES = 2**24
# Without blanks, marks and the plural's "s": "Class names:" is "classname".
_HEADERS = frozenset(
    (
        *("category", "categorie", "categoryid", "categoryname", "class", "classe", "classid", "classname"),
        *("directory", "folder", "foldername", "id", "idx", "imageid", "index", "label", "labelid", "labelname"),
        *("name", "synset", "synsetid", "target", "wnid"),
    )
)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclasses.dataclass(frozen=True)
class ClassList:
    """Of each label: the name of its folder, and one for people."""

    folders: tuple[str, ...]
    names: tuple[str, ...]


def read_classes(path: pathlib.Path, there: Sequence[str]) -> ClassList:
    """The list in a file, for data with the folders `there`. UserError that names the line which is wrong."""
    where = f"config.data.classes={path}"
    lines = _lines(path, where)
    there = [normal(name) for name in there]
    for rows in (_split(lines, separator) for separator in _SEPARATORS):
        for column in range(min(len(row) for row in rows)):
            folders = [normal(row[column]) for row in rows]
            if set(there) <= set(folders):
                _check(lines, folders, there, where)
                return _ordered(rows, column, where)
    rows = _best(lines, there)
    folders = [normal(row[0]) for row in rows]
    _check(lines, folders, there, where)
    unknown = next(name for name in there if name not in folders)
    raise UserError(f"the folder {unknown!r} is no class of {where}, whose first line is {lines[0]!r}")


def _lines(path: pathlib.Path, where: str) -> list[str]:
    try:
        with paths.opened(path, where.removesuffix(str(path))) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{where} has more than {MAX_BYTES:,} bytes; it must name one class a line")
    if content.startswith(_UTF16) or b"\0" in content:
        raise UserError(f"{where} is no text in UTF-8; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")  # Notepad marks its files
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{where} is no text in UTF-8 (line {line}); save it as UTF-8") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")
    if not lines[0] and len(lines) == 1:
        raise UserError(f"{where} is empty; it must name one class a line")
    for number, words in enumerate(lines, 1):
        if not words.strip():
            raise UserError(f"{where}: line {number} is empty; a class's label is its line, so remove it")
    return lines


def _tabs(line: str) -> list[str]:
    return line.split("\t")


def _first_blank(line: str) -> list[str]:
    return line.split(None, 1)


def _separated(by: str) -> Callable[[str], list[str]]:
    def columns(line: str) -> list[str]:
        try:
            return next(csv.reader([line], delimiter=by, skipinitialspace=True), [""])
        except csv.Error:
            return [line]

    return columns


_SEPARATORS = (_tabs, _separated(","), _separated(";"), _first_blank)


def _split(lines: list[str], columns: Callable[[str], list[str]]) -> list[list[str]]:
    return [[cell.strip() for cell in columns(line)] or [""] for line in lines]


def _best(lines: list[str], there: Sequence[str]) -> list[list[str]]:
    """The separation by which most folders are found."""

    def hits(rows: list[list[str]]) -> int:
        return len({normal(row[0]) for row in rows} & set(there))

    return max((_split(lines, separator) for separator in _SEPARATORS), key=hits)


def _bare(name: str) -> str:
    letters = "".join(c for c in name.lower() if c.isalnum())
    return letters if letters == "class" else letters.removesuffix("s")


def _check(lines: list[str], folders: list[str], there: Sequence[str], where: str) -> None:
    """UserError for a line that names no class, and for one that names the class of another."""
    for number, (line, name) in enumerate(zip(lines, folders, strict=True), 1):
        if name in there:
            continue
        if line.startswith(("#", "//", ";")):
            raise UserError(f"{where}: line {number} is a comment; a class's label is its line, so remove it")
        if number == 1 and _bare(name) in _HEADERS:
            raise UserError(f"{where}: line 1, {line!r}, is a header; a class's label is its line, so remove it")
        if not name:
            raise UserError(f"{where}: line {number} names no class")
    first: dict[str, int] = {}
    for number, name in enumerate(folders, 1):
        if first.setdefault(name, number) != number:
            raise UserError(f"{where} must name each class once; {name!r} is in the lines {first[name]} and {number}")


def _ordered(rows: list[list[str]], column: int, where: str) -> ClassList:
    """By line; where another column counts the classes, it must count the lines, too."""
    width = min(len(row) for row in rows)
    numbers = {c for c in range(width) if c != column and all(row[c].isdecimal() and len(row[c]) < 10 for row in rows)}
    for c in sorted(numbers):
        values = [int(row[c]) for row in rows]
        order = sorted(values)
        if order in (list(range(len(rows))), list(range(1, len(rows) + 1))) and values != order:
            line = next(i for i, (a, b) in enumerate(zip(values, order, strict=True), 1) if a != b)
            raise UserError(
                f"{where}: line {line} has the number {values[line - 1]}; a class's label is its line, so sort the "
                "lines by their numbers"
            )
    names = [
        ", ".join(cell for i, cell in enumerate(row) if i != column and i not in numbers and cell) or row[column]
        for row in rows
    ]
    return ClassList(tuple(normal(row[column]) for row in rows), tuple(names))
