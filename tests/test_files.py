"""Files that are never half-written, and saved states that are damaged."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import nvit_jax
from nvit_jax import files
from nvit_jax.training.states import StateSaver

OWN = ("a", "params")


def test_permission_and_full_disk_keep_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model"
    with files.new_directory(path, OWN) as beside:
        (beside / "a").write_text("old")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "mkdir", refuse)
        with pytest.raises(nvit_jax.UserError, match="no permission to write"), files.new_directory(path, OWN):
            pass

    # A child that may write files of at most 4 KiB stands for a full disk.
    code = f"""
import pathlib, resource, signal, numpy as np
from nvit_jax import files
from nvit_jax.training.states import StateSaver
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
saver = StateSaver(pathlib.Path({str(tmp_path / "state")!r}))
try:
    saver.save(2, {{"x": np.random.rand(10000)}})
    saver.wait()
except Exception as error:
    print(type(error).__name__, error)
try:
    with files.new_directory(pathlib.Path({str(path)!r}), {OWN!r}) as beside:
        files.save_arrays(beside / "params", {{"x": np.random.rand(10000)}})
except Exception as error:
    print(type(error).__name__, error)
"""
    saver = StateSaver(tmp_path / "state")
    saver.save(1, {"x": np.arange(3.0)})
    saver.close()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2 and all(line.startswith("UserError") and "could not write" in line for line in lines), done
    assert (path / "a").read_text() == "old"
    saver = StateSaver(tmp_path / "state")
    step, state = saver.restore({"x": np.zeros(3)}, print)
    assert step == 1 and state["x"].tolist() == [0, 1, 2]


def write(path, **content):
    with files.new_directory(path, OWN) as beside:
        for name, text in content.items():
            (beside / name).write_text(text)


def test_a_new_directory_keeps_what_is_not_its_own(tmp_path, monkeypatch):
    """Files, directories and links, what they hold and where they lead."""
    path = tmp_path / "model"
    write(path, a="1", params="1")
    (path / "notes.txt").write_text("mine")
    (path / "mine" / "deep").mkdir(parents=True)
    (path / "mine" / "deep" / "a").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("mine")
    (path / "link").symlink_to(tmp_path / "elsewhere")
    write(path, a="2")
    assert files.list_files(path) == ["a", "link", "mine/deep/a", "notes.txt"]
    assert (path / "a").read_text() == "2" and (path / "mine" / "deep" / "a").read_text() == "mine"
    assert (tmp_path / "elsewhere" / "a").read_text() == "mine"
    with pytest.raises(RuntimeError), files.new_directory(path, OWN) as beside:
        (beside / "a").write_text("3")
        raise RuntimeError
    assert (path / "a").read_text() == "2" and sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "model"]
    # A link is filled where it leads; "." has a name of its own.
    (tmp_path / "to_model").symlink_to(path)
    write(tmp_path / "to_model", a="4")
    assert (tmp_path / "to_model").is_symlink() and (path / "a").read_text() == "4"
    monkeypatch.chdir(path)
    write(pathlib.Path(), a="5")
    assert (path / "a").read_text() == "5" and (path / "notes.txt").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(nvit_jax.UserError, match="is a file"):
        write(tmp_path / "file", a="6")


@pytest.mark.parametrize("killed_at", range(4))
def test_a_new_directory_that_is_killed(tmp_path, monkeypatch, killed_at):
    """At each of its renames: what was there is put back, or ends in its place with the next one."""
    path, replace, moved = tmp_path / "model", os.replace, []
    write(path, a="1", params="1")
    (path / "notes.txt").write_text("mine")

    def dies(source, target):
        moved.append(source)
        if len(moved) == killed_at + 1:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        if killed_at < 3:
            with pytest.raises(KeyboardInterrupt):
                write(path, a="2")
        else:
            write(path, a="2")
    files.recover(path)
    assert (path / "a").read_text() == ("1" if killed_at < 2 else "2")
    write(path, a="3")
    assert files.list_files(tmp_path) == ["model/a", "model/notes.txt"]


def test_files_are_handed_over_without_loss(tmp_path):
    """A name that is taken, a directory where a file stands now, a file where a directory stands."""
    old, new = tmp_path / "old", tmp_path / "new"
    for place, names in ((old, ("own", "taken", "below/file", "plain")), (new, ("taken", "below", "plain/x"))):
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(f"{place.name} {name}")
    renamed = files.hand_over(old, new, {"own"}.__contains__)
    assert sorted(path.relative_to(new).as_posix() for path in renamed) == ["below-file", "plain.kept", "taken.kept"]
    assert (new / "taken.kept").read_text() == "old taken" and (new / "taken").read_text() == "new taken"
    assert (new / "below-file").read_text() == "old below/file" and (new / "below").read_text() == "new below"
    assert not old.exists() and not (new / "own").exists()
    (old / "below").mkdir(parents=True)
    (old / "taken").write_text("once more")
    assert files.hand_over(old, new, {"own"}.__contains__) == [new / "taken.kept2"]


# What tensorstore's threads say, now and then, after a read that failed and was reported: "Event loop is closed".
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["flipped", "truncated", "deleted", "not finite"])
def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, how):
    saver = StateSaver(tmp_path)
    for step in (3, 5):
        value = np.nan if how == "not finite" and step == 5 else float(step)
        saver.save(step, {"x": np.full(5000, value), "n": np.int32(step)})
    saver.wait()
    biggest = max((f for f in (tmp_path / "5").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(biggest.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 0xFF
        biggest.write_bytes(content)
    elif how == "truncated":
        biggest.write_bytes(content[: len(content) // 2])
    elif how == "deleted":
        for file in (tmp_path / "5" / "state").rglob("d/*"):  # one file alone may be there twice
            file.unlink()
    said = []
    step, state = saver.restore({"x": np.zeros(5000), "n": np.int32(0)}, said.append)
    assert step == 3 and state["n"] == 3 and "is damaged" in said[0]
    saver.save(5, {"x": np.full(5000, 5.0), "n": np.int32(5)})
    assert saver.restore({"x": np.zeros(5000), "n": np.int32(0)}, said.append)[0] == 5
