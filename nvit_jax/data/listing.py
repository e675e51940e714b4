"""Folders of images: which files of root/CLASS/... are examples, and what is left out. Nothing is opened."""

import collections
import dataclasses
import os
import pathlib
import stat
import unicodedata
from collections.abc import Iterator

from nvit_jax import paths
from nvit_jax.errors import UserError

SUFFIXES = frozenset(
    (
        ".jpeg",
        ".jpg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".webp",
        ".bmp",
        ".dib",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".tif",
        ".tiff",
        ".gif",
        ".avif",
        ".avifs",
        ".jp2",
        ".j2k",
        ".jpx",
        ".jpf",
        ".jpc",
        ".j2c",
    )
)
_JUNK = frozenset(
    (
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "@tmp",
        "__macosx",
        "#recycle",
        "#snapshot",
        "~snapshot",
        "$recycle.bin",
        "recycler",
        "network trash folder",
        "temporary items",
        "lost+found",
        "__pycache__",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
        "system volume information",
    )
)
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
_DEPTH = 3  # folders below the one of a class
_MANY = 1_000_000  # folders of one root


@dataclasses.dataclass(frozen=True)
class Listing:
    """What was found below a root."""

    files: dict[str, list[str]]  # {class folder: ["class/image", "class/folder/image", ...]}, both sorted
    labelled: bool  # False: no class folders, all images lie in the root itself, under the key ""
    notes: tuple[str, ...]  # what a person should know about what was left out


def is_junk(name: str) -> bool:
    """What systems leave behind: hidden files, thumbnails, resource forks ("._cat.jpg")."""
    return name.startswith(".") or name.lower() in _JUNK


def list_folder(root: pathlib.Path, key: str) -> Listing:
    """All images below root/CLASS, or where there are none those in root itself. UserError when there is no image."""
    where = f"config.{key}={root}"
    left = _Left(os.path.realpath(root))
    found: dict[str, list[str]] = {}
    empty = []
    try:
        paths.directory(root, f"config.{key}=")
        with os.scandir(root) as entries:
            folders = sorted(e.name for e in entries if not is_junk(e.name) and left.is_folder(e))
        for name in folders:
            _check_name(name, where)
            files = sorted(f"{name}/{file}" for file in _images(os.path.join(root, name), left))  # noqa: PTH118
            if files:
                found[name] = files
            else:
                empty.append(name)
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from error
    if not found and (own := _own_images(root, left, where)):
        return Listing({"": own}, False, (f"{where}: {len(own)} images without class folders: they have no labels",))
    if not found:
        raise UserError(f"{where} holds no images of the form {root}/CLASS/IMAGE.JPEG{left.words('; ')}")
    _check_layout(found, where)
    _check_twins(found, where)
    outside = _own_images(root, left, where)
    return Listing(found, True, tuple(_notes(found, empty, outside, left, where)))


@dataclasses.dataclass
class _Left:
    """What is no image."""

    root: str  # without links
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    special: list[str] = dataclasses.field(default_factory=list)
    deep: list[str] = dataclasses.field(default_factory=list)
    back: list[str] = dataclasses.field(default_factory=list)
    seen: set[tuple[int, int]] = dataclasses.field(default_factory=set)

    def words(self, before: str = "") -> str:
        """Empty when there is nothing to say."""
        parts = []
        if count := self.kinds.total():
            kinds = [
                f"{number} {kind or 'without suffix'}"
                for kind, number in sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))[:5]
            ]
            more = ", ..." if len(self.kinds) > 5 else ""
            parts.append(f"{count} files are left out, their suffixes are no image's ({', '.join(kinds)}{more})")
        if self.special:
            parts.append(f"{len(self.special)} are no regular files and left out, {self.special[0]} for one")
        if self.deep:
            parts.append(f"{len(self.deep)} folders are too deep and left out, {self.deep[0]} for one")
        if self.back:
            parts.append(f"{len(self.back)} links lead back to this folder and are left out, {self.back[0]} for one")
        return before + "; ".join(parts) if parts else ""

    def is_folder(self, entry: "os.DirEntry[str]") -> bool:
        """Not a link that leads into the root again, or above it, where other classes lie."""
        if not _is_directory(entry):
            return False
        if entry.is_symlink():
            real = os.path.join(os.path.realpath(entry.path), "")  # noqa: PTH118
            root = os.path.join(self.root, "")  # noqa: PTH118
            if root.startswith(real) or real.startswith(root):
                self.back.append(_shown(entry.path))
                return False
        return True


def _own_images(root: pathlib.Path, left: _Left, where: str) -> list[str]:
    """Images that lie in root itself, sorted."""
    try:
        with os.scandir(root) as entries:
            files = [e for e in entries if not (is_junk(e.name) or _is_directory(e))]
            images = [e for e in files if os.path.splitext(e.name)[1].lower() in SUFFIXES]  # noqa: PTH122
            left.special += [_shown(e.path) for e in images if _is_special(e)]
            return sorted(e.name for e in images if not _is_special(e))
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from error


def _images(folder: str, left: _Left, below: str = "", depth: int = 0) -> Iterator[str]:
    """Paths of images relative to a class's folder. Links are followed, once."""
    facts = os.stat(folder)  # noqa: PTH116 (as strings: there may be millions)
    if (facts.st_dev, facts.st_ino) in left.seen and depth:
        return  # a link back
    left.seen.add((facts.st_dev, facts.st_ino))
    if len(left.seen) > _MANY:
        raise UserError(f"{folder}: there are more than {_MANY:,} folders; is this a folder of images?")
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_junk(entry.name):
                continue
            if _is_directory(entry):
                if not left.is_folder(entry):
                    continue
                if depth < _DEPTH:
                    yield from _images(entry.path, left, f"{below}{entry.name}/", depth + 1)
                else:
                    left.deep.append(_shown(entry.path))
                continue
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
            if suffix not in SUFFIXES:
                left.kinds[_shown(suffix)] += 1
            elif _is_special(entry):
                left.special.append(_shown(entry.path))
            else:
                yield below + entry.name


def _is_directory(entry: "os.DirEntry[str]") -> bool:
    """Also behind links. A link to itself is a broken image, as one to nowhere is."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_special(entry: "os.DirEntry[str]") -> bool:
    """Pipes, sockets and devices, also behind links. A link to nowhere is a broken image, as a file cut off is."""
    try:
        return not (entry.is_file() or stat.S_ISREG(entry.stat().st_mode))
    except OSError:
        return False


def _shown(name: str) -> str:
    """To be printed, whatever the bytes of a name are."""
    return name.encode("utf-8", "backslashreplace").decode()


def _check_name(name: str, where: str) -> None:
    if _shown(name) != name:
        raise UserError(f"{where}: the folder {_shown(name)!r} has a name that is not UTF-8; rename it")


def _check_layout(found: dict[str, list[str]], where: str) -> None:
    """UserError for a folder of splits in the place of one split."""
    splits = [name for name in found if name.lower() in _SPLITS]
    if len(splits) == len(found) and any(_below(files) for files in found.values()):
        raise UserError(
            f"{where} holds {', '.join(splits)}, which are splits and no classes; name one of them, or set "
            "config.data.path for train/ and val/ together"
        )


def _below(files: list[str]) -> list[str]:
    """Those in folders below the one of their class."""
    return [file for file in files if file.count("/") > 1]


def _check_twins(found: dict[str, list[str]], where: str) -> None:
    """UserError for two folders whose names look the same."""
    known: dict[str, str] = {}
    for name in found:
        if known.setdefault(normal(name), name) != name:
            raise UserError(
                f"{where} holds {name!r} twice, written in two Unicode forms (composed and decomposed); "
                "move the images into one folder"
            )


def normal(name: str) -> str:
    """One spelling of what looks the same: macOS stores letters and their accents apart."""
    return unicodedata.normalize("NFC", name)


def _notes(found: dict[str, list[str]], empty: list[str], outside: list[str], left: _Left, where: str) -> Iterator[str]:
    if words := left.words(f"{where}: "):
        yield words
    if below := [file for files in found.values() for file in _below(files)]:
        yield f"{where}: {len(below)} images lie in folders below the one of their class, {_shown(below[0])} for one"
    if outside:
        one = _shown(outside[0])
        yield f"{where}: {len(outside)} images lie outside of all class folders and are left out, {one} for one"
    if empty:
        named = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        yield f"{where}: {len(empty)} folders hold no images and are no classes: {named}"
