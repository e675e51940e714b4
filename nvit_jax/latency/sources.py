"""Where predicted milliseconds come from: a measured table, the released NViT's, an estimate, or a user's function."""

import pathlib
from collections.abc import Callable
from typing import Any

from nvit_jax.errors import UserError
from nvit_jax.files import read_json
from nvit_jax.latency.released import ReleasedTable
from nvit_jax.latency.roofline import Roofline
from nvit_jax.latency.table import LatencyTable
from nvit_jax.latency.timing import device_name
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.sizes import words
from nvit_jax.paths import named

Latency = LatencyTable | ReleasedTable | Roofline
Milliseconds = Callable[[ViTDims], float]


def read_latency(path: str | pathlib.Path) -> LatencyTable | ReleasedTable:
    """A table that `LatencyTable.save` or a latency stage wrote, or the released NViT's JSON. Raises UserError."""
    path = named(path)
    values = read_json(path)
    if isinstance(values, dict) and any(str(key).startswith("EMB_") for key in values):
        return ReleasedTable.read(path)
    return LatencyTable(values, str(path))


def check_latency(found: Any, dims: ViTDims, batch: int, dtype: str) -> None:
    """UserError when a table was measured for another model, batch or type."""
    if isinstance(found, LatencyTable):
        found.check_for(dims, batch, dtype)
    elif isinstance(found, ReleasedTable):
        found(dims)  # a model outside of the table is refused here
        if (dims.image, dims.patch, dims.depth) != (224, 16, 12):
            raise UserError(
                " was measured for 12 blocks at 224 pixels in patches of 16; this model has "
                f"{dims.depth} at {words(dims.image)} in patches of {words(dims.patch)}",
                "latency_table",
            )


def source(latency: Milliseconds | None) -> str | None:
    """The device, or the estimate, that predictions are for; None where that is not known."""
    return None if latency is None else getattr(latency, "device", "a function of the caller's")


def of_another_device(latency: Milliseconds | None) -> bool:
    """Whether predictions are for a device that is not this one."""
    return latency is not None and source(latency) != device_name()
