"""Augmentation of one image in a worker: random resized crop, flip, RandAugment or color jitter, as DeiT trains.

Magnitudes, probabilities and operations are those of timm's "rand-m9-mstd0.5-inc1" (Apache-2.0, Ross Wightman), drawn
from an explicit generator, so that an example's draws depend on its place in the run alone.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from nvit_jax.data.images import Box, resize_box, training_view
from nvit_jax.errors import UserError
from nvit_jax.model.sizes import Size

_LEVELS = 10.0  # magnitudes run from 0 to this
_SHIFT = 0.45  # of the side, at the highest magnitude

Operation = Callable[[Image.Image, float, "Draw"], Image.Image]


@dataclasses.dataclass(frozen=True)
class Draw:
    """What an operation needs beside the image and the magnitude in [0, 1]."""

    sign: float  # -1 or 1
    fill: tuple[int, ...]

    def affine(self, image: Image.Image, *matrix: float) -> Image.Image:
        """Output pixel (x, y) comes from the input's (a x + b y + c, d x + e y + f)."""
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=_fill(self.fill, image)
        )


def _fill(fill: tuple[int, ...], image: Image.Image) -> Any:
    return fill if image.mode == "RGB" else fill[0]


def _enhance(kind: Any) -> Operation:
    return lambda image, level, draw: kind(image).enhance(max(0.1, 1.0 + draw.sign * 0.9 * level))


def _rotate(image: Image.Image, level: float, draw: Draw) -> Image.Image:
    fill = _fill(draw.fill, image)
    return image.rotate(draw.sign * 30.0 * level, Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(image: Image.Image, level: float, draw: Draw) -> Image.Image:
    return ImageOps.posterize(image, max(1, 4 - int(4 * level)))  # no bits at all would leave a black image


def _solarize_add(image: Image.Image, level: float, draw: Draw) -> Image.Image:
    added = min(128, int(110 * level))
    table = [min(255, i + added) if i < 128 else i for i in range(256)]
    return image.point(table * len(image.getbands()))


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, level, draw: ImageOps.autocontrast(image),
    "equalize": lambda image, level, draw: ImageOps.equalize(image),
    "invert": lambda image, level, draw: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": lambda image, level, draw: ImageOps.solarize(image, 256 - min(256, int(256 * level))),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, draw: draw.affine(image, 1, draw.sign * 0.3 * level, 0, 0, 1, 0),
    "shear_y": lambda image, level, draw: draw.affine(image, 1, 0, 0, draw.sign * 0.3 * level, 1, 0),
    "translate_x": lambda image, level, draw: draw.affine(
        image, 1, 0, draw.sign * _SHIFT * level * image.width, 0, 1, 0
    ),
    "translate_y": lambda image, level, draw: draw.affine(
        image, 1, 0, 0, 0, 1, draw.sign * _SHIFT * level * image.height
    ),
}
_NAMES = tuple(OPERATIONS)


_MAX_LAYERS = 100


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """`layers` operations, each drawn anew and done with `probability`, at magnitude N(magnitude, std) within [0, 10].

    Strength grows with the magnitude for all of them (timm's "inc1").
    """

    magnitude: float = 9.0
    std: float = 0.5
    layers: int = 2
    probability: float = 0.5

    @classmethod
    def parse(cls, text: str) -> "RandAugment":
        """timm's name, such as "rand-m9-mstd0.5-inc1" (also n and p). UserError for anything else."""
        first, *parts = text.split("-")
        values: dict[str, float] = {}
        for part in parts:
            match = re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", part)
            if match is None:
                break
            values[match[1]] = float(match[2])
        known = first == "rand" and len(values) == len(parts) and values.pop("inc", None) == 1
        if not known or values.get("n", 0) > _MAX_LAYERS or values.get("p", 0) > 1:
            raise UserError(
                f'config.augment.rand_augment={text!r}: it looks like "rand-m9-mstd0.5-inc1", with m, mstd, n (at most '
                f"{_MAX_LAYERS}) and p (at most 1), and always inc1"
            )
        given = {"m": "magnitude", "mstd": "std", "p": "probability", "n": "layers"}
        found = cls(**{"std": 0.0} | {given[k]: v for k, v in values.items()})  # type: ignore[arg-type]
        return dataclasses.replace(found, layers=int(found.layers))

    def __call__(self, image: Image.Image, rng: np.random.Generator, fill: tuple[int, ...]) -> Image.Image:
        for name in rng.choice(_NAMES, self.layers):
            if rng.random() >= self.probability:
                continue
            level = min(max(rng.normal(self.magnitude, self.std), 0.0), _LEVELS) / _LEVELS
            image = OPERATIONS[str(name)](image, level, Draw(1.0 if rng.random() < 0.5 else -1.0, fill))
        return image


def crop_box(
    size: tuple[int, int], rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Of Inception's random crop, as torchvision draws it: ten tries, then the middle."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def color_jitter(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Brightness, contrast and saturation by factors in [1 - strength, 1 + strength], in random order."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in rng.permutation(3):
        image = kinds[i](image).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return image


@dataclasses.dataclass(frozen=True)
class TrainCrop:
    """(content, rng) -> uint8 [height, width, channels]: one training view of one image. BadImage.

    `fast`: see images.training_view.
    """

    size: Size
    channels: int
    fill: tuple[int, ...]  # what rotations and shifts leave, 0..255
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rand_augment: RandAugment | None = None
    jitter: float = 0.0
    fast: bool = True

    def __call__(self, content: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        def choose(size: tuple[int, int]) -> Box:
            return crop_box(size, rng, self.scale, self.ratio)

        if isinstance(content, np.ndarray):
            image = Image.fromarray(content.squeeze(-1) if self.channels == 1 else content)
            view = resize_box(image, choose(image.size), self.size)
        else:
            view = training_view(content, self.channels, self.size, choose, fast=self.fast)
        if rng.random() < self.flip:
            view = np.ascontiguousarray(view[:, ::-1])
        if self.rand_augment is None and not self.jitter:
            return view
        image = Image.fromarray(view.squeeze(-1) if self.channels == 1 else view)
        if self.rand_augment is not None:
            image = self.rand_augment(image, rng, self.fill)
        else:
            image = color_jitter(image, rng, self.jitter)
        return np.asarray(image).reshape(view.shape)
