"""The key tables: how each publisher names the tensors of a plain Vision Transformer, brought to timm's names.

A table is a list of rules, tried in order; "{i}" is a block's number. A rule applies where all of its sources are in
the file, and every tensor of a file must be taken by one rule, or be named as not belonging to the function.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Arrays = tuple[np.ndarray, ...]


class Rule(NamedTuple):
    """Tensors of the file -> tensors with timm's names."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    make: Callable[..., Arrays] | None = None  # None: one tensor under another name


class Layout(NamedTuple):
    """How one publisher stores a ViT."""

    name: str
    marks: tuple[str, ...]  # names that are in every such file, and together in no other
    rules: tuple[Rule, ...]
    left_out: Mapping[str, str] = {}  # regular expression of names that are not part of the function -> why
    prefixes: tuple[str, ...] = ()  # dropped where a name has one
    activation: str = "gelu"
    norm_eps: float = 1e-6
    family: str = "deit"  # preprocessing and variant names, unless the file's own names tell more


def _rename(**names: str) -> tuple[Rule, ...]:
    return tuple(Rule((source,), (target,)) for target, source in names.items())


def _both(source: str, target: str) -> tuple[Rule, ...]:
    """weight and bias."""
    return tuple(Rule((f"{source}.{leaf}",), (f"{target}.{leaf}",)) for leaf in ("weight", "bias"))


def _rows(*parts: np.ndarray) -> Arrays:
    return (np.concatenate(parts),)


_BLOCK = "blocks.{i}."
_TIMM = (
    *_rename(cls_token="cls_token", dist_token="dist_token", reg_token="reg_token", pos_embed="pos_embed"),
    *_both("patch_embed.proj", "patch_embed.proj"),
    *(
        rule
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for rule in _both(_BLOCK + part, _BLOCK + part)
    ),
    *(Rule((_BLOCK + f"ls{n}.gamma",), (_BLOCK + f"ls{n}.gamma",)) for n in "12"),
    *(rule for part in ("norm", "fc_norm", "pre_logits.fc", "head", "head_dist") for rule in _both(part, part)),
)

TIMM = Layout("timm's names (official DeiT, timm ViT, DINO)", ("blocks.0.attn.qkv.weight", "cls_token"), _TIMM)
TIMM_WITHOUT_CLASS_TOKEN = TIMM._replace(marks=("blocks.0.attn.qkv.weight", "patch_embed.proj.weight"))

DEIT3 = Layout(
    "official DeiT-III",
    ("blocks.0.attn.qkv.weight", "blocks.0.gamma_1"),
    (*(Rule((_BLOCK + f"gamma_{n}",), (_BLOCK + f"ls{n}.gamma",)) for n in "12"), *_TIMM),
    family="deit3",
)


def _fold_class_position(cls_token: np.ndarray, positions: np.ndarray) -> Arrays:
    """Registers have no position: the class token takes its own in, and the patches keep theirs."""
    return cls_token + positions[:, :1], positions[:, 1:]


DINO_HEADS = {
    r"(head\.(mlp|last_layer)\.|dino_head\.|ibot_head\.).*": "a projection head of DINO's training",
    r"mask_token": "stands for masked patches in DINOv2's training",
}
DINO = TIMM._replace(name="official DINO", left_out=DINO_HEADS, family="dino")
DINOV2 = Layout(
    "official DINOv2",
    ("blocks.0.ls1.gamma", "mask_token"),
    (
        Rule(
            ("cls_token", "pos_embed", "register_tokens"),
            ("cls_token", "pos_embed", "reg_token"),
            lambda c, p, r: (*_fold_class_position(c, p), r),
        ),
        *_TIMM,
    ),
    left_out=DINO_HEADS,
    family="dinov2",
)


def _hugging_face(block: str, qkv: tuple[str, ...], projection: str, fc1: str, fc2: str) -> tuple[Rule, ...]:
    return (
        *_rename(
            cls_token="embeddings.cls_token",
            dist_token="embeddings.distillation_token",
            pos_embed="embeddings.position_embeddings",
        ),
        *_both("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        *_both(f"{block}.layernorm_before", _BLOCK + "norm1"),
        *(
            Rule(tuple(f"{block}.{n}.{leaf}" for n in qkv), (_BLOCK + f"attn.qkv.{leaf}",), _rows)
            for leaf in ("weight", "bias")
        ),
        *_both(f"{block}.{projection}", _BLOCK + "attn.proj"),
        *_both(f"{block}.layernorm_after", _BLOCK + "norm2"),
        *_both(f"{block}.{fc1}", _BLOCK + "mlp.fc1"),
        *_both(f"{block}.{fc2}", _BLOCK + "mlp.fc2"),
        *_both("layernorm", "norm"),
        *_both("classifier", "head"),
        *_both("cls_classifier", "head"),
        *_both("distillation_classifier", "head_dist"),
    )


_HF_LEFT_OUT = {
    r"pooler\..*": "the pooler of ViTModel, which its classifier does not read",
    r"embeddings\.mask_token": "stands for masked patches in training",
}
HUGGING_FACE = Layout(
    "Hugging Face ViT or DeiT",
    ("encoder.layer.0.attention.attention.query.weight",),
    _hugging_face(
        "encoder.layer.{i}",
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    left_out=_HF_LEFT_OUT,
    prefixes=("vit.", "deit."),
    norm_eps=1e-12,
    family="vit_hf",
)
HUGGING_FACE_5 = HUGGING_FACE._replace(
    name="Hugging Face ViT or DeiT (names of transformers 5)",
    marks=("layers.0.attention.q_proj.weight", "embeddings.cls_token"),
    rules=_hugging_face(
        "layers.{i}",
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attention.o_proj",
        "mlp.fc1",
        "mlp.fc2",
    ),
)

_LAYER = "encoder.layers.encoder_layer_{i}."
TORCHVISION = Layout(
    "torchvision",
    ("conv_proj.weight", "encoder.pos_embedding"),
    (
        *_rename(cls_token="class_token", pos_embed="encoder.pos_embedding"),
        *_both("conv_proj", "patch_embed.proj"),
        *_both(_LAYER + "ln_1", _BLOCK + "norm1"),
        *(
            Rule((_LAYER + f"self_attention.in_proj_{leaf}",), (_BLOCK + f"attn.qkv.{leaf}",))
            for leaf in ("weight", "bias")
        ),
        *_both(_LAYER + "self_attention.out_proj", _BLOCK + "attn.proj"),
        *_both(_LAYER + "ln_2", _BLOCK + "norm2"),
        *_both(_LAYER + "mlp.linear_1", _BLOCK + "mlp.fc1"),
        *_both(_LAYER + "mlp.linear_2", _BLOCK + "mlp.fc2"),
        *_both(_LAYER + "mlp.0", _BLOCK + "mlp.fc1"),
        *_both(_LAYER + "mlp.3", _BLOCK + "mlp.fc2"),
        *_both("encoder.ln", "norm"),
        *_both("heads.pre_logits", "pre_logits.fc"),
        *_both("heads.head", "head"),
    ),
    family="vit_torchvision",
)


def _flax_linear(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule((f"{source}/kernel",), (f"{target}.weight",), lambda x: (x.T,)),
        Rule((f"{source}/bias",), (f"{target}.bias",)),
    )


def _flax_norm(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule((f"{source}/scale",), (f"{target}.weight",)),
        Rule((f"{source}/bias",), (f"{target}.bias",)),
    )


def _flax_block(norm1: str, attention: str, norm2: str, mlp: str) -> tuple[Rule, ...]:
    block = "Transformer/encoderblock_{i}/"
    a = block + attention
    return (
        *_flax_norm(block + norm1, _BLOCK + "norm1"),
        Rule(
            tuple(f"{a}/{n}/kernel" for n in ("query", "key", "value")),
            (_BLOCK + "attn.qkv.weight",),
            lambda *parts: _rows(*(p.reshape(len(p), -1).T for p in parts)),  # [D, H, Q] -> [H * Q, D]
        ),
        Rule(
            tuple(f"{a}/{n}/bias" for n in ("query", "key", "value")),
            (_BLOCK + "attn.qkv.bias",),
            lambda *parts: _rows(*(p.reshape(-1) for p in parts)),
        ),
        Rule((f"{a}/out/kernel",), (_BLOCK + "attn.proj.weight",), lambda x: (x.reshape(-1, x.shape[-1]).T,)),
        Rule((f"{a}/out/bias",), (_BLOCK + "attn.proj.bias",)),
        *_flax_norm(block + norm2, _BLOCK + "norm2"),
        *_flax_linear(f"{block}{mlp}/Dense_0", _BLOCK + "mlp.fc1"),
        *_flax_linear(f"{block}{mlp}/Dense_1", _BLOCK + "mlp.fc2"),
    )


def _flax(blocks: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return (
        *_rename(cls_token="cls"),
        Rule(("Transformer/posembed_input/pos_embedding",), ("pos_embed",)),
        Rule(("pos_embedding",), ("pos_embed",)),
        Rule(("embedding/kernel",), ("patch_embed.proj.weight",), lambda x: (x.transpose(3, 2, 0, 1),)),
        Rule(("embedding/bias",), ("patch_embed.proj.bias",)),
        *blocks,
        *_flax_norm("Transformer/encoder_norm", "norm"),
        *_flax_linear("pre_logits", "pre_logits.fc"),
        *_flax_linear("head", "head"),
    )


VISION_TRANSFORMER = Layout(
    "vision_transformer .npz",
    ("embedding/kernel", "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"),
    _flax(_flax_block("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")),
    activation="gelu_tanh",
    family="vit_npz",
)
BIG_VISION = VISION_TRANSFORMER._replace(
    name="big_vision .npz",
    marks=("embedding/kernel", "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"),
    rules=_flax(_flax_block("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")),
)


def _nvit_patches(x: np.ndarray) -> Arrays:
    """A 1x1 convolution over pixels in the order (p1 p2 c), as a convolution over patches."""
    patch = round((x.shape[1] / 3) ** 0.5)
    return (x.reshape(len(x), patch, patch, 3).transpose(0, 3, 1, 2),)


def _nvit_rows(*parts: np.ndarray) -> Arrays:
    """Q, K, V of [q, e, h], each times its head's mask [h, 1] -> rows (h q)."""
    mask = parts[-1][:, 0]
    return _rows(*((p * mask).transpose(2, 0, 1).reshape(-1, p.shape[1]) for p in parts[:-1]))


def _nvit_biases(*parts: np.ndarray) -> Arrays:
    return _rows(*(p.T.reshape(-1) for p in parts))


def _nvit(attention: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return (
        Rule(("patch_embed.proj.weight",), ("patch_embed.proj.weight",), _nvit_patches),
        *attention,
        *(rule for rule in _TIMM if "qkv" not in rule.sources[0]),
    )


_QKV = _BLOCK + "attn.qkv."
NVIT_PRUNED = Layout(
    "released NViT, pruned at full size",
    ("blocks.0.attn.qkv.Q.weight", "blocks.0.attn.qkv.head_mask.weight"),
    _nvit(
        (
            Rule(tuple(_QKV + f"{n}.weight" for n in ("Q", "K", "V", "head_mask")), (_QKV + "weight",), _nvit_rows),
            Rule(tuple(_QKV + f"{n}.bias" for n in "QKV"), (_QKV + "bias",), _nvit_biases),
            Rule(
                (_BLOCK + "attn.proj.weight",),
                (_BLOCK + "attn.proj.weight",),
                lambda x: (x.transpose(0, 2, 1).reshape(len(x), -1),),  # [e, v, h] -> [e, (h v)]
            ),
        )
    ),
    left_out={r"blocks\.\d+\.attn\.qkv\.token_mask": "all ones"},
)
NVIT_DENSE = Layout(
    "released NViT, dense",
    ("blocks.0.attn.qkv.Q.weight", "blocks.0.attn.proj.proj.weight"),
    _nvit(
        (
            *(Rule(tuple(_QKV + f"{n}.{leaf}" for n in "QKV"), (_QKV + leaf,), _rows) for leaf in ("weight", "bias")),
            *_both(_BLOCK + "attn.proj.proj", _BLOCK + "attn.proj"),
        )
    ),
    left_out={r"blocks\.\d+\.attn\.qkv\.token_mask": "all ones"},
)

LAYOUTS = (  # the more particular first
    NVIT_PRUNED,
    NVIT_DENSE,
    DEIT3,
    DINOV2,
    TIMM,
    TIMM_WITHOUT_CLASS_TOKEN,
    HUGGING_FACE,
    HUGGING_FACE_5,
    TORCHVISION,
    VISION_TRANSFORMER,
    BIG_VISION,
)
