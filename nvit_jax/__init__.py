"""nvit_jax: global structural pruning of Vision Transformers with Hessian-aware saliency, in JAX and Flax."""

import importlib
from typing import Any

__version__ = "0.6.0"
_EXPORTS = {
    "Model": "model.directory",
    "load_model": "model.directory",
    "save_model": "model.directory",
    "load_classifier": "model.directory",
    "convert_checkpoint": "formats.convert",
    "Units": "model.dims",
    "ViTDims": "model.dims",
    "preset": "model.dims",
    "reshape": "pruning.reshape",
    "UserError": "errors",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    """Import on first use: `main.py --help` must not wait for JAX."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'nvit_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nvit_jax.{_EXPORTS[name]}"), name)
