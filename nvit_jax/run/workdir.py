"""A run's directory, and what a stage promises about its own: it begins, goes on, is done, and is done anew.

A stage works in W/<stage>/ the first time. One that is done anew is built in W/.new/<stage>/ while the old one stays
as it is, and takes its place when it is whole. A stage replaces and removes nothing that it has not written.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import sys
import threading
import types
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from nvit_jax import files, paths
from nvit_jax.errors import UserError
from nvit_jax.files import hand_over, write_json
from nvit_jax.parallel import any_process, is_main, main_decides, wait_for_all
from nvit_jax.run import reads
from nvit_jax.run.config import STAGES
from nvit_jax.run.writes import OUTPUTS, RECORD, read_record
from nvit_jax.training.monitor import Recorder

Path = pathlib.Path


class StopSignal:
    """Set by the first SIGTERM or SIGINT: loops save and leave. A second one ends the process at once."""

    def __init__(self) -> None:
        self.received = False

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        self.received = False

        def handle(number: int, frame: types.FrameType | None) -> None:
            self.received = True

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        # Python calls a handler when the main thread is back from a compilation, and once for several signals. The
        # numbers of all of them come through this pipe at once.
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        outer = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        threading.Thread(target=_end_at_second, args=(reads, tuple(before)), name="second signal", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(outer)
            os.close(writes)  # ends the thread
            for number, handler in before.items():
                signal.signal(number, handler)


def _end_at_second(pipe: int, numbers: Sequence[int]) -> None:
    """End this process when a second one of the signals comes; return when the pipe is closed."""
    seen = 0
    while found := os.read(pipe, 1):
        seen += found[0] in numbers
        if seen == 2:
            os._exit(128 + found[0])
    os.close(pipe)


STOP = StopSignal()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a stage would do now."""

    path: Path | None  # where it works; None: it is done
    fresh: bool = True  # from the start, not from what a stopped one has kept
    carry: Path | None = None  # where what still holds comes from
    why: str = ""  # a line for the user

    @property
    def works(self) -> bool:
        return self.path is not None


class StageDir(Recorder):
    """One stage of a run. `place` is W/<stage>; `path` is where it works: there, or beside it while it is done anew.

    Also the Recorder of its loops. The main process writes, Orbax with all.
    """

    def __init__(self, workdir: Path, name: str) -> None:
        super().__init__(workdir / name, name)
        self.workdir, self.place = workdir, workdir / name
        self._new, self._old = workdir / ".new" / name, workdir / ".old" / name
        self.outputs = OUTPUTS[name]

    # ------------------------------------------------------------------------------------------- what it is

    def record(self) -> dict[str, Any] | None:
        """What stage.json says: status, id, keys, inputs, files."""
        return read_record(self.path)

    def done(self) -> bool:
        record = self.record()
        return record is not None and record["status"] == "done"

    def keys(self) -> dict[str, Any]:
        """The config keys that the stage was run with."""
        return dict((self.record() or {}).get("keys", {}))

    def id(self) -> str:
        """Of what the stage has made; another one when it is made again."""
        return (self.record() or {}).get("id", "")

    @property
    def stopping(self) -> bool:
        return any_process(STOP.received)  # all processes save the same step

    def warn(self, text: str) -> None:
        if is_main():
            self.say(text)
        else:
            print(f"[{self.name}, process {jax.process_index()}] {text}", file=sys.stderr, flush=True)

    # ------------------------------------------------------------------------------------------------ begin

    def judge(self, keys: Mapping[str, Any], inputs: Mapping[str, str], *, force: bool, stale: bool = False) -> Verdict:
        """Whether and where the stage has work to do. Writes nothing.

        `keys` are the config keys that it reads, `inputs` the ids of what it builds on; `stale`: an earlier stage will
        have been done anew. UserError when a finished or begun stage had other keys, or the user's files had another
        content, unless `force`, which begins anew.
        """
        there, redo = read_record(self.place), read_record(self._new)
        finished = there is not None and there["status"] != "running"
        valid = there is not None and there["status"] == "done" and not stale
        redo = redo if redo is not None and redo["status"] == "running" else None
        at = self._new if finished or redo else self.place
        if force:
            return Verdict(at)
        since = None if there is None else reads.changes(self.name, there, keys, inputs)
        unchanged = valid and since is not None and not since.any
        begun, kept = redo or (None if finished else there), self.outputs.kept(at)
        if begun is not None:
            found = reads.changes(self.name, begun, keys, inputs)
            if not found.any:
                return Verdict(at, fresh=not kept, why="goes on with what was begun anew" if kept and finished else "")
            if kept and not unchanged:
                self._refuse_changes(found, keys, inputs, "begun")
                carry = at if found.only_models else None
                return Verdict(at, carry=carry, why=f"begun anew, since {found.names} changed")
        if since is None or not finished:
            return Verdict(at)
        if unchanged:
            return Verdict(
                None, why=f"what was begun anew with other keys waits in {self._new}" if redo and kept else ""
            )
        if valid:
            self._refuse_changes(since, keys, inputs, "finished")
        why = f"{since.names} changed" if valid else "an earlier stage was"
        return Verdict(at, carry=self.place if since.only_models else None, why=f"done anew, since {why}")

    def _refuse_changes(
        self, found: reads.Changes, keys: Mapping[str, Any], inputs: Mapping[str, str], was: str
    ) -> None:
        if found.keys:
            shown = ", ".join(f"{k}: {then!r} -> {now!r}" for k, (then, now) in sorted(found.keys.items()))
            raise UserError(
                f"{self.place}: this stage was {was} with other config keys ({shown}); set them back, use another "
                "--workdir, or redo it with --force"
            )
        if found.files and self.name not in reads.FOLLOW:
            key = found.files[0]
            raise UserError(
                f"{self.place}: config.{key}: the content of {keys[key]} has changed since this stage was {was}; put "
                "it back, use another --workdir, or redo it with --force"
            )

    def begin(self, keys: Mapping[str, Any], inputs: Mapping[str, str], *, force: bool, command: str = "") -> bool:
        """True when the stage has work to do, at `path` (from the start, or from a saved state); False when it is done.

        As `judge`. With several processes the main one begins and tells the others.
        """
        works = main_decides(lambda: self._begin(self.judge(keys, inputs, force=force), keys, inputs, command))
        if main_decides(lambda: self.path == self._new):
            self.path = self._new
        return works

    def _begin(self, verdict: Verdict, keys: Mapping[str, Any], inputs: Mapping[str, str], command: str) -> bool:
        if verdict.why:
            self.say(verdict.why)
        if verdict.path is None:
            return False
        self.check_place(verdict)
        self.path = verdict.path
        record = self.record()
        if verdict.fresh:
            if record is not None:  # a kill in between must not leave a part of it to go on from
                write_json(self.path / RECORD, record | {"status": "stale"})
            here = verdict.carry == self.path
            self.outputs.clear(self.path, record, self.outputs.carries if here else ())
            self._carry(None if here else verdict.carry)
            record = {"id": uuid.uuid4().hex, "inputs": dict(inputs)}
        facts = {"status": "running", "keys": dict(keys)} | ({"command": command} if command else {})
        write_json(self.path / RECORD, (record or {}) | facts)
        return True

    def _carry(self, source: Path | None) -> None:
        for name in self.outputs.carries:
            if source is not None and (source / name).is_file():
                self.path.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, self.path / name)

    def check_place(self, verdict: Verdict) -> None:
        """UserError when the stage cannot work at `verdict.path` without touching what is somebody else's."""
        if verdict.path == self.place and read_record(self.place) is None:
            taken = self.outputs.taken(self.place)
            if taken is not None:
                raise UserError(
                    f"{self.place} holds {taken}, which this stage did not write; move it away or use another --workdir"
                )
        if verdict.path == self._new and self.place.is_symlink():
            raise UserError(f"{self.place} is a link to {self.place.resolve()}; run this stage there")

    # ----------------------------------------------------------------------------------------------- finish

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json, mark the stage done, drop its saved states; what was done anew takes its place."""
        self.close()
        write_json(self.path / "metrics.json", metrics)
        wait_for_all(f"finish {self.place}")
        if is_main():
            facts = {"status": "done", "files": self.outputs.written(self.path)}
            write_json(self.path / RECORD, (self.record() or {}) | facts)
            self.outputs.drop_states(self.path)
            if self.path == self._new:
                self._take_place()
        wait_for_all(f"finished {self.place}")
        self.path = self.place

    def _take_place(self) -> None:
        """W/.new/<stage> becomes W/<stage>."""
        if self.place.exists():
            self._old.parent.mkdir(exist_ok=True)
            os.replace(self.place, self._old)
        os.replace(self._new, self.place)
        self._settle()

    def _settle(self) -> None:
        """What was made of the old one is stale now; files in it that the stage has not written are taken over."""
        for name in STAGES[STAGES.index(self.name) + 1 :]:
            later = StageDir(self.workdir, name)
            if later.done():
                write_json(later.place / RECORD, (later.record() or {}) | {"status": "stale"})
        own = self.outputs.own(read_record(self._old))
        for file in hand_over(self._old, self.place, own, last=RECORD):
            self.say(f"{file} is yours; the stage has written a file of its name")
        for place in (self._new.parent, self._old.parent):
            with contextlib.suppress(OSError):  # another stage is done anew
                place.rmdir()

    def recover(self) -> None:
        """End what a kill has left half-done in `_take_place`."""
        if self._old.is_dir() and self.place.exists():
            self._settle()
        redo = read_record(self._new)
        if redo is not None and redo["status"] == "done":
            self._take_place()
        elif self._old.is_dir():
            os.replace(self._old, self.place)


def recover(workdirs: Iterable[Path]) -> bool:
    """End what a killed run has left half-done in some workdirs. True."""
    for workdir in workdirs:
        for name in STAGES:
            StageDir(workdir, name).recover()
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """No other run in this workdir meanwhile, on this machine or on another that sees the file system. UserError."""
    text = (
        f"--workdir={path}: another run is at work there; wait for it, end it, or use another directory "
        "(several processes of one run need --distributed)"
    )
    with files.locked(path, text):
        yield


def check_workdir(path: Path) -> bool:
    """Create it; UserError when it is a file or may not be written. True."""
    if paths.kind(path, "--workdir=") not in (None, "a directory"):
        raise UserError(f"--workdir={path} is not a directory")
    paths.for_writing(path, "--workdir=")
    for name in (*STAGES, ".new", ".old"):
        if (found := paths.kind(path / name)) not in (None, "a directory"):
            raise UserError(f"{path / name} is {found}, not a directory; move it away or use another --workdir")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir={path} cannot be written: {paths.in_words(error)}") from error
    return True
