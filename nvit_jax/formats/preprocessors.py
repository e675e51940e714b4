"""How images are prepared: what lies beside the checkpoint says it, else what its publisher does."""

import math
from collections.abc import Mapping
from typing import Any

from nvit_jax.errors import UserError
from nvit_jax.formats.facts import Facts
from nvit_jax.model import sizes
from nvit_jax.model.preprocessing import FILTERS, IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from nvit_jax.model.sizes import Size

# Resize of the short side relative to the crop, filter, mean, std: how each publisher evaluates.
_HALF = (0.5, 0.5, 0.5)
PREPROCESSING: dict[str, tuple[float, str, tuple[float, ...], tuple[float, ...]]] = {
    "deit": (256 / 224, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
    "deit3": (1.0, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
    "vit": (1 / 0.9, "bicubic", _HALF, _HALF),  # timm's augreg weights
    "vit_npz": (256 / 224, "bilinear", _HALF, _HALF),
    "dino": (256 / 224, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
    "dinov2": (256 / 224, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
    "dinov3": (1.0, "bilinear", IMAGENET_MEAN, IMAGENET_STD),
    "vit_hf": (1.0, "bilinear", _HALF, _HALF),
    "mae": (256 / 224, "bicubic", IMAGENET_MEAN, IMAGENET_STD),  # MSN's and I-JEPA's, too
    "vit_torchvision": (256 / 224, "bilinear", IMAGENET_MEAN, IMAGENET_STD),
    "clip": (1.0, "bicubic", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": (1.0, "bicubic", _HALF, _HALF),
    "siglip_npz": (1.0, "bilinear", _HALF, _HALF),  # "resize(224)|value_range(-1, 1)"
    "eva": (0.9, "bicubic", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "beit": (0.9, "bicubic", _HALF, _HALF),
    "beit_hf": (1.0, "bilinear", _HALF, _HALF),  # of the published files
    "rope_gap": (0.95, "bicubic", _HALF, _HALF),
    "beit3": (1.0, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
    "dinov3_timm": (1.0, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
    "regnet": (256 / 224, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
}
_WHOSE = {
    "deit": "DeiT's",
    "deit3": "DeiT-III's",
    "vit": "that of timm's augreg weights",
    "vit_npz": "vision_transformer's",
    "dino": "DINO's",
    "dinov2": "DINOv2's",
    "dinov3": "DINOv3's",
    "vit_hf": "that of transformers' ViTImageProcessor",
    "mae": "the publisher's own (MAE, MSN, I-JEPA)",
    "vit_torchvision": "torchvision's",
    "clip": "OpenAI's of CLIP",
    "siglip": "SigLIP's",
    "siglip_npz": "SigLIP's in big_vision",
    "eva": "EVA's in timm",
    "beit": "BEiT's in timm",
    "beit_hf": "that of BEiT's published files",
    "rope_gap": "that of timm's ViTs with rotary positions",
    "beit3": "BEiT-3's in timm",
    "dinov3_timm": "DINOv3's in timm",
}
_RESAMPLE = {filter.value: name for name, filter in FILTERS.items()}  # Pillow's numbers, as Hugging Face stores them


def find_preprocessing(
    family: str, size: Size, channels: int, config: Facts | None, processor: Facts | None
) -> tuple[Preprocessing, list[str]]:
    """The publisher's, unless timm's pretrained_cfg or Hugging Face's processor beside the file says otherwise.

    `size` is the image that the model takes. With it come lines about what could not be taken as it is. UserError for
    wrong types, and for what is not built.
    """
    ratio, interpolation, mean, std = PREPROCESSING[family]
    if min(sizes.sides(size)) >= {"vit": 384, "beit": 384, "eva": 336}.get(family, math.inf):
        ratio = 1.0
    if len(mean) != channels:
        mean, std = (0.5,) * channels, (0.5,) * channels
    mode = "squash" if family in ("vit_hf", "beit_hf", "dinov3", "siglip", "siglip_npz") else "center"
    usual = Preprocessing(size, 255.0, mean, std, _scaled(size, ratio), interpolation, mode)
    if processor is not None:
        return _hugging_face(usual, processor)
    for key, read in (("preprocess_cfg", _open_clip), ("pretrained_cfg", _timm)):
        cfg = config.inner(key) if config is not None else None
        if cfg is not None and cfg.values:
            return read(usual, cfg)
    return usual, [f"nothing beside the file says how images are prepared: taken is {_WHOSE[family]} preprocessing"]


def _scaled(size: Size, ratio: float) -> Size:
    return sizes.one(*(math.floor(side * ratio + 1e-9) for side in sizes.sides(size)))


def _timm(usual: Preprocessing, cfg: Facts) -> tuple[Preprocessing, list[str]]:
    """Keys that are missing stay as usual; a crop_pct of null is timm's own default."""
    notes: list[str] = []
    resize = usual.resize
    if "crop_pct" in cfg.values:
        part = cfg.get("crop_pct", float, int) or 0.875
        if not 0 < part <= 10 or not math.isfinite(part):
            raise UserError(f"{cfg.where}: crop_pct={part} must be above 0")
        resize = sizes.one(*(math.floor(side / part) for side in sizes.sides(usual.size)))
    mode = cfg.get("crop_mode", str) or "center"
    if mode not in ("center", "squash"):
        raise UserError(f"{cfg.where}: crop_mode={mode!r} is not built; 'center' and 'squash' are")
    interpolation = cfg.get("interpolation", str) or usual.interpolation or "bicubic"
    if interpolation == "random":  # of training; an evaluation takes one
        interpolation = "bicubic"
        notes.append(f"{cfg.where}: interpolation='random' is for training; images are resized with bicubic")
    mean, std = _numbers(cfg, "mean", usual.mean), _numbers(cfg, "std", usual.std)
    return Preprocessing(usual.size, usual.scale, mean, std, resize, _filter(cfg, interpolation), mode), notes


def _open_clip(usual: Preprocessing, cfg: Facts) -> tuple[Preprocessing, list[str]]:
    """open_clip's PreprocessCfg; the size is the model's."""
    how = cfg.get("resize_mode", str) or "shortest"
    if how not in ("shortest", "squash"):
        raise UserError(f"{cfg.where}: resize_mode={how!r} is not built; 'shortest' and 'squash' are")
    name = cfg.get("interpolation", str) or usual.interpolation or "bicubic"
    random = name == "random"  # of training
    notes = [f"{cfg.where}: interpolation='random' is for training; images are resized with bicubic"] if random else []
    mean, std = _numbers(cfg, "mean", usual.mean), _numbers(cfg, "std", usual.std)
    mode, interpolation = "squash" if how == "squash" else "center", _filter(cfg, "bicubic" if random else name)
    return Preprocessing(usual.size, usual.scale, mean, std, usual.size, interpolation, mode), notes


def _filter(facts: Facts, name: str) -> str:
    if name not in FILTERS:
        raise UserError(f"{facts.where}: interpolation={name!r} is none of {', '.join(FILTERS)}")
    return name


def _numbers(facts: Facts, name: str, usual: tuple[float, ...]) -> tuple[float, ...]:
    """One number for each channel, or one for all."""
    found = facts.get(name, list, float, int)
    if found is None:
        return usual
    values = found if isinstance(found, list) else [found]
    values = values * len(usual) if len(values) == 1 else values
    good = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    if not good or len(values) != len(usual) or (name.endswith("std") and min(values) <= 0):
        what = "numbers above 0" if name.endswith("std") else "numbers"
        raise UserError(f"{facts.where}: {name}={found!r:.80} must be {len(usual)} {what}, one for each channel")
    return tuple(float(v) for v in values)


# -------------------------------------------------------------------------------------------- Hugging Face

_KEEPS_SHAPE = ("Bit", "CLIP", "Siglip", "ConvNext")  # processors whose plain `size` is the short side


def _hugging_face(usual: Preprocessing, processor: Facts) -> tuple[Preprocessing, list[str]]:
    """Resize, crop, rescale, normalise, each where the processor does it."""
    where, notes = processor.where, []
    crop, resize, mode = _sides(processor, usual.size)
    if _flag(processor, "do_pad", False) or "crop_pct" in processor.values:
        raise UserError(f"{where}: do_pad and crop_pct are not built")
    made = resize if crop is None else crop
    if mode != "none" and made != usual.size:
        makes, takes = sizes.words(made), sizes.words(usual.size)
        (high, wide), (rows, columns) = sizes.sides(made), sizes.sides(usual.size)
        if high * columns != wide * rows:
            raise UserError(f"{where}: it makes images of {makes} pixels, the model takes {takes}, of another shape")
        notes.append(f"{where} makes images of {makes} pixels, the model takes {takes}: they are scaled alike")
        resize = sizes.one(*(math.floor(side * rows / high + 1e-9) for side in sizes.sides(resize)))
    number = processor.get("resample", int)
    if number is not None and number not in _RESAMPLE:
        raise UserError(f"{where}: resample={number} is none of Pillow's filters, 0 to 5")
    interpolation = usual.interpolation if number is None else _RESAMPLE[number]
    scale = 1.0
    if _flag(processor, "do_rescale", True):
        factor = processor.get("rescale_factor", float, int)
        factor = 1 / 255 if factor is None else factor
        if not 0 < factor < math.inf:
            raise UserError(f"{where}: rescale_factor={factor} must be above 0")
        scale = 1 / factor
        scale = float(round(scale)) if abs(scale - round(scale)) < 1e-6 * scale else scale
    mean, std = (0.0,) * len(usual.mean), (1.0,) * len(usual.mean)
    if _flag(processor, "do_normalize", True):
        mean, std = _numbers(processor, "image_mean", usual.mean), _numbers(processor, "image_std", usual.std)
    return Preprocessing(usual.size, scale, mean, std, resize, interpolation, mode), notes


def made_size(processor: Facts, usual: Size) -> Size | None:
    """Pixels of the images that it makes; None where it does not resize them, `usual` where it names no size."""
    crop, resize, mode = _sides(processor, usual)
    return None if mode == "none" else crop or resize


def _sides(processor: Facts, usual: Size) -> tuple[Size | None, Size, str]:
    """(pixels of the crop if there is one, pixels that images are resized to, crop mode)."""
    crop = None
    if _flag(processor, "do_center_crop", processor.values.get("crop_size") is not None):
        crop = _side(processor, "crop_size", usual)[0]
    resize, mode = _side(processor, "size", usual) if _flag(processor, "do_resize", True) else (usual, "none")
    return crop, resize, mode


def _flag(facts: Facts, name: str, usual: bool) -> bool:
    value = facts.get(name, bool)
    return usual if value is None else bool(value)


def _side(facts: Facts, key: str, usual: Size) -> tuple[Size, str]:
    """(pixels, crop mode) of a size: a number, a list, {"height", "width"} or {"shortest_edge"}."""
    value = facts.get(key, int, list, dict)
    kind = str(facts.values.get("image_processor_type") or facts.values.get("feature_extractor_type") or "")
    mode = "squash"
    if value is None:
        return usual, mode
    if isinstance(value, Mapping):
        found: list[Any] = [value[k] for k in ("height", "width") if value.get(k) is not None]
        if len(found) != 2:
            found, mode = [value.get("shortest_edge")], "center"
    else:
        found = value if isinstance(value, list) else [value]
        mode = "center" if kind.startswith(_KEEPS_SHAPE) else "squash"
    if len(found) not in (1, 2) or any(not isinstance(x, int) or isinstance(x, bool) or x < 1 for x in found):
        raise UserError(f"{facts.where}: {key}={value!r:.80} is no height and width, and no shortest_edge")
    return sizes.one(found[0], found[-1]), mode
