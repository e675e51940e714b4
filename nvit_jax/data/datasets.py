"""Data sets: their splits, classes and preprocessing, from a name in the config.

Images come out of a split as uint8 [n, image, image, channels]; a model sees (x / scale - mean) / std.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nvit_jax.data.sources import (
    Arrays,
    Folder,
    Source,
    Subset,
    Tfds,
    held_out,
    labels_of,
    list_folder,
    read_classes,
    spread,
    tfds_facts,
)
from nvit_jax.errors import UserError
from nvit_jax.model.preprocessing import BadImage, Preprocessing

Pixels = Callable[[Any, Any], np.ndarray]  # (an encoded image or pixels, random generator) -> uint8 [s, s, channels]

SPLITS = ("train", "val", "test")


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Loading:
    """How image files are read ahead of the device."""

    workers: int = 0  # processes; 0: threads of this one
    threads: int | None = None  # in each process; None: its share of the cores
    max_bad_fraction: float = 0.01  # of a split's examples that may turn out unreadable
    processes: int = 1  # of this run; each sees its own part of the examples


def _as_they_are(content: Any, rng: Any) -> np.ndarray:
    return np.asarray(content)


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split, and how they are read."""

    source: Source
    pixels: Pixels = _as_they_are  # for evaluation: what is stored -> uint8 [size, size, channels]
    loading: Loading = Loading()
    bad: dict[str, str] = dataclasses.field(default_factory=dict)  # what this process could not read, and why

    def __len__(self) -> int:
        return len(self.source)

    def take(self, index: np.ndarray) -> "Split":
        """Some of the examples, in that order; not read yet."""
        return dataclasses.replace(self, source=Subset(self.source, np.asarray(index)))

    def some(self, count: int | None) -> "Split":
        """At most `count` examples, evenly spread over the split (which may be sorted by class); None is all."""
        return dataclasses.replace(self, source=spread(self.source, count))

    def read(self, index: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 [n, size, size, channels], int32 [n]). UserError that names an example which cannot be read."""

        def one(number: int) -> tuple[np.ndarray, int]:
            try:
                content, label = self.source.read(number)
                return self.pixels(content, None), label
            except (BadImage, OSError) as error:
                raise UserError(f"{self.source.name(number)} cannot be read as an image: {error}") from error

        with concurrent.futures.ThreadPoolExecutor() as pool:
            images, labels = zip(*pool.map(one, np.arange(len(self))[index].tolist()), strict=True)
        return np.stack(images), np.array(labels, np.int32)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The splits of a source, the class names, and the preprocessing that models trained on it need."""

    splits: dict[str, Split]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    overlap: int = 0  # images of val that are in train, too
    listed: bool = True  # labels are the source's own, or by a list; else folders were counted

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
    loading: Loading = Loading(),
    preprocessing: Preprocessing | None = None,
) -> Dataset:
    """ "digits" (1,797 scans that come with scikit-learn), "npz" (arrays in the file `path`), "folder" or "tfds:SET".

    "folder" reads train/CLASS/IMAGE and val/CLASS/IMAGE (by default path/train and path/val); `classes` is a file
    whose line number is the label, else labels count the folders of train in alphabetical order. "tfds:SET" reads
    what tensorflow-datasets has prepared in `path`; `train` and `val` are its splits, such as "train[:98%]". With
    `holdout` that fraction of the train folder, chosen by hash of the file name, is val. Images are resized and
    cropped as `preprocessing` says. Raises UserError for an unknown name, data that cannot be read, an empty split or
    a single class.
    """
    if name == "digits":
        data = _digits()
    elif name == "npz":
        data = _npz(path)
    elif name == "folder":
        data = _folder(path, train, val, classes, holdout, preprocessing or Preprocessing.imagenet(224))
    elif name.startswith("tfds:"):
        data = _tfds(name.removeprefix("tfds:"), path, train, val, preprocessing or Preprocessing.imagenet(224))
    else:
        raise UserError(f'data.name={name!r} is not "digits", "npz", "folder" or "tfds:SET"')
    splits = {key: dataclasses.replace(split, loading=loading) for key, split in data.splits.items()}
    data = dataclasses.replace(data, splits=splits)
    for split_name, split in data.splits.items():
        if not len(split):
            raise UserError(f"data: the {split_name} split of {path or train or name} is empty")
    labels = labels_of(data.splits["train"].source) if "train" in data.splits else None
    if labels is not None and len(np.unique(labels)) < 2:
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
    splits = {k: Split(Arrays(images[i], labels[i])) for k, i in zip(SPLITS, (train, val, test), strict=True)}
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
        if len(labels) and labels.min() < 0:
            raise UserError(f"data.path={path}: {split}_labels go down to {labels.min()}; labels count from 0")
        splits[split] = Split(Arrays(images, labels.astype(np.int32)))
    shape = content["train_images"].shape[1:]
    if any(content[f"{split}_images"].shape[1:] != shape for split in SPLITS):
        raise UserError(f"data.path={path}: the splits hold images of different shapes")
    classes = 1 + max((int(content[f"{s}_labels"].max()) for s in SPLITS if len(splits[s])), default=0)
    half = (0.5,) * shape[2]
    return Dataset(splits, tuple(str(i) for i in range(classes)), Preprocessing(shape[0], 255.0, half, half))


def _folder(
    path: str | None,
    train: str | None,
    val: str | None,
    classes: str | None,
    holdout: float | None,
    pre: Preprocessing,
) -> Dataset:
    if path is not None:
        root = pathlib.Path(path)
        train = train or str(root / "train")
        val = val or (str(root / "val") if holdout is None else None)
    if train is None and val is None:
        raise UserError(
            'data.name="folder" needs --config.data.path=ROOT with ROOT/train and ROOT/val, or --config.data.train=DIR,'
            " --config.data.val=DIR or both"
        )
    if holdout is not None and (train is None or val not in (None, train)):
        raise UserError("config.data.holdout splits config.data.train; leave config.data.val unset")
    roots = {"train": train, "val": val if holdout is None else train}
    found = {split: list_folder(pathlib.Path(r), f"data.{split}") for split, r in roots.items() if r is not None}
    if classes is not None:
        folders, names = read_classes(pathlib.Path(classes))
    else:
        folders = names = tuple(found.get("train", found.get("val", {})))
    label_of = {folder: i for i, folder in enumerate(folders)}
    splits = {}
    for split, content in found.items():
        if unknown := sorted(content.keys() - label_of.keys()):
            known = f"class of {classes}" if classes else f"folder of {roots['train']}"
            raise UserError(f"config.data.{split}={roots[split]}: the folder {unknown[0]!r} is no {known}")
        files = [file for names_ in content.values() for file in names_]
        if holdout is not None:
            files = [file for file in files if held_out(file, holdout) == (split == "val")]
        labels = np.array([label_of[file.split("/")[0]] for file in files], np.int32)
        splits[split] = Split(Folder(pathlib.Path(str(roots[split])), tuple(files), labels), pre.crop())
    return Dataset(splits, names, pre, _overlap(splits), listed=classes is not None)


def _tfds(name: str, path: str | None, train: str | None, val: str | None, pre: Preprocessing) -> Dataset:
    there, classes, channels = tfds_facts(name, path)
    if channels is not None and channels != len(pre.mean):
        raise UserError(f"data.name=tfds:{name} has images of {channels} channels, the model takes {len(pre.mean)}")
    # As ImageNet: what is called validation is what results are reported on; else there is a test split.
    wanted = {
        "train": train or "train",
        "val": val or next((s for s in ("validation", "val", "test") if s in there), "train"),
    }
    if "test" in there:
        wanted["test"] = "test"
    splits = {key: Split(Tfds(name, split, path), pre.crop()) for key, split in wanted.items()}
    if "test" in splits and len(splits["test"]) and splits["test"].source.read(0)[1] < 0:
        del splits["test"]  # without labels, as ImageNet's
    return Dataset(splits, classes, pre)


def _overlap(splits: Mapping[str, Split]) -> int:
    """Images of val that are in train: files of the same name in the same class, with the same content."""
    if len(splits) < 2:
        return 0
    train, val = (splits[name].source for name in ("train", "val"))
    assert isinstance(train, Folder) and isinstance(val, Folder)
    common = set(train.names) & set(val.names)
    if train.root.samefile(val.root):
        return len(common)

    def same(name: str) -> bool:
        files = [root / name for root in (train.root, val.root)]
        if not all(file.exists() for file in files):  # a link to nowhere is a broken image, later on
            return False
        return files[0].stat().st_size == files[1].stat().st_size and files[0].read_bytes() == files[1].read_bytes()

    return sum(same(name) for name in common)


def check_fits(data: Dataset, image: int, channels: int, classes: int) -> None:
    """UserError when a model cannot read these images or tell these classes."""
    source = next(iter(data.splits.values())).source
    pre = data.preprocessing
    shape = source.images.shape[1:] if isinstance(source, Arrays) else (pre.size, pre.size, len(pre.mean))
    if shape != (image, image, channels):
        raise UserError(f"the model takes images {(image, image, channels)}, the data has {shape}")
    if len(data.classes) > classes:
        raise UserError(f"the model has {classes} classes, the data {len(data.classes)}")
    if not data.listed and len(data.classes) < classes:
        raise UserError(
            f"the model has {classes} classes, the data {len(data.classes)} folders, which do not tell its labels: set "
            "--config.data.classes=FILE.tsv, one class folder's name a line in the order of the model's labels"
        )
