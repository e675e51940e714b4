"""Between our parameters and PyTorch's: timm's names and shapes, which every other layout is first brought to.

One table, read in both directions: `from_torch` (convert) and `to_torch` (export) are inverses, bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
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
    into: Callable[[np.ndarray], Arrays]  # PyTorch -> ours; of what JAX traces, too: no functions of NumPy
    out: Callable[..., np.ndarray]  # ours -> PyTorch


def _same(name: str, ours: str, *shape: int, lead: int = 0) -> Entry:
    """As it is, but for `lead` leading axes of 1 that PyTorch's tensor has (tokens, positions)."""
    return Entry(name, shape, (ours,), lambda x: (x.reshape(x.shape[lead:]),), lambda x: x.reshape(shape))


def _cut(x: np.ndarray, *places: int) -> Arrays:
    """Rows, cut at these places."""
    return tuple(x[a:b] for a, b in zip((0, *places), (*places, len(x)), strict=True))


def _linear(name: str, ours: str, rows: int, columns: int) -> Entry:
    return Entry(name, (rows, columns), (ours,), lambda x: (x.T,), lambda x: x.T)


def _norm(dims: ViTDims, name: str, ours: str) -> Iterator[Entry]:
    """Of a LayerNorm; RMSNorm has no tensors."""
    if dims.norm == "layer":
        yield _same(f"{name}.weight", f"{ours}/scale", dims.embed)
        yield _same(f"{name}.bias", f"{ours}/bias", dims.embed)


def _attention(dims: ViTDims, i: int) -> Iterator[Entry]:
    """The fused projection: H * Q rows of queries, H * Q of keys, H * V of values, head by head.

    Of rotary pairs a head has all first dims, then all second ones, as in Hugging Face's DINOv3.
    """
    d, h, pairs, v = dims.embed, dims.heads[i], dims.qk[i], dims.v[i]
    q = dims.paired * pairs
    widths = (q, q, v)
    cuts = (h * q, 2 * h * q)
    rows = h * sum(widths)

    def paired(x: np.ndarray) -> np.ndarray:
        """[..., H, 2 Q] of PyTorch -> ours."""
        return x.reshape(*x.shape[:-1], 2, pairs).swapaxes(-1, -2) if dims.rotary else x

    def flat(x: np.ndarray, axes: int = 0) -> np.ndarray:
        """Ours, but for so many axes in front -> one axis of PyTorch."""
        turned = x.swapaxes(-1, -2) if x.ndim == axes + 3 else x
        return turned.reshape(*x.shape[:axes], -1)

    def split_weight(x: np.ndarray) -> Arrays:
        *qk, values = (p.T.reshape(d, h, w) for p, w in zip(_cut(x, *cuts), widths, strict=True))
        return (*map(paired, qk), values)

    def split_bias(x: np.ndarray) -> Arrays:
        *qk, values = (p.reshape(h, w) for p, w in zip(_cut(x, *cuts), widths, strict=True))
        return (*map(paired, qk), values)

    def ours(leaf: str) -> tuple[str, ...]:
        return tuple(f"block_{i}/{name}/{leaf}" for name in "qkv")

    name = f"blocks.{i}.attn"
    if not h:
        yield _same(f"{name}.proj.bias", f"block_{i}/proj/bias", d)
        return
    fuse = lambda *parts: np.concatenate([flat(p, 1).T for p in parts])  # noqa: E731
    yield Entry(f"{name}.qkv.weight", (rows, d), ours("kernel"), split_weight, fuse)
    if dims.qkv_bias:
        fuse_bias = lambda *parts: np.concatenate([flat(p) for p in parts])  # noqa: E731
        yield Entry(f"{name}.qkv.bias", (rows,), ours("bias"), split_bias, fuse_bias)
    for norm in ("q_norm", "k_norm") if dims.qk_norm_count else ():
        for leaf, own in (("weight", "scale"), ("bias", "bias")):  # of each head its own
            into = lambda x: (paired(x.reshape(h, q)),)  # noqa: E731
            yield Entry(f"{name}.{norm}.{leaf}", (h * q,), (f"block_{i}/{norm}/{own}",), into, flat)
    if dims.rotary:
        yield Entry(f"{name}.rotary", (h * pairs,), (f"block_{i}/rotary",), lambda x: (x.reshape(h, pairs),), np.ravel)
    if dims.relative:
        bias = (f"block_{i}/relative",)
        yield Entry(f"{name}.relative_position_bias_table", (dims.distances, h), bias, lambda x: (x.T,), lambda x: x.T)
    if dims.proj_norm_count:
        for leaf, own in (("weight", "scale"), ("bias", "bias")):
            into = lambda x: (x.reshape(h, v),)  # noqa: E731
            yield Entry(f"{name}.norm.{leaf}", (h * v,), (f"block_{i}/proj_norm/{own}",), into, np.ravel)
    yield Entry(
        f"{name}.proj.weight",
        (d, h * v),
        (f"block_{i}/proj/kernel",),
        lambda x: (x.T.reshape(h, v, d),),
        lambda x: x.reshape(h * v, d).T,
    )
    yield _same(f"{name}.proj.bias", f"block_{i}/proj/bias", d)


def _pool(dims: ViTDims) -> Iterator[Entry]:
    """Attention pooling under the names of timm's AttentionPoolLatent: keys and values are fused."""
    d, w, h, m = dims.embed, dims.pool_width, dims.pool_heads, dims.pool_mlp
    size = w // h
    yield _same("attn_pool.latent", "pool/probe", 1, 1, w, lead=2)
    yield Entry(
        "attn_pool.q.weight",
        (w, w),
        ("pool/q/kernel",),
        lambda x: (x.T.reshape(w, h, size),),
        lambda x: x.reshape(w, w).T,
    )
    yield Entry("attn_pool.q.bias", (w,), ("pool/q/bias",), lambda x: (x.reshape(h, size),), lambda x: x.reshape(w))
    yield Entry(
        "attn_pool.kv.weight",
        (2 * w, d),
        ("pool/k/kernel", "pool/v/kernel"),
        lambda x: tuple(p.T.reshape(d, h, size) for p in np.split(x, 2)),
        lambda k, v: np.concatenate([p.reshape(d, w).T for p in (k, v)]),
    )
    yield Entry(
        "attn_pool.kv.bias",
        (2 * w,),
        ("pool/k/bias", "pool/v/bias"),
        lambda x: tuple(p.reshape(h, size) for p in np.split(x, 2)),
        lambda k, v: np.concatenate([k.reshape(w), v.reshape(w)]),
    )
    yield Entry(
        "attn_pool.proj.weight",
        (w, w),
        ("pool/proj/kernel",),
        lambda x: (x.T.reshape(h, size, w),),
        lambda x: x.reshape(w, w).T,
    )
    yield _same("attn_pool.proj.bias", "pool/proj/bias", w)
    yield _same("attn_pool.norm.weight", "pool/norm/scale", w)
    yield _same("attn_pool.norm.bias", "pool/norm/bias", w)
    for name, rows, columns in (("fc1", m, w), ("fc2", w, m)):
        yield _linear(f"attn_pool.mlp.{name}.weight", f"pool/{name}/kernel", rows, columns)
        yield _same(f"attn_pool.mlp.{name}.bias", f"pool/{name}/bias", rows)


def _first_layer(dims: ViTDims, i: int) -> Iterator[Entry]:
    """Of an mlp. A gated one has the gate's rows in front of the others, as timm's SwiGLUPacked."""
    name, ours, m, d = f"blocks.{i}.mlp.fc1", f"block_{i}/fc1", dims.mlp[i], dims.embed
    if not dims.gated:
        yield _linear(f"{name}.weight", f"{ours}/kernel", m, d)
        yield _same(f"{name}.bias", f"{ours}/bias", m)
        return
    kernels, biases = ((f"{ours}_gate/{leaf}", f"{ours}/{leaf}") for leaf in ("kernel", "bias"))
    yield Entry(
        f"{name}.weight",
        (2 * m, d),
        kernels,
        lambda x: tuple(half.T for half in _cut(x, m)),
        lambda *halves: np.concatenate([half.T for half in halves]),
    )
    yield Entry(f"{name}.bias", (2 * m,), biases, lambda x: _cut(x, m), lambda *x: np.concatenate(x))


def entries(dims: ViTDims) -> Iterator[Entry]:
    """Every tensor of a model of these dims, in the order of its computation."""
    d, c = dims.embed, dims.channels
    yield Entry(
        "patch_embed.proj.weight",
        (d, c, *dims.patch_sides),
        ("patch_embed/kernel",),
        lambda x: (x.transpose(2, 3, 1, 0),),
        lambda x: x.transpose(3, 2, 0, 1),
    )
    if dims.patch_bias:
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
    if dims.pre_norm:
        yield from _norm(dims, "norm_pre", "pre_norm")
    for i, m in enumerate(dims.mlp):
        if dims.heads[i]:
            yield from _norm(dims, f"blocks.{i}.norm1", f"block_{i}/norm1")
        yield from _attention(dims, i)
        if m:
            yield from _norm(dims, f"blocks.{i}.norm2", f"block_{i}/norm2")
            yield from _first_layer(dims, i)
            if dims.fc2_norm_count:
                yield _same(f"blocks.{i}.mlp.norm.weight", f"block_{i}/fc2_norm/scale", m)
                yield _same(f"blocks.{i}.mlp.norm.bias", f"block_{i}/fc2_norm/bias", m)
            yield _linear(f"blocks.{i}.mlp.fc2.weight", f"block_{i}/fc2/kernel", d, m)
        yield _same(f"blocks.{i}.mlp.fc2.bias", f"block_{i}/fc2/bias", d)
        if dims.layer_scale:
            yield _same(f"blocks.{i}.ls1.gamma", f"block_{i}/scale1", d)
            yield _same(f"blocks.{i}.ls2.gamma", f"block_{i}/scale2", d)
    yield from _norm(dims, "fc_norm" if dims.norm_after_pool else "norm", "norm")
    if dims.pool == "map":
        yield from _pool(dims)
    if dims.projection:
        yield _linear("projection.weight", "projection/kernel", dims.projection, dims.pool_width or d)
    if dims.pre_logits:
        yield _linear("pre_logits.fc.weight", "pre_logits/kernel", dims.pre_logits, d)
        yield _same("pre_logits.fc.bias", "pre_logits/bias", dims.pre_logits)
    for name in ("head", "head_dist")[: dims.classifiers if dims.classes else 0]:
        yield _linear(f"{name}.weight", f"{name}/kernel", dims.classes, dims.features)
        yield _same(f"{name}.bias", f"{name}/bias", dims.classes)
    if dims.pool == "class_mean":
        yield _linear("head_mean.weight", "head_mean/kernel", dims.classes, d)


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
    return jax.tree.map(lambda part: np.array(part, dtype, order="C"), assemble(dims, read))


def assemble(dims: ViTDims, read: Callable[[str], Any]) -> Params:
    """Parameters from tensors with timm's names and shapes, of NumPy or, inside of a program, of JAX."""
    leaves: dict[str, Any] = {}
    for entry in entries(dims):
        leaves |= dict(zip(entry.ours, entry.into(read(entry.torch)), strict=True))
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
