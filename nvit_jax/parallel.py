"""Data parallelism over all devices of all processes: one step function, three backends with the same numbers.

A step is written once as `step(state, batch, mean) -> (state, metrics)`; the state is placed, the batch sharded.
  "jit":  NamedSharding on a 1-D mesh named "data". Losses are means over the global batch and XLA puts in the
          all-reduce; `mean` is the identity. The default, and what several hosts use.
  "pmap": the same step for each device's shard; `mean` is one explicit pmean over the axis "data". One host.
  "fsdp": as "jit", with parameters, moments and averages spread over the devices, too (ZeRO 3): XLA gathers a weight
          where it is used and scatters its gradient. For models whose training state does not fit on a device.
Random draws use keys folded from batch["index"], the place in the global batch, so that both draw the same.
"""

import dataclasses
import functools
import math
import os
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nvit_jax.errors import UserError

AXIS = "data"
BACKENDS = ("jit", "pmap", "fsdp")
_SMALL = 2**14  # numbers; smaller arrays stay whole on every device


def is_main() -> bool:
    """The process that writes the files."""
    return jax.process_index() == 0


def machine_bytes() -> int:
    """This machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_bytes() -> int:
    """Memory of this process's first device; a CPU's is the machine's."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return machine_bytes()


def wait_for_all(name: str) -> None:
    """Return when every process has come here: files that one writes are there for the others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """True on every process when it is on one of them."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(flag)).any())


def sum_over_processes(number: int) -> int:
    """Of every process's number, on every process."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int64(number)).sum())


def fetch(tree: Any) -> Any:
    """Host arrays of state on the devices, whole, on every process."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(one, tree)


def check_same(tree: Any, what: str) -> None:
    """RuntimeError unless host arrays are equal, bit for bit, on all processes; costs one number each."""
    if jax.process_count() == 1:
        return
    digest = 0
    for leaf in jax.tree.leaves(tree):
        digest = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), digest)
    digests = multihost_utils.process_allgather(np.uint32(digest))
    if len(set(digests.tolist())) > 1:
        raise RuntimeError(f"{what} differ between processes (checksums {digests.tolist()}); this run cannot go on")


def main_decides(decide: Callable[[], bool]) -> bool:
    """The answer of the main process, on every process. When it raises UserError, so do all."""
    if jax.process_count() == 1:
        return decide()
    answer, error = 0, UserError("the main process stopped the run; its message says why")
    if is_main():
        try:
            answer = int(decide())
        except UserError as caught:
            answer, error = 2, caught
    answer = int(multihost_utils.broadcast_one_to_all(np.int32(answer)))
    if answer == 2:
        raise error
    return bool(answer)


def _same(tree: Any) -> Any:
    return tree


def _pmean(tree: Any) -> Any:
    return jax.lax.pmean(tree, AXIS)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How batches are laid out and steps compiled. `devices` defaults to all devices of all processes."""

    backend: str
    devices: tuple[jax.Device, ...]

    @classmethod
    def create(cls, backend: str = "jit", devices: tuple[jax.Device, ...] | None = None) -> "Parallel":
        if backend not in ("jit", "pmap", "fsdp"):
            raise UserError(f"={backend!r} is not one of {', '.join(BACKENDS)}", "parallel")
        if backend == "pmap" and jax.process_count() > 1:
            raise UserError('="pmap" runs on one host; use "jit" or "fsdp" on several', "parallel")
        return cls(backend, tuple(jax.devices()) if devices is None else devices)

    @property
    def seen(self) -> int:
        """Devices over which the batch lies that a step sees; under pmap a step sees the part of one."""
        return 1 if self.backend == "pmap" else len(self.devices)

    def apart(self, tree: Any) -> Any:
        """Inside of a step: arrays whose leading axis has one entry for each device that is `seen`, each on its own."""
        return self._constrained(tree, PartitionSpec(AXIS))

    def whole(self, tree: Any) -> Any:
        """Inside of a step: arrays that each device has all of."""
        return self._constrained(tree, PartitionSpec())

    def _constrained(self, tree: Any, spec: PartitionSpec) -> Any:
        if self.backend == "pmap":
            return tree
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self._sharding(spec)), tree)

    def check_batch(self, size: int, name: str) -> None:
        """UserError unless a global batch divides over the devices."""
        if size % len(self.devices):
            raise UserError(f"={size} does not divide over {len(self.devices)} devices", name)

    def local_rows(self, size: int) -> slice:
        """The rows of a global batch that this process provides."""
        each = size // jax.process_count()
        return slice(jax.process_index() * each, (jax.process_index() + 1) * each)

    def _sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(Mesh(np.array(self.devices), (AXIS,)), spec)

    def shard(self, batch: Any) -> Any:
        """Host rows of this process -> what a compiled step takes."""
        if self.backend == "pmap":
            n = len(self.devices)
            return jax.tree.map(lambda x: x.reshape(n, len(x) // n, *x.shape[1:]), batch)
        sharding = self._sharding(PartitionSpec(AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

    def _kept(self, shape: tuple[int, ...]) -> NamedSharding:
        """How an array of the state lies on the devices: whole on each, or its largest divisible axis spread."""
        n = len(self.devices)
        axes = [axis for axis, size in enumerate(shape) if size % n == 0]
        if self.backend != "fsdp" or not axes or math.prod(shape) < _SMALL:
            return self._sharding(PartitionSpec())
        spec: list[str | None] = [None] * len(shape)
        spec[max(axes, key=lambda axis: shape[axis])] = AXIS
        return self._sharding(PartitionSpec(*spec))

    def place(self, tree: Any) -> Any:
        """State from host values, the same on every process -> the devices."""
        return jax.tree.map(lambda x: jax.device_put(x, self._kept(np.shape(x))), tree)

    def begin(self, tree: Any) -> Any:
        """As `place`, a training's first state: arrays of its own, since the steps take their memory."""
        return jax.tree.map(lambda x: jax.device_put(x, self._kept(np.shape(x)), may_alias=False), tree)

    @property
    def donates(self) -> bool:
        """Whether a new training state takes the memory of the old one. On a CPU host arrays may share that memory."""
        return self.devices[0].platform != "cpu"

    def compile(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Compile `step(state, batch, mean=...)`. What it returns is whole on every device."""
        if self.backend == "pmap":
            return self._pmapped(lambda state, batch: step(state, batch, mean=_pmean), None, 0)
        whole, parts = self._sharding(PartitionSpec()), self._sharding(PartitionSpec(AXIS))
        if self.backend == "jit":
            return jax.jit(
                lambda state, batch: step(state, batch, mean=_same), in_shardings=(whole, parts), out_shardings=whole
            )

        def gathered(state: Any, batch: Any) -> Any:
            found = step(state, batch, mean=_same)
            return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), found)

        return jax.jit(gathered)

    def compile_training(self, step: Callable[..., Any]) -> "TrainingStep":
        """Compile `step(inputs, batch, mean=...) -> (state, metrics)`, where `inputs` is a NamedTuple with a `state`.

        The new state lies as `place` has put the old one. Where this `donates`, the old one is gone after the step.
        """

        def run(state: Any, held: Any, batch: Any, mean: Callable[[Any], Any] = _same) -> Any:
            return step(held._replace(state=state), batch, mean=mean)

        if self.backend == "pmap":
            return TrainingStep(self._pmapped(functools.partial(run, mean=_pmean), None, None, 0))
        given: tuple[int, ...] = (0,) if self.donates else ()
        if self.backend == "jit":
            whole, parts = self._sharding(PartitionSpec()), self._sharding(PartitionSpec(AXIS))
            lies = (whole, whole, parts)
            return TrainingStep(jax.jit(run, in_shardings=lies, out_shardings=whole, donate_argnums=given))

        def spread(state: Any, held: Any, batch: Any) -> Any:
            found = run(state, held, batch)
            return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self._kept(x.shape)), found)

        return TrainingStep(jax.jit(spread, donate_argnums=given))

    def _pmapped(self, step: Callable[..., Any], *axes: int | None) -> Callable[..., Any]:
        found: Callable[..., Any] = jax.pmap(
            step, axis_name=AXIS, in_axes=axes, out_axes=None, devices=list(self.devices)
        )
        return found

    def compile_walk(self, step: Callable[..., Any], *, rows: bool) -> Callable[..., Any]:
        """Compile `step(state, batch)` for batches that stay on the devices; "jit" alone.

        What it returns lies in rows, as the batch does, or whole on every device.
        """
        whole, parts = self._sharding(PartitionSpec()), self._sharding(PartitionSpec(AXIS))
        return jax.jit(step, in_shardings=(whole, parts), out_shardings=parts if rows else whole)

    def compile_sum(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Compile `step(total, state, batch)` as `compile_walk`; the new total takes the memory of the old one."""
        whole, parts = self._sharding(PartitionSpec()), self._sharding(PartitionSpec(AXIS))
        return jax.jit(step, in_shardings=(whole, whole, parts), out_shardings=whole, donate_argnums=0)


class TrainingStep(NamedTuple):
    """A compiled step of `Parallel.compile_training`."""

    program: Any  # (state, the inputs without it, batch) -> (state, metrics)

    def __call__(self, inputs: Any, batch: Any) -> Any:
        return self.program(inputs.state, inputs._replace(state=None), batch)

    def lower(self, inputs: Any, batch: Any) -> Any:
        """Of shapes, as `jax.jit` does it."""
        return self.program.lower(inputs.state, inputs._replace(state=None), batch)
