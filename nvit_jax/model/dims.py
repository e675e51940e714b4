"""Widths of a Vision Transformer, the units that can be removed from it, and what it costs.

Letters, used everywhere: B batch, N tokens, D embed, H heads, Q query/key dim of a head, V value dim of a
head, M mlp hidden, L blocks, C classes. Compute is in MACs (multiply-accumulates) per image.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from nvit_jax.errors import UserError, nearest
from nvit_jax.model import sizes
from nvit_jax.model.sizes import Size
from nvit_jax.model.values import flag, real, whole

KINDS = ("embed", "head", "qk", "v", "mlp")
PART_KINDS = ("head", "mlp")  # kinds without any unit of which a block has no attention, or no mlp
CHOICES = {
    "positions": ("all", "patches", "none"),
    "pool": ("class", "mean", "class_mean", "max", "avgmax", "map"),
    "mean_over": ("patches", "all"),
    "activation": ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu"),
    "norm": ("layer", "rms"),
}
_MINIMUM = dict.fromkeys(("registers", "pre_logits", "classes", "norm_count", "qk_norm_count", "rotary"), 0)
_MINIMUM |= dict.fromkeys(("projection", "pool_width", "pool_heads", "pool_mlp"), 0)
_MINIMUM |= dict.fromkeys(("rotary_grid", "proj_norm_count", "fc2_norm_count"), 0)
# Far above every model that there is: what lies beyond is a mistake, and would take all memory to find out.
_MAXIMUM = {
    "image": 2**14,
    "patch": 2**14,
    "channels": 2**10,
    "classes": 2**24,
    "embed": 2**17,
    "norm_count": 2**17,
    "qk_norm_count": 2**15,
    "rotary": 2**14,
    "rotary_grid": 2**14,
    "proj_norm_count": 2**26,
    "fc2_norm_count": 2**20,
    "registers": 2**12,
    "pre_logits": 2**17,
    "projection": 2**17,
    "pool_width": 2**17,
    "pool_heads": 2**12,
    "pool_mlp": 2**20,
    "heads": 2**12,
    "qk": 2**14,
    "v": 2**14,
    "mlp": 2**20,
}
_BLOCKS, _TOKENS, _PARAMS = 1000, 2**20, 2**36  # at most
_REAL = {"qk_scale": (1e-6, 1e3), "norm_eps": (1e-20, 1.0), "rotary_base": (1.0, 1e12)}


class Units(NamedTuple):
    """One value per prunable unit: masks (0/1), scores or costs. Arrays over the padded (uniform) widths.

    Blocks narrower than the widest one are padded; a padded unit has mask 0 for ever.
    With a batch axis for per-sample gates the shapes are [B, D], [L, B, H], [L, B, H, Q], ...
    """

    embed: Any  # [D]        a channel of the residual stream, tied over the whole model
    head: Any  # [L, H]
    qk: Any  # [L, H, Q]  a query/key dim; with rotary positions a pair of them
    v: Any  # [L, H, V]
    mlp: Any  # [L, M]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTDims:
    """Every width of an original or pruned model, and every choice that fixes the function it computes.

    A block with 0 heads has no attention part, and its qk and v are 0, whatever is given; a block with 0 mlp neurons
    has no mlp part. Of such a part the bias of its last layer is left, and LayerScale.

    Rotary positions turn query/key dims in pairs: qk then counts pairs, and a unit of the kind qk is one.

    Raises UserError when the numbers cannot be a model. `qk_scale` stays at the original Q ** -0.5 after pruning.
    """

    image: Size  # in pixels: one side of a square, or (height, width)
    patch: Size
    channels: int = 3
    classes: int  # 0: no classifier, the model's outputs are features
    embed: int
    heads: tuple[int, ...]  # [L]
    qk: tuple[int, ...]  # [L]
    v: tuple[int, ...]  # [L]
    mlp: tuple[int, ...]  # [L]
    qk_scale: float
    cls_token: bool = True
    dist_token: bool = False  # a second classifier reads it; the two are averaged at evaluation
    registers: int = 0  # register tokens; they stand behind the class tokens
    positions: str = "all"  # position embeddings: "all" tokens, "patches" only, or "none"
    # What the classifier reads: the "class" token(s); the "mean" or "max" of tokens, or "avgmax", half of their sum;
    # the class token and the mean ("class_mean"); "map" is attention pooling, see layers.AttentionPool.
    pool: str = "class"
    mean_over: str = "patches"  # tokens that are pooled: "patches" or "all"
    norm_after_pool: bool = False  # final norm behind the pooling instead of before it
    pre_logits: int = 0  # width of a tanh layer before the classifier, 0 for none
    layer_scale: bool = False
    qkv_bias: bool = True
    activation: str = "gelu"  # "gelu" is exact (erf), "quick_gelu" is x * sigmoid(1.702 x)
    gated: bool = False  # mlp: fc2(activation(fc1_gate x) * fc1 x), with "silu" called SwiGLU (Shazeer 2020)
    norm_eps: float = 1e-6
    norm: str = "layer"  # LayerNorm, or "rms": RMSNorm without parameters, see layers.RMSNorm
    norm_count: int = 0  # rms: what the sum of squares is divided by, the embed before pruning
    qk_norm_count: int = 0  # the same of the norm of queries and keys, see layers.HeadNorm; 0 for no such norm
    rotary: int = 0  # pairs of query/key dims of a head before pruning, turned by the patch's place; 0 for none
    rotary_base: float = 100.0  # the larger, the slower the last of them are turned, see positions.rotary_angles
    rotary_grid: int = 0  # patches are numbered as in a grid of this many rows and columns; 0: by their centres
    relative: bool = False  # each head adds a bias to its logits, by how two patches lie, see positions.relative_index
    # What the norm in front of the output projection, or of fc2, is over before pruning: the value dims of all heads,
    # or the neurons, see layers.InnerNorm; 0 for no such norm.
    proj_norm_count: int = 0
    fc2_norm_count: int = 0
    patch_bias: bool = True  # of the patch embedding
    pre_norm: bool = False  # a norm in front of the first block; what it gives out is the residual stream (CLIP)
    projection: int = 0  # features are those of a linear layer of this width, without bias (CLIP); 0 for none
    pool_width: int = 0  # map: width of the pooled vector, the embed before pruning
    pool_heads: int = 0  # map: heads of the pooling's attention
    pool_mlp: int = 0  # map: hidden neurons of the pooling's mlp

    def __post_init__(self) -> None:
        _check_values(self)
        for name in ("heads", "qk", "v", "mlp"):
            widths = getattr(self, name)
            if len(widths) != len(self.heads) or not widths or min(widths) < 0:
                raise UserError(f"dims: {name}={widths} must hold one width >= 0 for each of {len(self.heads)} blocks")
        for name in ("qk", "v"):
            widths = tuple(w if h else 0 for h, w in zip(self.heads, getattr(self, name), strict=True))
            object.__setattr__(self, name, widths)
            if bad := [i for i, (h, w) in enumerate(zip(self.heads, widths, strict=True)) if h and not w]:
                raise UserError(f"dims: {name}={widths} must be at least 1 where there are heads, as in block {bad[0]}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in CHOICES and value not in CHOICES[field.name]:
                raise UserError(f"dims: {field.name}={value!r} is not one of {', '.join(CHOICES[field.name])}")
        if not self.divides(self.image):
            shown = f"image size {sizes.words(self.image)} is not divisible by patch {sizes.words(self.patch)}"
            raise UserError(f"dims: {shown}")
        if self.pool in ("class", "class_mean") and not self.cls_token:
            raise UserError(f'dims: pool="{self.pool}" needs cls_token=True; use pool="mean"')
        if self.pool == "class_mean" and (not self.classes or self.pre_logits or self.norm_after_pool):
            raise UserError('dims: pool="class_mean" needs classes, pre_logits=0 and norm_after_pool=False')
        if self.dist_token and not (self.cls_token and self.pool == "class"):
            raise UserError('dims: a distillation token needs a class token and pool="class"')
        if self.norm == "rms" and self.norm_count < self.embed:
            raise UserError(
                f'dims: norm="rms" needs norm_count, the embed before pruning; {self.norm_count} is less than embed '
                f"{self.embed}"
            )
        if self.norm == "layer" and self.norm_count:
            raise UserError(f'dims: norm_count={self.norm_count} goes with norm="rms"')
        if self.qk_norm_count and self.qk_norm_count < (most := self.paired * max(self.qk)):
            raise UserError(
                f"dims: qk_norm_count={self.qk_norm_count} is less than the {most} query/key dims of a head; it is "
                "their number before pruning"
            )
        if self.rotary % 2 or (self.rotary and max(self.qk) > self.rotary):
            raise UserError(
                f"dims: rotary={self.rotary} must be even, half of it for rows and half for columns, and no less than "
                f"qk, which counts pairs; its largest is {max(self.qk)}"
            )
        _check_inside(self)
        _check_pool(self)
        _check_size(self)

    @classmethod
    def uniform(
        cls,
        *,
        embed: int,
        depth: int,
        heads: int,
        mlp: int,
        qk: int | None = None,
        v: int | None = None,
        qk_scale: float | None = None,
        **other: Any,
    ) -> Self:
        """All blocks alike; qk and v default to embed // heads, qk_scale to qk ** -0.5, norm_count to embed (rms), and
        the widths of attention pooling (map) to those of a block.

        With rotary positions qk defaults to all pairs, and qk_scale to (2 qk) ** -0.5.
        """
        depth = whole("dims: depth", depth, 1, _BLOCKS)
        embed, heads = (whole(f"dims: {k}", n, 1, _MAXIMUM[k]) for k, n in (("embed", embed), ("heads", heads)))
        rotary = whole("dims: rotary", other.get("rotary", 0), 0, _MAXIMUM["rotary"])
        qk = (rotary or None) if qk is None else whole("dims: qk", qk, 1, _MAXIMUM["qk"])
        if (qk is None or v is None) and embed % heads:
            raise UserError(f"dims: embed {embed} is not divisible by heads {heads}; give qk and v")
        qk = embed // heads if qk is None else qk
        v = embed // heads if v is None else v
        per_block: dict[str, Any] = {k: (w,) * depth for k, w in (("heads", heads), ("qk", qk), ("v", v), ("mlp", mlp))}
        scale = float(2 * qk if rotary else qk) ** -0.5 if qk_scale is None else qk_scale
        if other.get("pool") == "map":
            other = {"pool_width": embed, "pool_heads": heads, "pool_mlp": mlp} | other
        return cls(embed=embed, **per_block, qk_scale=scale, **_unpruned(embed, other))

    @property
    def depth(self) -> int:
        return len(self.heads)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return sizes.sides(self.image)

    @property
    def patch_sides(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return sizes.sides(self.patch)

    @property
    def patch_values(self) -> int:
        """Numbers of a patch, over all channels."""
        height, width = self.patch_sides
        return height * width * self.channels

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (height, width), (patch_height, patch_width) = self.sides, self.patch_sides
        return height // patch_height, width // patch_width

    def divides(self, image: Size) -> bool:
        """Whether an image of this size is of whole patches."""
        return not any(side % part for side, part in zip(sizes.sides(image), self.patch_sides, strict=True))

    @property
    def patches(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches: class, distillation, registers."""
        return self.cls_token + self.dist_token + self.registers

    @property
    def tokens(self) -> int:
        return self.prefix + self.patches

    @property
    def paired(self) -> int:
        """Query/key dims of a unit: 2 with rotary positions."""
        return 2 if self.rotary else 1

    @property
    def distances(self) -> int:
        """Ways in which two tokens lie to each other: patches by rows and columns, and three with the class token."""
        rows, columns = self.grid
        return (2 * rows - 1) * (2 * columns - 1) + 3

    @property
    def classifiers(self) -> int:
        return 1 + self.dist_token

    @property
    def features(self) -> int:
        """Width of what a classifier reads, and of the outputs of a model without one."""
        pooled = self.pool_width if self.pool == "map" else self.embed
        return (self.pre_logits if self.classes else self.projection) or pooled

    @property
    def gives_channels(self) -> bool:
        """Whether what comes out are the embed channels themselves: features that no layer has read."""
        return not (self.classes or self.projection or self.pool == "map")

    @property
    def pooled(self) -> int:
        """Number of tokens that are pooled."""
        return self.patches if self.mean_over == "patches" else self.tokens

    @property
    def is_uniform(self) -> bool:
        return all(len(set(widths)) == 1 for widths in (self.heads, self.qk, self.v, self.mlp))

    def padded(self) -> Self:
        """The uniform dims that hold every block: each width the largest over the blocks."""
        widest: dict[str, Any] = {k: (max(getattr(self, k)),) * self.depth for k in ("heads", "qk", "v", "mlp")}
        return dataclasses.replace(self, **widest)

    def unit_shapes(self) -> Units:
        """Shapes of the arrays of `Units` for this model."""
        n, h, q, v, m = self.depth, max(self.heads), max(self.qk), max(self.v), max(self.mlp)
        return Units((self.embed,), (n, h), (n, h, q), (n, h, v), (n, m))

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        known = {f.name for f in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if unknown := sorted(set(values) - known):
            raise UserError(f"dims: unknown field(s) {', '.join(unknown)}")
        if missing := sorted(required - set(values)):
            raise UserError(f"dims: missing field(s) {', '.join(missing)}")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


def with_widths(dims: ViTDims, **widths: Any) -> ViTDims:
    """`dims` with other widths, smaller than its own, not checked: rankings make them by the thousand.

    Of a block without heads qk and v become 0 here, too. Widths that are arrays stand for many models, of which
    `count_macs` and `count_params` give arrays.
    """
    made = object.__new__(ViTDims)
    made.__dict__.update(dims.__dict__, **widths)
    if any(isinstance(h, int) and not h for h in made.heads):
        for name in ("qk", "v"):
            made.__dict__[name] = tuple(w if h else 0 for h, w in zip(made.heads, getattr(made, name), strict=True))
    return made


def _unpruned(embed: int, values: dict[str, Any]) -> dict[str, Any]:
    """Fields of a model with RMSNorm that has all its channels."""
    return {"norm_count": embed} | values if values.get("norm") == "rms" else values


def _check_values(dims: ViTDims) -> None:
    """UserError unless each field is of its type, finite and of a size that can be. NumPy's numbers become Python's.

    Rankings make dims by the thousand: what is an int in its range costs no call.
    """
    for field in _FIELDS:
        name, value = field.name, getattr(dims, field.name)
        where, most = f"dims: {name}", _MAXIMUM.get(name, 2**24)
        if field.type is Size and type(value) is not int:
            object.__setattr__(dims, name, sizes.size(where, value, 1, most))
        elif field.type in (int, Size):
            least = _MINIMUM.get(name, 1)
            if type(value) is not int or not least <= value <= most:
                object.__setattr__(dims, name, whole(where, value, least, most))
        elif field.type is float:
            object.__setattr__(dims, name, real(where, value, *_REAL[name]))
        elif field.type is bool:
            flag(where, value)
        elif field.type is not str:  # one width for each block
            if not isinstance(value, tuple | list) or len(value) > _BLOCKS:
                raise UserError(f"dims: {name} must hold one width for each block, of at most {_BLOCKS:,}")
            if type(value) is not tuple or any(type(w) is not int or not 0 <= w <= most for w in value):
                widths = tuple(whole(f"{where}[{i}]", width, 0, most) for i, width in enumerate(value))
                object.__setattr__(dims, name, widths)


def _check_inside(dims: ViTDims) -> None:
    """UserError unless what stands inside of the parts goes with the rest."""
    values = [h * v for h, v in zip(dims.heads, dims.v, strict=True)]
    for name, found, what in (
        ("proj_norm_count", max(values), "value dims of all heads"),
        ("fc2_norm_count", max(dims.mlp), "neurons"),
    ):
        if getattr(dims, name) and getattr(dims, name) < found:
            raise UserError(
                f"dims: {name}={getattr(dims, name)} is less than the {found} {what}; it is their number before pruning"
            )
    if dims.rotary_grid and not dims.rotary:
        raise UserError(f"dims: rotary_grid={dims.rotary_grid} goes with rotary positions")
    if dims.relative and not (dims.cls_token and dims.prefix == 1):
        raise UserError("dims: relative=True needs a class token, and no distillation token or registers")


def _check_pool(dims: ViTDims) -> None:
    """UserError unless the widths of attention pooling and of the projection go with the rest."""
    widths = {name: getattr(dims, name) for name in ("pool_width", "pool_heads", "pool_mlp")}
    shown = ", ".join(f"{name}={width}" for name, width in widths.items())
    if dims.pool != "map" and any(widths.values()):
        raise UserError(f'dims: {shown} go with pool="map"')
    if dims.pool == "map":
        if not all(widths.values()) or dims.pool_width % dims.pool_heads:
            raise UserError(f'dims: pool="map" needs a pool_width that pool_heads divides, and a pool_mlp; not {shown}')
        if dims.pre_logits or dims.norm_after_pool:
            raise UserError('dims: pool="map" goes with neither pre_logits nor norm_after_pool')
    if dims.projection and dims.classes:
        raise UserError(f"dims: projection={dims.projection} makes features, and goes with classes=0")


def _check_size(dims: ViTDims) -> None:
    """UserError for a model that no memory holds."""
    if dims.tokens > _TOKENS:
        raise UserError(f"dims: {dims.tokens:,} tokens are too many; at most {_TOKENS:,} are possible")
    attention = max(dims.heads) * max(dims.paired * max(dims.qk), *dims.v)
    rows = max(dims.depth * max(attention, *dims.mlp), dims.patch_values, dims.classes, dims.tokens)
    rows = max(rows, dims.projection, 4 * dims.pool_width, 2 * dims.pool_mlp)
    if dims.embed * rows > _PARAMS:
        raise UserError(f"dims: more than {_PARAMS:,} parameters are too many")


_FIELDS = dataclasses.fields(ViTDims)


# --------------------------------------------------------------------------------------------------- costs


def count_params(dims: ViTDims) -> int:
    """Number of parameters."""
    d = dims.embed
    total = dims.patch_values * d + d * dims.patch_bias + dims.prefix * d
    total += norm_params(dims) * (1 + dims.pre_norm)
    total += {"all": dims.tokens, "patches": dims.patches, "none": 0}[dims.positions] * d
    total += sum(block_params(dims, i) for i in range(dims.depth))
    if dims.pre_logits:
        total += d * dims.pre_logits + dims.pre_logits
    if dims.pool == "map":
        total += _pool_kernels(dims) + 8 * dims.pool_width + dims.pool_mlp  # probe, 5 biases, a norm; the bias of fc1
    total += (dims.pool_width or d) * dims.projection
    return total + dims.classifiers * (dims.features * dims.classes + dims.classes) + _mean_classifier(dims)


def _pool_kernels(dims: ViTDims) -> int:
    """Entries of the kernels of attention pooling: keys and values read the stream, all others what is pooled."""
    w = dims.pool_width
    return 2 * dims.embed * w + 2 * w * w + 2 * w * dims.pool_mlp


def _mean_classifier(dims: ViTDims) -> int:
    """Weights of what the classifier reads of the mean, beside the class token."""
    return dims.embed * dims.classes if dims.pool == "class_mean" else 0


def _hidden_layers(dims: ViTDims) -> int:
    """Linear layers in front of an mlp's activation: the gate is a second one."""
    return 1 + dims.gated


def block_params(dims: ViTDims, block: int) -> int:
    """Parameters of one block, its norms included."""
    d, h, q, v, m = dims.embed, dims.heads[block], dims.qk[block], dims.v[block], dims.mlp[block]
    each = dims.paired * q
    qkv, norms = h * (2 * each + v), 1 * (h > 0) + (m > 0)
    always = 2 * d + 2 * d * dims.layer_scale  # the biases behind both parts
    inside = 4 * h * each * (dims.qk_norm_count > 0) + h * q * (dims.rotary > 0)  # two norms; the numbers of the pairs
    inside += h * dims.distances * dims.relative
    inside += 2 * h * v * (dims.proj_norm_count > 0) + 2 * m * (dims.fc2_norm_count > 0)
    mlp = _hidden_layers(dims) * (d * m + m) + d * m
    return always + norm_params(dims) * norms + d * qkv + qkv * dims.qkv_bias + inside + h * v * d + mlp


def norm_params(dims: ViTDims) -> int:
    """Parameters of one norm: gain and bias of a LayerNorm."""
    return 2 * dims.embed if dims.norm == "layer" else 0


def attention_macs(dims: ViTDims, block: int) -> int:
    """MACs of the attention part of one block: q, k, v, both products, projection."""
    n, d = dims.tokens, dims.embed
    h, q, v = dims.heads[block], dims.paired * dims.qk[block], dims.v[block]
    return n * d * h * (2 * q + v) + n * n * h * (q + v) + n * h * v * d


def mlp_macs(dims: ViTDims, block: int) -> int:
    """MACs of the mlp part of one block."""
    return (1 + _hidden_layers(dims)) * dims.tokens * dims.embed * dims.mlp[block]


def count_macs(dims: ViTDims) -> int:
    """MACs for one image: every matrix product of the model, attention's two included, nothing else."""
    total = dims.patches * dims.patch_values * dims.embed
    total += sum(attention_macs(dims, i) + mlp_macs(dims, i) for i in range(dims.depth))
    total += dims.embed * dims.pre_logits + pool_macs(dims)
    total += dims.classifiers * (dims.pool_width or dims.embed) * dims.projection
    return total + dims.classifiers * dims.features * dims.classes + _mean_classifier(dims)


def pool_macs(dims: ViTDims) -> int:
    """MACs of attention pooling: the probe's query, keys and values of all tokens, both products, projection, mlp."""
    w, n = dims.pool_width, dims.pooled
    return 2 * n * dims.embed * w + 2 * n * w + 2 * w * w + 2 * w * dims.pool_mlp


# ------------------------------------------------------------------------------------------------- presets

_SIZES = {  # embed, depth, heads; mlp is 4 x embed
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    "giant": (1536, 40, 24),
}
_FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # sizes, what may follow the size
    "deit": (("tiny", "small", "base"), ("", "_distilled")),
    "vit": (("tiny", "small", "base", "large", "huge"), ("",)),
    "deit3": (("small", "medium", "base", "large", "huge"), ("",)),
    "dinov2": (("small", "base", "large", "giant"), ("", "_reg4")),
}


def revit(embed: int, **fixed: Any) -> ViTDims:
    """The redistribution rule of NViT (section 4.4, table 6, as released) for 12 distilled blocks.

    heads = eps * (embed / 100 to the nearest even), qk = eps * (embed / 20 to the nearest multiple of 8), v = 64,
    mlp = eps * 3 * embed, with eps = 2 in blocks 4 to 9 and 1 in the others; the first and the last block have 10
    heads and the wide blocks' qk.
    """
    eps = [2 if 4 <= block <= 9 else 1 for block in range(1, 13)]
    heads, qk = 2 * round(embed / 200), 8 * round(embed / 160)
    if min(heads, qk) < 1:
        raise UserError(f"the ReViT rule gives embed {embed} no heads; it needs at least 101")
    edge = (0, 11)
    values: dict[str, Any] = {"image": 224, "patch": 16, "classes": 1000, "dist_token": True}
    return ViTDims(
        embed=embed,
        heads=tuple(10 if i in edge else e * heads for i, e in enumerate(eps)),
        qk=tuple(2 * qk if i in edge else e * qk for i, e in enumerate(eps)),
        v=(64,) * 12,
        mlp=tuple(3 * e * embed for e in eps),
        qk_scale=64**-0.5,
        **_unpruned(embed, values | fixed),
    )


_REVIT = {"revit_s": 384, "revit_t": 176}


def preset_names() -> list[str]:
    """Names that `preset` takes."""
    return list(_REVIT) + [
        f"{family}_{size}{option}{image}"
        for family, (sizes, options) in _FAMILIES.items()
        for size in sizes
        for option in options
        for image in ("", "_384")[: 1 if family == "dinov2" or size == "huge" else 2]  # patch 14 does not divide 384
    ]


def preset(name: str, **overrides: Any) -> ViTDims:
    """Dims of a published model: "deit_base_distilled_384", "vit_large", ... `overrides` as in `ViTDims.uniform`."""
    if name not in preset_names():
        raise UserError(
            f"unknown model preset {name!r}{nearest(str(name), preset_names())}; there are {', '.join(preset_names())}"
        )
    if name in _REVIT:
        return revit(_REVIT[name], **overrides)
    family, size, *options = name.split("_")
    embed, depth, heads = _SIZES[size]
    values: dict[str, Any] = {
        "image": 384 if "384" in options else 224,
        "patch": 14 if size == "huge" else 16,
        "classes": 1000,
        "embed": embed,
        "depth": depth,
        "heads": heads,
        "mlp": 4 * embed,
        "dist_token": "distilled" in options,
    }
    if family == "deit3":
        values |= {"layer_scale": True, "positions": "patches"}
    if family == "dinov2":
        values |= {"layer_scale": True, "image": 518, "patch": 14}
        if size == "giant":
            values |= {"mlp": 4096, "gated": True, "activation": "silu"}
        if "reg4" in options:
            values |= {"registers": 4, "positions": "patches"}
    return ViTDims.uniform(**(values | overrides))
