"""latency, eval and report: what a model costs on this device, how good it is, and the page that says so."""

import functools
from typing import Any

from nvit_jax.files import read_json, write_json
from nvit_jax.latency import table as latency
from nvit_jax.latency import timing
from nvit_jax.model.dims import count_macs, count_params
from nvit_jax.model.directory import load_model
from nvit_jax.parallel import Parallel, is_main, wait_for_all
from nvit_jax.pruning import sparsity
from nvit_jax.pruning.ranking import group_sizes
from nvit_jax.run import report
from nvit_jax.run.stages import rules
from nvit_jax.run.stages.common import Run, compute_dtype, count_bad, dense_model, evaluator, load_data, need
from nvit_jax.training.distill import Stopped


def measure_latency(run: Run) -> dict[str, Any]:
    """Time the pieces of models like the dense one on this device: W/latency/table.json. A stopped one goes on."""
    c = run.config
    dims, place = dense_model(run).dims, run.stage.path
    if c.latency.roofline.tflops:
        estimate = rules.roofline_of(c)
        run.stage.say(f"dense {estimate(dims):.3f} ms for {c.latency.batch} images: {estimate.device}, not measured")
        return {"estimated_dense_ms": estimate(dims), "device": estimate.device}
    kept = place / "cells.json"
    known = read_json(kept) if kept.exists() else {}
    if known.pop("device", None) != timing.device_name():
        known = {}
    wait_for_all("read cells.json")  # before the main process writes it: all do the same work

    def keep(records: dict[str, Any]) -> None:
        write_json(kept, records | {"device": timing.device_name()})
        if run.stage.stopping:
            raise Stopped("stopped while measuring latency")

    with run.stage.progress(1, len(known)):
        values = latency.measure_table(
            dims,
            group_sizes(c.prune.profile),
            batch=c.latency.batch,
            dtype=c.dtype,
            counts=dict(c.latency.widths),
            models=c.latency.models,
            repeats=c.latency.repeats,
            known=known,
            keep=keep,
            advance=lambda done, total: run.stage.advance(done, "", total),
        )
    table = latency.LatencyTable(values)
    write_json(place / "table.json", values)
    left_out = latency.skipped(values)
    for line in left_out:
        run.stage.say(f"warning: does not fit in memory, estimated from its MACs: {line}")
    dense = values["models"][0]
    run.stage.say(
        f"{len(values['cells'])} pieces and {len(values['models'])} models at batch {c.latency.batch} on "
        f"{table.device}, spread {latency.spread([*values['cells'].values(), *values['models']]):.1%}, error on models "
        + (f"left out {table.leave_one_out:.1%}, " if table.leave_one_out is not None else "not measured, ")
        + f"{run.stage.seconds():.0f} s"
    )
    return {
        "dense_latency_ms": dense.get("ms"),
        "predicted_dense_ms": table(dims),
        "factors": dict(
            zip(("attention", "mlp_and_rest", "ms_per_block_of_several_heads"), table.factors.tolist(), strict=True)
        ),
        "leave_one_out_error": table.leave_one_out,
        "smoothing": table.disorder,
        "cells": len(values["cells"]),
        "skipped": left_out,
        "seconds": run.stage.seconds(),
    }


def evaluate_models(run: Run) -> dict[str, Any]:
    """Accuracy, size and latency of every model of the run. Writes summary.json.

    A model that an earlier evaluation has scored is not scored again; latency is measured side by side, each time.
    """
    c = run.config
    inputs = (run.stage.record() or {})["inputs"]  # ids of what this stage reads
    found, ids = {"dense": dense_model(run)}, {"dense": inputs.get("model") or inputs["pretrain"]}
    places = {"pruned": run.workdir / "prune" / "model", "finetuned": run.workdir / "finetune" / "model"}
    if run.other("finetune").done() and (ratio := run.other("finetune").keys().get("finetune.snapshot")) is not None:
        places["pruned"] = run.workdir / "prune" / "snapshots" / str(ratio) / "model"  # what the finetuned one was
    for name, stage in (("pruned", "prune"), ("finetuned", "finetune")):
        if run.other(stage).done():
            found[name], ids[name] = load_model(places[name]), f"{inputs[stage]} {places[name].parent.name}"
    dataset = load_data(run, found["dense"].dims, found["dense"].info)
    parallel = Parallel.create(c.parallel)
    known_path = run.stage.path / "scores.json"
    known = read_json(known_path) if known_path.exists() else {}
    images = len(dataset.split(c.eval.split))
    todo = [name for name in found if known.get(name, {}).get("id") != ids[name]]

    def advance(before: int, done: int) -> None:
        run.stage.advance(before + done, "")
        if run.stage.stopping:  # what is scored is kept
            raise Stopped("stopped while evaluating")

    with run.stage.progress(images * len(todo)):
        for number, name in enumerate(todo):
            score = evaluator(
                found[name].dims,
                dataset,
                c.eval.split,
                parallel,
                c.eval.batch,
                compute_dtype(c),
                advance=functools.partial(advance, number * images),
                report=run.stage.warn,
            )
            known[name] = {"id": ids[name]} | score(parallel.place(found[name].params), None)
            write_json(known_path, known)
    times = timing.measure(
        [m.dims for m in found.values()], batch=c.latency.batch, dtype=c.dtype, repeats=c.latency.repeats
    )
    summary, last = {}, {}
    for (name, model), ms in zip(found.items(), times, strict=True):
        scores = known[name]
        summary[name] = {
            "top1": scores["top1"],
            "top5": scores["top5"],
            "params": count_params(model.dims),
            "macs": count_macs(model.dims),
            "latency_ms": ms,
            "latency_batch": c.latency.batch,
            "images": scores["images"],
        }
        if "sparsity" in model.info:
            summary[name]["nonzero_params"] = sparsity.count_nonzero(model.params)
        last = summary[name] | {
            "loss": scores["loss"],
            "images_per_second": 1e3 * c.latency.batch / ms,
            "device": timing.device_name(),
            "dtype": c.dtype,
            "calibration_overlap": dataset.overlap > 0,
            "bad_images": count_bad(dataset),
        }
    write_json(run.workdir / "summary.json", summary)
    run.stage.say(f"{summary['dense']['images']} {c.eval.split} images, {run.stage.seconds():.0f} s")
    if is_main():
        print(report.text_table(summary))
    return last


def make_report(run: Run) -> dict[str, Any]:
    """One self-contained page."""
    need(run, "eval")
    path = run.workdir / "report.html"
    report.write_report(run.workdir, path)
    run.stage.say(f"{path}, {run.stage.seconds():.0f} s")
    return {"path": str(path)}
