"""Pixels of image files: whatever a folder of photographs holds, upright in 8 bits, and cropped as DeiT evaluates."""

import dataclasses
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_PIXELS = 2**27  # of one image; a file that claims more is taken for a decompression bomb
_UPRIGHT = {  # EXIF orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """This file is not an image that can be read; the message says why."""


def open_image(
    content: bytes, channels: int, reduce: Callable[[tuple[int, int]], int] = lambda size: 1
) -> tuple[Image.Image, int]:
    """Decode: the first frame, upright, as 8-bit RGB (channels 3) or grey (1). BadImage when that is not possible.

    CMYK, palettes and alpha are converted as Pillow does (alpha is dropped), 16-bit grey is scaled. `reduce` is told
    the upright (width, height) and may ask for a 2nd, 4th or 8th of both: JPEG decodes that faster. Also returns the
    reduction that was done.
    """
    if not content:
        raise BadImage("the file is empty")
    mode = "RGB" if channels == 3 else "L"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd metadata and of large images
            image: Image.Image = Image.open(io.BytesIO(content))
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            orientation = _orientation(image)
            whole = image.size
            if (factor := reduce(whole[::-1] if orientation in (5, 6, 7, 8) else whole)) > 1:
                image.draft(mode, (image.width // factor, image.height // factor))
            image.load()
            done = round(whole[0] / image.width)
            if image.mode.startswith("I") or image.mode == "F":
                image = _eight_bits(image)
            image = image.convert(mode)
    except BadImage:
        raise
    except Exception as error:  # Pillow's plugins raise nearly everything for broken files
        raise BadImage(f"{type(error).__name__}: {error}") from error
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image, done


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # broken metadata is no reason to lose the image
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":
        raise BadImage("pixels are floating-point numbers of unknown range")
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("pixels have more than 16 bits")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """DeiT's evaluation: short side to `resize`, center crop of `size`. (content) -> uint8 [size, size, channels].

    Pixel for pixel what Pillow gives with torchvision's rounding. Arrays are taken as they are. BadImage.
    """

    resize: int
    size: int
    interpolation: str
    channels: int

    def __call__(self, content: bytes | np.ndarray, rng: Any = None) -> np.ndarray:
        if isinstance(content, np.ndarray):
            return content
        return resize_crop(open_image(content, self.channels)[0], self.resize, self.size, self.interpolation)


def resize_crop(image: Image.Image, resize: int, size: int, interpolation: str) -> np.ndarray:
    """uint8 [size, size, channels] of a decoded image: short side to `resize`, center crop."""
    short = min(image.size)
    if short != resize:
        width, height = (resize if side == short else int(resize * side / short) for side in image.size)
        image = image.resize((width, height), FILTERS[interpolation])
    left, top = (round((side - size) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size))).reshape(size, size, -1)
