"""Saved states of a training run: the newest two, each with a checksum; a damaged one gives way to the one before."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nvit_jax.errors import UserError, first_line
from nvit_jax.files import checksum, saving
from nvit_jax.parallel import any_process, fetch, is_main, main_decides, wait_for_all


class StateSaver:
    """Train states of one stage under `directory`, the newest two kept, each with a checksum.

    The main process writes beside the training; the others read alone. Each has a manager of its own, so that Orbax's
    barriers do not mix with the training's.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=is_main(), multiprocessing_options=alone, create=False
        )

        def make() -> bool:
            with saving(directory):
                directory.mkdir(parents=True, exist_ok=True)
            return True

        main_decides(make)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_names=("state", "meta"))
        self._pending: Path | None = None

    def save(self, step: int, state: Any) -> None:
        """Begin to save. UserError, on all processes, when this state or the one before could not be written."""
        self.wait()
        host = fetch(state)
        place = self.directory / str(step)

        def begin() -> bool:
            items = ocp.args.Composite(
                state=ocp.args.PyTreeSave(host), meta=ocp.args.JsonSave({"checksum": checksum(host)})
            )
            with saving(place):
                self._manager.save(step, args=items)
            return True

        main_decides(begin)
        self._pending = place

    def wait(self) -> None:
        """Until what was last saved is there. UserError, on all processes, when it could not be written."""
        if self._pending is None:
            return
        main_decides(self._finished)
        self._pending = None

    def _finished(self) -> bool:
        if self._pending is not None:
            place, self._pending = self._pending, None
            with saving(place):
                self._manager.wait_until_finished()
        return True

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
            reason = "on another process" if failure is None else first_line(failure)
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
        if checksum(found.state) != found.meta["checksum"]:
            raise ValueError("checksum mismatch")
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(found.state) if np.issubdtype(x.dtype, np.floating)):
            raise ValueError("a number is not finite")
        return found.state

    def close(self) -> None:
        """Of this process alone: another one may have failed. UserError when the last state could not be written."""
        try:
            self._finished()
        finally:
            self._manager.close()
