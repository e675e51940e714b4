"""The wheel, installed alone: what lies in it, and that the program runs from another folder."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from conftest import ENVIRONMENT, ROOT, read

import nvit_jax

pytestmark = pytest.mark.slow
SOURCES = ("nvit_jax", "configs", "pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE")


def run(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def has_setuptools() -> bool:
    """One that knows today's pyproject.toml."""
    found = importlib.metadata.distributions(name="setuptools")
    return any(int(one.version.split(".")[0]) >= 77 for one in found)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Built from a copy, so that nothing is left in the clone and nothing of an old build comes in."""
    place = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, place / "clone" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, place / "clone" / name)
    isolation = ["--no-build-isolation"] if has_setuptools() else []
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation]
    run(*pip, "--wheel-dir", place / "dist", place / "clone", cwd=place)
    (found,) = (place / "dist").iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    """The bin folder of an environment of its own, with nothing of ours but the wheel.

    It sees the packages that this Python has installed, but not what their .pth files add: no clone in editable mode.
    """
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True, with_pip=False)
    python = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    folder = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    pathlib.Path(folder, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_what_lies_in_the_wheel(wheel):
    assert wheel.name == f"nvit_jax-{nvit_jax.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
        scripts = file.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "nvit_jax").rglob("*.py")}
    modules |= {f"nvit_jax/{path.relative_to(ROOT)}" for path in (ROOT / "configs").glob("*.py")}
    of_the_build = f"nvit_jax-{nvit_jax.__version__}.dist-info/"
    assert {n for n in names if not n.startswith(of_the_build)} == modules | {"nvit_jax/py.typed"}
    assert f"{of_the_build}licenses/LICENSE" in names
    assert "nvit-jax = nvit_jax.run.cli:command" in scripts
    needed = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1].isalpha()]
    found = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if "Requires-Dist" in line]
    always = [line for line in found if "extra ==" not in line]
    assert len(always) == len(needed) and not any(line.startswith(("torch", "onnx")) for line in always)
    (torch,) = (line for line in found if line.endswith('extra == "torch"'))
    assert "==" not in torch.split(";")[0]  # a pin would replace a CUDA build


def test_the_program_runs_from_another_folder(installed, tmp_path):
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    where = {"cwd": tmp_path, "env": environment}
    home = pathlib.Path(run(installed / "python", "-c", "import nvit_jax; print(nvit_jax.__file__)", **where).strip())
    assert home.is_relative_to(installed.parent)
    assert run(installed / "nvit-jax", "--version", **where) == f"nvit-jax {nvit_jax.__version__}\n"
    assert "nvit-jax convert FILE DIR" in run(installed / "nvit-jax", "--help", **where)
    code = "import nvit_jax.configs.demo as demo; print(demo.__file__, demo.get_config('fast').pretrain.epochs)"
    assert run(installed / "python", "-c", code, **where).split() == [str(home.parent / "configs" / "demo.py"), "3.0"]
    out = run(installed / "nvit-jax", "run", "--config", "demo:fast", "--workdir", "W", **where)
    assert f"[report] W{os.sep}report.html" in out
    summary = read(tmp_path / "W" / "summary.json")
    assert list(summary) == ["dense", "pruned", "finetuned"]
    assert summary["finetuned"]["macs"] <= 0.5 * summary["dense"]["macs"] and summary["finetuned"]["images"] == 360
