"""Pixels of image files: whatever a folder of photographs holds, upright in 8 bits, and cropped as DeiT evaluates."""

import contextlib
import dataclasses
import functools
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

cv2.setNumThreads(0)  # the loader reads images in threads of its own
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata; catch_warnings is not for threads

Box = tuple[int, int, int, int]  # left, top, right, bottom

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


def open_image(content: bytes, channels: int) -> Image.Image:
    """Decode: the first frame, upright, as 8-bit RGB (channels 3) or grey (1). BadImage when that is not possible.

    CMYK, palettes and alpha are converted as Pillow does (alpha is dropped), 16-bit grey is scaled.
    """
    with _named():
        image = _header(content)
        orientation = _orientation(image)
        image.load()
        if image.mode.startswith("I") or image.mode == "F":
            image = _eight_bits(image)
        image = image.convert("RGB" if channels == 3 else "L")
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def training_view(
    content: bytes, channels: int, size: int, choose: Callable[[tuple[int, int]], Box], *, fast: bool
) -> np.ndarray:
    """uint8 [size, size, channels] of a part of an image. `choose` gives its box for the upright (width, height).

    Pixels are Pillow's: decode, crop, bicubic. With `fast`, upright colour JPEGs are decoded by libjpeg-turbo (to a
    half, a quarter or an eighth where the part keeps at least `size` pixels) and resized by OpenCV: twice as fast, a
    mean difference to Pillow's pixels below 1 of 255 (`python -m tests.ablations.decoding`). Raises BadImage.
    """
    choose = functools.cache(choose)  # a box is drawn: once, whoever decodes in the end
    if fast and channels == 3 and (view := _fast_view(content, size, choose)) is not None:
        return view
    image = open_image(content, channels)
    return resize_box(image, choose(image.size), size)


def resize_box(image: Image.Image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """uint8 [size, size, channels] of a box whose edges may lie between pixels, by Pillow's bicubic."""
    if all(float(edge).is_integer() for edge in box):
        image, box = image.crop(box), (0, 0, box[2] - box[0], box[3] - box[1])
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)).reshape(size, size, -1)


def _fast_view(content: bytes, size: int, choose: Callable[[tuple[int, int]], Box]) -> np.ndarray | None:
    """None for what Pillow has to read: other formats, grey, CMYK, rotated, and whatever libjpeg-turbo complains of."""
    with _named():
        image = _header(content)
        plain = image.format == "JPEG" and image.mode == "RGB" and _orientation(image) not in _UPRIGHT
    if not plain:
        return None
    left, top, right, bottom = choose(image.size)
    factor = max(f for f in (1, 2, 4, 8) if f == 1 or f * size <= min(right - left, bottom - top))
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


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [h, w, 3] -> [size, size, 3], for h, w < 2 size: OpenCV's bicubic, after a blur of three pixels.

    Pillow's bicubic filter widens with the factor when it shrinks an image, OpenCV's does not. The blur makes up for
    it; its weights were fitted to Pillow's pixels at factors up to 2.
    """

    def kernel(side: int) -> Any:
        outer = 0.025 + 0.17 * max(side / size - 1, 0)
        return np.array([outer, 1 - 2 * outer, outer], np.float32)

    height, width = pixels.shape[:2]
    if max(height, width) > size:
        pixels = np.asarray(cv2.sepFilter2D(pixels, -1, kernel(width), kernel(height), borderType=cv2.BORDER_REPLICATE))
    return np.asarray(cv2.resize(pixels, (size, size), interpolation=cv2.INTER_CUBIC))


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Everything that reading a file may raise becomes BadImage."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:  # Pillow's plugins raise nearly everything for broken files
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _header(content: bytes) -> Image.Image:
    """The image, not decoded yet."""
    if not content:
        raise BadImage("the file is empty")
    image: Image.Image = Image.open(io.BytesIO(content))
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
    return image


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
        return resize_crop(open_image(content, self.channels), self.resize, self.size, self.interpolation)


def resize_crop(image: Image.Image, resize: int, size: int, interpolation: str) -> np.ndarray:
    """uint8 [size, size, channels] of a decoded image: short side to `resize`, center crop."""
    short = min(image.size)
    if short != resize:
        width, height = (resize if side == short else int(resize * side / short) for side in image.size)
        if width * height > MAX_PIXELS:
            raise BadImage(f"{image.width} x {image.height} pixels would become {width} x {height}")
        image = image.resize((width, height), FILTERS[interpolation])
    left, top = (round((side - size) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size))).reshape(size, size, -1)
