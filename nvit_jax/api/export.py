"""export and save: the small model for other places."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvit_jax.api.arguments import checked
from nvit_jax.errors import UserError, check_choice
from nvit_jax.formats.card import check_results
from nvit_jax.formats.export import DTYPES, FORMATS, export_model, save_folder
from nvit_jax.formats.programs import OPSETS, USUAL, WEIGHTS, Options
from nvit_jax.model.directory import Model
from nvit_jax.paths import for_writing

FOLDERS = ("safetensors", "transformers")


@checked
def export(
    model: Model,
    directory: str | Path,
    formats: Sequence[str] = ("safetensors",),
    dtypes: Sequence[str] = ("float32",),
    *,
    opset: int = USUAL.opset,
    weights: str = "constants",
    results: Mapping[str, Any] | None = None,
    say: Any = print,
) -> list[dict[str, Any]]:
    """Write directory/<format>/ for each of "safetensors", "transformers", "stablehlo", "onnx".

    "safetensors" is a folder as hubs have them: model.safetensors with timm's names, config.json (timm's, where timm
    has a class for the model), preprocessor_config.json, README.md and vit.py, a PyTorch module in one file.
    "transformers" is the same for transformers' from_pretrained; it is for models whose blocks are all alike.

    Every file is run after writing and compared with the model; the records tell path, bytes and largest difference.
    Masked models are made compact first.

    Args:
      dtypes: "float32", "float16", "bfloat16", one file for each.
      opset: of the ONNX file, 17 to 25.
      weights: of a StableHLO program: "constants" inside of it, or "arguments" that it is called with.
      results: what was measured, for README.md: what `evaluate` returns, and "latency_ms", "latency_batch", "device",
        "dtype", "data", "commands", "dense" (the same of the unpruned model).

    Raises UserError when a package is missing, which "onnx" needs, and when a format cannot hold the model.
    """
    for name, values, choices in (("formats", formats, tuple(FORMATS)), ("dtypes", dtypes, DTYPES)):
        if isinstance(values, str):
            raise UserError(f'={values!r}: give a tuple, such as ("{values}",)', name)
        if not values:
            raise UserError(f": nothing to write; choose of {', '.join(choices)}", name)
        for value in values:
            check_choice(name, value, choices)
    if "onnx" in formats and "bfloat16" in dtypes:
        raise UserError('="bfloat16": ONNX runtimes lack it; use "float16"', "dtypes")
    options = _options(opset, weights, results)
    place = for_writing(directory, "directory=")
    return export_model(model.compact(), place, tuple(formats), tuple(dtypes), say, options)


@checked
def save(
    model: Model,
    directory: str | Path,
    *,
    format: str = "safetensors",
    dtype: str = "float32",
    results: Mapping[str, Any] | None = None,
    say: Any = print,
) -> dict[str, Any]:
    """Write a folder as hubs have them, which `load` gives back bit for bit; see `export`, whose `results` these are.

    `format` is "safetensors", or "transformers" for a folder that transformers' from_pretrained reads. Masked models
    are made compact first: a model directory (`Model.save`) keeps masks. Raises UserError for a directory that holds a
    model directory, or files of other people that would be replaced.

        >>> nvit.save(small, "small", results=nvit.evaluate(small, (images, labels)))
    """
    check_choice("format", format, FOLDERS)
    check_choice("dtype", dtype, DTYPES)
    options, place = _options(USUAL.opset, "constants", results), for_writing(directory, "directory=")
    return save_folder(model.compact(), place, format, (dtype,), say, options)[0]


def _options(opset: int, weights: str, results: Mapping[str, Any] | None) -> Options:
    least, most = OPSETS
    if not isinstance(opset, int) or isinstance(opset, bool) or not least <= opset <= most:
        raise UserError(f"={opset!r}: it must be a whole number from {least} to {most}", "opset")
    check_choice("weights", weights, WEIGHTS)
    if results is not None:
        check_results(results)
    return Options(opset, weights, results or {})
