"""The compact model for other places: folders of a hub, StableHLO, ONNX. Each is run after writing."""

import contextlib
import io
import pathlib
import stat
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.files import new_directory
from nvit_jax.formats import folder, interchange, libraries
from nvit_jax.formats.convert import convert
from nvit_jax.formats.programs import (
    MOST_CONSTANTS,
    USUAL,
    Options,
    Run,
    Written,
    file_name,
    onnx_matrices,
    write_onnx,
    write_stablehlo,
)
from nvit_jax.model.dims import ViTDims, count_params
from nvit_jax.model.directory import Model, check_weights
from nvit_jax.pruning import sparsity

Path = pathlib.Path


def export_model(
    model: Model,
    directory: Path,
    formats: tuple[str, ...],
    dtypes: tuple[str, ...],
    say: Callable[[str], None],
    options: Options = USUAL,
) -> list[dict[str, Any]]:
    """Write directory/<format>/model[.<dtype>].<suffix>, run each and compare it with the Flax model in float32.

    Returns one record a file. UserError when a package is missing, or a format cannot say the model; RuntimeError when
    a float32 file differs, or the matrices of a 2:4 sparse model's file are not sparse.
    """
    check_weights(model.params, "export")
    check_formats(model.dims, formats, options.weights)
    expected = _Expected.of(model)
    return [
        record
        for name in formats
        for record in _write(model, directory / name, name, dtypes, options, expected, say, f"{directory.name}/{name}")
    ]


def save_folder(
    model: Model, directory: Path, name: str, dtypes: tuple[str, ...], say: Callable[[str], None], options: Options
) -> list[dict[str, Any]]:
    """As `export_model`, one format straight into `directory`."""
    check_weights(model.params, "export")
    check_formats(model.dims, (name,), options.weights)
    return _write(model, directory, name, dtypes, options, _Expected.of(model), say, directory.name)


def check_formats(dims: ViTDims, formats: tuple[str, ...], weights: str) -> None:
    """UserError for a format that cannot hold the model, before any is written."""
    if "transformers" in formats and (why := libraries.transformers_lacks(dims)):
        raise UserError(f'="transformers" has no class for this model: {why}; "safetensors" holds it', "formats")
    total = 4 * count_params(dims)
    if "stablehlo" in formats and weights == "constants" and total > MOST_CONSTANTS:
        raise UserError(
            f'="constants": a StableHLO program holds at most {MOST_CONSTANTS / 1e9:.1f} GB, and the weights have '
            f'{total / 1e9:.1f} GB; "arguments" puts them into a file of their own',
            "weights",
        )


class _Expected(NamedTuple):
    """What the Flax model computes of a few images."""

    images: np.ndarray
    logits: np.ndarray

    @classmethod
    def of(cls, model: Model) -> "_Expected":
        shape = (3, *model.dims.sides, model.dims.channels)
        images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        with jax.default_matmul_precision("float32"):
            logits = np.asarray(model.apply(model.params, images))
        if not np.isfinite(logits).all():
            raise UserError("export: the model's answers are not finite; look at its weights")
        return cls(images, logits)


def _write(
    model: Model,
    place: Path,
    name: str,
    dtypes: tuple[str, ...],
    options: Options,
    expected: _Expected,
    say: Callable[[str], None],
    shown: str,
) -> list[dict[str, Any]]:
    """One format, into `place`; it is there when all of its files are right."""
    records = []
    if name in ("safetensors", "transformers"):
        folder.check_place(place)
    suffix = SUFFIXES.get(name, name)
    with new_directory(place, (f"model*.{suffix}*", *folder.BESIDE)) as beside:
        written = [FORMATS[name](model, beside, dtype, options) for dtype in dtypes]
        _open_to_others(beside)
        for dtype, file in zip(dtypes, written, strict=True):
            record, line = _check(file, name, dtype, expected)
            record["path"] = f"{shown}/{file.path.name}"
            say(f"{record['path']}: {line}")
            if "sparsity" in model.info and name in _MATRICES:
                record["sparsity"], facts = _check_sparsity(model, list(_MATRICES[name](file.path)))
                say(f"{record['path']}: {facts}")
            records.append(record)
        if written[0].note:
            say(f"{shown}: {written[0].note}")
    return records


def _check(file: Written, name: str, dtype: str, expected: _Expected) -> tuple[dict[str, Any], str]:
    """(record, the same in words) of a file, from running it."""
    images, largest = expected.images, float(np.abs(expected.logits).max())
    # Two batch sizes, neither of them the one that was traced.
    found = np.concatenate([file.run(images[:1]), file.run(images[1:])])
    difference = float(np.abs(found - expected.logits).max())
    limit = 1e-4 * max(1.0, largest)  # of float32; ten times what the order of additions explains
    if not np.isfinite(found).all() and dtype != "float32":
        raise UserError(f"{file.path.name}: this model overflows in {dtype}; take float32 or bfloat16")
    if not np.isfinite(found).all() or (dtype == "float32" and difference > limit):
        raise RuntimeError(f"{file.path.name} differs from the model by {difference}")
    size = sum(f.stat().st_size for f in file.path.parent.glob(f"{file.path.name}*"))
    record: dict[str, Any] = {
        "path": "",
        "format": name,
        "dtype": dtype,
        "bytes": size,
        "max_abs_diff": difference,
        "max_abs_logit": largest,
        "run_with": file.runner,
    }
    words = f"{size:,} bytes"
    if file.weights is not None:
        record |= {"program_bytes": size, "weights_bytes": file.weights.stat().st_size}
        record["bytes"] = record["program_bytes"] + record["weights_bytes"]
        words += f", and {record['weights_bytes']:,} bytes of weights in {file.weights.name}"
    return record, f"{words}, run with {file.runner}, largest difference {difference:.1e} on logits up to {largest:.2f}"


def _open_to_others(directory: Path) -> None:
    """Give every file the permissions that new files get here: safetensors makes its own for their owner alone."""
    probe = directory / ".new"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in directory.iterdir():
        file.chmod(mode)


def _check_sparsity(model: Model, found: list[tuple[str, np.ndarray]]) -> tuple[str, str]:
    """The pattern that every matrix of a written file has, and what to know about it. RuntimeError otherwise."""
    count = sparsity.check(found)
    expected = sum(len(e.shape) == 2 for e in interchange.entries(model.dims))
    if count != expected:
        raise RuntimeError(f"found {count} of {expected} matrices in the file that was written")
    facts = f"{sparsity.PATTERN} in each of {count} matrices along the inputs"
    # cuSPARSELt's smallest tile in 16 bits, as PyTorch's SparseSemiStructuredTensorCUSPARSELT asks for it.
    if odd := sum(any(side % 16 for side in matrix.shape) for _, matrix in found):
        facts += f"; {odd} have a side that is no multiple of 16, which sparse kernels need padded with zeros"
    return sparsity.PATTERN, facts


# ------------------------------------------------------------------------------------------- safetensors


def write_safetensors(
    model: Model,
    directory: Path,
    dtype: str = "float32",
    options: Options = USUAL,
) -> Written:
    """timm's names and shapes; widths, preprocessing and classes in the metadata; beside it what folder.py says."""
    path = directory / file_name(dtype, "safetensors")
    folder.write_weights(path, model, interchange.to_torch(model.dims, model.params), dtype)
    note = folder.write_for_timm(model, directory, options.results)
    try:
        import torch

        from nvit_jax.formats import torch_vit
    except ImportError:
        why = "Flax, from the file's tensors (PyTorch is not installed)"
        return Written(path, _flax_reader(path), why, note=note)
    twin = torch_vit.load(str(path))

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(twin(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy())

    return Written(path, run, f"PyTorch {torch.__version__.split('+')[0]}", note=note)


def _flax_reader(path: Path) -> Run:
    model = convert(path).model
    return lambda images: np.asarray(model.logits(model.params, images))


def _safetensors_matrices(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, [outputs, inputs]) of every linear layer, as a file holds it."""
    from safetensors.numpy import load_file

    return ((name, value) for name, value in load_file(path).items() if value.ndim == 2)


def write_transformers(model: Model, directory: Path, dtype: str = "float32", options: Options = USUAL) -> Written:
    """The folder that transformers' `from_pretrained` reads; of other number types it is told with `variant`."""
    path = directory / file_name(dtype, "safetensors")
    folder.write_weights(path, model, libraries.transformers_state(model), dtype)
    note = folder.write_for_transformers(model, directory, options.results)
    try:
        import torch
        import transformers
    except ImportError:
        why = "Flax, from the file's tensors (transformers is not installed)"
        return Written(path, _flax_reader(path), why, note=note)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        theirs = transformers.AutoModelForImageClassification.from_pretrained(
            directory,
            local_files_only=True,
            variant=None if dtype == "float32" else dtype,
            dtype=torch.float32,
        ).eval()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits.numpy())

    return Written(path, run, f"transformers {transformers.__version__}", note=note)


DTYPES = ("float32", "float16", "bfloat16")
FORMATS: dict[str, Callable[[Model, Path, str, Options], Written]] = {
    "safetensors": write_safetensors,
    "transformers": write_transformers,
    "stablehlo": write_stablehlo,
    "onnx": write_onnx,
}
SUFFIXES = {"transformers": "safetensors"}  # of a file, where it is not the format's name
# Of a StableHLO program none: it is dense for whatever compiles it. Nor of transformers' file: its rows are the same.
_MATRICES: dict[str, Callable[[Path], Iterator[tuple[str, np.ndarray]]]] = {
    "safetensors": _safetensors_matrices,
    "onnx": onnx_matrices,
}
