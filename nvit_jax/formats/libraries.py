"""Which models timm and transformers have a class for, and the settings that make the class build one.

Their classes have one width for all blocks. A model that none of them can say is run by vit.py, the PyTorch file that
lies beside the weights; why is told in words.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from nvit_jax.formats import interchange
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.directory import Model
from nvit_jax.model.preprocessing import FILTERS, Preprocessing
from nvit_jax.model.sizes import sides


class Home(NamedTuple):
    """A class of a library for a model."""

    config: dict[str, Any] | None  # config.json; None: the library has no such class
    why: str = ""  # it has none, in words


_WIDTHS = ("image", "patch", "channels", "classes", "embed", "heads", "qk", "v", "mlp", "qk_scale")
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ViTDims) if f.default is not dataclasses.MISSING}


def _why_not(dims: ViTDims, free: tuple[str, ...]) -> str:
    """What a class with one width for all blocks cannot say, where the fields `free` may hold anything; "" if nothing.

    A field that no class is told of must be as in a plain ViT.
    """
    if dims.heads[0] < 1 or dims.mlp[0] < 1 or 0 in dims.heads or 0 in dims.mlp:
        return "blocks have lost their attention or mlp part"
    if not isinstance(dims.image, int) or not isinstance(dims.patch, int):
        return "its images or patches are rectangles"
    for name in ("heads", "qk", "v", "mlp"):
        widths = getattr(dims, name)
        if len(set(widths)) > 1:
            return f"{name} is not the same in all blocks ({min(widths)} to {max(widths)})"
    if dims.qk[0] != dims.v[0]:
        return f"queries have {dims.qk[0]} dims and values {dims.v[0]}"
    if not math.isclose(dims.qk_scale, dims.qk[0] ** -0.5, rel_tol=1e-7):
        return f"queries are scaled by {dims.qk_scale:.4g}, not by {dims.qk[0]} ** -0.5 (dims of them were pruned)"
    for name, usual in _DEFAULTS.items():
        if name not in (*_WIDTHS, *free) and getattr(dims, name) != usual:
            return f"{name} is {getattr(dims, name)!r}"
    return ""


# ---------------------------------------------------------------------------------------------------- timm

_TIMM_SAYS = (
    *("cls_token", "dist_token", "registers", "positions", "pool", "mean_over", "norm_after_pool", "layer_scale"),
    *("qkv_bias", "activation"),
)
_TIMM_POOLS = {"class": "token", "mean": "avg", "max": "max", "avgmax": "avgmax"}
_ACTIVATIONS = {  # ours, which are timm's, too -> transformers'
    **{name: name for name in ("gelu", "quick_gelu", "relu", "silu")},
    "gelu_tanh": "gelu_pytorch_tanh",
}


def timm_config(model: Model) -> Home:
    """config.json of timm's hub folders: timm.create_model("local-dir:FOLDER", pretrained=True) builds the model."""
    dims, pre = model.dims, model.preprocessing
    why = _why_not(dims, _TIMM_SAYS)
    if not why and dims.pool not in _TIMM_POOLS:
        why = f"pool is {dims.pool!r}"
    if not why and dims.activation not in _ACTIVATIONS:
        why = f"activation is {dims.activation!r}"
    if not why and dims.heads[0] * dims.qk[0] != dims.embed:
        why = f"{dims.heads[0]} heads of {dims.qk[0]} dims are not embed {dims.embed}"
    if not why and dims.dist_token and dims.registers:
        why = "it has a distillation token and registers"
    if not why and pre is not None and pre.crop_mode == "none":
        why = "its images are cropped without being resized"
    if not why and pre is not None and not isinstance(pre.resize, int | None):
        why = "its images are resized to rectangles"
    if why:
        return Home(None, why)
    arguments = {
        "img_size": dims.image,
        "patch_size": dims.patch,
        "in_chans": dims.channels,
        "num_classes": dims.classes,
        "embed_dim": dims.embed,
        "depth": dims.depth,
        "num_heads": dims.heads[0],
        "mlp_ratio": _ratio(dims),
        "qkv_bias": dims.qkv_bias,
        "init_values": 1.0 if dims.layer_scale else None,
        "act_layer": dims.activation,
    }
    if not dims.dist_token:  # that class knows no other kind of tokens and pooling
        arguments |= {
            "class_token": dims.cls_token,
            "reg_tokens": dims.registers,
            "global_pool": _TIMM_POOLS[dims.pool],
            "pool_include_prefix": dims.pool != "class" and dims.mean_over == "all",
            "fc_norm": dims.norm_after_pool,
        }
    if dims.positions == "none":
        arguments["pos_embed"] = "none"
    elif dims.positions == "patches":
        arguments["no_embed_class"] = True
    name = "deit_base_distilled_patch16_224" if dims.dist_token else "vit_base_patch16_224"
    heads = ["head", "head_dist"] if dims.dist_token else "head"
    cfg: dict[str, Any] = {"num_classes": dims.classes, "first_conv": "patch_embed.proj", "classifier": heads}
    cfg |= {"input_size": [dims.channels, dims.image, dims.image], "fixed_input_size": True, "pool_size": None}
    config = {"architecture": name, "num_classes": dims.classes, "num_features": dims.embed, "model_args": arguments}
    config["pretrained_cfg"] = cfg | ({} if pre is None else _timm_images(pre))
    return Home(config | ({"label_names": list(model.classes)} if model.classes else {}))


def _ratio(dims: ViTDims) -> float:
    """mlp / embed, such that int(embed * ratio) is mlp again."""
    ratio = dims.mlp[0] / dims.embed
    return ratio if int(dims.embed * ratio) == dims.mlp[0] else (dims.mlp[0] + 0.5) / dims.embed


def _timm_images(pre: Preprocessing) -> dict[str, Any]:
    """timm divides pixels by 255 and cuts `size` out of floor(size / crop_pct)."""
    size, resize = sides(pre.size)[0], sides(pre.resize or pre.size)[0]
    part = size / resize
    part = part if math.floor(size / part) == resize else size / (resize + 0.5)
    unit = pre.scale / 255
    return {
        "mean": [value * unit for value in pre.mean],
        "std": [value * unit for value in pre.std],
        "crop_pct": part,
        "crop_mode": pre.crop_mode,
        "interpolation": pre.interpolation or "bicubic",
    }


# -------------------------------------------------------------------------------------------- transformers

_TRANSFORMERS_SAYS = ("dist_token", "qkv_bias", "activation", "norm_eps")


def transformers_lacks(dims: ViTDims) -> str:
    """Why transformers has no class for a model of these dims; "" where it has one."""
    why = _why_not(dims, _TRANSFORMERS_SAYS)
    if not why and not dims.classes:
        why = "it has no classifier"
    if not why and dims.activation not in _ACTIVATIONS:
        why = f"activation is {dims.activation!r}"
    return why


def transformers_config(model: Model) -> Home:
    """config.json of transformers' ViTForImageClassification, of a distilled model that of DeiT with its teacher."""
    dims = model.dims
    if why := transformers_lacks(dims):
        return Home(None, why)
    names = model.classes or tuple(f"LABEL_{i}" for i in range(dims.classes))
    kind, name = ("deit", "DeiTForImageClassificationWithTeacher") if dims.dist_token else ("vit", _PLAIN)
    return Home(
        {
            "architectures": [name],
            "model_type": kind,
            "hidden_size": dims.embed,
            "num_hidden_layers": dims.depth,
            "num_attention_heads": dims.heads[0],
            "head_dim": dims.qk[0],
            "intermediate_size": dims.mlp[0],
            "hidden_act": _ACTIVATIONS[dims.activation],
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "layer_norm_eps": dims.norm_eps,
            "image_size": dims.image,
            "patch_size": dims.patch,
            "num_channels": dims.channels,
            "qkv_bias": dims.qkv_bias,
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }
    )


_PLAIN = "ViTForImageClassification"


def transformers_state(model: Model) -> dict[str, np.ndarray]:
    """The parameters under the names of its files; queries, keys and values are tensors of their own."""
    dims, root = model.dims, "deit" if model.dims.dist_token else "vit"
    found: dict[str, np.ndarray] = {}
    for name, value in interchange.to_torch(dims, model.params).items():
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        if name.startswith("blocks."):
            name = name.replace("blocks.", "encoder.layer.", 1)
        if ".qkv." in name:
            for part, rows in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                found[f"{root}.{name.replace('.qkv.', f'.attention.{part}.')}"] = np.ascontiguousarray(rows)
        elif name.startswith(("head.", "head_dist.")):
            plain = "classifier" if root == "vit" else "cls_classifier"
            found[name.replace("head_dist.", "distillation_classifier.").replace("head.", f"{plain}.")] = value
        else:
            found[f"{root}.{name}"] = value
    return found


_NAMES = {  # timm's -> its; blocks and qkv apart
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attn.proj.": ".attention.output.dense.",
    ".attn.qkv.": ".attention.qkv.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
    "norm.": "layernorm.",
}


def processor_config(pre: Preprocessing) -> dict[str, Any] | None:
    """preprocessor_config.json: how transformers' image processors prepare images as `pre` does.

    None where they cannot: they do not cover a rectangle.
    """
    resize, whole = pre.resize or pre.size, pre.crop_mode == "squash"
    if pre.crop_mode == "center" and not isinstance(resize, int):
        return None
    side, squashed = (dict(zip(("height", "width"), sides(size), strict=True)) for size in (pre.size, resize))
    plain = whole and resize == pre.size
    values: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor" if plain else "BitImageProcessor",
        "do_resize": pre.crop_mode != "none",
        "size": squashed if whole else {"shortest_edge": min(squashed.values())},
        "resample": int(FILTERS[pre.interpolation or "bicubic"]),
        "do_rescale": True,
        "rescale_factor": 1 / pre.scale,
        "do_normalize": True,
        "image_mean": list(pre.mean),
        "image_std": list(pre.std),
    }
    if len(pre.mean) == 3:
        values["do_convert_rgb"] = True
    return values if plain else values | {"do_center_crop": True, "crop_size": side}
