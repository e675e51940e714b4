"""The key tables: how each publisher names the tensors of a plain Vision Transformer, brought to timm's names.

A table is a list of rules, tried in order; "{i}" is a block's number. A rule applies where all of its sources are in
the file, and every tensor of a file must be taken by one rule, or be named as not belonging to the function.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from nvit_jax.model.positions import DEIT, Bicubic

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
    beside: Mapping[str, str] = {}  # the same of names outside of the model's prefix
    prefixes: tuple[str, ...] = ()  # dropped where a name has one
    activation: str = "gelu"
    norm_eps: float = 1e-6
    rotary: float = 0.0  # the base of rotary positions, unless it is stated; 0 without them
    family: str = "deit"  # preprocessing and variant names, unless the file's own names tell more
    bicubic: Bicubic = DEIT  # how its positions are interpolated
    any_image: bool = False  # the publisher's model interpolates them itself, to whatever image it is given


def _rename(**names: str) -> tuple[Rule, ...]:
    return tuple(Rule((source,), (target,)) for target, source in names.items())


def _both(source: str, target: str) -> tuple[Rule, ...]:
    """weight and bias."""
    return tuple(Rule((f"{source}.{leaf}",), (f"{target}.{leaf}",)) for leaf in ("weight", "bias"))


def _rows(*parts: np.ndarray) -> Arrays:
    return (np.concatenate(parts),)


_BLOCK = "blocks.{i}."


def _packed(gate: str, hidden: str) -> tuple[Rule, ...]:
    """The two layers of a gated mlp as one, the gate's rows first."""
    names = ((f"{gate}.{leaf}", f"{hidden}.{leaf}", leaf) for leaf in ("weight", "bias"))
    return tuple(Rule((g, h), (_BLOCK + f"mlp.fc1.{leaf}",), _rows) for g, h, leaf in names)


_TIMM = (
    *_rename(cls_token="cls_token", dist_token="dist_token", reg_token="reg_token", pos_embed="pos_embed"),
    *_both("patch_embed.proj", "patch_embed.proj"),
    *(
        rule
        for part in (
            *("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.norm", "attn.proj", "norm2"),
            *("mlp.fc1", "mlp.norm", "mlp.fc2"),
        )
        for rule in _both(_BLOCK + part, _BLOCK + part)
    ),
    *_both(_BLOCK + "mlp.w12", _BLOCK + "mlp.fc1"),  # SwiGLU of DINOv2: rows of the gate, then of what it multiplies
    *_both(_BLOCK + "mlp.w3", _BLOCK + "mlp.fc2"),
    *_packed(_BLOCK + "mlp.fc1_g", _BLOCK + "mlp.fc1_x"),  # and of timm
    *(Rule((_BLOCK + f"ls{n}.gamma",), (_BLOCK + f"ls{n}.gamma",)) for n in "12"),
    *_rename(**{"attn_pool.latent": "attn_pool.latent"}),
    *(
        rule
        for part in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")
        for rule in _both(f"attn_pool.{part}", f"attn_pool.{part}")
    ),
    *(
        rule
        for part in ("norm_pre", "norm", "fc_norm", "pre_logits.fc", "head", "head_dist")
        for rule in _both(part, part)
    ),
)


def _some_biases(sources: tuple[str, ...], target: str) -> tuple[Rule, ...]:
    """One bias of queries, keys and values, of which some are not there: zeros stand for these."""

    def rule(there: tuple[int, ...]) -> Rule:
        def make(*found: np.ndarray) -> Arrays:
            own = dict(zip(there, found, strict=True))
            return _rows(*(own.get(n, np.zeros_like(found[0])) for n in range(len(sources))))

        return Rule(tuple(sources[n] for n in there), (target,), make)

    every = range(len(sources))
    return tuple(rule(there) for size in (3, 2, 1) for there in itertools.combinations(every, size))


TIMM = Layout("timm's names (official DeiT, timm ViT, DINO)", ("blocks.0.attn.qkv.weight", "cls_token"), _TIMM)
TIMM_WITHOUT_CLASS_TOKEN = TIMM._replace(marks=("blocks.0.attn.qkv.weight", "patch_embed.proj.weight"))

_GAMMA = tuple(Rule((_BLOCK + f"gamma_{n}",), (_BLOCK + f"ls{n}.gamma",)) for n in "12")
DEIT3 = Layout("official DeiT-III", ("blocks.0.attn.qkv.weight", "blocks.0.gamma_1"), (*_GAMMA, *_TIMM), family="deit3")

_Q, _K, _V = (_BLOCK + f"attn.{name}" for name in "qkv")
_RELATIVE = "attn.relative_position_bias_table"
_EVA_RULES = (  # of timm, and of the projects of EVA-02 and BEiT; keys have no bias
    *_some_biases((f"{_Q}_bias", f"{_K}_bias", f"{_V}_bias"), _BLOCK + "attn.qkv.bias"),
    Rule(tuple(f"{name}_proj.weight" for name in (_Q, _K, _V)), (_BLOCK + "attn.qkv.weight",), _rows),
    *_some_biases(tuple(f"{name}_proj.bias" for name in (_Q, _K, _V)), _BLOCK + "attn.qkv.bias"),
    Rule((_BLOCK + _RELATIVE,), (_BLOCK + _RELATIVE,)),
    *_both(_BLOCK + "attn.inner_attn_ln", _BLOCK + "attn.norm"),
    *_both(_BLOCK + "mlp.ffn_ln", _BLOCK + "mlp.norm"),
    *_packed(_BLOCK + "mlp.w1", _BLOCK + "mlp.w2"),
    *_GAMMA,
    *_TIMM,
)
EVA = Layout(
    "an EVA or EVA-02 of timm's or its own names",
    ("blocks.0.attn.qkv.weight", "blocks.0.attn.q_bias"),
    _EVA_RULES,
    left_out={
        r"(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)": "the turns of rotary positions, which are computed",
        r"lm_head\..*": "a projection head of pretraining",
    },
    family="eva",
)
EVA_APART = EVA._replace(marks=("blocks.0.attn.q_proj.weight", "blocks.0.attn.v_proj.weight", "blocks.0.norm1.weight"))
BEIT = EVA._replace(
    name="a BEiT of timm's or its own names",
    marks=("blocks.0.attn.qkv.weight", "blocks.0." + _RELATIVE),
    left_out={
        r"blocks\.\d+\.attn\.relative_position_index": "numbers of the relative positions, which are computed",
        r"lm_head\..*": "a projection head of pretraining",
    },
    family="beit",
)


def _fold_class_position(cls_token: np.ndarray, positions: np.ndarray) -> Arrays:
    """Registers have no position: the class token takes its own in, and the patches keep theirs."""
    return cls_token.astype(np.float64) + positions[:, :1], positions[:, 1:]


NOT_THE_ENCODER = {  # in any layout
    r"(decoder|predictor)([._/].*)?|(decoder|predictor)_\w+(\..*)?": "a decoder of pretraining, not the encoder",
    r"mask_token|masked_embed|embeddings\.mask_token": "stands for masked patches in training",
    r"head\.\d+\..*": "a projection head of pretraining",
    r".*\.num_batches_tracked": "a count of batches",
}
DINO_HEADS = {
    r"(head\.(mlp|last_layer)\.|dino_head\.|ibot_head\.).*": "a projection head of DINO's training",
}
DINO = TIMM._replace(name="official DINO", left_out=DINO_HEADS, family="dino")


def _with_registers(*sources: str) -> Rule:
    """Class token, positions, registers."""
    made = lambda c, p, r: (*_fold_class_position(c, p), r)  # noqa: E731
    return Rule(sources, ("cls_token", "pos_embed", "reg_token"), made)


DINOV2 = Layout(
    "official DINOv2",
    ("blocks.0.ls1.gamma", "mask_token"),
    _TIMM,
    left_out=DINO_HEADS,
    family="dinov2",
    bicubic=Bicubic(offset=0.1),
)
DINOV2_REGISTERS = DINOV2._replace(
    name="official DINOv2 with registers",
    marks=("blocks.0.ls1.gamma", "mask_token", "register_tokens"),
    rules=(_with_registers("cls_token", "pos_embed", "register_tokens"), *_TIMM),
    bicubic=Bicubic(antialias=True),
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
}
_HF_PREFIXES = ("vit.", "deit.", "ijepa.", "dinov2.", "dinov2_with_registers.", "beit.", "data2vec_vision.")
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
    prefixes=_HF_PREFIXES,
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
IJEPA_5 = HUGGING_FACE_5._replace(  # no class token
    marks=("layers.0.attention.q_proj.weight", "embeddings.patch_embeddings.projection.weight"),
)


def _hugging_face_beit(layer: str, qkv: str, projection: str, fc1: str, fc2: str, table: str) -> tuple[Rule, ...]:
    """`qkv` with the names of queries, keys and values for {n}; keys have no bias."""
    names = qkv.split()
    return (
        Rule(tuple(f"{layer}{n}.weight" for n in names), (_BLOCK + "attn.qkv.weight",), _rows),
        *_some_biases(tuple(f"{layer}{n}.bias" for n in names), _BLOCK + "attn.qkv.bias"),
        Rule((f"{layer}{table}.relative_position_bias_table",), (_BLOCK + _RELATIVE,)),
        *(Rule((f"{layer}lambda_{n}",), (_BLOCK + f"ls{n}.gamma",)) for n in "12"),
        *_both("pooler.layernorm", "fc_norm"),
        *_hugging_face(layer.removesuffix("."), tuple(names), projection, fc1, fc2),
    )


_HF_BEIT = Layout(
    "Hugging Face BEiT",
    ("encoder.layer.0.attention.attention.query.weight", "encoder.layer.0.lambda_1"),
    _hugging_face_beit(
        "encoder.layer.{i}.",
        "attention.attention.query attention.attention.key attention.attention.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
        "attention.attention.relative_position_bias",
    ),
    left_out={
        r".*relative_position_index": "numbers of the relative positions, which are computed",
        r"(lm_head|layernorm_lm)\..*": "a projection head of pretraining",
    },
    prefixes=_HF_PREFIXES,
    norm_eps=1e-12,
    family="beit_hf",
)
_HF_BEIT_5 = _HF_BEIT._replace(
    name="Hugging Face BEiT (names of transformers 5)",
    marks=("layers.0.attention.q_proj.weight", "layers.0.lambda_1"),
    rules=_hugging_face_beit(
        "layers.{i}.",
        "attention.q_proj attention.k_proj attention.v_proj",
        "attention.o_proj",
        "mlp.fc1",
        "mlp.fc2",
        "relative_position_bias",
    ),
)


def _without_scale(layout: Layout) -> Layout:
    """The same of a model without LayerScale, told by its relative positions."""
    table = next(rule.sources[0] for rule in layout.rules if rule.targets == (_BLOCK + _RELATIVE,))
    return layout._replace(marks=(layout.marks[0], table.replace("{i}", "0")))


HUGGING_FACE_BEIT = (_HF_BEIT, _without_scale(_HF_BEIT), _HF_BEIT_5, _without_scale(_HF_BEIT_5))


def _hugging_face_dinov2(qkv: tuple[str, ...], projection: str) -> tuple[Rule, ...]:
    layer = "encoder.layer.{i}."
    return (
        _with_registers("embeddings.cls_token", "embeddings.position_embeddings", "embeddings.register_tokens"),
        *_rename(cls_token="embeddings.cls_token", pos_embed="embeddings.position_embeddings"),
        *_both("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        *(
            Rule(tuple(f"{layer}{n}.{leaf}" for n in qkv), (_BLOCK + f"attn.qkv.{leaf}",), _rows)
            for leaf in ("weight", "bias")
        ),
        *_both(layer + projection, _BLOCK + "attn.proj"),
        *(rule for n in "12" for rule in _both(layer + f"norm{n}", _BLOCK + f"norm{n}")),
        *(Rule((layer + f"layer_scale{n}.lambda1",), (_BLOCK + f"ls{n}.gamma",)) for n in "12"),
        *(rule for n in "12" for rule in _both(layer + f"mlp.fc{n}", _BLOCK + f"mlp.fc{n}")),
        *_both(layer + "mlp.weights_in", _BLOCK + "mlp.fc1"),
        *_both(layer + "mlp.weights_out", _BLOCK + "mlp.fc2"),
        *_packed(layer + "mlp.gate_proj", layer + "mlp.up_proj"),
        *_both(layer + "mlp.down_proj", _BLOCK + "mlp.fc2"),
        *_both("layernorm", "norm"),
        Rule(("classifier.weight",), ("head.weight", "head_mean.weight"), lambda x: tuple(np.split(x, 2, axis=1))),
        Rule(("classifier.bias",), ("head.bias",)),
    )


_HF_DINOV2 = Layout(
    "Hugging Face DINOv2",
    ("encoder.layer.0.layer_scale1.lambda1", "encoder.layer.0.attention.attention.query.weight"),
    _hugging_face_dinov2(
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"), "attention.output.dense"
    ),
    prefixes=_HF_PREFIXES,
    family="dinov2",
    any_image=True,
)
_HF_DINOV2_5 = _HF_DINOV2._replace(
    name="Hugging Face DINOv2 (names of transformers 5)",
    marks=("encoder.layer.0.layer_scale1.lambda1", "encoder.layer.0.attention.q_proj.weight"),
    rules=_hugging_face_dinov2(("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention.o_proj"),
)


def _registered(layout: Layout) -> Layout:
    """Its model with registers, which interpolates in another way."""
    name = layout.name.replace("DINOv2", "DINOv2 with registers")
    return layout._replace(
        name=name, marks=(*layout.marks, "embeddings.register_tokens"), bicubic=Bicubic(antialias=True)
    )


HUGGING_FACE_DINOV2 = (_registered(_HF_DINOV2), _HF_DINOV2, _registered(_HF_DINOV2_5), _HF_DINOV2_5)


def _patches(x: np.ndarray) -> Arrays:
    """A convolution over patches; a matrix or 1x1 convolution over their pixels (p1 p2 c) becomes one."""
    if x.ndim == 4 and x.shape[2:] != (1, 1):
        return (x,)
    patch = round((x.shape[1] / 3) ** 0.5)
    return (x.reshape(len(x), patch, patch, 3).transpose(0, 3, 1, 2),)


_TOWER = "encoder.layers.{i}."
_TOWER_RULES = (
    Rule(("embeddings.class_embedding",), ("cls_token",), lambda x: (x[None, None],)),
    Rule(("embeddings.position_embedding.weight",), ("pos_embed",), lambda x: (x[None],)),
    Rule(("embeddings.patch_embedding.weight",), ("patch_embed.proj.weight",), _patches),
    Rule(("embeddings.patch_embedding.bias",), ("patch_embed.proj.bias",)),
    *_both("pre_layrnorm", "norm_pre"),
    *_both(_TOWER + "layer_norm1", _BLOCK + "norm1"),
    *(
        Rule(tuple(_TOWER + f"self_attn.{n}_proj.{leaf}" for n in "qkv"), (_BLOCK + f"attn.qkv.{leaf}",), _rows)
        for leaf in ("weight", "bias")
    ),
    *_both(_TOWER + "self_attn.out_proj", _BLOCK + "attn.proj"),
    *_both(_TOWER + "layer_norm2", _BLOCK + "norm2"),
    *_both(_TOWER + "mlp.fc1", _BLOCK + "mlp.fc1"),
    *_both(_TOWER + "mlp.fc2", _BLOCK + "mlp.fc2"),
    *_both("post_layernorm", "norm"),
    *_rename(**{"attn_pool.latent": "head.probe", "projection.weight": "visual_projection.weight"}),
    *(
        Rule(
            (f"head.attention.in_proj_{leaf}",),
            (f"attn_pool.q.{leaf}", f"attn_pool.kv.{leaf}"),
            lambda x: (x[: len(x) // 3], x[len(x) // 3 :]),
        )
        for leaf in ("weight", "bias")
    ),
    *_both("head.attention.out_proj", "attn_pool.proj"),
    *_both("head.layernorm", "attn_pool.norm"),
    *_both("head.mlp.fc1", "attn_pool.mlp.fc1"),
    *_both("head.mlp.fc2", "attn_pool.mlp.fc2"),
)
CLIP = Layout(
    "Hugging Face CLIP, the image tower",
    ("embeddings.patch_embedding.weight", "pre_layrnorm.weight", "encoder.layers.0.self_attn.q_proj.weight"),
    _TOWER_RULES,
    left_out={
        r"text_model\..*|text_projection\..*|logit_scale|logit_bias": "the half for texts",
        r"(vision_model\.)?embeddings\.position_ids": "numbers of the positions",
    },
    prefixes=("vision_model.",),
    activation="",  # quick_gelu of OpenAI, gelu of others
    norm_eps=1e-5,
    family="clip",
)
SIGLIP = CLIP._replace(
    name="Hugging Face SigLIP, the image tower",
    marks=("embeddings.patch_embedding.weight", "post_layernorm.weight", "encoder.layers.0.self_attn.q_proj.weight"),
    activation="gelu_tanh",
    norm_eps=1e-6,
    family="siglip",
)
SIGLIP_CLASSIFIER = SIGLIP._replace(
    name="Hugging Face SigLIP with a classifier",
    marks=(*SIGLIP.marks, "classifier.weight"),
    rules=(*(r for r in _TOWER_RULES if not r.sources[0].startswith("head.")), *_both("classifier", "head")),
    left_out={**SIGLIP.left_out, r"(vision_model\.)?head\..*": "attention pooling, which the classifier does not read"},
)

_RES = "transformer.resblocks.{i}."
_TEXTS = {
    r"(.*\.)?(text|transformer|token_embedding|text_projection|ln_final|text_decoder)[._].*|"
    r"(.*\.)?(text_projection|positional_embedding|cls_emb|logit_scale|logit_bias)": "the half for texts",
    r"input_resolution|context_length|vocab_size": "numbers of the model's sizes",
}
OPEN_CLIP = Layout(  # https://github.com/openai/CLIP, clip/model.py; open_clip's transformer.py has the same names
    "the image tower of a CLIP of OpenAI's or open_clip's names",
    ("class_embedding", "conv1.weight", "transformer.resblocks.0.attn.in_proj_weight"),
    (
        Rule(("class_embedding",), ("cls_token",), lambda x: (x[None, None],)),
        Rule(("positional_embedding",), ("pos_embed",), lambda x: (x[None],)),
        *_both("conv1", "patch_embed.proj"),
        *_both("ln_pre", "norm_pre"),
        *(rule for n in "12" for rule in _both(_RES + f"ln_{n}", _BLOCK + f"norm{n}")),
        *(Rule((_RES + f"attn.in_proj_{leaf}",), (_BLOCK + f"attn.qkv.{leaf}",)) for leaf in ("weight", "bias")),
        *_both(_RES + "attn.out_proj", _BLOCK + "attn.proj"),
        *_both(_RES + "mlp.c_fc", _BLOCK + "mlp.fc1"),
        *_both(_RES + "mlp.c_proj", _BLOCK + "mlp.fc2"),
        *(Rule((_RES + f"ls_{n}.gamma",), (_BLOCK + f"ls{n}.gamma",)) for n in "12"),
        *_both("ln_post", "norm"),
        Rule(("proj",), ("projection.weight",), lambda x: (x.T,)),
    ),
    beside=_TEXTS,
    activation="",
    norm_eps=1e-5,
    family="clip",
)
TRUNK = "trunk."
OPEN_CLIP_TIMM = TIMM._replace(  # open_clip's timm_model.py
    name="the image tower of open_clip, a model of timm",
    marks=(TRUNK + "blocks.0.attn.qkv.weight", TRUNK + "patch_embed.proj.weight"),
    rules=(
        *(rule._replace(sources=tuple(TRUNK + source for source in rule.sources)) for rule in _EVA_RULES),
        Rule(("head.proj.weight",), ("projection.weight",)),
    ),
    beside=_TEXTS,
    family="clip",
)
OPEN_CLIP_TIMMS = (  # EVA-CLIP has layers of their own for queries, keys and values
    OPEN_CLIP_TIMM,
    OPEN_CLIP_TIMM._replace(marks=(TRUNK + "blocks.0.attn.q_proj.weight", TRUNK + "patch_embed.proj.weight")),
)


_D3 = "layer.{i}."
DINOV3 = Layout(
    "Hugging Face DINOv3",
    ("embeddings.patch_embeddings.weight", "layer.0.attention.k_proj.weight", "embeddings.register_tokens"),
    (
        *_rename(cls_token="embeddings.cls_token", reg_token="embeddings.register_tokens"),
        *_both("embeddings.patch_embeddings", "patch_embed.proj"),
        *_both(_D3 + "norm1", _BLOCK + "norm1"),
        Rule(tuple(f"{_D3}attention.{n}_proj.weight" for n in "qkv"), (_BLOCK + "attn.qkv.weight",), _rows),
        *_some_biases(tuple(f"{_D3}attention.{n}_proj.bias" for n in "qkv"), _BLOCK + "attn.qkv.bias"),
        *_both(_D3 + "attention.o_proj", _BLOCK + "attn.proj"),
        *(Rule((f"{_D3}layer_scale{n}.lambda1",), (_BLOCK + f"ls{n}.gamma",)) for n in "12"),
        *_both(_D3 + "norm2", _BLOCK + "norm2"),
        *_packed(_D3 + "mlp.gate_proj", _D3 + "mlp.up_proj"),
        *_both(_D3 + "mlp.up_proj", _BLOCK + "mlp.fc1"),
        *_both(_D3 + "mlp.down_proj", _BLOCK + "mlp.fc2"),
        *_both("norm", "norm"),
    ),
    left_out={r"rope_embeddings\.inv_freq": "frequencies that follow from rope_theta"},
    prefixes=("model.",),
    norm_eps=1e-5,
    rotary=100.0,
    family="dinov3",
    any_image=True,
)

_QKV = _BLOCK + "attn.qkv."
PERIODS = "rope_embed.periods"  # of rotary positions; detect.read_periods takes them out
DINOV3_OWN = Layout(
    "official DINOv3",
    ("blocks.0.attn.qkv.weight", PERIODS),
    (
        *_rename(reg_token="storage_tokens"),
        Rule((_QKV + "bias", _QKV + "bias_mask"), (_QKV + "bias",), lambda bias, there: (np.where(there, bias, 0),)),
        *_packed(_BLOCK + "mlp.w1", _BLOCK + "mlp.w2"),
        Rule((PERIODS,), (PERIODS,)),
        *_TIMM,
    ),
    left_out={r"local_cls_norm\..*": "a norm for the small crops of its training"} | DINO_HEADS,
    norm_eps=1e-5,
    rotary=100.0,
    family="dinov3",
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


def _flax_patches(x: np.ndarray) -> Arrays:
    """[rows, columns, C, D], or of NaFlex [(rows columns C), D], -> [D, C, rows, columns]."""
    return (x.transpose(3, 2, 0, 1),) if x.ndim == 4 else _patches(x.T)


def _flax_matrix(x: np.ndarray) -> Arrays:
    """[D, H, Q] -> [H * Q, D]."""
    return (x.reshape(len(x), -1).T,)


def _flax_block(norm1: str, attention: str, norm2: str, mlp: str) -> tuple[Rule, ...]:
    block = "Transformer/encoderblock_{i}/"
    a = block + attention
    return (
        *_flax_norm(block + norm1, _BLOCK + "norm1"),
        Rule(
            tuple(f"{a}/{n}/kernel" for n in ("query", "key", "value")),
            (_BLOCK + "attn.qkv.weight",),
            lambda *parts: _rows(*(_flax_matrix(p)[0] for p in parts)),
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


def _flax_pool() -> tuple[Rule, ...]:
    """big_vision's MAPHead, attention pooling."""
    a = "MAPHead_0/MultiHeadDotProductAttention_0"
    return (
        *_rename(**{"attn_pool.latent": "MAPHead_0/probe"}),
        Rule((f"{a}/query/kernel",), ("attn_pool.q.weight",), _flax_matrix),
        Rule((f"{a}/query/bias",), ("attn_pool.q.bias",), lambda x: (x.reshape(-1),)),
        Rule(
            (f"{a}/key/kernel", f"{a}/value/kernel"),
            ("attn_pool.kv.weight",),
            lambda *parts: _rows(*(_flax_matrix(p)[0] for p in parts)),
        ),
        Rule(
            (f"{a}/key/bias", f"{a}/value/bias"),
            ("attn_pool.kv.bias",),
            lambda *parts: _rows(*(p.reshape(-1) for p in parts)),
        ),
        Rule((f"{a}/out/kernel",), ("attn_pool.proj.weight",), lambda x: (x.reshape(-1, x.shape[-1]).T,)),
        Rule((f"{a}/out/bias",), ("attn_pool.proj.bias",)),
        *_flax_norm("MAPHead_0/LayerNorm_0", "attn_pool.norm"),
        *(r for n in "01" for r in _flax_linear(f"MAPHead_0/MlpBlock_0/Dense_{n}", f"attn_pool.mlp.fc{int(n) + 1}")),
    )


def _flax(blocks: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return (
        *_rename(cls_token="cls"),
        Rule(("Transformer/posembed_input/pos_embedding",), ("pos_embed",)),
        Rule(("pos_embedding",), ("pos_embed",), lambda x: (x.reshape(1, -1, x.shape[-1]),)),  # [rows, columns, D], too
        Rule(("embedding/kernel",), ("patch_embed.proj.weight",), _flax_patches),
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
    rules=(
        *_flax(_flax_block("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")),
        *_flax_pool(),
    ),
    beside={
        r"(.*/)?txt/.*": "the half for texts",
        r"(.*/)?[tb]": "temperature and bias of the loss",
        r"(.*/)?opt/.*": "the optimizer",
        r"chrono/.*": "times of the training",
    },
)


def _nvit_rows(*parts: np.ndarray) -> Arrays:
    """Q, K, V of [q, e, h], each times its head's mask [h, 1] -> rows (h q)."""
    mask = parts[-1][:, 0]
    return _rows(*((p * mask).transpose(2, 0, 1).reshape(-1, p.shape[1]) for p in parts[:-1]))


def _nvit_biases(*parts: np.ndarray) -> Arrays:
    return _rows(*(p.T.reshape(-1) for p in parts))


def _nvit(attention: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return (
        Rule(("patch_embed.proj.weight",), ("patch_embed.proj.weight",), _patches),
        *attention,
        *(rule for rule in _TIMM if "qkv" not in rule.sources[0]),
    )


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
    *OPEN_CLIP_TIMMS,
    NVIT_PRUNED,
    NVIT_DENSE,
    DINOV3_OWN,
    BEIT,
    EVA,
    EVA_APART,
    DEIT3,
    DINOV2_REGISTERS,
    DINOV2,
    TIMM,
    TIMM_WITHOUT_CLASS_TOKEN,
    *HUGGING_FACE_DINOV2,
    *HUGGING_FACE_BEIT,
    HUGGING_FACE,
    HUGGING_FACE_5,
    OPEN_CLIP,
    CLIP,
    SIGLIP_CLASSIFIER,
    SIGLIP,
    DINOV3,
    IJEPA_5,
    TORCHVISION,
    VISION_TRANSFORMER,
    BIG_VISION,
)
