"""Paths that a user names: looked at here, once, before anything is opened or written. Needs no JAX.

`label` says in a message where the path was given, such as "--workdir=" or "config.data.path=".
"""

import errno
import os
import pathlib
import re
import stat
from typing import BinaryIO

from nvit_jax.errors import UserError

Path = pathlib.Path
NAME_BYTES, PATH_BYTES = 255, 4095  # what Linux allows; macOS allows less of the second, and says so itself
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib makes gs:/ of gs://
_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def named(path: str | os.PathLike[str], label: str = "") -> Path:
    """The path. UserError for what names no file of this machine, whatever lies on its disks."""
    if not isinstance(path, str | bytes | os.PathLike):
        raise UserError(f"{label}{path!r:.100} is a {type(path).__name__}, not a path")
    text = os.fsdecode(path)
    if words := _fault(text):
        raise UserError(f"{label}{shown(text)}: {words}")
    return Path(text)


def shown(path: str | os.PathLike[str]) -> str:
    """A path in a message: of a long one the two ends."""
    text = os.fspath(path)
    if not text:
        return "''"
    return text if len(text) <= 200 else f"{text[:100]}...{text[-50:]}"


def _fault(text: str) -> str | None:
    if not text:
        return "the path is empty"
    if "\0" in text:
        return "a path cannot hold the character NUL"
    if match := _SCHEME.match(text):
        if match[1].lower() == "file":
            return "write the path alone, without file:"
        return f"paths of {match[1]}:// are not supported; copy the files to a disk, or mount the bucket as a directory"
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        return "the name is not UTF-8; rename it"
    if (longest := max(len(part) for part in encoded.split(b"/"))) > NAME_BYTES:
        return f"a name in it has {longest} bytes; file systems take {NAME_BYTES}"
    if len(encoded) > PATH_BYTES:
        return f"the path has {len(encoded)} bytes; systems take {PATH_BYTES}"
    return None


def kind(path: str | os.PathLike[str], label: str = "") -> str | None:
    """ "a file", "a directory", "a named pipe", ..., of links what they lead to; None where nothing is.

    UserError for what cannot be looked at: a loop of links, a directory without permission.
    """
    path = named(path, label)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{label}{path}: {in_words(error)}") from error
    return _kind_of(mode)


def _kind_of(mode: int) -> str:
    return next(words for test, words in _KINDS if test(mode))


def directory(path: str | os.PathLike[str], label: str = "") -> Path:
    """UserError unless a directory is there."""
    return _only(path, label, "directory")


def file(path: str | os.PathLike[str], label: str = "") -> Path:
    """UserError unless a regular file is there: pipes and devices may never end."""
    return _only(path, label, "file")


def _only(path: str | os.PathLike[str], label: str, wanted: str) -> Path:
    found = kind(path, label)
    if found != f"a {wanted}":
        what = f": there is no such {wanted}" if found is None else f" is {found}, not a {wanted}"
        raise UserError(f"{label}{path}{what}")
    return Path(path)


def opened(path: str | os.PathLike[str], label: str = "") -> BinaryIO:
    """A regular file, open for reading. UserError for everything else; no pipe is waited for."""
    path = named(path, label)
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UserError(f"{label}{path}: there is no such file") from error
    except OSError as error:
        file(path, label)  # what cannot be opened, such as a socket, is named
        raise UserError(f"{label}{path}: {in_words(error)}") from error
    if (found := _kind_of(os.fstat(number).st_mode)) != "a file":
        os.close(number)
        raise UserError(f"{label}{path} is {found}, not a file")
    return os.fdopen(number, "rb")


def read(path: str | os.PathLike[str], label: str = "", *, most: int) -> bytes:
    """The content of a regular file. UserError when it has more than `most` bytes, or as `opened`."""
    with opened(path, label) as content:
        try:
            found = content.read(most + 1)
        except OSError as error:
            raise UserError(f"{label}{path}: {in_words(error)}") from error
    if len(found) > most:
        raise UserError(f"{label}{path}: larger than the {most / 2**20:g} MiB that such a file has at most")
    return found


def for_writing(path: str | os.PathLike[str], label: str = "") -> Path:
    """A directory to be made or filled. UserError when it is a file, or the root of the file system."""
    found = kind(path, label)
    if found not in (None, "a directory"):
        raise UserError(f"{label}{path} is {found}, not a directory")
    if Path(path).resolve() == Path("/"):
        raise UserError(f"{label}{path} is the root of the file system; name a directory in it")
    return Path(path)


def in_words(error: OSError) -> str:
    """What the operating system says, with what to do where that is not clear."""
    if error.errno == errno.ELOOP:
        return "links that lead back to themselves"
    if error.errno == errno.ENAMETOOLONG:
        return "a name in it is too long for this file system"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "no space left"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "no permission"
    return error.strerror or str(error) or type(error).__name__
