"""What is published of the widths: heads and activation, which no shape of a checkpoint shows.

The facts are those of timm 1.0 (`tests/formats/test_architectures.py` compares every one of its names), and of the
papers' code where timm has none.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from nvit_jax.model.sizes import Size


class Reading(NamedTuple):
    """One published model: its widths, and what they do not tell."""

    heads: int
    activation: str = "gelu"
    norm_eps: float | None = None  # None: that of the layout


class Widths(NamedTuple):
    """What a file's shapes do tell."""

    embed: int
    mlp: tuple[int, ...]  # [L]
    patch: Size
    image: Size
    class_token: bool
    plain: bool  # class token, positions for all tokens, no other token, LayerScale or tanh layer
    norm_after_pool: bool
    classifier: bool
    attention_pool: bool
    gated: bool = False


_SIZES: dict[str, tuple[int, int, int, int]] = {  # embed, blocks, mlp, heads
    "tiny": (192, 12, 768, 3),
    "xsmall": (256, 10, 1024, 4),
    "wee": (256, 14, 1280, 4),
    "little": (320, 14, 1792, 5),
    "small": (384, 12, 1536, 6),
    "small_36x1": (384, 36, 1536, 6),
    "medium": (512, 12, 2048, 8),
    "mediumd": (512, 20, 2048, 8),
    "betwixt": (640, 12, 2560, 10),
    "base": (768, 12, 3072, 12),
    "so150m2": (832, 21, 2176, 13),
    "base_plus": (896, 12, 3584, 14),
    "so150m": (896, 18, 2304, 14),
    "large": (1024, 24, 4096, 16),
    "so400m": (1152, 27, 4304, 16),
    "huge": (1280, 32, 5120, 16),
    "giant": (1408, 40, 6144, 16),
    "giantopt": (1536, 40, 6144, 16),
    "gigantic": (1664, 48, 8192, 16),
    "giant_dinov2": (1536, 40, 4096, 24),
    "eva02_tiny": (192, 12, 512, 3),
    "eva02_small": (384, 12, 1024, 6),
    "eva02_base": (768, 12, 2048, 12),
    "eva02_large": (1024, 24, 2730, 16),
    "test_vit": (64, 6, 192, 2),
    "test_vit2": (64, 8, 192, 2),
}


def readings(widths: Widths) -> set[Reading]:
    """All published models of these widths; empty where there are none."""
    return set(_readings(widths))


def _readings(w: Widths) -> Iterator[Reading]:
    size = next((n for n, (d, b, m, _) in _SIZES.items() if (d, (m,) * b) == (w.embed, w.mlp)), None)
    if size is None or w.gated != (size == "giant_dinov2" or size.startswith("eva02")):
        return
    heads = _SIZES[size][3]
    yield Reading(heads, _activation(size, w))
    if size == "small" and w.plain and w.patch == 16:
        yield Reading(12)  # MoCo v3's ViT-S
    if size == "tiny" and w.plain and w.patch == 16 and (w.norm_after_pool or not w.classifier):
        yield Reading(12)  # MAE-Lite's ViT-Tiny
    if size == "base" and not (w.class_token or w.attention_pool) and w.patch == 16 and w.image == 224:
        yield Reading(16)  # timm's vit_base_patch16_gap_224


def _activation(size: str, w: Widths) -> str:
    """SigLIP towers whose pooling was cut off: some have the tanh form."""
    if w.gated:
        return "silu"
    if w.class_token:
        return "gelu"
    large = (size, w.patch, w.image) == ("large", 16, 512)
    tanh = large or size == "giantopt" or (size, w.patch) in (("base", 32), ("so400m", 16))
    return "gelu_tanh" if tanh else "gelu"


_TOWERS = {  # of open_clip's list of pretrained models: (embed, patch, tokens, with a norm in front) -> activation
    (768, 32, 65, True): "gelu",
    (896, 16, 226, True): "gelu",
    (1024, 14, 577, True): "quick_gelu",  # OpenAI's for 336 pixels
    (1408, 14, 257, True): "gelu",
    **{(embed, 14, tokens, False): "gelu" for embed in (1024, 1280, 1664) for tokens in (257, 577)},  # CLIPA
}


def clip_tower(embed: int, patch: int, tokens: int, *, pre_norm: bool) -> str | None:
    """Activation of the published CLIP of these sizes; None where there is none, or where there are several.

    Those without a norm in front pool by the mean, with the norm behind."""
    return _TOWERS.get((embed, patch, tokens, pre_norm))


# --------------------------------------------------------------------------------------------------- names

_NAME = re.compile(
    r"(vit|deit3|deit|flexivit|eva02|eva|beit3|beitv2|beit)_([a-z0-9]+)((?:_distilled)?_patch(\d+)_.+|)$"
)
_TANH = re.compile(r"vit_(base_patch32_siglip_|large_patch16_siglip_(gap_)?512|so400m_patch16_siglip_|giantopt_)")
_OTHER_NAMES = {  # how the projects name their files
    r"dino_(deit|vit)small": "small",
    r"dino_(deit|vit)base": "base",
    r"dinov2_vits14": "small",
    r"dinov2_vitb14": "base",
    r"dinov2_vitl14": "large",
    r"dinov2_vitg14": "giant_dinov2",
    r"deit_3_(small|medium|base|large|huge)_": "",
    r"deit3?_(tiny|small|medium|base|large|huge)(?=$|[^a-z0-9])": "",
}


def architecture(text: str) -> str | None:
    """A file's stem or a config's entry -> timm's name of the architecture, without tag and hash; None for others."""
    name = re.split(r"[.-]", text)[0].lower()
    return name if _NAME.match(name) and size_of(name) else None


def is_dinov3(name: str) -> bool:
    """Whether it is a DINOv3 of timm, whose tensors do not show its rotary positions."""
    return re.match(r"vit_\w+_patch\d+_dinov3(?=$|[._-])", name) is not None


def is_eva02(name: str) -> bool:
    """Whether it is an EVA-02, whose tensors need not show its rotary positions."""
    return re.match(r"eva02_(?!enormous)\w+_patch", name) is not None


def is_rope_gap(name: str) -> bool:
    """Whether it is one of timm's own ViTs with EVA-02's rotary positions, which no tensor shows."""
    return re.match(r"vit_\w+_patch\d+_rope_reg\d_gap_", name) is not None


def size_of(name: str) -> str | None:
    """The published size that a name of an architecture or of a project's file means."""
    if name in _SIZES and name.startswith("test"):
        return name
    if "_plus_" in name and "_base_" in name:
        return "base_plus"
    if "_36x1_" in name:
        return "small_36x1"
    if (found := _NAME.match(name)) and found[2] in _SIZES and (found[3] or found[1] == "flexivit"):
        return found[2]
    for pattern, size in _OTHER_NAMES.items():
        if found := re.match(pattern, name):
            return size or found[1]
    return None


def named_reading(name: str, embed: int, said: Mapping[str, object]) -> Reading | None:
    """What the name of an architecture says of a model of this embed; None where it says nothing, or another size.

    `said`: arguments given beside the name; with an embed of its own a model keeps the heads of its name.
    """
    size = None if re.search(r"moco|mae_", name) else size_of(name)  # their heads differ
    if size is None or (_SIZES[size][0] != embed and said.get("embed_dim") != embed):
        return None
    heads = 16 if name.startswith("vit_base_patch16_gap_224") else _SIZES[size][3]
    if name.startswith("eva02_"):
        return Reading(heads, "silu")
    if name.startswith("beit3_"):
        return Reading(heads, "gelu", 1e-5)
    if "_clip_" in name and not name.startswith("eva"):
        return Reading(heads, "quick_gelu" if "_quickgelu_" in name else "gelu", 1e-5)
    return Reading(heads, "gelu_tanh" if _TANH.match(name) else "gelu")
