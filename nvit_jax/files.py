"""Files that are never half-written: JSON, directories, arrays.

Everything is written beside its place and renamed. Arrays are stored with Orbax and restored as NumPy, so that a
checkpoint opens on any number and kind of devices.
"""

import contextlib
import fnmatch
import json
import logging
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nvit_jax.errors import UserError
from nvit_jax.parallel import fetch, is_main, wait_for_all

Path = pathlib.Path
# Orbax logs every save, and tracebacks of what is raised here, too; a run has its own lines.
logging.getLogger("absl").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line; what stood at `path` before is still there."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"no permission to write {path}: {error.strerror}") from error
    except OSError as error:
        raise UserError(
            f"could not write {path}: {error.strerror or error}; what was there before is intact"
        ) from error
    except ValueError as error:  # tensorstore reports a full disk as ValueError("RESOURCE_EXHAUSTED: ...")
        if "EXHAUSTED" in str(error) or "No space" in str(error) or "File too large" in str(error):
            raise UserError(f"could not write {path}: no space left; what was there before is intact") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write beside and rename; the main process alone does."""
    if not is_main():
        return
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.tmp")
        try:
            with open(beside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write beside and rename; the main process alone does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """UserError when the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


@contextlib.contextmanager
def new_directory(path: Path, own: Sequence[str]) -> Iterator[Path]:
    """A directory to fill; it takes the place of `path` when the block ends well, and vanishes when it does not.

    `own` are names, or patterns of names, that the writer gives to what it puts there. What else lies in `path` is not
    its own and stays: it is moved into the new directory at the end. With several processes all of them enter: arrays
    are saved by all through Orbax, other files by the main one.
    """
    path = _real(path)

    def is_own(file: str) -> bool:
        return any(fnmatch.fnmatch(file.split("/")[0], name) for name in own)

    with saving(path):
        beside, old = _beside(path, "tmp"), _beside(path, "old")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; a directory is to be written there")
        recover(path)
        if is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            if old.is_dir():  # killed while it was cleared away
                hand_over(old, path, is_own)
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
        wait_for_all(f"fill {path}")
        try:
            yield beside
            wait_for_all(f"filled {path}")
            if is_main():
                if path.exists():
                    os.replace(path, old)
                os.replace(beside, path)
                if old.is_dir():
                    hand_over(old, path, is_own)
            wait_for_all(f"renamed {path}")
        finally:
            if is_main():
                shutil.rmtree(beside, ignore_errors=True)


def recover(path: Path) -> None:
    """Put back what `new_directory` had moved aside when it was killed between its two renames."""
    path = _real(path)
    old = _beside(path, "old")
    if not path.exists() and old.is_dir() and is_main():
        os.replace(old, path)


def _real(path: Path) -> Path:
    """What may be renamed: where a link leads to, and a name for "." and ".."."""
    return path.resolve() if path.is_symlink() or path.name in ("", "..") else path


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def list_files(root: Path) -> list[str]:
    """Paths below `root`, relative to it, of all files and links, sorted. Links are not followed."""
    found: list[Path] = []
    if root.is_dir() and not root.is_symlink():
        for folder, directories, names in os.walk(root):
            links = [name for name in directories if os.path.islink(os.path.join(folder, name))]  # noqa: PTH114, PTH118
            found += [Path(folder, name) for name in (*names, *links)]
    return sorted(file.relative_to(root).as_posix() for file in found)


def remove_empty(root: Path) -> None:
    """Remove the directories below `root` that hold no file, and itself if it is one."""
    for folder, _, _ in os.walk(root, topdown=False):
        with contextlib.suppress(OSError):  # it holds something
            Path(folder).rmdir()


def hand_over(old: Path, new: Path, own: Callable[[str], bool], last: str = "") -> list[Path]:
    """Remove the files of `old` that are `own`, move all others to their places in `new`, and remove `old`.

    `own` is asked for paths relative to `old`. `last` goes last: until then, a call that was killed can be made again.
    Where a place is taken, the file goes beside it under another name; those are returned.
    """
    renamed = []
    for file in sorted(list_files(old), key=lambda file: (file == last, file)):
        if own(file):
            (old / file).unlink()
            continue
        place = free_place(new, file)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(old / file, place)
        if place != new / file:
            renamed.append(place)
    remove_empty(old)
    return renamed


def free_place(root: Path, file: str) -> Path:
    """root/file, or a name like it where that is taken: NAME.kept, NAME.kept2, ..."""
    place, number = root / file, 1
    while any(parent.is_file() or parent.is_symlink() for parent in place.parents if parent.is_relative_to(root)):
        place = place.parent.with_name(f"{place.parent.name}-{place.name}")
    taken = place
    while os.path.lexists(place):
        place = taken.with_name(f"{taken.name}.kept{number if number > 1 else ''}")
        number += 1
    return place


def save_arrays(path: Path, tree: Any) -> None:
    """A pytree of arrays as an Orbax checkpoint at `path`, which must not exist."""
    # Compression gains 7 % on float32 weights and doubles the memory of saving.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as saver:
        saver.save(path.absolute(), fetch(tree))


def load_arrays(path: Path) -> Any:
    """Nested dicts of NumPy arrays. UserError when they are missing or damaged."""
    if not path.is_dir():
        raise UserError(f"{path} is missing")
    try:
        with ocp.PyTreeCheckpointer() as loader:
            metadata = loader.metadata(path.absolute()).item_metadata.tree
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            return loader.restore(path.absolute(), restore_args=args)
    except Exception as error:  # Orbax and tensorstore raise many types for one damaged file
        raise UserError(f"{path} is damaged: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def fingerprint(*paths: Path) -> str:
    """Of the content of files, and of all files below directories."""
    value = 0
    for path in paths:
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            with open(file, "rb") as content:
                while part := content.read(2**24):
                    value = zlib.crc32(part, value)
    return f"{value:08x}"
