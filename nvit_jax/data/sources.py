"""Where examples come from, one at a time by number: arrays, image folders, parts of other sources."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from nvit_jax.model.preprocessing import read_file


class Source(Protocol):
    """Examples as they are stored. Worker processes get a pickled copy. Imports neither JAX nor TensorFlow."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> tuple[bytes | np.ndarray, int]:
        """(an encoded image, or pixels uint8 [s, s, channels]; its label). OSError when it cannot be read."""
        ...

    def name(self, number: int) -> str:
        """What a person finds the example by."""
        ...

    def renumbered(self, table: np.ndarray) -> "Source":
        """With the label table[l] for l."""
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

    def renumbered(self, table: np.ndarray) -> "Arrays":
        """With the label table[l] for l."""
        return dataclasses.replace(self, labels=table[self.labels])


@dataclasses.dataclass(frozen=True)
class Folder:
    """root/CLASS/IMAGE: `names` are "CLASS/IMAGE", or "CLASS/FOLDER/IMAGE"."""

    root: pathlib.Path
    names: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int) -> tuple[bytes, int]:
        """The file's bytes and label."""
        return read_file(self.root / self.names[number]), int(self.labels[number])

    def name(self, number: int) -> str:
        """Its path, to be printed."""
        return str(self.root / self.names[number]).encode("utf-8", "backslashreplace").decode()

    def renumbered(self, table: np.ndarray) -> "Folder":
        """With the label table[l] for l."""
        return dataclasses.replace(self, labels=table[self.labels])


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

    def renumbered(self, table: np.ndarray) -> "Subset":
        """As the source does."""
        return dataclasses.replace(self, source=self.source.renumbered(table))


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
