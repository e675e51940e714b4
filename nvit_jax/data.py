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
from nvit_jax.images import ImageFiles, held_out, list_folder, read_classes
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
    def imagenet(cls, size: int) -> "Preprocessing":
        """DeiT's, of image files."""
        return cls(size, 255.0, IMAGENET_MEAN, IMAGENET_STD, round(size * 256 / 224), "bicubic")

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

    images: np.ndarray | ImageFiles  # [n, image, image, channels], raw; files are read when indexed
    labels: np.ndarray  # [n] int32

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The splits of a source, the class names, and the preprocessing that models trained on it need."""

    splits: dict[str, Split]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    overlap: int = 0  # images of val that are in train, too

    def split(self, name: str) -> Split:
        """UserError when the source has no such split."""
        if name not in self.splits:
            raise UserError(f"the data has no {name} split; there are {', '.join(self.splits)} (config.data)")
        return self.splits[name]


def load_dataset(
    name: str,
    path: str | None = None,
    *,
    train: str | None = None,
    val: str | None = None,
    classes: str | None = None,
    holdout: float | None = None,
    preprocessing: Preprocessing | None = None,
) -> Dataset:
    """ "digits" (1,797 scans that come with scikit-learn), "npz" (arrays in the file `path`), or "folder".

    "folder" reads train/CLASS/IMAGE and val/CLASS/IMAGE; `classes` is a file whose line number is the label.
    With `holdout` that fraction of train, chosen by hash of the file name, is val. Images are resized and cropped
    as `preprocessing` says. Raises UserError for an unknown name, a file that cannot be read, an empty split or a
    single class.
    """
    if name == "digits":
        data = _digits()
    elif name == "npz":
        data = _npz(path)
    elif name == "folder":
        data = _folder(train, val, classes, holdout, preprocessing)
    else:
        raise UserError(f'data.name={name!r} is not "digits", "npz" or "folder"')
    for split_name, split in data.splits.items():
        if not len(split):
            raise UserError(f"data: the {split_name} split of {path or train or name} is empty")
    if "train" in data.splits and len(np.unique(data.splits["train"].labels)) < 2:
        raise UserError(
            f"data: the train split of {path or train or name} has one class; there is nothing to tell apart"
        )
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


def _folder(
    train: str | None, val: str | None, classes: str | None, holdout: float | None, pre: Preprocessing | None
) -> Dataset:
    if train is None and val is None:
        raise UserError('data.name="folder" needs --config.data.train=DIR, --config.data.val=DIR or both')
    if classes is None:
        raise UserError(
            'data.name="folder" needs --config.data.classes=FILE.tsv, one class folder\'s name a line in the order of '
            "the model's labels; the folders that happen to be there do not tell them"
        )
    if holdout is not None and (train is None or val not in (None, train)):
        raise UserError("config.data.holdout splits config.data.train; leave config.data.val unset")
    folders, names = read_classes(pathlib.Path(classes))
    label_of = {folder: i for i, folder in enumerate(folders)}
    pre = pre or Preprocessing.imagenet(224)
    splits = {}
    for split, root in (("train", train), ("val", val if holdout is None else train)):
        if root is None:
            continue
        found = list_folder(pathlib.Path(root), f"data.{split}")
        if unknown := sorted(found.keys() - label_of.keys()):
            raise UserError(f"config.data.{split}={root}: the folder {unknown[0]!r} is no class of {classes}")
        files = [file for names in found.values() for file in names]
        if holdout is not None:
            files = [file for file in files if held_out(file, holdout) == (split == "val")]
        images = ImageFiles(
            pathlib.Path(root),
            files,
            resize=pre.resize or pre.size,
            size=pre.size,
            interpolation=pre.interpolation or "bicubic",
            channels=len(pre.mean),
        )
        labels = np.array([label_of[file.split("/")[0]] for file in files], np.int32)
        splits[split] = Split(images, labels)
    return Dataset(splits, names, pre, _overlap(splits))


def _overlap(splits: Mapping[str, Split]) -> int:
    """Images of val that are in train: files of the same name in the same class, and of the same size."""
    if len(splits) < 2:
        return 0
    train, val = (splits[name].images for name in ("train", "val"))
    assert isinstance(train, ImageFiles) and isinstance(val, ImageFiles)
    common = set(train.names) & set(val.names)
    return sum((train.root / name).stat().st_size == (val.root / name).stat().st_size for name in common)


def some(split: Split, count: int | None) -> Split:
    """At most `count` images, evenly spread over the split (which may be sorted by class); None is all."""
    if count is None or count >= len(split):
        return split
    index = np.linspace(0, len(split) - 1, count).round().astype(int)
    images = split.images.take(index) if isinstance(split.images, ImageFiles) else split.images[index]
    return Split(images, split.labels[index])


def check_fits(data: Dataset, image: int, channels: int, classes: int) -> None:
    """UserError when a model cannot read these images or tell these classes."""
    shape = next(iter(data.splits.values())).images.shape[1:]
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
