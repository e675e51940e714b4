"""pretrain and finetune: one training run from a config section, resumed from its saved state."""

import functools
from typing import Any

import jax
from ml_collections import ConfigDict

from nvit_jax import data, distill, models, optim
from nvit_jax.api import Model, load_model, save_model
from nvit_jax.config import STAGES
from nvit_jax.dims import ViTDims, count_macs, count_params, preset
from nvit_jax.errors import UserError
from nvit_jax.losses import Objective
from nvit_jax.parallel import Parallel
from nvit_jax.stages.common import (
    Run,
    compute_dtype,
    dense_model,
    evaluator,
    load_data,
    matmul_precision,
    model_info,
    need,
    read_teacher,
)
from nvit_jax.teachers import Teacher


def _dims_from_config(vit: ConfigDict) -> ViTDims:
    values = {k: v for k, v in vit.items() if v is not None and k not in ("preset", "init_std", "position_std")}
    if vit.preset:
        return preset(vit.preset, **values)
    needed = ("image", "patch", "classes", "embed", "depth", "heads", "mlp")
    if missing := [k for k in needed if k not in values]:
        raise UserError(f"config.vit: set {', '.join(missing)}, or config.vit.preset")
    return ViTDims.uniform(**values)


def _fit_stage(
    run: Run,
    section: ConfigDict,
    dims: ViTDims,
    params: Any,
    dataset: data.Dataset,
    objective: Objective,
    teacher: Model | None,
    hard_teacher: Teacher | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Train `params` by one config section, resuming from a saved state. Returns the parameters and metrics."""
    config, stage = run.config, run.stage
    parallel = Parallel.create(config.parallel)
    parallel.check_batch(section.batch, f"config.{stage.name}.batch")
    split = dataset.split("train")
    stream = data.train_stream(
        split,
        dataset.preprocessing,
        section.batch,
        (config.seed, STAGES.index(stage.name)),
        parallel.local_rows(section.batch),
    )
    per_epoch = len(split) // section.batch
    steps, warmup = round(section.epochs * per_epoch), round(section.warmup_epochs * per_epoch)
    rate = section.learning_rate * section.batch / (section.learning_rate_batch or section.batch)
    optimizer = optim.adamw(
        optim.schedule(rate, steps, warmup, section.final_learning_rate),
        weight_decay=section.weight_decay,
        clip_norm=section.clip_norm,
    )
    step = distill.make_train_step(
        dims,
        optimizer,
        objective,
        teacher_dims=teacher.dims if teacher else None,
        hard_teacher=functools.partial(hard_teacher.logits, dtype=compute_dtype(config)) if hard_teacher else None,
        dtype=compute_dtype(config),
        drop_path=section.drop_path,
        dropout=section.dropout,
        ema_decay=section.ema,
    )
    state = distill.new_state(params, optimizer, config.seed, ema=section.ema > 0)
    if (found := stage.saver.restore(state, stage.say)) is not None:
        state = distill.TrainState(*found[1])
        stage.say(f"resumes at step {found[0]}")
    first = int(state.step)
    stage.cut_back("log.jsonl", first, lambda line: line["step"] <= first)
    state = parallel.replicate(state)
    compiled = parallel.compile(step)
    teacher_params = None if teacher is None else parallel.replicate(teacher.params)
    hard_params = None if hard_teacher is None else parallel.replicate(hard_teacher.params)
    val = evaluator(dims, dataset, "val", parallel, section.batch * 4, compute_dtype(config))
    with matmul_precision(config), stage.progress(steps, first):
        state = distill.fit(
            state,
            lambda s, batch: compiled(distill.Inputs(s, teacher_params, hard_params), parallel.shard(batch)),
            stream,
            steps,
            stage,
            log_every=section.log_every,
            save_every=section.save_every,
            evaluate=lambda s: val(_trained(s), None),
            eval_every=section.eval_every,
        )
    trained = jax.device_get(_trained(state))
    return trained, {
        "steps": steps,
        "val_top1": val(parallel.replicate(trained), None)["top1"],
        "matmul_precision": config.matmul_precision,
    }


def _trained(state: distill.TrainState) -> Any:
    return state.params if state.average is None else state.average


def pretrain(run: Run) -> dict[str, Any]:
    """Train a dense ViT from random weights with labels."""
    c, s = run.config, run.config.pretrain
    dims = _dims_from_config(c.vit)
    dataset = load_data(run, dims)
    params = models.init(dims, jax.random.key(c.seed), std=c.vit.init_std, position_std=c.vit.position_std)
    objective = Objective(label_weight=s.label_weight, smoothing=s.smoothing)
    trained, metrics = _fit_stage(run, s, dims, params, dataset, objective, None)
    info = model_info(dataset, c.vit.preset, {"stage": "pretrain", "seed": c.seed})
    save_model(run.stage.path / "model", Model(dims, trained, info=info))
    run.stage.say(f"{metrics['steps']} steps, val top-1 {metrics['val_top1']:.1%}, {run.stage.seconds():.0f} s")
    return metrics | {"dims": dims.to_json(), "params": count_params(dims), "macs": count_macs(dims)}


def finetune(run: Run) -> dict[str, Any]:
    """Train the compact model with labels and the unpruned model's logits."""
    c, s = run.config, run.config.finetune
    place = need(run, "prune").path
    pruned = load_model(place / "model" if s.snapshot is None else place / "snapshots" / str(s.snapshot) / "model")
    dataset = load_data(run, pruned.dims, pruned.info)
    objective = Objective(
        label_weight=s.label_weight,
        kl_weight=s.kl_weight,
        tau=s.tau,
        kl_per_head=True,
        smoothing=s.smoothing,
        hard_alpha=s.hard_alpha,
    )
    hard_teacher = (
        read_teacher(s.teacher, "finetune.teacher", pruned.dims, dataset.preprocessing) if s.teacher else None
    )
    teacher = dense_model(run) if objective.needs_teacher else None
    params = pruned.params
    if s.from_scratch:
        params = models.init(pruned.dims, jax.random.key(c.seed), std=s.init_std, position_std=s.position_std)
    trained, metrics = _fit_stage(run, s, pruned.dims, params, dataset, objective, teacher, hard_teacher)
    info = pruned.info | {"provenance": pruned.info["provenance"] | {"stage": "finetune", "steps": metrics["steps"]}}
    save_model(run.stage.path / "model", Model(pruned.dims, trained, info=info))
    run.stage.say(f"{metrics['steps']} steps, val top-1 {metrics['val_top1']:.1%}, {run.stage.seconds():.0f} s")
    return metrics | {"dims": pruned.dims.to_json()}
