"""Where loops report to: progress and words for a person, logs and saved states for a directory.

`Monitor` is what a loop needs and does nothing; `Console` shows progress; `Recorder` also keeps files. A loop knows
none of them but by these methods.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tqdm

from nvit_jax import paths
from nvit_jax.errors import UserError
from nvit_jax.files import JSON_BYTES, parse_json, read_json_lines, saving, write_text
from nvit_jax.parallel import is_main
from nvit_jax.schema import Record, Shape, whole
from nvit_jax.training.states import StateSaver
from nvit_jax.training.trace import Trace

_LINE = Record({"step": whole(0)})
_EVERY = 30.0  # seconds between two lines of progress where the output is no terminal


class Monitor:
    """Takes a loop's reports and keeps none of them."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.input_wait = 0.0  # seconds in which the device waited for images

    @property
    def stopping(self) -> bool:
        """Asked to stop: the loop saves and leaves."""
        return False

    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self.started

    def waited(self, seconds: float) -> None:
        """For a batch, while the device had nothing to do."""
        self.input_wait += seconds

    def say(self, text: str) -> None:
        """One line for a person."""

    def warn(self, text: str) -> None:
        """One line for a person, of the process that finds something out."""
        self.say(text)

    @contextlib.contextmanager
    def progress(self, total: int | None, initial: int = 0, *, what: str = "", unit: str = "step") -> Iterator[None]:
        """A task of `total` units begins, of which `initial` are done; `advance` speaks of it until the block ends."""
        yield

    def advance(self, done: int, text: str = "", total: int | None = None) -> None:
        """So many units of the task are done."""

    def stepped(self, newest: Any) -> None:
        """One more optimizer step is on its way; `newest` is there when it is done."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one optimizer step."""

    def history(self, line: Mapping[str, Any]) -> None:
        """What one pruning did."""

    def save(self, step: int, state: Any) -> None:
        """Keep a state to resume from."""

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """(number, state) of the newest state kept, None when there is none."""
        return None

    def resume(self, step: int, prunings: int = 0) -> None:
        """Work goes on after this step and pruning: lines written later than that are dropped."""


class Console(Monitor):
    """Shows progress: a bar with rate and time left in a terminal, elsewhere a line every half minute."""

    def __init__(self, name: str = "", callback: Callable[[int, dict[str, float]], None] | None = None) -> None:
        super().__init__()
        self.name, self._callback = name, callback
        self._tasks: list[_Task] = []

    def say(self, text: str) -> None:
        if is_main():
            tqdm.tqdm.write(f"[{self.name}] {text}" if self.name else text, file=sys.stdout)
            sys.stdout.flush()

    @contextlib.contextmanager
    def progress(self, total: int | None, initial: int = 0, *, what: str = "", unit: str = "step") -> Iterator[None]:
        self._tasks.append(_Task(self.say, " ".join(filter(None, (self.name, what))), what, unit, total, initial))
        try:
            yield
        finally:
            self._tasks.pop().close()

    def advance(self, done: int, text: str = "", total: int | None = None) -> None:
        if self._tasks:
            self._tasks[-1].advance(done, text, total)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._callback is not None:
            self._callback(step, dict(metrics))


class _Task:
    """One task under way."""

    def __init__(
        self, say: Callable[[str], None], title: str, what: str, unit: str, total: int | None, initial: int
    ) -> None:
        self._say, self._what, self._unit, self._initial = say, what, unit, initial
        self._said = time.monotonic()
        self._first: tuple[int, float] | None = None  # (units, when) of the first report; before it, programs compile
        hidden = None if is_main() else True  # None: shown in a terminal only
        self._bar: Any = tqdm.tqdm(
            total=total, initial=initial, desc=title or None, unit=unit, disable=hidden, leave=False
        )
        self._lines = bool(self._bar.disable) and is_main()
        self._total = total

    def advance(self, done: int, text: str, total: int | None) -> None:
        self._total = total or self._total
        self._first = self._first or (done, time.monotonic())
        if not self._bar.disable:
            self._bar.total = self._total
            self._bar.update(done - self._bar.n)
            if text:
                self._bar.set_postfix_str(text, refresh=False)
        elif self._lines and time.monotonic() - self._said >= _EVERY and done > self._initial:
            self._said = time.monotonic()
            self._say(self._line(done, text))

    def _line(self, done: int, text: str) -> str:
        first, since = self._first or (done, 0.0)
        rate = (done - first) / max(time.monotonic() - since, 1e-9)
        parts = [f"{self._unit} {done}" + (f" of {self._total}" if self._total else "")]
        parts += ([f"{rate:.3g} a second"] if rate else []) + ([text] if text else [])
        if self._total and rate:
            parts.append(f"{tqdm.tqdm.format_interval(max(self._total - done, 0) / max(rate, 1e-9))} left")
        return (f"{self._what}: " if self._what else "") + ", ".join(parts)

    def close(self) -> None:
        self._bar.close()


class Recorder(Console):
    """Also keeps files in a directory: log.jsonl, history.jsonl, tensorboard/, state/. The main process writes."""

    def __init__(
        self, path: Path, name: str = "", callback: Callable[[int, dict[str, float]], None] | None = None
    ) -> None:
        super().__init__(name, callback)
        self.path = path
        self._saver: StateSaver | None = None
        self._writer: Any = None
        self._resumed_at: int | None = None
        self._trace: Trace | None = None

    def trace(self, steps: int) -> None:
        """Of the steps to come the profiler shall see so many; the main process's devices are traced."""
        self._trace = Trace(self.path / "profile", steps) if steps and is_main() else None

    def stepped(self, newest: Any) -> None:
        if self._trace is not None and self._trace.step(newest):
            self._traced()

    def _traced(self) -> None:
        assert self._trace is not None
        self.say(f"trace of the training steps: {self._trace.path} (TensorBoard; *.json.gz in it for ui.perfetto.dev)")
        self._trace = None

    # ------------------------------------------------------------------------------------------- states

    @property
    def _states(self) -> StateSaver:
        if self._saver is None:
            self._saver = StateSaver(self.path / "state")
        return self._saver

    def save(self, step: int, state: Any) -> None:
        self._states.save(step, state)

    def restore(self, like: Any) -> tuple[int, Any] | None:
        return self._states.restore(like, self.say)

    # --------------------------------------------------------------------------------------------- logs

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of log.jsonl, and the same numbers for TensorBoard, with the part of the time spent waiting."""
        super().log(step, metrics)
        self._append("log.jsonl", {"step": step} | dict(metrics))  # no times: a resumed run writes the same lines
        self._scalars(step, dict(metrics) | {"input_wait": self.input_wait / max(self.seconds(), 1e-9)})

    def history(self, line: Mapping[str, Any]) -> None:
        """One line of history.jsonl."""
        self._append("history.jsonl", line)
        self._scalars(line["step"], {f"pruning/{k}": v for k, v in line.items() if isinstance(v, float)})

    def resume(self, step: int, prunings: int = 0) -> None:
        self._resumed_at = step + 1
        self._cut_back("log.jsonl", lambda line: line["step"] <= step)
        self._cut_back("history.jsonl", lambda line: line["pruning"] <= prunings)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if is_main():
            self.path.mkdir(parents=True, exist_ok=True)
            with saving(self.path / name), open(self.path / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        if not is_main():
            return
        if self._writer is None:
            from nvit_jax.training.tensorboard import Scalars  # a second of imports

            self._writer = Scalars(self.path / "tensorboard", self._resumed_at)
        self._writer.write(step, values)

    def _cut_back(self, name: str, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the lines that were written after the state that is resumed, and a half-written last one."""
        path = self.path / name
        if not is_main() or not path.exists():
            return
        lines = []
        for line in paths.read(path, most=JSON_BYTES).decode(errors="replace").splitlines():
            with contextlib.suppress(UserError, KeyError, TypeError):
                if keep(parse_json(line, str(path))):
                    lines.append(line)
        write_text(path, "".join(line + "\n" for line in lines))

    @contextlib.contextmanager
    def progress(self, total: int | None, initial: int = 0, *, what: str = "", unit: str = "step") -> Iterator[None]:
        with super().progress(total, initial, what=what, unit=unit):
            try:
                yield
                if len(self._tasks) == 1 and self._saver is not None:
                    self._saver.wait()
            finally:
                if len(self._tasks) == 1:
                    self.close()

    def close(self) -> None:
        """Until what was last saved is there; log files are closed."""
        if self._trace is not None and self._trace.close():
            self._traced()
        saver, self._saver = self._saver, None
        writer, self._writer = self._writer, None
        try:
            if saver is not None:
                saver.close()
        finally:
            if writer is not None:
                writer.close()


def read_lines(path: Path, shape: Shape = _LINE) -> list[dict[str, Any]]:
    """All lines of log.jsonl or history.jsonl; none when it does not exist. UserError for a damaged one."""
    return read_json_lines(path, shape)
