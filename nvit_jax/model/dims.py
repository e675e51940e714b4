"""Widths of a Vision Transformer, the units that can be removed from it, and what it costs.

Letters, used everywhere: B batch, N tokens, D embed, H heads, Q query/key dim of a head, V value dim of a
head, M mlp hidden, L blocks, C classes. Compute is in MACs (multiply-accumulates) per image.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from nvit_jax.errors import UserError

KINDS = ("embed", "head", "qk", "v", "mlp")
_CHOICES = {
    "positions": ("all", "patches", "none"),
    "pool": ("class", "mean"),
    "mean_over": ("patches", "all"),
    "activation": ("gelu", "gelu_tanh"),
}
_MINIMUM = {"registers": 0, "pre_logits": 0, "classes": 0}


class Units(NamedTuple):
    """One value per prunable unit: masks (0/1), scores or costs. Arrays over the padded (uniform) widths.

    Blocks narrower than the widest one are padded; a padded unit has mask 0 for ever.
    With a batch axis for per-sample gates the shapes are [B, D], [L, B, H], [L, B, H, Q], ...
    """

    embed: Any  # [D]        a channel of the residual stream, tied over the whole model
    head: Any  # [L, H]
    qk: Any  # [L, H, Q]
    v: Any  # [L, H, V]
    mlp: Any  # [L, M]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTDims:
    """Every width of an original or pruned model, and every choice that fixes the function it computes.

    Raises UserError when the numbers cannot be a model. `qk_scale` stays at the original Q ** -0.5 after pruning.
    """

    image: int
    patch: int
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
    pool: str = "class"  # what the classifier reads: the "class" token(s) or a "mean" of tokens
    mean_over: str = "patches"  # tokens of the mean: "patches" or "all"
    norm_after_pool: bool = False  # final LayerNorm behind the pooling instead of before it
    pre_logits: int = 0  # width of a tanh layer before the classifier, 0 for none
    layer_scale: bool = False
    qkv_bias: bool = True
    activation: str = "gelu"  # "gelu" is exact (erf)
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("heads", "qk", "v", "mlp"):
            widths = getattr(self, name)
            if len(widths) != len(self.heads) or not widths or min(widths) < 1:
                raise UserError(f"dims: {name}={widths} must hold one width >= 1 for each of {len(self.heads)} blocks")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < _MINIMUM.get(field.name, 1):
                raise UserError(f"dims: {field.name}={value} is too small")
            if field.name in _CHOICES and value not in _CHOICES[field.name]:
                raise UserError(f"dims: {field.name}={value!r} is not one of {', '.join(_CHOICES[field.name])}")
        if self.image % self.patch:
            raise UserError(f"dims: image size {self.image} is not divisible by patch {self.patch}")
        if self.pool == "class" and not self.cls_token:
            raise UserError('dims: pool="class" needs cls_token=True; use pool="mean"')
        if self.dist_token and not (self.cls_token and self.pool == "class"):
            raise UserError('dims: a distillation token needs a class token and pool="class"')

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
        """All blocks alike; qk and v default to embed // heads, qk_scale to qk ** -0.5."""
        if embed < 1 or heads < 1 or depth < 1 or (qk is not None and qk < 1):
            raise UserError(f"dims: embed={embed}, heads={heads}, depth={depth}, qk={qk} must be at least 1")
        if (qk is None or v is None) and embed % heads:
            raise UserError(f"dims: embed {embed} is not divisible by heads {heads}; give qk and v")
        qk = embed // heads if qk is None else qk
        v = embed // heads if v is None else v
        per_block: dict[str, Any] = {
            k: (int(w),) * depth for k, w in (("heads", heads), ("qk", qk), ("v", v), ("mlp", mlp))
        }
        scale = float(qk) ** -0.5 if qk_scale is None else qk_scale
        return cls(embed=embed, **per_block, qk_scale=scale, **other)

    @property
    def depth(self) -> int:
        return len(self.heads)

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches: class, distillation, registers."""
        return self.cls_token + self.dist_token + self.registers

    @property
    def tokens(self) -> int:
        return self.prefix + self.patches

    @property
    def classifiers(self) -> int:
        return 1 + self.dist_token

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


# --------------------------------------------------------------------------------------------------- costs


def count_params(dims: ViTDims) -> int:
    """Number of parameters."""
    d = dims.embed
    total = dims.patch**2 * dims.channels * d + d + dims.prefix * d + 2 * d
    total += {"all": dims.tokens, "patches": dims.patches, "none": 0}[dims.positions] * d
    total += sum(block_params(dims, i) for i in range(dims.depth))
    features = d
    if dims.pre_logits:
        total += d * dims.pre_logits + dims.pre_logits
        features = dims.pre_logits
    return total + dims.classifiers * (features * dims.classes + dims.classes)


def block_params(dims: ViTDims, block: int) -> int:
    """Parameters of one block, its norms included."""
    d, h, q, v, m = dims.embed, dims.heads[block], dims.qk[block], dims.v[block], dims.mlp[block]
    qkv = h * (2 * q + v)
    return 4 * d + d * qkv + qkv * dims.qkv_bias + h * v * d + d + 2 * d * m + m + d + 2 * d * dims.layer_scale


def attention_macs(dims: ViTDims, block: int) -> int:
    """MACs of the attention part of one block: q, k, v, both products, projection."""
    n, d = dims.tokens, dims.embed
    h, q, v = dims.heads[block], dims.qk[block], dims.v[block]
    return n * d * h * (2 * q + v) + n * n * h * (q + v) + n * h * v * d


def mlp_macs(dims: ViTDims, block: int) -> int:
    """MACs of the mlp part of one block."""
    return 2 * dims.tokens * dims.embed * dims.mlp[block]


def count_macs(dims: ViTDims) -> int:
    """MACs for one image: every matrix product of the model, attention's two included, nothing else."""
    total = dims.patches * dims.patch**2 * dims.channels * dims.embed
    total += sum(attention_macs(dims, i) + mlp_macs(dims, i) for i in range(dims.depth))
    features = dims.embed
    if dims.pre_logits:
        total += dims.embed * dims.pre_logits
        features = dims.pre_logits
    return total + dims.classifiers * features * dims.classes


# ------------------------------------------------------------------------------------------------- presets

_SIZES = {  # embed, depth, heads; mlp is 4 x embed
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # sizes, what may follow the size
    "deit": (("tiny", "small", "base"), ("", "_distilled")),
    "vit": (("tiny", "small", "base", "large", "huge"), ("",)),
    "deit3": (("small", "medium", "base", "large", "huge"), ("",)),
    "dinov2": (("small", "base", "large"), ("", "_reg4")),
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
        **(values | fixed),
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
        raise UserError(f"unknown model preset {name!r}; there are {', '.join(preset_names())}")
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
        if "reg4" in options:
            values |= {"registers": 4, "positions": "patches"}
    return ViTDims.uniform(**(values | overrides))


def published_heads(embed: int, depth: int) -> int | None:
    """Heads of the published model of this size; None when there is none."""
    return next((h for e, n, h in _SIZES.values() if (e, n) == (embed, depth)), None)
