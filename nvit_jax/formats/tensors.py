"""What every kind of checkpoint file comes down to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Tensors(NamedTuple):
    """The named tensors of a checkpoint file."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]  # half precision and less comes as float32
    extra: dict[str, Any]  # what lies beside the weights: {"dim": {...}}, metadata of a safetensors file
    entry: str  # the part of the file that they were in, "" for all of it
