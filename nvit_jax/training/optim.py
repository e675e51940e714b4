"""AdamW with the usual rules: cosine with warm-up, no decay but for kernels, moments of removed units zeroed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nvit_jax.model import groups
from nvit_jax.model.dims import Units
from nvit_jax.model.groups import Params
from nvit_jax.model.masks import normalize


def schedule(peak: float, steps: int, warmup: int = 0, final: float = 0.0) -> optax.Schedule:
    """Linear warm-up from 0 to `peak` in `warmup` steps, then a cosine to `final` at `steps`."""
    warmup = min(warmup, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, max(steps, 1), final)


def decays(params: Params) -> Params:
    """True for what weight decay acts on: kernels. Not biases, norms, tokens, positions, LayerScale."""
    return groups.unflatten({path: path.endswith("kernel") for path, _ in groups.flatten(params)})


def adamw(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float, clip_norm: float | None = None
) -> optax.GradientTransformation:
    """AdamW; `clip_norm` bounds the global gradient norm before it."""
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay, mask=decays)
    return optimizer if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


class Collected(NamedTuple):
    """The state of `collecting`: scores summed over the steps since the last pruning, and its masks."""

    inner: Any
    masks: Units
    scores: Units


def collecting(
    optimizer: optax.GradientTransformation, criterion: Callable[[Params, Params, Units], Units], masks: Units
) -> optax.GradientTransformation:
    """`optimizer`, which also sums up criterion(params, gradient, masks) over its steps: saliency from the gradients
    that training takes anyway. The weights are those after the step and the gradient is from before it, as in the
    released NViT, whose optimizer steps first.
    """

    def init(params: Params) -> Collected:
        return Collected(optimizer.init(params), *_from_zero(masks))

    def update(gradient: Any, state: Collected, params: Any = None) -> tuple[Any, Collected]:
        updates, inner = optimizer.update(gradient, state.inner, params)
        found = criterion(optax.apply_updates(params, updates), gradient, state.masks)
        scores = jax.tree.map(lambda total, s: total + s.astype(total.dtype), state.scores, found)
        return updates, Collected(inner, state.masks, scores)

    return optax.GradientTransformation(init, update)


def _from_zero(masks: Units) -> tuple[Units, Units]:
    zeros = Units(*(jnp.zeros(m.shape, jnp.result_type(float)) for m in masks))
    return Units(*(jnp.asarray(m) for m in masks)), zeros


def zero_removed(opt_state: Any, masks: Units) -> Any:
    """After a pruning: both Adam moments of every weight that belongs to a removed unit become 0, and scores are
    collected from 0 again."""

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    def clear(node: Any) -> Any:
        if not is_adam(node):
            return node
        kept = groups.expand(normalize(masks), node.mu)
        return node._replace(
            mu=jax.tree.map(lambda m, k: m * k.astype(m.dtype), node.mu, kept),
            nu=jax.tree.map(lambda m, k: m * k.astype(m.dtype), node.nu, kept),
        )

    if isinstance(opt_state, Collected):
        return Collected(zero_removed(opt_state.inner, masks), *_from_zero(masks))
    return jax.tree.map(clear, opt_state, is_leaf=is_adam)


def ema_update(average: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """Exponential moving average of the weights; the decay rises to its value as (1 + step) / (10 + step)."""
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: a + rate.astype(a.dtype) * (p - a), average, params)
