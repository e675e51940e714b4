"""A table of bad inputs: each is answered by its one line and exit code 2, in time, and nothing is changed on disk."""

import contextlib
import io
import json
import os
import pathlib
import signal

import bad_inputs as session
import numpy as np
import pytest
from PIL import Image

from nvit_jax.files import write_json
from nvit_jax.formats.export import write_safetensors
from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.directory import Model, save_model
from nvit_jax.model.masks import full_masks
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.run import cli
from nvit_jax.run.config import default_config, flatten_config
from nvit_jax.run.configfile import builtin_names, load_config
from nvit_jax.run.shapes import SHAPES

ROOT = pathlib.Path(__file__).parent.parent.parent
LIMIT = 60  # seconds; the slowest takes one on an idle core
CASES = list(session.cases())


def a_model(channels: int = 1, classes: int = 10) -> Model:
    dims = ViTDims.uniform(image=8, patch=4, channels=channels, classes=classes, embed=8, depth=2, heads=2, mlp=16)
    rng = np.random.default_rng(0)
    import jax

    params = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), vit.shapes(dims))
    facts = Preprocessing(8, 16.0, (0.5,) * channels, (0.5,) * channels)
    return Model(dims, params, info={"preprocessing": facts.to_json(), "classes": []})


def make_world(place: pathlib.Path) -> None:
    """What the commands find: configs, models, data, a workdir, and files that are none."""
    os.chdir(place)
    pathlib.Path("tiny.py").write_text((ROOT / "tests" / "tiny.py").read_text())
    model = a_model()
    save_model("model", model)
    save_model("headless", a_model(classes=0))
    save_model("masked", Model(model.dims, model.params, full_masks(model.dims), model.info))
    pathlib.Path("exported").mkdir()
    write_safetensors(model, pathlib.Path("exported"))
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", 64), ("val", 16), ("test", 16)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 10
    np.savez("data.npz", **arrays)
    for name in ("a", "b"):
        pathlib.Path("images", name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(f"images/{name}/{number}.png")
    for split in ("train", "val"):
        pathlib.Path("flat", split).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (8, 8), 40 * number).save(f"flat/{split}/{number}.png")
    pathlib.Path("empty").mkdir()
    pathlib.Path("file").write_text("x")
    pathlib.Path("bad.py").write_text("def get_config(:\n")
    os.mkfifo("pipe")
    pathlib.Path("loop").symlink_to("loop")
    pathlib.Path("zero").symlink_to("/dev/zero")
    pathlib.Path("nowhere").symlink_to("gone")
    make_workdir(pathlib.Path("W"), model)


def make_workdir(workdir: pathlib.Path, model: Model) -> None:
    """As a finished run leaves it, in small."""
    row = {"top1": 0.5, "top5": 0.9, "params": 10, "macs": 10, "latency_ms": 1.0, "latency_batch": 32, "images": 360}
    dims = model.dims.to_json()
    for name in ("pretrain", "prune", "finetune", "eval"):
        record = {"status": "done", "id": name, "keys": {}, "inputs": {}, "files": []}
        write_json(workdir / name / "stage.json", record)
        write_json(workdir / name / "metrics.json", {"val_top1": 0.5})
    write_json(workdir / "config.json", {"config": {"seed": 0}, "versions": {"jax": "0"}, "device": "cpu"})
    write_json(workdir / "summary.json", {"dense": row, "pruned": row})
    metrics = {"criterion": "hvp", "target": {"macs_ratio": 0.7}, "dims": dims, "macs_ratio": 0.7, "params_ratio": 0.7}
    metrics |= {"predicted_latency_ratio": None, "predicted_latency_ms": None, "masked_vs_compact_max_abs_diff": 0.0}
    write_json(workdir / "prune" / "metrics.json", metrics)
    write_json(workdir / "prune" / "masked" / "model.json", {"format": 1, "dims": dims})
    line = {"step": 0, "pruning": 1, "dims": dims, "macs_ratio": 0.7, "val_top1": 0.5}
    (workdir / "prune" / "history.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line) + "\n")
    (workdir / "pretrain" / "log.jsonl").write_text('{"step": 5, "loss": 1.0}\n{"step": 10, "loss": 0.5}\n')
    (workdir / ".lock").touch()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> pathlib.Path:
    place, before = tmp_path_factory.mktemp("world"), pathlib.Path.cwd()
    try:
        make_world(place)
    finally:
        os.chdir(before)
    return place


def seen() -> dict[str, object]:
    """Everything below the working directory. A workdir that was looked at may be there, with nothing but its lock."""
    found: dict[str, object] = {}
    for path in sorted(pathlib.Path().rglob("*")):
        if path.name == ".lock" or (path.name == "new" and path.is_dir()):
            continue
        found[str(path)] = path.read_bytes() if path.is_file() and not path.is_symlink() else path.lstat().st_mode
    return found


def answer(case: session.Case) -> tuple[int, str, bool]:
    """(exit code, what stands in stderr, whether nothing was changed) of one command."""
    touched = {name: path.read_bytes() if path.is_file() else None for name, path in _edited(case)}
    for edit in case.edits:
        session.prepare(edit)
    before = seen()

    def too_long(number: int, frame: object) -> None:
        raise AssertionError(f"took more than {LIMIT} s")

    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(case.words())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    unchanged = seen() == before
    for name, content in touched.items():
        if content is None:
            pathlib.Path(name).unlink(missing_ok=True)
        else:
            pathlib.Path(name).write_bytes(content)
    return code, error.getvalue(), unchanged


def _edited(case: session.Case) -> list[tuple[str, pathlib.Path]]:
    return [(edit.split(" ")[1], pathlib.Path(edit.split(" ")[1])) for edit in case.edits]


@pytest.mark.parametrize("case", CASES, ids=[f"{number}" for number in range(1, len(CASES) + 1)])
def test_a_bad_input_is_answered_by_its_line(world, monkeypatch, case):
    monkeypatch.chdir(world)
    code, error, unchanged = answer(case)
    assert (code, error, unchanged) == (2, case.line + "\n", True)


def test_there_are_enough_of_every_kind():
    found = session.counts()
    assert sum(found.values()) >= 150 and min(found.values()) >= 5, found
    assert len({(case.edits, case.command) for case in CASES}) == len(CASES)


def test_every_config_key_has_a_shape_that_its_values_fit():
    assert SHAPES.keys() == flatten_config(default_config()).keys()
    for name in builtin_names():
        values = flatten_config(load_config(name))
        assert not {key: fault for key, value in values.items() if (fault := SHAPES[key].fault(value))}, name


def write_anew(place: pathlib.Path) -> None:
    """Run every command of bad_inputs.txt and write down what it answers."""
    make_world(place)
    lines: list[str] = []
    edits: list[str] = []
    for line in session.FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("error: "):
            continue
        lines.append(line)
        if line.startswith("$ "):
            code, error, unchanged = answer(session.Case("", tuple(edits), line[2:], ""))
            note = "" if (code, unchanged) == (2, True) else f"   <<< exit code {code}, {unchanged=}"
            lines.append((error.strip() or "error: ") + note)
            edits = []
        elif line and not line.startswith("#"):
            edits.append(line)
    session.FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_anew(pathlib.Path(folder))
