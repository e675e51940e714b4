"""PyTorch's files: nothing but tensors and harmless values is let in, and the part with the weights is found."""

import argparse
import contextlib
import pathlib
import pickle
import re
import types
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nvit_jax.errors import UserError, first_line
from nvit_jax.formats.tensors import Tensors

# Where training scripts put the weights; averaged ones first, as their evaluation does.
_ENTRIES = (
    *("model_ema", "state_dict_ema", "ema_state_dict", "ema"),
    *("model", "model_state_dict", "state_dict", "teacher", "target_encoder", "encoder", "net", "backbone", "module"),
    *("student", "params", "weights"),
)
_NOT_WEIGHTS = re.compile(r"(opt|sched|scaler|criterion|loss|rng|predictor|decoder|disc|meters?$)")


def _check_zip(path: pathlib.Path) -> None:
    """UserError when bytes of a .pth file have changed: PyTorch writes checksums into it, and does not look at them."""
    if not zipfile.is_zipfile(path):
        return  # of before PyTorch 1.6
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if any(part.filename.endswith("/constants.pkl") for part in parts):
                raise UserError(
                    f"{path} is a TorchScript archive, which holds a program (OpenAI's CLIP files do); where that may "
                    "run: torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), 'weights.pt')"
                )
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise UserError(f"{path} is a compressed zip file, which torch.save does not write; is it an archive?")
            if sum(part.file_size for part in parts) > path.stat().st_size:
                raise UserError(f"{path} is damaged: its parts are larger than itself; fetch the file again")
            damaged = archive.testzip()
    except UserError:
        raise
    except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is truncated or not a PyTorch checkpoint: {error}") from error
    if damaged is not None:
        raise UserError(f"{path} is damaged: the checksum of {damaged} in it is another; fetch the file again")


def _plain(*factory: Any) -> dict[Any, Any]:
    """Stands for a defaultdict, which PyTorch does not fill."""
    return {}


def _harmless() -> list[Any]:
    """Types that hold plain values and run nothing: those that training scripts store beside the weights.

    A pair is a class and the name that stands for it in a file: Windows' paths cannot be made elsewhere, and
    Lightning's dictionary needs no Lightning.
    """
    scalar = np.float64(0).__reduce__()[0]
    rebuild = np.zeros(1).__reduce__()[0]
    kinds = {type(np.dtype(letter)) for letter in "?bhilqBHILQefd"}
    return [
        *(argparse.Namespace, types.SimpleNamespace, np.dtype, np.ndarray),
        *(int, float, str, bool, tuple, list, dict, set, frozenset),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *((rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
        *kinds,
        (_plain, "collections.defaultdict"),
        *(
            (getattr(pathlib, f"Pure{system}Path"), f"pathlib.{module}{kind}{system}Path")
            for system in ("Posix", "Windows")
            for kind in ("", "Pure")
            for module in ("", "_local.")
        ),
        *(
            (dict, f"{module}.utilities.parsing.AttributeDict")
            for module in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")
        ),
    ]


@contextlib.contextmanager
def open_torch(path: pathlib.Path, entry: str | None) -> Iterator[Tensors]:
    """The tensors of a file of torch.save. UserError as `weights.open_checkpoint`."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"reading {path} needs PyTorch: pip install torch (a .safetensors file does not)") from error
    _check_zip(path)
    with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles that it then refuses, or reads well
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL ([\w.]+)", str(error))
            if name or "Unsupported operand" in str(error):
                what = name[1] if name else "it is a pickle that torch.save did not make"
                raise UserError(f"{path} holds more than weights ({what}), which could run code: refused") from error
            raise UserError(f"{path} is truncated or not a PyTorch checkpoint") from error
        except Exception as error:  # damaged files raise nearly everything
            raise UserError(f"{path} is truncated or not a PyTorch checkpoint: {first_line(error)}") from error
    weights, extra, entry = _choose_entry(path, content, entry, torch.is_tensor)

    def read(name: str) -> np.ndarray:
        tensor = weights[name].detach()
        if problem := _unreadable(tensor):
            raise UserError(f"{path}: {name} {problem}")
        half = tensor.is_floating_point() and tensor.element_size() < 4
        return (tensor.float() if half else tensor).numpy()

    if nested := next((name for name, tensor in weights.items() if tensor.is_nested), None):
        raise UserError(f"{path}: {nested} is a nested tensor, which has no shape")
    yield Tensors({name: tuple(t.shape) for name, t in weights.items()}, read, extra, entry)


def _unreadable(tensor: Any) -> str:
    import torch

    if tensor.is_meta:
        return "has a shape and no values (PyTorch's meta device); save the model after its weights are loaded"
    if tensor.is_quantized:
        return "is quantised; save the model before it is"
    if tensor.layout != torch.strided:
        return "is sparse; store it with .to_dense()"
    return ""


def _choose_entry(path: pathlib.Path, content: Any, entry: str | None, is_tensor: Any) -> tuple[dict, dict, str]:
    """The state dict inside what a training script saved, what lies beside it, and its name there."""

    def tensors(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            return {}
        return {k: v for k, v in value.items() if is_tensor(v) and isinstance(k, str)}

    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not named tensors")
    parts = _parts(content, tensors)
    if entry in parts:
        return tensors(parts[entry]), _beside(content, entry, tensors), entry
    likely = [name for name in parts if not _NOT_WEIGHTS.match(name.split(".")[-1])]
    direct = tensors(content)
    last = {name.split(".")[-1]: name for name in reversed(likely)}
    chosen = next((last[name] for name in _ENTRIES if name in last), likely[0] if len(likely) == 1 else "")
    if direct and (not chosen or len(direct) > len(tensors(parts[chosen]))):
        chosen = ""
    if not chosen and not direct:
        if parts:
            raise UserError(f"{path} holds {', '.join(parts)}: choose one with --entry")
        if any(is_tensor(v) for v in content.values()):
            raise UserError(f"{path} holds tensors under numbers, not under names: not a model's state dict")
    if entry is not None and not any(name.startswith(entry) for name in tensors(parts.get(chosen, content))):
        raise UserError(f"{path} has no entry {entry!r}; there are {', '.join(parts) or 'none'}")
    return tensors(parts.get(chosen, content)), _beside(content, chosen, tensors), chosen


def _parts(content: Mapping[Any, Any], tensors: Any, prefix: str = "", depth: int = 3) -> dict[str, Any]:
    """Dictionaries of named tensors inside dictionaries, under dotted names."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping) and isinstance(name, str):
            if tensors(value):
                found[prefix + name] = value
            elif depth > 1 and not _NOT_WEIGHTS.match(name):
                found |= _parts(value, tensors, f"{prefix}{name}.", depth - 1)
    return found


def _beside(content: Mapping[Any, Any], entry: str, tensors: Any) -> dict[str, Any]:
    if not entry:
        return {k: v for k, v in content.items() if isinstance(k, str) and not tensors({k: v}) and not tensors(v)}
    return {k: v for k, v in content.items() if isinstance(k, str) and k != entry and not tensors({k: v})}
