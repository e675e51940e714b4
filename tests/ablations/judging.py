"""How many images the real cuts of `obs` are judged on: the table of docs/results.md.

    python -m tests.ablations.judging --model MODEL_DIR --images DIR --classes FILE.tsv --out runs/judging

The images are split in two by hash of their names, and one half alone is used, since a setting is chosen by this: each
draw takes 157 of it to calibrate on; top-1 and the mean KL divergence from the unpruned model's answers are of the
others. Every result is kept under --out at once, so that a stopped run goes on.
"""

import argparse
import pathlib
from typing import Any
from unittest import mock

import numpy as np

from nvit_jax.api.targets import OBS_KINDS
from nvit_jax.data.feed import SplitFeed
from nvit_jax.files import read_json, write_json
from nvit_jax.latency import timing
from nvit_jax.model.directory import load_model
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.pruning import obs
from nvit_jax.pruning.one_shot import calibration_images
from nvit_jax.pruning.statistics import Walk
from nvit_jax.training.monitor import Monitor
from tests.ablations.halves import halves
from tests.ablations.one_shot import ANEW, Draw, Judge

COUNT = 157  # images to calibrate on
BATCH = 10  # of them, so that the numbers of JUDGED are met


def judged(draw: Draw, judge: Judge, images: int, ratios: list[float]) -> list[dict[str, Any]]:
    """Rows of all ratios, with so many images after a real cut."""
    with mock.patch.object(obs, "JUDGED", images):
        scored = obs.score(draw.walk, draw.params, draw.felt)
    rows = []
    for ratio in ratios:
        masks = draw.allocated(scored.scores, ratio, "solve", OBS_KINDS)
        rows.append({"judged": images, "ratio": ratio} | judge(draw.compensated(scored.params, masks, ANEW)))
    return rows


def table(found: dict[str, Any]) -> str:
    """Markdown: mean and spread over the draws."""
    rows = [row for draw in found["draws"].values() for row in draw]
    ratios = sorted({row["ratio"] for row in rows}, reverse=True)
    lines = ["| images that judge |" + "".join(f" top-1 at {r:g} | KL |" for r in ratios)]
    lines.append("|---|" + "---|---|" * len(ratios))
    for images in sorted({row["judged"] for row in rows}):
        cells = []
        for ratio in ratios:
            own = [row for row in rows if (row["judged"], row["ratio"]) == (images, ratio)]
            top1, divergence = ([row[name] for row in own] for name in ("top1", "divergence"))
            cells += [f"{100 * np.mean(top1):.1f} ± {100 * np.std(top1, ddof=1):.1f} %"]
            cells += [f"{np.mean(divergence):.3f} ± {np.std(divergence, ddof=1):.3f}"]
        lines.append(f"| {images} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    timing.keep_memory()
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "images", "classes", "out"):
        found.add_argument(f"--{name}", type=pathlib.Path, required=True)
    found.add_argument("--judged", nargs="*", type=int, default=[30, 150])
    found.add_argument("--ratios", nargs="*", type=float, default=[0.8, 0.65, 0.5])
    found.add_argument("--draws", type=int, default=3)
    options = found.parse_args()
    kept = options.out / "judging.json"
    results = read_json(kept) if kept.exists() else {"device": timing.device_name(), "images": COUNT, "draws": {}}
    model = load_model(options.model)
    pre = Preprocessing.from_json(model.info["preprocessing"])
    half, _ = halves(options.images, options.classes, pre)
    for seed in range(options.draws):
        rows = results["draws"].setdefault(str(seed), [])
        missing = [n for n in options.judged if n not in {row["judged"] for row in rows}]
        if not missing:
            continue
        order = np.random.default_rng(seed).permutation(len(half))
        draw = Draw(model, half, pre, COUNT, seed)
        judge = Judge.create(model, half.take(order[COUNT:]), pre)
        images = calibration_images(SplitFeed(draw.split, pre), None, BATCH, (seed, 2, 1), Monitor(), labels=False)
        draw._known["walk"] = Walk(model.dims, images, SplitFeed(draw.split, pre).normalise)
        for number in missing:
            rows += judged(draw, judge, number, options.ratios)
            options.out.mkdir(parents=True, exist_ok=True)
            write_json(kept, results)
            print(rows[-len(options.ratios) :], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
