"""pretrain and finetune: one training run from a config section, resumed from its saved state."""

import contextlib
import functools
import pathlib
import time
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from nvit_jax import data, distill, models, optim, sparsity
from nvit_jax.api import Model, load_model, save_model
from nvit_jax.checkpoint import read_json, recover
from nvit_jax.config import STAGES
from nvit_jax.dims import ViTDims, count_macs, count_params
from nvit_jax.errors import UserError
from nvit_jax.groups import Params
from nvit_jax.losses import Objective
from nvit_jax.parallel import Parallel, fetch
from nvit_jax.stages.common import (
    Run,
    augmentation,
    compute_dtype,
    dense_model,
    dims_from_config,
    evaluator,
    load_data,
    matmul_precision,
    model_info,
    need,
    read_teacher,
)

_SCORE_BATCHES = 64  # of finetune.sparsity="gradient", and at most one pass over the train split


def _fit_stage(
    run: Run,
    section: ConfigDict,
    dims: ViTDims,
    params: Any,
    dataset: data.Dataset,
    teacher: Model | None = None,
    sparse: str | None = None,
    **kl: Any,
) -> tuple[Any, dict[str, Any]]:
    """Train `params` by one config section, resuming from a saved state. Returns the parameters and metrics.

    `teacher` is the unpruned model, `kl` what the objective says of it.
    `sparse` is the score by which 2:4 masks are chosen before the first step; they are kept through all of them.
    """
    config, stage = run.config, run.stage
    objective = Objective(
        label_weight=section.label_weight,
        smoothing=section.smoothing,
        teacher_alpha=section.teacher_alpha,
        teacher_tau=section.teacher_tau,
        **kl,
    )
    label_teacher = None
    if section.teacher:
        label_teacher = read_teacher(section.teacher, f"{stage.name}.teacher", dims, dataset.preprocessing)
    parallel = Parallel.create(config.parallel)
    parallel.check_batch(section.batch // section.accumulate, f"config.{stage.name}.batch / accumulate")
    augment, split = augmentation(run, dataset, parallel), dataset.split("train")
    seed = (config.seed, STAGES.index(stage.name))
    stream = augment.stream(split, section.batch, seed, stage.say)
    per_epoch = len(split) // section.batch
    steps, warmup = round(section.epochs * per_epoch), round(section.warmup_epochs * per_epoch)
    rate = section.learning_rate * section.batch / (section.learning_rate_batch or section.batch)
    schedule = optim.schedule(rate, steps, warmup, section.final_learning_rate)
    adamw = optim.adamw(
        schedule,
        weight_decay=section.weight_decay,
        clip_norm=section.clip_norm,
    )
    teacher_params = None if teacher is None else parallel.place(teacher.params)
    label_params = None if label_teacher is None else parallel.place(label_teacher.params)
    label_logits = functools.partial(label_teacher.logits, dtype=compute_dtype(config)) if label_teacher else None

    def compiled(optimizer: optax.GradientTransformation, **regularisation: float) -> distill.StepFn:
        step = augment.compile(
            distill.make_train_step(
                dims,
                optimizer,
                objective,
                teacher_dims=teacher.dims if teacher else None,
                label_teacher=label_logits,
                dtype=compute_dtype(config),
                accumulate=section.accumulate,
                remat=section.remat,
                **regularisation,
            )
        )
        return lambda state, batch: step(distill.Inputs(state, teacher_params, label_params), parallel.shard(batch))

    def squared_gradients() -> Params:
        optimizer, batches = sparsity.sum_of_squares(), min(_SCORE_BATCHES, per_epoch)
        state = parallel.place(distill.new_state(params, optimizer, config.seed))
        step = compiled(optimizer)
        with (
            matmul_precision(config),
            contextlib.closing(augment.stream(split, section.batch, (*seed, 1), stage.say)) as batch,
        ):
            for number in range(batches):
                state, _ = step(state, batch(number))
        return jax.tree.map(lambda s: s / batches, fetch(state.opt_state))

    def begin(masks: Params | None) -> tuple[optax.GradientTransformation, distill.TrainState]:
        optimizer, start = adamw, params
        if masks is not None:
            optimizer, start = sparsity.held(adamw, masks), sparsity.apply(params, masks)
        return optimizer, distill.new_state(start, optimizer, config.seed, ema=section.ema > 0)

    val = evaluator(dims, dataset, "val", parallel, section.batch * 4, compute_dtype(config), report=stage.say)
    # By magnitude; a saved state brings masks of its own, and these say what shapes they have.
    optimizer, state = begin(sparsity.find_masks(params) if sparse else None)
    if (found := stage.saver.restore(state, stage.say)) is not None:
        state = distill.TrainState(*found[1])
        stage.say(f"resumes at step {found[0]}")
    elif sparse:
        if sparse == "gradient":
            optimizer, state = begin(sparsity.find_masks(params, squared_gradients()))
        stage.say(
            f"{sparsity.PATTERN} by {sparse}: {sparsity.count_nonzero(state.params):,} of {count_params(dims):,} "
            f"parameters stay, val top-1 {val(parallel.place(state.params), None)['top1']:.1%} before training"
        )
    first = int(state.step)
    stage.cut_back("log.jsonl", first, lambda line: line["step"] <= first)
    state = parallel.place(state)
    best = _Best(stage.path / "best", dims) if section.keep == "best" else None

    def check(state: distill.TrainState) -> dict[str, Any]:
        found = val(_trained(state), None)
        if best:
            best.offer(found["top1"], int(state.step), _trained(state))
        return found

    began = time.monotonic()
    with matmul_precision(config), stage.progress(steps, first), contextlib.closing(stream):
        state = distill.fit(
            state,
            compiled(optimizer, drop_path=section.drop_path, dropout=section.dropout, ema_decay=section.ema),
            stream,
            steps,
            stage,
            log_every=section.log_every,
            save_every=section.save_every,
            evaluate=check,
            eval_every=section.eval_every,
            learning_rate=schedule,
        )
    seconds = time.monotonic() - began
    trained, step = best.read() if best else (fetch(_trained(state)), steps)
    return trained, {
        "steps": steps,
        "step": step,  # after which the model is taken
        "val_top1": val(parallel.place(trained), None)["top1"],
        "input_wait": stream.waited / max(seconds, 1e-9),  # of the time of the training loop
        "matmul_precision": config.matmul_precision,
    }


class _Best:
    """The evaluated model with the highest val top-1 of a training, the earliest of equals, in STAGE/best/.

    It outlives a kill. A later model that a killed run has left there comes again when the run is resumed.
    """

    def __init__(self, place: pathlib.Path, dims: ViTDims) -> None:
        self._place, self._dims, self.top1 = place, dims, -1.0
        recover(place)
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
        params = models.init(dims, jax.random.key(c.seed), std=c.vit.init_std, position_std=c.vit.position_std)
    trained, metrics = _fit_stage(run, s, dims, params, dataset)
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
        params = models.init(pruned.dims, jax.random.key(c.seed), std=s.init_std, position_std=s.position_std)
    trained, metrics = _fit_stage(
        run,
        s,
        pruned.dims,
        params,
        dataset,
        teacher,
        s.sparsity,
        kl_weight=s.kl_weight,
        tau=s.tau,
        kl_per_head=True,
    )
    info = pruned.info | {"provenance": pruned.info["provenance"] | {"stage": "finetune", "steps": metrics["steps"]}}
    if s.sparsity:
        sparsity.check(sparsity.matrices(trained))
        info["sparsity"] = sparsity.PATTERN
        metrics["nonzero_params"] = sparsity.count_nonzero(trained)
    save_model(run.stage.path / "model", Model(pruned.dims, trained, info=info))
    _say(run, metrics)
    return metrics | {"dims": pruned.dims.to_json()}
