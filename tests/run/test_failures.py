"""The last handler: what is raised becomes one line, and standard streams may be closed, full or not read."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile

import pytest
from conftest import ROOT
from safetensors import SafetensorError

from nvit_jax import UserError, files, paths
from nvit_jax.run import failures, workdir
from nvit_jax.training import tensorboard


def raises(error: BaseException):
    def run(words: list[str]) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("W: is a file"), 2, "W: is a file"),
        (FloatingPointError("the loss is nan at step 3"), 2, "the loss is nan at step 3"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "a/b: no permission"),
        (OSError(errno.ENOSPC, "No space left on device", "a", None, "b"), 2, "a -> b: no space left"),
        (OSError(errno.EIO, "Input/output error", "a\nb"), 2, r"a\nb: Input/output error"),
        (zipfile.BadZipFile("File is not a zip file"), 2, "a file cannot be read: BadZipFile: File is not a zip file"),
        (MemoryError(), 2, "this machine has too little memory (MemoryError)"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GiB\nmore"), 2, "the device has too little memory (RESOURCE_EXHAUSTED: 3"),
        (TypeError("x\ny"), 1, "TypeError: x (this is a fault of nvit_jax, not of yours; please report it"),
        (AssertionError(), 1, "AssertionError (this is a fault of nvit_jax"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_everything_is_one_line(tmp_path, capsys, error, code, line):
    """With the traceback in error.log where nobody has foreseen it, and shown by --debug."""
    words = ["run", f"--workdir={tmp_path}"]
    assert failures.guard(raises(error), words) == code
    out, said = capsys.readouterr()
    assert said.startswith(f"error: {line}") and len(said.splitlines()) == 1 and not out, said
    log = tmp_path / "error.log"
    foreseen = isinstance(error, UserError | FloatingPointError | KeyboardInterrupt)
    assert log.exists() == (str(log) in said) != foreseen
    assert foreseen or "Traceback" in log.read_text()
    if not isinstance(error, KeyboardInterrupt):
        assert failures.guard(raises(error), [*words, "--debug"]) == code
        said = capsys.readouterr().err
        assert "Traceback" in said and said.splitlines()[-1].startswith(f"error: {line}")


def test_without_a_workdir_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["convert", "a", "b"], ["run", "--workdir", "W"], ["prune", "--out=W/x"]):
        assert failures.guard(raises(TypeError("x")), words) == 1
        assert "--debug shows the traceback" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_path_of_a_library_error_is_that_of_our_function(tmp_path, monkeypatch):
    def opened(*arguments: object) -> None:
        raise zipfile.BadZipFile("File is not a zip file")

    monkeypatch.setattr(paths, "opened", opened)
    with pytest.raises(zipfile.BadZipFile) as caught:
        paths.read(tmp_path / "x", most=1)
    assert failures.failure(caught.value).line == f"{tmp_path / 'x'} cannot be read: BadZipFile: File is not a zip file"


def test_a_full_disk_while_others_write(tmp_path, monkeypatch):
    """tensorboardX, safetensors and tensorstore each have their own way to say so."""
    for error in (
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ValueError("RESOURCE_EXHAUSTED: Error writing"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ):
        with pytest.raises(UserError, match="could not write .*: no space left"), files.saving(tmp_path):
            raise error
    with pytest.raises(RuntimeError, match="memory"), files.saving(tmp_path):
        raise RuntimeError("RESOURCE_EXHAUSTED: memory of the device")
    scalars = tensorboard.Scalars(tmp_path / "tensorboard", 3)
    scalars.write(3, {"loss": 1.0})

    def full(event: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(scalars._file, "write_event", full)
        with pytest.raises(UserError, match="could not write .*tensorboard: no space left"):
            scalars.write(4, {"loss": 1.0})
    scalars.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents.") and b"loss" in events.read_bytes()


# ------------------------------------------------------------------------------------------------ the process


def shell(line: str, **options) -> subprocess.CompletedProcess[str]:
    """A line of sh in which $P is the program."""
    program = f"{sys.executable} {ROOT / 'main.py'}"
    return subprocess.run(
        ["/bin/bash", "-c", line.replace("$P", program)], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize(
    ("line", "codes", "words"),
    [
        ("$P run --help | head -1 > /dev/null; exit ${PIPESTATUS[0]}", (0, 141), ""),
        ("$P run --help | true; exit ${PIPESTATUS[0]}", (0, 141), ""),
        ("$P prnue 2>&1 | true; exit ${PIPESTATUS[0]}", (2,), ""),
        ("$P run --help >&-", (0,), ""),
        ("$P run --help >&- 2>&- <&-", (0,), ""),
        ("$P prnue >&- 2>&- <&-", (2,), ""),
        ("$P prnue <&-", (2,), "unknown command 'prnue'"),
        ("$P run --help > /dev/full", (2,), "error: standard output"),
        ("$P prnue 2> /dev/full", (2,), ""),
        ("PYTHONIOENCODING=ascii LC_ALL=C $P prüne", (2,), "unknown command"),
        ("$P $'\\xff'", (2,), "unknown command"),
    ],
)
def test_standard_streams(tmp_path, line, codes, words):
    done = shell(line, cwd=tmp_path, timeout=100)
    assert done.returncode in codes and words in done.stderr, done
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr and not list(tmp_path.iterdir())


def test_ctrl_c_in_the_first_seconds():
    """While packages are imported: no KeyboardInterrupt goes through them."""
    code = (
        "import time; from nvit_jax.run import failures\n"
        "def main():\n    print('ready', flush=True)\n    time.sleep(100)\nfailures.program(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (130, "error: interrupted\n")


@pytest.mark.parametrize("program", ["main.py", "convert_deit_weights.py"])
def test_ctrl_c_while_packages_are_imported(tmp_path, program):
    """Here the first of them sends it."""
    (tmp_path / "nvit_jax").mkdir()
    (tmp_path / "nvit_jax" / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    shutil.copy(ROOT / program, tmp_path)
    done = subprocess.run([sys.executable, tmp_path / program, "--version"], capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, b"error: interrupted\n")


def test_ctrl_c_clears_away_what_was_begun():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), failures.tidying():
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_signal_ends_a_run_at_once(monkeypatch):
    """The first is noted; a thread sees the second, so that it need not wait for what is compiled."""
    before, stop, codes, ended = signal.getsignal(signal.SIGTERM), workdir.StopSignal(), [], threading.Event()
    monkeypatch.setattr(workdir.os, "_exit", lambda code: (codes.append(code), ended.set()))
    with stop.listen():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received and not ended.wait(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(60) and codes == [143]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_lock_of_another_user(tmp_path, monkeypatch):
    """It may not be written, but it can be seen whether it is held."""
    before = os.open

    def another_users(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return before(path, flags, *mode)

    (tmp_path / ".lock").touch()
    monkeypatch.setattr(os, "open", another_users)
    with (
        workdir.locked(tmp_path),
        pytest.raises(UserError, match="another run is at work there"),
        workdir.locked(tmp_path),
    ):
        pass


def test_a_loop_in_the_place_of_a_stage(tmp_path):
    (tmp_path / "prune").symlink_to("prune")
    with pytest.raises(UserError, match="prune: links that lead back to themselves"):
        workdir.check_workdir(tmp_path)
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match="is a directory, not a file; move it away"), workdir.locked(tmp_path):
        pass
    (tmp_path / ".lock").rmdir()
    for target in (".lock", "nowhere/x"):
        (tmp_path / ".lock").symlink_to(target)
        with pytest.raises(UserError, match=r"/\.lock: .*; move it away$"), workdir.locked(tmp_path):
            pass
        (tmp_path / ".lock").unlink()


def test_regular_files_only(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "big").write_bytes(b"12345")
    for name, words in (
        ("pipe", "is a named pipe, not a file"),
        ("zero", "is a device, not a file"),
        ("big", "larger than"),
        ("", "is a directory, not a file"),
    ):
        with pytest.raises(UserError, match=words):
            paths.read(tmp_path / name, most=4)
    assert paths.read(tmp_path / "big", most=5) == b"12345"
    for path, words in (("gs://b/x", "paths of gs://"), (b"a\xff", "is not UTF-8"), ("a\0", "NUL"), ("", "is empty")):
        with pytest.raises(UserError, match=words):
            paths.named(path)
