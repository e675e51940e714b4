"""Data sets: their splits, classes and preprocessing, from a name in the config.

Images come out of a split as uint8 [n, image, image, channels]; a model sees (x / scale - mean) / std.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nvit_jax import paths
from nvit_jax.data import npz, splits, tfds
from nvit_jax.data.classlist import read_classes
from nvit_jax.data.labels import NUMBERS, Labels, Match, match
from nvit_jax.data.listing import list_folder, normal
from nvit_jax.data.sources import Arrays, Folder, Source, Subset, labels_of, spread
from nvit_jax.errors import UserError
from nvit_jax.model.preprocessing import BadImage, Preprocessing
from nvit_jax.model.sizes import Size, one, sides

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

    def check(self) -> None:
        """UserError for more of them than this machine can be meant to start."""
        for name, count, most in (("workers", self.workers, 16), ("threads", self.threads or 0, 64)):
            most = max(most, most // 4 * cores())
            if count > most:
                raise UserError(f"config.data.{name}={count}: at most {most} on this machine of {cores()} cores")


def as_they_are(content: Any, rng: Any) -> np.ndarray:
    """What is stored, unchanged."""
    return np.asarray(content)


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split, and how they are read."""

    source: Source
    pixels: Pixels = as_they_are  # for evaluation: what is stored -> uint8 [size, size, channels]
    loading: Loading = Loading()
    labels: Labels = NUMBERS  # what their numbers stand for
    bad: dict[str, str] = dataclasses.field(default_factory=dict)  # what this process could not read, and why

    def __len__(self) -> int:
        return len(self.source)

    def take(self, index: np.ndarray) -> "Split":
        """Some of the examples, in that order; not read yet."""
        index = np.asarray(index)
        if index.ndim != 1 or index.dtype.kind not in "iu" or (index < 0).any() or (index >= len(self)).any():
            raise UserError(f": give whole numbers of examples, from 0 to {len(self) - 1}", "index")
        return dataclasses.replace(self, source=Subset(self.source, index))

    def matched(self, found: Match) -> "Split":
        """With a model's labels."""
        source = self.source if found.table is None else self.source.renumbered(found.table)
        return dataclasses.replace(self, source=source, labels=found.labels)

    def some(self, count: int | None) -> "Split":
        """At most `count` examples, evenly spread over the split (which may be sorted by class); None is all."""
        if count is not None and (not isinstance(count, int | np.integer) or count < 1):
            raise UserError(f"={count!r}: it must be a whole number, at least 1", "count")
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
    overlap: int = 0  # images of val and test that are in train, too
    copies: int = 0  # of these, how many are others of the same content
    notes: tuple[str, ...] = ()  # what a person should know of it

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
    whose line number is the label, else labels count the folders of train in alphabetical order; a split whose images
    lie in no folders of classes has no labels, which a model without a classifier does not need. "tfds:SET" reads
    what tensorflow-datasets has prepared in `path`; `train` and `val` are its splits, such as "train[:98%]". With
    `holdout` that fraction of train, chosen by hash of an example's path within the set, is val. Images are resized
    and cropped as `preprocessing` says. Raises UserError for an unknown name, data that cannot be read and an empty
    split.
    """
    loading.check()
    kind, colon, _ = name.partition(":")
    if kind not in _KEYS or bool(colon) != (kind == "tfds"):
        raise UserError(f'data.name={name!r} is not "digits", "npz", "folder" or "tfds:SET"')
    if path is not None:
        paths.named(path, "data.path=")
    given = {"path": path, "train": train, "val": val, "classes": classes, "holdout": holdout}
    surplus = [k for k, value in given.items() if value is not None and k not in _KEYS[kind]]
    notes = [f"warning: config.data.{key}={given[key]} has no meaning for data.name={name}" for key in surplus]
    pre = preprocessing or Preprocessing.imagenet(224)
    if kind in ("folder", "tfds") and (white := (255 / pre.scale - min(pre.mean)) / min(pre.std)) > _BRIGHT:
        notes.append(
            f"warning: pixels of image files go to 255, which the preprocessing (divide by {pre.scale:g}, mean "
            f"{pre.mean}, std {pre.std}) makes {white:.3g}: is the model made for such images?"
        )
    if name == "digits":
        data = _digits()
    elif name == "npz":
        data = _npz(path)
    elif name == "folder":
        data = _folder(path, train, val, classes, holdout, pre)
    else:
        data = _tfds(name.removeprefix("tfds:"), path, train, val, holdout, pre)
    for split_name, split in data.splits.items():
        if not len(split):
            hint = "" if holdout is None else f" with config.data.holdout={holdout:g}"
            raise UserError(f"data: the {split_name} split of {path or train or name} is empty{hint}")
    parts = {key: dataclasses.replace(split, loading=loading) for key, split in data.splits.items()}
    return dataclasses.replace(data, splits=parts, notes=(*notes, *data.notes))


_BRIGHT = 20.0  # of a normalised pixel; what models are trained on goes to 1 or 3

_KEYS: dict[str, tuple[str, ...]] = {  # that have a meaning
    "digits": (),
    "npz": ("path",),
    "folder": ("path", "train", "val", "classes", "holdout"),
    "tfds": ("path", "train", "val", "holdout"),
}


def _digits() -> Dataset:
    """8x8 grey scans, 0..16. Stratified and fixed: 70 % train, 10 % val (every choice), 20 % test (final numbers)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = digits.images[..., None].astype(np.uint8)
    labels = digits.target.astype(np.int32)
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=0.125, stratify=labels[rest], random_state=0)
    parts = {k: Arrays(images[i], labels[i]) for k, i in zip(SPLITS, (train, val, test), strict=True)}
    return _of_arrays(parts, 10, Preprocessing(8, 16.0, (0.5,), (0.5,)))


def _of_arrays(parts: Mapping[str, Arrays], count: int, pre: Preprocessing) -> Dataset:
    names = tuple(str(i) for i in range(count))
    copies = splits.common_images(parts)
    found = {key: Split(part, labels=Labels("numbers", names)) for key, part in parts.items()}
    return Dataset(found, names, pre, copies, copies)


def _npz(path: str | None) -> Dataset:
    """Arrays <split>_images [n, h, w, c] uint8 and <split>_labels [n] for train, val, test; mean and std 0.5."""
    if path is None:
        raise UserError('data.name="npz" needs data.path, a .npz file')
    found = npz.read_npz(path, SPLITS)
    if not any("labels" in part for part in found.values()):
        return _unlabelled({key: part["images"] for key, part in found.items()}, f"data.path={path} holds no labels")
    parts = {key: Arrays(part["images"], part["labels"].astype(np.int32)) for key, part in found.items()}
    classes = 1 + max((int(part.labels.max()) for part in parts.values() if len(part)), default=0)
    return _of_arrays(parts, classes, _halves(parts["train"].images))


def _halves(images: np.ndarray) -> Preprocessing:
    _, height, width, channels = images.shape
    half = (0.5,) * channels
    return Preprocessing(one(height, width), 255.0, half, half)


def _unlabelled(images: Mapping[str, np.ndarray], why: str) -> Dataset:
    copies = splits.common_images({key: Arrays(one, np.zeros(len(one), np.int32)) for key, one in images.items()})
    labels = Labels("none", where=why)
    parts = {key: Split(Arrays(one, np.full(len(one), -1, np.int32)), labels=labels) for key, one in images.items()}
    return Dataset(parts, (), _halves(images["train"]), copies, copies, (why,))


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
    keys = {"train": "data.train", "val": "data.val" if holdout is None else "data.train"}
    listings = {key: list_folder(pathlib.Path(root), keys[key]) for key, root in roots.items() if root is not None}
    named = {key: listing for key, listing in listings.items() if listing.labelled}
    folders = [normal(name) for listing in named.values() for name in listing.files]
    if not named:
        key = next(iter(listings))
        if classes is not None:
            raise UserError(f"config.data.classes={classes} names classes, and {roots[key]} has no folders of classes")
        labels = _no_folders(keys[key], roots[key])
    elif classes is not None:
        found = read_classes(pathlib.Path(classes), list(dict.fromkeys(folders)))
        labels = Labels("listed", found.names, found.folders, f"config.data.classes={classes}")
    else:
        key = next(iter(named))
        own = tuple(normal(name) for name in named[key].files)
        labels = Labels("folders", own, own, f"config.{keys[key]}={roots[key]}")
    label_of = {folder: i for i, folder in enumerate(labels.folders)}
    if unknown := sorted(set(folders) - label_of.keys()):
        raise UserError(f"config.data.val={val}: the folder {unknown[0]!r} is no folder of {train}")
    parts = {}
    for split, listing in listings.items():
        files = [file for names in listing.files.values() for file in names]
        if holdout is not None:
            files = [files[i] for i in splits.hold_out(files, holdout)[split == "val"]]
        own_labels = labels if listing.labelled else _no_folders(keys[split], roots[split])
        numbers = np.array([label_of.get(normal(file.split("/")[0]), -1) for file in files], np.int32)
        source = Folder(pathlib.Path(str(roots[split])), tuple(files), numbers)
        parts[split] = Split(source, pre.crop(), labels=own_labels)
    same = copies = 0
    if len(parts) == 2:
        same, copies = splits.common_files(parts["train"].source, parts["val"].source)
    notes = dict.fromkeys(note for listing in listings.values() for note in listing.notes)
    return Dataset(parts, labels.names, pre, same + copies, copies, tuple(notes))


def _no_folders(key: str, root: str | None) -> Labels:
    return Labels("none", where=f"config.{key}={root} holds no images of the form {root}/CLASS/IMAGE.JPEG")


def _tfds(
    name: str, path: str | None, train: str | None, val: str | None, holdout: float | None, pre: Preprocessing
) -> Dataset:
    there, classes = tfds.facts_of(name, path)
    # As ImageNet: what is called validation is what results are reported on; else there is a test split.
    wanted = {
        "train": train or "train",
        "val": val or next((s for s in ("validation", "val", "test") if s in there), ""),
    }
    if holdout is not None:
        if val is not None:
            raise UserError("config.data.holdout splits config.data.train; leave config.data.val unset")
        wanted["val"] = wanted["train"]
    elif not wanted["val"]:
        raise UserError(
            f"data.name=tfds:{name} has no validation or test split, only {', '.join(there)}: set "
            "--config.data.holdout=0.1, or slices such as --config.data.train=train[:90%] --config.data.val=train[90%:]"
        )
    if "test" in there:
        wanted["test"] = "test"
    ranges = {key: tfds.intervals(name, path, split) for key, split in wanted.items()}
    for key in ("val", "test") if holdout is None else ("test",):
        if key in wanted and (common := splits.common_examples(ranges["train"], ranges[key])):
            raise UserError(
                f"data.name=tfds:{name}: {common} examples of {wanted[key]!r}, to evaluate with, are in "
                f"{wanted['train']!r}, to train with, too; set config.data.train and config.data.val apart"
            )
    labels = Labels("named", classes, where=f"tfds:{name}")
    parts = {}
    for key, split in wanted.items():
        source: Source = tfds.Tfds(name, split, path)
        if holdout is not None and key != "test":
            names = [f"{split}/{i}" for i in range(len(source))]
            source = Subset(source, splits.hold_out(names, holdout)[key == "val"])
        parts[key] = Split(source, pre.crop(), labels=labels)
    if "test" in parts and len(parts["test"]) and parts["test"].source.read(0)[1] < 0:
        del parts["test"]  # without labels, as ImageNet's
    return Dataset(parts, classes, pre)


def for_model(
    data: Dataset, image: Size, channels: int, classes: int, names: Sequence[str] = (), *, fresh: bool = False
) -> Dataset:
    """The data with a model's labels; `notes` say how they were found. `names` are those of the model's classes.

    `fresh`: see labels.match. UserError when a model cannot read these images or tell these classes. A model without
    `classes` takes all labels as they are, and images that have none.
    """
    check_fits(data, image, channels)
    if not classes:
        return dataclasses.replace(data, classes=())
    check_classes(data)
    found = match(_poorest(data).labels, names, classes, fresh=fresh)
    notes = (*data.notes, *([f"warning: {found.words}" if found.doubt else found.words] if found.words else []))
    parts = {key: split.matched(found) for key, split in data.splits.items()}
    return dataclasses.replace(data, splits=parts, classes=found.labels.names or data.classes, notes=notes)


def check_classes(data: Dataset) -> None:
    """UserError where there is nothing to learn to tell apart."""
    labels = labels_of(data.splits["train"].source) if "train" in data.splits else None
    if labels is not None and data.splits["train"].labels.kind != "none" and len(np.unique(labels)) < 2:
        where = data.splits["train"].labels.where
        raise UserError(f"data: the train split of {where} has one class; there is nothing to tell apart")


def _poorest(data: Dataset) -> Split:
    """The first split, or one without labels."""
    return next((s for s in data.splits.values() if s.labels.kind == "none"), next(iter(data.splits.values())))


def check_fits(data: Dataset, image: Size, channels: int) -> None:
    """UserError when a model cannot read these images."""
    source = next(iter(data.splits.values())).source
    pre = data.preprocessing
    shape = source.images.shape[1:] if isinstance(source, Arrays) else (*sides(pre.size), len(pre.mean))
    wanted = (*sides(image), channels)
    if shape != wanted:
        raise UserError(f"the model takes images {wanted}, the data has {shape}")
