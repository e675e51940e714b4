"""The latency table of the released NViT: a JSON of one block's seconds on a V100."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.files import read_json
from nvit_jax.latency.table import check_axes, monotone
from nvit_jax.model.dims import ViTDims


class ReleasedTable:
    """The released table: seconds of one block of a V100, over EMB x heads x QK x V x MLP, interpolated linearly.

    The cells "MLP_1" stand at 0, and a block of embed 0 takes 0 seconds. Called with dims: milliseconds of the model,
    the sum over its blocks.
    """

    device = "V100 (released NViT table)"

    of_blocks = True  # a sum over the blocks, given embed

    def __init__(self, axes: Sequence[Sequence[int]], seconds: np.ndarray) -> None:
        self.axes = [list(a) for a in axes]
        places = [[0, *self.axes[0]], *self.axes[1:4], [0, *self.axes[4][1:]]]
        self._limits = [(p[0], p[-1]) for p in places]
        values = np.concatenate([np.zeros_like(seconds[:1]), seconds])
        self.disorder = float(np.max(np.abs(monotone(seconds) / seconds - 1)))  # used as it is, all the same
        from scipy.interpolate import RegularGridInterpolator  # half a second of imports

        self._interpolate = RegularGridInterpolator(places, values)
        self.block_seconds = functools.lru_cache(maxsize=None)(self._block_seconds)

    @classmethod
    def read(cls, path: pathlib.Path) -> "ReleasedTable":
        """UserError for a file of another form, with a missing cell (named), or one that is not positive."""
        table = read_json(path)
        try:
            embed = sorted(int(k.removeprefix("EMB_")) for k in table)
            pairs = [tuple(int(n) for n in k.split("_")[1:]) for k in table[f"EMB_{embed[0]}"]]
            heads, qk = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
            first = table[f"EMB_{embed[0]}"][f"QK_{heads[0]}_{qk[0]}"]
            v = sorted(int(k.removeprefix("V_")) for k in first)
            mlp = sorted(int(k.removeprefix("MLP_")) for k in first[f"V_{v[0]}"])
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"{path} is not a latency table of the released NViT ({error!r})") from error
        axes = (embed, heads, qk, v, mlp)
        check_axes(axes, str(path))
        seconds = np.zeros([len(a) for a in axes])
        for index in np.ndindex(*seconds.shape):
            e, h, q, w, m = (axis[i] for axis, i in zip(axes, index, strict=True))
            names = (f"EMB_{e}", f"QK_{h}_{q}", f"V_{w}", f"MLP_{m}")
            cell: Any = table
            for name in names:
                cell = cell.get(name) if isinstance(cell, Mapping) else None
            if not isinstance(cell, int | float) or not 0 < cell < np.inf:
                what = "is missing" if cell is None else f"is {cell}; it must be a positive number of seconds"
                raise UserError(f"{path}: the cell {' '.join(names)} {what}")
            seconds[index] = cell
        return cls(axes, seconds)

    def _block_seconds(self, embed: int, heads: int, qk: int, v: int, mlp: int) -> float:
        """One block. UserError for a width outside of the table."""
        widths = (embed, heads, qk, v, mlp)
        if not heads:
            raise UserError("the released latency table knows no block without heads; keep the floor of head at 1")
        for name, width, (low, high) in zip(("EMB", "heads", "QK", "V", "MLP"), widths, self._limits, strict=True):
            if not low <= width <= high:
                raise UserError(f"the released latency table knows {name} from {low} to {high}, not {width}")
        return float(self._interpolate([widths])[0])

    def blocks(self, dims: ViTDims) -> list[float]:
        """Seconds of every block. UserError for parts of other kinds than those that were measured."""
        unknown = {"gated mlp (SwiGLU)": dims.gated, "norm of queries and keys": dims.qk_norm_count}
        unknown |= {"rotary positions": dims.rotary, "relative positions": dims.relative}
        unknown |= {"norms inside of attention or mlp": dims.proj_norm_count or dims.fc2_norm_count}
        for what, there in unknown.items():
            if there:
                raise UserError(f"the released latency table knows no {what}; measure one, or take a target of MACs")
        return [
            self.block_seconds(dims.embed, h, q, v, m)
            for h, q, v, m in zip(dims.heads, dims.qk, dims.v, dims.mlp, strict=True)
        ]

    def __call__(self, dims: ViTDims) -> float:
        """Milliseconds of the whole model."""
        return 1e3 * sum(self.blocks(dims))
