"""What a checkpoint is: dims, published variant and preprocessing, read off its names, shapes and neighbours."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from nvit_jax.errors import UserError
from nvit_jax.formats import interchange, layouts
from nvit_jax.formats.canonical import Canonical
from nvit_jax.model.dims import ViTDims, preset, preset_names, published_heads
from nvit_jax.model.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

Shapes = dict[str, tuple[int, ...]]


class Options(NamedTuple):
    """What a user may say about a checkpoint; None is "find out"."""

    variant: str | None = None  # a name that `dims.preset` takes; must fit the shapes
    image: int | None = None  # position embeddings are interpolated to this size
    heads: int | None = None  # per block, where neither the name nor the shapes tell
    classes: int | None = None  # a new classifier of zeros with this many classes
    entry: str | None = None  # the part of a .pth file, "model" or "model_ema", ...


# Resize of the short side relative to the crop, filter, mean, std: how each publisher evaluates.
_HALF = (0.5, 0.5, 0.5)
PREPROCESSING: dict[str, tuple[float, str, tuple[float, ...], tuple[float, ...]]] = {
    "deit": (256 / 224, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
    "deit3": (1.0, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
    "vit": (1 / 0.9, "bicubic", _HALF, _HALF),  # timm's augreg weights
    "vit_npz": (256 / 224, "bilinear", _HALF, _HALF),
    "dino": (256 / 224, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
    "dinov2": (256 / 224, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
    "vit_hf": (1.0, "bilinear", _HALF, _HALF),
    "vit_torchvision": (256 / 224, "bilinear", IMAGENET_MEAN, IMAGENET_STD),
    "regnet": (256 / 224, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
}
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as Hugging Face stores them


def find_family(path: pathlib.Path, file: Canonical, beside: Mapping[str, Any], options: Options) -> str:
    """Whose preprocessing and names: what the user says, else the architecture beside the file, else its name."""
    if file.layout.family == "vit_hf" and "dist_token" in file.shapes:
        return "deit"
    if file.layout.family != "deit":
        return file.layout.family
    for text in (options.variant, beside.get("architecture"), path.stem):
        for family in ("deit3", "deit", "dinov2", "vit"):
            if text and text.startswith(f"{family}_"):
                return family
    return "vit" if "augreg" in path.stem else "deit"


def find_variant(path: pathlib.Path, dims: ViTDims, family: str, options: Options) -> str | None:
    """The preset with these dims, whatever the image size and classes; UserError when the user named another."""
    free = {name: getattr(dims, name) for name in ("classes", "norm_eps", "activation", "mean_over")}
    if options.variant is not None:
        wanted = preset(options.variant, **free)
        for field in dataclasses.fields(dims):
            if field.name != "image" and getattr(wanted, field.name) != getattr(dims, field.name):
                raise UserError(
                    f"--variant={options.variant} contradicts {path}: {field.name} is "
                    f"{getattr(wanted, field.name)} there, {getattr(dims, field.name)} in the file"
                )
        return options.variant
    presets = {n: preset(n, **free) for n in preset_names() if n.endswith("_384") == (dims.image == 384)}
    same_patch = {n: d for n, d in presets.items() if d.patch == dims.patch}
    fits = [n for n, d in same_patch.items() if dataclasses.replace(dims, image=d.image) == d]
    stem = family.split("_")[0]
    return next((n for n in fits if n.startswith(f"{stem}_")), fits[0] if fits else None)


def find_dims(
    where: str,
    file: Canonical,
    shapes: Shapes,
    extra: Mapping[str, Any],
    beside: Mapping[str, Any],
    options: Options,
) -> ViTDims:
    """Read off the shapes; the number of heads comes from the file, the user, or the published sizes."""
    needed = ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.weight")
    for name in needed:
        if name not in shapes:
            interchange.check_names(shapes, [*shapes, name], where)
    d, channels, patch, _ = shapes["patch_embed.proj.weight"]
    depth = sum(name.endswith("mlp.fc1.weight") for name in shapes)
    try:
        mlp = tuple(shapes[f"blocks.{i}.mlp.fc1.weight"][0] for i in range(depth))
        rows = tuple(shapes[f"blocks.{i}.attn.qkv.weight"][0] for i in range(depth))
        columns = tuple(shapes[f"blocks.{i}.attn.proj.weight"][1] for i in range(depth))
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing") from error
    heads, qk, v, scale = _attention_widths(where, file, d, rows, columns, extra, beside, options)
    dist, registers = "dist_token" in shapes, shapes.get("reg_token", (1, 0))[1]
    cls = "cls_token" in shapes
    positions, patches = _positions(where, shapes, cls + dist + registers)
    pooled_after = "fc_norm.weight" in shapes
    return ViTDims(
        image=patch * math.isqrt(patches),
        patch=patch,
        channels=channels,
        classes=shapes.get("head.weight", (0,))[0],
        embed=d,
        heads=heads,
        qk=qk,
        v=v,
        mlp=mlp,
        qk_scale=scale,
        cls_token=cls,
        dist_token=dist,
        registers=registers,
        positions=positions,
        pool="mean" if pooled_after or not cls else "class",
        norm_after_pool=pooled_after,
        pre_logits=shapes.get("pre_logits.fc.weight", (0,))[0],
        layer_scale="blocks.0.ls1.gamma" in shapes,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        activation={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(
            beside.get("hidden_act") or "", file.layout.activation
        ),
        norm_eps=float(beside.get("layer_norm_eps") or file.layout.norm_eps),
    )


def _attention_widths(
    where: str,
    file: Canonical,
    d: int,
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    extra: Mapping[str, Any],
    beside: Mapping[str, Any],
    options: Options,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], float]:
    """heads, qk, v per block, and qk_scale."""
    if file.layout is layouts.NVIT_DENSE:
        try:
            heads = tuple(int(h) for h in extra["dim"]["head"])
        except (KeyError, TypeError) as error:
            raise UserError(f'{where}: a dense NViT file needs its widths beside the weights, in "dim"') from error
        scale = 64**-0.5  # of the model that was pruned
    else:
        one = options.heads or beside.get("num_attention_heads")
        known = one or published_heads(d, len(rows)) or (d // 64 if d % 64 == 0 else None)
        if file.heads is None and known is None:
            raise UserError(f"{where}: embed {d} with {len(rows)} blocks is no published size; say --heads=N")
        heads = file.heads or (int(known),) * len(rows)  # type: ignore[arg-type]
        scale = 0.0
    widths = []
    for i, (h, r, c) in enumerate(zip(heads, rows, columns, strict=True)):
        v, q = c // h, (r - c) // 2 // h
        if c % h or h * (2 * q + v) != r:
            raise UserError(f"{where}: block {i}: {r} rows of q, k, v and {c} of the projection are not {h} heads")
        widths.append((q, v))
    qk, v_widths = tuple(q for q, _ in widths), tuple(v for _, v in widths)
    return heads, qk, v_widths, scale or float(qk[0]) ** -0.5


def _positions(where: str, shapes: Shapes, prefix: int) -> tuple[str, int]:
    """Which tokens have a position embedding, and how many patches there are."""
    if "pos_embed" not in shapes:
        raise UserError(f"{where} holds no position embeddings, so that its image size cannot be known")
    count = shapes["pos_embed"][1]
    for name, patches in (("all", count - prefix), ("patches", count)):
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            return name, patches
    raise UserError(f"{where}: {count} position embeddings are no square of patches, with or without {prefix} token(s)")


def find_preprocessing(
    family: str, dims: ViTDims, beside: Mapping[str, Any], processor: Mapping[str, Any]
) -> Preprocessing:
    """The publisher's, unless a config beside the file says otherwise (timm's pretrained_cfg, Hugging Face's)."""
    ratio, interpolation, mean, std = PREPROCESSING[family]
    if family == "vit" and dims.image >= 384:
        ratio = 1.0
    cfg = beside.get("pretrained_cfg") or {}
    if cfg:
        ratio = 1 / cfg.get("crop_pct", 1 / ratio)
        interpolation = cfg.get("interpolation", interpolation)
    if processor:
        interpolation = _FILTERS.get(processor.get("resample", 0), interpolation)
        if processor.get("do_center_crop") and isinstance(processor.get("size"), int):
            ratio = processor["size"] / processor.get("crop_size", processor["size"])
    mean = tuple(cfg.get("mean") or processor.get("image_mean") or mean)
    std = tuple(cfg.get("std") or processor.get("image_std") or std)
    if len(mean) != dims.channels:
        mean, std = (0.5,) * dims.channels, (0.5,) * dims.channels
    resize = math.floor(dims.image * ratio + 1e-9)
    return Preprocessing(dims.image, 255.0, mean, std, resize, interpolation)
