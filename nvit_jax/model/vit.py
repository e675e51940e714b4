"""The Vision Transformer, original and pruned, masked and compact: one Linen module and one pure function.

Only this, layers and teachers import flax.linen. Everybody else calls `forward` and `init`.

Masks are an argument. A gate is differentiable at exactly one place, where it scales weights linearly: embed =
everything that writes the residual stream, head and v = rows of the output projection, qk = query weight and
bias, mlp = rows of fc2. In LayerNorm it is a constant: statistics run over the kept channels only.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nvit_jax.model import groups
from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.model.fitting import check_images, check_masks, check_params
from nvit_jax.model.groups import Params
from nvit_jax.model.layers import (
    ACTIVATIONS,
    STD,
    AttentionPool,
    Constant,
    Dense,
    Dtype,
    HeadNorm,
    InnerNorm,
    LayerNorm,
    RMSNorm,
    attend,
    drop_path,
    dropout,
    gate,
    kernel_init,
    layer_keys,
    multiply,
    turn,
    wide,
)
from nvit_jax.model.positions import relative_index, rotary_angles

PARTS = ("attention", "mlp")  # of a block
PIECES = ("stem", "blocks", "classifier")  # of a model
CLASSIFIERS = ("pre_logits", "head", "head_dist", "head_mean")  # parameters that read the features
TAPS = "taps"  # the collection of what flows inside of a part, see `part`


def make_norm(dims: ViTDims, dtype: Dtype, *, name: str) -> LayerNorm | RMSNorm:
    """Of the kind that the dims say."""
    if dims.norm == "rms":
        return RMSNorm(count=dims.norm_count, eps=dims.norm_eps, dtype=dtype, name=name)
    return LayerNorm(eps=dims.norm_eps, dtype=dtype, name=name)


class Block(nn.Module):
    """Attention and mlp, pre-norm. Kernels: q, k [D, H, Q], v [D, H, V], proj [H, V, D], fc1 [D, M], fc2 [M, D].

    With rotary positions q and k are [D, H, Q, 2]. A gated mlp has fc1_gate [D, M] as well, whose activation is
    multiplied to fc1's output. In front of proj and fc2 there may be norms, proj_norm [H, V] and fc2_norm [M], and
    relative positions are biases `relative` [H, distances] of the logits.

    Of an attention without heads proj/bias is left, of an mlp without neurons fc2/bias: a constant in the stream.
    """

    dims: ViTDims
    index: int  # whose widths to use; all blocks are alike under a scan
    dtype: Dtype = None
    drop_path: float = 0.0
    dropout: float = 0.0
    parts: tuple[str, ...] = PARTS

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: jax.Array | int, gates: Units | None, embed: jax.Array | None, keys: Any
    ) -> tuple[jax.Array, None]:
        d, i = self.dims, self.index
        gates = gates if gates is not None else Units(None, None, None, None, None)
        dense = functools.partial(Dense, dtype=self.dtype)
        norm = functools.partial(make_norm, d, self.dtype)
        branch_keys = [None] * 4 if keys is None else [layer_keys(keys, 4 * layer + 1 + j) for j in range(4)]
        rate = self.drop_path * layer / max(d.depth - 1, 1)

        def write(branch: jax.Array, name: str, path_keys: Any) -> jax.Array:
            if d.layer_scale:
                scale = self.param(name, nn.initializers.constant(1e-4), (d.embed,))
                branch = (branch.astype(wide(branch.dtype)) * scale).astype(branch.dtype)
            return gate(drop_path(branch, path_keys if self.drop_path else None, rate), embed)

        def constant(name: str, *features: int) -> jax.Array:
            self.sow(TAPS, "features", jnp.zeros((*x.shape[:2], *features), x.dtype))
            return Constant(self.dtype, name=name)(x)

        if "attention" in self.parts and not d.heads[i]:
            y = constant("proj", 0, 0)
            x = x + write(dropout(y, branch_keys[0], self.dropout), "scale1", branch_keys[1])
        elif "attention" in self.parts:
            y = norm(name="norm1")(x, embed)
            self.sow(TAPS, "inputs", y)
            pair = (2,) if d.rotary else ()
            q = dense((d.heads[i], d.qk[i], *pair), use_bias=d.qkv_bias, name="q")(y)
            k = dense((d.heads[i], d.qk[i], *pair), use_bias=d.qkv_bias, name="k")(y)
            v = dense((d.heads[i], d.v[i]), use_bias=d.qkv_bias, name="v")(y)
            q, k, qk_gate = self._inside(q, k, gates.qk)
            self.sow(TAPS, "queries", q)
            self.sow(TAPS, "keys", k)
            z = attend(gate(q, qk_gate) * d.qk_scale, k, v, self._relative())
            heads = None if gates.head is None else gates.head[..., None]
            if d.proj_norm_count:
                z = self._normed("proj_norm", d.proj_norm_count, z, gates.v, heads)
            z = gate(gate(z, gates.v), heads)
            self.sow(TAPS, "features", z)
            y = dense((d.embed,), axes=2, name="proj")(z)
            x = x + write(dropout(y, branch_keys[0], self.dropout), "scale1", branch_keys[1])

        if "mlp" in self.parts and not d.mlp[i]:
            y = constant("fc2", 0)
            x = x + write(dropout(y, branch_keys[2], self.dropout), "scale2", branch_keys[3])
        elif "mlp" in self.parts:
            y = norm(name="norm2")(x, embed)
            self.sow(TAPS, "inputs", y)
            hidden = dense((d.mlp[i],), name="fc1")(y)
            activation = ACTIVATIONS[d.activation]
            y = activation(dense((d.mlp[i],), name="fc1_gate")(y)) * hidden if d.gated else activation(hidden)
            if d.fc2_norm_count:
                y = self._normed("fc2_norm", d.fc2_norm_count, y, gates.mlp)
            y = gate(y, gates.mlp)
            self.sow(TAPS, "features", y)
            y = dense((d.embed,), name="fc2")(y)
            x = x + write(dropout(y, branch_keys[2], self.dropout), "scale2", branch_keys[3])
        return x, None

    def _relative(self) -> jax.Array | None:
        """[H, N, N] biases of the logits."""
        d = self.dims
        if not d.relative:
            return None
        table = self.param("relative", kernel_init, (d.heads[self.index], d.distances))
        return jnp.take(table, relative_index(d), axis=1)

    def _normed(self, name: str, count: int, x: jax.Array, *gates: jax.Array | None) -> jax.Array:
        """Behind the norm in front of a part's last layer, which sees no unit that is gone."""
        for units in gates:
            x = gate(x, None if units is None else jax.lax.stop_gradient(units))
        return InnerNorm(count, self.dims.norm_eps, self.dtype, name=name)(x)

    def _inside(
        self, q: jax.Array, k: jax.Array, units: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Queries and keys [B, N, H, dims] behind their norm and turned by their places, and the gates of the dims."""
        d = self.dims
        if d.qk_norm_count:
            kept = None if units is None else jax.lax.stop_gradient(units[..., None] if d.rotary else units)
            norm = functools.partial(HeadNorm, d.qk_norm_count, d.norm_eps, self.dtype)
            q, k = norm(name="q_norm")(gate(q, kept)), norm(name="k_norm")(gate(k, kept))
        if not d.rotary:
            return q, k, units
        numbers = self.param("rotary", lambda key, shape: _spread(d.rotary, shape), q.shape[2:4])
        which = jnp.round(jax.lax.stop_gradient(numbers)).astype(jnp.int32)
        angles, kind = rotary_angles(d), wide(q.dtype)
        cosines, sines = (
            jnp.take(jnp.asarray(table, kind), which, axis=1, mode="clip") for table in (np.cos(angles), np.sin(angles))
        )
        q, k = (turn(x, cosines, sines).reshape(*x.shape[:3], -1) for x in (q, k))
        return q, k, None if units is None else jnp.repeat(units, 2, axis=-1)


def _spread(pairs: int, shape: tuple[int, ...]) -> jax.Array:
    """[H, Q] numbers of the pairs that a new model has, which of fewer than all are spread over them."""
    return jnp.broadcast_to(jnp.arange(shape[-1]) * pairs // shape[-1], shape).astype(jnp.float32)


class ViT(nn.Module):
    """images [B, height, width, channels] -> logits [B, T, C], T the classifiers (class token, distillation token).

    Without classes features [B, T, dims.features] come out, pooled or projected. With some of the PIECES it begins or
    ends at the residual stream [B, N, D].
    """

    dims: ViTDims
    scan: bool
    remat: bool = False
    dtype: Dtype = None
    drop_path: float = 0.0
    dropout: float = 0.0
    pieces: tuple[str, ...] = PIECES

    def _stream(self, images: jax.Array) -> jax.Array:
        """Patch embedding, tokens and positions: [B, N, D]."""
        d = self.dims
        height, width = d.patch_sides
        shape = (height, width, d.channels, d.embed)
        kernel = self.param("patch_embed", lambda key: _patch_embed(key, shape, d.patch_bias))
        patches = einops.rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=height, q=width)
        # The stream begins in float32, so that the gradients of tokens and positions are summed in it.
        x = multiply(patches, kernel["kernel"].reshape(-1, d.embed), self.dtype) + kernel.get("bias", 0)
        tokens = []
        if d.cls_token:
            tokens.append(self.param("cls_token", kernel_init, (d.embed,))[None])
        if d.dist_token:
            tokens.append(self.param("dist_token", kernel_init, (d.embed,))[None])
        if d.registers:
            tokens.append(self.param("registers", kernel_init, (d.registers, d.embed)))
        if d.positions != "none":
            count = d.tokens if d.positions == "all" else d.patches
            positions = self.param("positions", kernel_init, (count, d.embed))
            x = x + positions[count - d.patches :]
            if d.positions == "all" and tokens:
                tokens = [jnp.concatenate(tokens) + positions[: d.prefix]]
        if tokens:
            prefix = jnp.concatenate(tokens)
            x = jnp.concatenate([jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape)), x], axis=1)
        return x.astype(self.dtype or x.dtype)

    @nn.compact
    def __call__(self, images: jax.Array, masks: Units | None = None, keys: jax.Array | None = None) -> jax.Array:
        d, embed = self.dims, None if masks is None else masks.embed
        x = images
        if "stem" in self.pieces:
            x = self._stream(images)
            if d.pre_norm:  # it writes the stream: the one place for derivatives of the gate
                x = gate(x, None if embed is None else jax.lax.stop_gradient(embed))
                x = make_norm(d, self.dtype, name="pre_norm")(x, embed)
            x = gate(x, embed)
            x = dropout(x, None if keys is None else layer_keys(keys, 0), self.dropout)
        if "blocks" in self.pieces:
            x = self._blocks(x, masks, embed, keys)
        return self._classify(x, embed) if "classifier" in self.pieces else x

    def _blocks(self, x: jax.Array, masks: Units | None, embed: jax.Array | None, keys: Any) -> jax.Array:
        d = self.dims
        kept = functools.partial(nn.remat, prevent_cse=not self.scan) if self.remat else lambda block: block
        block = functools.partial(kept(Block), d, dtype=self.dtype, drop_path=self.drop_path, dropout=self.dropout)
        gates = None if masks is None else masks._replace(embed=None)
        if self.scan:
            blocks = nn.scan(
                kept(Block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast, nn.broadcast),
                length=d.depth,
            )(d, 0, dtype=self.dtype, drop_path=self.drop_path, dropout=self.dropout, name="blocks")
            x, _ = blocks(x, jnp.arange(d.depth), gates, embed, keys)
        else:
            for i in range(d.depth):
                x, _ = block(i, name=f"block_{i}")(x, i, jax.tree.map(lambda g, i=i: g[i], gates), embed, keys)
        return x

    def _classify(self, x: jax.Array, embed: jax.Array | None) -> jax.Array:
        d = self.dims
        norm = make_norm(d, self.dtype, name="norm")
        if not d.norm_after_pool:
            x = norm(x, embed)
        if d.pool != "class":
            pooled = x[:, d.prefix if d.mean_over == "patches" else 0 :]
            self.sow(TAPS, "pooled", pooled)
            pooled = self._pool(pooled)
        x = x[:, : d.classifiers] if d.pool in ("class", "class_mean") else pooled
        if d.norm_after_pool:
            x = norm(x, embed)
        if d.projection:
            x = Dense((d.projection,), use_bias=False, name="projection")(x.astype(wide(x.dtype)))
        if not d.classes:
            return x
        x = x.astype(wide(x.dtype))  # the classifiers are small, and their logits decide
        if d.pre_logits:
            x = jnp.tanh(Dense((d.pre_logits,), name="pre_logits")(x))
        names = ("head", "head_dist")[: d.classifiers]
        logits = jnp.stack([Dense((d.classes,), name=n)(x[:, i]) for i, n in enumerate(names)], axis=1)
        if d.pool == "class_mean":
            logits += Dense((d.classes,), use_bias=False, name="head_mean")(pooled.astype(x.dtype))
        return logits

    def _pool(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, 1, D or pool_width]."""
        d = self.dims
        if d.pool == "map":
            return AttentionPool(
                d.pool_width, d.pool_heads, d.pool_mlp, d.activation, d.norm_eps, self.dtype, name="pool"
            )(x)
        mean, largest = x.mean(1, keepdims=True), x.max(1, keepdims=True)
        return {"max": largest, "avgmax": (mean + largest) / 2}.get(d.pool, mean)


def _patch_embed(key: jax.Array, shape: tuple[int, ...], bias: bool) -> Params:
    fan_in = shape[0] * shape[1] * shape[2]
    kernel = nn.initializers.lecun_normal()(key, (fan_in, shape[3])).reshape(shape)
    return {"kernel": kernel, "bias": jnp.zeros(shape[3:])} if bias else {"kernel": kernel}


def stack_blocks(params: Params) -> Params:
    """{"block_0": ..., "block_1": ...} -> {"blocks": leaves with a leading axis [L]}, narrow blocks padded with 0.

    So are the blocks that lack a part: its norm and its matrices are 0, and nothing but its bias comes out.
    """
    depth = sum(name.startswith("block_") for name in params)
    blocks = [dict(groups.flatten(params[f"block_{i}"])) for i in range(depth)]

    def stack(path: str) -> jax.Array:
        there = [block[path] for block in blocks if path in block]
        shape = [max(sizes) for sizes in zip(*(leaf.shape for leaf in there), strict=True)]
        nothing = jnp.zeros((0,) * len(shape), there[0].dtype)
        leaves = [block.get(path, nothing) for block in blocks]
        return jnp.stack([jnp.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)]) for x in leaves])

    rest = {name: value for name, value in params.items() if not name.startswith("block_")}
    paths = dict.fromkeys(path for block in blocks for path in block)
    return rest | {"blocks": groups.unflatten({path: stack(path) for path in paths})}


def forward(
    dims: ViTDims,
    params: Params,
    images: Any,
    masks: Units | None = None,
    *,
    keys: jax.Array | None = None,
    dtype: Dtype = None,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    remat: bool = False,
    unroll: bool = False,
) -> jax.Array:
    """Logits [B, T, C] of images [B, height, width, channels]; T classifiers, to be averaged at evaluation.

    Args:
      params: the per-block layout of `init`; compact (possibly ragged) widths as in `dims`.
      masks: gates over the padded widths, or None. With a leading batch axis ([B, D], [L, B, H], ...) they are
        per sample.
      keys: one random key per example [B] for dropout and stochastic depth; None means evaluation.
      dtype: compute type (parameters keep theirs); None computes in the parameters' type.
      drop_path: stochastic depth rate of the last block, rising linearly from 0 at the first.
      remat: recompute the blocks in the backward pass.
      unroll: never run the blocks under a scan (see `_scans`).

    Raises UserError for images, parameters and masks of other shapes.
    """
    check_images(images, dims)
    check_params(params, dims, padded=True)
    if masks is not None:
        check_masks(masks, dims, len(images))
    scan = not unroll and _scans(dims, masks is not None, remat)
    module = ViT(
        dims.padded() if scan else dims, scan=scan, remat=remat, dtype=dtype, drop_path=drop_path, dropout=dropout
    )
    return module.apply({"params": stack_blocks(params) if scan else params}, images, masks, keys)  # type: ignore[return-value]


def _scans(dims: ViTDims, masked: bool, remat: bool) -> bool:
    """Whether the blocks run under one scan: one is compiled for all.

    Blocks of different widths are padded then, as masks are. A CPU compiles blocks one by one as fast, and runs their
    gradient faster: under a scan, all that the backward pass needs is copied to arrays of all blocks. There only
    `remat` asks for a scan, of any widths: in unrolled blocks, XLA for CPUs finds that what is computed again is what
    was computed before, and keeps it.
    """
    if masked and not dims.is_uniform:
        return True
    return remat if jax.default_backend() == "cpu" else dims.is_uniform


def kept_bytes(dims: ViTDims) -> int:
    """Of one image, about: what a backward pass in float32 keeps of the blocks without `remat`."""
    d = dims.padded()
    heads, qk, v, mlp = d.heads[0], d.qk[0], d.v[0], d.mlp[0] * (2 if d.gated else 1)
    token = 6 * d.embed + heads * (2 * qk + 2 * v + d.tokens) + 3 * mlp
    return 4 * d.depth * d.tokens * token


def without_classifier(dims: ViTDims, params: Params) -> tuple[ViTDims, Params]:
    """The same model up to what its classifiers read: its features [B, T, D] come out of it.

    Of a classifier that reads class token and mean, the class token.
    """
    pool = "class" if dims.pool == "class_mean" else dims.pool
    rest = {name: value for name, value in params.items() if name not in CLASSIFIERS}
    return dataclasses.replace(dims, classes=0, pre_logits=0, pool=pool), rest


def features(dims: ViTDims, params: Params, images: Any, masks: Units | None = None, **options: Any) -> jax.Array:
    """[B, T, D], pooled and behind the last norm: what the classifiers read, or would. Arguments as `forward`."""
    return forward(*without_classifier(dims, params), images, masks, **options)


def init(dims: ViTDims, key: jax.Array, *, std: float = 0.02, position_std: float = 0.02) -> Params:
    """Random float32 parameters in the per-block layout.

    Kernels and tokens are truncated normal with `std` (DeiT: 0.02, right for wide models; a narrow one learns
    faster with more), positions with `position_std`; patches come out of their embedding with the images' own scale.
    """
    images = jnp.zeros((1, *dims.sides, dims.channels))
    module = ViT(dims, scan=dims.is_uniform)
    params = jax.jit(lambda key: module.init(key, images)["params"])(key)
    if dims.is_uniform:
        stacked = params.pop("blocks")
        params |= {f"block_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(dims.depth)}
    leaves = dict(groups.flatten(params))
    for path in leaves:
        if path == "positions":
            leaves[path] *= position_std / STD
        elif path.endswith("kernel") and path != "patch_embed/kernel":
            leaves[path] *= std / STD
    return groups.unflatten(leaves)


def stem(dims: ViTDims, params: Params, images: Any, embed: jax.Array | None = None) -> jax.Array:
    """Images -> the residual stream [B, N, D] in front of the first block. `embed` [D]: its gates."""
    check_images(images, dims)
    return _some(dims, ("stem",), params, images, embed)


def classify(dims: ViTDims, params: Params, x: jax.Array, embed: jax.Array | None = None) -> jax.Array:
    """The residual stream [B, N, D] behind the last block -> logits [B, T, C]."""
    return _some(dims, ("classifier",), params, x, embed)


def readout(dims: ViTDims, params: Params, x: jax.Array, embed: jax.Array | None = None) -> jax.Array:
    """The residual stream -> what the first layer behind the blocks reads of it: [B, T, D], under attention pooling all
    tokens that are pooled."""
    if dims.pool != "map":
        pools = ("class", "mean") if dims.pool == "class_mean" else (dims.pool,)
        bare = [dataclasses.replace(dims, classes=0, pre_logits=0, projection=0, pool=pool) for pool in pools]
        return jnp.concatenate([classify(one, params, x, embed) for one in bare], 1)
    gates = Units(embed, None, None, None, None)
    _, found = ViT(dims, scan=False, pieces=("classifier",)).apply({"params": params}, x, gates, mutable=[TAPS])
    pooled: jax.Array = found[TAPS]["pooled"][0]
    return pooled


def _some(dims: ViTDims, pieces: tuple[str, ...], params: Params, x: Any, embed: jax.Array | None) -> jax.Array:
    gates = Units(embed, None, None, None, None)
    return ViT(dims, scan=False, pieces=pieces).apply({"params": params}, x, gates)  # type: ignore[return-value]


def part(
    dims: ViTDims, name: str, block: Params, x: jax.Array, embed: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One of the PARTS of one block on the stream [B, N, D]: the stream behind it, and what flows inside.

    `block` has the padded widths of `dims`, `embed` [D] are gates of the stream. Inside: "inputs" [B, N, D] behind the
    norm; "features", what the part's last matrix reads, [B, N, H, V] or [B, N, M]; of attention also "queries" and
    "keys" [B, N, H, Q].
    """
    module = Block(dims.padded(), 0, parts=(name,))
    (x, _), found = module.apply({"params": block}, x, 0, None, embed, None, mutable=[TAPS])
    return x, {tap: values[0] for tap, values in found[TAPS].items()}


def piece(dims: ViTDims, name: str, dtype: Dtype) -> tuple[Callable[[Params, jax.Array], jax.Array], Params, Any]:
    """What can be timed of a deployed model: a function of params and input, their shapes (the input's for batch 1).

    "attention" and "mlp" are those parts of the blocks, one after the other, norm and residual included, on the stream
    [B, N, D]; "rest" is the model without its blocks and "model" all of it, unrolled, from images to the mean of the
    classifiers.
    """
    if name in PARTS:
        blocks = [Block(dims, i, dtype=dtype, parts=(name,)) for i in range(dims.depth)]
        stream = jax.ShapeDtypeStruct((1, dims.tokens, dims.embed), dtype)
        rest = (0, None, None, None)
        names = [f"block_{i}" for i in range(dims.depth)]
        params = {
            n: jax.eval_shape(lambda x, b=b: b.init(jax.random.key(0), x, *rest)["params"], stream)
            for n, b in zip(names, blocks, strict=True)
        }

        def run(params: Params, x: jax.Array) -> jax.Array:
            for n, b in zip(names, blocks, strict=True):
                x, _ = b.apply({"params": params[n]}, x, *rest)
            return x

        return run, params, stream
    module = ViT(dims, scan=False, dtype=dtype, pieces=("stem", "classifier") if name == "rest" else PIECES)
    images = jax.ShapeDtypeStruct((1, *dims.sides, dims.channels), jnp.float32)
    params = jax.eval_shape(lambda x: module.init(jax.random.key(0), x)["params"], images)
    return lambda p, x: module.apply({"params": p}, x).mean(1), params, images  # type: ignore[union-attr]


def shapes(dims: ViTDims) -> Params:
    """Shapes and types of the parameters (jax.ShapeDtypeStruct), in the per-block layout."""
    return piece(dims, "model", None)[1]


def block_shapes(dims: ViTDims, index: int = 0) -> Params:
    """Shapes and types of one block's parameters."""
    stream = jax.ShapeDtypeStruct((1, dims.tokens, dims.embed), jnp.float32)
    block = Block(dims, index)
    return jax.eval_shape(lambda x: block.init(jax.random.key(0), x, 0, None, None, None)["params"], stream)
