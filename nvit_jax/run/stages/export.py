"""export: the last model of the run in the formats of other places."""

from typing import Any

from nvit_jax.api.export import export
from nvit_jax.errors import renamed
from nvit_jax.model.directory import load_model
from nvit_jax.run.records import read
from nvit_jax.run.stages.common import Run, dense_model

_KEYS = ("formats", "dtypes", "opset", "weights")
_MADE_BY = ("pretrain", "prune", "finetune", "eval", "export")


def export_last(run: Run) -> dict[str, Any]:
    """The finetuned model, else the pruned one, else the dense one: written, run and compared."""
    name = next((n for n in ("finetune", "prune") if run.other(n).done()), "")
    model = load_model(run.workdir / name / "model") if name else dense_model(run)
    c = run.config.export
    with renamed({key: f"config.export.{key}" for key in _KEYS}):
        files = export(
            model,
            run.stage.path,
            tuple(c.formats),
            tuple(c.dtypes),
            opset=c.opset,
            weights=c.weights,
            results=_results(run, name),
            say=run.stage.say,
        )
    return {"model": name or "dense", "files": files, "seconds": run.stage.seconds()}


def _results(run: Run, name: str) -> dict[str, Any]:
    """What the eval stage has measured of the model, if it was of this one, and the commands that made it."""
    records = {stage: run.other(stage).record() or {} for stage in _MADE_BY} | {"export": run.stage.record() or {}}
    commands = [record["command"] for record in records.values() if record.get("command")]
    found: dict[str, Any] = {"commands": list(dict.fromkeys(commands))}
    models = [r.get("inputs", {}) for r in (records["eval"], records["export"])]
    same = [{key: inputs.get(key) for key in ("model", "pretrain", "prune", "finetune")} for inputs in models]
    if records["eval"].get("status") != "done" or same[0] != same[1]:
        return found
    summary, metrics = read(run.workdir / "summary.json"), read(run.workdir / "eval" / "metrics.json")
    row = summary[{"finetune": "finetuned", "prune": "pruned", "": "dense"}[name]]
    keys = records["eval"]["keys"]
    found |= row | {"device": metrics["device"], "dtype": metrics["dtype"]}
    found["data"] = f"the {keys['eval.split']} split of {keys['data.name']}"
    return found | ({"dense": summary["dense"]} if name else {})
