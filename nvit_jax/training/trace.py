"""A trace of a few training steps: what the devices did, operation by operation."""

from pathlib import Path
from typing import Any

import jax

_COMPILES = 2  # steps before the first that is traced


class Trace:
    """Of `steps` steps of a loop, written to `path` by JAX's profiler; made from the third step on.

    PATH/plugins/profile/TIME/perfetto_trace.json.gz opens in ui.perfetto.dev, PATH in TensorBoard (with xprof).
    """

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.last = path, _COMPILES + steps
        self._done, self._runs = 0, False

    def step(self, newest: Any) -> bool:
        """One more step was handed to the device; `newest` is there when it is done. True when the trace is whole."""
        self._done += 1
        if self._done == _COMPILES:
            jax.block_until_ready(newest)
            jax.profiler.start_trace(str(self.path), create_perfetto_trace=True)
            self._runs = True
        elif self._done == self.last:
            jax.block_until_ready(newest)
            return self.close()
        return False

    def close(self) -> bool:
        """Write what has been traced; False when there is nothing."""
        if not self._runs:
            return False
        self._runs = False
        jax.profiler.stop_trace()
        return True
