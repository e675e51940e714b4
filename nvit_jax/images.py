"""Image files in class folders: which there are, their labels, and the pixels as DeiT evaluates them."""

import concurrent.futures
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from nvit_jax.errors import UserError

_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_pool = concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count())


def resize_crop(image: Image.Image, resize: int, size: int, interpolation: str, channels: int) -> np.ndarray:
    """uint8 [size, size, channels]: short side to `resize`, center crop, with torchvision's rounding."""
    image = image.convert("RGB" if channels == 3 else "L")
    short = min(image.size)
    if short != resize:
        width, height = (resize if side == short else int(resize * side / short) for side in image.size)
        image = image.resize((width, height), _FILTERS[interpolation])
    left, top = (round((side - size) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size))).reshape(size, size, channels)


class ImageFiles:
    """The images of a split, read when they are asked for: indexed like an array uint8 [n, size, size, channels]."""

    def __init__(
        self, root: pathlib.Path, names: Sequence[str], *, resize: int, size: int, interpolation: str, channels: int
    ) -> None:
        self.root, self.names = root, list(names)
        self.resize, self.size, self.interpolation, self.channels = resize, size, interpolation, channels

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.names), self.size, self.size, self.channels)

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: np.ndarray) -> "ImageFiles":
        """Some of the images, not read yet."""
        names = [self.names[i] for i in index]
        how = {"resize": self.resize, "size": self.size, "channels": self.channels}
        return ImageFiles(self.root, names, interpolation=self.interpolation, **how)

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        """UserError that names a file which cannot be read."""
        chosen = np.arange(len(self))[index]
        return np.stack(list(_pool.map(self._read, chosen)))

    def _read(self, number: int) -> np.ndarray:
        path = self.root / self.names[number]
        try:
            with Image.open(path) as image:
                return resize_crop(image, self.resize, self.size, self.interpolation, self.channels)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} cannot be read as an image: {error}") from error


def list_folder(root: pathlib.Path, key: str) -> dict[str, list[str]]:
    """{class folder: ["class/file", ...]}, both sorted. UserError when there is no root/class/image."""
    if not root.is_dir():
        raise UserError(f"config.{key}={root}: there is no such directory")
    found = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        files = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES)
        if files:
            found[folder.name] = [f"{folder.name}/{name}" for name in files]
    if not found:
        raise UserError(f"config.{key}={root} holds no images of the form {root}/CLASS/IMAGE.JPEG")
    return found


def read_classes(path: pathlib.Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(folder names, human names) from a file of lines "folder<TAB>name"; a class's label is its line from 0."""
    if not path.is_file():
        raise UserError(f"config.data.classes={path}: there is no such file")
    try:
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config.data.classes={path} cannot be read: {error}") from error
    folders = tuple(line[0].strip() for line in lines)
    if len(set(folders)) != len(folders) or not folders:
        raise UserError(f"config.data.classes={path}: the first column must name each class once")
    return folders, tuple(line[-1].strip() for line in lines)


def held_out(name: str, fraction: float) -> bool:
    """Whether a file belongs to the held-out part; decided by its name alone, so that more files move none."""
    digest = hashlib.sha256(name.rsplit("/", 1)[-1].encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
