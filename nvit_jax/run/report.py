"""The final table, and report.html: one self-contained page from the files of a run."""

import base64
import html
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from nvit_jax.files import read_json, write_text
from nvit_jax.run.workdir import read_lines

Path = pathlib.Path
_HEAD = ("model", "top-1", "top-5", "parameters", "MACs", "latency", "speed-up")
_KINDS = (("heads", "heads"), ("qk", "query/key dims"), ("v", "value dims"), ("mlp", "mlp neurons"))
_UNITS = (("embed", "embed channels"), ("head", "heads"), *_KINDS[1:])
_DENSE, _PRUNED, _THIRD = "#9aa5b1", "#0b6e99", "#c2571a"


def table(summary: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A head and rows of strings, the speed-up relative to the dense model.

    With a sparse model there is a column more: parameters that are not 0, and how many times more the dense model has.
    """
    dense = summary["dense"]
    sparse = any("nonzero_params" in r for r in summary.values())

    def nonzero(r: Mapping[str, Any]) -> str:
        count = r.get("nonzero_params", r["params"])
        return f"{count:,} ({dense['params'] / count:.1f}x)"

    return [(*_HEAD[:4], *(("non-zero (ratio)",) if sparse else ()), *_HEAD[4:])] + [
        (
            name,
            f"{r['top1']:.2%}",
            f"{r['top5']:.2%}",
            f"{r['params']:,}",
            *((nonzero(r),) if sparse else ()),
            f"{r['macs'] / 1e6:,.2f} M",
            f"{r['latency_ms']:.2f} ms / {r['latency_batch']}",
            f"{dense['latency_ms'] / r['latency_ms']:.2f}x",
        )
        for name, r in summary.items()
    ]


def text_table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The final table of a run for the terminal."""
    rows = table(summary)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_report(workdir: Path, path: Path) -> None:
    """Read summary.json and every stage's files under `workdir`; write the page to `path`."""
    summary = read_json(workdir / "summary.json")
    head, *rows = table(summary)
    parts = [_html_table(head, rows)]
    if _done(workdir / "prune"):
        metrics = read_json(workdir / "prune" / "metrics.json")
        history = read_lines(workdir / "prune" / "history.jsonl")
        dense_dims = read_json(workdir / "prune" / "masked" / "model.json")["dims"]
        parts += [_prune_section(metrics), _figure(_plot_widths, dense_dims, metrics["dims"])]
        if history:
            parts += ["<h2>Along the pruning</h2>", _figure(_plot_history, history, metrics)]
            parts += ["<p>Part of each width that is left, by block.</p>", _figure(_plot_left, dense_dims, history)]
        if (workdir / "prune" / "scores.npz").exists():
            with np.load(workdir / "prune" / "scores.npz") as arrays:
                scores = dict(arrays)
            unit = html.escape(str(scores.pop("saving_unit")))
            parts += [
                "<h2>Saliency of the model before pruning</h2>",
                "<p>Median and the middle 80 % of the positive scores of a block's units; the others are counted.</p>",
                _figure(_plot_scores, scores),
                f"<p>Sensitivity: the median score of a unit, by the {unit} that one unit less saves.</p>",
                _figure(_plot_sensitivity, scores, unit),
            ]
    curves = {
        name: read_lines(workdir / name / "log.jsonl")
        for name in ("pretrain", "prune", "finetune")
        if _done(workdir / name)
    }
    curves = {name: lines for name, lines in curves.items() if lines}
    if curves:
        parts += ["<h2>Training</h2>", _figure(_plot_losses, curves)]
    others = [p for p in sorted((workdir / "compare").glob("*/summary.json")) if _done(p.parent / "eval")]
    if others and "pruned" in summary:
        parts += ["<h2>The same targets, other criteria</h2>", _compare_table(summary, others, workdir)]
    config = read_json(workdir / "config.json")
    facts = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    parts.append(f"<h2>Configuration</h2><p>{html.escape(facts)}; {html.escape(config['device'])}</p>")
    keys = [(key, repr(value)) for key, value in config["config"].items() if value is not None]
    parts.append(f"<details><summary>{len(keys)} keys</summary>{_html_table(('key', 'value'), keys)}</details>")
    write_text(path, _PAGE.format(title=html.escape(workdir.absolute().name), body="\n".join(parts)))


def write_preview(path: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]], side: int = 128) -> None:
    """A page of rows of images, uint8 [s, s, channels], each with a line of text above it."""
    parts = []
    for text, images in rows:
        cells = []
        for pixels in images:
            image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
            buffer = io.BytesIO()
            image.resize((side, side), Image.Resampling.NEAREST if image.width < side else None).save(buffer, "PNG")
            cells.append(f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">')
        parts.append(f"<p>{html.escape(text)}</p><div>{' '.join(cells)}</div>")
    write_text(path, _PAGE.format(title="Training images", body="\n".join(parts)))


def _done(stage: Path) -> bool:
    return (stage / "stage.json").exists() and read_json(stage / "stage.json")["status"] == "done"


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _prune_section(m: Mapping[str, Any]) -> str:
    targets = ", ".join(f"{html.escape(name)} &le; {html.escape(str(value))}" for name, value in m["target"].items())
    predicted = m["predicted_latency_ratio"]
    rows = [
        ("latency ratio, measured", f"{m['latency_ratio']:.3f}"),
        ("latency ratio, predicted", "no latency model" if predicted is None else f"{predicted:.3f}"),
        ("predicted for", m.get("latency_source") or ""),
        ("MACs ratio", f"{m['macs_ratio']:.3f}"),
        ("parameters ratio", f"{m['params_ratio']:.3f}"),
        ("masked and compact logits differ by at most", f"{m['masked_vs_compact_max_abs_diff']:.1e}"),
        ("embed channels kept", str(m["dims"]["embed"])),
    ]
    return (
        f"<h2>Pruning by {html.escape(m['criterion'])}</h2><p>Targets: {targets}.</p>"
        + _html_table(("", "result"), rows)
        + "<h2>Widths per block, before and after</h2>"
    )


def _compare_table(summary: Mapping[str, Any], others: Sequence[Path], workdir: Path) -> str:
    own = read_json(workdir / "prune" / "metrics.json")
    rows = []
    for metrics, result in [(own, summary)] + [
        (read_json(p.parent / "prune" / "metrics.json"), read_json(p)) for p in others
    ]:
        finetuned = result.get("finetuned")
        rows.append(
            (
                metrics["criterion"],
                f"{metrics['macs_ratio']:.3f}",
                f"{metrics['latency_ratio']:.3f}",
                f"{result['pruned']['top1']:.2%}",
                "not run" if finetuned is None else f"{finetuned['top1']:.2%}",
            )
        )
    return _html_table(("criterion", "MACs ratio", "latency ratio", "pruned top-1", "finetuned top-1"), rows)


# -------------------------------------------------------------------------------------------------- plots


def _figure(plot: Any, *args: Any) -> str:
    """An inline SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plot(plt, *args)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    text = buffer.getvalue()
    return "<figure>" + text[text.index("<svg") :] + "</figure>"


def _plot_widths(plt: Any, dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> Any:
    figure, axes = plt.subplots(1, 5, figsize=(12, 2.6), width_ratios=(0.5, 1, 1, 1, 1))
    axes[0].bar([0, 1], [dense["embed"], pruned["embed"]], color=[_DENSE, _PRUNED])
    axes[0].set_xticks([0, 1], ["before", "after"])
    axes[0].set_title("embed channels")
    for axis, (key, title) in zip(axes[1:], _KINDS, strict=True):
        blocks = range(len(dense[key]))
        axis.bar(blocks, dense[key], color=_DENSE, label="before")
        axis.bar(blocks, pruned[key], color=_PRUNED, width=0.55, label="after")
        axis.set_title(title)
        axis.set_xlabel("block")
        axis.set_xticks(list(blocks) if len(blocks) <= 12 else list(blocks)[::4])
    figure.legend(*axes[1].get_legend_handles_labels(), loc="upper right", frameon=False)
    figure.tight_layout(rect=(0, 0, 0.93, 1))
    return figure


def _plot_history(plt: Any, history: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8))
    x = [line["pruning"] for line in history]
    left.plot(x, [line["val_top1"] for line in history], "o-", color=_PRUNED)
    left.set_title("validation top-1 right after each pruning")
    right.plot(x, [line["macs_ratio"] for line in history], "o-", color=_THIRD, label="MACs")
    if metrics["predicted_latency_ms"] is not None:
        dense = metrics["predicted_latency_ms"] / metrics["predicted_latency_ratio"]
        ratios = [line["predicted_latency_ms"] / dense for line in history]
        right.plot(x, ratios, "s-", color=_PRUNED, label="latency (predicted)")
    right.set_title("cost relative to the dense model")
    right.legend(frameon=False)
    right.set_ylim(0, 1)
    for axis in (left, right):
        axis.set_xlabel("pruning")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    return figure


def _plot_left(plt: Any, dense: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Any:
    """The parameter redistribution of NViT's figure 4, along the run."""
    figure, axes = plt.subplots(1, 5, figsize=(12, 2.6), width_ratios=(1, 1, 1, 1, 1))
    x = [0] + [line["pruning"] for line in history]
    axes[0].plot(x, [1.0] + [line["dims"]["embed"] / dense["embed"] for line in history], "-", color=_PRUNED)
    axes[0].set_ylim(0, 1.02)
    axes[0].set_title("embed channels")
    axes[0].set_xlabel("pruning")
    for axis, (key, title) in zip(axes[1:], _KINDS, strict=True):
        whole = np.array(dense[key], float)
        left = np.array([whole] + [line["dims"][key] for line in history]) / whole
        image = axis.imshow(left.T, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="viridis")
        axis.set_title(title)
        axis.set_xlabel("pruning")
        axis.set_ylabel("block")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout(rect=(0, 0, 0.95, 1))
    bar = figure.add_axes((0.96, 0.2, 0.008, 0.65))
    figure.colorbar(image, cax=bar)
    return figure


def _by_block(scores: Mapping[str, np.ndarray], kind: str) -> list[np.ndarray]:
    """Scores of the units of each block; embed is one row."""
    values, masks = scores[kind], scores[f"mask_{kind}"] > 0
    return [values[masks]] if kind == "embed" else [v[m] for v, m in zip(values, masks, strict=True)]


def _plot_scores(plt: Any, scores: Mapping[str, np.ndarray]) -> Any:
    figure, axes = plt.subplots(1, 5, figsize=(12, 2.8), width_ratios=(0.5, 1, 1, 1, 1))
    for axis, (kind, title) in zip(axes, _UNITS, strict=True):
        rows = _by_block(scores, kind)
        positive = [r[r > 0] if (r > 0).any() else np.array([np.nan]) for r in rows]
        low, middle, high = (np.array([np.quantile(r, q) for r in positive]) for q in (0.1, 0.5, 0.9))
        blocks = np.arange(len(rows))
        axis.errorbar(blocks, middle, yerr=(middle - low, high - middle), fmt="o", color=_PRUNED, ms=4)
        axis.set_yscale("log")
        axis.set_title(title)
        others = sum(int((r <= 0).sum()) for r in rows)
        axis.set_xlabel(("block" if len(rows) > 1 else "") + (f"\n{others} not positive" if others else ""))
        axis.set_xticks(blocks if len(rows) <= 12 and len(rows) > 1 else [])
    figure.tight_layout()
    return figure


def _plot_sensitivity(plt: Any, scores: Mapping[str, np.ndarray], unit: str) -> Any:
    figure, axis = plt.subplots(figsize=(7, 2.8))
    for (kind, title), marker in zip(_UNITS, "Ds^vo", strict=True):
        median = np.array([np.median(r) for r in _by_block(scores, kind)])
        if kind in ("qk", "v"):  # one width less is one dim of every head
            median = median * scores["mask_head"].sum(-1)
        saving = np.atleast_1d(scores[f"saving_{kind}"])
        value = np.where((saving > 0) & (median > 0), median / np.where(saving > 0, saving, 1), np.nan)
        if kind == "embed":
            axis.axhline(value[0], color=_DENSE, label=title)
        else:
            axis.plot(range(len(value)), value, marker=marker, label=title)
    axis.set_yscale("log")
    axis.set_xlabel("block")
    axis.set_ylabel(f"score per {unit}")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def _plot_losses(plt: Any, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    figure, axes = plt.subplots(
        2, len(curves), figsize=(4 * len(curves), 4.2), squeeze=False, height_ratios=(2.8, 1.4), sharex="col"
    )
    for axis, below, (name, lines) in zip(*axes, curves.items(), strict=True):
        steps = [line["step"] for line in lines]
        axis.plot(steps, [line["loss"] for line in lines], color=_THIRD)
        axis.set_yscale("log")
        if "learning_rate" in lines[0]:
            below.plot(steps, [line["learning_rate"] for line in lines], color=_DENSE)
        else:
            below.text(0.5, 0.5, "constant", ha="center", transform=below.transAxes)
            below.set_yticks([])
        below.set_ylabel("learning rate")
        below.set_ylim(bottom=0)
        below.set_xlabel("step")
        axis.set_title(f"{name}: training loss")
        checked = [line for line in lines if "val_top1" in line]
        if checked:
            twin = axis.twinx()
            twin.plot([line["step"] for line in checked], [line["val_top1"] for line in checked], "o-", color=_PRUNED)
            twin.set_ylabel("validation top-1", color=_PRUNED)
            twin.set_ylim(0, 1.02)
    figure.tight_layout()
    return figure


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>nvit_jax: {title}</title>
<style>
 body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }}
 h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
 table {{ border-collapse: collapse }}
 th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #d9dee4 }}
 th:first-child, td:first-child {{ text-align: left }}
 figure {{ margin: .5rem 0; overflow-x: auto }} svg {{ max-width: 100%; height: auto }}
</style></head><body>
<h1>nvit_jax: {title}</h1>
{body}
</body></html>
"""
