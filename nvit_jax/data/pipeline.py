"""Host batches by position: the step alone says which images a batch holds and how each is augmented.

Examples are read, decoded and augmented ahead of the device by Grain, in threads or in worker processes, one example at
a time (so that no worker's batch is cut short), and only then batched. Nothing but the step has to be saved: any number
of workers, devices and processes sees the same numbers.
"""

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from nvit_jax.data.datasets import Pixels, Split, as_they_are, cores
from nvit_jax.data.sources import Arrays, Source, Subset
from nvit_jax.errors import UserError, first_line
from nvit_jax.model.preprocessing import BadImage

_AHEAD = 2  # batches


@dataclasses.dataclass
class _Examples:
    """What Grain reads by number: example `k` of this process, counted over all steps."""

    source: Source
    pixels: Pixels
    place: Callable[[int], tuple[int, Any]]  # k -> (number in the source or -1, what seeds its draws or None)

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, k: Any) -> dict[str, Any]:
        number, seed = self.place(int(k))
        first, bad = max(number, 0), -1
        for tried in range(len(self.source)):
            other = (first + tried) % len(self.source)  # a neighbour takes the place of what cannot be read
            try:
                content, label = _read(self.source, other)
                image = self.pixels(content, None if seed is None else np.random.default_rng(seed))
            except (BadImage, OSError):
                bad = first
                continue
            return {"image": image, "label": np.int32(label), "number": np.int64(number), "bad": np.int64(bad)}
        raise UserError(f"none of the {len(self.source)} examples can be read, {self.source.name(0)} for one")


class Stream:
    """step -> this process's rows of that step's global batch. Reads ahead from the last one asked for."""

    def __init__(self, split: Split, pixels: Pixels, rows: range, place: Callable[[int], tuple[int, Any]]) -> None:
        self._examples, self._rows, self._split = _Examples(split.source, pixels, place), len(rows), split
        self._index = np.array(rows, np.int32)
        self._batches: Iterator[Any] | None = None
        self._next = 0
        self.report: Callable[[str], None] = lambda text: None

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """{"image" raw, "label", "index" in the global batch}. UserError when too many cannot be read."""
        found = self.read(step)
        return {"image": found["image"], "label": found["label"], "index": self._index}

    def read(self, step: int) -> dict[str, np.ndarray]:
        """{"image", "label", "number", "bad"}: which example it is or -1, which one could not be read or -1."""
        if self._batches is None or step != self._next:
            self.close()
            self._batches = self._start(step)
        self._next = step + 1
        try:
            batch = next(self._batches)
        except RuntimeError as error:  # Grain's, when a worker process was killed: the same examples are read again
            if not self._split.loading.workers:
                raise
            self.report(f"reading starts again at batch {step}: {first_line(error)}")
            self.close()
            self._batches = self._start(step)
            batch = next(self._batches)
        for number in batch["bad"][batch["bad"] >= 0].tolist():
            self._note(number)
        return batch

    def close(self) -> None:
        """Stop reading ahead."""
        if self._batches is not None and hasattr(self._batches, "close"):
            self._batches.close()
        self._batches = None

    def _start(self, step: int) -> Iterator[Any]:
        loading, ahead = self._split.loading, _AHEAD * self._rows
        at_hand = _is_at_hand(self._split.source, self._examples.pixels) and loading.threads is None
        threads = loading.threads or max(1, cores() // max(1, loading.workers))
        each = -(-ahead // max(1, loading.workers))
        options = grain.ReadOptions(num_threads=0 if at_hand else threads, prefetch_buffer_size=0 if at_hand else each)
        examples = grain.MapDataset.source(self._examples)[step * self._rows :].to_iter_dataset(options)
        if loading.workers:
            _let_workers_start()
            examples = examples.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=loading.workers, per_worker_buffer_size=each),
                worker_init_fn=_end_with_parent,
            )
        return iter(examples.batch(self._rows, drop_remainder=True))

    def _note(self, number: int) -> None:
        source, bad, loading = self._split.source, self._split.bad, self._split.loading
        name = source.name(number)
        if name in bad:
            return
        try:
            self._examples.pixels(_read(source, number)[0], np.random.default_rng(0))
            reason = "it can be read now"
        except (BadImage, OSError) as error:
            reason = str(error)
        bad[name] = reason
        self.report(f"skipped {name}: {reason}")
        limit = loading.max_bad_fraction  # an even part of it for each process
        if len(bad) > (max(limit * len(source) / loading.processes, 1) if limit else 0):
            raise UserError(
                f"{len(bad)} of {len(source)} examples cannot be read, {name} for one ({reason}); more than "
                f"config.data.max_bad_fraction={limit:g}"
            )


def _read(source: Source, number: int) -> tuple[bytes | np.ndarray, int]:
    """A second try for what a busy file system refused once."""
    try:
        return source.read(number)
    except OSError:
        return source.read(number)


def _is_at_hand(source: Source, pixels: Pixels) -> bool:
    """Arrays that nothing is done to: a thread would only hand them over."""
    while isinstance(source, Subset):
        source = source.source
    return isinstance(source, Arrays) and pixels is as_they_are


def _end_with_parent(index: int, count: int) -> None:
    """In a worker: nobody stops it when its parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()


def _let_workers_start() -> None:
    """Grain's workers read absl's flags, which a program without absl.app has not parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@dataclasses.dataclass
class _Shuffled:
    """Every epoch is a new permutation of the split; images that do not fill a batch wait for the next.

    With `repeats` an image comes that often in its batch, each time augmented anew (repeated augmentation), and an
    epoch covers that much less of the split. Its copies lie apart, so that they do not mix with each other.
    """

    count: int
    batch: int
    seed: tuple[int, ...]
    rows: range  # of the global batch, which this process provides
    repeats: int
    augmented: bool
    orders: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # of the latest two epochs

    def __call__(self, k: int) -> tuple[int, Any]:
        step, row = k // len(self.rows), self.rows[k % len(self.rows)]
        epoch, place = divmod(step, self.count // self.batch)
        known = self.orders
        if epoch not in known:  # threads may draw it twice, to the same end
            order = np.random.default_rng([*self.seed, epoch]).permutation(self.count)
            known = {e: o for e, o in known.items() if e == epoch - 1} | {epoch: order}
            self.orders = known
        order = known[epoch]
        position = place * self.batch + row
        if self.repeats > 1:
            each = -(-self.batch // self.repeats)  # distinct images of a batch
            number = order[(place * each + row % each) % self.count]
        else:
            number = order[position]
        return int(number), (*self.seed, epoch, position) if self.augmented else None


def train_stream(
    split: Split,
    batch: int,
    seed: Sequence[int],
    rows: slice = slice(None),
    *,
    pixels: Pixels | None = None,
    repeats: int = 1,
) -> Stream:
    """step -> batch {"image", "label", "index"} of raw pixels, for ever.

    Random access: a run that starts at step n sees what an uninterrupted one sees. `rows` are the rows of the global
    batch that this process provides. `pixels` augments (augment.TrainCrop); without, images are as for evaluation.
    """
    if batch > len(split):
        raise UserError(f"the batch size {batch} is larger than the split, {len(split)} images")
    mine = range(batch)[rows]
    place = _Shuffled(len(split), batch, tuple(seed), mine, repeats, pixels is not None)
    return Stream(split, pixels or split.pixels, mine, place)


@dataclasses.dataclass
class _InOrder:
    count: int
    batch: int
    rows: range

    def __call__(self, k: int) -> tuple[int, None]:
        number = k // len(self.rows) * self.batch + self.rows[k % len(self.rows)]
        return (number if number < self.count else -1), None


def eval_batches(
    split: Split, batch: int, rows: slice = slice(None), report: Any = None, *, labels: bool = True
) -> Iterator[dict[str, Any]]:
    """Every image once: the last batch is filled up with repeats that "valid" marks 0, as is what cannot be read.

    `labels`: whether each must have one.
    """
    mine = range(batch)[rows]
    stream = Stream(split, split.pixels, mine, _InOrder(len(split), batch, mine))
    stream.report = report or stream.report
    try:
        for step in range(-(-len(split) // batch)):
            found = stream.read(step)
            valid = (found["number"] >= 0) & (found["bad"] < 0)
            if labels and (found["label"][valid] < 0).any():
                raise UserError(f"examples like {split.source.name(0)} have no label (-1); evaluate another split")
            yield {"image": found["image"], "label": found["label"], "valid": valid.astype(np.float32)}
    finally:
        stream.close()
