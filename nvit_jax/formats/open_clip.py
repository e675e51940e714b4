"""What is known of a CLIP of OpenAI's or open_clip's names: open_clip_config.json beside it, else what is published.

The settings are those of open_clip's CLIPVisionCfg and TimmModel, with their defaults.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from nvit_jax.errors import UserError
from nvit_jax.formats import families, layouts
from nvit_jax.formats.canonical import Canonical
from nvit_jax.formats.configs import POOLS, Said, check_known, read_config, size_in
from nvit_jax.formats.facts import Facts, read_beside
from nvit_jax.formats.published import architecture, clip_tower

CONFIG = "open_clip_config.json"
_MODEL = {
    *(
        "embed_dim",
        "vision_cfg",
        "text_cfg",
        "multimodal_cfg",
        "quick_gelu",
        "custom_text",
        "cast_dtype",
        "output_dict",
    ),
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
}
_VISION = {
    *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "no_ln_pre", "final_ln_after_pool"),
    *("pool_type", "act_kwargs", "norm_kwargs", "timm_model_name", "timm_pool", "timm_proj", "timm_proj_bias"),
}
_HARMLESS = {  # of training, of texts, or told by tensors
    *("patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "output_tokens", "ls_init_value", "pos_embed_type"),
    *("timm_model_pretrained", "timm_drop", "timm_drop_path"),
}
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "block_type": (None, "default", "custom"),
    "timm_proj": (None, "", "none", "linear"),
    **dict.fromkeys(("attentional_pool", "qk_norm", "scaled_cosine_attn", "scale_heads"), (None, False)),
    **dict.fromkeys(("scale_attn_inner", "scale_attn", "scale_fc", "timm_proj_bias"), (None, False)),
    **dict.fromkeys(("input_patchnorm", "global_average_pool"), (None, False)),  # of open_clip 2.20 and before
}
_POOL_TYPES = {"tok": "class", "avg": "mean"}


def config_beside(path: pathlib.Path, layout: layouts.Layout) -> Facts | None:
    """open_clip_config.json, for a file of these names."""
    mine = layout in (layouts.OPEN_CLIP, *layouts.OPEN_CLIP_TIMMS)
    return read_beside(path, CONFIG) if mine else None


def read_facts(path: pathlib.Path, file: Canonical, config: Facts | None, extra: Mapping[str, Any]) -> Said:
    """What is stated of the image tower in `file`: in `config`, else in config.json, else by what is published.

    UserError for wrong types, for what is not built, and where nothing says the activation or the pooling.
    """
    said = read_config(path, extra) if config is None else _said(config)
    whole = file.layout is layouts.OPEN_CLIP
    return (_with_published if whole else _with_pool)(path, file, said)


def _said(config: Facts) -> Said:
    model = config.inner("model_cfg") if "model_cfg" in config.values else config
    vision = model.inner("vision_cfg")
    check_known(model, _MODEL | ({"preprocess_cfg"} if model is config else set()), {})
    check_known(vision, _VISION | _HARMLESS, _MUST_BE)
    if vision.get("timm_model_name", str):
        return _of_timm(vision)._replace(publisher="open_clip")
    activation = _activation(model.get("quick_gelu", bool) is True, vision)
    if not vision.values:
        return Said(activation=activation)
    return _of_tower(vision)._replace(activation=activation, publisher="open_clip")


def _activation(quick: bool, vision: Facts) -> str:
    """QuickGELU, or PyTorch's GELU with its arguments."""
    given = vision.inner("act_kwargs")
    check_known(given, {"approximate"}, {"approximate": (None,) if quick else (None, "none", "tanh")})
    return "quick_gelu" if quick else "gelu_tanh" if given.get("approximate", str) == "tanh" else "gelu"


def _of_timm(vision: Facts) -> Said:
    name, pool = vision.get("timm_model_name", str), vision.get("timm_pool", str)
    pool = "avg" if pool is None else pool
    if pool and pool not in POOLS:
        raise UserError(f"{vision.where}: timm_pool={pool!r} is not built; {', '.join(POOLS)} are")
    families.refuse_name(name.removeprefix("hf_hub:timm/"), vision.where)
    image = size_in(vision, "image_size") or 224
    return Said(pool=POOLS.get(pool), image=image, architecture=architecture(name.removeprefix("hf_hub:timm/")))


def _of_tower(vision: Facts) -> Said:
    if isinstance(vision.values.get("layers"), list):
        raise UserError(f"{vision.where}: layers={vision.values['layers']} are those of a ResNet, which is not read")
    width, part = vision.at_least_one("width") or 768, vision.at_least_one("head_width") or 64
    pool = vision.get("pool_type", str) or "tok"
    if pool not in _POOL_TYPES:
        raise UserError(f"{vision.where}: pool_type={pool!r} is not built; {', '.join(_POOL_TYPES)} are")
    norm = vision.inner("norm_kwargs")
    check_known(norm, {"eps"}, {})
    eps = norm.get("eps", float, int)
    if eps is not None and not 0 <= eps < 1:
        raise UserError(f"{norm.where}: eps={eps} must be at least 0 and below 1")
    if width % part:
        raise UserError(f"{vision.where}: head_width={part} does not divide width={width}")
    ratio = vision.get("mlp_ratio", float, int)
    sizes = {"embed": width, "depth": vision.at_least_one("layers") or 12, "patch": size_in(vision, "patch_size") or 16}
    sizes |= {"mlp": int(width * (4.0 if ratio is None else ratio)), "pre_norm": not vision.get("no_ln_pre", bool)}
    return Said(
        heads=width // part,
        norm_eps=None if eps is None else float(eps),
        pool=_POOL_TYPES[pool],
        norm_after_pool=vision.get("final_ln_after_pool", bool) is True,
        image=size_in(vision, "image_size") or 224,
        sizes=sizes,
    )


def _with_pool(path: pathlib.Path, file: Canonical, said: Said) -> Said:
    """Of a model of timm."""
    if said.pool is None and "cls_token" in file.shapes and said.architecture is None:
        raise UserError(
            f"{path} is a CLIP with a model of timm, whose pooling is in no tensor; put its {CONFIG} beside it"
        )
    return said


def _with_published(path: pathlib.Path, file: Canonical, said: Said) -> Said:
    """Activation and pooling of a tower whose config says nothing of them."""
    normed = "norm_pre.weight" in file.shapes
    width, _, patch, _ = file.shapes.get("patch_embed.proj.weight", (0, 0, 0, 0))
    tokens = file.shapes.get("pos_embed", (0, 0, 0))[1]
    published = clip_tower(width, patch, tokens, pre_norm=normed)
    if said.heads is None and "input_resolution" in file.left_out and width % 64 == 0:
        said = said._replace(heads=width // 64)  # as OpenAI's code has it
    if said.activation is None:
        activation, why = None, ""
        if "input_resolution" in file.left_out:
            activation, why = "quick_gelu", "it is OpenAI's own file"
        elif "quickgelu" in path.stem.lower().replace("_", "").replace("-", ""):
            activation, why = "quick_gelu", "the file's name says it"
        elif published is not None:
            activation, why = published, "there is one published model of its sizes"
        if activation is None:
            raise UserError(
                f"{path} is a CLIP whose activation is in no tensor; put its {CONFIG} beside it, or one with "
                '{"model_cfg": {"quick_gelu": true}} (OpenAI, MetaCLIP, DFN), or false (most others)'
            )
        said = said._replace(activation=activation, notes=(*said.notes, f"activation {activation}: {why}"))
    if said.pool is None and normed:
        return said._replace(pool="class")
    if said.pool is None:
        if published is None:
            raise UserError(
                f"{path} is a CLIP without a norm in front of its blocks, whose pooling is in no tensor; put its "
                f"{CONFIG} beside it"
            )
        why = "pooling by the mean, its norm behind: there is one published model of its sizes"
        said = said._replace(pool="mean", norm_after_pool=True, notes=(*said.notes, why))
    return said
