"""prune: score, rank, mask and train until the targets hold; cut the masks out; check and measure the result."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from nvit_jax.data import datasets
from nvit_jax.data.pipeline import eval_batches
from nvit_jax.errors import UserError
from nvit_jax.files import read_json
from nvit_jax.latency import timing
from nvit_jax.model import vit
from nvit_jax.model.dims import Units, ViTDims, count_macs, count_params
from nvit_jax.model.directory import Model, save_model
from nvit_jax.model.masks import full_masks, to_numpy
from nvit_jax.model.regnet import Teacher
from nvit_jax.parallel import Parallel, check_same, fetch
from nvit_jax.pruning import loop, ranking, saliency
from nvit_jax.pruning.reshape import reshape
from nvit_jax.run.config import STAGES
from nvit_jax.run.stages import rules, scoring
from nvit_jax.run.stages.common import (
    Augmentation,
    Run,
    augmentation,
    compute_dtype,
    cost,
    count_bad,
    dense_dir,
    dense_model,
    evaluator,
    load_data,
    matmul_precision,
    model_info,
    read_teacher,
)
from nvit_jax.training import distill, optim
from nvit_jax.training.losses import Objective


def prune_model(run: Run) -> dict[str, Any]:
    """Score, rank, mask and train until the targets hold; cut the masks out; check and measure the compact model."""
    c, p, stage = run.config, run.config.prune, run.stage
    dense = dense_model(run)
    dims = dense.dims
    dataset = load_data(run, dims, dense.info)
    predict = rules.latency_model(run, dims)
    policy = rules.policy(p, predict)
    targets = ranking.make_targets(dict(p.target), dims, predict)
    ranking.check_reachable(dims, policy, targets)
    if p.snapshots and predict is None:
        raise UserError("prune.snapshots needs a latency model: run the latency stage, or set config.latency.table")
    plan = loop.Plan(
        mode=p.mode,
        warmup=p.interval if p.plain_first else 0,
        interval=p.interval,
        steps=p.steps,
        groups_per_step=p.groups_per_step,
        ema=p.ema,
        reset_scores=p.reset_scores,
    )
    if not _measured(run):  # what is measured at the end must fit
        timing.measure([dims], batch=c.latency.batch, dtype=c.dtype, repeats=1)
    state = _prune(run, dense, dataset, rules.ranker(p, dims, policy, targets, plan, predict), targets, plan, predict)

    compact_dims, difference = _finish(run, dense, state, dataset)
    dense_ms, compact_ms = timing.measure(
        [dims, compact_dims], batch=c.latency.batch, dtype=c.dtype, repeats=c.latency.repeats
    )
    predicted = predict(compact_dims) if predict else None
    result = {
        "criterion": p.criterion,
        "target": {t.name: p.target[t.name] for t in targets},
        "latency_ratio": compact_ms / dense_ms,
        "predicted_latency_ratio": predicted / predict(dims) if predict and predicted else None,
        "macs_ratio": count_macs(compact_dims) / count_macs(dims),
        "params_ratio": count_params(compact_dims) / count_params(dims),
        "predicted_latency_ms": predicted,
        "latency_source": predict.device if predict else None,
        "measured_latency_ms": compact_ms,
        "dense_latency_ms": dense_ms,
        "masked_vs_compact_max_abs_diff": difference,
        "calibration_overlap": dataset.overlap > 0,
        "bad_images": count_bad(dataset),
        "input_wait_seconds": stage.input_wait,
        "peak_memory_bytes": cost(stage, 1.0, 0)["peak_memory_bytes"],
        "dims": compact_dims.to_json(),
        "seconds": stage.seconds(),
    }
    asked = ", ".join(f"{t.name} {p.target[t.name]:g}" for t in targets)
    stage.say(
        f"{p.criterion}: asked {asked}; MACs x{result['macs_ratio']:.3f}, "
        f"params x{result['params_ratio']:.3f}, latency "
        + (f"predicted x{result['predicted_latency_ratio']:.3f}{_of_another_device(predict)}, " if predict else "")
        + f"measured x{result['latency_ratio']:.3f}, {int(state.prunings)} prunings, {stage.seconds():.0f} s"
    )
    for ratio in p.snapshots:
        if not (stage.path / "snapshots" / str(ratio)).exists():
            stage.say(f"warning: prune.snapshots: {ratio} of the latency was not reached, there is no such snapshot")
    return result


def _measured(run: Run) -> bool:
    """Whether the latency stage has timed the dense model."""
    path = run.workdir / "latency" / "metrics.json"
    return run.other("latency").done() and read_json(path).get("dense_latency_ms") is not None


def _of_another_device(predict: rules.LatencyModel) -> str:
    return "" if predict.device == timing.device_name() else f" ({predict.device})"


def _finish(run: Run, dense: Model, state: loop.PruneState, dataset: datasets.Dataset) -> tuple[ViTDims, float]:
    """Write masked/ and model/; returns the compact dims and the largest difference of the logits."""
    stage, dims = run.stage, dense.dims
    masked, small = _cut(state.train, dims)
    images = dataset.preprocessing(next(eval_batches(dataset.split("val").some(64), 64))["image"])
    with jax.default_matmul_precision("float32"):
        masked_logits = np.asarray(vit.forward(dims, masked.params, images, masked.masks))
        compact_logits = np.asarray(vit.forward(small.dims, small.params, images))
    difference = float(np.abs(masked_logits - compact_logits).max())
    # Ten times what float32 explains: beyond it the two are not the same function.
    if not difference <= 1e-4 * max(1.0, float(np.abs(masked_logits).max())):
        raise RuntimeError(f"the compact model differs from the masked one by {difference}")
    _save_pair(stage.path, masked, small, _info(run, dense, dataset))
    return small.dims, difference


def _cut(state: distill.TrainState, dims: ViTDims) -> tuple[Model, Model]:
    """The masked model and the compact one, on the host."""
    assert state.masks is not None
    masks, params = to_numpy(fetch(state.masks)), fetch(state.params)
    return Model(dims, params, masks), Model(*reshape(params, masks, dims))


def _save_pair(place: pathlib.Path, masked: Model, compact: Model, info: dict[str, Any]) -> None:
    save_model(place / "masked", dataclasses.replace(masked, info=info))
    save_model(place / "model", dataclasses.replace(compact, info=info))


def _phase(
    c: ConfigDict, dims: ViTDims, optimizer: Any, augment: Augmentation, teacher: Teacher | None, *, first: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled train and score steps up to the first pruning, and after it (prune.plain_first)."""
    p = c.prune
    objective = Objective(
        label_weight=p.label_weight,
        kl_weight=0.0 if p.plain_first and first else p.kl_weight,
        tau=p.tau,
        teacher_alpha=p.teacher_alpha,
        teacher_tau=p.teacher_tau,
    )
    train = distill.make_train_step(
        dims,
        optimizer,
        objective,
        teacher_dims=dims,
        label_teacher=functools.partial(teacher.logits, dtype=compute_dtype(c)) if teacher else None,
        dtype=compute_dtype(c),
        drop_path=0.0 if p.plain_first and not first else p.drop_path,
        accumulate=p.accumulate,
        remat=p.remat,
    )
    score = loop.make_score_step(
        dims,
        p.criterion,
        rules.criterion(p),
        p.score.loss,
        objective,
        label_teacher=teacher.logits if teacher else None,
        remat=p.score.remat,
    )
    return augment.compile(train), augment.compile_plain(score)


def _save_snapshots(
    run: Run, dense: Model, info: dict[str, Any], predict: Callable[[ViTDims], float]
) -> Callable[..., None]:
    """Called after each pruning: writes the model for every prune.snapshots ratio that it has just reached."""

    def save(state: distill.TrainState, before: ViTDims, after: ViTDims) -> None:
        whole = predict(dense.dims)
        for ratio in run.config.prune.snapshots:
            if predict(before) > ratio * whole >= predict(after):
                place = run.stage.path / "snapshots" / str(ratio)
                facts = {"provenance": info["provenance"] | {"snapshot": ratio}}
                _save_pair(place, *_cut(state, dense.dims), info | facts)
                run.stage.say(f"snapshot {ratio}: predicted latency x{predict(after) / whole:.3f}, {place}")

    return save


def _no_snapshot(state: distill.TrainState, before: ViTDims, after: ViTDims) -> None:
    """Without a latency model there are none."""


def _no_training(step: int) -> Any:
    raise AssertionError(f"one_shot asks for the batch of step {step}")


def _info(run: Run, dense: Model, dataset: datasets.Dataset) -> dict[str, Any]:
    facts = {"stage": "prune", "criterion": run.config.prune.criterion, "seed": run.config.seed}
    return model_info(dataset, dense.info.get("variant"), facts | {"from": str(dense_dir(run))})


def _prune(
    run: Run,
    dense: Model,
    dataset: datasets.Dataset,
    rank: Callable[[Units, Units, int], ranking.Ranking],
    targets: list[ranking.Target],
    plan: loop.Plan,
    predict: Callable[[ViTDims], float] | None,
) -> loop.PruneState:
    c, p, stage, dims = run.config, run.config.prune, run.stage, dense.dims
    parallel = Parallel.create(c.parallel)
    parallel.check_batch(p.batch // p.accumulate, "config.prune.batch / accumulate")
    number = STAGES.index(stage.name)
    augment, train_split = augmentation(run, dataset, parallel), dataset.split("train")
    stack = contextlib.ExitStack()
    if plan.mode == "one_shot":
        stream: Callable[[int], Any] = _no_training
    else:
        stream = stack.enter_context(
            contextlib.closing(augment.stream(train_split, p.batch, (c.seed, number, 0), stage.warn))
        )
    teacher_model = read_teacher(p.teacher, "prune.teacher", dims, dataset.preprocessing) if p.teacher else None
    label_params = None if teacher_model is None else parallel.place(teacher_model.params)
    optimizer = optim.adamw(p.learning_rate, weight_decay=p.weight_decay, clip_norm=p.clip_norm)
    masks = full_masks(dims)
    if p.score.from_training:
        optimizer = optim.collecting(optimizer, functools.partial(saliency.taylor_of, align=p.align), masks)
    later = _phase(c, dims, optimizer, augment, teacher_model, first=False)
    steps = [_phase(c, dims, optimizer, augment, teacher_model, first=True) if p.plain_first else later, later]
    state = loop.new_prune_state(distill.new_state(dense.params, optimizer, c.seed, masks=masks))
    if (found := stage.saver.restore(state, stage.say)) is not None:
        restored = found[1]
        state = loop.PruneState(distill.TrainState(*restored[0]), Units(*restored[1]), *restored[2:])
        stage.say(f"resumes at step {int(state.train.step)} after {int(state.prunings)} prunings")
    first, prunings = int(state.train.step), int(state.prunings)
    stage.cut_back("log.jsonl", first, lambda line: line["step"] <= first)
    stage.cut_back("history.jsonl", first, lambda line: line["pruning"] <= prunings)
    teacher = parallel.place(dense.params)
    val = evaluator(dims, dataset, "val", parallel, 4 * p.batch, compute_dtype(c), p.eval_images, report=stage.warn)

    def inputs(state: distill.TrainState) -> distill.Inputs:
        return distill.Inputs(state, teacher, label_params)

    find_scores: Callable[[distill.TrainState, int], Units] = functools.partial(scoring.from_training, plan)
    if not p.score.from_training:
        find_scores = scoring.from_batches(run, train_split, parallel, [phase[1] for phase in steps], inputs, stack)

    def score(train: distill.TrainState, pruning: int) -> Units:
        scores = find_scores(train, pruning)
        if pruning == 0:
            scoring.keep_scores(run, scores, dims, predict)
        return scores

    def agreed_rank(scores: Units, masks: Units, pruning: int) -> ranking.Ranking:
        found = rank(scores, masks, pruning)
        check_same((scores, found.masks), f"scores or masks of pruning {pruning + 1}")
        return found

    def train(state: loop.PruneState, until: int) -> distill.TrainState:
        step = steps[int(state.prunings) > 0][0]
        return distill.fit(
            parallel.place(state.train),
            lambda s, batch: step(inputs(s), parallel.shard(batch)),
            stream,
            until,
            stage,
            log_every=p.log_every,
            save_every=p.save_every,
            pack=lambda trained: state._replace(train=trained),
            save_offset=int(state.prunings),
        )

    total = plan.warmup + (plan.steps - 1) * plan.interval if plan.mode == "gradual" else None
    with matmul_precision(c), stage.progress(total, first), stack:
        return loop.prune_loop(
            state,
            dims=dims,
            plan=plan,
            rank=agreed_rank,
            targets=targets,
            score=score,
            train=train,
            monitor=stage,
            evaluate=lambda s: val(parallel.place(s.params), parallel.place(s.masks)),
            predict_ms=predict,
            record=stage.history,
            pruned=_save_snapshots(run, dense, _info(run, dense, dataset), predict) if predict else _no_snapshot,
        )
