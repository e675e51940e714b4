"""Sets that tensorflow-datasets has prepared: read as data, so that nothing in their folder is run."""

import copy
import json
import os
import pathlib
import re
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from nvit_jax import paths
from nvit_jax.data.labels import MAX_CLASSES
from nvit_jax.data.splits import Interval
from nvit_jax.errors import UserError, first_line

_FEATURES = "tensorflow_datasets.core.features."  # the only classes that a features.json may name
_CLASS_KEYS = ("type", "pythonClassName", "python_class_name")
_COUNT_KEYS = ("numClasses", "num_classes")
_MAX_JSON = 2**26
_FILES = 100_000  # of one set


class Tfds:
    """One split of a prepared tensorflow-datasets classification set, by ArrayRecord: TensorFlow is not imported."""

    def __init__(self, dataset: str, split: str, directory: str | None) -> None:
        self.dataset, self.split, self.directory = dataset, split, directory
        self._table: np.ndarray | None = None
        self._open: Any = None
        self._records()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}  # workers open the files themselves

    def renumbered(self, table: np.ndarray) -> "Tfds":
        """With the label table[l] for l."""
        new = copy.copy(self)
        new._table = table if self._table is None else table[self._table]
        return new

    def _records(self) -> Any:
        if self._open is None:
            import tensorflow_datasets as tfds

            builder = _builder(self.dataset, self.directory)
            decoders = {"image": tfds.decode.SkipDecoding()}
            try:
                self._open = builder.as_data_source(split=self.split, decoders=decoders)
                len(self._open)  # of "train[90%:10%]" it is negative
            except Exception as error:  # of tfds and of etils, of many types
                raise UserError(f"tfds:{self.dataset}, split {self.split!r}: {first_line(error)}") from error
        return self._open

    def __len__(self) -> int:
        return len(self._records())

    def read(self, number: int) -> tuple[bytes, int]:
        """The encoded image and the label."""
        try:
            record = self._records()[int(number)]
            image, label = record["image"], int(record["label"])
        except UserError:
            raise
        except Exception as error:  # what ArrayRecord and protobuf say of a damaged file
            raise OSError(f"the record is damaged: {first_line(error)}") from error
        return image, label if self._table is None or label < 0 else int(self._table[label])

    def name(self, number: int) -> str:
        """Its place in the split."""
        return f"tfds:{self.dataset}/{self.split}, example {number}"


class Facts(NamedTuple):
    """Of a prepared set."""

    splits: tuple[str, ...]
    classes: tuple[str, ...]


def facts_of(dataset: str, directory: str | None) -> Facts:
    """UserError unless it is prepared."""
    info = _builder(dataset, directory).info
    return Facts(tuple(info.splits), tuple(info.features["label"].names))


def intervals(dataset: str, directory: str | None, split: str) -> list[Interval]:
    """Which examples of which of the set's own splits a split such as "train[:98%]" has. UserError."""
    import tensorflow_datasets as tfds

    info = _builder(dataset, directory).info
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(info.splits)
    except Exception as error:  # of tfds, of many types
        raise UserError(f"tfds:{dataset}, split {split!r}: {first_line(error)}") from error
    found = []
    for part in parts:  # None is an end of the split
        first, last, _ = slice(part.from_, part.to).indices(info.splits[part.splitname].num_examples)
        found.append((part.splitname, first, last))
    return found


def _builder(dataset: str, directory: str | None) -> Any:
    """UserError, with the line that prepares it, unless the set is there as ArrayRecord."""
    if re.fullmatch(r"[^:]*:[\d.*]+", dataset):
        raise UserError(f"data.name=tfds:{dataset}: leave the version out; the newest that is prepared is read")
    if ":" in dataset:
        raise UserError(
            f"data.name=tfds:{dataset}: sets of other people's repositories are code of theirs, not read here"
        )
    if re.fullmatch(r"[a-z0-9_]+(/[\w.-]+)?", dataset) is None:
        raise UserError(f"data.name=tfds:{dataset}: a set's name looks like cifar10, or imagenet_v2/matched-frequency")
    import tensorflow_datasets as tfds

    if directory:
        paths.directory(directory, "data.path=")
    where = f", data_dir={directory!r}" if directory else ""
    for root in [directory] if directory else tfds.core.utils.file_utils.list_data_dirs():
        _check_files(pathlib.Path(root, dataset.split("/")[0]))
    try:
        builder = tfds.builder(dataset, data_dir=directory, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        place = f"in {directory}" if directory else "where tensorflow-datasets looks"
        raise UserError(
            f"data.name=tfds:{dataset}: tensorflow-datasets knows no such set, and none lies {place}; "
            "look up its name (tensorflow.org/datasets), or set data.path to the folder that holds "
            f"{dataset.split('/')[0]}/"
        ) from error
    except Exception as error:  # of tfds itself, and of whatever a set's module imports
        what = re.sub(r'^Failed to construct dataset .*": ', "", first_line(error, 1000))[:200]
        raise UserError(f"data.name=tfds:{dataset}: {what}") from error
    if not builder.info.splits:
        raise UserError(
            f"data.name=tfds:{dataset} is not prepared as ArrayRecord in {builder.data_dir}; to do it (TensorFlow may "
            f'be needed for that, not here): python -c "import tensorflow_datasets as t; t.builder({dataset!r}{where}, '
            "file_format='array_record').download_and_prepare()\""
        )
    features = builder.info.features
    known = isinstance(features, tfds.features.FeaturesDict) and {"image", "label"} <= set(features)
    if not known or not isinstance(features["label"], tfds.features.ClassLabel):
        raise UserError(f"data.name=tfds:{dataset} is no classification set of images: it has {_short(features)}")
    return builder


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


# ------------------------------------------------------------------------------------ what a folder may say


def _check_files(root: pathlib.Path) -> None:
    """UserError when a set's folder would make tensorflow-datasets run code, wait for ever, or fill the memory."""
    try:
        for file in _walk(root):
            if not stat.S_ISREG(file.stat().st_mode):
                raise UserError(f"{file} is no regular file; a prepared set has none of these")
            if file.suffix == ".json":
                _check_json(file)
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error.strerror or error}") from error


def _walk(root: pathlib.Path) -> Iterator[pathlib.Path]:
    count = 0
    for folder, _, names in os.walk(root):
        for name in names:
            count += 1
            if count > _FILES:
                raise UserError(f"{root} holds more than {_FILES:,} files; is it a prepared set?")
            if (file := pathlib.Path(folder, name)).exists():
                yield file


def _check_json(file: pathlib.Path) -> None:
    try:
        if file.stat().st_size > _MAX_JSON:
            raise UserError(f"{file} has more than {_MAX_JSON:,} bytes; what describes a set is shorter")
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name in ("features.json", "dataset_info.json"):
            _check_feature(content, file)
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{file} is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error


def _check_feature(value: Any, file: pathlib.Path) -> None:
    """Everywhere in it: what tensorflow-datasets would import by its name, and how many classes it would name."""
    if isinstance(value, list):
        for item in value:
            _check_feature(item, file)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key in _CLASS_KEYS and isinstance(item, str) and "." in item and not item.startswith(_FEATURES):
            raise UserError(
                f"{file} names the feature {item!r}, which would be imported; only tensorflow-datasets' own are read"
            )
        if key in _COUNT_KEYS and str(item).isdecimal() and int(str(item)[:20]) > MAX_CLASSES:
            raise UserError(f"{file} says {key}={item}; more than {MAX_CLASSES:,} classes are not meant to be")
        if key == "json" and isinstance(item, str):  # JSON in JSON
            item = json.loads(item)
        _check_feature(item, file)
