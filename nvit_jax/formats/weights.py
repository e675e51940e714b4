"""Checkpoint files of other frameworks: opened without running any code that they hold, tensors read one at a time."""

import argparse
import contextlib
import json
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from nvit_jax.errors import UserError

# Where training scripts put the weights; averaged ones first, as their evaluation does.
_ENTRIES = ("model_ema", "state_dict_ema", "model", "state_dict", "teacher", "student")


class Tensors(NamedTuple):
    """The named tensors of a checkpoint file."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]  # half precision comes as float32
    extra: dict[str, Any]  # what lies beside the weights: {"dim": {...}}, metadata of a safetensors file
    entry: str  # the part of the file that they were in, "" for all of it


@contextlib.contextmanager
def open_checkpoint(path: pathlib.Path, entry: str | None = None) -> Iterator[Tensors]:
    """The tensors of a .pth or .pt (needs PyTorch), .safetensors or .npz file. They can be read inside the block.

    A prefix that all names share ("module.", "backbone.") is dropped. `entry` chooses a part of a PyTorch file.
    Raises UserError for a file that is missing, truncated, no checkpoint, or holds code.
    """
    if not path.is_file():
        raise UserError(f"--checkpoint={path}: {'not a file' if path.exists() else 'there is no such file'}")
    if path.suffix == ".safetensors":
        opened = _safetensors(path)
    elif path.suffix == ".npz":
        opened = _npz(path)
    elif path.suffix in (".pth", ".pt", ".bin", ".tar", ".ckpt"):
        opened = _torch(path, entry)
    else:
        raise UserError(f"{path}: the name ends in none of .pth .pt .bin .safetensors .npz")
    with opened as tensors:
        if not tensors.shapes:
            raise UserError(f"{path} holds no tensors")
        yield _without_prefix(tensors)


def _without_prefix(tensors: Tensors) -> Tensors:
    prefix = ""
    for part in ("module.", "model.", "backbone.", "params/"):
        if all(name.startswith(prefix + part) for name in tensors.shapes):
            prefix += part
    shapes = {name.removeprefix(prefix): shape for name, shape in tensors.shapes.items()}
    return tensors._replace(shapes=shapes, read=lambda name: tensors.read(prefix + name))


@contextlib.contextmanager
def _safetensors(path: pathlib.Path) -> Iterator[Tensors]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            yield Tensors(shapes, lambda name: _float32(file.get_tensor(name)), dict(file.metadata() or {}), "")
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file: {error}") from error


@contextlib.contextmanager
def _npz(path: pathlib.Path) -> Iterator[Tensors]:
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            shapes = {name: _npz_shape(file, name) for name in file.files}
            yield Tensors(shapes, lambda name: _float32(file[name]), {}, "")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is truncated, holds Python objects, or is not an .npz file: {error}") from error


def _npz_shape(file: Any, name: str) -> tuple[int, ...]:
    """Read from the header alone."""
    with file.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        if dtype.hasobject:
            raise ValueError(f"{name} is an array of objects")
        return tuple(shape)


@contextlib.contextmanager
def _torch(path: pathlib.Path, entry: str | None) -> Iterator[Tensors]:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"reading {path} needs PyTorch: pip install torch (a .safetensors file does not)") from error
    # The official files carry their training arguments: a Namespace of plain values. Nothing else is let in.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles that it then refuses, or reads well
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL ([\w.]+)", str(error))
            if name or "Unsupported operand" in str(error):
                what = name[1] if name else "it is a pickle that torch.save did not make"
                raise UserError(f"{path} holds more than weights ({what}), which could run code: refused") from error
            raise UserError(f"{path} is truncated or not a PyTorch checkpoint") from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, AssertionError, IndexError, TypeError) as error:
            first = (str(error).splitlines() or [""])[0][:120]
            raise UserError(f"{path} is truncated or not a PyTorch checkpoint: {first}") from error
    weights, extra, entry = _choose_entry(path, content, entry, torch.is_tensor)

    def read(name: str) -> np.ndarray:
        tensor = weights[name].detach()
        half = tensor.is_floating_point() and tensor.element_size() < 4
        return (tensor.float() if half else tensor).numpy()

    yield Tensors({name: tuple(t.shape) for name, t in weights.items()}, read, extra, entry)


def _choose_entry(
    path: pathlib.Path, content: Any, entry: str | None, is_tensor: Callable[[Any], bool]
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The state dict inside what a training script saved, what lies beside it, and its name there."""

    def tensors(value: Any) -> dict[str, Any]:
        return {k: v for k, v in value.items() if is_tensor(v)} if isinstance(value, Mapping) else {}

    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not named tensors")
    parts = [name for name, value in content.items() if tensors(value)]
    if entry is not None and entry not in parts:
        raise UserError(f"{path} has no entry {entry!r}; there are {', '.join(map(str, parts)) or 'none'}")
    if entry is None:
        entry = next((name for name in _ENTRIES if name in parts), parts[0] if len(parts) == 1 else "")
    if not entry and parts and not tensors(content):
        raise UserError(f"{path} holds {', '.join(map(str, parts))}: choose one with --entry")
    chosen = content[entry] if entry else content
    extra = {k: v for k, v in content.items() if k != entry and not tensors({k: v})} if entry else {}
    return tensors(chosen), extra, entry


def _float32(array: np.ndarray) -> np.ndarray:
    """Half precision (float16, bfloat16) as float32, everything else as it is."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind in "fV" else array


def read_beside(path: pathlib.Path, name: str) -> dict[str, Any]:
    """A JSON file in the checkpoint's directory (config.json of a hub model); {} when there is none."""
    file = path.with_name(name)
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    return value if isinstance(value, dict) else {}


def find_weights(folder: pathlib.Path) -> pathlib.Path:
    """The checkpoint file of a folder such as a Hugging Face snapshot. UserError when there is none, or no telling."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    if (folder / "model.safetensors.index.json").exists():
        raise UserError(f"{folder} holds a checkpoint in several files, which is not read; merge them first")
    found = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".pth", ".pt", ".bin", ".npz"))
    if len(found) != 1:
        shown = ", ".join(f.name for f in found) or "none"
        raise UserError(f"{folder} is no model directory, and not one checkpoint lies in it ({shown}); name a file")
    return found[0]
