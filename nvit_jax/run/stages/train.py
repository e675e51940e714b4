"""pretrain and finetune: one training from a config section."""

import dataclasses
from typing import Any

import jax

from nvit_jax.api.finetune import finetune as finetune_model
from nvit_jax.data.datasets import Dataset
from nvit_jax.errors import UserError
from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims, count_macs, count_params
from nvit_jax.model.directory import Model, load_model, save_model
from nvit_jax.run.stages.common import (
    Run,
    count_bad,
    dense_model,
    dims_from_config,
    keys_of,
    load_data,
    model_info,
    need,
    objective_of,
    recipe_of,
    teacher_of,
)
from nvit_jax.training.measures import watched


def _train(run: Run, model: Model, dataset: Dataset, teacher: Model | None) -> tuple[Model, dict[str, Any]]:
    """The trained model, and its part of metrics.json."""
    config, section = run.config, run.stage.name
    with keys_of(section):
        label_teacher = teacher_of(config, section, model.dims, dataset.preprocessing)
        recipe = recipe_of(config, section, objective_of(config, section, model.dims), label_teacher)
        model = dataclasses.replace(model, info={"preprocessing": dataset.preprocessing.to_json()})
        trained = finetune_model(
            model, dataset, recipe=recipe, teacher=teacher, evaluate_on=dataset.split("val"), progress=run.stage
        )
    facts = trained.info["training"]
    facts |= {"bad_images": count_bad(dataset), "matmul_precision": config.matmul_precision}
    return trained, facts


def _say(run: Run, dims: ViTDims, metrics: dict[str, Any]) -> None:
    val = watched(dims)
    value = f"{val.title} {val.form.format(metrics[f'val_{val.key}'])}"
    waited = f", {metrics['input_wait']:.0%} of it waiting for images" if metrics["input_wait"] >= 0.05 else ""
    run.stage.say(f"{metrics['steps']} steps, val {value}, {run.stage.seconds():.0f} s{waited}")


def pretrain(run: Run) -> dict[str, Any]:
    """Train a dense ViT with labels, from random weights or from another model's."""
    c, s = run.config, run.config.pretrain
    variant, facts = c.vit.preset, {"stage": "pretrain", "seed": c.seed}
    if s.start:
        start = load_model(s.start)
        if start.masks is not None or not start.dims.classes:
            raise UserError(f"config.pretrain.start={s.start} must be a model without masks and with a classifier")
        dataset = load_data(run, start.dims, start.info, fresh=True)
        variant, facts = start.info.get("variant"), facts | {"from": s.start}
    else:
        dims = dims_from_config(c.vit)
        dataset = load_data(run, dims)
        params = vit.init(dims, jax.random.key(c.seed), std=c.vit.init_std, position_std=c.vit.position_std)
        start = Model(dims, params)
    trained, metrics = _train(run, start, dataset, None)
    dims = trained.dims
    save_model(run.stage.path / "model", Model(dims, trained.params, info=model_info(dataset, variant, facts)))
    _say(run, dims, metrics)
    return metrics | {"dims": dims.to_json(), "params": count_params(dims), "macs": count_macs(dims)}


def finetune(run: Run) -> dict[str, Any]:
    """Train the compact model with labels and the unpruned model's logits, or by the distance of its features."""
    c, s = run.config, run.config.finetune
    place = need(run, "prune").path
    pruned = load_model(place / "model" if s.snapshot is None else place / "snapshots" / str(s.snapshot) / "model")
    dataset = load_data(run, pruned.dims, pruned.info)
    teacher = dense_model(run) if objective_of(c, "finetune", pruned.dims).needs_teacher else None
    start = pruned
    if s.from_scratch:
        params = vit.init(pruned.dims, jax.random.key(c.seed), std=s.init_std, position_std=s.position_std)
        start = dataclasses.replace(pruned, params=params)
    trained, metrics = _train(run, start, dataset, teacher)
    info = pruned.info | {"provenance": pruned.info["provenance"] | {"stage": "finetune", "steps": metrics["steps"]}}
    info |= {key: trained.info[key] for key in ("sparsity",) if key in trained.info}
    save_model(run.stage.path / "model", Model(pruned.dims, trained.params, info=info))
    _say(run, pruned.dims, metrics)
    return metrics | {"dims": pruned.dims.to_json()}
