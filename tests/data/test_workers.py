"""Reading ahead holds for every source, and its processes end with the one that started them."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT

from nvit_jax.data.datasets import Loading, load_dataset
from nvit_jax.data.pipeline import train_stream


class Where:
    """An augmentation that writes down which thread and process it ran in."""

    def __call__(self, content, rng):
        import multiprocessing
        import threading

        main = threading.current_thread() is threading.main_thread()
        return np.array([multiprocessing.parent_process() is not None, not main], np.uint8).reshape(1, 1, 2)


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> pathlib.Path:
    path, rng = tmp_path_factory.mktemp("npz") / "a.npz", np.random.default_rng(0)
    content = {f"{s}_images": rng.integers(0, 256, (12, 8, 8, 3)).astype(np.uint8) for s in ("train", "val", "test")}
    np.savez(path, **content, **{f"{s}_labels": np.arange(12) % 3 for s in ("train", "val", "test")})
    return path


def batches(npz, pixels, **loading) -> list[np.ndarray]:
    stream = train_stream(
        load_dataset("npz", str(npz), loading=Loading(**loading)).split("train"), 4, (0,), pixels=pixels
    )
    try:
        return [stream(step)["image"] for step in range(4)]
    finally:
        stream.close()


def test_arrays_are_augmented_outside_of_the_training_thread(npz):
    """In threads by default; in processes where there are any. Numbers are the same (tests/data/test_data.py)."""
    assert np.concatenate(batches(npz, Where())).reshape(-1, 2).tolist() == [[0, 1]] * 16
    found = np.concatenate(batches(npz, Where(), workers=1)).reshape(-1, 2)
    assert len(found) == 16 and found[:, 0].all()


SCRIPT = """
import multiprocessing, sys, time
from nvit_jax.data.datasets import Loading, load_dataset
from nvit_jax.data.pipeline import train_stream
if __name__ == "__main__":
    data = load_dataset("npz", sys.argv[1], loading=Loading(workers=2))
    stream = train_stream(data.split("train"), 4, (0,))
    stream(0)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(1000)
"""


def alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.fault
@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_workers_end_within_ten_seconds_of_their_parents_kill(npz, tmp_path):
    script = tmp_path / "reads.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(npz)], cwd=ROOT, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    try:
        assert len(workers) == 2 and all(alive(pid) for pid in workers)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10  # what is promised; they take less than one
        while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(alive(pid) for pid in workers)
    finally:
        process.kill()
        for pid in workers:  # first: they hold the other end of its output
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
