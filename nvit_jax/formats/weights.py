"""Checkpoint files of other frameworks: opened without running any code that they hold, tensors read one at a time."""

import contextlib
import glob
import json
import math
import pathlib
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from nvit_jax import paths
from nvit_jax.data.npz import BOMB, LARGE
from nvit_jax.errors import UserError
from nvit_jax.files import read_json
from nvit_jax.formats.tensors import Tensors as Tensors
from nvit_jax.formats.torch_files import open_torch
from nvit_jax.schema import Record, Table, Text

SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".safetensors", ".npz")
_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
_INDEX = ".index.json"  # of a checkpoint in several files
_PLACES = Record({"weight_map": Table(Text())})


@contextlib.contextmanager
def open_checkpoint(path: pathlib.Path, entry: str | None = None) -> Iterator[Tensors]:
    """The tensors of a .pth, .pt, .bin or .ckpt (need PyTorch), .safetensors or .npz file, or of the files that an
    .index.json lists. They can be read inside the block.

    `entry` chooses a part of a PyTorch file. Raises UserError for a file that is missing, truncated, no checkpoint, or
    holds code.
    """
    paths.file(path)
    with _opened(_whole(path), entry) as tensors:
        if not tensors.shapes:
            raise UserError(f"{path} holds no tensors")
        yield tensors._replace(read=lambda name: _checked(tensors.read(name), name, path))


def _opened(path: pathlib.Path, entry: str | None) -> contextlib.AbstractContextManager[Tensors]:
    suffix = path.suffix.lower()
    if path.name.endswith(_INDEX):
        return _sharded(path, entry)
    if suffix == ".safetensors":
        return _safetensors(path)
    if suffix == ".npz":
        return _npz(path)
    if suffix in SUFFIXES:
        return open_torch(path, entry)
    hint = "; unpack it first" if suffix in (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z") else ""
    raise UserError(f"{path}: the name ends in none of .pth .pt .bin .ckpt .safetensors .npz{hint}")


def _checked(array: np.ndarray, name: str, path: pathlib.Path) -> np.ndarray:
    if array.dtype.kind == "c":
        raise UserError(f"{path}: {name} holds complex numbers, which no Vision Transformer has")
    if array.dtype.kind in "biu":
        raise UserError(f"{path}: {name} holds integers ({array.dtype}): quantised weights are not read")
    return array


@contextlib.contextmanager
def _safetensors(path: pathlib.Path) -> Iterator[Tensors]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

            def read(name: str) -> np.ndarray:
                eight = _FLOAT8.get(file.get_slice(name).get_dtype())
                return _float32(file.get_tensor(name) if eight is None else _bytes_of(path, name, eight))

            yield Tensors(shapes, read, dict(file.metadata() or {}), "")
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file: {error}") from error


def _bytes_of(path: pathlib.Path, name: str, dtype: Any) -> np.ndarray:
    """One tensor of a safetensors file whose header is known to be sound; NumPy's reader knows no float8."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        facts = json.loads(file.read(size))[name]
        begin, end = facts["data_offsets"]
        file.seek(8 + size + begin)
        return np.frombuffer(file.read(end - begin), dtype).reshape(facts["shape"])


@contextlib.contextmanager
def _npz(path: pathlib.Path) -> Iterator[Tensors]:
    with open(path, "rb") as opened:
        if opened.read(6) == b"\x93NUMPY":
            raise UserError(f"{path} is a single array (.npy), not an .npz file of named ones")
    if not zipfile.is_zipfile(path):  # NumPy would tell how to read it unsafely
        raise UserError(f"{path} is truncated, or not an .npz file")
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            _check_zip(path, file.zip)
            shapes = {name: _npz_shape(file, name) for name in file.files}
            yield Tensors(shapes, lambda name: _float32(_bfloat16(file[name], name, path)), {}, "")
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is truncated, holds Python objects, or is not an .npz file: {error}") from error


def _check_zip(path: pathlib.Path, archive: zipfile.ZipFile) -> None:
    """UserError for members that are no arrays, and for a few bytes that would fill the memory."""
    parts, stored = archive.infolist(), path.stat().st_size
    if other := [part.filename for part in parts if not part.filename.endswith(".npy")]:
        raise UserError(f"{path} is no .npz file of arrays: it holds {other[0]!r:.100}")
    size = sum(part.file_size for part in parts)
    if size > LARGE and size > BOMB * stored:
        raise UserError(f"{path}: {stored:,} bytes would become {size:,}; no weights are so alike")


def _npz_shape(file: Any, name: str) -> tuple[int, ...]:
    """Read from the header alone."""
    with file.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        if dtype.hasobject:
            raise ValueError(f"{name} is an array of objects")
        size, there = math.prod(shape) * dtype.itemsize, file.zip.getinfo(f"{name}.npy").file_size - member.tell()
        if min(shape, default=0) < 0 or size != there:
            raise ValueError(f"{name} should hold {list(shape)} {dtype}, and has {there} bytes")
        return tuple(shape)


def _bfloat16(array: np.ndarray, name: str, path: pathlib.Path) -> np.ndarray:
    """NumPy knows no bfloat16 and stores two nameless bytes; of one byte nobody can tell which float8 it is."""
    if array.dtype.kind != "V" or array.dtype.names:
        return array
    if array.dtype.itemsize != 2:
        raise UserError(f"{path}: {name} holds values of {array.dtype.itemsize} bytes without a type; save as float32")
    return array.view(ml_dtypes.bfloat16)


@contextlib.contextmanager
def _sharded(path: pathlib.Path, entry: str | None) -> Iterator[Tensors]:
    """All files that an index names, as one; each lies beside it."""
    places = read_json(path, _PLACES, "an index of a checkpoint in several files")["weight_map"]
    files, names = sorted(set(places.values())), set(places)
    if not files or any(not f or pathlib.PurePath(f).name != f or f.endswith(_INDEX) for f in files):
        raise UserError(f"{path} must list files beside it, by their names alone")
    with contextlib.ExitStack() as stack:
        shapes: dict[str, tuple[int, ...]] = {}
        owner: dict[str, Tensors] = {}
        for name in files:
            file = path.with_name(name)
            if paths.kind(file) != "a file":
                raise UserError(f"{path} lists {name}, which is {paths.kind(file) or 'not there'}")
            part = stack.enter_context(_opened(file, entry))
            shapes |= part.shapes
            owner |= dict.fromkeys(part.shapes, part)
        if missing := sorted(names - shapes.keys()):
            raise UserError(f"{path} lists {missing[0]}, which {places[missing[0]]} does not hold")
        yield Tensors(shapes, lambda name: owner[name].read(name), {}, "")


def _whole(path: pathlib.Path) -> pathlib.Path:
    """The index of the files that `path` is one of; itself where it is all. UserError for a part without its index."""
    numbered = re.fullmatch(r"(.+)-\d+-of-(\d+)(\.\w+)", path.name)
    if not numbered or int(numbered[2]) < 2:
        return path
    index = path.with_name(f"{numbered[1]}{numbered[3]}{_INDEX}")
    if paths.kind(index) != "a file":
        raise UserError(f"{path} is one of {int(numbered[2])} files, and their index {index.name} is not beside it")
    return index


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """All files that a conversion of `path` reads: itself, the parts that an index lists, what is said beside it."""
    if path.is_dir():
        return [path]
    whole, parts = _whole(path), []
    if whole.name.endswith(_INDEX):
        prefix, suffix = whole.name.removesuffix(_INDEX).rsplit(".", 1)
        parts = sorted(whole.parent.glob(f"{glob.escape(prefix)}-*.{glob.escape(suffix)}"))
    names = ("config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json")
    beside = [path.with_name(name) for name in names]
    return [whole, *parts, *(file for file in beside if paths.kind(file) == "a file")]


def _float32(array: np.ndarray) -> np.ndarray:
    """Half precision and less (float16, bfloat16, float8) as float32, everything else as it is."""
    small = array.dtype.itemsize <= 2 and (array.dtype.kind in "fV" or array.dtype.name.startswith(("bfloat", "float")))
    return array.astype(np.float32) if small else array


def find_weights(folder: pathlib.Path) -> pathlib.Path:
    """The checkpoint file of a folder such as a Hugging Face snapshot. UserError when there is none, or no telling."""
    whole = ("model.safetensors", "pytorch_model.bin")
    for name in (*whole, *(f"open_clip_{name}" for name in whole)):
        for found in (folder / name, folder / f"{name}{_INDEX}"):
            if found.is_file():
                return found
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES or f.name.endswith(_INDEX))
    indices = [f for f in files if f.name.endswith(_INDEX)]
    if len(indices or files) != 1:
        shown = ", ".join(f.name for f in files) or "none"
        raise UserError(
            f"{folder} is no model directory and not a file, and not one checkpoint lies in it ({shown}); name a file"
        )
    return (indices or files)[0]
