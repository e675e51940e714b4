"""The stages of a run: each reads what earlier ones left in the workdir, does its work once, and writes its files."""

import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

import nvit_jax
from nvit_jax.errors import UserError
from nvit_jax.files import fingerprint, read_json, write_json
from nvit_jax.latency.timing import device_name
from nvit_jax.parallel import any_process, is_main, main_decides
from nvit_jax.run.config import flatten_config
from nvit_jax.run.stages import export, measure, preview, prune, train
from nvit_jax.run.stages.common import Run
from nvit_jax.run.workdir import STOP, StageDir, check_workdir, locked
from nvit_jax.training.distill import Stopped

_COMMON = ("seed", "model", "data", "parallel", "dtype", "matmul_precision")
SECTIONS = {  # the config sections that a stage is handed, and so the keys that it is redone for
    "pretrain": ("seed", "data", "augment", "parallel", "dtype", "matmul_precision", "vit", "pretrain"),
    "latency": ("model", "dtype", "latency", "prune.profile"),
    "prune": (*_COMMON, "augment", "prune", "latency"),
    "finetune": (*_COMMON, "augment", "finetune"),
    "eval": ("model", "data", "parallel", "dtype", "latency", "eval"),
    "export": ("model", "export"),
    "report": (),
    "preview": ("seed", "model", "data", "augment", "vit"),
}

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
TEACHERS = ("pretrain.teacher", "prune.teacher", "finetune.teacher")
_INPUTS = {  # the stages whose results a stage reads where they exist
    "pretrain": (),
    "latency": ("pretrain",),
    "prune": ("pretrain", "latency"),
    "finetune": ("pretrain", "prune"),
    "eval": ("pretrain", "prune", "finetune"),
    "export": ("pretrain", "prune", "finetune"),
    "report": ("pretrain", "latency", "prune", "finetune", "eval"),
    "preview": ("pretrain",),
}


# ---------------------------------------------------------------------------------------------------- run


def run_stages(config: ConfigDict, workdir: pathlib.Path, names: tuple[str, ...], *, force: bool = False) -> None:
    """Run stages in order. A finished one says so and is left alone; see StageDir.begin."""
    for name in names:
        if name not in FUNCTIONS:
            raise UserError(f"unknown stage {name!r}; there are {', '.join(FUNCTIONS)}")
    main_decides(lambda: check_workdir(workdir))
    with locked(workdir):
        _run_all(config, workdir, names, force=force)


def _run_all(config: ConfigDict, workdir: pathlib.Path, names: tuple[str, ...], *, force: bool) -> None:
    for name in names:
        if any_process(STOP.received):
            raise Stopped(f"stopped before {name}")
        if name == "pretrain" and config.model and len(names) > 1:
            continue  # the model to prune is given
        if name == "latency" and (config.latency.table or config.latency.roofline.tflops) and len(names) > 1:
            continue  # so is the table, or the estimate
        _run_stage(config, workdir, name, force=force)
        if name == "eval":
            for criterion in config.compare:
                _compare(config, workdir, criterion, force=force and names != ("eval",))


def _run_stage(config: ConfigDict, workdir: pathlib.Path, name: str, *, force: bool) -> None:
    stage = StageDir(workdir, name)
    handed = _sections(config, SECTIONS[name])
    directories = {other: StageDir(workdir, other) for other in _INPUTS[name]}
    if name == "report":
        directories |= {f"compare/{c}": StageDir(workdir / "compare" / c, "eval") for c in config.compare}
    inputs = {other: directory.id() for other, directory in directories.items() if directory.done()}
    # What the user gives stands for its content; folders of images are too large to be read for that.
    for key in ("model", "data.path", "pretrain.start", "latency.table", *TEACHERS):
        value = flatten_config(handed).get(key)
        if value and pathlib.Path(value).exists() and (key != "data.path" or pathlib.Path(value).is_file()):
            inputs[key] = fingerprint(pathlib.Path(value))
    if not main_decides(lambda: stage.begin(flatten_config(handed), inputs, force=force)):
        stage.say("finished before; --force redoes it")
        return
    _write_config(config, handed, workdir)
    stage.finish(FUNCTIONS[name](Run(handed, stage, workdir)))


def _compare(config: ConfigDict, workdir: pathlib.Path, criterion: str, *, force: bool) -> None:
    """The same pruning, finetuning and evaluation by another criterion, under compare/<criterion>/."""
    other = config.copy_and_resolve_references()
    other.compare = ()
    other.prune.criterion = criterion
    other.prune.score.from_training = config.prune.score.from_training and criterion == "taylor"
    place = workdir / "compare" / criterion
    main_decides(lambda: check_workdir(place))
    for shared in ("pretrain", "latency"):  # the same dense model, the same predictions
        if is_main() and (workdir / shared).exists() and not (place / shared).exists():
            (place / shared).symlink_to(pathlib.Path("..", "..", shared), target_is_directory=True)
    names = tuple(s for s in ("prune", "finetune", "eval") if s in config.stages)
    run_stages(other, place, names, force=force)


def _sections(config: ConfigDict, names: tuple[str, ...]) -> ConfigDict:
    out = ConfigDict()
    for name in names:
        node, source = out, config
        *parents, last = name.split(".")
        for parent in parents:
            source = source[parent]
            if parent not in node:
                node[parent] = ConfigDict()
            node = node[parent]
        node[last] = source[last]
    return out


def _write_config(config: ConfigDict, handed: ConfigDict, workdir: pathlib.Path) -> None:
    """config.json: every key as the stage that read it last was run with."""
    path = workdir / "config.json"
    resolved = flatten_config(config)
    if path.exists():
        resolved = resolved | read_json(path)["config"] | flatten_config(handed)
    versions = {"python": platform.python_version(), "jax": jax.__version__, "nvit_jax": nvit_jax.__version__}
    write_json(path, {"config": resolved, "versions": versions, "device": device_name()})
