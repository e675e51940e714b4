"""Training: one step and one loop for pretraining, for the steps between prunings, and for distillation finetuning."""

import collections
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nvit_jax.errors import UserError
from nvit_jax.model import vit
from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.model.groups import Params
from nvit_jax.model.parts import gradient_parts, mean_over_parts
from nvit_jax.parallel import Parallel
from nvit_jax.training.losses import Batch, Objective, objective_loss
from nvit_jax.training.monitor import Monitor
from nvit_jax.training.optim import ema_update

_ASK_EVERY = 8  # steps


class TrainState(NamedTuple):
    """All that a run carries from step to step. The key never changes: draws fold in the step and the example."""

    step: Any  # int32 []
    params: Params
    opt_state: Any
    average: Params | None  # EMA of params
    masks: Units | None  # gates of the masked model, None when the model is dense
    key: Any  # uint32 key data


class Inputs(NamedTuple):
    """What a compiled step takes beside the batch: the state and the parameters of the teachers that it needs."""

    state: TrainState
    teacher: Any  # Params of the unpruned model, or None
    label_teacher: Any = None  # parameters of another classifier, or None


StepFn = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def new_state(
    params: Params, optimizer: optax.GradientTransformation, seed: int, *, ema: bool = False, masks: Units | None = None
) -> TrainState:
    """The state before the first step."""
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.int32(0), params, optimizer.init(params), params if ema else None, masks, key)


def make_train_step(
    dims: ViTDims,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    teacher_dims: ViTDims | None = None,
    label_teacher: Callable[[Any, jax.Array], jax.Array] | None = None,
    dtype: Any = None,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    ema_decay: float = 0.0,
    accumulate: int | None = None,
    parallel: Parallel | None = None,
    remat: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """One optimizer step, `step(inputs, batch, mean)`, for parallel.compile. The loss is a mean over the global batch.

    `label_teacher(params, images)` gives logits [B, C] where the objective has a teacher_alpha. `accumulate`: the batch
    goes through the models in that many parts, one after the other, for the memory of one; the same step but for
    rounding. None: the usual ones (`gradient_parts`), and one with a loss of the user's. `parallel`, what compiles the
    step: with it the devices exchange gradients once, not for each part. `remat`: blocks are computed again in the
    backward pass.
    """

    def step(inputs: Inputs, batch: Batch, mean: Callable[[Any], Any]) -> tuple[TrainState, dict[str, jax.Array]]:
        state = inputs.state

        def part(weights: Any, batch: Batch) -> tuple[Params, dict[str, jax.Array]]:
            params, teacher, label_params = weights
            keys = None
            if drop_path or dropout:
                key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
            if objective.needs_teacher:
                assert teacher_dims is not None
                batch = batch | {"teacher": vit.forward(teacher_dims, teacher, batch["image"], dtype=dtype)}
            if objective.teacher_alpha:
                assert label_teacher is not None
                batch = batch | {"label_teacher": label_teacher(label_params, batch["image"])}
            images = batch["image"]

            def loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
                logits = vit.forward(
                    dims,
                    params,
                    images,
                    state.masks,
                    keys=keys,
                    dtype=dtype,
                    drop_path=drop_path,
                    dropout=dropout,
                    remat=remat,
                )
                each, parts = objective_loss(objective, logits, batch)
                metrics = {"loss": each.mean()}
                if "label" in batch and dims.classes:
                    metrics["top1"] = (logits.mean(1).argmax(-1) == batch["label"]).mean()
                return metrics["loss"], metrics | {name: value.mean() for name, value in parts.items()}

            return jax.grad(loss, has_aux=True)(params)

        count = accumulate or (1 if objective.own else gradient_parts(dims, batch, parallel))
        gradient, metrics = mean(mean_over_parts(part, (state.params, *inputs[1:]), batch, count, parallel))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = None if state.average is None else ema_update(state.average, params, state.step, ema_decay)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state, average=average), metrics

    return step


class Stopped(Exception):
    """The loop was asked to stop and has saved its state."""


def fit(
    state: TrainState,
    step_fn: StepFn,
    stream: Callable[[int], Batch],
    until: int,
    monitor: Monitor,
    *,
    log_every: int,
    save_every: int,
    pack: Callable[[TrainState], Any] = lambda state: state,
    save_offset: int = 0,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    eval_every: int = 0,
    learning_rate: Callable[[int], Any] | None = None,
) -> TrainState:
    """Steps from state.step to `until`. What is saved is `pack(state)`, under the number step + save_offset.

    `learning_rate` tells the rate of a step, for the log. Logged values are those of the logged step alone, so that a
    resumed run writes the same lines. A loss that is not finite raises UserError with its step before anything is
    logged or saved after it. The host runs two steps ahead of the device at most.
    """
    pending: list[tuple[int, dict[str, jax.Array]]] = []
    running: collections.deque[jax.Array] = collections.deque(maxlen=2)
    alone = jax.process_count() == 1
    for step in range(int(state.step) + 1, until + 1):
        if len(running) == 2:
            running[0].block_until_ready()
        began = time.monotonic()
        batch = stream(step - 1)
        if not running or running[-1].is_ready():  # type: ignore[attr-defined]
            monitor.waited(time.monotonic() - began)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = step_fn(state, batch)
        running.append(metrics["loss"])
        monitor.stepped(metrics["loss"])
        pending.append((step, metrics))
        logs, saves = step % log_every == 0 or step == until, step % save_every == 0
        # Several processes ask each other, which takes a message; they stop within a few steps.
        stopping = (alone or saves or step % _ASK_EVERY == 0) and monitor.stopping
        if logs or saves or stopping:
            _check_losses(pending)
            pending.clear()
        if logs:
            values = {name: float(value) for name, value in metrics.items()}
            if learning_rate is not None:
                values["learning_rate"] = float(learning_rate(step - 1))
            if evaluate is not None and eval_every and (step % eval_every == 0 or step == until):
                values |= {f"val_{name}": value for name, value in evaluate(state).items()}
            monitor.log(step, values)
        monitor.advance(step, f"loss {float(metrics['loss']):.3f}" if logs else "")
        if saves or stopping:
            monitor.save(step + save_offset, pack(state))
        if stopping:
            raise Stopped(f"stopped at step {step}")
    return state


def _check_losses(pending: list[tuple[int, dict[str, jax.Array]]]) -> None:
    for step, metrics in pending:
        for name in ("loss", "gradient_norm"):
            if not np.isfinite(value := float(metrics[name])):
                raise UserError(
                    f"the {name.replace('_', ' ')} is {value} at step {step}; the last saved state is kept: "
                    "lower the learning rate or look at the data, then run again with --force"
                )
