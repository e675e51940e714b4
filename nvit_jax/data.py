"""Sources of images, and host batches by position: the step alone says which images a batch holds.

Images come out of a source as uint8 or float arrays [n, image, image, channels]; a model sees (x / scale - mean) / std.
"""

import dataclasses
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.losses import Batch

SPLITS = ("train", "val", "test")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From raw pixels to what a model sees. Stored in model.json."""

    size: int
    scale: float  # the raw value that becomes 1
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None  # image files: the short side before the center crop of `size`
    interpolation: str | None = None  # of that resizing: "bicubic" or "bilinear"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """[B, size, size, channels] raw -> float32, normalised."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return ((images.astype(np.float32) / np.float32(self.scale)) - mean) / std

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """TypeError or KeyError when the values are not what `to_json` gives."""
        return cls(**dict(values) | {"mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def describe(self) -> str:
        """In words."""
        resize = f"short side to {self.resize} ({self.interpolation}), center crop " if self.resize else ""
        return f"{resize}{self.size}, mean {self.mean}, std {self.std}"


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels of one split, in memory."""

    images: np.ndarray  # [n, image, image, channels], raw
    labels: np.ndarray  # [n] int32

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The splits of a source, the class names, and the preprocessing that models trained on it need."""

    splits: dict[str, Split]
    classes: tuple[str, ...]
    preprocessing: Preprocessing


def load_dataset(name: str, path: str | None = None) -> Dataset:
    """ "digits" (1,797 scans that come with scikit-learn) or "npz" (arrays in a file of the user's).

    Raises UserError for an unknown name, a file that cannot be read, an empty split or a single class.
    """
    if name == "digits":
        data = _digits()
    elif name == "npz":
        data = _npz(path)
    else:
        raise UserError(f'data.name={name!r} is not "digits" or "npz"')
    for split_name, split in data.splits.items():
        if not len(split):
            raise UserError(f"data: the {split_name} split of {path or name} is empty")
    if len(np.unique(data.splits["train"].labels)) < 2:
        raise UserError(f"data: the train split of {path or name} has one class; there is nothing to tell apart")
    return data


def _digits() -> Dataset:
    """8x8 grey scans, 0..16. Stratified and fixed: 70 % train, 10 % val (every choice), 20 % test (final numbers)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = digits.images[..., None].astype(np.uint8)
    labels = digits.target.astype(np.int32)
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=0.125, stratify=labels[rest], random_state=0)
    splits = {k: Split(images[i], labels[i]) for k, i in zip(SPLITS, (train, val, test), strict=True)}
    return Dataset(splits, tuple(str(i) for i in range(10)), Preprocessing(8, 16.0, (0.5,), (0.5,)))


def _npz(path: str | None) -> Dataset:
    """Arrays <split>_images [n, s, s, c] uint8 and <split>_labels [n] for train, val, test; mean and std 0.5."""
    if path is None:
        raise UserError('data.name="npz" needs data.path, a .npz file')
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"data.path={path}: there is no such file")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            content = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"data.path={path}: not a readable .npz file ({error})") from error
    splits = {}
    for split in SPLITS:
        for part in ("images", "labels"):
            if f"{split}_{part}" not in content:
                raise UserError(f"data.path={path}: the array {split}_{part} is missing; there are {sorted(content)}")
        images, labels = content[f"{split}_images"], content[f"{split}_labels"]
        if images.ndim != 4 or images.shape[1] != images.shape[2] or images.dtype != np.uint8:
            raise UserError(f"data.path={path}: {split}_images must be uint8 [n, size, size, channels]")
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"data.path={path}: {split}_labels must be integers [{len(images)}]")
        splits[split] = Split(images, labels.astype(np.int32))
    shape = splits["train"].images.shape[1:]
    if any(s.images.shape[1:] != shape for s in splits.values()):
        raise UserError(f"data.path={path}: the splits hold images of different shapes")
    classes = 1 + max((int(s.labels.max()) for s in splits.values() if len(s)), default=0)
    half = (0.5,) * shape[2]
    return Dataset(splits, tuple(str(i) for i in range(classes)), Preprocessing(shape[0], 255.0, half, half))


def check_fits(data: Dataset, image: int, channels: int, classes: int) -> None:
    """UserError when a model cannot read these images or tell these classes."""
    shape = data.splits["train"].images.shape[1:]
    if shape != (image, image, channels):
        raise UserError(f"the model takes images {(image, image, channels)}, the data has {shape}")
    if len(data.classes) > classes:
        raise UserError(f"the model has {classes} classes, the data {len(data.classes)}")


def train_stream(
    split: Split, preprocess: Preprocessing, batch: int, seed: Sequence[int], rows: slice | None = None
) -> Callable[[int], Batch]:
    """step -> batch. Every epoch is a new permutation of the split; images that do not fill a batch wait for the next.

    Random access: a run that starts at step n sees what an uninterrupted one sees. `rows` are the rows of the
    global batch that this process provides.
    """
    if batch > len(split):
        raise UserError(f"the batch size {batch} is larger than the split, {len(split)} images")
    per_epoch = len(split) // batch
    cached: dict[int, np.ndarray] = {}

    def at(step: int) -> Batch:
        epoch, place = divmod(step, per_epoch)
        if epoch not in cached:
            cached.clear()
            cached[epoch] = np.random.default_rng([*seed, epoch]).permutation(len(split))
        index = np.arange(batch, dtype=np.int32)[rows or slice(None)]
        chosen = cached[epoch][place * batch + index]
        return {"image": preprocess(split.images[chosen]), "label": split.labels[chosen], "index": index}

    return at


def eval_batches(
    split: Split, preprocess: Preprocessing, batch: int, rows: slice | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Every image once: the last batch is filled up with repeats that "valid" marks 0."""
    for start in range(0, len(split), batch):
        index = (start + np.arange(batch))[rows or slice(None)]
        valid = index < len(split)
        index = np.where(valid, index, 0)
        yield {
            "image": preprocess(split.images[index]),
            "label": split.labels[index],
            "valid": valid.astype(np.float32),
        }
