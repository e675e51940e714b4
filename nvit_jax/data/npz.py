"""Arrays from a .npz file: what its headers promise is looked at before anything is allocated."""

import dataclasses
import math
import pathlib
import zipfile
from typing import Any

import numpy as np

from nvit_jax import paths
from nvit_jax.data.labels import MAX_CLASSES
from nvit_jax.errors import UserError, first_line

PARTS = ("images", "labels")
BOMB = 200  # bytes that one byte of the file becomes; photographs become less than 10
LARGE = 2**28  # below this many bytes nobody minds
_MAX_HEADER = 10_000


@dataclasses.dataclass(frozen=True)
class _Promise:
    """What the header of an array says of it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_npz(path: str, splits: tuple[str, ...]) -> dict[str, dict[str, np.ndarray]]:
    """{split: {"images": uint8 [n, s, s, c], "labels": integers [n]}}, s and c the same in all. UserError.

    All labels may be left out together, for models without a classifier.
    """
    where, file = f"data.path={path}", pathlib.Path(path)
    try:
        with paths.opened(file, "data.path=") as content:
            if content.read(6) == b"\x93NUMPY":
                raise UserError(f"{where}: a single array (.npy); save all of them with numpy.savez")
        with zipfile.ZipFile(file) as archive:
            return _read(archive, splits, where, file.stat().st_size)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise UserError(f"{where}: its arrays do not fit in memory") from error
    except Exception as error:  # of zipfile, zlib and NumPy, of many types
        raise UserError(f"{where}: not a readable .npz file ({first_line(error)})") from error


def _read(
    archive: zipfile.ZipFile, splits: tuple[str, ...], where: str, stored: int
) -> dict[str, dict[str, np.ndarray]]:
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    there = [part for part in PARTS if part == "images" or any(f"{split}_{part}" in members for split in splits)]
    names = [f"{split}_{part}" for split in splits for part in there]
    for name in names:
        if name not in members:
            raise UserError(f"{where}: the array {name} is missing; there are {sorted(members)[:20]}")
        if members[name].flag_bits & 1:
            raise UserError(f"{where}: {name} is encrypted; save it without a password")
    promises = {name: _promise(archive, members[name], f"{where}: {name}") for name in names}
    for split in splits:
        _check(promises[f"{split}_images"], promises.get(f"{split}_labels"), f"{where}: {split}")
    if len({promises[f"{split}_images"].shape[1:] for split in splits}) > 1:
        raise UserError(f"{where}: the splits hold images of different shapes")
    size = sum(promise.size for promise in promises.values())
    if size > LARGE and size > BOMB * stored:
        raise UserError(f"{where}: {stored:,} bytes would become {size:,}; no images are so alike")
    if (free := _free_memory()) is not None and size > free:
        raise UserError(f"{where}: its arrays need {size:,} bytes, {free:,} are free; data.name=folder reads from disk")
    found: dict[str, dict[str, np.ndarray]] = {split: {} for split in splits}
    for name in names:
        split, part = name.rsplit("_", 1)
        found[split][part] = _array(archive, members[name], promises[name], f"{where}: {name}")
    for split in splits if "labels" in there else ():
        _check_labels(found[split]["labels"], f"{where}: {split}_labels")
    return found


def _promise(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> _Promise:
    with archive.open(info) as file:
        found = _header(file)
        length = file.tell()
    if found.dtype.hasobject:
        raise UserError(f"{where} holds Python objects, which are not read; save it as numbers")
    if any(side < 0 for side in found.shape) or length + found.size != info.file_size:
        raise UserError(
            f"{where} should hold {list(found.shape)} {found.dtype}, and has {info.file_size - length} bytes"
        )
    return found


def _header(file: Any) -> _Promise:
    version = np.lib.format.read_magic(file)
    read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file, max_header_size=_MAX_HEADER)
    return _Promise(tuple(int(side) for side in shape), dtype, fortran)


def _check(images: _Promise, labels: _Promise | None, where: str) -> None:
    shape = images.shape
    if len(shape) != 4 or not all(shape[1:]) or images.dtype != np.uint8:
        raise UserError(
            f"{where}_images must be uint8 [n, height, width, channels]; it is {images.dtype} {list(shape)}"
        )
    if labels is not None and (labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise UserError(f"{where}_labels must be integers [{shape[0]}]; it is {labels.dtype} {list(labels.shape)}")


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, promise: _Promise, where: str) -> np.ndarray:
    values = bytearray(promise.size)
    with archive.open(info) as file:
        _header(file)
        view, done = memoryview(values), 0
        while done < len(view):
            count = file.readinto(view[done : done + 2**24])  # type: ignore[attr-defined]
            if not count:
                raise UserError(f"{where} ends after {done:,} of {promise.size:,} bytes")
            done += count
        file.read(1)  # the checksum is looked at where the content ends
    return np.frombuffer(values, promise.dtype).reshape(promise.shape, order="F" if promise.fortran else "C")


def _check_labels(labels: np.ndarray, where: str) -> None:
    if len(labels) and int(labels.min()) < 0:
        raise UserError(f"{where} go down to {labels.min()}; labels count from 0")
    if len(labels) and int(labels.max()) >= MAX_CLASSES:
        raise UserError(f"{where} go up to {labels.max()}; more than {MAX_CLASSES:,} classes are not meant to be")


def _free_memory() -> int | None:
    """Bytes, where the system says so (Linux)."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
