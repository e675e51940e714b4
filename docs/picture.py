"""The picture of the front page: what pruning left of every block, and accuracy against latency, from a finished run.

    python docs/picture.py --workdir runs/demo --out docs/images/demo.png

Reads W/summary.json, W/prune/metrics.json and W/prune/masked/model.json, which the stages prune and eval have written.
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BEFORE, AFTER, INK, QUIET = "#d3d8de", "#0b6e99", "#1f2933", "#616e7c"
PANELS = (
    ("heads", "attention heads"),
    ("qk", "query/key dims of a head"),
    ("v", "value dims of a head"),
    ("mlp", "mlp neurons"),
)
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}


def main() -> None:
    """Read the run, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    summary = _read(options.workdir / "summary.json")
    before = _read(options.workdir / "prune" / "masked" / "model.json")["dims"]
    after = _read(options.workdir / "prune" / "metrics.json")["dims"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure = draw(summary, before, after)
        figure.savefig(options.out, dpi=170, facecolor="white", metadata={"Software": None})
    print(f"{options.out}: {options.out.stat().st_size / 1024:.0f} KiB")


def _read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def draw(summary: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> Any:
    """Left: widths of every block before and after. Right: top-1 over latency."""
    figure = plt.figure(figsize=(10.4, 4.3))
    left, right = figure.subfigures(1, 2, width_ratios=(1.7, 1))
    axes = left.subplots(2, 2)
    for axis, (key, title) in zip(axes.flat, PANELS, strict=True):
        _widths(axis, before[key], after[key], title)
    for axis in axes[-1]:
        axis.set_xlabel("block")
    left.suptitle("Widths of every block", x=0.06, ha="left", fontsize=11.5, weight="bold")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    left.legend(handles, labels, loc="upper right", ncols=2, frameon=False, bbox_to_anchor=(0.985, 1.01))
    embed = f"Embed channels, which all blocks share: {before['embed']} before, {after['embed']} after"
    left.text(0.06, 0.02, embed, color=QUIET)
    left.subplots_adjust(left=0.06, right=0.97, top=0.84, bottom=0.19, hspace=0.5, wspace=0.17)
    right.suptitle(_speedup(summary), x=0.14, ha="left", fontsize=11.5, weight="bold")
    _accuracy(right.subplots(), summary)
    right.subplots_adjust(left=0.14, right=0.96, top=0.84, bottom=0.19)
    return figure


def _speedup(summary: Mapping[str, Any]) -> str:
    small = summary.get("finetuned", summary["pruned"])
    return f"{summary['dense']['latency_ms'] / small['latency_ms']:.2f} times as fast, measured"


def _widths(axis: Any, before: Sequence[int], after: Sequence[int], title: str) -> None:
    blocks = range(len(before))  # counted as everywhere else
    axis.bar(blocks, before, color=BEFORE, width=0.82, label="before")
    axis.bar(blocks, after, color=AFTER, width=0.82, label="after")
    if len(before) <= 12:
        for block, width in zip(blocks, after, strict=True):
            axis.annotate(f"{width}", (block, width), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    axis.set_title(title)
    axis.set_ylim(0, 1.16 * max(before))
    axis.set_yticks([0, max(before)])
    axis.set_xticks(list(blocks) if len(before) <= 12 else list(blocks)[::4])
    axis.tick_params(length=0)


def _accuracy(axis: Any, summary: Mapping[str, Any]) -> None:
    points = [name for name in ("dense", "pruned", "finetuned") if name in summary]
    faces = {"dense": BEFORE, "pruned": "white", "finetuned": AFTER}
    words = {"dense": "before", "pruned": "pruned", "finetuned": "finetuned"}
    images = summary["dense"]["images"]
    xs = [summary[name]["latency_ms"] for name in points]
    ys = [100 * summary[name]["top1"] for name in points]
    errors = [100 * (summary[n]["top1"] * (1 - summary[n]["top1"]) / images) ** 0.5 for n in points]
    low, high = min(ys) - 2.2 * max(errors), max(ys) + 2.2 * max(errors)
    axis.set_xlim(0, 1.15 * max(xs))
    axis.set_ylim(low, high)
    heights = [ys[0], *_apart(ys[1:], 0.075 * (high - low))]  # the dense model stands alone
    for name, x, y, error, height in zip(points, xs, ys, errors, heights, strict=True):
        edge = QUIET if name == "dense" else AFTER
        axis.errorbar([x], [y], yerr=error, color=BEFORE, lw=1.5, zorder=1)
        axis.plot([x], [y], "o", ms=9, mfc=faces[name], mec=edge, mew=2, zorder=2)
        left = x > max(xs) / 2  # on the side that has room
        aside = 0.035 * max(xs) * (-1 if left else 1)
        axis.text(x + aside, height, f"{words[name]} {y:.1f}", ha="right" if left else "left", va="center")
    axis.set_title(f"top-1 in %, ± standard error of {images} images")
    axis.set_xlabel(f"latency of {summary['dense']['latency_batch']} images in ms")


def _apart(values: Sequence[float], least: float) -> list[float]:
    """Heights for labels, at least that far apart, in the order of the values."""
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = list(values)
    for lower, upper in itertools.pairwise(order):
        placed[upper] = max(placed[upper], placed[lower] + least)
    return placed


if __name__ == "__main__":
    main()
