"""Training views of image files: a part of a photograph, decoded and resized quickly."""

import functools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from nvit_jax.model.preprocessing import UPRIGHT, header, named, open_image, orientation_of
from nvit_jax.model.sizes import Size, sides

cv2.setNumThreads(0)  # the loader reads images in threads of its own

Box = tuple[int, int, int, int]  # left, top, right, bottom


def training_view(
    content: bytes, channels: int, size: Size, choose: Callable[[tuple[int, int]], Box], *, fast: bool
) -> np.ndarray:
    """uint8 [height, width, channels] of a part of an image. `choose` gives its box for the upright (width, height).

    Pixels are Pillow's: decode, crop, bicubic. With `fast`, upright colour JPEGs are decoded by libjpeg-turbo (to a
    half, a quarter or an eighth where the part keeps at least `size` pixels) and resized by OpenCV: twice as fast, a
    mean difference to Pillow's pixels below 1 of 255 (`python -m tests.ablations.decoding`). Raises BadImage.
    """
    choose = functools.cache(choose)  # a box is drawn: once, whoever decodes in the end
    if fast and channels == 3 and (view := _fast_view(content, size, choose)) is not None:
        return view
    image = open_image(content, channels)
    return resize_box(image, choose(image.size), size)


def resize_box(image: Image.Image, box: tuple[float, float, float, float], size: Size) -> np.ndarray:
    """uint8 [height, width, channels] of a box whose edges may lie between pixels, by Pillow's bicubic."""
    if all(float(edge).is_integer() for edge in box):
        image, box = image.crop(box), (0, 0, box[2] - box[0], box[3] - box[1])
    height, width = sides(size)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box)).reshape(height, width, -1)


def _fast_view(content: bytes, size: Size, choose: Callable[[tuple[int, int]], Box]) -> np.ndarray | None:
    """None for what Pillow has to read: other formats, grey, CMYK, rotated, and whatever libjpeg-turbo complains of."""
    with named():
        image = header(content)
        plain = image.format == "JPEG" and image.mode == "RGB" and orientation_of(image) not in UPRIGHT
    if not plain:
        return None
    left, top, right, bottom = choose(image.size)
    high, wide = sides(size)
    factor = max(f for f in (1, 2, 4, 8) if f == 1 or (f * high <= bottom - top and f * wide <= right - left))
    try:
        pixels = simplejpeg.decode_jpeg(
            content, min_height=-(-image.height // factor), min_width=-(-image.width // factor)
        )
    except ValueError:
        return None
    if factor == 1:
        return _resize(pixels[top:bottom, left:right], size)
    height, width = pixels.shape[:2]  # an odd side was rounded; OpenCV cannot take edges between pixels
    box = (left / factor, top / factor, min(right / factor, width), min(bottom / factor, height))
    return resize_box(Image.fromarray(pixels), box, size)


def _resize(pixels: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [h, w, 3] -> [height, width, 3], less than twice as small: OpenCV's bicubic, after a blur of three pixels.

    Pillow's bicubic filter widens with the factor when it shrinks an image, OpenCV's does not. The blur makes up for
    it; its weights were fitted to Pillow's pixels at factors up to 2.
    """

    def kernel(side: int, wanted: int) -> Any:
        outer = 0.025 + 0.17 * max(side / wanted - 1, 0)
        return np.array([outer, 1 - 2 * outer, outer], np.float32)

    height, width = pixels.shape[:2]
    high, wide = sides(size)
    if height > high or width > wide:
        across, down = kernel(width, wide), kernel(height, high)
        pixels = np.asarray(cv2.sepFilter2D(pixels, -1, across, down, borderType=cv2.BORDER_REPLICATE))
    return np.asarray(cv2.resize(pixels, (wide, high), interpolation=cv2.INTER_CUBIC))
