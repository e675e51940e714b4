"""What the stages share: what one is handed, where it finds its inputs, what config sections mean to the library."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

import nvit_jax
from nvit_jax.api.recipe import Recipe
from nvit_jax.api.teachers import fit_teacher
from nvit_jax.data import datasets
from nvit_jax.data.augmentation import Augment
from nvit_jax.data.datasets import Dataset
from nvit_jax.errors import UserError, renamed
from nvit_jax.model.dims import ViTDims, preset
from nvit_jax.model.directory import Model, load_classifier, load_model
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.model.regnet import Teacher
from nvit_jax.parallel import sum_over_processes
from nvit_jax.run.config import STAGES
from nvit_jax.run.workdir import StageDir
from nvit_jax.training.losses import FEATURES, Objective


@dataclasses.dataclass
class Run:
    """What every stage is handed: its own directory, the sections of the config that it may read, the workdir."""

    config: ConfigDict
    stage: StageDir
    workdir: pathlib.Path

    def other(self, name: str) -> StageDir:
        """Another stage of the run."""
        return StageDir(self.workdir, name)


# --------------------------------------------------------------------------------------------- inputs


def dims_from_config(vit: ConfigDict) -> ViTDims:
    """The model that pretrain makes. UserError for widths that are missing."""
    values = {k: v for k, v in vit.items() if v is not None and k not in ("preset", "init_std", "position_std")}
    if vit.preset:
        return preset(vit.preset, **values)
    needed = ("image", "patch", "classes", "embed", "depth", "heads", "mlp")
    if missing := [k for k in needed if k not in values]:
        raise UserError(f"config.vit: set {', '.join(missing)}, or config.vit.preset")
    return ViTDims.uniform(**values)


def dense_dir(run: Run) -> pathlib.Path:
    """The model to prune: config.model, else what pretrain made."""
    if run.config.model:
        place = pathlib.Path(run.config.model)
        if place.is_file():
            raise UserError(
                f"config.model={place} is a file, not a directory; if it is a checkpoint, convert it first: "
                f"nvit-jax convert {place} MODEL_DIR, then --config.model=MODEL_DIR"
            )
        return place
    if not run.other("pretrain").done():
        raise UserError(
            f"{run.stage.name} needs a model and {run.workdir / 'pretrain'} holds no finished one: "
            "run --stage pretrain first, or set --config.model=MODEL_DIR"
        )
    return run.workdir / "pretrain" / "model"


def dense_model(run: Run) -> Model:
    """The model to prune. A masked one is made compact first, so that its masks need no further care."""
    return load_model(dense_dir(run)).compact()


def need(run: Run, name: str) -> StageDir:
    """A finished stage, or UserError."""
    stage = run.other(name)
    if not stage.done():
        raise UserError(f"{run.stage.name} needs {stage.path}: run --stage {name} first")
    return stage


def load_data(run: Run, dims: ViTDims, info: Mapping[str, Any] | None = None, *, fresh: bool = False) -> Dataset:
    """The configured source with the model's labels, preprocessed as a trained model's `info` says.

    `fresh`: the model is trained for these data, whatever classes it knew before.
    """
    facts = (info or {}).get("preprocessing")
    preprocessing = None if facts is None else Preprocessing.from_json(facts)
    if preprocessing is None and (run.config.data.name == "folder" or run.config.data.name.startswith("tfds:")):
        preprocessing = Preprocessing.imagenet(dims.image, dims.channels)
    where = run.config.data.to_dict()
    loading = datasets.Loading(
        where.pop("workers"), where.pop("threads"), where.pop("max_bad_fraction"), jax.process_count()
    )
    dataset = datasets.load_dataset(**where, loading=loading, preprocessing=preprocessing)
    names = (info or {}).get("classes") or ()
    dataset = datasets.for_model(dataset, dims.image, dims.channels, dims.classes, names, fresh=fresh)
    _check_overlap(run, dataset)
    for note in dataset.notes:
        run.stage.say(note)
    if preprocessing is None:
        return dataset
    return dataclasses.replace(dataset, preprocessing=preprocessing)


def _check_overlap(run: Run, dataset: Dataset) -> None:
    """UserError when what is evaluated with is what is trained with; a word about copies."""
    count = sum(len(split) for name, split in dataset.splits.items() if name != "train")
    if not dataset.overlap:
        return
    what = f"{dataset.overlap} of {count} evaluation images are training images, too"
    if dataset.overlap > dataset.copies:  # the same files; copies of some are found in good data, too
        raise UserError(
            f"config.data: {what}: accuracies would be too high; --config.data.holdout=0.5 instead of data.val "
            "separates them"
        )
    run.stage.say(f"warning: {what}: accuracies will be too high")


def count_bad(dataset: Dataset) -> int:
    """Images that could not be read, of all splits and processes."""
    return sum_over_processes(sum(len(split.bad) for split in dataset.splits.values()))


def model_info(dataset: Dataset, variant: str | None, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What model.json says beside the dims; `variant` is the preset the model comes from, if any."""
    return {
        "variant": variant,
        "preprocessing": dataset.preprocessing.to_json(),
        "classes": list(dataset.classes),
        "provenance": {"nvit_jax": nvit_jax.__version__} | dict(provenance),
    }


# ------------------------------------------------------------------------- sections, in the library's words


def keys_of(section: str) -> Any:
    """Context: errors of the library about the arguments that a section sets speak of its keys."""
    names = {
        field.name: f"config.{section}.{field.name}"
        for field in dataclasses.fields(Recipe)
        if field.name not in ("dtype", "matmul_precision", "parallel", "seed")
    }
    names |= {"batch / accumulate": f"config.{section}.batch / accumulate"}
    names |= {"label_weight": f"config.{section}.label_weight"}
    names |= {"evaluate_every": f"config.{section}.eval_every", "loss": f"config.{section}.score.loss"}
    names |= {key: f"config.{key}" for key in ("dtype", "matmul_precision", "parallel", "seed")}
    names |= {f"augment.{field.name}": f"config.augment.{field.name}" for field in dataclasses.fields(Augment)}
    names |= {"latency_table": "config.latency.table", "label_teacher": f"config.{section}.teacher"}
    return renamed(names)


def augment_of(config: ConfigDict) -> Augment:
    """config.augment."""
    return Augment(**config.augment.to_dict())


def teacher_of(config: ConfigDict, section: str, dims: ViTDims, preprocessing: Preprocessing) -> Teacher | None:
    """The classifier config.<section>.teacher, fitted to the student's images. UserError when it does not fit."""
    directory = config[section].teacher
    if not directory:
        return None
    if not dims.classes:
        raise UserError(
            f"config.{section}.teacher={directory}: a model without a classifier learns no labels; it learns the "
            "features of the unpruned model"
        )
    with renamed({"label_teacher": f"{section}.teacher={directory}"}):
        return fit_teacher(load_classifier(directory), dims, preprocessing)


def objective_of(config: ConfigDict, section: str, dims: ViTDims) -> Objective:
    """What pretrain, prune or finetune minimises. Without a classifier it is the distance of the features alone."""
    s = config[section]
    if not dims.classes:
        return FEATURES
    kl = {} if section == "pretrain" else {"kl_weight": s.kl_weight, "tau": s.tau}
    return Objective(
        label_weight=s.label_weight,
        smoothing=0.0 if section == "prune" else s.smoothing,
        teacher_alpha=s.teacher_alpha,
        teacher_tau=s.teacher_tau,
        kl_per_head=section == "finetune",
        **kl,
    )


def recipe_of(config: ConfigDict, section: str, objective: Objective, teacher: Teacher | None) -> Recipe:
    """What pretrain, prune and finetune say of a training."""
    s = config[section]
    values: dict[str, Any] = {key: s[key] for key in _SHARED}
    if section == "prune":
        values["evaluate_every"] = 0
    else:
        values |= {key: s[key] for key in _FULL} | {"evaluate_every": s.eval_every}
    return Recipe(
        objective=objective,
        label_teacher=teacher,
        augment=augment_of(config),
        dtype=config.dtype,
        matmul_precision=config.matmul_precision,
        parallel=config.parallel,
        sparsity=s.sparsity if section == "finetune" else None,
        seed=config.seed,
        stream=STAGES.index(section),
        **values,
    )


_SHARED = (
    "batch",
    "accumulate",
    "remat",
    "learning_rate",
    "weight_decay",
    "clip_norm",
    "drop_path",
    "log_every",
    "save_every",
)
_FULL = ("epochs", "learning_rate_batch", "warmup_epochs", "final_learning_rate", "dropout", "ema", "keep")
