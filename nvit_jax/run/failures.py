"""What ends a command, in one line: the last handler of everything that is raised. Needs no JAX.

A user's mistake, and what the operating system or a library says of a file, is exit code 2; a fault of ours is 1, and
the line says so. The traceback of what nobody has foreseen goes to error.log in the workdir.
"""

import contextlib
import os
import pathlib
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn

from nvit_jax.errors import UserError, first_line
from nvit_jax.paths import in_words

LOG = "error.log"
INTERRUPTED, BROKEN_PIPE = 130, 141  # as shells count signals: 128 + SIGINT, 128 + SIGPIPE
# Packages that read files: what they raise speaks of a file's content.
_READERS = ("json", "pickle", "zipfile", "zlib", "lzma", "gzip", "struct", "PIL", "safetensors", "orbax", "tensorstore")


class Failure(NamedTuple):
    """The line, the exit code, and whether the traceback is worth keeping."""

    line: str
    code: int
    keep: bool = True


def failure(error: BaseException) -> Failure:
    """What to say of an error."""
    first = first_line(error, 300)
    if isinstance(error, UserError | FloatingPointError):
        return Failure(str(error), 2, keep=False)
    if "RESOURCE_EXHAUSTED" in first:
        more = "lower the batch, or set accumulate or remat in its section, or config.parallel=fsdp"
        return Failure(f"the device has too little memory ({first[:200]}); {more}", 2)
    if isinstance(error, MemoryError):
        return Failure(f"this machine has too little memory ({first[:200]})", 2)
    if isinstance(error, OSError):
        names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, str | bytes)]
        where = " -> ".join(names) or _path_of(error)
        return Failure(f"{where or 'standard output, or a file'}: {in_words(error)}", 2)
    if type(error).__module__.split(".")[0] in _READERS or isinstance(error, UnicodeDecodeError | EOFError):
        return Failure(f"{_path_of(error) or 'a file'} cannot be read: {type(error).__name__}: {first[:200]}", 2)
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
        return Failure(f"JAX or its device failed: {first}", 1)
    what = type(error).__name__ if first == type(error).__name__ else f"{type(error).__name__}: {first}"
    return Failure(f"{what} (this is a fault of nvit_jax, not of yours; please report it, CONTRIBUTING.md says how)", 1)


def _path_of(error: BaseException) -> str:
    """The path that the innermost function of ours was at work on, "" where none is known."""
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").startswith("nvit_jax."):
            values = (frame.f_locals.get(name) for name in ("path", "file", "place", "directory", "folder"))
            found = next((str(value) for value in values if isinstance(value, str | pathlib.Path)), found)
    return found


def one_line(text: str) -> str:
    """As it can be printed everywhere: control characters, and bytes of names that are no UTF-8, are escaped."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escaped.encode("utf-8", "backslashreplace").decode()


def keep_traceback(error: BaseException, words: Sequence[str]) -> str:
    """Append the traceback to error.log of the command's workdir, if that is there; what to say of it."""
    workdir = _workdir(words)
    if workdir:
        with contextlib.suppress(OSError, ValueError):
            path = pathlib.Path(workdir, LOG)
            if path.parent.is_dir() and (path.is_file() or not os.path.lexists(path)):
                with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"nvit-jax {' '.join(words)}\n{text_of(error)}\n")
                return f"; the traceback is in {path}"
    return "; --debug shows the traceback"


def text_of(error: BaseException) -> str:
    """The traceback."""
    return "".join(traceback.format_exception(error))


def _workdir(words: Sequence[str]) -> str:
    """The value of --workdir or --out."""
    found = ""
    for word, following in zip(words, (*words[1:], ""), strict=True):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name in ("workdir", "out"):
            found = value if equals else following
    return found


# ------------------------------------------------------------------------------------------- around a command


def guard(run: Callable[[list[str]], int], words: Sequence[str]) -> int:
    """The exit code of `run(words)`, whatever it raises; one line says why. --debug among the words is ours."""
    debug, words = "--debug" in words, [word for word in words if word != "--debug"]
    try:
        return run(words)
    except KeyboardInterrupt:
        return _end("interrupted", INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and _is_of_output(error):
            return _output_failed(error)
        if debug:
            print(text_of(error), file=sys.stderr, end="")
        line, code, keep = failure(error)
        if _several() and not isinstance(error, UserError | FloatingPointError):
            more = "the same command on all hosts resumes"
            if any(word in str(error) for word in _LOST):
                return _end(f"a process of this run failed or was lost ({first_line(error)}); {more}", 1)
            line = f"this process failed and ends the others: {line}; {more}"
        return _end(line + (keep_traceback(error, words) if keep and not debug else ""), code)


# What JAX says when another process does not answer any more.
_LOST = ("UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "Gloo", "heartbeat", "arrier", "Connection")


def _several() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def _end(line: str, code: int) -> int:
    """Say it and leave. With several processes at once: an orderly end would wait for those that wait for this one."""
    with contextlib.suppress(OSError):
        print(f"error: {one_line(line)}", file=sys.stderr)
    if _several():
        import time

        import jax

        if jax.process_index() == 0:
            time.sleep(3)  # the others' connections hang on this one: let them say what they have to
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return code


def _is_of_output(error: OSError) -> bool:
    """Whether standard output takes nothing more: its reader has ended (`| head`), or its disk is full."""
    if isinstance(error, BrokenPipeError):
        return True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            return True
    return False


def _output_failed(error: OSError) -> int:
    """Who reads no more needs no words; what is still to be written goes nowhere."""
    if not isinstance(error, BrokenPipeError):
        with contextlib.suppress(OSError):
            print(f"error: standard output: {in_words(error)}", file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return BROKEN_PIPE if isinstance(error, BrokenPipeError) else 2


def prepare_output() -> None:
    """Closed standard streams lead to nowhere, so that no file of ours takes their number; all text can be printed."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
                if opened != number:
                    os.dup2(opened, number)
                    os.close(opened)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def program(main: Callable[[], int]) -> NoReturn:
    """Run a `main` that ends with `guard`, as a process of its own."""
    prepare_output()
    signal.signal(signal.SIGINT, say_interrupted)
    code = main()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as error:
        code = code or _output_failed(error)
    if code:
        os._exit(code)  # everything is closed; a thread of Orbax whose save has failed would be waited for
    sys.exit(0)


def say_interrupted(number: int, frame: types.FrameType | None) -> None:
    """The handler of Ctrl-C while packages are imported: what they make of KeyboardInterrupt is not ours to choose."""
    os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def tidying() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt, so that what was begun is cleared away."""
    try:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
