"""The figures of the report: inline SVG with a sentence for those who do not see it, in the colours of the page."""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nvit_jax.training.measures import CLASSIFIER, Measure

Line = Mapping[str, Any]  # of log.jsonl or history.jsonl
Drawn = tuple[Any, str]  # a matplotlib figure, and what it shows in one sentence

_WIDTHS = (
    ("heads", "heads", "heads in a block"),
    ("qk", "query/key dims", "dims of a head"),
    ("v", "value dims", "dims of a head"),
    ("mlp", "mlp neurons", "neurons in a block"),
)
_UNITS = (
    ("embed", "embed channels"),
    ("head", "heads"),
    ("qk", "query/key dims"),
    ("v", "value dims"),
    ("mlp", "mlp neurons"),
)
# The colours that are drawn, and what the page's style sheet calls them: it has others for dark screens.
_TEXT, _DENSE, _PRUNED, _THIRD, _FOURTH, _FIFTH = "#1f2933", "#8593a1", "#0b6e99", "#c2571a", "#3f7d20", "#7b4fa3"
_NAMES = {
    _TEXT: "currentColor",
    _DENSE: "var(--dense)",
    _PRUNED: "var(--pruned)",
    _THIRD: "var(--third)",
    _FOURTH: "var(--fourth)",
    _FIFTH: "var(--fifth)",
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nvit_jax",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.transparent": True,
} | {f"{part}.color": _TEXT for part in ("text", "xtick", "ytick")}
_STYLE |= {"axes.edgecolor": _TEXT, "axes.labelcolor": _TEXT}
_PIXELS_PER_INCH = 75  # narrower than this a figure is scrolled, not shrunk: its text would be too small


def figure(plot: Callable[..., Drawn], *args: Any) -> str:
    """What `plot` draws, as an element of a page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        drawn, sentence = plot(plt, *args)
        least = round(_PIXELS_PER_INCH * drawn.get_figwidth())
        buffer = io.StringIO()
        facts = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawn.savefig(buffer, format="svg", bbox_inches="tight", metadata=facts)
        plt.close(drawn)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # the same ids in every figure of the page
    for colour, name in _NAMES.items():
        text = text.replace(colour, name)
    label = f'<svg role="img" aria-label="{html.escape(sentence)}" style="min-width: {least}px" '
    return f'<figure class="scroll">{text.replace("<svg ", label, 1)}</figure>'


def _whole_numbers(axis: Any) -> None:
    axis.get_major_locator().set_params(integer=True)


def _plain_numbers(axis: Any) -> None:
    """0.08 for 8 x 10^-2 on a logarithmic axis; which ticks have a number is left to matplotlib."""
    from matplotlib.ticker import LogFormatterSciNotation

    class Plain(LogFormatterSciNotation):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())


def _show_percents(axis: Any, values: Sequence[float]) -> None:
    """Around the values, but never so near that one image looks like a cliff."""
    margin = max(2, 0.15 * (max(values) - min(values)))
    axis.set_ylim(max(0, min(values) - margin), min(101, max(values) + margin))


# ------------------------------------------------------------------------------------------------- widths


def widths(plt: Any, dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> Drawn:
    """Bars of every width, block by block."""
    drawn, axes = plt.subplots(1, 5, figsize=(12, 2.7), width_ratios=(0.5, 1, 1, 1, 1))
    axes[0].bar([0, 1], [dense["embed"], pruned["embed"]], color=[_DENSE, _PRUNED])
    axes[0].set_xticks([0, 1], ["before", "after"])
    axes[0].set_title("embed channels")
    axes[0].set_ylabel("channels")
    axes[0].set_xlabel("all blocks")
    for axis, (key, title, unit) in zip(axes[1:], _WIDTHS, strict=True):
        blocks = range(len(dense[key]))
        axis.bar(blocks, dense[key], color=_DENSE, label="before")
        axis.bar(blocks, pruned[key], color=_PRUNED, width=0.55, label="after")
        axis.set_title(title)
        axis.set_xlabel("block")
        axis.set_ylabel(unit)
        axis.set_xticks(list(blocks) if len(blocks) <= 8 else list(blocks)[::4])
        _whole_numbers(axis.yaxis)
    drawn.legend(*axes[1].get_legend_handles_labels(), loc="upper right")
    drawn.tight_layout(rect=(0, 0, 0.93, 1))
    totals = [f"{name} {sum(dense[key]):,} to {sum(pruned[key]):,}" for key, name, _ in _WIDTHS]
    sentence = (
        f"Bars of each width by block, before and after pruning: embed channels {dense['embed']} to {pruned['embed']}, "
        f"summed over the blocks {', '.join(totals)}."
    )
    return drawn, sentence


# -------------------------------------------------------------------------------------- along the pruning


def history(
    plt: Any, lines: Sequence[Line], metrics: Mapping[str, Any], dense: float | None, watched: Measure = CLASSIFIER[0]
) -> Drawn:
    """Accuracy right after each pruning, and what the model costs, from the dense model (0) to the last pruning.

    `watched`: what stands for the accuracy, and `dense` the unpruned model's.
    """
    drawn, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
    key = f"val_{watched.key}"
    x, top1 = [line["pruning"] for line in lines], [100 * line[key] for line in lines]
    if dense is not None:
        left.axhline(100 * dense, color=_DENSE, linestyle="--", label="dense model")
        left.legend()
        top1 = [100 * dense, *top1]
    left.plot(range(x[-1] - len(top1) + 1, x[-1] + 1), top1, "o-", color=_PRUNED, ms=4)
    _show_percents(left, top1)
    left.set_title(f"{'accuracy' if watched.key == 'top1' else 'similarity'} right after each pruning")
    left.set_ylabel(f"validation {watched.title} (%)")
    costs = [100.0, *(100 * line["macs_ratio"] for line in lines)]
    right.plot([0, *x], costs, "o-", color=_THIRD, label="MACs", ms=4)
    if metrics["predicted_latency_ms"] is not None:
        whole = metrics["predicted_latency_ms"] / metrics["predicted_latency_ratio"]
        ratios = [100.0, *(100 * line["predicted_latency_ms"] / whole for line in lines)]
        right.plot([0, *x], ratios, "s-", color=_PRUNED, label="latency, predicted", ms=4)
    right.set_title("cost")
    right.set_ylabel("% of the dense model")
    right.legend()
    right.set_ylim(0, 105)
    for axis in (left, right):
        axis.set_xlabel("prunings done (0: dense model)")
        axis.set_xlim(-0.03 * x[-1], 1.03 * x[-1])
        _whole_numbers(axis.xaxis)
    drawn.tight_layout()
    start = "" if dense is None else f"from {dense:.1%} of the dense model "
    sentence = (
        f"Lines over {x[-1]} prunings: validation {watched.title} goes {start}to {lines[-1][key]:.1%}, MACs to "
        f"{lines[-1]['macs_ratio']:.1%} of the dense model's."
    )
    return drawn, sentence


def remaining(plt: Any, dense: Mapping[str, Any], lines: Sequence[Line]) -> Drawn:
    """The parameter redistribution of NViT's figure 4, along the run."""
    drawn, axes = plt.subplots(1, 5, figsize=(12, 2.7), width_ratios=(1, 1, 1, 1, 1))
    x = [0] + [line["pruning"] for line in lines]
    embed = [100.0] + [100 * line["dims"]["embed"] / dense["embed"] for line in lines]
    axes[0].plot(x, embed, "-", color=_PRUNED)
    axes[0].set_ylim(0, 102)
    axes[0].set_title("embed channels")
    axes[0].set_xlabel("prunings done")
    axes[0].set_ylabel("left (%)")
    _whole_numbers(axes[0].xaxis)
    for axis, (key, title, _) in zip(axes[1:], _WIDTHS, strict=True):
        whole = np.array(dense[key], float)
        left = np.array([whole] + [line["dims"][key] for line in lines])
        part = 100 * np.divide(left, whole, out=np.full(left.shape, np.nan), where=whole > 0)
        image = axis.imshow(part.T, aspect="auto", origin="lower", vmin=0, vmax=100, cmap="viridis")
        axis.set_title(title)
        axis.set_xlabel("prunings done")
        axis.set_ylabel("block")
        _whole_numbers(axis.xaxis)
        _whole_numbers(axis.yaxis)
    drawn.tight_layout(rect=(0, 0, 0.94, 1))
    bar = drawn.colorbar(image, cax=drawn.add_axes((0.945, 0.2, 0.008, 0.65)), label="left (%)")
    bar.outline.set_visible(False)
    neurons = sum(lines[-1]["dims"]["mlp"]) / max(sum(dense["mlp"]), 1)
    sentence = (
        f"Maps of the part of each width that is left, by block and number of prunings: after {x[-1]} prunings "
        f"{embed[-1]:.0f}% of the embed channels and {neurons:.0%} of the mlp neurons."
    )
    return drawn, sentence


# --------------------------------------------------------------------------------------------- saliency


def _by_block(arrays: Mapping[str, np.ndarray], kind: str) -> list[np.ndarray]:
    """Scores of the units of each block; embed is one row."""
    values, masks = arrays[kind], arrays[f"mask_{kind}"] > 0
    return [values[masks]] if kind == "embed" else [v[m] for v, m in zip(values, masks, strict=True)]


def _scored(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    """The kinds that have scores, and their names; all where none has."""
    return [(kind, title) for kind, title in _UNITS if arrays[kind].any()] or list(_UNITS)


def scores(plt: Any, arrays: Mapping[str, np.ndarray]) -> Drawn:
    """Median and the middle 80% of the positive scores of every block's units, of the kinds that were scored."""
    units = _scored(arrays)
    shares = [0.5 if kind == "embed" else 1.0 for kind, _ in units]
    size = (12 * sum(shares) / 4.5, 2.9)
    drawn, ((*axes,),) = plt.subplots(1, len(units), figsize=size, width_ratios=shares, squeeze=False)
    medians: dict[str, np.ndarray] = {}
    for axis, (kind, title) in zip(axes, units, strict=True):
        rows = _by_block(arrays, kind)
        positive = [r[r > 0] if (r > 0).any() else np.array([np.nan]) for r in rows]
        low, middle, high = (np.array([np.quantile(r, q) for r in positive]) for q in (0.1, 0.5, 0.9))
        medians[kind] = middle
        blocks = np.arange(len(rows))
        axis.errorbar(blocks, middle, yerr=(middle - low, high - middle), fmt="o", color=_PRUNED, ms=4)
        axis.set_yscale("log")
        axis.set_title(title)
        others = sum(int((r <= 0).sum()) for r in rows)
        place = "block" if len(rows) > 1 else "all blocks"
        axis.set_xlabel(place + (f"\n{others} not positive" if others else ""))
        axis.set_xticks([] if len(rows) == 1 else blocks if len(rows) <= 8 else blocks[::4])
        if kind == "embed":
            axis.set_xlim(-1, 1)
    axes[0].set_ylabel("score of a unit")
    for axis in axes[1:]:
        axis.set_ylabel("score")
    drawn.tight_layout()
    kind, title = units[-1]
    known = np.isfinite(medians[kind]).any()
    range_ = f"from {np.nanmin(medians[kind]):.1e} to {np.nanmax(medians[kind]):.1e}" if known else "not positive"
    sentence = (
        f"Saliency of the units of each kind by block, on a logarithmic axis: the median score of a block's {title} "
        f"is {range_}."
    )
    return drawn, sentence


def sensitivity(plt: Any, arrays: Mapping[str, np.ndarray], unit: str) -> Drawn:
    """The median score of a unit by what one unit less saves."""
    drawn, axis = plt.subplots(figsize=(7, 3))
    least: tuple[float, str] = (np.inf, "")
    scored = dict(_scored(arrays))
    styles = zip(_UNITS, "Ds^vo", (_DENSE, _THIRD, _FOURTH, _FIFTH, _PRUNED), strict=True)
    for (kind, title), marker, colour in styles:
        if kind not in scored:
            continue
        median = np.array([np.median(r) if len(r) else 0.0 for r in _by_block(arrays, kind)])
        if kind in ("qk", "v"):  # one width less is one dim of every head
            median = median * arrays["mask_head"].sum(-1)
        saving = np.atleast_1d(arrays[f"saving_{kind}"])
        value = np.where((saving > 0) & (median > 0), median / np.where(saving > 0, saving, 1), np.nan)
        if kind == "embed":
            axis.axhline(value[0], color=colour, label=title)
        else:
            axis.plot(range(len(value)), value, marker=marker, label=title, color=colour)
        for block, one in enumerate(value):
            least = min(least, (one, title if kind == "embed" else f"{title} of block {block}"))
    axis.set_yscale("log")
    axis.set_xlabel("block")
    axis.set_ylabel(f"score per {unit} saved")
    _whole_numbers(axis.xaxis)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the lines
    drawn.tight_layout()
    lowest = f": least for {least[1]}, {least[0]:.1e}" if least[1] else ""
    return drawn, f"Median score of a unit per {unit} that it saves, by kind and block, on a logarithmic axis{lowest}."


# --------------------------------------------------------------------------------------------- training


def losses(
    plt: Any,
    curves: Mapping[str, Sequence[Line]],
    rates: Mapping[str, float | None],
    dense: float | None,
    watched: Measure = CLASSIFIER[0],
) -> Drawn:
    """Loss, `watched` on the val split, learning rate of each stage; `rates` are of stages whose lines name none."""
    key = f"val_{watched.key}"
    checked = {name: [line for line in lines if key in line] for name, lines in curves.items()}
    rows = (True, any(checked.values()), True)
    drawn, axes = plt.subplots(
        sum(rows), len(curves), figsize=(max(4 * len(curves), 5), 1.2 + 1.7 * sum(rows)), squeeze=False, sharex="col"
    )
    told = []
    for column, (name, lines) in zip(axes.T, curves.items(), strict=True):
        steps = [line["step"] for line in lines]
        column[0].plot(steps, [line["loss"] for line in lines], color=_THIRD)
        column[0].set_yscale("log")
        _plain_numbers(column[0].yaxis)
        column[0].set_title(name)
        column[0].set_ylabel("training loss")
        told.append(f"{name} loss {lines[0]['loss']:.3g} to {lines[-1]['loss']:.3g} in {steps[-1]} steps")
        if rows[1]:
            _accuracy(column[1], checked[name], None if name == "pretrain" else dense, watched)
        if checked[name]:
            told[-1] += f" and validation {watched.title} {checked[name][-1][key]:.1%} in the end"
        values = [line.get("learning_rate", rates.get(name)) for line in lines]
        if None not in values:
            column[-1].plot(steps, values, color=_FIFTH)
            column[-1].set_ylim(0, 1.1 * max(*values, 1e-12))
        column[-1].set_ylabel("learning rate")
        column[-1].set_xlabel("step")
        _whole_numbers(column[-1].xaxis)
    drawn.tight_layout()
    return drawn, f"Training curves: {'; '.join(told)}."


def _accuracy(axis: Any, checked: Sequence[Line], dense: float | None, watched: Measure) -> None:
    """Not every stage is evaluated on its way."""
    if not checked:
        axis.set_axis_off()
        return
    if dense is not None:
        axis.axhline(100 * dense, color=_DENSE, linestyle="--", label="dense model")
        axis.legend()
    top1 = [100 * line[f"val_{watched.key}"] for line in checked]
    axis.plot([line["step"] for line in checked], top1, "o-", color=_PRUNED, ms=4)
    _show_percents(axis, top1 if dense is None else [*top1, 100 * dense])
    axis.set_ylabel(f"validation {watched.title} (%)")
