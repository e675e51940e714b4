"""Numbers for TensorBoard, written at once: tensorboardX's own writer has a thread that a full disk ends unheard."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from nvit_jax.files import saving

_EVERY = 30.0  # seconds between two flushes, which wait for the disk


class Scalars:
    """An events file in a directory. UserError when it cannot be written.

    `purge`: TensorBoard hides what earlier files say of this step and later ones; a resumed run writes them again.
    """

    def __init__(self, directory: Path, purge: int | None = None) -> None:
        self._directory = directory
        with saving(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(str(directory / "events"))
            if purge is not None:
                start = SessionLog(status=SessionLog.START)
                self._file.write_event(Event(wall_time=_stamp(), step=purge, session_log=start))
            self._file.flush()
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One number for each name."""
        with saving(self._directory):
            for name, value in values.items():
                self._file.write_event(Event(wall_time=_stamp(), step=step, summary=scalar(name, value)))
            if time.monotonic() - self._flushed > _EVERY:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Close the file."""
        with saving(self._directory):
            self._file.close()


def _stamp() -> float:
    """What TensorBoard shows as the time of a point; nothing is decided by it."""
    return time.clock_gettime(time.CLOCK_REALTIME)
