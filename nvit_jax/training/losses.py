"""Objectives: what training minimises and what saliency differentiates. Every loss is per example, [B]."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nvit_jax.errors import UserError
from nvit_jax.schema import Flag, Function, Maybe, Number, Shape, check_fields

# image [B, image, image, channels], label [B], index [B] (place in the global batch), and of the teachers: "teacher"
# [B, T, C], the unpruned model's logits or features, "label_teacher" [B, C], another classifier's (a CNN's in NViT); of
# mixed images "mixed_label" [B] and "label_share" [], the part of the first
Batch = dict[str, Any]

_SHAPES: dict[str, Shape] = {
    **dict.fromkeys(("label_weight", "kl_weight", "feature_weight"), Number(0, 1e9)),
    "tau": Number(1e-3, 1e6),
    "teacher_tau": Maybe(Number(1e-3, 1e6)),
    "kl_per_head": Flag(),
    "smoothing": Number(0, below=1),
    "teacher_alpha": Number(0, 1),
    "own": Maybe(Function()),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """label_weight * L_label + kl_weight * KL_nvit(unpruned model || model), NViT section 3.4.

    L_label = (1 - teacher_alpha) CE(mean of the classifiers, label) + teacher_alpha L_teacher (a model with one
    classifier learns both with it). L_teacher is DeiT's hard distillation, CE(distillation classifier, argmax of the
    label teacher), or, with a teacher_tau, its soft one: tau^2 KL(label teacher || distillation classifier), summed
    over classes, both at that temperature (DeiT, equations 3 and 2; its code divides the soft one by the number of
    classes, too).
    `kl_per_head` applies the KL to each classifier and averages (finetuning) instead of to the mean of their
    logits (pruning). KL_nvit is a mean over batch AND classes at temperature tau without a tau^2 factor, so that
    NViT's coefficient 1e5 is 100 times the ordinary per-sample KL at 1,000 classes.

    `own(logits [B, C], batch) -> [B]` is a loss of the user's in the place of L_label.

    A model without a classifier gives features in the place of logits. It has no labels and no KL, and learns from
    feature_weight * `feature_distance` to the unpruned model's; `FEATURES` is that alone.
    """

    label_weight: float = 1.0
    kl_weight: float = 0.0
    tau: float = 1.0
    kl_per_head: bool = False
    smoothing: float = 0.0
    teacher_alpha: float = 0.0
    teacher_tau: float | None = None
    own: Callable[[jax.Array, Batch], jax.Array] | None = None
    feature_weight: float = 0.0

    def __post_init__(self) -> None:
        """UserError for values of another type or range, and where all weights are 0."""
        check_fields(self, _SHAPES)
        if not (self.label_weight or self.kl_weight or self.feature_weight):
            raise UserError("=0: no other weight is above 0, so that nothing would be learnt", "label_weight")

    @property
    def needs_teacher(self) -> bool:
        """The unpruned model's logits, or features."""
        return self.kl_weight != 0 or self.feature_weight != 0

    @property
    def needs_labels(self) -> bool:
        return self.own is None and self.label_weight != 0


FEATURES = Objective(label_weight=0.0, feature_weight=1.0)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """[B, C] logits and [B] integer labels -> [B]; `smoothing` mass is spread evenly over all C classes."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing == 0:
        return hard
    return (1 - smoothing) * hard - smoothing * jax.nn.log_softmax(logits).mean(-1)


def kl_nvit(teacher: jax.Array, logits: jax.Array, tau: float) -> jax.Array:
    """[..., C] teacher and student logits -> [...]: mean over classes of p log(p / q), both at temperature tau."""
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    log_p = jax.nn.log_softmax(teacher.astype(wide) / tau)
    log_q = jax.nn.log_softmax(logits.astype(wide) / tau)
    return (jnp.exp(log_p) * (log_p - log_q)).mean(-1)


def feature_distance(theirs: jax.Array, ours: jax.Array) -> jax.Array:
    """[B, T, D] features of the unpruned model and of another -> [B]: |ours - theirs|^2 / |theirs|^2, mean over T.

    The squared error as a part of the features' own square: the same for every scale of them. At the unpruned model it
    is 0, so is its gradient, and its Hessian in `ours` is 2 / (T |theirs|^2) times the identity.
    """
    wide = jnp.promote_types(ours.dtype, jnp.float32)
    theirs = theirs.astype(wide)
    return (jnp.square(ours.astype(wide) - theirs).sum(-1) / _square(theirs)).mean(-1)


def draw_directions(theirs: jax.Array, key: jax.Array, index: jax.Array) -> jax.Array:
    """[B, T, D] random gradients e of a loss in the features, E[e e'] = the Hessian of `feature_distance` there.

    e = sqrt(2 / T) / |theirs| * eps with eps ~ N(0, I), one key per global index. With the Jacobian J of the features
    in some gates, g = J' e is the gradient of the projection <e, features>, and E[g g'] = J' H J: the Gauss-Newton
    matrix of the distance in the gates. It is the Fisher matrix of a normal distribution around the features with the
    covariance H^-1, from which eps draws, as `draw_labels` draws from the classes.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    noise = jax.vmap(lambda k: jax.random.normal(k, theirs.shape[1:], theirs.dtype))(keys)
    return noise * jnp.sqrt(2 / (theirs.shape[1] * _square(theirs)))[..., None]


def _square(features: jax.Array) -> jax.Array:
    """|features|^2 over the last axis, never 0."""
    return jnp.maximum(jnp.square(features).sum(-1), jnp.finfo(features.dtype).tiny)


def objective_loss(objective: Objective, logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of every example [B] and its parts, from logits or features [B, T, C]; see `Batch` for the teachers'."""
    mean = logits.mean(1)
    if objective.own is not None:
        label = objective.own(mean, batch)
        if (shape := getattr(label, "shape", None)) != mean.shape[:1]:
            raise UserError(f" returns the shape {shape}; it must be [B], one number an example", "loss")
    elif "label" in batch and not objective.feature_weight:
        label = cross_entropy(mean, batch["label"], objective.smoothing)
    elif objective.needs_labels:
        raise UserError(": labels are needed, or a loss of your own", "batches")
    else:
        label = jnp.zeros(len(mean), mean.dtype)
    if "mixed_label" in batch and objective.own is None and not objective.feature_weight:
        other = cross_entropy(mean, batch["mixed_label"], objective.smoothing)
        label = batch["label_share"] * label + (1 - batch["label_share"]) * other
    parts = {} if objective == FEATURES else {"label_loss": label}
    if objective.teacher_alpha:
        answer, tau = jax.lax.stop_gradient(batch["label_teacher"]), objective.teacher_tau
        if tau is None:
            part = cross_entropy(logits[:, -1], answer.argmax(-1))
        else:
            part = tau**2 * logits.shape[-1] * kl_nvit(answer, logits[:, -1], tau)
        parts["teacher_loss"] = part
        label = (1 - objective.teacher_alpha) * label + objective.teacher_alpha * part
    total = objective.label_weight * label
    if objective.feature_weight:
        parts["feature_loss"] = feature_distance(jax.lax.stop_gradient(batch["teacher"]), logits)
        total = total + objective.feature_weight * parts["feature_loss"]
    if objective.kl_weight:
        teacher = jax.lax.stop_gradient(batch["teacher"])
        if objective.kl_per_head:
            kl = kl_nvit(teacher, logits, objective.tau).mean(1)
        else:
            kl = kl_nvit(teacher.mean(1), mean, objective.tau)
        total = total + objective.kl_weight * kl
        parts["kl_loss"] = kl
    return total, parts


def draw_labels(teacher: jax.Array, key: jax.Array, index: jax.Array) -> jax.Array:
    """Labels [B] drawn from the teacher's own distribution (logits [B, T, C]), one key per global index.

    With them, squared per-sample gradients are an unbiased estimate of the Gauss-Newton diagonal.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    return jax.vmap(jax.random.categorical)(keys, teacher.mean(1))
