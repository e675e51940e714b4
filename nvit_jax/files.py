"""Files that are never half-written: model directories, and the train states of a run.

Everything is written beside its place and renamed. Arrays are stored with Orbax and restored as NumPy, so that a
checkpoint opens on any number and kind of devices.
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nvit_jax.errors import UserError
from nvit_jax.parallel import any_process, fetch, is_main, wait_for_all

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
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill; it takes the place of `path` when the block ends well, and vanishes when it does not.

    With several processes all of them enter: arrays are saved by all through Orbax, other files by the main one.
    """
    with saving(path):
        beside, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
        recover(path)
        if is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
        wait_for_all(f"fill {path}")
        try:
            yield beside
            wait_for_all(f"filled {path}")
            if is_main():
                shutil.rmtree(old, ignore_errors=True)
                if path.exists():
                    os.replace(path, old)
                os.replace(beside, path)
                shutil.rmtree(old, ignore_errors=True)
            wait_for_all(f"renamed {path}")
        finally:
            if is_main():
                shutil.rmtree(beside, ignore_errors=True)


def recover(path: Path) -> None:
    """Put back what `new_directory` had moved aside when it was killed between its two renames."""
    old = path.with_name(f".{path.name}.old")
    if not path.exists() and old.is_dir() and is_main():
        os.replace(old, path)


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
        raise UserError(f"{path} is damaged: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def fingerprint(path: Path) -> str:
    """Of the content of a file, or of all files below a directory."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    value = 0
    for file in files:
        value = zlib.crc32(file.read_bytes(), value)
    return f"{value:08x}"


def _checksum(tree: Any) -> int:
    value = 0
    for leaf in jax.tree.leaves(tree):
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return value


class StateSaver:
    """Train states of one stage under `directory`, the newest two kept, each with a checksum.

    A single process writes beside the training; several write together before they go on, since Orbax's barriers would
    mix with the training's.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with saving(directory):
            directory.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=jax.process_count() == 1, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_names=("state", "meta"))
        self._pending: Path | None = None

    def save(self, step: int, state: Any) -> None:
        """Begin to save. UserError when this state or the one before could not be written; older states stay."""
        self.wait()
        host = fetch(state)
        self._pending = self.directory / str(step)
        with saving(self._pending):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(host), meta=ocp.args.JsonSave({"checksum": _checksum(host)})
                ),
            )

    def wait(self) -> None:
        """Until what was last saved is there. UserError when it could not be written."""
        if self._pending is not None:
            place, self._pending = self._pending, None
            with saving(place):
                self._manager.wait_until_finished()

    def restore(self, like: Any, say: Callable[[str], None]) -> tuple[int, Any] | None:
        """(step, state) of the newest undamaged state with the structure of `like`, None when there is none.

        A damaged one is named through `say` and put aside, so that its step can be saved again. UserError when all
        are damaged, or one may not be read.
        """
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        aside = self.directory.with_name(f"{self.directory.name}.damaged")
        for step in steps:
            place = self.directory / str(step)
            state, failure = None, None
            try:
                state = self._restore_one(step, like)
            except Exception as error:  # see load_arrays
                failure = error
            if not any_process(failure is not None):  # all processes go on with the same state
                return step, state
            reason = "on another process" if failure is None else _first_line(failure)
            if isinstance(failure, OSError | MemoryError) and not isinstance(failure, FileNotFoundError):
                raise UserError(f"{place} cannot be read: {reason}") from failure
            say(f"checkpoint {place} is damaged ({reason}); it goes to {aside}; trying the one before")
            if is_main():
                aside.mkdir(exist_ok=True)
                shutil.rmtree(aside / str(step), ignore_errors=True)
                os.replace(place, aside / str(step))
            wait_for_all(f"put aside {place}")
            self._manager.reload()
        if steps or (aside.is_dir() and any(aside.iterdir())):
            raise UserError(f"no saved state of {self.directory} can be read (see {aside}); --force starts anew")
        return None

    def _restore_one(self, step: int, like: Any) -> Any:
        template = fetch(like)
        args = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), template)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(item=template, restore_args=args), meta=ocp.args.JsonRestore()
            ),
        )
        for new, old in zip(jax.tree.leaves(found.state), jax.tree.leaves(template), strict=True):
            if new.shape != old.shape:
                raise ValueError(f"an array has shape {new.shape}, expected {old.shape}")
        if _checksum(found.state) != found.meta["checksum"]:
            raise ValueError("checksum mismatch")
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(found.state) if np.issubdtype(x.dtype, np.floating)):
            raise ValueError("a number is not finite")
        return found.state

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()
