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
from nvit_jax.data import datasets
from nvit_jax.data.augment import RandAugment, TrainCrop
from nvit_jax.data.mixing import Mixing, prepare
from nvit_jax.data.pipeline import Stream, eval_batches, train_stream
from nvit_jax.errors import UserError
from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims, preset
from nvit_jax.model.directory import Model, load_classifier, load_model
from nvit_jax.model.regnet import Teacher
from nvit_jax.parallel import Parallel, sum_over_processes
from nvit_jax.pruning.reshape import reshape
from nvit_jax.run.workdir import StageDir
from nvit_jax.training.evaluate import evaluate, make_eval_step


@dataclasses.dataclass
class Run:
    """What every stage is handed: its own directory, the sections of the config that it may read, the workdir."""

    config: ConfigDict
    stage: StageDir
    workdir: pathlib.Path

    def other(self, name: str) -> StageDir:
        return StageDir(self.workdir, name)


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


def load_data(run: Run, dims: ViTDims, info: Mapping[str, Any] | None = None) -> datasets.Dataset:
    """The configured source, checked against the model; preprocessed as a trained model's `info` says."""
    facts = (info or {}).get("preprocessing")
    preprocessing = None if facts is None else datasets.Preprocessing.from_json(facts)
    if preprocessing is None and (run.config.data.name == "folder" or run.config.data.name.startswith("tfds:")):
        preprocessing = datasets.Preprocessing.imagenet(dims.image)
    where = run.config.data.to_dict()
    loading = datasets.Loading(
        where.pop("workers"), where.pop("threads"), where.pop("max_bad_fraction"), jax.process_count()
    )
    dataset = datasets.load_dataset(**where, loading=loading, preprocessing=preprocessing)
    datasets.check_fits(dataset, dims.image, dims.channels, dims.classes)
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
    dataset: datasets.Dataset,
    split: str,
    parallel: Parallel,
    batch: int,
    dtype: Any,
    count: int | None = None,
    advance: Callable[[int], None] = lambda images: None,
    report: Callable[[str], None] | None = None,
) -> Callable[[Any, Any], dict[str, Any]]:
    """(params, masks) -> top1, top5, loss, images on one split, or on `count` images of it.

    `advance` is told how many images are done, `report` which could not be read.
    """
    chosen, pre = dataset.split(split).some(count), dataset.preprocessing
    batch = -(-min(batch, len(chosen)) // len(parallel.devices)) * len(parallel.devices)
    step = make_eval_step(lambda s, images: vit.forward(dims, s[0], pre(images), s[1], dtype=dtype), parallel)

    def run(params: Any, masks: Any) -> dict[str, Any]:
        batches = eval_batches(chosen, batch, parallel.local_rows(batch), report)
        return evaluate(step, (params, masks), batches, advance)

    return run


def count_bad(dataset: datasets.Dataset) -> int:
    """Images that could not be read, of all splits and processes."""
    return sum_over_processes(sum(len(split.bad) for split in dataset.splits.values()))


def cost(stage: StageDir, seconds: float, images: int) -> dict[str, Any]:
    """For metrics.json: what a training loop of this process took, evaluations included."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "loop_seconds": seconds,
        "images_per_second": images / max(seconds, 1e-9),
        "input_wait": stage.input_wait / max(seconds, 1e-9),  # the part in which the device had no images
        "peak_memory_bytes": stats.get("peak_bytes_in_use"),  # of the first device, None where it does not tell
    }


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """config.augment for one data set: what workers do to an image, and what the device does to a batch."""

    pixels: TrainCrop | None
    mixing: Mixing
    repeats: int
    pre: datasets.Preprocessing
    parallel: Parallel

    def stream(self, split: datasets.Split, batch: int, seed: tuple[int, ...], report: Callable[[str], None]) -> Stream:
        """Training batches of this process."""
        rows = self.parallel.local_rows(batch)
        stream = train_stream(split, batch, seed, rows, pixels=self.pixels, repeats=self.repeats)
        stream.report = report
        return stream

    def compile(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A training step, for raw images."""
        p = self.parallel
        seen = self.mixing.shards // len(p.devices) if p.backend == "pmap" else None
        return p.compile(prepare(self.pre, step, self.mixing, seen), trains=True)

    def compile_plain(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A step on images as evaluated, for raw images."""
        return self.parallel.compile(prepare(self.pre, step))


def augmentation(run: Run, dataset: datasets.Dataset, parallel: Parallel) -> Augmentation:
    """UserError for images that cannot be augmented and shards that pmap's devices cannot keep."""
    a, pre = run.config.augment, dataset.preprocessing
    mixing = Mixing(a.mixup, a.cutmix, a.switch, a.erasing, a.mixup_shards)
    if parallel.backend == "pmap" and (a.mixup or a.cutmix) and a.mixup_shards % len(parallel.devices):
        raise UserError(
            f"config.augment.mixup_shards={a.mixup_shards}: pmap mixes within devices; set a multiple of "
            f"{len(parallel.devices)}"
        )
    if a.crop is None:
        return Augmentation(None, mixing, a.repeats, pre, parallel)
    if pre.scale != 255:
        raise UserError(f"config.augment.crop={a.crop}: images of 0..255 are needed, these are 0..{pre.scale:g}")
    pixels = TrainCrop(
        size=pre.size,
        channels=len(pre.mean),
        fill=tuple(round(255 * m) for m in pre.mean),
        scale=(a.crop, 1.0),
        flip=a.flip,
        rand_augment=RandAugment.parse(a.rand_augment) if a.rand_augment else None,
        jitter=a.color_jitter,
        fast=a.fast_decode,
    )
    return Augmentation(pixels, mixing, a.repeats, pre, parallel)


def model_info(dataset: datasets.Dataset, variant: str | None, provenance: Mapping[str, Any]) -> dict[str, Any]:
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


def read_teacher(directory: str, key: str, dims: ViTDims, preprocessing: datasets.Preprocessing) -> Teacher:
    """Read a classifier and fit it to the student's images. UserError when its classes or sizes are others."""
    model = load_classifier(directory)
    if model.dims.classes != dims.classes or model.dims.channels != dims.channels:
        raise UserError(
            f"{key}={directory} tells {model.dims.classes} classes on {model.dims.channels} channels, "
            f"the model {dims.classes} on {dims.channels}"
        )
    if isinstance(model.dims, ViTDims) and model.dims.image != dims.image:
        raise UserError(f"{key}={directory} reads images of {model.dims.image} pixels, not {dims.image}")
    own = datasets.Preprocessing.from_json(model.info.get("preprocessing", {}))
    # (x / scale_t - mean_t) / std_t, with x / scale = student * std + mean
    ratio = preprocessing.scale / own.scale
    std, mean = np.array(preprocessing.std, np.float32), np.array(preprocessing.mean, np.float32)
    factor = ratio * std / np.array(own.std, np.float32)
    offset = (ratio * mean - np.array(own.mean, np.float32)) / np.array(own.std, np.float32)
    return _Renormalised(model, factor.astype(np.float32), offset.astype(np.float32))
