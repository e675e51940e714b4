"""A run's directory: which stage is done and with which config keys, its logs, its saved states, its progress bar."""

import contextlib
import fcntl
import json
import pathlib
import shutil
import signal
import sys
import time
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import tqdm
from tensorboardX import SummaryWriter

from nvit_jax.errors import UserError
from nvit_jax.files import StateSaver, read_json, saving, write_json, write_text
from nvit_jax.parallel import any_process, is_main, main_decides, wait_for_all
from nvit_jax.run.config import STAGES, default_config, flatten_config

_FOLLOW = (
    "eval",
    "export",
    "report",
    "preview",
)  # take in what is new; the other stages are redone only when what they read changed


_FREE = ("parallel", "data.workers", "data.threads", "data.max_bad_fraction")
_FREE_IN_SECTIONS = ("accumulate", "remat", "save_every")


def _changes_nothing(key: str) -> bool:
    """Where and how a stage runs, not what comes out: a begun stage may go on with another value, on other devices."""
    return key in _FREE or key.rpartition(".")[2] in _FREE_IN_SECTIONS


class StopSignal:
    """Set by the first SIGTERM or SIGINT: loops save and leave. A second one ends the process at once."""

    def __init__(self) -> None:
        self.received = False

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        self.received = False

        def handle(number: int, frame: types.FrameType | None) -> None:
            self.received = True
            for one in before:
                signal.signal(one, signal.SIG_DFL)

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


STOP = StopSignal()


class StageDir:
    """One stage of a run: W/<stage>/. Also the Monitor of its loops. The main process writes, Orbax with all."""

    def __init__(self, workdir: pathlib.Path, name: str) -> None:
        self.workdir, self.name, self.main = workdir, name, is_main()
        self.path = workdir / name
        self._bar: Any = None
        self._saver: StateSaver | None = None
        self._writer: Any = None
        self._resumed_at: int | None = None
        self.started = time.monotonic()
        self.input_wait = 0.0  # seconds in which the device waited for images

    # ------------------------------------------------------------------------------------ begin and finish

    def record(self) -> dict[str, Any] | None:
        return read_json(self.path / "stage.json") if (self.path / "stage.json").exists() else None

    def begin(self, keys: Mapping[str, Any], inputs: Mapping[str, str], *, force: bool) -> bool:
        """True when the stage has work to do (from the start, or from a saved state), False when it is done.

        `keys` are the config keys that the stage reads, `inputs` the ids of what it builds on. UserError when a
        finished or begun stage had other keys, unless `force`, which starts it anew and marks later stages stale.
        With several processes the main one begins and tells the others.
        """
        record = self.record()
        extends = False
        fresh = record is None or record["status"] == "stale" or force or self._nothing_yet(record)
        if record is not None and not fresh:
            defaults = flatten_config(default_config())
            old = {k: record["keys"].get(k, defaults.get(k)) for k in keys}  # it may be older than a key
            changed = sorted(k for k in keys if old[k] != keys[k] and not _changes_nothing(k))
            if changed:
                shown = ", ".join(f"{k}: {old.get(k)!r} -> {keys.get(k)!r}" for k in changed)
                raise UserError(
                    f"{self.path}: this stage was {'finished' if record['status'] == 'done' else 'begun'} with other "
                    f"config keys ({shown}); set them back, use another --workdir, or redo it with --force"
                )
            old_inputs = record["inputs"]
            renewed = [k for k, v in inputs.items() if old_inputs.get(k, None if self.name in _FOLLOW else v) != v]
            fresh = bool(renewed)
            extends = fresh and self.name in _FOLLOW  # what it has found out about the rest still holds
            if fresh and record["status"] == "done":
                self.say(f"done anew, since {', '.join(renewed)} changed")
        if record is not None and not fresh and record["status"] == "done":
            return False
        if record is not None and not fresh:
            write_json(self.path / "stage.json", record | {"keys": dict(keys)})
        if fresh:
            if not extends:
                (self.path / "stage.json").unlink(missing_ok=True)  # first: a kill must leave no finished stage
                shutil.rmtree(self.path, ignore_errors=True)
            if record is not None:
                self._mark_later_stale()
            write_json(
                self.path / "stage.json",
                {"status": "running", "id": uuid.uuid4().hex, "keys": dict(keys), "inputs": dict(inputs)},
            )
        return True

    def _nothing_yet(self, record: Mapping[str, Any]) -> bool:
        """Begun, but nothing saved that could be lost or resumed."""
        return record["status"] == "running" and not (
            (self.path / "cells.json").exists()
            or any((self.path / "state").glob("[0-9]*"))
            or any((self.path / "state.damaged").glob("[0-9]*"))
        )

    def _mark_later_stale(self) -> None:
        for name in STAGES[STAGES.index(self.name) + 1 :]:
            other = StageDir(self.workdir, name)
            if (record := other.record()) is not None:
                write_json(other.path / "stage.json", record | {"status": "stale"})

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json, mark the stage done, drop its saved states."""
        self._close()
        write_json(self.path / "metrics.json", metrics)
        write_json(self.path / "stage.json", (self.record() or {}) | {"status": "done"})
        wait_for_all(f"finish {self.path}")
        if self.main:
            shutil.rmtree(self.path / "state", ignore_errors=True)

    def done(self) -> bool:
        record = self.record()
        return record is not None and record["status"] == "done"

    def keys(self) -> dict[str, Any]:
        """The config keys that the stage was run with."""
        return dict((self.record() or {}).get("keys", {}))

    def id(self) -> str:
        return (self.record() or {}).get("id", "")

    # ------------------------------------------------------------------------------------------- monitor

    @property
    def stopping(self) -> bool:
        return any_process(STOP.received)  # all processes save the same step

    @property
    def saver(self) -> StateSaver:
        if self._saver is None:
            self._saver = StateSaver(self.path / "state")
        return self._saver

    def save(self, step: int, state: Any) -> None:
        self.saver.save(step, state)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of log.jsonl, and the same numbers for TensorBoard, with the part of the time spent waiting."""
        self._append("log.jsonl", {"step": step} | dict(metrics))  # no times: a resumed run writes the same lines
        self._scalars(step, dict(metrics) | {"input_wait": self.input_wait / max(self.seconds(), 1e-9)})

    def history(self, line: Mapping[str, Any]) -> None:
        """One line of history.jsonl."""
        self._append("history.jsonl", line)
        self._scalars(line["step"], {f"pruning/{k}": v for k, v in line.items() if isinstance(v, float)})

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if self.main:
            with saving(self.path / name), open(self.path / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        if not self.main:
            return
        if self._writer is None:
            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=self._resumed_at)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def cut_back(self, name: str, step: int, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the lines of a log that were written after the state saved at `step`, and a half-written last one."""
        self._resumed_at = step + 1
        path = self.path / name
        if not self.main or not path.exists():
            return
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                if keep(json.loads(line)):
                    lines.append(line)
        write_text(path, "".join(line + "\n" for line in lines))

    @contextlib.contextmanager
    def progress(self, total: int | None, initial: int = 0) -> Iterator[None]:
        """A bar with rate and time left; nothing when the output is no terminal."""
        self._bar = tqdm.tqdm(
            total=total, initial=initial, desc=self.name, unit="step", disable=None if self.main else True, leave=False
        )
        try:
            yield
        finally:
            self._bar.close()
            self._bar = None
            self._close()

    def waited(self, seconds: float) -> None:
        self.input_wait += seconds

    def advance(self, step: int, text: str, total: int | None = None) -> None:
        if self._bar is not None:
            self._bar.total = total or self._bar.total
            self._bar.update(step - self._bar.n)
            if text:
                self._bar.set_postfix_str(text, refresh=False)

    def _close(self) -> None:
        if self._saver is not None:
            self._saver.close()
            self._saver = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def say(self, text: str) -> None:
        """One line for the user, of the main process."""
        if self.main:
            tqdm.tqdm.write(f"[{self.name}] {text}", file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """One line for the user, of the process that finds something out."""
        if self.main:
            self.say(text)
        else:
            print(f"[{self.name}, process {jax.process_index()}] {text}", file=sys.stderr, flush=True)

    def seconds(self) -> float:
        return time.monotonic() - self.started


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """All lines of a .jsonl file; none when it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """No other run in this workdir meanwhile, on this machine or on another that sees the file system. UserError."""
    with contextlib.ExitStack() as stack:

        def lock() -> bool:
            file = stack.enter_context(open(path / ".lock", "w", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"--workdir={path}: another run is at work there; wait for it, end it, or use another directory "
                    "(several processes of one run need --distributed)"
                ) from error
            except OSError:  # a file system without locks
                return False
            return True

        main_decides(lock)
        yield


def check_workdir(path: pathlib.Path) -> bool:
    """Create it; UserError when it is a file or may not be written. True."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir={path} is not a directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir={path} cannot be written: {error.strerror}") from error
    return True
