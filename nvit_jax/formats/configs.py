"""What lies beside the weights and says what they are: config.json of timm and Hugging Face, and arguments of training.

Every setting is one that is built, or one that changes nothing, or named in a UserError: none is passed over.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from nvit_jax.errors import UserError
from nvit_jax.formats import families
from nvit_jax.formats.facts import Facts, read_beside
from nvit_jax.formats.families import TOWERS
from nvit_jax.formats.published import architecture
from nvit_jax.model import sizes
from nvit_jax.model.sizes import Size


class Said(NamedTuple):
    """What is stated of a model; None where nothing is."""

    heads: int | None = None
    activation: str | None = None
    norm_eps: float | None = None
    qk_norm: bool | None = None
    rotary: bool | None = None  # whether there are rotary positions
    rotary_base: float | None = None
    pool: str | None = None  # as in ViTDims
    mean_over: str | None = None
    norm_after_pool: bool = False  # the tensors are named alike
    image: Size | None = None
    usual_image: Size | None = None  # of evaluation, where any size will do
    classes: tuple[str, ...] = ()  # names, in the order of the logits
    architecture: str | None = None  # timm's name
    arguments: Mapping[str, Any] = {}  # timm's, beside that name
    sizes: Mapping[str, Any] = {}  # ViTDims' field -> what is stated of it
    publisher: str | None = None  # "timm", "transformers", "open_clip": whose config it is
    kind: str | None = None  # Hugging Face's model_type
    notes: tuple[str, ...] = ()


_ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_tanh", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
    **{name: name for name in ("quick_gelu", "relu", "silu")},
    "swish": "silu",
    "quickgelu": "quick_gelu",
}
POOLS = {"token": "class", "avg": "mean", **{name: name for name in ("max", "avgmax", "map")}}
_POOL_NAMES = {"prr": "attention of patches", "": "none"}


def read_config(path: pathlib.Path, extra: Mapping[str, Any]) -> Said:
    """What config.json beside a checkpoint states, else the arguments of its training that lie in the file.

    UserError for wrong types, for what is not built, and for settings that are not known.
    """
    config = read_beside(path, "config.json")
    if config is None or not _is_model(config):
        said = _trained(Facts(extra, f"{path}"))
        passed = () if config is None else (f"{config.where} is not of timm or Hugging Face, and passed over",)
        return said._replace(notes=said.notes + passed)
    kind = config.get("model_type", str)
    if kind in TOWERS:
        return _tower(config, kind)
    families.check_type(config)
    if (
        kind == "timm_wrapper"
        or "architecture" in config.values
        or "model_args" in config.values
        or (kind is None and not _HF_MARKS & config.values.keys())
    ):
        return _timm(config)
    known = _HF_READ | _HF_HARMLESS | _HF_GENERIC
    if kind in _DINOV2_TYPES:
        known = known | _HF_DINOV2
    if kind in _BEIT_TYPES:
        known = known | _HF_BEIT
        config = Facts(_BEIT_DEFAULTS | {k: v for k, v in config.values.items() if v is not None}, config.where)
    if kind == "dinov3_vit":
        known = known | _DINOV3_READ | _DINOV3_HARMLESS
        config = Facts(_DINOV3_DEFAULTS | {k: v for k, v in config.values.items() if v is not None}, config.where)
    check_known(config, known, _HF_MUST_BE)
    return _hugging_face(config, kind)


_HF_MARKS = {"hidden_size", "num_attention_heads", "hidden_act", "layer_norm_eps", "num_hidden_layers", "architectures"}


def _is_model(config: Facts) -> bool:
    marks = {"model_type", "architecture", "model_args", "pretrained_cfg", "id2label", "label_names", "global_pool"}
    return bool((marks | _HF_MARKS | _TIMM_READ) & config.values.keys())


def activation_in(facts: Facts, key: str) -> str | None:
    """The activation as ViTDims names it, None where it is missing. UserError for one that is not built."""
    name = facts.get(key, str)
    if not name:
        return None
    if name.lower() not in _ACTIVATIONS:
        shown = ", ".join(sorted(set(_ACTIVATIONS.values())))
        raise UserError(f"{facts.where}: {key}={name!r} is no activation that is built; those are {shown}")
    return _ACTIVATIONS[name.lower()]


def size_in(facts: Facts, key: str) -> Size | None:
    """One number, or height and width; of [channels, height, width] the last two."""
    value = facts.get(key, int, list)
    if isinstance(value, list):
        if len(value) not in (1, 2, 3) or any(not isinstance(x, int) or isinstance(x, bool) for x in value):
            raise UserError(f"{facts.where}: {key}={value} is not a size")
        value = sizes.one(*value[-2:]) if len(value) > 1 else value[0]
    size: Size | None = value
    if size is not None and min(sizes.sides(size)) < 1:
        raise UserError(f"{facts.where}: {key}={value} must be at least 1")
    return size


def check_known(facts: Facts, known: set[str], must_be: Mapping[str, tuple[Any, ...]]) -> None:
    """UserError for a setting of another value than it `must_be`, and for one that is not known and says something."""
    for key, value in facts.values.items():
        if key in must_be and value not in must_be[key]:
            raise UserError(f"{facts.where}: {key}={_shown(value)} is not built")
        if key not in known and key not in must_be and not str(key).startswith("_") and value not in _NOTHING:
            raise UserError(
                f"{facts.where}: {key}={_shown(value)} is a setting that is not known here; remove it from the file if "
                "the function does not depend on it"
            )


_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------------------------------------- timm

_TIMM_READ = {
    *("num_heads", "act_layer", "img_size", "patch_size", "embed_dim", "depth", "in_chans", "num_classes"),
    *("fc_norm", "pool_include_prefix", "class_token", "reg_tokens", "pre_norm", "use_rot_pos_emb"),
}
_TIMM_SHAPES = {  # told by tensors
    *("mlp_ratio", "qk_norm", "qkv_bias", "proj_bias", "init_values", "no_embed_class", "global_pool"),
    *("qkv_fused", "swiglu_mlp", "scale_mlp", "scale_attn_inner", "use_abs_pos_emb", "use_rel_pos_bias"),  # EVA, BEiT
    *("num_reg_tokens", "use_fc_norm", "scale_attn_norm", "scale_mlp_norm"),
}
_TIMM_HARMLESS = {
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "device", "dtype"),
    *("scriptable", "exportable", "no_jit", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("pretrained_strict", "checkpoint_path", "cache_dir", "drop_block_rate", "bn_eps", "bn_momentum"),
}
_TIMM_MUST_BE: dict[str, tuple[Any, ...]] = {
    "pos_embed": ("learn",),
    "final_norm": (True, None),
    "norm_layer": (None, "", "layernorm", "LayerNorm"),
    "embed_layer": (None, "", "PatchEmbed", "patch_embed"),
    "block_fn": (None, "", "Block", "block"),
    "mlp_layer": (None, "", "Mlp", "mlp"),
    "attn_layer": (None, "", "Attention", "attn", "attention"),
    **dict.fromkeys(("features_only", "use_post_norm", "use_shared_rel_pos_bias"), (False, None)),
    "ref_feat_shape": ((16, 16), [16, 16], 16, None),  # rotary positions are EVA-02's
    "rope_type": ("cat", None),
    "rope_temperature": (10000, None),
    "attn_type": ("eva", None),
    **dict.fromkeys(("embed_norm_layer", "out_indices"), (None, "")),
}
_TIMM_BESIDE = {  # the rest of its config.json
    *("architecture", "model_args", "pretrained_cfg", "num_features", "label_names", "label_descriptions", "labels"),
    *("hf_hub_id", "hf_hub_filename", "hf_hub_revision", "url", "file", "source", "tag", "license", "description"),
    *("origin_url", "paper_name", "paper_ids", "notes", "tags", "library_name", "model_name", "do_pooling"),
}


def _timm(config: Facts) -> Said:
    """Its `model_args` decide; without them the architecture's name does, see `published`."""
    arguments = config.inner("model_args")
    check_known(config, _TIMM_BESIDE | _TIMM_READ | _TIMM_SHAPES | _HF_GENERIC | _TIMM_HARMLESS, _TIMM_MUST_BE)
    check_known(arguments, _TIMM_READ | _TIMM_SHAPES | _TIMM_HARMLESS, _TIMM_MUST_BE)
    both = Facts(dict(config.values) | dict(arguments.values), config.where)
    cfg = config.inner("pretrained_cfg")
    name = config.get("architecture", str) or cfg.get("architecture", str)
    image, usual = size_in(both, "img_size"), size_in(cfg, "input_size")
    if image is None and isinstance(usual, tuple):  # timm builds what pretrained_cfg says
        image = usual
    labels = config.get("label_names", list) or cfg.get("label_names", list) or ()
    found = _arguments(both)
    return found._replace(
        image=image,
        usual_image=usual if image is None else image,
        classes=tuple(str(label) for label in labels) or _class_names(config),
        architecture=name,
        arguments=dict(arguments.values),
        publisher="timm" if name else None,
    )


def _arguments(facts: Facts) -> Said:
    """timm's arguments of a Vision Transformer."""
    pool = facts.get("global_pool", str)
    if pool is not None and pool not in POOLS:
        what = f" (pooling by {_POOL_NAMES[pool]})" if pool in _POOL_NAMES else ""
        raise UserError(f"{facts.where}: global_pool={pool!r}{what} is not built; {', '.join(POOLS)} are")
    stated = {"embed": facts.get("embed_dim", int), "depth": facts.get("depth", int)}
    stated |= {"patch": size_in(facts, "patch_size"), "channels": facts.get("in_chans", int)}
    stated["registers"] = facts.get("reg_tokens", int)
    stated["pre_norm"] = facts.get("pre_norm", bool)
    return Said(
        heads=facts.at_least_one("num_heads"),
        activation=activation_in(facts, "act_layer"),
        qk_norm=facts.get("qk_norm", bool),
        rotary=facts.get("use_rot_pos_emb", bool),
        pool=None if pool is None else POOLS[pool],
        mean_over="all" if facts.get("pool_include_prefix", bool) else None,
        sizes={k: v for k, v in stated.items() if v is not None},
    )


def _trained(extra: Facts) -> Said:
    """The arguments of a training script, as DeiT and timm store them in their checkpoints."""
    arguments = extra.values.get("args")
    arguments = Facts(vars(arguments) if hasattr(arguments, "__dict__") else arguments or {}, f"{extra.where}: args")
    if not isinstance(arguments.values, Mapping):
        return Said()
    names = [arguments.values.get("model"), extra.values.get("arch")]
    name = next((a for n in names if isinstance(n, str) and (a := architecture(n))), None)
    given = arguments.values.get("model_kwargs")
    given = dict(given) if isinstance(given, Mapping) else {}
    if name and arguments.values.get("gp"):
        given.setdefault("global_pool", arguments.values["gp"])
    facts = Facts(given, f"{extra.where}: args.model_kwargs")
    check_known(facts, _TIMM_READ | _TIMM_SHAPES | _TIMM_HARMLESS, _TIMM_MUST_BE)
    return _arguments(facts)._replace(architecture=name, arguments=given)


# -------------------------------------------------------------------------------------------- Hugging Face

_HF_READ = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("image_size", "patch_size", "num_channels", "qkv_bias", "id2label", "label2id", "model_type", "architectures"),
    "head_dim",
}
_HF_HARMLESS = {
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "encoder_stride", "drop_path_rate"),
    *("pooler_output_size", "pooler_act", "use_mask_token", "add_pooling_layer"),
    *("decoder_hidden_size", "decoder_intermediate_size", "decoder_num_attention_heads", "decoder_num_hidden_layers"),
    *("mask_ratio", "norm_pix_loss"),
}
_HF_DINOV2 = {  # of these models alone; what is not read is told by the tensors, or of backbones
    *("mlp_ratio", "use_swiglu_ffn", "num_register_tokens", "layerscale_value", "apply_layernorm", "out_features"),
    *("reshape_hidden_states", "out_indices", "stage_names"),
}
_HF_GENERIC = {  # of every configuration of transformers, most of them for text
    *("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "num_labels", "num_classes"),
    *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "return_dict", "use_cache"),
    *("output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "tf_legacy_loss", "auto_map"),
    *("tie_word_embeddings", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "gradient_checkpointing"),
    *("cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder", "max_length", "min_length"),
    *("do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k"),
    *("top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids"),
    *("encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores", "return_dict_in_generate", "prefix"),
    *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
    *("suppress_tokens", "begin_suppress_tokens", "tokenizer_class", "bos_token_id", "pad_token_id", "eos_token_id"),
    *("sep_token_id", "decoder_start_token_id", "name_or_path", "attn_implementation", "loss_type", "padding"),
}
_HF_MUST_BE: dict[str, tuple[Any, ...]] = {
    "pruned_heads": (None, {}, []),
    "quantization_config": (None, {}),
    "interpolate_antialias": (True, None),  # of DINOv2 with registers
    "interpolate_offset": (0.0, None),
    "use_shared_relative_position_bias": (False, None),  # of BEiT, in its pretraining
}


_BEIT_TYPES = ("beit", "data2vec-vision")
_HF_BEIT = {  # told by the tensors, or of other tasks
    *("use_absolute_position_embeddings", "use_relative_position_bias", "layer_scale_init_value", "use_mean_pooling"),
    *("vocab_size", "pool_scales", "out_features", "out_indices", "stage_names", "add_fpn", "reshape_hidden_states"),
    *("use_auxiliary_head", "auxiliary_loss_weight", "auxiliary_channels", "auxiliary_num_convs"),
    *("auxiliary_concat_input", "semantic_loss_ignore_index"),
}
_BEIT_DEFAULTS = {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "use_mean_pooling": True}  # of its classes

_DINOV3_READ = {"rope_theta", "num_register_tokens", "use_gated_mlp"}
_DINOV3_HARMLESS = {
    *("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias", "layerscale_value"),  # told by tensors
    *("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale", "attention_dropout"),  # of training
    *("apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names"),  # of a backbone
}
_DINOV3_DEFAULTS = {  # of its class
    "num_attention_heads": 6,
    "image_size": 224,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
}


def _hugging_face(config: Facts, kind: str | None) -> Said:
    config.get("qkv_bias", bool)
    eps = config.get("layer_norm_eps", float, int)
    if eps is not None and not 0 <= eps < 1:
        raise UserError(f"{config.where}: layer_norm_eps={eps} must be at least 0 and below 1")
    stated: dict[str, Any] = {
        "embed": config.at_least_one("hidden_size"),
        "depth": config.at_least_one("num_hidden_layers"),
        "mlp": config.at_least_one("intermediate_size"),
        "patch": size_in(config, "patch_size"),
        "channels": config.at_least_one("num_channels"),
        "qk": None if kind == "dinov3_vit" else config.at_least_one("head_dim"),
        "registers": config.get("num_register_tokens", int) if kind == "dinov3_vit" else None,
    }
    base = config.get("rope_theta", float, int) if kind == "dinov3_vit" else None
    if base is not None and not 1 <= base < 1e12:
        raise UserError(f"{config.where}: rope_theta={base} must be from 1 to 1e12")
    activation = activation_in(config, "hidden_act")
    if kind in _DINOV2_TYPES:
        stated |= _dinov2(config)
        activation = "silu" if stated["gated"] else activation  # whatever hidden_act says
    if kind == "dinov3_vit":
        stated["gated"] = config.get("use_gated_mlp", bool)
    heads, pool = config.at_least_one("num_attention_heads"), None
    if kind in _BEIT_TYPES:
        pool = "mean" if config.get("use_mean_pooling", bool) else "class"
    return Said(
        heads=12 if heads is None and kind is not None else heads,  # the classes' own default
        activation=activation,
        norm_eps=None if eps is None else float(eps),
        rotary_base=None if base is None else float(base),
        pool=pool,
        image=size_in(config, "image_size"),
        classes=_class_names(config),
        sizes={k: v for k, v in stated.items() if v is not None},
        publisher="transformers" if kind is not None else None,
        kind=kind,
    )


_SIGLIP_DEFAULTS = {"num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_TOWER_DEFAULTS = {  # of the classes
    "clip_vision_model": {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": _SIGLIP_DEFAULTS,
    "siglip2_vision_model": _SIGLIP_DEFAULTS,
}
_TOWER_READ = {"projection_dim", "vision_use_head", "num_patches"}
_TOWER_HARMLESS = {"attention_dropout", "dropout", "initializer_factor"}
_BOTH_HALVES = {"text_config", "vision_config", "text_config_dict", "vision_config_dict", "projection_dim"}
_BOTH_HARMLESS = {"logit_scale_init_value", "initializer_factor", "initializer_range"}


def _tower(config: Facts, kind: str) -> Said:
    """The image half of CLIP or SigLIP, alone or beside a model of texts."""
    names = config.get("architectures", list) or []
    if "CLIPForImageClassification" in names:
        raise UserError(
            f"{config.where}: CLIPForImageClassification pools tokens without a norm behind the blocks, which is not "
            "built; CLIPModel and its image towers are"
        )
    whole = config
    if kind in ("clip", "siglip", "siglip2"):
        check_known(config, _BOTH_HALVES | _BOTH_HARMLESS | _HF_GENERIC, _HF_MUST_BE)
        inner = dict(config.inner("vision_config").values) | dict(config.inner("vision_config_dict").values)
        config = Facts(inner, f"{config.where}: vision_config")
    known = _HF_READ | _HF_HARMLESS | _HF_GENERIC | _TOWER_READ | _TOWER_HARMLESS
    check_known(config, known, _HF_MUST_BE)
    said = _hugging_face(Facts(_TOWER_DEFAULTS[TOWERS[kind]] | dict(config.values), config.where), kind)
    notes = []
    if config.get("vision_use_head", bool) is False:
        notes.append(f"{config.where}: vision_use_head=False gives out tokens; the mean of them is taken here")
    if TOWERS[kind] == "siglip2_vision_model":
        notes.append(f"{config.where}: a model for images of any shape (NaFlex) is taken for squares of its own grid")
    return said._replace(classes=_class_names(whole), notes=tuple(notes))


_DINOV2_TYPES = ("dinov2", "dinov2_with_registers")


def _dinov2(config: Facts) -> dict[str, int | None]:
    """Its mlp's width is a ratio; with SwiGLU two thirds of that, up to a multiple of 8."""
    gated = bool(config.get("use_swiglu_ffn", bool))
    embed, ratio = config.at_least_one("hidden_size"), config.get("mlp_ratio", int, float)
    hidden = None if embed is None or ratio is None else int(embed * ratio)
    if hidden is not None and gated:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    return {"mlp": hidden, "gated": gated, "registers": config.get("num_register_tokens", int)}


def _class_names(config: Facts) -> tuple[str, ...]:
    """`id2label` in the order of its numbers, which may begin anywhere."""
    labels = config.inner("id2label").values
    try:
        order = sorted(labels, key=int)
    except ValueError as error:
        raise UserError(f"{config.where}: a key of id2label is no number ({error})") from error
    if len({int(key) for key in order}) < len(order):
        raise UserError(f"{config.where}: id2label has one number twice")
    return tuple(str(labels[key]) for key in order)
