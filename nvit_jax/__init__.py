"""nvit_jax: global structural pruning of Vision Transformers with Hessian-aware saliency, in JAX and Flax."""

import importlib
from typing import Any

__version__ = "0.6.0"
_EXPORTS = {
    "Model": "api",
    "load_model": "api",
    "save_model": "api",
    "load_classifier": "api",
    "convert_checkpoint": "convert",
    "Units": "dims",
    "ViTDims": "dims",
    "preset": "dims",
    "reshape": "reshape",
    "UserError": "errors",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    """Import on first use: `main.py --help` must not wait for JAX."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'nvit_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nvit_jax.{_EXPORTS[name]}"), name)
