"""Files that are never half-written, and saved states that are damaged."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import nvit_jax
from nvit_jax import files


def test_permission_and_full_disk_keep_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model"
    with files.new_directory(path) as beside:
        (beside / "a").write_text("old")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "mkdir", refuse)
        with pytest.raises(nvit_jax.UserError, match="no permission to write"), files.new_directory(path):
            pass

    # A child that may write files of at most 4 KiB stands for a full disk.
    code = f"""
import pathlib, resource, signal, numpy as np
from nvit_jax import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
saver = files.StateSaver(pathlib.Path({str(tmp_path / "state")!r}))
try:
    saver.save(2, {{"x": np.random.rand(10000)}})
    saver.wait()
except Exception as error:
    print(type(error).__name__, error)
try:
    with files.new_directory(pathlib.Path({str(path)!r})) as beside:
        files.save_arrays(beside / "params", {{"x": np.random.rand(10000)}})
except Exception as error:
    print(type(error).__name__, error)
"""
    saver = files.StateSaver(tmp_path / "state")
    saver.save(1, {"x": np.arange(3.0)})
    saver.close()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2 and all(line.startswith("UserError") and "could not write" in line for line in lines), done
    assert (path / "a").read_text() == "old"
    saver = files.StateSaver(tmp_path / "state")
    step, state = saver.restore({"x": np.zeros(3)}, print)
    assert step == 1 and state["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("how", ["flipped", "truncated", "deleted", "not finite"])
def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, how):
    saver = files.StateSaver(tmp_path)
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
