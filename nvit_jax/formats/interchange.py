"""Between our parameters and PyTorch's: timm's names and shapes, which every other layout is first brought to.

One table, read in both directions: `from_torch` (convert) and `to_torch` (export) are inverses, bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.groups import Params, flatten, unflatten

Arrays = tuple[np.ndarray, ...]


class Entry(NamedTuple):
    """One PyTorch tensor and the one or more parameters of ours that it holds."""

    torch: str
    shape: tuple[int, ...]  # of the PyTorch tensor
    ours: tuple[str, ...]
    into: Callable[[np.ndarray], Arrays]  # PyTorch -> ours
    out: Callable[..., np.ndarray]  # ours -> PyTorch


def _same(name: str, ours: str, *shape: int, lead: int = 0) -> Entry:
    """As it is, but for `lead` leading axes of 1 that PyTorch's tensor has (tokens, positions)."""
    return Entry(name, shape, (ours,), lambda x: (x.reshape(x.shape[lead:]),), lambda x: x.reshape(shape))


def _linear(name: str, ours: str, rows: int, columns: int) -> Entry:
    return Entry(name, (rows, columns), (ours,), lambda x: (x.T,), lambda x: x.T)


def _norm(name: str, ours: str, width: int) -> Iterator[Entry]:
    yield _same(f"{name}.weight", f"{ours}/scale", width)
    yield _same(f"{name}.bias", f"{ours}/bias", width)


def _attention(dims: ViTDims, i: int) -> Iterator[Entry]:
    """The fused projection: H * Q rows of queries, H * Q of keys, H * V of values, head by head."""
    d, h, q, v = dims.embed, dims.heads[i], dims.qk[i], dims.v[i]
    widths = (q, q, v)
    cuts = np.cumsum([h * w for w in widths])[:-1]
    rows = h * sum(widths)

    def split_weight(x: np.ndarray) -> Arrays:
        return tuple(p.T.reshape(d, h, w) for p, w in zip(np.split(x, cuts), widths, strict=True))

    def split_bias(x: np.ndarray) -> Arrays:
        return tuple(p.reshape(h, w) for p, w in zip(np.split(x, cuts), widths, strict=True))

    def ours(leaf: str) -> tuple[str, ...]:
        return tuple(f"block_{i}/{name}/{leaf}" for name in "qkv")

    name = f"blocks.{i}.attn"
    fuse = lambda *parts: np.concatenate([p.reshape(d, -1).T for p in parts])  # noqa: E731
    yield Entry(f"{name}.qkv.weight", (rows, d), ours("kernel"), split_weight, fuse)
    if dims.qkv_bias:
        fuse_bias = lambda *parts: np.concatenate([p.reshape(-1) for p in parts])  # noqa: E731
        yield Entry(f"{name}.qkv.bias", (rows,), ours("bias"), split_bias, fuse_bias)
    yield Entry(
        f"{name}.proj.weight",
        (d, h * v),
        (f"block_{i}/proj/kernel",),
        lambda x: (x.T.reshape(h, v, d),),
        lambda x: x.reshape(h * v, d).T,
    )
    yield _same(f"{name}.proj.bias", f"block_{i}/proj/bias", d)


def entries(dims: ViTDims) -> Iterator[Entry]:
    """Every tensor of a model of these dims, in the order of its computation."""
    d, p, c = dims.embed, dims.patch, dims.channels
    yield Entry(
        "patch_embed.proj.weight",
        (d, c, p, p),
        ("patch_embed/kernel",),
        lambda x: (x.transpose(2, 3, 1, 0),),
        lambda x: x.transpose(3, 2, 0, 1),
    )
    yield _same("patch_embed.proj.bias", "patch_embed/bias", d)
    if dims.cls_token:
        yield _same("cls_token", "cls_token", 1, 1, d, lead=2)
    if dims.dist_token:
        yield _same("dist_token", "dist_token", 1, 1, d, lead=2)
    if dims.registers:
        yield _same("reg_token", "registers", 1, dims.registers, d, lead=1)
    if dims.positions != "none":
        count = dims.tokens if dims.positions == "all" else dims.patches
        yield _same("pos_embed", "positions", 1, count, d, lead=1)
    for i, m in enumerate(dims.mlp):
        yield from _norm(f"blocks.{i}.norm1", f"block_{i}/norm1", d)
        yield from _attention(dims, i)
        yield from _norm(f"blocks.{i}.norm2", f"block_{i}/norm2", d)
        for name, rows, columns in (("fc1", m, d), ("fc2", d, m)):
            yield _linear(f"blocks.{i}.mlp.{name}.weight", f"block_{i}/{name}/kernel", rows, columns)
            yield _same(f"blocks.{i}.mlp.{name}.bias", f"block_{i}/{name}/bias", rows)
        if dims.layer_scale:
            yield _same(f"blocks.{i}.ls1.gamma", f"block_{i}/scale1", d)
            yield _same(f"blocks.{i}.ls2.gamma", f"block_{i}/scale2", d)
    yield from _norm("fc_norm" if dims.norm_after_pool else "norm", "norm", d)
    width = dims.pre_logits or d
    if dims.pre_logits:
        yield _linear("pre_logits.fc.weight", "pre_logits/kernel", width, d)
        yield _same("pre_logits.fc.bias", "pre_logits/bias", width)
    for name in ("head", "head_dist")[: dims.classifiers if dims.classes else 0]:
        yield _linear(f"{name}.weight", f"{name}/kernel", dims.classes, width)
        yield _same(f"{name}.bias", f"{name}/bias", dims.classes)


def from_torch(
    dims: ViTDims, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], where: str, dtype: Any
) -> Params:
    """Parameters of `dims` from tensors with timm's names; each is read once, and every one must be used.

    UserError that lists both sides when names are left over or missing, and for a shape that does not fit.
    """
    table = list(entries(dims))
    check_names(shapes, [e.torch for e in table], where)
    for entry in table:
        if shapes[entry.torch] != entry.shape:
            raise UserError(f"{where}: {entry.torch} has shape {shapes[entry.torch]}, the model asks for {entry.shape}")
    leaves: dict[str, np.ndarray] = {}
    for entry in table:
        parts = entry.into(read(entry.torch))
        leaves |= {path: np.array(part, dtype, order="C") for path, part in zip(entry.ours, parts, strict=True)}
    return unflatten(leaves)


def to_torch(dims: ViTDims, params: Params) -> dict[str, np.ndarray]:
    """Tensors with timm's names and shapes, contiguous, in the parameters' own type."""
    leaves = dict(flatten(params))
    return {e.torch: np.ascontiguousarray(e.out(*(np.asarray(leaves[path]) for path in e.ours))) for e in entries(dims)}


def check_names(found: Mapping[str, Any], wanted: list[str], where: str) -> None:
    """UserError with both sides unless the names are the same."""
    unused = sorted(found.keys() - set(wanted))
    missing = sorted(set(wanted) - found.keys())
    if unused or missing:
        raise UserError(f"{where}: left over in the file: {_some(unused)}; missing for the model: {_some(missing)}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
