"""What may be given as batches -> host batches for training, scoring and evaluation.

A batch is {"image", "label", "index"} and whatever else a dict of the user's holds, each with a leading axis of
images. Raw integer images are normalised on the device, by `normalise`; floating-point ones are normalised already.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from nvit_jax.data.datasets import Dataset, Split, check_classes
from nvit_jax.data.labels import match
from nvit_jax.data.pipeline import Stream, eval_batches, train_stream
from nvit_jax.data.sources import Arrays
from nvit_jax.errors import UserError
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.preprocessing import CenterCrop, Preprocessing, as_images, normalise
from nvit_jax.parallel import Parallel

_log = logging.getLogger("nvit_jax")
Batch = dict[str, Any]
Report = Callable[[str], None]
_ENDLESS = 10_000_000  # batches of one pass; more is taken for an iterable that never ends


class Reader(Protocol):
    """step -> this process's rows of that step's batch, read ahead from the last step asked for."""

    def __call__(self, step: int) -> Batch: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Draws:
    """Which batches training or scoring sees: of how many images, in which order, augmented how."""

    batch: int  # images of the global batch; batches of a user's own keep their size
    seed: tuple[int, ...]
    parallel: Parallel
    report: Report = lambda text: None
    pixels: Any = None  # augment.TrainCrop
    repeats: int = 1  # views of an image in a batch
    labels: bool = True  # whether they are needed


class Feed(Protocol):
    """Batches for one model, wherever they come from."""

    def normalise(self, images: Any) -> Any:
        """On the device: what the model sees of them."""

    def steps(self, batch: int) -> int:
        """Batches of one pass."""

    def reader(self, draws: Draws) -> Reader:
        """Training batches, for ever."""

    def once(self, batch: int, parallel: Parallel, report: Report, *, labels: bool = True) -> Iterator[Batch]:
        """Every image once, with "valid" [B]: 0 marks what only fills up a batch."""

    def images(self) -> int | None:
        """How many there are, None when that is not known before a pass."""

    def some(self, count: int | None) -> "Feed":
        """At most so many images of it."""


@dataclasses.dataclass(frozen=True)
class SplitFeed:
    """Examples with random access: a data set's split, or arrays in memory. Shuffled anew in every epoch."""

    split: Split
    preprocessing: Preprocessing | None
    labelled: bool = True

    def normalise(self, images: Any) -> Any:
        return normalise(images, self.preprocessing)

    def images(self) -> int:
        return len(self.split)

    def steps(self, batch: int) -> int:
        return len(self.split) // batch

    def reader(self, draws: Draws) -> Reader:
        if draws.labels and not self.labelled:
            raise UserError(": labels are needed, give a pair (images, labels), or a loss of your own", "batches")
        rows = draws.parallel.local_rows(draws.batch)
        stream = train_stream(self.split, draws.batch, draws.seed, rows, pixels=draws.pixels, repeats=draws.repeats)
        stream.report = draws.report
        return stream if self.labelled else _Unlabelled(stream)

    def once(self, batch: int, parallel: Parallel, report: Report, *, labels: bool = True) -> Iterator[Batch]:
        if labels and not self.labelled:
            raise UserError(": labels are needed, give a pair (images, labels)", "batches")
        devices = len(parallel.devices)
        batch = -(-min(batch, len(self.split)) // devices) * devices
        found = eval_batches(self.split, batch, parallel.local_rows(batch), report, labels=labels)
        return found if self.labelled else ({k: v for k, v in one.items() if k != "label"} for one in found)

    def some(self, count: int | None) -> "SplitFeed":
        return dataclasses.replace(self, split=self.split.some(count))


@dataclasses.dataclass(frozen=True)
class BatchFeed:
    """A user's own batches, in their own order; a pass over them is an epoch. Each process gives its own rows."""

    batches: Iterable[Any]
    dims: ViTDims
    preprocessing: Preprocessing | None
    limit: int | None = None  # images of one pass

    def normalise(self, images: Any) -> Any:
        return normalise(images, self.preprocessing)

    def images(self) -> int | None:
        return self.limit

    def some(self, count: int | None) -> "BatchFeed":
        return dataclasses.replace(self, limit=count)

    def steps(self, batch: int) -> int:
        if self.limit is None and hasattr(self.batches, "__len__"):
            with contextlib.suppress(TypeError):  # a DataLoader of a stream has a __len__ that fails
                return len(self.batches)  # type: ignore[arg-type]
        count = 0
        for count, _ in enumerate(self._pass(), 1):
            if count > _ENDLESS:
                raise UserError(f": {_ENDLESS:,} batches and no end; give batches of one epoch", "batches")
        return count

    def reader(self, draws: Draws) -> "_Passes":
        return _Passes(self, draws)

    def once(self, batch: int, parallel: Parallel, report: Report, *, labels: bool = True) -> Iterator[Batch]:
        devices, size = len(parallel.devices), 0
        for number, found in enumerate(self._pass()):
            if labels and "label" not in found:
                raise UserError(f": batch {number} has no labels, which are needed", "batches")
            count = len(found["image"])
            size = max(size, -(-count // devices) * devices)
            filled = {name: _filled(value, size) for name, value in found.items() if name in ("image", "label")}
            yield filled | {"valid": (np.arange(size) < count).astype(np.float32)}

    def _pass(self) -> Iterator[Batch]:
        """One pass, every batch checked."""
        left = self.limit
        for number, content in enumerate(self.batches):
            found = as_batch(content, self.dims, f"batches: batch {number}: images", self.preprocessing)
            if not len(found["image"]):
                raise UserError(f": batch {number} has no images", "batches")
            if left is not None:
                found = {name: value[:left] for name, value in found.items()}
                left -= len(found["image"])
            yield found
            if left == 0:
                return


class _Passes:
    """A reader over passes of a user's batches."""

    def __init__(self, feed: BatchFeed, draws: Draws) -> None:
        self._feed, self._devices, self._labels = feed, len(draws.parallel.devices), draws.labels
        self._pass: Iterator[Batch] | None = None
        self._next = 0

    def __call__(self, step: int) -> Batch:
        if self._pass is None or step < self._next:
            self._restart()
        while self._next < step:
            self._take()
        found = self._take()
        rows = len(found["image"]) // self._devices * self._devices
        if not rows:
            devices = f"{len(found['image'])} images do not divide over {self._devices} devices"
            raise UserError(f": {devices}; give larger batches", "batches")
        if self._labels and "label" not in found:
            raise UserError(f": batch {step} has no labels, which this loss needs", "batches")
        index = np.arange(rows, dtype=np.int32) + np.int32(jax.process_index() * rows)
        return {name: value[:rows] for name, value in found.items()} | {"index": index}

    def _restart(self) -> None:
        self._pass, self._next = None, 0

    def _take(self) -> Batch:
        self._next += 1
        for _ in range(2):
            if self._pass is None:
                self._pass = self._feed._pass()
            if (found := next(self._pass, None)) is not None:
                return found
            self._pass = None  # a new epoch
        raise UserError(": they are empty, or can be gone through only once", "batches")

    def close(self) -> None:
        self._pass = None


class _Unlabelled:
    """A reader of images that have no labels: nobody shall read the zeros that stand for them."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.close = stream.close

    def __call__(self, step: int) -> Batch:
        batch = self._stream(step)
        del batch["label"]
        return batch


def _filled(values: np.ndarray, size: int) -> np.ndarray:
    """The first value repeated behind the others, up to `size`."""
    return np.concatenate([values, np.repeat(values[:1], size - len(values), 0)])


def as_batch(content: Any, dims: ViTDims, where: str, preprocessing: Preprocessing | None) -> Batch:
    """One batch of a user's as host arrays. Raises UserError for what is none."""
    if isinstance(content, Mapping):
        given = {{"images": "image", "labels": "label"}.get(str(k), str(k)): v for k, v in content.items()}
    elif isinstance(content, Sequence) and len(content) == 2:
        given = dict(zip(("image", "label"), content, strict=True))
    elif isinstance(content, Sequence) and len(content) == 1:
        given = {"image": content[0]}
    else:
        given = {"image": content}
    if "image" not in given:
        raise UserError(f"{where}: a dict needs the key 'image'; it has {', '.join(map(repr, given))}")
    images = np.asarray(as_images(given.pop("image"), dims.image, dims.channels, where))
    if images.dtype.kind not in "iu":
        images = images.astype(np.float32)
        if (finite := np.isfinite(images).all((1, 2, 3))).size and not finite.all():
            count = int(np.size(finite) - finite.sum())
            raise UserError(f"{where}: {count} of {len(images)} are not finite, {int(finite.argmin())} is the first")
    normalise(images[:0], preprocessing)  # raw pixels need to be known
    found = {name: _rows(value, len(images), f"{where}: {name!r}") for name, value in given.items()}
    if "label" in found:
        found["label"] = _labels(found["label"], dims.classes, where)
    return {"image": images} | found


def _rows(value: Any, count: int, where: str) -> np.ndarray:
    array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    if not array.ndim or len(array) != count:
        raise UserError(f"{where} has the shape {array.shape}; the batch has {count} images")
    return array


def _labels(labels: np.ndarray, classes: int, where: str) -> np.ndarray:
    """int32 [B] in [0, classes)."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{where}: labels are {labels.dtype} {labels.shape}; they must be integers [B]")
    if classes and len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        low, high = labels.min(), labels.max()
        raise UserError(f"{where}: labels go from {low} to {high}; the model has {classes} classes, from 0")
    return labels.astype(np.int32)


def make_feed(
    batches: Any,
    dims: ViTDims,
    preprocessing: Preprocessing | None,
    *,
    split: str = "train",
    passes: bool = True,
    classes: Sequence[str] = (),
) -> Feed:
    """The feed of whatever a user gives as batches.

    Args:
      batches: a Dataset (its `split`) or a Split; a pair (images [n, ...], labels [n]) or images alone, in memory; or a
        re-iterable of batches, each a dict with "image" and "label", or a pair.
      preprocessing: the model's; a data set's own is taken when the model knows none.
      passes: whether it is gone through more than once: an iterator is refused then.
      classes: names of the model's, by which those of a data set are found.

    Raises UserError for anything else, and for images or labels that do not fit the model.
    """
    if isinstance(batches, SplitFeed | BatchFeed):
        return batches
    if isinstance(batches, Dataset):
        if split == "train" and dims.classes:
            check_classes(batches)
        preprocessing, batches = preprocessing or batches.preprocessing, batches.split(split)
    if isinstance(batches, Split):
        labelled = batches.labels.kind != "none"
        return SplitFeed(_fitted(batches, dims, preprocessing, classes), preprocessing, labelled)
    if hasattr(batches, "shape"):
        batches = (batches,)
    if isinstance(batches, tuple | list) and batches and hasattr(batches[0], "shape") and batches[0].ndim == 4:
        pair = len(batches) == 2 and getattr(batches[1], "ndim", 4) != 4  # two of 4 are two batches of images
        if pair or len(batches) == 1:
            found = as_batch(batches, dims, "batches: images", preprocessing)
            labels = found.get("label", np.zeros(len(found["image"]), np.int32))
            if not len(labels):
                raise UserError(": there are no images", "batches")
            return SplitFeed(Split(Arrays(found["image"], labels)), preprocessing, "label" in found)
    if isinstance(batches, Mapping):
        raise UserError(": a dict is one batch; give a list of them, or a pair (images, labels)", "batches")
    if isinstance(batches, str | bytes) or not hasattr(batches, "__iter__"):
        raise UserError(
            f" is a {type(batches).__name__}; give a pair (images, labels), a list of batches, or a data set", "batches"
        )
    if passes and iter(batches) is batches:
        raise UserError(
            ": a generator can be gone through only once, and several passes are needed; give a list, or an object "
            "whose __iter__ begins anew",
            "batches",
        )
    return BatchFeed(batches, dims, preprocessing)


def _fitted(split: Split, dims: ViTDims, preprocessing: Preprocessing | None, classes: Sequence[str]) -> Split:
    """A split with the model's labels, whose image files are cropped as the model was evaluated. UserError."""
    if dims.classes:
        found = match(split.labels, classes, dims.classes)
        split = split.matched(found)
        if found.doubt:
            _log.warning(found.words)
    source = split.source
    if isinstance(source, Arrays):
        as_images(source.images[:1], dims.image, dims.channels, "batches: images")
        _labels(source.labels, dims.classes, "batches")
    elif preprocessing is not None and isinstance(split.pixels, CenterCrop):
        split = dataclasses.replace(split, pixels=preprocessing.crop())
    return split
