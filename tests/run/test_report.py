"""The page of a run, from files made by hand: what it says, that it says it once, and that everybody can read it."""

import html
import json
import re

import matplotlib
import numpy as np
import pytest
from conftest import read, small_dims

from nvit_jax.run import plots, report

DENSE = small_dims().to_json()
PRUNED = DENSE | {"mlp": [8, 4]}
HISTORY = [
    {
        "pruning": i,
        "step": 10 * i,
        "dims": DENSE | {"mlp": [12 - 2 * i, 10 - 2 * i]},
        "macs_ratio": 1 - 0.1 * i,
        "predicted_latency_ms": 4 - 0.4 * i,
        "val_top1": 0.9 - 0.01 * i,
    }
    for i in (1, 2, 3)
]
LOG = [
    {"step": step, "loss": 1 / step, "learning_rate": 0.001 / step, "val_top1": 0.9 + step / 1e3}
    for step in (10, 20, 30)
]
METRICS = {
    "criterion": "fisher",
    "target": {"macs_ratio": 0.7},
    "latency_ratio": 0.592,  # the second measurement, which the page must not tell
    "predicted_latency_ratio": 0.7,
    "predicted_latency_ms": 2.8,
    "latency_source": "a device",
    "macs_ratio": 0.7,
    "params_ratio": 0.65,
    "masked_vs_compact_max_abs_diff": 1e-6,
    "dims": PRUNED,
}
CONFIG = {"data.name": "digits", "eval.split": "test", "dtype": "float32", "prune.learning_rate": 0.001, "model": None}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def scores():
    rng = np.random.default_rng(0)
    shapes = {"embed": (8,), "head": (2, 2), "qk": (2, 2, 4), "v": (2, 2, 4), "mlp": (2, 12)}
    arrays = {kind: rng.random(shape) for kind, shape in shapes.items()}
    arrays |= {f"mask_{kind}": np.ones(shape) for kind, shape in shapes.items()}
    return arrays | {f"saving_{kind}": np.full(() if kind == "embed" else (2,), 0.1) for kind in shapes}


@pytest.fixture
def workdir(tmp_path):
    """What the stages of a run with three prunings leave."""
    place = tmp_path / "some_folder"
    result = {"top1": 0.95, "top5": 1.0, "params": 1000, "macs": 2e6, "latency_batch": 32, "images": 360}
    small = {"params": 650, "macs": 1.4e6, "latency_ms": 2.25}
    models = {"dense": result | {"latency_ms": 4.0}, "pruned": result | small, "finetuned": result | small}
    write(place / "summary.json", models)
    versions = {"nvit_jax": "0.0"}
    write(place / "config.json", {"config": CONFIG, "versions": versions, "device": "a device"})
    for stage in ("pretrain", "prune", "finetune", "eval"):
        write(place / stage / "stage.json", {"status": "done"})
        write_lines(place / stage / "log.jsonl", LOG)
    write(place / "prune" / "metrics.json", METRICS)
    write(place / "prune" / "masked" / "model.json", {"dims": DENSE, "variant": None})
    write_lines(place / "prune" / "history.jsonl", HISTORY)
    np.savez(place / "prune" / "scores.npz", saving_unit="ms", **scores())
    write(place / "pretrain" / "metrics.json", {"val_top1": 0.93})
    return place


@pytest.fixture
def plain(workdir):
    """With one figure only, which is drawn quickly."""
    for path in (workdir / "prune" / "scores.npz", *workdir.glob("*/*.jsonl")):
        path.unlink()
    return workdir


def page_of(workdir) -> str:
    report.write_report(workdir, workdir / "report.html")
    return (workdir / "report.html").read_text()


def text_of(page) -> str:
    """What a reader sees, figures left out."""
    return html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)))


def change_config(workdir, **changes):
    config = read(workdir / "config.json")
    values = {key.replace("__", "."): value for key, value in changes.items()}
    write(workdir / "config.json", config | {"config": config["config"] | values})


@pytest.mark.parametrize(
    ("top1", "images", "low", "high"),
    [(0.8, 10, 0.4901625, 0.9433178), (0.5, 100, 0.4038315, 0.5961685), (1.0, 360, 0.9894420, 1.0)],
)
def test_wilsons_interval(top1, images, low, high):
    assert report.wilson(top1, images) == pytest.approx((low, high), abs=1e-6)


def test_the_top_says_what_the_run_is(plain):
    page = page_of(plain)
    title = "ViT of 1,000 parameters pruned by fisher, on digits (360 test images)"
    assert f"<title>{title}</title>" in page and f"<h1>{title}</h1>" in page
    text = text_of(page)
    assert "Top-1 of the finetuned model: 95.00% on 360 images of the test split" in text
    assert "(Wilson's 95% interval: 92.24% to 96.81%)" in text and "92.2 to 96.8%" in text
    assert "batch of 32 images in float32 on a device" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__name": "tfds:imagenet2012", "eval__split": "val"}, "on tfds:imagenet2012 (360 validation images)"),
        ({"data__name": "folder", "data__path": "/data/flowers"}, "on flowers (360"),
        ({"data__name": "folder", "data__val": "/data/birds/val", "eval__split": "val"}, "on birds/val (360"),
        ({"data__name": "npz", "data__path": "/data/a<b.npz"}, "on a&lt;b.npz (360"),
    ],
)
def test_the_title_names_the_data(plain, changes, words):
    change_config(plain, **changes)
    assert words in re.search("<title>(.*)</title>", page_of(plain)).group(1)


def test_the_title_names_a_published_model(plain):
    write(plain / "prune" / "masked" / "model.json", {"dims": DENSE, "variant": "deit_tiny_patch16_224"})
    change_config(plain, model="models/deit")
    page = page_of(plain)
    assert "<h1>deit_tiny_patch16_224 pruned by fisher, on digits" in page
    assert "of the model in models/deit." in text_of(page)


def test_the_measured_ratio_is_told_once_with_its_spread(plain):
    text = text_of(page_of(plain))
    assert text.count("1.78x") == 2 and "±" not in text  # pruned and finetuned, in one row
    assert "0.592" not in text and "0.563" not in text and "measured" not in text
    assert "predicted latency ratio  0.700" in text
    models = {"dense": (4.0, 0.03), "pruned": (2.25, 0.04), "finetuned": (2.25, 0.04)}
    write(plain / "eval" / "latency.json", {name: {"ms": ms, "spread": s} for name, (ms, s) in models.items()})
    text = text_of(page_of(plain))
    assert text.count("1.78x ±0.09") == 2 and "2.25 ±4%" in text and "1.00x  " in text


def test_the_table_of_the_terminal_tells_the_spread(plain):
    summary = read(plain / "summary.json")
    lines = report.text_table(summary, {"dense": 0.021, "pruned": 0.0}).splitlines()
    assert "4.00 ms ±2% / 32     1.00x" in lines[2] and "2.25 ms ±0% / 32     1.78x" in lines[3]
    assert "±" not in report.text_table(summary)


def test_a_sparse_models_parameters_that_are_not_zero(plain):
    summary = read(plain / "summary.json")
    summary["finetuned"]["nonzero_params"] = 400
    write(plain / "summary.json", summary)
    assert "non-zero (ratio)  1,000 (1.0x)  650 (1.5x)  400 (2.5x)" in text_of(page_of(plain))


def test_figures_have_texts_and_the_colours_of_the_page(workdir):
    page = page_of(workdir)
    figures = re.findall("<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(figures) == 6
    for svg in figures:
        label = re.match(r'<svg role="img" aria-label="([^"]+)"', svg).group(1)
        assert label.endswith(".") and re.search(r"\d", label)
        assert "currentColor" in svg and "#000000" not in svg and "#ffffff" not in svg
        assert not set(re.findall("#[0-9a-f]{6}", svg)) & set(plots._NAMES)
    names = set(re.findall(r"var\((--[a-z]+)\)", page))
    light, dark = page.split("prefers-color-scheme: dark")
    assert names >= {"--dense", "--pruned", "--third", "--fourth", "--fifth"} and all(
        f"{name}: #" in light and f"{name}: #" in dark for name in names
    )
    assert page.count('<div class="scroll') == page.count("<table>")


def test_every_axis_has_a_label_and_a_unit():
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # A model whose blocks lack parts, pruned again.
    no_parts = DENSE | {"heads": [0, 2], "qk": [0, 4], "v": [0, 4], "mlp": [12, 0]}
    fewer = [line | {"dims": no_parts | {"heads": [0, 0], "qk": [0, 0], "v": [0, 0]}} for line in HISTORY]
    some = scores()
    for kind in ("mask_head", "mask_qk", "mask_v"):
        some[kind][0] = 0
    some["mask_mlp"][1] = 0
    curves = {"pretrain": LOG, "prune": [{"step": line["step"], "loss": line["loss"]} for line in LOG]}
    for plot, *arguments in (
        (plots.widths, DENSE, PRUNED),
        (plots.history, HISTORY, METRICS, 0.93),
        (plots.remaining, DENSE, HISTORY),
        (plots.scores, scores()),
        (plots.sensitivity, scores(), "ms"),
        (plots.losses, curves, {"prune": 0.001}, 0.93),
        (plots.widths, no_parts, fewer[-1]["dims"]),
        (plots.remaining, no_parts, fewer),
        (plots.scores, some),
        (plots.sensitivity, some, "ms"),
    ):
        figure, _ = plot(plt, *arguments)
        for axis in (a for a in figure.axes if a.axison):
            below = axis.get_shared_x_axes().get_siblings(axis)  # the lowest of a column tells for all
            assert hasattr(axis, "_colorbar") or any(a.get_xlabel() for a in below), plot.__name__
            assert axis.get_ylabel(), plot.__name__
        plt.close(figure)


def dashed_lines(page) -> int:
    """Each has its name in a legend."""
    return len(re.findall(">dense model</text>", page))


def test_the_dense_models_accuracy_is_a_line(workdir):
    assert "from 93.0% of the dense model to 87.0%" in (page := page_of(workdir))
    assert dashed_lines(page) == 3  # along the prunings, in prune and in finetune
    (workdir / "prune" / "scores.npz").unlink()  # the rest is about these three
    write(workdir / "prune" / "metrics.json", METRICS | {"dense_val_top1": 0.94})
    assert "from 94.0% of the dense model to 87.0%" in page_of(workdir)
    write(workdir / "prune" / "metrics.json", METRICS)
    change_config(workdir, model="models/deit")  # then pretrain/ holds another model
    assert "validation top-1 goes to 87.0%" in (page := page_of(workdir)) and not dashed_lines(page)
    change_config(workdir, eval__split="val")
    assert "from 95.0% of the dense model to 87.0%" in page_of(workdir)


def test_one_pruning_is_a_table(workdir):
    write_lines(workdir / "prune" / "history.jsonl", HISTORY[:1])
    write_lines(workdir / "prune" / "log.jsonl", [])
    write_lines(workdir / "finetune" / "log.jsonl", LOG[:1])
    page = page_of(workdir)
    assert page.count("<svg") == 4 and "Along the pruning" not in page
    text = re.sub(r"\s+", " ", text_of(page))
    assert "validation top-1 93.00% 89.00%" in text and "latency, predicted 100% 70.0%" in text
    assert "finetune: training loss 0.1 at step 10, validation top-1 91.00%." in text


def test_a_run_that_prunes_nothing(workdir):
    summary = read(workdir / "summary.json")
    write(workdir / "summary.json", {"dense": summary["dense"]})
    for stage in ("prune", "finetune"):
        write(workdir / stage / "stage.json", {"status": "stale"})
    page = page_of(workdir)
    assert "<h1>ViT of 1,000 parameters, on digits (360 test images)</h1>" in page and page.count("<svg") == 1


def test_images_of_the_preview_have_texts(tmp_path):
    report.write_preview(tmp_path / "p.html", [("a <cat>", [np.zeros((4, 4, 3), np.uint8)] * 2)])
    assert re.findall('alt="([^"]*)"', (tmp_path / "p.html").read_text()) == [
        "a &lt;cat&gt;, image 1",
        "a &lt;cat&gt;, image 2",
    ]
