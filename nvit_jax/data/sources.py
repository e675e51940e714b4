"""Where examples come from, one at a time by number: arrays, image folders, prepared tensorflow-datasets."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from nvit_jax.errors import UserError

_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif"}


class Source(Protocol):
    """Examples as they are stored. Worker processes get a pickled copy. Imports neither JAX nor TensorFlow."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> tuple[bytes | np.ndarray, int]:
        """(an encoded image, or pixels uint8 [s, s, channels]; its label). OSError when it cannot be read."""
        ...

    def name(self, number: int) -> str:
        """What a person finds the example by."""
        ...


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Images [n, s, s, channels] and labels [n] in memory."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, number: int) -> tuple[np.ndarray, int]:
        """Pixels and label."""
        return self.images[number], int(self.labels[number])

    def name(self, number: int) -> str:
        """Its place."""
        return f"image {number}"


@dataclasses.dataclass(frozen=True)
class Folder:
    """root/CLASS/IMAGE: `names` are "CLASS/IMAGE"."""

    root: pathlib.Path
    names: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int) -> tuple[bytes, int]:
        """The file's bytes and label."""
        return (self.root / self.names[number]).read_bytes(), int(self.labels[number])

    def name(self, number: int) -> str:
        """Its path."""
        return str(self.root / self.names[number])


class Tfds:
    """One split of a prepared tensorflow-datasets classification set, by ArrayRecord: TensorFlow is not imported."""

    def __init__(self, dataset: str, split: str, directory: str | None) -> None:
        self.dataset, self.split, self.directory = dataset, split, directory
        self._open: Any = None
        self._records()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}  # workers open the files themselves

    def _records(self) -> Any:
        if self._open is None:
            import tensorflow_datasets as tfds

            builder = _builder(self.dataset, self.directory)
            decoders = {"image": tfds.decode.SkipDecoding()}
            try:
                self._open = builder.as_data_source(split=self.split, decoders=decoders)
                len(self._open)  # of "train[90%:10%]" it is negative
            except Exception as error:  # of tfds and of etils, of many types
                raise UserError(f"tfds:{self.dataset}, split {self.split!r}: {str(error).splitlines()[0]}") from error
        return self._open

    def __len__(self) -> int:
        return len(self._records())

    def read(self, number: int) -> tuple[bytes, int]:
        """The encoded image and the label."""
        try:
            record = self._records()[int(number)]
            return record["image"], int(record["label"])
        except UserError:
            raise
        except Exception as error:  # what ArrayRecord and protobuf say of a damaged file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise OSError(f"the record is damaged: {reason}") from error

    def name(self, number: int) -> str:
        """Its place in the split."""
        return f"tfds:{self.dataset}/{self.split}, example {number}"


def _builder(dataset: str, directory: str | None) -> Any:
    """UserError, with the line that prepares it, unless the set is there as ArrayRecord."""
    import tensorflow_datasets as tfds

    if ":" in dataset:
        raise UserError(
            f"data.name=tfds:{dataset}: sets of other people's repositories are code of theirs, not read here"
        )
    where = f", data_dir={directory!r}" if directory else ""
    try:
        builder = tfds.builder(dataset, data_dir=directory, file_format="array_record")
    except Exception as error:  # of tfds itself, and of whatever a set's module imports
        raise UserError(
            f"data.name=tfds:{dataset}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    if not builder.info.splits:
        raise UserError(
            f"data.name=tfds:{dataset} is not prepared as ArrayRecord in {builder.data_dir}; to do it (TensorFlow may "
            f'be needed for that, not here): python -c "import tensorflow_datasets as t; t.builder({dataset!r}{where}, '
            "file_format='array_record').download_and_prepare()\""
        )
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not isinstance(features["label"], tfds.features.ClassLabel):
        raise UserError(f"data.name=tfds:{dataset} is no classification set of images: it has {builder.info.features}")
    return builder


def tfds_facts(dataset: str, directory: str | None) -> tuple[tuple[str, ...], tuple[str, ...], int | None]:
    """(split names, class names, channels if known) of a prepared set. UserError."""
    info = _builder(dataset, directory).info
    return tuple(info.splits), tuple(info.features["label"].names), info.features["image"].shape[-1]


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some examples of another source."""

    source: Source
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def read(self, number: int) -> tuple[bytes | np.ndarray, int]:
        """As the source does."""
        return self.source.read(int(self.index[number]))

    def name(self, number: int) -> str:
        """As the source does."""
        return self.source.name(int(self.index[number]))


def list_folder(root: pathlib.Path, key: str) -> dict[str, list[str]]:
    """{class folder: ["class/file", ...]}, both sorted. UserError when there is no root/class/image."""
    if not root.is_dir():
        raise UserError(f"config.{key}={root}: there is no such directory")
    found = {}
    try:
        for folder in sorted(p for p in root.iterdir() if p.is_dir()):
            files = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES)
            if files:
                found[folder.name] = [f"{folder.name}/{name}" for name in files]
    except OSError as error:
        raise UserError(f"config.{key}={root} cannot be read: {error}") from error
    if not found:
        raise UserError(f"config.{key}={root} holds no images of the form {root}/CLASS/IMAGE.JPEG")
    return found


def read_classes(path: pathlib.Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(folder names, human names) from a file of lines "folder<TAB>name"; a class's label is its line from 0."""
    if not path.is_file():
        raise UserError(f"config.data.classes={path}: there is no such file")
    try:
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config.data.classes={path} cannot be read: {error}") from error
    folders = tuple(line[0].strip() for line in lines)
    if len(set(folders)) != len(folders) or not folders:
        raise UserError(f"config.data.classes={path}: the first column must name each class once")
    return folders, tuple(line[-1].strip() for line in lines)


def held_out(name: str, fraction: float) -> bool:
    """Whether a file belongs to the held-out part; decided by its name alone, so that more files move none."""
    digest = hashlib.sha256(name.rsplit("/", 1)[-1].encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def spread(source: Source, count: int | None) -> Source:
    """At most `count` examples, evenly spread over the source (which may be sorted by class); None is all."""
    if count is None or count >= len(source):
        return source
    return Subset(source, np.linspace(0, len(source) - 1, count).round().astype(int))


def labels_of(source: Source) -> np.ndarray | None:
    """All labels where they are known without reading the images."""
    if isinstance(source, Subset):
        whole = labels_of(source.source)
        return None if whole is None else whole[source.index]
    return source.labels if isinstance(source, Arrays | Folder) else None


def first_of_each(labels: Sequence[int]) -> list[int]:
    """Places of the first example of each class, for pages of samples."""
    return [int(i) for i in np.unique(np.asarray(labels), return_index=True)[1]]
