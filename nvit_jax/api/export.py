"""export: the small model for other places."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvit_jax.api.arguments import checked
from nvit_jax.errors import UserError, check_choice
from nvit_jax.formats.export import DTYPES, FORMATS, export_model
from nvit_jax.model.directory import Model


@checked
def export(
    model: Model,
    directory: str | Path,
    formats: Sequence[str] = ("safetensors",),
    dtypes: Sequence[str] = ("float32",),
    *,
    say: Any = print,
) -> list[dict[str, Any]]:
    """Write directory/<format>/model.<format>: "safetensors" (with vit.py, a PyTorch module), "stablehlo", "onnx".

    Every file is run after writing and compared with the model; the records tell path, bytes and largest difference.
    Masked models are made compact first. `dtypes`: "float32", "float16", "bfloat16", one file for each.
    Raises UserError when a package is missing, which "onnx" needs.
    """
    for name, values, choices in (("formats", formats, tuple(FORMATS)), ("dtypes", dtypes, DTYPES)):
        if isinstance(values, str):
            raise UserError(f'={values!r}: give a tuple, such as ("{values}",)', name)
        if not values:
            raise UserError(f": nothing to write; choose of {', '.join(choices)}", name)
        for value in values:
            check_choice(name, value, choices)
    return export_model(model.compact(), Path(directory), tuple(formats), tuple(dtypes), say)
