"""Runs the steps of a command: everything is checked first, then each stage begins, works and finishes."""

import contextlib
import pathlib
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

import nvit_jax
from nvit_jax.files import write_json
from nvit_jax.latency.timing import device_name
from nvit_jax.parallel import any_process, is_main, main_decides
from nvit_jax.run import reads
from nvit_jax.run.agenda import Step, agenda
from nvit_jax.run.checks import check_run
from nvit_jax.run.config import flatten_config
from nvit_jax.run.records import read
from nvit_jax.run.stages import export, measure, preview, prune, train
from nvit_jax.run.stages.common import Run
from nvit_jax.run.workdir import STOP, StageDir, check_workdir, locked, recover
from nvit_jax.training.distill import Stopped

FUNCTIONS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "pretrain": train.pretrain,
    "latency": measure.measure_latency,
    "prune": prune.prune_model,
    "finetune": train.finetune,
    "eval": measure.evaluate_models,
    "export": export.export_last,
    "report": measure.make_report,
    "preview": preview.preview_augmentation,
}


def run_stages(
    config: ConfigDict, workdir: pathlib.Path, names: tuple[str, ...], *, force: bool = False, command: str = ""
) -> None:
    """Run stages in order, then comparisons. A finished stage says so and is left alone; see StageDir.judge.

    `command` is what the user has typed; a stage that works keeps it in its record.

    UserError for everything that config and files can tell, before the first stage begins.
    """
    steps = agenda(config, workdir, names, force=force)
    main_decides(lambda: check_workdir(workdir))
    with locked(workdir):
        main_decides(lambda: recover({step.workdir for step in steps}))
        check_run(steps)
        _say_what_comes(steps)
        for step in steps:
            if any_process(STOP.received):
                raise Stopped(f"stopped before {step.name}")
            with _shared(step):
                _run_stage(step, command)
    _say_what_is_next(steps)


def _say_what_comes(steps: Sequence[Step]) -> None:
    """The first line: until the first program is compiled there is no other."""
    if is_main():
        names = ", ".join(step.name for step in steps if not step.compared)
        print(f"{steps[0].home}: {names}; on {device_name()}", flush=True)


def _say_what_is_next(steps: Sequence[Step]) -> None:
    """A model that was made alone is in no table yet."""
    last = steps[-1]
    if last.name in ("pretrain", "prune", "finetune") and "eval" not in [step.name for step in steps]:
        StageDir(last.workdir, last.name).say(
            "summary.json and report.html do not have this model yet: --stage eval adds it, then --stage report"
        )


@contextlib.contextmanager
def _shared(step: Step) -> Iterator[None]:
    """A comparison's own workdir, with what it has in common with the run."""
    if not step.compared:
        yield
        return
    main_decides(lambda: check_workdir(step.workdir))
    with locked(step.workdir):
        if is_main():
            step.share()
        yield


def _id(workdir: pathlib.Path, name: str) -> str | None:
    stage = StageDir(workdir, name)
    return stage.id() if stage.done() else None


def _run_stage(step: Step, command: str) -> None:
    stage, handed = StageDir(step.workdir, step.name), reads.handed(step.config, step.name)
    keys = flatten_config(handed)
    inputs = step.ids(_id) | reads.contents(keys) if is_main() else {}
    if not stage.begin(keys, inputs, force=step.force, command=command):
        stage.say("finished before; --force redoes it")
        return
    anew = stage.path != stage.place
    if not anew:
        _write_config(step, handed)
    stage.trace(keys.get("profile", 0))
    stage.finish(FUNCTIONS[step.name](Run(handed, stage, step.workdir)))
    if anew:  # until then it speaks of the stage that is there
        _write_config(step, handed)


def _write_config(step: Step, handed: ConfigDict) -> None:
    """config.json: every key as the stage that read it last was run with."""
    path = step.workdir / "config.json"
    resolved = flatten_config(step.config)
    if path.exists():
        resolved = resolved | read(path)["config"] | flatten_config(handed)
    versions = {"python": platform.python_version(), "jax": jax.__version__, "nvit_jax": nvit_jax.__version__}
    write_json(path, {"config": resolved, "versions": versions, "device": device_name()})
