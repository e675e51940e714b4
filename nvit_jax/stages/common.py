"""What the stages share: what one is handed, where it finds its inputs, and the section-driven training loop."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import nvit_jax
from nvit_jax import data, models
from nvit_jax.api import Model, load_classifier, load_model
from nvit_jax.dims import ViTDims
from nvit_jax.errors import UserError
from nvit_jax.evaluate import evaluate, make_eval_step
from nvit_jax.parallel import Parallel
from nvit_jax.reshape import reshape
from nvit_jax.teachers import Teacher
from nvit_jax.workdir import StageDir


@dataclasses.dataclass
class Run:
    """What every stage is handed: its own directory, the sections of the config that it may read, the workdir."""

    config: ConfigDict
    stage: StageDir
    workdir: pathlib.Path

    def other(self, name: str) -> StageDir:
        return StageDir(self.workdir, name)


def dense_dir(run: Run) -> pathlib.Path:
    """The model to prune: config.model, else what pretrain made."""
    if run.config.model:
        return pathlib.Path(run.config.model)
    if not run.other("pretrain").done():
        raise UserError(
            f"{run.stage.name} needs a model and {run.workdir / 'pretrain'} holds no finished one: "
            "run --stage pretrain first, or set --config.model=MODEL_DIR"
        )
    return run.workdir / "pretrain" / "model"


def dense_model(run: Run) -> Model:
    """The model to prune. A masked one is made compact first, so that its masks need no further care."""
    model = load_model(dense_dir(run))
    if not model.dims.classes:
        raise UserError(f"{dense_dir(run)} has no classifier; convert it with --classes N and train it")
    if model.masks is None:
        return model
    dims, params = reshape(model.params, model.masks, model.dims)
    return Model(dims, params, info=model.info)


def need(run: Run, name: str) -> StageDir:
    """A finished stage, or UserError."""
    stage = run.other(name)
    if not stage.done():
        raise UserError(f"{run.stage.name} needs {stage.path}: run --stage {name} first")
    return stage


def load_data(run: Run, dims: ViTDims, info: Mapping[str, Any] | None = None) -> data.Dataset:
    """The configured source, checked against the model; preprocessed as a trained model's `info` says."""
    facts = (info or {}).get("preprocessing")
    preprocessing = None if facts is None else data.Preprocessing.from_json(facts)
    if preprocessing is None and run.config.data.name == "folder":
        preprocessing = data.Preprocessing.imagenet(dims.image)
    dataset = data.load_dataset(**run.config.data.to_dict(), preprocessing=preprocessing)
    data.check_fits(dataset, dims.image, dims.channels, dims.classes)
    if dataset.overlap:
        run.stage.say(
            f"warning: {dataset.overlap} of {len(dataset.split('val'))} evaluation images are calibration images, too: "
            "accuracies will be too high; --config.data.holdout=0.5 separates them"
        )
    if preprocessing is None:
        return dataset
    return dataclasses.replace(dataset, preprocessing=preprocessing)


def compute_dtype(config: ConfigDict) -> Any:
    """Of training and evaluation."""
    return jnp.dtype(config.dtype)


def evaluator(
    dims: ViTDims,
    dataset: data.Dataset,
    split: str,
    parallel: Parallel,
    batch: int,
    dtype: Any,
    count: int | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> Callable[[Any, Any], dict[str, Any]]:
    """(params, masks) -> top1, top5, loss, images on one split, or on `count` images of it.

    `advance` is told how many images are done.
    """
    chosen = data.some(dataset.split(split), count)
    batch = -(-min(batch, len(chosen)) // len(parallel.devices)) * len(parallel.devices)
    step = make_eval_step(lambda s, images: models.forward(dims, s[0], images, s[1], dtype=dtype), parallel)

    def run(params: Any, masks: Any) -> dict[str, Any]:
        rows = parallel.local_rows(batch)
        batches = data.eval_batches(chosen, dataset.preprocessing, batch, rows)
        return evaluate(step, (params, masks), batches, advance)

    return run


def model_info(dataset: data.Dataset, variant: str | None, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What model.json says beside the dims; `variant` is the preset the model comes from, if any."""
    return {
        "variant": variant,
        "preprocessing": dataset.preprocessing.to_json(),
        "classes": list(dataset.classes),
        "provenance": {"nvit_jax": nvit_jax.__version__} | dict(provenance),
    }


def matmul_precision(config: ConfigDict) -> Any:
    """Context of training; saliency has its own."""
    return jax.default_matmul_precision(config.matmul_precision)


@dataclasses.dataclass(frozen=True)
class _Renormalised:
    """A teacher that expects its own mean and std, on images normalised with the student's."""

    teacher: Teacher
    factor: np.ndarray
    offset: np.ndarray

    @property
    def params(self) -> Any:
        return self.teacher.params

    def logits(self, params: Any, images: jax.Array, dtype: Any = None) -> jax.Array:
        return self.teacher.logits(params, images * self.factor + self.offset, dtype)


def read_teacher(directory: str, key: str, dims: ViTDims, preprocessing: data.Preprocessing) -> Teacher:
    """Read a classifier and fit it to the student's images. UserError when its classes or sizes are others."""
    model = load_classifier(directory)
    if model.dims.classes != dims.classes or model.dims.channels != dims.channels:
        raise UserError(
            f"{key}={directory} tells {model.dims.classes} classes on {model.dims.channels} channels, "
            f"the model {dims.classes} on {dims.channels}"
        )
    if isinstance(model.dims, ViTDims) and model.dims.image != dims.image:
        raise UserError(f"{key}={directory} reads images of {model.dims.image} pixels, not {dims.image}")
    own = data.Preprocessing.from_json(model.info["preprocessing"])
    # (x / scale_t - mean_t) / std_t, with x / scale = student * std + mean
    ratio = preprocessing.scale / own.scale
    std, mean = np.array(preprocessing.std, np.float32), np.array(preprocessing.mean, np.float32)
    factor = ratio * std / np.array(own.std, np.float32)
    offset = (ratio * mean - np.array(own.mean, np.float32)) / np.array(own.std, np.float32)
    return _Renormalised(model, factor.astype(np.float32), offset.astype(np.float32))
