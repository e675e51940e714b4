"""A model in words: one line, and a table of its widths."""

import jax

from nvit_jax.model.dims import Units, ViTDims, attention_macs, block_params, count_macs, count_params, mlp_macs
from nvit_jax.model.masks import kept_dims, normalize, to_numpy


def one_line(dims: ViTDims, masks: Units | None = None, variant: str | None = None) -> str:
    """ "deit_tiny, 12 blocks of embed 192, 224 x 224 x 3 -> 1000 classes, 5.72 M parameters, 1.26 GMACs"."""
    what = f"{dims.classes} classes" if dims.classes else f"{dims.features} features"
    height, width = dims.sides
    parts = [variant] if variant else []
    parts += [f"{dims.depth} blocks of embed {dims.embed}", f"{height} x {width} x {dims.channels} -> {what}"]
    parts += [f"{count_params(dims) / 1e6:.3g} M parameters", _macs(count_macs(dims))]
    if masks is not None and not any(isinstance(m, jax.core.Tracer) for m in masks):
        left = kept_dims(normalize(to_numpy(masks)), dims)
        parts.append(f"masks leave {count_params(left) / 1e6:.3g} M parameters, {_macs(count_macs(left))}")
    return ", ".join(parts)


def describe(dims: ViTDims, masks: Units | None = None) -> str:
    """A table of lines: the widths of each block, its parameters and MACs; of a masked model what the masks leave."""
    whole, masked = dims, masks is not None
    if masks is not None:
        dims = kept_dims(normalize(to_numpy(masks)), dims)
    head = ("block", "heads", "query/key pairs" if dims.rotary else "query/key", "value", "mlp", "parameters", "MACs")
    rows = [head]
    for i, (h, q, v, m) in enumerate(zip(dims.heads, dims.qk, dims.v, dims.mlp, strict=True)):
        macs = attention_macs(dims, i) + mlp_macs(dims, i)
        rows.append((str(i), str(h), str(q), str(v), str(m), f"{block_params(dims, i):,}", _macs(macs)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    title = one_line(dims) + (f" (masked, of {count_params(whole):,} parameters)" if masked else "")
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])


def _macs(count: int) -> str:
    return f"{count / 1e9:.3g} GMACs" if count >= 1e9 else f"{count / 1e6:.3g} MMACs"
