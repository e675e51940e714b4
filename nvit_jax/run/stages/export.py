"""export: the last model of the run in the formats of other places."""

from typing import Any

from nvit_jax.api.export import export
from nvit_jax.errors import renamed
from nvit_jax.model.directory import load_model
from nvit_jax.run.stages.common import Run, dense_model


def export_last(run: Run) -> dict[str, Any]:
    """The finetuned model, else the pruned one, else the dense one: written, run and compared."""
    name = next((n for n in ("finetune", "prune") if run.other(n).done()), "")
    model = load_model(run.workdir / name / "model") if name else dense_model(run)
    c = run.config.export
    with renamed({"formats": "config.export.formats", "dtypes": "config.export.dtypes"}):
        files = export(model, run.stage.path, tuple(c.formats), tuple(c.dtypes), say=run.stage.say)
    return {"model": name or "dense", "files": files, "seconds": run.stage.seconds()}
