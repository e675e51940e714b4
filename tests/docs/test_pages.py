"""The pages for people: their Python runs, their commands exist, their links lead somewhere, their lists are complete.

Every plain ```python block of a page runs, in order, in one namespace a page, in a folder of its own. `PREPARED` makes
what a page takes for granted there: files, and names such as `images`. What cannot run is fenced as text or console.
Times are made up from the MACs: a page that prunes to a part of the latency has to work on a machine of any load.
Commands in ```sh blocks are not run: the parsers of the command line must accept them.
"""

import importlib
import itertools
import pathlib
import re
import runpy
import shlex
import sys

import families
import jax
import numpy as np
import pytest
from conftest import ROOT, VARIANTS, small_dims

import nvit_jax
from nvit_jax.data.datasets import load_dataset
from nvit_jax.files import read_json
from nvit_jax.formats import libraries
from nvit_jax.latency import timing
from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims, attention_macs, count_macs, mlp_macs
from nvit_jax.model.directory import Model, save_model
from nvit_jax.pruning import one_shot
from nvit_jax.run import flags
from nvit_jax.run.commands import convert, prune
from nvit_jax.run.config import default_config, flatten_config

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
sys.path.append(str(DOCS / "_ext"))


def name_of(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: pathlib.Path, language: str) -> list[tuple[int, str]]:
    """(line of the first line, text) of every block in a language."""
    text = page.read_text()
    found = [m for m in FENCE.finditer(text) if m[1] == language]
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in found]


# ------------------------------------------------------------------------------------------------- Python


def digits_model() -> Model:
    """Two narrow blocks for the digits, untrained."""
    dims = ViTDims.uniform(image=8, patch=4, channels=1, classes=10, embed=32, depth=2, heads=2, mlp=64)
    data = load_dataset("digits")
    info = {"preprocessing": data.preprocessing.to_json(), "classes": list(data.classes)}
    return Model(dims, vit.init(dims, jax.random.key(0)), info=info)


def _readme() -> dict:
    save_model("deit_tiny", digits_model())
    images, labels = load_dataset("digits").split("train").read(slice(0, 128))
    return {"images": images, "labels": labels}


def _quickstart() -> dict:
    save_model("runs/demo/finetune/model", digits_model())
    return {}


def _python() -> dict:
    save_model("runs/demo/pretrain/model", digits_model())
    return {}


PREPARED = {
    "README.md": _readme,
    "docs/quickstart.md": _quickstart,
    "docs/python.md": _python,
    "docs/export.md": lambda: {"model": digits_model()},
}


def milliseconds(piece: tuple[ViTDims, str]) -> float:
    """Of a piece that `timing.compile_pieces` is asked for."""
    dims, name = piece
    parts = {"attention": attention_macs(dims, 0) * dims.depth, "mlp": mlp_macs(dims, 0) * dims.depth}
    whole = count_macs(dims)
    return (parts | {"model": whole, "rest": whole - sum(parts.values())})[name] / 1e5


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "compile_pieces", lambda pieces, batch, dtype: pieces)
    monkeypatch.setattr(timing, "time_in_turns", lambda pieces, n: np.array([[milliseconds(p) for p in pieces]] * n))
    monkeypatch.setattr(one_shot, "IMAGES", 100)  # what the page calls is run, on fewer images
    names = PREPARED[name_of(page)]()
    for line, code in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


# ----------------------------------------------------------------------------------------------- commands


def commands(text: str) -> list[list[str]]:
    """The words of every command of ours in a shell block, also of those handed to ssh in quotes."""
    found = []
    text = re.sub(r"\$\w+", "0", text.replace("\\\n", " "))
    for line in re.split(r"\n|&&|;", text):
        words = shlex.split(line, comments=True) if line.count('"') % 2 == 0 else line.replace('"', " ").split()
        for word in words:
            if " " in word:
                found += commands(word.partition("=")[2] if word.startswith("--command=") else word)
        names = [pathlib.Path(word).name for word in words]
        for program in ("nvit-jax", "main.py", "pytest"):
            if program in names:
                found.append([program, *words[names.index(program) + 1 :]])
        found += [words[i:] for i, word in enumerate(words) if word.startswith("benchmarks/")]
        if "-m" in words and (module := words[words.index("-m") + 1]).startswith(("tests.", "benchmarks.")):
            found.append([module, *words[words.index("-m") + 2 :]])
    return [[word for word in command if word not in ("&", "wait")] for command in found]


def written() -> list[tuple[str, list[str]]]:
    """(page, command) of all pages."""
    return [(name_of(p), c) for p in PAGES for _, text in blocks(p, "sh") for c in commands(text)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with what the pages' commands take for granted."""
    monkeypatch.chdir(tmp_path)
    for folder in ("deit_tiny", "features", "imagenet/train", "imagenet/val", "photos"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("deit_tiny/model.json", "features/model.json", "classes.tsv"):
        (tmp_path / file).touch()
    (tmp_path / "configs").symlink_to(ROOT / "configs")


def test_the_pages_have_commands():
    programs = [command[0] for _, command in written()]
    assert programs.count("nvit-jax") > 15
    assert {"main.py", "pytest", "tests.ablations.criteria", "tests.ablations.memory"} <= set(programs)


@pytest.mark.parametrize(("page", "command"), written(), ids=lambda value: value if isinstance(value, str) else "")
def test_commands_exist(page, command, files):
    program, *words = command
    if program == "main.py" or command[:2] == ["nvit-jax", "run"]:
        flags.parse(command if program == "main.py" else [program, *words[1:]])
    elif command[:2] == ["nvit-jax", "prune"]:
        prune.make_plan(words[1:])
    elif program == "nvit-jax":
        assert words[0] == "convert"
        convert._parser().read(words[1:])
    elif program.startswith("benchmarks."):
        importlib.import_module(program).parser().parse_args(words)
    elif program.endswith(".sh"):
        assert (ROOT / program).exists() and not words, program
    elif program.startswith("benchmarks/"):
        runpy.run_path(str(ROOT / program))["parser"]().parse_args(words)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), words
    else:
        check_ablation(program, words)


def check_ablation(module: str, words: list[str]) -> None:
    """Its options stand in its source, and the config keys that it is given exist."""
    folder = ROOT / "tests" / "ablations"
    source = (folder / f"{module.rpartition('.')[2]}.py").read_text()
    if "draws" in source:
        source += (folder / "draws.py").read_text()
    keys = flatten_config(default_config())
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--")
            assert f'"--{name}"' in source or f'"{name}"' in source, f"{module} has no option {word}"
        elif "=" in word:
            key = word.split("=")[0]
            assert key in keys or f"prune.target.{key}" in keys, word


# -------------------------------------------------------------------------------------------------- links


def anchors(page: pathlib.Path) -> set[str]:
    """Of the headings of a page, as GitHub and MyST make them; and of what the page includes."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for other in re.findall(r"^```\{include\} (\S+)$", page.read_text(), re.MULTILINE):
        found |= anchors(page.parent / other)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_names_in_the_text_exist(page):
    """Config keys and files of this repository, where they stand in `code`."""
    keys = flatten_config(default_config())
    sections = {key.split(".")[0] for key in keys if "." in key}
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\s]+)`", text):
        if code.startswith(("nvit_jax/", "tests/", "configs/", "benchmarks/")):
            assert list(ROOT.glob(code.split(":")[0])), code
        word = code.removeprefix("--config.").split("=")[0].removesuffix(".*")
        if code.startswith("--config.") or (word.split(".")[0] in sections and "/" not in code and "(" not in code):
            known = word in keys or any(key.startswith(f"{word}.") for key in keys)
            assert known or word.endswith((".json", ".npz", ".jsonl", ".py", "KEY")), code


# -------------------------------------------------------------------------------------------------- lists


def test_the_front_page_is_short():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 200
    assert all(code.count("\n") <= 12 for _, code in blocks(ROOT / "README.md", "text"))


def test_every_config_key_is_explained():
    from config_table import sections

    keys = {key.name: key.description for section in sections() for key in section.keys}
    assert keys.keys() == flatten_config(default_config()).keys()
    assert not [name for name, description in keys.items() if not description]


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "reference" / "api.md").read_text()
    named = [name for line in re.findall(r"\{public-names\} (.+)", text) for name in line.split()]
    assert sorted(named) == sorted(set(nvit_jax.__all__) - {"__version__"})


def test_the_house_is_drawn_as_it_stands():
    text = (DOCS / "design.md").read_text()
    package = pathlib.Path(nvit_jax.__file__).parent
    wings = {path.parent.name for path in package.glob("*/__init__.py")} - {"configs"}
    assert set(re.findall(r"^nvit_jax/(\w+)/ ", text, re.MULTILINE)) == wings


def test_versions_agree():
    assert f"version: {nvit_jax.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {nvit_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_page_is_prepared():
    assert {name_of(page) for page in PAGES if blocks(page, "python")} == set(PREPARED)


@pytest.mark.parametrize(
    ("name", "table"),
    [("rotation", "table"), ("recovery", "table"), ("budgets", "sizes_table"), ("budgets", "steps_table"),
     ("features", "result_table"), ("features", "choice_table"), ("torch_pruned", "result_table")],
)  # fmt: skip
def test_an_ablation_is_what_was_run(name, table):
    found = read_json(ROOT / "benchmarks" / "results" / f"{name}.json")
    made = getattr(importlib.import_module(f"tests.ablations.{name}"), table)(found)
    assert made in (ROOT / "docs" / "results.md").read_text()


def test_the_ablation_of_one_shot_is_what_was_run():
    one_shot = importlib.import_module("tests.ablations.one_shot")
    options = one_shot.parser().parse_args(["--model=m", "--images=i", "--classes=c", "--out=o"])
    found = read_json(ROOT / "benchmarks" / "results" / "one_shot_ablation.json")
    assert one_shot.table(found, list(one_shot.cells(options))) in (ROOT / "docs" / "results.md").read_text()


def test_the_front_page_says_what_was_run():
    """Means of the table of finetuned models, to a tenth of a percent."""
    found = read_json(ROOT / "benchmarks" / "results" / "finetuned_deit_tiny_cpu.json")
    front = (ROOT / "README.md").read_text()
    said = [("dense", None, "top1")]
    said += [(name, ratio, "top1_pruned") for name in ("one_shot", "fisher", "nvit") for ratio in (0.5, 0.3)]
    for method, ratio, what in said:
        values = [c[what] for c in found["cells"] if (c["method"], c["ratio"]) == (method, ratio)]
        assert f"{100 * np.mean(values):.1f} %" in front, (method, ratio)


# ----------------------------------------------------------------------------------------------- picture


@pytest.mark.parametrize("top1", [(0.967, 0.967, 0.969), (0.967, 0.969, 0.967), (0.97, 0.5, 0.97)])
def test_labels_of_the_front_pages_picture_do_not_overlap(top1):
    """Models of nearly the same accuracy, and one that is far off."""
    picture = runpy.run_path(str(DOCS / "picture.py"))
    places = zip(("dense", "pruned", "finetuned"), top1, (53.0, 32.0, 32.0), strict=True)
    summary = {name: {"top1": t, "latency_ms": ms, "images": 360, "latency_batch": 256} for name, t, ms in places}
    dims = {"embed": 64, "heads": [4] * 6, "qk": [16] * 6, "v": [16] * 6, "mlp": [256] * 6}
    figure = picture["draw"](summary, dims, dims | {"mlp": [64] * 6})
    figure.canvas.draw()
    (axis,) = [axis for axis in figure.axes if "latency" in axis.get_xlabel()]
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == 3 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    picture["plt"].close(figure)


# ---------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_each_cell_of_the_families_is_a_test(family):
    """It exists, and the libraries that are named have a class for a model of these parts, and no other has."""
    for cell in (family.read_by, *(f"{test}[{family.variant}]" for test in families.COLUMNS.values())):
        path, _, name = cell.partition("::")
        function, _, case = name.removesuffix("]").partition("[")
        source = (ROOT / path).read_text()
        assert f"def {function}(" in source, cell
        known = [part in VARIANTS or f'"{part}"' in source or part in ("True", "False") for part in case.split("-")]
        assert not case or all(known), cell
    assert family.variant in VARIANTS
    model = Model(small_dims(**{"channels": 3} | VARIANTS[family.variant]), {})
    homes = {"timm": libraries.timm_config(model), "transformers": libraries.transformers_config(model)}
    assert family.loads == ", ".join(name for name, home in homes.items() if home.config is not None)
