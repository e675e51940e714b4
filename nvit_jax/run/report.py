"""The final table, and report.html: one self-contained page from the files of a run."""

import html
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.files import write_text
from nvit_jax.run import page, plots
from nvit_jax.run.records import HISTORY, LOG, read, read_optional
from nvit_jax.training import measures
from nvit_jax.training.measures import Measure
from nvit_jax.training.monitor import read_lines

Path = pathlib.Path
Summary = Mapping[str, Mapping[str, Any]]  # summary.json: a model's name -> its results

_SHARES = ("top1", "knn")  # of all images: measures that have an interval
_NORMAL_95 = 1.959963984540054  # 95% of a normal distribution lie this many standard deviations around its mean


def table(summary: Summary, spreads: Mapping[str, float] | None = None) -> list[tuple[str, ...]]:
    """A head and rows of strings, the speed-up relative to the dense model.

    With a sparse model there is a column more: parameters that are not 0, and how many times more the dense model has.
    `spreads` are of the latencies, as parts of them.
    """
    sparse, known = any("nonzero_params" in r for r in summary.values()), measures.of(summary.values())
    head = ("model", *(m.title for m in known), "parameters", *(("non-zero (ratio)",) if sparse else ()))
    return [(*head, "MACs", "latency", "speed-up")] + [
        (
            name,
            *(measures.shown(r, m) for m in known),
            f"{r['params']:,}",
            *((_nonzero(summary, name),) if sparse else ()),
            f"{r['macs'] / 1e6:,.2f} M",
            f"{_latency(summary, name, spreads or {}, ' ms')} / {r['latency_batch']}",
            f"{summary['dense']['latency_ms'] / r['latency_ms']:.2f}x",
        )
        for name, r in summary.items()
    ]


def text_table(summary: Summary, spreads: Mapping[str, float] | None = None) -> str:
    """The final table of a run for the terminal."""
    rows = table(summary, spreads)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _nonzero(summary: Summary, name: str) -> str:
    count = summary[name].get("nonzero_params", summary[name]["params"])
    return f"{count:,} ({summary['dense']['params'] / count:.1f}x)"


def _latency(summary: Summary, name: str, spreads: Mapping[str, float], unit: str = "") -> str:
    spread = f" ±{spreads[name]:.0%}" if name in spreads else ""
    return f"{summary[name]['latency_ms']:.2f}{unit}{spread}"


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a probability of which `count` independent trials gave `share`."""
    z = _NORMAL_95
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


# --------------------------------------------------------------------------------------------------- page


def check_files(workdir: Path) -> None:
    """UserError for a file that `write_report` could not read; before anything is begun."""
    for path in (workdir / "summary.json", workdir / "config.json"):
        read(path)
    if _done(workdir / "prune"):
        dense = read(workdir / "prune" / "masked" / "model.json")
        history = read_lines(workdir / "prune" / "history.jsonl", HISTORY)
        for found in (read(workdir / "prune" / "metrics.json"), *history):
            if len(found["dims"]["heads"]) != len(dense["dims"]["heads"]):
                raise UserError(
                    f"{workdir / 'prune'}: its files speak of models of different depths; move it away or use another "
                    "--workdir"
                )
    for name in ("pretrain", "prune", "finetune"):
        read_lines(workdir / name / "log.jsonl", LOG)
    for name in ("eval/latency.json", "eval/metrics.json", "pretrain/metrics.json"):
        read_optional(workdir / name)


def write_report(workdir: Path, path: Path) -> None:
    """Read summary.json and every stage's files under `workdir`; write the page to `path`."""
    summary, config = read(workdir / "summary.json"), read(workdir / "config.json")
    spreads = _read_spreads(workdir)
    parts = [_lead(workdir, summary, config, bool(spreads)), _main_table(summary, spreads)]
    watched = measures.of(summary.values())[0]
    dense = _dense_value(workdir, summary, config["config"], watched)
    if _done(workdir / "prune"):
        parts += _pruning(workdir, dense, watched) + _saliency(workdir)
    parts += _training(workdir, config["config"], dense, watched) + _comparison(workdir, summary)
    facts = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    parts.append(f"<h2>Configuration</h2><p>{html.escape(facts)}; {html.escape(config['device'])}</p>")
    keys = [(key, repr(value)) for key, value in config["config"].items() if value is not None]
    parts.append(
        f"<details><summary>{len(keys)} keys</summary>{page.table(('key', 'value'), keys, 'scroll keys')}</details>"
    )
    write_text(path, page.page(_title(workdir, summary, config["config"]), "\n".join(parts)))


def write_preview(path: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]], side: int = 128) -> None:
    """A page of rows of images, uint8 [s, s, channels], each with a line of text above it."""
    parts = []
    for text, images in rows:
        pictures = [page.picture(pixels, side, f"{text}, image {i}") for i, pixels in enumerate(images, 1)]
        parts.append(f"<p>{html.escape(text)}</p><div>{' '.join(pictures)}</div>")
    write_text(path, page.page("Training images", "\n".join(parts)))


def _done(stage: Path) -> bool:
    return (stage / "stage.json").exists() and read(stage / "stage.json", part=True).get("status") == "done"


def _read_spreads(workdir: Path) -> dict[str, float]:
    """Half the interquartile range of each model's latency, as a part of its median; of older runs nothing."""
    return {name: facts["spread"] for name, facts in read_optional(workdir / "eval" / "latency.json").items()}


def _dense_value(workdir: Path, summary: Summary, config: Mapping[str, Any], watched: Measure) -> float | None:
    """The dense model's measure on the validation split, on which prunings and trainings are watched."""
    if watched.key == "cosine":
        return 1.0  # its features are compared with themselves
    known = read_optional(workdir / "prune" / "metrics.json").get("dense_val_top1")
    if known is None and not config.get("model"):
        known = read_optional(workdir / "pretrain" / "metrics.json").get("val_top1")
    if known is None and config.get("eval.split") == "val":
        known = summary["dense"]["top1"]
    return known


# ---------------------------------------------------------------------------------------- what the run is


def _title(workdir: Path, summary: Summary, config: Mapping[str, Any]) -> str:
    model = _model_name(workdir, summary, config)
    if _done(workdir / "prune"):
        model += f" pruned by {read(workdir / 'prune' / 'metrics.json')['criterion']}"
    images = f"{summary['dense']['images']:,} {_split_name(config)} images"
    return f"{model}, on {_data_name(config)} ({images})"


def _split_name(config: Mapping[str, Any]) -> str:
    return {"train": "training", "val": "validation"}.get(config["eval.split"], config["eval.split"])


def _model_name(workdir: Path, summary: Summary, config: Mapping[str, Any]) -> str:
    """The published variant where that is known, else its size."""
    for place in (workdir / "prune" / "masked", workdir / "pretrain" / "model", Path(config.get("model") or workdir)):
        if variant := read_optional(place / "model.json").get("variant"):
            return str(variant)
    return f"ViT of {summary['dense']['params']:,} parameters"


def _data_name(config: Mapping[str, Any]) -> str:
    name = str(config["data.name"])
    if name.startswith("tfds:"):
        return name
    if whole := config.get("data.path"):
        return Path(whole).absolute().name
    part = config.get(f"data.{config['eval.split']}") or config.get("data.train")
    return "/".join(Path(part).absolute().parts[-2:]) if part else name


def _lead(workdir: Path, summary: Summary, config: Mapping[str, Any], spread: bool) -> str:
    """What the numbers of the table below it are of."""
    name, result = list(summary.items())[-1]
    where = f"{result['images']:,} images of the {_split_name(config['config'])} split"
    judged = []
    for part in measures.of(summary.values()):
        if part.key == "top5" or result.get(part.key) is None:
            continue
        text = f"{part.words[0].upper()}{part.words[1:]} of the {name} model: {measures.shown(result, part)} on {where}"
        if part.key in _SHARES:
            low, high = wilson(result[part.key], result["images"])
            text += f" (Wilson's 95% interval: {low:.2%} to {high:.2%})"
            text += f"; of the dense model: {measures.shown(summary['dense'], part)}" if name != "dense" else ""
        judged.append(text)
    evaluated = read_optional(workdir / "eval" / "metrics.json")
    device, dtype = evaluated.get("device") or config["device"], evaluated.get("dtype") or config["config"]["dtype"]
    latency = f"Latency: median time of a batch of {result['latency_batch']} images in {dtype} on {device}"
    if spread:
        latency += "; ± is half the range of the middle half of the times"
    source = f", of the model in {config['config']['model']}" if config["config"].get("model") else ""
    lines = (*judged, latency, f"Run: {workdir.absolute().name}{source}")
    return "".join(f"<p>{html.escape(line)}.</p>" for line in lines)


def _main_table(summary: Summary, spreads: Mapping[str, float]) -> str:
    """A column a model: that fits on a telephone."""
    dense = summary["dense"]

    known = measures.of(summary.values())
    shares = [m for m in known if m.key in _SHARES]

    def interval(r: Mapping[str, Any]) -> str:
        share = r.get(shares[0].key)
        return "" if share is None else "{:.1f} to {:.1f}%".format(*(100 * e for e in wilson(share, r["images"])))

    def speed_up(name: str) -> str:
        ratio = dense["latency_ms"] / summary[name]["latency_ms"]
        if name == "dense" or not {name, "dense"} <= spreads.keys():
            return f"{ratio:.2f}x"
        return f"{ratio:.2f}x ±{ratio * math.hypot(spreads['dense'], spreads[name]):.2f}"

    rows = [(m.title, *(measures.shown(r, m) for r in summary.values())) for m in known]
    if shares:
        rows.insert(1 + known.index(shares[0]), ("95% interval", *map(interval, summary.values())))
    rows += [
        ("parameters", *(f"{r['params']:,}" for r in summary.values())),
        ("MACs (M)", *(f"{r['macs'] / 1e6:,.2f}" for r in summary.values())),
        ("latency (ms)", *(_latency(summary, name, spreads) for name in summary)),
        ("speed-up", *map(speed_up, summary)),
    ]
    if any("nonzero_params" in r for r in summary.values()):
        place = 1 + [row[0] for row in rows].index("parameters")
        rows.insert(place, ("non-zero (ratio)", *(_nonzero(summary, name) for name in summary)))
    return page.table(("", *summary), rows)


# ----------------------------------------------------------------------------------------------- sections


def _pruning(workdir: Path, value: float | None, watched: Measure) -> list[str]:
    metrics = read(workdir / "prune" / "metrics.json")
    dense = read(workdir / "prune" / "masked" / "model.json")["dims"]
    history = read_lines(workdir / "prune" / "history.jsonl", HISTORY)
    parts = [_targets(metrics), "<h2>Widths per block, before and after</h2>"]
    parts.append(plots.figure(plots.widths, dense, metrics["dims"]))
    if len(history) == 1:
        parts += ["<h2>Right after the pruning</h2>", _one_pruning(history[0], metrics, value, watched)]
    elif history:
        parts += ["<h2>Along the pruning</h2>", plots.figure(plots.history, history, metrics, value, watched)]
        parts += ["<p>Part of each width that is left, by block.</p>", plots.figure(plots.remaining, dense, history)]
    return parts


def _targets(metrics: Mapping[str, Any]) -> str:
    """What was asked for and what is predicted. The latency that was measured is in the main table, and there alone."""
    targets = ", ".join(f"{name} &le; {html.escape(str(value))}" for name, value in metrics["target"].items())
    predicted = metrics["predicted_latency_ratio"]
    rows = [
        ("MACs ratio", f"{metrics['macs_ratio']:.3f}"),
        ("parameters ratio", f"{metrics['params_ratio']:.3f}"),
        ("largest difference of logits, masked and compact", f"{metrics['masked_vs_compact_max_abs_diff']:.1e}"),
        ("embed channels kept", str(metrics["dims"]["embed"])),
    ]
    if predicted is not None:
        rows += [("predicted latency ratio", f"{predicted:.3f}"), ("predicted for", str(metrics["latency_source"]))]
    heading = f"<h2>Pruning by {html.escape(metrics['criterion'])}</h2><p>Targets: {targets}.</p>"
    return heading + page.table(("", "result"), rows)


def _one_pruning(line: Mapping[str, Any], metrics: Mapping[str, Any], value: float | None, watched: Measure) -> str:
    """A curve of one point says less than a table."""
    before = "not measured" if value is None else watched.form.format(value)
    rows = [
        (f"validation {watched.title}", before, watched.form.format(line[f"val_{watched.key}"])),
        ("MACs", "100%", f"{line['macs_ratio']:.1%}"),
    ]
    if metrics["predicted_latency_ratio"] is not None:
        rows.append(("latency, predicted", "100%", f"{metrics['predicted_latency_ratio']:.1%}"))
    return page.table(("", "dense", "pruned"), rows)


def _saliency(workdir: Path) -> list[str]:
    if not (workdir / "prune" / "scores.npz").exists():
        return []
    with np.load(workdir / "prune" / "scores.npz") as arrays:
        scores = dict(arrays)
    unit = str(scores.pop("saving_unit"))
    return [
        "<h2>Saliency of the model before pruning</h2>",
        "<p>Median and the middle 80% of the positive scores of a block's units; the others are counted.</p>",
        plots.figure(plots.scores, scores),
        f"<p>Sensitivity: the median score of a unit, by the {html.escape(unit)} that one unit less saves.</p>",
        plots.figure(plots.sensitivity, scores, unit),
    ]


def _training(workdir: Path, config: Mapping[str, Any], value: float | None, watched: Measure) -> list[str]:
    """Curves of the stages that logged more than one step, a line of text for the others."""
    parts, curves = [], {}
    for name in ("pretrain", "prune", "finetune"):
        lines = read_lines(workdir / name / "log.jsonl", LOG) if _done(workdir / name) else []
        if len(lines) > 1:
            curves[name] = lines
        elif lines:
            key = f"val_{watched.key}"
            more = f", validation {watched.title} {watched.form.format(lines[0][key])}" if key in lines[0] else ""
            parts.append(f"<p>{name}: training loss {lines[0]['loss']:.4g} at step {lines[0]['step']}{more}.</p>")
    if curves:
        rates = {name: config.get(f"{name}.learning_rate") for name in curves}
        parts.insert(0, plots.figure(plots.losses, curves, rates, value, watched))
    return ["<h2>Training</h2>", *parts] if parts else []


def _comparison(workdir: Path, summary: Summary) -> list[str]:
    """Other criteria at the same targets, each measured once: by its own evaluation."""
    others = [p for p in sorted((workdir / "compare").glob("*/summary.json")) if _done(p.parent / "eval")]
    if not others or "pruned" not in summary:
        return []
    rows = []
    watched = measures.of(summary.values())[0]
    for place, result in [(workdir, summary)] + [(p.parent, read(p)) for p in others]:
        metrics, finetuned = read(place / "prune" / "metrics.json"), result.get("finetuned")
        rows.append(
            (
                metrics["criterion"],
                f"{metrics['macs_ratio']:.3f}",
                f"{result['dense']['latency_ms'] / result['pruned']['latency_ms']:.2f}x",
                measures.shown(result["pruned"], watched),
                "not run" if finetuned is None else measures.shown(finetuned, watched),
            )
        )
    head = ("criterion", "MACs ratio", "speed-up", f"pruned {watched.title}", f"finetuned {watched.title}")
    return ["<h2>The same targets, other criteria</h2>", page.table(head, rows)]
