"""What a model sees of an image: decoded upright in 8 bits, resized, cropped, normalised. Stored in model.json."""

import contextlib
import dataclasses
import io
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from nvit_jax.errors import UserError

warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata; catch_warnings is not for threads

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_PIXELS = 2**27  # of one image; a file that claims more is taken for a decompression bomb
UPRIGHT = {  # EXIF orientation -> what makes it upright
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
    with named():
        return upright(header(content), channels)


def upright(image: Image.Image, channels: int) -> Image.Image:
    """As `open_image`, of an image that Pillow has opened."""
    with named():
        image.load()  # first: Pillow turns a TIFF while loading
        orientation = orientation_of(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _eight_bits(image)
        image = image.convert("RGB" if channels == 3 else "L")
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Everything that reading a file may raise becomes BadImage."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:  # Pillow's plugins raise nearly everything for broken files
        raise BadImage(f"{type(error).__name__}: {error}") from error


def header(content: bytes) -> Image.Image:
    """The image, not decoded yet."""
    if not content:
        raise BadImage("the file is empty")
    image: Image.Image = Image.open(io.BytesIO(content))
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
    return image


def orientation_of(image: Image.Image) -> Any:
    """EXIF orientation, 1 is upright."""
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


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From raw pixels to what a model sees. Stored in model.json."""

    size: int
    scale: float  # the raw value that becomes 1
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None  # image files: the short side before the center crop of `size`
    interpolation: str | None = None  # of that resizing: "bicubic" or "bilinear"

    def __call__(self, images: Any) -> Any:
        """[B, size, size, channels] raw, of NumPy or JAX -> float32, normalised."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return ((images.astype(np.float32) / np.float32(self.scale)) - mean) / std

    def crop(self) -> CenterCrop:
        """What makes this of an image file."""
        return CenterCrop(self.resize or self.size, self.size, self.interpolation or "bicubic", len(self.mean))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def imagenet(cls, size: int) -> "Preprocessing":
        """DeiT's, of image files."""
        return cls(size, 255.0, IMAGENET_MEAN, IMAGENET_STD, size * 256 // 224, "bicubic")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """UserError when the values are not what `to_json` gives."""
        try:
            return cls(**dict(values) | {"mean": tuple(values["mean"]), "std": tuple(values["std"])})
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"the preprocessing in model.json is not complete: {error!r}") from error

    def describe(self) -> str:
        """In words."""
        resize = f"short side to {self.resize} ({self.interpolation}), center crop " if self.resize else ""
        return f"{resize}{self.size}, mean {self.mean}, std {self.std}"


def as_images(images: Any, size: int, channels: int, argument: str = "images") -> Any:
    """[B, size, size, channels] of NumPy or JAX, from an array of any library. Raises UserError for other shapes.

    [B, channels, size, size], PyTorch's order, is transposed where it cannot be the other one.
    """
    if hasattr(images, "detach"):  # PyTorch
        images = images.detach().cpu().numpy()
    elif not hasattr(images, "shape"):
        images = np.asarray(images)
    wanted, torch = (size, size, channels), (channels, size, size)
    if images.ndim == 4 and images.shape[1:] == torch != wanted:
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[1:] != wanted:
        shown = ", ".join(map(str, wanted))
        raise UserError(f" have the shape {tuple(images.shape)}; the model takes [B, {shown}]", argument)
    if not (np.issubdtype(images.dtype, np.number) or images.dtype.name == "bfloat16"):
        raise UserError(f" are of type {images.dtype}; they must be numbers", argument)
    return images


def normalise(images: Any, preprocessing: Preprocessing | None) -> Any:
    """Raw integer pixels as `preprocessing` says; floating-point images are normalised already. To be traced, too."""
    if not np.issubdtype(images.dtype, np.integer):
        return images
    if preprocessing is None:
        raise UserError(
            f" are raw pixels ({images.dtype}), and the model does not know its preprocessing; give normalised float "
            'images, or set model.info["preprocessing"]',
            "images",
        )
    return preprocessing(images)


def preprocess(images: Any, preprocessing: Preprocessing) -> np.ndarray:
    """float32 [B, size, size, channels] of PIL images, uint8 arrays [H, W, channels] or paths. Raises UserError."""
    single = isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", None) == 3
    crop = preprocessing.crop()
    pixels = [_pixels(image, i, crop) for i, image in enumerate([images] if single else images)]
    if not pixels:
        raise UserError(": there are none", "images")
    found: np.ndarray = preprocessing(np.stack(pixels))
    return found


def _pixels(image: Any, number: int, crop: CenterCrop) -> np.ndarray:
    """uint8 [size, size, channels] of one image."""
    name = f"images[{number}]"
    try:
        if isinstance(image, str | os.PathLike):
            name = str(image)
            return crop(pathlib.Path(image).read_bytes())
        if not isinstance(image, Image.Image):
            values = np.asarray(image)
            if values.dtype != np.uint8 or values.ndim not in (2, 3):
                raise UserError(f" is {values.dtype} {values.shape}; it must be uint8 [H, W, channels]", name)
            image = Image.fromarray(values.squeeze(-1) if values.ndim == 3 and values.shape[-1] == 1 else values)
        return resize_crop(upright(image, crop.channels), crop.resize, crop.size, crop.interpolation)
    except OSError as error:
        raise UserError(f" cannot be read: {error.strerror or error}", name) from error
    except BadImage as error:
        raise UserError(f" cannot be read as an image: {error}", name) from error
