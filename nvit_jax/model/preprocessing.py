"""What a model sees of an image: decoded upright in 8 bits, resized, cropped, normalised. Stored in model.json."""

import contextlib
import dataclasses
import io
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from nvit_jax import paths
from nvit_jax.errors import UserError, check_choice, first_line, nearest
from nvit_jax.model import sizes
from nvit_jax.model.sizes import Size, sides
from nvit_jax.model.values import real

warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata; catch_warnings is not for threads

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_MODES = ("center", "squash", "none")
FILTERS = {filter.name.lower(): filter for filter in Image.Resampling}  # "bicubic", "bilinear", "lanczos", ...
MAX_PIXELS = 2**27  # of one image; a file that claims more is taken for a decompression bomb
MAX_BYTES = 2**30  # of its file
# Pillow tries no other plugin: its EPS one starts Ghostscript, a program that runs what the file says.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "PPM", "TIFF", "GIF", "AVIF", "JPEG2000")
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


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The content of an image file. OSError, also for what is no regular file: a pipe or a device may never end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is no regular file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(f"the file has more than {MAX_BYTES:,} bytes")
    return content


def open_image(content: bytes, channels: int) -> Image.Image:
    """Decode: the first frame, upright, as 8-bit RGB (channels 3) or grey (1). BadImage when that is not possible.

    CMYK, palettes and alpha are converted as Pillow does (alpha is dropped), 16-bit grey is scaled.
    """
    try:
        with named():
            return upright(header(content), channels)
    except BadImage:
        if not content.startswith(_PNG) or (plain := _without_texts(content)) == content:
            raise
    with named():  # Pillow refuses a PNG for a long text or a large profile, of which nothing is needed
        return upright(header(plain), channels)


_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")


def _without_texts(content: bytes) -> bytes:
    """A PNG without its profile and texts; its pixels and its EXIF stay."""
    kept, place = [_PNG], len(_PNG)
    while place + 12 <= len(content):  # length, kind, data, checksum
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] not in _TEXTS:
            kept.append(content[place:end])
        place = end
    return b"".join(kept)


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
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage(f"cannot identify it: it is none of {', '.join(FORMATS)}, or damaged") from error
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
    """DeiT's evaluation: short side to `resize`, center crop of `size`. (content) -> uint8 [height, width, channels].

    `mode` and rectangles as in `resize_crop`.
    Pixel for pixel what Pillow gives with torchvision's rounding. Arrays are taken as they are. BadImage.
    """

    resize: Size
    size: Size
    interpolation: str
    channels: int
    mode: str = "center"

    def __call__(self, content: bytes | np.ndarray, rng: Any = None) -> np.ndarray:
        if isinstance(content, np.ndarray):
            return content
        return resize_crop(open_image(content, self.channels), self.resize, self.size, self.interpolation, self.mode)


def resize_crop(image: Image.Image, resize: Size, size: Size, interpolation: str, mode: str = "center") -> np.ndarray:
    """uint8 [height, width, channels] of a decoded image, `size` pixels.

    `mode` "center": short side to `resize`, center crop; "squash": both sides to `resize`, whatever they were, and the
    crop; "none": the crop alone. A rectangle is covered by "center": its shape is kept, and no side is below `resize`
    (timm's ResizeKeepRatio). BadImage for an image that is smaller than a crop without resizing.
    """
    height, width = sides(size)
    if mode == "none" and (image.height < height or image.width < width):
        least = f"{width} x {height}"
        raise BadImage(f"{image.width} x {image.height} pixels are less than {least}, and nothing is resized")
    wanted = image.size if mode == "none" else _resized(image.size, resize, mode)
    if wanted != image.size:
        if wanted[0] * wanted[1] > MAX_PIXELS:
            raise BadImage(f"{image.width} x {image.height} pixels would become {wanted[0]} x {wanted[1]}")
        image = image.resize(wanted, FILTERS[interpolation])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height))).reshape(height, width, -1)


def _resized(found: tuple[int, int], resize: Size, mode: str) -> tuple[int, int]:
    """(width, height) of an image of such a pair, before the crop."""
    if mode == "center" and isinstance(resize, int):
        short = min(found)
        width, height = (resize if side == short else int(resize * side / short) for side in found)
        return width, height
    high, wide = sides(resize)
    if mode == "squash":
        return wide, high
    ratio = min(found[0] / wide, found[1] / high)
    return round(found[0] / ratio), round(found[1] / ratio)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From raw pixels to what a model sees. Stored in model.json."""

    size: Size
    scale: float  # the raw value that becomes 1
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Size | None = None  # image files: the short side before the center crop of `size`
    interpolation: str | None = None  # of that resizing: a name of FILTERS, "bicubic" or "bilinear" mostly
    crop_mode: str = "center"  # "squash" and "none" as in `resize_crop`

    def __post_init__(self) -> None:
        """UserError for values with which pixels would come out as no numbers, and for sizes that cannot be."""
        checked: dict[str, Any] = {"size": sizes.size("preprocessing: size", self.size, 1, 2**14)}
        if self.resize is not None:
            checked["resize"] = sizes.size("preprocessing: resize", self.resize, 1, 2**14)
        checked["scale"] = real("preprocessing: scale", self.scale, 1e-6, 1e9)
        for name, values, least in (("mean", self.mean, -1e6), ("std", self.std, 1e-6)):
            if not isinstance(values, tuple | list) or len(values) != len(self.mean) or not values:
                raise UserError(f"preprocessing: {name}={values!r} must hold one number for each channel")
            named = [(f"preprocessing: {name}[{i}]", value) for i, value in enumerate(values)]
            checked[name] = tuple(real(where, value, least, 1e6) for where, value in named)
        if self.interpolation is not None:
            check_choice("preprocessing: interpolation", self.interpolation, tuple(FILTERS))
        check_choice("preprocessing: crop_mode", self.crop_mode, CROP_MODES)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def check_for(self, image: Size, channels: int) -> None:
        """UserError when it makes other images than those of a model."""
        if (self.size, len(self.mean)) != (image, channels):
            raise UserError(
                f"preprocessing: it makes {sizes.words(self.size)} pixels of {len(self.mean)} channels, the model "
                f"takes {sizes.words(image)} of {channels}"
            )

    def __call__(self, images: Any) -> Any:
        """[B, height, width, channels] raw, of NumPy or JAX -> float32, normalised."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return ((images.astype(np.float32) / np.float32(self.scale)) - mean) / std

    def crop(self) -> CenterCrop:
        """What makes this of an image file."""
        return CenterCrop(
            self.resize or self.size, self.size, self.interpolation or "bicubic", len(self.mean), self.crop_mode
        )

    def to_json(self) -> dict[str, Any]:
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        if self.crop_mode == "center":  # as in every model directory made before there were others
            del values["crop_mode"]
        return values

    @classmethod
    def imagenet(cls, size: Size, channels: int = 3) -> "Preprocessing":
        """DeiT's, of image files; for grey ones (channels 1) with the means of its three values. UserError."""
        if channels not in (1, 3):
            raise UserError(f"image files are read with 3 channels, or with 1 as grey; the model takes {channels}")
        mean: tuple[float, ...] = IMAGENET_MEAN
        std: tuple[float, ...] = IMAGENET_STD
        if channels == 1:
            mean, std = (round(sum(mean) / 3, 3),), (round(sum(std) / 3, 3),)
        height, width = (side * 256 // 224 for side in sides(size))
        return cls(size, 255.0, mean, std, sizes.one(height, width), "bicubic")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """UserError when the values are not what `to_json` gives."""
        try:
            fields = dict(values) | {"mean": tuple(values["mean"]), "std": tuple(values["std"])}
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"preprocessing: it is not complete: {error!r}") from error
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise UserError(f"preprocessing: unknown field {name}{nearest(str(name), known)}")
        if missing := [name for name in ("size", "scale") if name not in fields]:
            raise UserError(f"preprocessing: {missing[0]} is missing")
        return cls(**fields)

    def describe(self) -> str:
        """In words."""
        size, shape = sizes.words(self.size), f"size {sizes.words(self.size)}"
        if self.resize:
            side = "both sides" if self.crop_mode == "squash" else "short side"
            shape = f"{side} to {sizes.words(self.resize)} ({self.interpolation}), center crop {size}"
        mean, std = (", ".join(map(str, values)) for values in (self.mean, self.std))
        return f"{shape}, mean ({mean}), std ({std})"


def as_images(images: Any, size: Size, channels: int, argument: str = "images") -> Any:
    """[B, height, width, channels] of NumPy or JAX, from an array of any library. Raises UserError for other shapes.

    [B, channels, height, width], PyTorch's order, is transposed where it cannot be the other one.
    """
    if hasattr(images, "detach"):  # PyTorch
        images = images.detach().cpu().numpy()
    elif not hasattr(images, "shape"):
        try:
            images = np.asarray(images)
        except ValueError as error:
            raise UserError(f" are no array: {first_line(error)}", argument) from error
    wanted, torch = (*sides(size), channels), (channels, *sides(size))
    if images.ndim == 4 and images.shape[1:] == torch != wanted:
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[1:] != wanted:
        shown = ", ".join(map(str, wanted))
        raise UserError(f" have the shape {tuple(images.shape)}; the model takes [B, {shown}]", argument)
    is_real = np.issubdtype(images.dtype, np.number) and not np.issubdtype(images.dtype, np.complexfloating)
    if not (is_real or images.dtype.name == "bfloat16"):
        raise UserError(f" are of type {images.dtype}; they must be real numbers", argument)
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
    """float32 [B, height, width, channels] of PIL images, uint8 arrays [H, W, channels] or paths. Raises UserError."""
    single = isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", None) == 3
    crop = preprocessing.crop()
    if not (single or hasattr(images, "__iter__")):
        raise UserError(f" is a {type(images).__name__}; give images, or paths of them", "images")
    pixels = [_pixels(image, i, crop) for i, image in enumerate([images] if single else images)]
    if not pixels:
        raise UserError(": there are none", "images")
    found: np.ndarray = preprocessing(np.stack(pixels))
    return found


_CHANNELS = ((1,), (3,), (4,))  # of arrays that are images


def _pixels(image: Any, number: int, crop: CenterCrop) -> np.ndarray:
    """uint8 [height, width, channels] of one image."""
    name = f"images[{number}]"
    try:
        if isinstance(image, str | os.PathLike):
            name = str(image)
            return crop(read_file(paths.named(image)))
        if not isinstance(image, Image.Image):
            values = np.asarray(image)
            fits = values.dtype == np.uint8 and values.size and (values.ndim == 2 or values.shape[2:] in _CHANNELS)
            if not fits:
                raise UserError(f" is {values.dtype} {values.shape}; it must be uint8 [H, W, channels]", name)
            image = Image.fromarray(values.squeeze(-1) if values.ndim == 3 and values.shape[-1] == 1 else values)
        return resize_crop(upright(image, crop.channels), crop.resize, crop.size, crop.interpolation, crop.mode)
    except OSError as error:
        raise UserError(f" cannot be read: {error.strerror or error}", name) from error
    except BadImage as error:
        raise UserError(f" cannot be read as an image: {error}", name) from error
