"""Criteria: how much the loss cares about each unit. Pure functions (loss, params, masks, batch, key) -> Units.

A criterion knows no model and no data. `loss(params, masks, batch)` returns per-example losses [B] and must accept
gates with a batch axis (Units of [B, D], [L, B, H], ...). `average(find, batch)` is the mean of find(batch) where the
caller takes the batch in parts, or runs one program for each device (pmap). What `find` returns is a mean over its
examples: no square or product of such means comes before `average`.
Scores of removed units are 0.

Probing (tests/ablations/probing.py; the demo's model, 2,392 units, 256 images, KL, one draw). Rank correlation with the
exact diagonal, and products: all gates at once 0.12 (1), 0.33 (16), 0.50 (64); per kind 0.31 (5), 0.66 (80); per block
0.26 (7), 0.54 (56); kind in a block 0.50 (25), 0.72 (100); chunks of 16 units, the default, 0.84 (154); exact (2,392).
The variance of an estimate is the sum of the squared off-diagonal entries in its part, so confining probes beats
repeating them. The default stays below 0.9 there; its ranking ended at a validation loss of 0.189 at half of the
MACs, the exact diagonal's at 0.182 (one draw). All tangents go through one linearisation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.model import groups
from nvit_jax.model.dims import KINDS, Units
from nvit_jax.model.groups import Params
from nvit_jax.model.masks import check_finite as check_finite
from nvit_jax.model.masks import normalize
from nvit_jax.training.losses import Batch

SCHEMES = ("all", "kind", "block", "part", "chunk", "unit")  # what probes of hvp and obd are confined to
Loss = Callable[[Params, Units, Batch], jax.Array]
Average = Callable[[Callable[[Batch], Any], Batch], Any]


def _at_once(find: Callable[[Batch], Any], batch: Batch) -> Any:
    return find(batch)


def per_sample(masks: Units, size: int) -> Units:
    """Gates with a batch axis: [B, D], [L, B, H], ..."""
    rest = (jnp.broadcast_to(m[:, None], (m.shape[0], size, *m.shape[1:])) for m in masks[1:])
    return Units(jnp.broadcast_to(masks.embed, (size, *masks.embed.shape)), *rest)


def _size(batch: Batch) -> int:
    """Examples in it; labels are not always there, and what stands for an image is the loss's affair."""
    return len(next(iter(batch.values())))


def _batch_mean(units: Units) -> Units:
    """Mean over the batch axis of per-sample gates."""
    return Units(units.embed.mean(0), *(u.mean(1) for u in units[1:]))


def _probe_parts(masks: Units, scheme: str, chunk: int) -> tuple[Units, int]:
    """The part each unit belongs to, and the number of parts: probes are confined to one part at a time.

    "all": one part. "kind": one for each kind. "block": embed, and one for each block. "part": embed, and one for
    each kind in each block. "chunk": those, dealt out into chunks of at most `chunk` units, so that the noise of an
    estimate, which grows with the units probed together, is the same for small and large kinds. "unit": each unit
    alone, which makes the estimate exact.
    """
    if scheme not in SCHEMES:
        raise UserError(f"saliency: unknown probing scheme {scheme!r}; there are {', '.join(SCHEMES)}")
    if scheme == "part":
        chunk = max(m.size for m in masks)
    elif scheme == "unit":
        chunk = 1
    depth = masks.head.shape[0]
    parts, count = [], 0
    for k, mask in enumerate(masks):
        rows = 1 if k == 0 else depth  # embed is one row, the other kinds have one for each block
        row = np.arange(rows)[:, None]
        width = mask.size // rows
        if scheme in ("all", "kind", "block"):
            own = {"all": 0 * row, "kind": 0 * row + k, "block": row + (k > 0)}[scheme]
        else:
            each = max(-(-width // chunk), 1)  # all blocks may lack a part
            own = count + row * each + np.arange(width) % each
            count += rows * each
        parts.append(np.broadcast_to(own, (rows, width)).reshape(mask.shape))
    return Units(*parts), {"all": 1, "kind": 5, "block": 1 + depth}.get(scheme, count)


def _curvature(
    loss: Loss,
    params: Params,
    masks: Units,
    batch: Batch,
    key: jax.Array,
    scheme: str,
    chunk: int,
    probes: int,
    average: Average,
) -> tuple[Units, Units]:
    """Gradient and diagonal curvature of the mean loss in the gates: (dl/dm_i, estimate of H_ii).

    Every example has its own gates and its own Rademacher probe. The Hessian of the summed loss is then block
    diagonal, so that ONE Hessian-vector product gives B independent estimates v_i (H_x v)_i, which are averaged.
    """
    masks = normalize(masks)
    parts = _probe_parts(masks, scheme, chunk)
    return average(functools.partial(_probed, loss, params, masks, key, parts, probes), batch)


def _probed(
    loss: Loss, params: Params, masks: Units, key: jax.Array, split: tuple[Units, int], probes: int, batch: Batch
) -> tuple[Units, Units]:
    """`_curvature` of one part of a batch."""
    gates = per_sample(masks, _size(batch))
    parts, count = split

    def gradient(gates: Units) -> Units:
        return jax.grad(lambda g: loss(params, g, batch).sum())(gates)

    first, product = jax.linearize(gradient, gates)  # v -> H v: jvp of grad, its primal part computed once

    def draw(number: jax.Array) -> Units:
        """Signs for every gate of every example, 0 for removed units. The parts of one probe share them."""
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, number), i))(batch["index"])

        def signs(k: int, mask: jax.Array) -> jax.Array:
            axis = min(k, 1)  # of the batch: [B, D] for embed, [L, B, ...] for the kinds of a block
            one = lambda key: jax.random.rademacher(jax.random.fold_in(key, k), mask.shape, mask.dtype)  # noqa: E731
            return jax.vmap(one, out_axes=axis)(keys) * jnp.expand_dims(mask, axis)

        return Units(*(signs(k, m) for k, m in enumerate(masks)))

    def probe(total: Units, number: jax.Array) -> tuple[Units, None]:
        signs = draw(number)

        def one(total: Units, place: jax.Array) -> tuple[Units, None]:
            here = Units(*(jnp.expand_dims(p == place, min(k, 1)) for k, p in enumerate(parts)))
            v = jax.tree.map(jnp.multiply, signs, here)
            return jax.tree.map(lambda t, v, hv: t + v * hv, total, v, product(v)), None

        return jax.lax.scan(one, total, jnp.arange(count))

    zero = jax.tree.map(jnp.zeros_like, gates)
    total, _ = jax.lax.scan(probe, zero, jnp.arange(probes))
    return _batch_mean(first), jax.tree.map(lambda t: t / probes, _batch_mean(total))


def hvp(
    loss: Loss,
    params: Params,
    masks: Units,
    batch: Batch,
    key: jax.Array,
    *,
    scheme: str = "chunk",
    chunk: int = 16,
    probes: int = 1,
    average: Average = _at_once,
) -> Units:
    """v_i (H v)_i averaged over probes v: an unbiased estimate of H_ii = w_S' H_SS w_S, the curvature of unit i alone.

    H is the Hessian of the mean loss in the gates, H v = jvp(grad(l)) (NViT equation 1 with the exact product in
    place of finite differences).
    """
    _, curvature = _curvature(loss, params, masks, batch, key, scheme, chunk, probes, average)
    return _masked(curvature, masks)


def obd(
    loss: Loss,
    params: Params,
    masks: Units,
    batch: Batch,
    key: jax.Array,
    *,
    scheme: str = "chunk",
    chunk: int = 16,
    probes: int = 1,
    average: Average = _at_once,
) -> Units:
    """-dl/dm_i + H_ii / 2: the loss change of removing unit i (m_i from 1 to 0), to second order."""
    first, curvature = _curvature(loss, params, masks, batch, key, scheme, chunk, probes, average)
    return _masked(jax.tree.map(lambda g, h: h / 2 - g, first, curvature), masks)


def fisher(
    loss: Loss, params: Params, masks: Units, batch: Batch, key: jax.Array | None = None, *, average: Average = _at_once
) -> Units:
    """Mean over examples of (dl_x/dm_i)^2, from one backward pass: the gates have a batch axis.

    With data labels the empirical Fisher; with labels drawn from the unpruned model (`losses.draw_labels`) the
    Gauss-Newton diagonal.
    """

    def squares(batch: Batch) -> Units:
        gates = per_sample(normalize(masks), _size(batch))
        gradient = jax.grad(lambda g: loss(params, g, batch).sum())(gates)
        return _batch_mean(jax.tree.map(jnp.square, gradient))

    return _masked(average(squares, batch), masks)


def hvp_joint(
    loss: Loss, params: Params, masks: Units, batch: Batch, key: jax.Array | None = None, *, average: Average = _at_once
) -> Units:
    """m_i (H m)_i: curvature with all cross terms, one product. An ablation; poor alone."""
    masks = normalize(jax.tree.map(jnp.asarray, masks))

    def product(batch: Batch) -> Units:
        gradient = jax.grad(lambda g: loss(params, g, batch).mean())
        return jax.jvp(gradient, (masks,), (masks,))[1]

    return _masked(average(product, batch), masks)


# The weights that the released NViT counts for a unit, and the constants it divides the sum by ("method 23").
_TAYLOR = {
    "embed": (
        "patch_embed/kernel",
        "patch_embed/bias",
        "q/kernel",
        "k/kernel",
        "v/kernel",
        "proj/kernel",
        "proj/bias",
        "fc1/kernel",
        "fc1_gate/kernel",
        "fc2/kernel",
        "fc2/bias",
    ),
    "head": ("q/kernel", "q/bias", "k/kernel", "k/bias", "v/kernel", "v/bias"),
    "qk": ("q/kernel", "q/bias"),
    "v": ("v/kernel", "v/bias"),
    "mlp": ("fc1/kernel", "fc1/bias", "fc1_gate/kernel", "fc1_gate/bias"),
}
_TAYLOR_DIVISOR = {"embed": 12, "head": 12, "qk": 2, "v": 2, "mlp": 1}


def _sum_units(values: Params, masks: Units, keep: Callable[[str, str], bool]) -> Units:
    """Sum parameter-shaped values over the entries of each unit, over the parameters for which keep(kind, name)."""
    dtype = jnp.result_type(*jax.tree.leaves(values))
    sums = {kind: [jnp.zeros(s.shape, dtype) for s in ([m] if not i else m)] for i, (kind, m) in _kinds(masks)}
    for path, leaf in groups.flatten(values):
        axes, block = groups.axes_of(path, inside=groups.inside(values)), groups.block_of(path)
        name = path if block is None else path.split("/", 1)[1]
        for kind in KINDS:
            if kind in axes and keep(kind, name):
                total = groups.reduce(leaf, axes, kind)
                place = 0 if kind == "embed" or block is None else block
                slot = sums[kind][place]
                # Not slot.at[...].add: that scatter crashes XLA's partitioner under pmap with JAX 0.11.2.
                wider = [(0, n - m) for n, m in zip(slot.shape, total.shape, strict=True)]
                sums[kind][place] = slot + jnp.pad(total, wider)
    return Units(sums["embed"][0], *(jnp.stack(sums[kind]) for kind in KINDS[1:]))


def _kinds(masks: Units) -> list[tuple[int, tuple[str, Any]]]:
    return list(enumerate(zip(KINDS, masks, strict=True)))


def taylor(
    loss: Loss,
    params: Params,
    masks: Units,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    align: str = "per_head",
    average: Average = _at_once,
) -> Units:
    """(sum of w * dl/dw over a unit's weights / divisor)^2: the criterion of the released NViT (equation 6).

    align="shared" (the released code): one query/key or value index for all heads of a block, summed over the
    heads before squaring; each live head then carries an equal part of the score.
    """
    gradient = average(lambda batch: jax.grad(lambda p: loss(p, masks, batch).mean())(params), batch)
    return taylor_of(params, gradient, masks, align=align)


def taylor_of(params: Params, gradient: Params, masks: Units, *, align: str = "per_head") -> Units:
    """`taylor` from a gradient that is there already, of the mean loss of a (global) batch in `params`."""
    # The products of a unit cancel: they are summed in the widest type that is enabled.
    wide = jnp.result_type(float)
    products = jax.tree.map(lambda w, g: w.astype(wide) * g.astype(wide), params, gradient)
    sums = _sum_units(products, masks, lambda kind, name: name in _TAYLOR[kind])
    if align == "shared":
        live = jnp.maximum(masks.head.sum(-1), 1)[:, None, None].astype(wide)  # its root is not exact
        qk, v = (jnp.broadcast_to(s.sum(1, keepdims=True) / jnp.sqrt(live), s.shape) for s in (sums.qk, sums.v))
        sums = sums._replace(qk=qk, v=v)
    return _masked(Units(*(jnp.square(s / _TAYLOR_DIVISOR[k]) for _, (k, s) in _kinds(sums))), masks)


def magnitude(
    loss: Loss | None, params: Params, masks: Units, batch: Batch | None = None, key: jax.Array | None = None, **_: Any
) -> Units:
    """Sum of squares of the kernel entries that go with a unit and are still there. A baseline."""
    squares = jax.tree.map(lambda p, kept: jnp.square(p) * kept, params, groups.expand(normalize(masks), params))
    return _masked(_sum_units(squares, masks, lambda kind, name: name.endswith("kernel")), masks)


def random(loss: Loss | None, params: Params, masks: Units, batch: Batch | None, key: jax.Array, **_: Any) -> Units:
    """Uniform noise from `key`. A baseline."""
    draws = (jax.random.uniform(jax.random.fold_in(key, i), m.shape) for i, m in enumerate(masks))
    return _masked(Units(*draws), masks)


CRITERIA: dict[str, Callable[..., Units]] = {
    "hvp": hvp,
    "obd": obd,
    "fisher": fisher,
    "taylor": taylor,
    "hvp_joint": hvp_joint,
    "magnitude": magnitude,
    "random": random,
}


def criterion(name: str, **options: Any) -> Callable[..., Units]:
    """A criterion by name with its options bound: `scheme`, `chunk`, `probes` (hvp, obd), `align` (taylor)."""
    if name not in CRITERIA:
        raise UserError(f"unknown criterion {name!r}; there are {', '.join(CRITERIA)}")
    return functools.partial(CRITERIA[name], **options)


def _masked(scores: Units, masks: Units) -> Units:
    return jax.tree.map(jnp.multiply, scores, normalize(masks))


def check_telling(scores: Units, live: Units, params: Params) -> None:
    """UserError when all scores of a kind are equal: they do not tell which of its units matter.

    `live`: 1 for the units that may go. A kind with a single one of them says nothing, and need not.
    """
    for kind, values, counts in zip(KINDS, scores, live, strict=True):
        found = np.asarray(values)[np.asarray(counts) > 0]
        if len(found) > 1 and (found == found[0]).all():
            untrained = "head" in params and not np.asarray(params["head"]["kernel"]).any()
            reason = (
                "the classifier is all zeros, as a new one is: train it first, by finetuning"
                if untrained
                else "the loss does not depend on them: look at the weights, the loss and the images"
            )
            raise UserError(
                f"all {len(found):,} {kind} units have the score {found[0]:g}, which tells nothing; {reason}"
            )
