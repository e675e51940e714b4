"""Files that are never half-written: JSON, directories, arrays.

Everything is written beside its place and renamed. Arrays are stored with Orbax and restored as NumPy, so that a
checkpoint opens on any number and kind of devices.
"""

import contextlib
import fcntl
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

from nvit_jax import paths
from nvit_jax.errors import UserError, first_line
from nvit_jax.parallel import fetch, is_main, main_decides, wait_for_all
from nvit_jax.schema import ANYTHING, Shape

Path = pathlib.Path
JSON_BYTES = 2**28  # no file of ours comes near; a larger one would fill the memory
# Orbax logs every save, and tracebacks of what is raised here, too; a run has its own lines.
logging.getLogger("absl").setLevel(logging.CRITICAL)


_FULL = ("EXHAUSTED", "No space left", "File too large", "Disk quota", "file write failed")


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line; what stood at `path` before is still there."""
    try:
        yield
    except BrokenPipeError:  # of standard output
        raise
    except PermissionError as error:
        raise UserError(f"no permission to write {path}: {error.strerror}") from error
    except OSError as error:
        raise UserError(f"could not write {path}: {paths.in_words(error)}; what was there before is intact") from error
    except Exception as error:  # tensorstore, safetensors and PyTorch have errors of their own for a full disk
        memory = "EXHAUSTED" in str(error) and not isinstance(error, ValueError)  # of a device
        if any(words in str(error) for words in _FULL) and not (memory or isinstance(error, UserError)):
            raise UserError(f"could not write {path}: no space left; what was there before is intact") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write beside and rename; the main process alone does."""
    if not is_main():
        return
    path = paths.named(path)
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


def read_json(path: Path, shape: Shape = ANYTHING, what: str = "what this program writes") -> Any:
    """The value that a JSON file holds. UserError when it is missing, damaged, or of another shape (the key is named).

    `what` the file should be, for the message.
    """
    if paths.kind(path) is None:
        raise UserError(f"{path} is missing")
    value = parse_json(paths.read(path, most=JSON_BYTES), str(path))
    check_shape(path, value, shape, what)
    return value


def check_shape(path: Path | str, value: Any, shape: Shape, what: str) -> None:
    """UserError, with the key, when what a file holds is of another shape."""
    if (fault := shape.fault(value)) is not None:
        raise UserError(f"{path} is not {what}: {fault.text}")


def read_json_lines(path: Path, shape: Shape = ANYTHING) -> list[Any]:
    """The values of a .jsonl file, one a line; none when it does not exist. UserError names a damaged line."""
    if paths.kind(path) is None:
        return []
    found = []
    for number, line in enumerate(paths.read(path, most=JSON_BYTES).splitlines(), 1):
        value = parse_json(line, f"{path}: line {number}")
        if (fault := shape.fault(value)) is not None:
            raise UserError(f"{path}: line {number}: {fault.text}")
        found.append(value)
    return found


def parse_json(content: bytes | str, where: str) -> Any:
    """UserError, which begins with `where`, for what is no JSON, or so deep or long that no program has written it."""
    if not content.strip():
        raise UserError(f"{where} cannot be read: it is empty")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise UserError(f"{where} cannot be read: it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} cannot be read: it is no UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where} cannot be read: {first_line(error)}") from error
    except ValueError as error:  # Python reads no more than 4,300 digits
        raise UserError(f"{where} cannot be read: a number in it has thousands of digits") from error


@contextlib.contextmanager
def new_directory(path: Path, own: Sequence[str]) -> Iterator[Path]:
    """A directory to fill; it takes the place of `path` when the block ends well, and vanishes when it does not.

    `own` are names, or patterns of names, that the writer gives to what it puts there. What else lies in `path` is not
    its own and stays: it is moved into the new directory at the end. With several processes all of them enter: arrays
    are saved by all through Orbax, other files by the main one.
    """
    path = _real(paths.named(path))

    def is_own(file: str) -> bool:
        return any(fnmatch.fnmatch(file.split("/")[0], name) for name in own)

    with saving(path):
        beside, old = _beside(path, "tmp"), _beside(path, "old")
        paths.for_writing(path)
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


@contextlib.contextmanager
def locked(path: Path, words: str) -> Iterator[None]:
    """path/.lock is held meanwhile, on this machine or on another that sees the file system. UserError(words) when
    another process holds it; of the processes of one run the main one takes it."""
    with contextlib.ExitStack() as stack:

        def lock() -> bool:
            try:
                number = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            except PermissionError:  # another user's: looking is enough to see whether it is held
                number = os.open(path / ".lock", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except IsADirectoryError as error:
                raise UserError(f"{path / '.lock'} is a directory, not a file; move it away") from error
            except OSError as error:  # a link that leads nowhere
                raise UserError(f"{path / '.lock'}: {paths.in_words(error)}; move it away") from error
            file = stack.enter_context(os.fdopen(number, "rb", buffering=0))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(words) from error
            except OSError:  # a file system without locks
                return False
            return True

        main_decides(lock)
        yield


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
    if paths.kind(path) != "a directory":
        raise UserError(f"{path} is missing")
    for file in list_files(path):  # Orbax would wait for a pipe, and read a device for ever
        if (found := paths.kind(path / file)) not in ("a file", "a directory", None):
            raise UserError(f"{path} is damaged: {file} in it is {found}, not a file")
    try:
        with ocp.PyTreeCheckpointer() as loader:
            found = loader.metadata(path.absolute()).item_metadata
            if found is None:
                raise ValueError("the list of its arrays (_METADATA) is missing")
            metadata = found.tree
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            return loader.restore(path.absolute(), restore_args=args)
    except Exception as error:  # Orbax and tensorstore raise many types for one damaged file
        raise UserError(f"{path} is damaged: {first_line(error)}") from error


def checksum(tree: Any, value: int = 0) -> int:
    """Of the bytes of host arrays, in the order of their names, and of what `value` is the checksum of before them."""
    for leaf in jax.tree.leaves(tree):
        value = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, value)
    return value


def fingerprint(*places: Path) -> str:
    """Of the content of files, and of all files below directories. UserError for one that cannot be read."""
    value = 0
    for path in places:
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            with paths.opened(file) as content:
                try:
                    while part := content.read(2**24):
                        value = zlib.crc32(part, value)
                except OSError as error:
                    raise UserError(f"{file} cannot be read: {paths.in_words(error)}") from error
    return f"{value:08x}"
