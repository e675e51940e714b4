"""pretrain and finetune: one training run from a config section, resumed from its saved state."""

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from nvit_jax.data import datasets
from nvit_jax.data.pipeline import Stream
from nvit_jax.errors import UserError
from nvit_jax.files import read_json, recover
from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims, count_macs, count_params
from nvit_jax.model.directory import Model, load_model, save_model
from nvit_jax.model.groups import Params
from nvit_jax.parallel import Parallel, fetch, wait_for_all
from nvit_jax.pruning import sparsity
from nvit_jax.run.config import STAGES
from nvit_jax.run.stages.common import (
    Run,
    augmentation,
    compute_dtype,
    cost,
    count_bad,
    dense_model,
    dims_from_config,
    evaluator,
    load_data,
    matmul_precision,
    model_info,
    need,
    read_teacher,
)
from nvit_jax.training import distill, optim
from nvit_jax.training.losses import Objective

_SCORE_BATCHES = 64  # of finetune.sparsity="gradient", and at most one pass over the train split


class _Training:
    """What a config section says of a training run: objective, batches, schedule, and the compiled step."""

    def __init__(
        self, run: Run, section: ConfigDict, dims: ViTDims, dataset: datasets.Dataset, teacher: Model | None, **kl: Any
    ) -> None:
        """`teacher` is the unpruned model, `kl` what the objective says of it."""
        self.run, self.section, self.dims, self.teacher = run, section, dims, teacher
        self.objective = Objective(
            label_weight=section.label_weight,
            smoothing=section.smoothing,
            teacher_alpha=section.teacher_alpha,
            teacher_tau=section.teacher_tau,
            **kl,
        )
        self.label_teacher = None
        if section.teacher:
            key = f"{run.stage.name}.teacher"
            self.label_teacher = read_teacher(section.teacher, key, dims, dataset.preprocessing)
        self.parallel = Parallel.create(run.config.parallel)
        self.parallel.check_batch(section.batch // section.accumulate, f"config.{run.stage.name}.batch / accumulate")
        self._augment, self._split = augmentation(run, dataset, self.parallel), dataset.split("train")
        self.per_epoch = len(self._split) // section.batch
        self.steps = round(section.epochs * self.per_epoch)
        warmup = round(section.warmup_epochs * self.per_epoch)
        rate = section.learning_rate * section.batch / (section.learning_rate_batch or section.batch)
        self.schedule = optim.schedule(rate, self.steps, warmup, section.final_learning_rate)
        self.adamw = optim.adamw(self.schedule, weight_decay=section.weight_decay, clip_norm=section.clip_norm)

    def stream(self, *more: int) -> Stream:
        """Its batches; with `more` in the seed, others."""
        seed = (self.run.config.seed, STAGES.index(self.run.stage.name), *more)
        return self._augment.stream(self._split, self.section.batch, seed, self.run.stage.warn)

    def compiled(self, optimizer: optax.GradientTransformation, **regularisation: float) -> distill.StepFn:
        """(state on the devices, host batch) -> (state, metrics)."""
        dtype, parallel, teachers = compute_dtype(self.run.config), self.parallel, (self.teacher, self.label_teacher)
        step = self._augment.compile(
            distill.make_train_step(
                self.dims,
                optimizer,
                self.objective,
                teacher_dims=self.teacher.dims if self.teacher else None,
                label_teacher=functools.partial(self.label_teacher.logits, dtype=dtype) if self.label_teacher else None,
                dtype=dtype,
                accumulate=self.section.accumulate,
                remat=self.section.remat,
                **regularisation,
            )
        )
        placed = [None if teacher is None else parallel.place(teacher.params) for teacher in teachers]
        return lambda state, batch: step(distill.Inputs(state, *placed), parallel.shard(batch))

    def squared_gradients(self, params: Params) -> Params:
        """Mean over batches of (dl/dw)^2."""
        optimizer, batches = sparsity.sum_of_squares(), min(_SCORE_BATCHES, self.per_epoch)
        state = self.parallel.place(distill.new_state(params, optimizer, self.run.config.seed))
        step = self.compiled(optimizer)
        with matmul_precision(self.run.config), contextlib.closing(self.stream(1)) as batch:
            for number in range(batches):
                state, _ = step(state, batch(number))
        return jax.tree.map(lambda s: s / batches, fetch(state.opt_state))

    def begin(self, params: Params, masks: Params | None) -> tuple[optax.GradientTransformation, distill.TrainState]:
        """The optimizer and the state before the first step; 2:4 masks are kept by the optimizer."""
        optimizer, start = self.adamw, params
        if masks is not None:
            optimizer, start = sparsity.held(self.adamw, masks), sparsity.apply(params, masks)
        return optimizer, distill.new_state(start, optimizer, self.run.config.seed, ema=self.section.ema > 0)


def _begin_or_resume(
    training: _Training, params: Params, sparse: str | None, val: Callable[[Any, Any], dict[str, Any]]
) -> tuple[optax.GradientTransformation, distill.TrainState]:
    """The optimizer and the newest saved state, on the host, or the one before the first step."""
    stage = training.run.stage
    # By magnitude; a saved state brings masks of its own, and these say what shapes they have.
    optimizer, state = training.begin(params, sparsity.find_masks(params) if sparse else None)
    if (found := stage.saver.restore(state, stage.say)) is not None:
        state = distill.TrainState(*found[1])
        stage.say(f"resumes at step {found[0]}")
    elif sparse:
        if sparse == "gradient":
            masks = sparsity.find_masks(params, training.squared_gradients(params))
            optimizer, state = training.begin(params, masks)
        top1 = val(training.parallel.place(state.params), None)["top1"]
        stage.say(
            f"{sparsity.PATTERN} by {sparse}: {sparsity.count_nonzero(state.params):,} of "
            f"{count_params(training.dims):,} parameters stay, val top-1 {top1:.1%} before training"
        )
    return optimizer, state


def _fit_stage(
    training: _Training, params: Any, dataset: datasets.Dataset, sparse: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Train `params`, resuming from a saved state. Returns the parameters and metrics.

    `sparse` is the score by which 2:4 masks are chosen before the first step; they are kept through all of them.
    """
    section, parallel = training.section, training.parallel
    config, stage = training.run.config, training.run.stage
    val = evaluator(
        training.dims, dataset, "val", parallel, section.batch * 4, compute_dtype(config), report=stage.warn
    )
    optimizer, state = _begin_or_resume(training, params, sparse, val)
    first = int(state.step)
    stage.cut_back("log.jsonl", first, lambda line: line["step"] <= first)
    best = _Best(stage.path / "best", training.dims) if section.keep == "best" else None

    def check(state: distill.TrainState) -> dict[str, Any]:
        found = val(_trained(state), None)
        if best:
            best.offer(found["top1"], int(state.step), _trained(state))
        return found

    began = time.monotonic()
    with (
        matmul_precision(config),
        stage.progress(training.steps, first),
        contextlib.closing(training.stream()) as stream,
    ):
        state = distill.fit(
            parallel.place(state),
            training.compiled(optimizer, drop_path=section.drop_path, dropout=section.dropout, ema_decay=section.ema),
            stream,
            training.steps,
            stage,
            log_every=section.log_every,
            save_every=section.save_every,
            evaluate=check,
            eval_every=section.eval_every,
            learning_rate=training.schedule,
        )
    seconds = time.monotonic() - began
    trained, step = best.read() if best else (fetch(_trained(state)), training.steps)
    return trained, {
        "steps": training.steps,
        "step": step,  # after which the model is taken
        "val_top1": val(parallel.place(trained), None)["top1"],
        "bad_images": count_bad(dataset),
        "matmul_precision": config.matmul_precision,
        **cost(stage, seconds, (training.steps - first) * section.batch),
    }


class _Best:
    """The evaluated model with the highest val top-1 of a training, the earliest of equals, in STAGE/best/.

    It outlives a kill. A later model that a killed run has left there comes again when the run is resumed.
    """

    def __init__(self, place: pathlib.Path, dims: ViTDims) -> None:
        self._place, self._dims, self.top1 = place, dims, -1.0
        recover(place)
        wait_for_all(f"recover {place}")
        if place.is_dir():
            self.top1 = read_json(place / "model.json")["provenance"]["val_top1"]

    def offer(self, top1: float, step: int, params: Params) -> None:
        """Keep it if it is better."""
        if top1 > self.top1:
            facts = {"provenance": {"val_top1": top1, "step": step}}
            save_model(self._place, Model(self._dims, fetch(params), info=facts))
            self.top1 = top1

    def read(self) -> tuple[Params, int]:
        """(parameters, step)."""
        model = load_model(self._place)
        return model.params, model.info["provenance"]["step"]


def _say(run: Run, metrics: dict[str, Any]) -> None:
    waited = f", {metrics['input_wait']:.0%} of it waiting for images" if metrics["input_wait"] >= 0.05 else ""
    run.stage.say(f"{metrics['steps']} steps, val top-1 {metrics['val_top1']:.1%}, {run.stage.seconds():.0f} s{waited}")


def _trained(state: distill.TrainState) -> Any:
    return state.params if state.average is None else state.average


def pretrain(run: Run) -> dict[str, Any]:
    """Train a dense ViT with labels, from random weights or from another model's."""
    c, s = run.config, run.config.pretrain
    if s.start:
        given = load_model(s.start)
        if given.masks is not None or not given.dims.classes:
            raise UserError(f"config.pretrain.start={s.start} must be a model without masks and with a classifier")
        dims, params, dataset = given.dims, given.params, load_data(run, given.dims, given.info)
    else:
        dims = dims_from_config(c.vit)
        dataset = load_data(run, dims)
        params = vit.init(dims, jax.random.key(c.seed), std=c.vit.init_std, position_std=c.vit.position_std)
    trained, metrics = _fit_stage(_Training(run, s, dims, dataset, None), params, dataset)
    variant, facts = c.vit.preset, {"stage": "pretrain", "seed": c.seed}
    if s.start:
        variant, facts = given.info.get("variant"), facts | {"from": s.start}
    info = model_info(dataset, variant, facts)
    save_model(run.stage.path / "model", Model(dims, trained, info=info))
    _say(run, metrics)
    return metrics | {"dims": dims.to_json(), "params": count_params(dims), "macs": count_macs(dims)}


def finetune(run: Run) -> dict[str, Any]:
    """Train the compact model with labels and the unpruned model's logits."""
    c, s = run.config, run.config.finetune
    place = need(run, "prune").path
    pruned = load_model(place / "model" if s.snapshot is None else place / "snapshots" / str(s.snapshot) / "model")
    dataset = load_data(run, pruned.dims, pruned.info)
    teacher = dense_model(run) if s.kl_weight else None
    params = pruned.params
    if s.from_scratch:
        params = vit.init(pruned.dims, jax.random.key(c.seed), std=s.init_std, position_std=s.position_std)
    kl = {"kl_weight": s.kl_weight, "tau": s.tau, "kl_per_head": True}
    training = _Training(run, s, pruned.dims, dataset, teacher, **kl)
    trained, metrics = _fit_stage(training, params, dataset, s.sparsity)
    info = pruned.info | {"provenance": pruned.info["provenance"] | {"stage": "finetune", "steps": metrics["steps"]}}
    if s.sparsity:
        sparsity.check(sparsity.matrices(trained))
        info["sparsity"] = sparsity.PATTERN
        metrics["nonzero_params"] = sparsity.count_nonzero(trained)
    save_model(run.stage.path / "model", Model(pruned.dims, trained, info=info))
    _say(run, metrics)
    return metrics | {"dims": pruned.dims.to_json()}
