"""The monitor of a library call: progress for a person, and a directory to resume from where one is given."""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.files import locked, read_json, saving, write_json
from nvit_jax.paths import kind, named
from nvit_jax.schema import Record, Text
from nvit_jax.training.monitor import Console, Monitor, Recorder

_RECORD = "call.json"


@contextlib.contextmanager
def open_monitor(
    progress: bool | Monitor,
    directory: str | Path | None,
    name: str,
    callback: Callable[[int, dict[str, float]], None] | None,
    arguments: Any,
) -> Iterator[Monitor]:
    """The monitor of one call.

    `directory` belongs to the call with these `arguments`: UserError when another one has begun there.
    """
    if isinstance(progress, Monitor):
        yield progress
        return
    if directory is None:
        yield Console(name, callback) if progress or callback else Monitor()
        return
    path = named(directory, "directory=")
    if kind(path) not in (None, "a directory"):
        raise UserError(f"={path} is not a directory", "directory")
    with saving(path):
        path.mkdir(parents=True, exist_ok=True)
    with locked(path, f"directory={path}: another call is at work there; wait for it, or take another one"):
        yield from _recorded(path, name, callback, arguments)


def _recorded(
    path: Path, name: str, callback: Callable[[int, dict[str, float]], None] | None, arguments: Any
) -> Iterator[Monitor]:
    _claim(path, {"call": name, "arguments": digest(arguments)})
    monitor = Recorder(path, name, callback)
    try:
        yield monitor
    finally:
        monitor.close()


def _claim(path: Path, record: dict[str, str]) -> None:
    if not (path / _RECORD).exists():
        if (path / "state").exists():
            raise UserError(f"={path} holds states of something else; take another one", "directory")
        write_json(path / _RECORD, record)
    elif (found := read_json(path / _RECORD, Record({"call": Text()}))) != record:
        raise UserError(
            f"={path} belongs to a {found['call']} with another model or other arguments; "
            "take another one, or delete it",
            "directory",
        )


def digest(value: Any) -> str:
    """A checksum of arrays and settings. Functions count by their name."""
    total = 0
    leaves, structure = jax.tree.flatten(value)
    for leaf in leaves:
        if hasattr(leaf, "shape"):
            total = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), total)
        else:
            total = zlib.crc32(_words(leaf).encode(), total)
    return f"{zlib.crc32(_words(str(structure)).encode(), total):08x}"


def _words(value: Any) -> str:
    """Settings as text, without the addresses of functions."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = (f"{f.name}={_words(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(parts)})"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    if isinstance(value, tuple) and any(callable(v) for v in value):
        return f"({', '.join(map(_words, value))})"
    return repr(value)
