"""latency, eval and report: what a model costs on this device, how good it is, and the page that says so."""

import functools
from typing import Any

from nvit_jax import latency, report, sparsity
from nvit_jax.api import load_model
from nvit_jax.checkpoint import read_json, write_json
from nvit_jax.dims import count_macs, count_params
from nvit_jax.parallel import Parallel, is_main
from nvit_jax.ranking import group_sizes
from nvit_jax.stages.common import Run, compute_dtype, dense_model, evaluator, load_data, need


def measure_latency(run: Run) -> dict[str, Any]:
    """Fit a latency model of this device for models like the dense one."""
    c = run.config
    dims = dense_model(run).dims
    sizes = group_sizes(c.prune.profile)
    total = 2 + c.latency.models + c.latency.checks + c.latency.repeats
    done = 0

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        run.stage.advance(done, "")

    with run.stage.progress(total):
        model, errors = latency.fit(
            dims,
            sizes,
            batch=c.latency.batch,
            dtype=c.dtype,
            count=c.latency.models,
            checks=c.latency.checks,
            repeats=c.latency.repeats,
            advance=advance,
        )
    run.stage.say(
        f"dense {errors['dense_latency_ms']:.2f} ms for {c.latency.batch} images on {model.device}, "
        f"prediction error {errors.get('check_error', errors['fit_error']):.1%}, {run.stage.seconds():.0f} s"
    )
    return {"model": model.to_json(), "dims": dims.to_json()} | errors


def evaluate_models(run: Run) -> dict[str, Any]:
    """Accuracy, size and latency of every model of the run. Writes summary.json.

    A model that an earlier evaluation has scored is not scored again; latency is measured side by side, each time.
    """
    c = run.config
    inputs = (run.stage.record() or {})["inputs"]  # ids of what this stage reads
    found, ids = {"dense": dense_model(run)}, {"dense": inputs.get("model") or inputs["pretrain"]}
    for name, stage in (("pruned", "prune"), ("finetuned", "finetune")):
        if run.other(stage).done():
            found[name], ids[name] = load_model(run.workdir / stage / "model"), inputs[stage]
    dataset = load_data(run, found["dense"].dims, found["dense"].info)
    parallel = Parallel.create(c.parallel)
    known_path = run.stage.path / "scores.json"
    known = read_json(known_path) if known_path.exists() else {}
    images = len(dataset.split(c.eval.split))
    todo = [name for name in found if known.get(name, {}).get("id") != ids[name]]

    def advance(before: int, done: int) -> None:
        run.stage.advance(before + done, "")

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
            )
            known[name] = {"id": ids[name]} | score(parallel.replicate(found[name].params), None)
            write_json(known_path, known)
    times = latency.measure(
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
            "device": latency.device_name(),
            "dtype": c.dtype,
            "calibration_overlap": dataset.overlap > 0,
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
