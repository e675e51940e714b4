"""prune: the library's pruning from a config section; masked and compact model, scores and snapshots are written."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from nvit_jax.api.prune import prune
from nvit_jax.api.pruner import Pruned, cut
from nvit_jax.api.recipe import Recipe
from nvit_jax.data.datasets import Dataset
from nvit_jax.files import saving, write_json
from nvit_jax.latency import timing
from nvit_jax.latency.sources import Latency, of_another_device, source
from nvit_jax.latency.timing import Measurement
from nvit_jax.model.dims import Units, ViTDims, count_macs
from nvit_jax.model.directory import Model, save_model
from nvit_jax.model.masks import full_masks
from nvit_jax.parallel import is_main
from nvit_jax.pruning import ranking
from nvit_jax.pruning.loop import Pruning
from nvit_jax.pruning.one_shot import CHECKED
from nvit_jax.run.records import read
from nvit_jax.run.stages import rules
from nvit_jax.run.stages.common import (
    Run,
    count_bad,
    dense_dir,
    dense_model,
    load_data,
    model_info,
    objective_of,
    recipe_of,
    teacher_of,
)


def prune_model(run: Run) -> dict[str, Any]:
    """Score, rank, mask and train until the targets hold; cut the masks out; check and measure the compact model."""
    c, p, stage = run.config, run.config.prune, run.stage
    dense = dense_model(run)
    dataset = load_data(run, dense.dims, dense.info)
    predict = rules.latency_model(run, dense.dims)
    how, limits = rules.measurement(c), rules.limits(p, latency=predict is not None)
    with rules.prune_keys():
        if not _measured(run):  # what is measured at the end must fit
            timing.measure([dense.dims], dataclasses.replace(how, repeats=1))
        found = prune(
            dataclasses.replace(dense, info={"preprocessing": dataset.preprocessing.to_json()}),
            dataset,
            **dataclasses.asdict(limits),
            criterion=rules.scoring(p),
            method=rules.plan(p),
            rule=rules.choice(p, dense.dims),
            compensate=p.compensate,
            snapshots=tuple(p.snapshots) if p.mode == "one_shot" else (),
            latency_table=predict,
            training=_recipe(run, dense.dims, dataset),
            evaluate_on=dataset.split("val").some(p.eval_images),
            measure=how,
            progress=stage,
            callback=_Keeper(run, dense, dataset, predict),
        )
    info = _info(run, dense, dataset)
    for ratio, masked in found.snapshots.items():
        _save_snapshot(run, ratio, masked, masked.compact(), info)
    _save_pair(stage.path, found.masked, found.model, info)
    write_json(stage.path / "latency.json", _times(found, how))
    return _result(run, found, dataset, predict)


def _recipe(run: Run, dims: ViTDims, dataset: Dataset) -> Recipe:
    teacher = teacher_of(run.config, "prune", dims, dataset.preprocessing)
    return recipe_of(run.config, "prune", objective_of(run.config, "prune", dims), teacher)


def _measured(run: Run) -> bool:
    """Whether the latency stage has timed the dense model."""
    latency = run.other("latency")
    return latency.done() and read(latency.path / "metrics.json").get("dense_latency_ms") is not None


# ------------------------------------------------------------------------------------------------ files


@dataclasses.dataclass
class _Keeper:
    """Is told of each pruning: writes the first scores, and the snapshots that a pruning reaches."""

    run: Run
    dense: Model
    dataset: Dataset
    predict: Latency | None

    def __call__(self, pruning: Pruning) -> None:
        if pruning.line["pruning"] == 1:
            _keep_scores(self.run, pruning.scores, self.dense.dims, self.predict)
        if self.run.config.prune.mode != "iterative":
            return
        for ratio in self.run.config.prune.snapshots:
            assert self.predict is not None
            whole = self.predict(self.dense.dims)
            if self.predict(pruning.before) > ratio * whole >= self.predict(pruning.after):
                info = _info(self.run, self.dense, self.dataset)
                place = _save_snapshot(self.run, ratio, *cut(pruning.state, self.dense), info)
                part = self.predict(pruning.after) / whole
                self.run.stage.say(f"snapshot {ratio}: predicted latency x{part:.3f}, {place}")


def _save_snapshot(run: Run, ratio: float, masked: Model, compact: Model, info: dict[str, Any]) -> pathlib.Path:
    place = run.stage.path / "snapshots" / str(ratio)
    _save_pair(place, masked, compact, info | {"provenance": info["provenance"] | {"snapshot": ratio}})
    return place


def _save_pair(place: pathlib.Path, masked: Model, compact: Model, info: dict[str, Any]) -> None:
    save_model(place / "masked", dataclasses.replace(masked, info=info))
    save_model(place / "model", dataclasses.replace(compact, info=info))


def _info(run: Run, dense: Model, dataset: Dataset) -> dict[str, Any]:
    facts = {"stage": "prune", "criterion": rules.criterion(run.config.prune), "seed": run.config.seed}
    return model_info(dataset, dense.info.get("variant"), facts | {"from": str(dense_dir(run))})


def _keep_scores(run: Run, scores: Units, dims: ViTDims, predict: Callable[[ViTDims], float] | None) -> None:
    """scores.npz, for the report: the scores of the model before pruning, and what a unit of each kind saves."""
    if not is_main():
        return
    unit = "ms" if predict else "million MACs"
    savings = ranking.unit_savings(dims, predict or (lambda d: count_macs(d) / 1e6))
    path = run.stage.path / "scores.npz"
    arrays: dict[str, Any] = {**scores._asdict(), "saving_unit": unit}
    arrays |= {f"saving_{kind}": value for kind, value in savings.items()}
    arrays |= {f"mask_{kind}": value for kind, value in full_masks(dims)._asdict().items()}
    with saving(path):
        beside = path.with_name(".scores.tmp.npz")
        np.savez(beside, **arrays)
        beside.replace(path)


# ----------------------------------------------------------------------------------------------- metrics


def _times(found: Pruned, how: Measurement) -> dict[str, Any]:
    """latency.json: what was measured, and how, so that the eval stage need not measure again."""
    r = found.record
    spread = r["latency_spread"]
    models = {
        "dense": {"dims": found.masked.dims.to_json(), "ms": r["dense_latency_ms"], "spread": spread[0]},
        "pruned": {"dims": found.model.dims.to_json(), "ms": r["measured_latency_ms"], "spread": spread[1]},
    }
    return {"device": timing.device_name(), "how": dataclasses.asdict(how), "models": models}


def _result(run: Run, found: Pruned, dataset: Dataset, predict: Latency | None) -> dict[str, Any]:
    """metrics.json, and its line."""
    p, stage, r = run.config.prune, run.stage, found.record
    target = {key: value for key, value in p.target.items() if value is not None}
    keys = (
        "latency_ratio",
        "predicted_latency_ratio",
        "macs_ratio",
        "params_ratio",
        "predicted_latency_ms",
        "measured_latency_ms",
        "dense_latency_ms",
        "masked_vs_compact_max_abs_diff",
        "dims",
    )
    result = {"criterion": r["criterion"], "target": target} | {key: r[key] for key in keys}
    if p.mode == "one_shot":
        result |= {key: r[key] for key in CHECKED if key in r}
    result |= {
        "latency_source": source(predict),
        "calibration_overlap": dataset.overlap > 0,
        "bad_images": count_bad(dataset),
        "input_wait_seconds": stage.input_wait,
        "peak_memory_bytes": r["peak_memory_bytes"],
        "seconds": stage.seconds(),
    }
    asked = ", ".join(f"{name} {value:g}" for name, value in target.items())
    other = f" ({source(predict)})" if of_another_device(predict) else ""
    predicted = f"predicted x{r['predicted_latency_ratio']:.3f}{other}, " if predict else ""
    stage.say(
        f"{r['criterion']}: asked {asked}; MACs x{r['macs_ratio']:.3f}, params x{r['params_ratio']:.3f}, latency "
        f"{predicted}measured x{r['latency_ratio']:.3f}, {r['prunings']} pruning{'s' * (r['prunings'] != 1)}, "
        f"{stage.seconds():.0f} s"
    )
    for ratio in p.snapshots:
        if not (stage.path / "snapshots" / str(ratio)).exists():
            stage.say(f"warning: prune.snapshots: {ratio} of the latency was not reached, there is no such snapshot")
    return result
