"""latency, eval and report: what a model costs on this device, how good it is, and the page that says so."""

import dataclasses
from typing import Any

from nvit_jax.api.evaluate import evaluate
from nvit_jax.data.datasets import Dataset
from nvit_jax.errors import renamed
from nvit_jax.files import write_json
from nvit_jax.latency import table as latency
from nvit_jax.latency import timing
from nvit_jax.latency.table import SHARED, Grid, LatencyTable
from nvit_jax.latency.timing import Time
from nvit_jax.model.dims import ViTDims, count_macs, count_params
from nvit_jax.model.directory import Model, load_model
from nvit_jax.parallel import is_main, wait_for_all
from nvit_jax.pruning import sparsity
from nvit_jax.pruning.ranking import group_sizes
from nvit_jax.run import report
from nvit_jax.run.records import read, read_optional
from nvit_jax.run.stages import rules
from nvit_jax.run.stages.common import Run, count_bad, dense_model, load_data, need
from nvit_jax.training import measures
from nvit_jax.training.distill import Stopped

_BATCH = {"batch": "config.latency.batch"}


def measure_latency(run: Run) -> dict[str, Any]:
    """Time the pieces of models like the dense one on this device: W/latency/table.json. A stopped one goes on."""
    c = run.config
    dims, place = dense_model(run).dims, run.stage.path
    if c.latency.roofline.tflops:
        estimate = rules.roofline_of(c)
        run.stage.say(f"dense {estimate(dims):.3f} ms for {c.latency.batch} images: {estimate.device}, not measured")
        return {"estimated_dense_ms": estimate(dims), "device": estimate.device}
    kept = place / "cells.json"
    known = read_optional(kept)
    if known.pop("device", None) != timing.device_name():
        known = {}
    wait_for_all("read cells.json")  # before the main process writes it: all do the same work

    def keep(records: dict[str, Any]) -> None:
        write_json(kept, records | {"device": timing.device_name()})
        if run.stage.stopping:
            raise Stopped("stopped while measuring latency")

    with run.stage.progress(1, len(known), unit="piece"), renamed(_BATCH):
        values = latency.measure_table(
            dims,
            Grid(group_sizes(c.prune.profile), dict(c.latency.widths), c.latency.models),
            rules.measurement(c),
            known=known,
            keep=keep,
            advance=lambda done, total: run.stage.advance(done, "", total),
        )
        found = LatencyTable(values)
    write_json(place / "table.json", values)
    return _table_result(run, values, found)


def _table_result(run: Run, values: dict[str, Any], found: LatencyTable) -> dict[str, Any]:
    """metrics.json of the latency stage, and its line."""
    left_out = latency.skipped(values)
    for line in left_out:
        run.stage.say(f"warning: does not fit in memory, estimated from its MACs: {line}")
    if found.shared:
        run.stage.say(f"warning: {SHARED}")
    spread = latency.spread([*values["cells"].values(), *values["models"]])
    error = f", error on models left out {found.leave_one_out:.1%}" if found.leave_one_out is not None else ""
    run.stage.say(
        f"{len(values['cells'])} pieces and {len(values['models'])} models at batch {found.batch} on "
        f"{found.device}, spread {spread:.1%}{error}, {run.stage.seconds():.0f} s"
    )
    names = ("attention", "mlp_and_rest", "ms_per_block_of_several_heads")
    return {
        "dense_latency_ms": values["models"][0].get("ms"),
        "predicted_dense_ms": found(found.dims),
        "factors": dict(zip(names, found.factors.tolist(), strict=True)),
        "leave_one_out_error": found.leave_one_out,
        "smoothing": found.disorder,
        "cells": len(values["cells"]),
        "skipped": left_out,
        "seconds": run.stage.seconds(),
    }


# --------------------------------------------------------------------------------------------------- eval


def evaluate_models(run: Run) -> dict[str, Any]:
    """Accuracy, size and latency of every model of the run. Writes summary.json.

    A model that an earlier evaluation has scored is not scored again, and latencies that the prune stage has measured
    are taken from there.
    """
    c = run.config
    found, ids = _models(run)
    dataset = load_data(run, found["dense"].dims, found["dense"].info)
    known = _score(run, found, ids, dataset)
    times = _times(run, {name: model.dims for name, model in found.items()})
    write_json(run.stage.path / "latency.json", {name: time._asdict() for name, time in times.items()})
    summary = {name: _row(run, model, known[name], times[name].ms) for name, model in found.items()}
    write_json(run.workdir / "summary.json", summary)
    last = list(found)[-1]
    if not found["dense"].dims.classes and "knn" not in summary["dense"]:
        run.stage.say("images without labels: no accuracy of nearest neighbours")
    run.stage.say(f"{summary['dense']['images']} {c.eval.split} images, {run.stage.seconds():.0f} s")
    if is_main():
        print(report.text_table(summary, {name: time.spread for name, time in times.items()}))
    return summary[last] | {
        "loss": known[last]["loss"],
        "images_per_second": 1e3 * c.latency.batch / times[last].ms,
        "device": timing.device_name(),
        "dtype": c.dtype,
        "calibration_overlap": dataset.overlap > 0,
        "bad_images": count_bad(dataset),
    }


def _models(run: Run) -> tuple[dict[str, Model], dict[str, str]]:
    """The models of the run, and ids that change when they do."""
    inputs = (run.stage.record() or {})["inputs"]  # ids of what this stage reads
    found, ids = {"dense": dense_model(run)}, {"dense": inputs.get("model") or inputs["pretrain"]}
    places = {"pruned": run.workdir / "prune" / "model", "finetuned": run.workdir / "finetune" / "model"}
    if run.other("finetune").done() and (ratio := run.other("finetune").keys().get("finetune.snapshot")) is not None:
        places["pruned"] = run.workdir / "prune" / "snapshots" / str(ratio) / "model"  # what the finetuned one was
    for name, stage in (("pruned", "prune"), ("finetuned", "finetune")):
        if run.other(stage).done():
            found[name], ids[name] = load_model(places[name]), f"{inputs[stage]} {places[name].parent.name}"
    return found, ids


def _score(run: Run, found: dict[str, Model], ids: dict[str, str], dataset: Dataset) -> dict[str, Any]:
    """Accuracies by name. What is scored is kept at once, so that a stopped evaluation loses none."""
    c, path = run.config, run.stage.path / "scores.json"
    known = read_optional(path)
    names = {"batch": "config.eval.batch", "parallel": "config.parallel", "neighbours": "config.eval.neighbours"}
    with renamed(names):
        for name, model in found.items():
            if known.get(name, {}).get("id") != ids[name]:
                scores = evaluate(
                    model,
                    dataset.split(c.eval.split),
                    **({} if model.dims.classes else _comparison(run, found["dense"], dataset)),
                    batch=c.eval.batch,
                    dtype=c.dtype,
                    parallel=c.parallel,
                    progress=run.stage,
                )
                known[name] = {"id": ids[name]} | scores
                write_json(path, known)
    return known


def _comparison(run: Run, dense: Model, dataset: Dataset) -> dict[str, Any]:
    """What the features of a model without a classifier are judged by."""
    c = run.config.eval
    database = None
    if c.split != "train" and "train" in dataset.splits:
        database = dataset.split("train").some(c.database)
    return {"reference": dense, "database": database, "neighbours": c.neighbours}


def _times(run: Run, dims: dict[str, ViTDims]) -> dict[str, Time]:
    """Latencies by name: those that the prune stage measured on this device in this way, else all anew, in turns."""
    how = rules.measurement(run.config)
    path = run.workdir / "prune" / "latency.json"
    if run.other("prune").done() and path.exists():
        known = read(path)
        if (known["device"], known["how"]) == (timing.device_name(), dataclasses.asdict(how)):
            by_dims = {ViTDims.from_json(m["dims"]): Time(m["ms"], m["spread"]) for m in known["models"].values()}
            if all(one in by_dims for one in dims.values()):
                return {name: by_dims[one] for name, one in dims.items()}
    with renamed(_BATCH):
        return dict(zip(dims, timing.measure(list(dims.values()), how), strict=True))


def _row(run: Run, model: Model, scores: dict[str, Any], ms: float) -> dict[str, Any]:
    """One model's R of summary.json."""
    row = {key: scores[key] for key in measures.KEYS if key in scores}
    row |= {
        "params": count_params(model.dims),
        "macs": count_macs(model.dims),
        "latency_ms": ms,
        "latency_batch": run.config.latency.batch,
        "images": scores["images"],
    }
    if "sparsity" in model.info:
        row["nonzero_params"] = sparsity.count_nonzero(model.params)
    return row


def make_report(run: Run) -> dict[str, Any]:
    """One self-contained page."""
    need(run, "eval")
    path = run.workdir / "report.html"
    report.write_report(run.workdir, path)
    run.stage.say(f"{path}, {run.stage.seconds():.0f} s")
    return {"path": str(path)}
