"""Which examples are held out, and which are in two splits at once."""

import hashlib
import os
from collections.abc import Mapping, Sequence

import numpy as np

from nvit_jax.data.listing import normal
from nvit_jax.data.sources import Arrays, Folder, Source
from nvit_jax.model.preprocessing import read_file

Interval = tuple[str, int, int]  # of one split of a set: its name, the first example, the one behind the last


def held_out(name: str, fraction: float) -> bool:
    """Whether an example belongs to the held-out part; its path within the set alone decides: more files move none."""
    digest = hashlib.sha256(os.fsencode(normal(name))).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def hold_out(names: Sequence[str], fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(places of those that stay, places of those held out)."""
    held = np.array([held_out(name, fraction) for name in names], bool)
    return np.flatnonzero(~held), np.flatnonzero(held)


def common_examples(one: Sequence[Interval], other: Sequence[Interval]) -> int:
    """Examples that two splits of one set share."""
    return sum(max(0, min(a[2], b[2]) - max(a[1], b[1])) for a in one for b in other if a[0] == b[0])


def common_files(train: Source, val: Source) -> tuple[int, int]:
    """Files of val that (are files of train; have copies in train: in the same class, of the same name and content)."""
    if not (isinstance(train, Folder) and isinstance(val, Folder)):
        return 0, 0
    there = set(train.names)
    same = copies = 0
    for name in val.names:
        if name not in there:
            continue
        one, other = train.root / name, val.root / name
        try:
            facts = one.stat(), other.stat()
            if os.path.samestat(*facts):
                same += 1
            elif facts[0].st_size == facts[1].st_size and read_file(one) == read_file(other):
                copies += 1
        except OSError:  # a link to nowhere is a broken image, later on
            continue
    return same, copies


def common_images(parts: Mapping[str, Arrays]) -> int:
    """Images of the other splits that are in train, with the same label and the same pixels."""

    def prints(part: Arrays) -> list[bytes]:
        return [
            hashlib.blake2b(image.tobytes(), digest_size=16, salt=int(label).to_bytes(16, "little")).digest()
            for image, label in zip(part.images, part.labels, strict=True)
        ]

    there = set(prints(parts["train"]))
    return sum(mark in there for key, part in parts.items() if key != "train" for mark in prints(part))
