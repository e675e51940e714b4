"""Compensation: the weights that stay are fitted anew, part by part, so that the model computes what it did.

The blocks are walked from the first to the last, with two streams: of the dense model, and of the model that is cut so
far. In each part the features (value dims, neurons) that stay are chosen on the cut model's own stream, and what they
write is fitted (leastsquares.py) to what is missing to the dense model's stream behind the part: later parts make good
for earlier ones.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nvit_jax.model import groups, vit
from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.model.groups import PAIRED, Params
from nvit_jax.pruning import rebasis
from nvit_jax.pruning.leastsquares import POWERS, Fit, fit, removal
from nvit_jax.pruning.moments import Sensitivity, TokenMoments
from nvit_jax.pruning.statistics import Streams, Walk, padded_block

READERS = {"attention": ("q", "k", "v"), "mlp": ("fc1", "fc1_gate")}  # of the stream, in the parts of a block
ORDER = 1e-2  # ridge of the fits that features are chosen by
TOKENS = 0.25  # power of the tokens' weights in them
# A norm in front of a part's last layer, and what makes the features that it is over.
NORMS = {"attention": ("proj_norm", "v"), "mlp": ("fc2_norm", "fc1")}


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What compensation may choose anew on the cut model's stream; the widths stay those of the masks."""

    values: bool  # the basis of the value dims, of which the first stay
    neurons: bool  # which neurons of an mlp stay


class Compensated(NamedTuple):
    """A model after `compensate`."""

    params: Params  # of full size; removed rows of the writers are 0
    masks: Units
    logits: list[Any]  # of every batch


def feature_rows(dims: ViTDims, block: int, name: str) -> np.ndarray:
    """Which of a part's padded features the block has, as `Walk.gather` counts them."""
    if name == "mlp":
        return np.arange(dims.mlp[block])
    width = max(dims.v)
    return np.asarray((np.arange(dims.heads[block])[:, None] * width + np.arange(dims.v[block])).reshape(-1))


def pick(found: TokenMoments, rows: np.ndarray) -> TokenMoments:
    """Moments of some of the features."""
    return TokenMoments(
        *(
            one._replace(x=one.x[rows], xx=one.xx[np.ix_(rows, rows)], xy=one.xy[rows]) if one.weight else one
            for one in found
        )
    )


def writer(block: Params, name: str) -> tuple[str, np.ndarray, np.ndarray]:
    """The matrix that writes a part's output: its name, weights [F, D] with LayerScale in them, and that scale [D].

    A block that lacks the part has no rows there.
    """
    layer, scale_name = ("proj", "scale1") if name == "attention" else ("fc2", "scale2")
    width = len(block[layer]["bias"])
    kernel = np.asarray(block[layer].get("kernel", np.zeros((0, width))), np.float64).reshape(-1, width)
    scale = np.asarray(block[scale_name], np.float64) if scale_name in block else np.ones(width)
    return layer, kernel * scale, scale


def written(block: Params, name: str, rows: np.ndarray, found: Fit) -> Params:
    """The block with fitted weights in these rows of its writer and 0 in the others.

    Where LayerScale is 0, what stands behind it stays as it was.
    """
    layer, _, scale = writer(block, name)
    old = {leaf: np.asarray(value) for leaf, value in block[layer].items()}
    divisor = np.where(scale == 0, 1.0, scale)
    new = {"bias": np.where(scale == 0, old["bias"], found.bias / divisor)}
    if "kernel" in old:
        kernel = np.zeros((old["kernel"].size // len(scale), len(scale)))
        kernel[rows] = np.where(scale == 0, old["kernel"].reshape(kernel.shape)[rows], found.weights / divisor)
        new["kernel"] = kernel.reshape(old["kernel"].shape)
    return block | {layer: {leaf: new[leaf].astype(old[leaf].dtype) for leaf in old}}


def masked_block(block: Params, masks: Units, index: int) -> Params:
    """A block without what its masks remove: the queries and keys, and the rows of its writers, are 0.

    So are the features, where a norm stands in front of the writer.
    """

    def at(kind: str, shape: tuple[int, ...]) -> Any:
        return getattr(masks, kind)[index][tuple(slice(0, n) for n in shape)]

    out = {name: dict(leaves) if isinstance(leaves, dict) else leaves for name, leaves in block.items()}
    if "q" in out:  # there is an attention part
        kernel = out["q"]["kernel"]
        live = at("qk", kernel.shape[1:3]).reshape(*kernel.shape[1:3], *(1,) * (kernel.ndim - 3))
        for name in (name for name in PAIRED if name in out):
            out[name] = {leaf: np.asarray(value * live) for leaf, value in out[name].items()}
        heads, values, _ = out["proj"]["kernel"].shape
        live = at("head", (heads,))[:, None] * at("v", (heads, values))
        out["proj"]["kernel"] = np.asarray(out["proj"]["kernel"] * live[..., None])
        _clear(out, "attention", live)
    if "fc1" in out:
        live = at("mlp", out["fc2"]["kernel"].shape[:1])
        out["fc2"]["kernel"] = np.asarray(out["fc2"]["kernel"] * live[:, None])
        _clear(out, "mlp", live)
    return out


def _clear(block: Params, part: str, live: Any) -> None:
    """Features that are gone become 0 in front of the part's norm, and behind it."""
    if NORMS[part][0] in block:
        for name in NORMS[part]:
            block[name] = {leaf: np.asarray(value * live) for leaf, value in block[name].items()}


def value_features(bases: np.ndarray, live: np.ndarray) -> np.ndarray:
    """[H V, F] that map value dims to those that are kept in their bases [H, V, V]; live [H, V]."""
    heads, width = live.shape
    columns = [np.zeros((heads * width, 0))]
    for head in range(heads):
        block = np.zeros((heads * width, int(live[head].sum())))
        block[head * width : (head + 1) * width] = bases[head][:, live[head] > 0]
        columns.append(block)
    return np.concatenate(columns, 1)


def compensate(
    walk: Walk,
    dense: Params,
    params: Params,
    masks: Units,
    felt: list[Sensitivity],
    chosen: Chosen,
    *,
    use_held: bool,
    told: Callable[[int], None] = lambda done: None,
) -> Compensated:
    """Walk through the model and fit every part to what the dense one has behind it.

    Args:
      dense: the model as it was, in any basis; `params` the same function in the basis of the masks.
      use_held: held-back images are fitted to as well, once they have chosen the ridge.
      told: hears of every block that is done.
    """
    dims = walk.dims
    embed = None if np.all(masks.embed) else np.asarray(masks.embed)
    before = walk.begin(dense)
    ours = before if embed is None else walk.begin(params, embed)
    out, kept = dict(params), Units(*(np.array(m) for m in masks))
    for index in range(dims.depth):
        name = f"block_{index}"
        original = padded_block(dims, dense[name])
        block = params[name]
        for part, feel in zip(vit.PARTS, felt[2 * index : 2 * index + 2], strict=True):
            after = walk.advance(part, original, before)
            if embed is not None:
                feel = feel.of(embed)
                if READERS[part][0] in block:  # the block has this part
                    inputs = walk.inputs(part, padded_block(dims, block), ours, before, embed)
                    readers = tuple(n for n in READERS[part] if n in block)
                    block = align(block, readers, inputs, embed, feel, use_held=use_held)
            found = part_moments(walk, block, kept, index, part, ours, after)
            block, found = choose(dims, block, kept, index, part, found, feel, chosen, use_held=use_held)
            if NORMS[part][0] in block:  # which sees other features now
                found = part_moments(walk, block, kept, index, part, ours, after, cut=True)
            block = fit_part(dims, block, kept, index, part, found, feel, use_held=use_held)
            ours = walk.advance(part, padded_block(dims, masked_block(block, kept, index)), ours, embed)
            before = after
        out[name] = block
        told(index + 1)
    readers = groups.classifier_readers(dims)
    if embed is not None and readers:
        feel = Sensitivity(np.zeros((0, 0)), 1.0, 1.0)  # the metric is the readers'
        inputs, pool = walk.classifier_inputs(params, ours, before, embed), dims.pool == "map"
        aligned = align(out["pool"] if pool else out, readers, inputs, embed, feel, use_held=use_held)
        out = out | {"pool": aligned} if pool else aligned
    return Compensated(out, kept, walk.logits(out, ours, embed))


def align(
    params: Params,
    readers: tuple[str, ...],
    inputs: tuple[TokenMoments, TokenMoments],
    embed: np.ndarray,
    felt: Sensitivity,
    *,
    use_held: bool,
) -> Params:
    """Parameters with readers of the stream that make good for embed channels which are gone.

    What they read of the dense model's stream, behind a norm, is fitted by what is read of the channels that are left
    (`inputs`: to fit, held back). That linear map is multiplied into the readers; its shift goes into their biases,
    where they have any, and of head_mean into head's.
    """
    kernels = {name: np.asarray(params[name]["kernel"], np.float64) for name in readers}
    metric = np.sum([np.square(k).reshape(len(k), -1).sum(1) for k in kernels.values()], 0)
    keep, (fitted, held) = np.flatnonzero(embed), inputs
    if not any("bias" in params[name] for name in readers):  # nothing can take a shift in
        fitted, held = fitted.about_zero(), held.about_zero()
    weighed = dataclasses.replace(felt, metric=np.diag(metric))
    found = fit(pick(fitted, keep), pick(held, keep), np.eye(len(metric))[keep], weighed, use_held=use_held)
    whole = np.zeros((len(metric), len(metric)))
    whole[keep] = found.weights
    out = dict(params)
    for name, kernel in kernels.items():
        holder, shift = "head" if name == "head_mean" else name, np.tensordot(found.bias, kernel, 1)
        out[name] = out[name] | {
            "kernel": np.tensordot(whole, kernel, 1).astype(np.asarray(params[name]["kernel"]).dtype)
        }
        if "bias" in params[holder]:
            old = np.asarray(out[holder]["bias"])
            out[holder] = out[holder] | {"bias": (old.astype(np.float64) + shift).astype(old.dtype)}
    return out


def part_moments(
    walk: Walk,
    block: Params,
    masks: Units,
    index: int,
    part: str,
    ours: Streams,
    after: Streams,
    *,
    cut: bool = False,
) -> tuple[TokenMoments, TokenMoments]:
    """(to fit, held back): all features of a part whose queries and keys are cut, and what it should write.

    `ours` is the cut model's stream in front of the part, `after` the dense model's behind it. With `cut` the features
    that the masks remove are 0 for a norm in front of the part's last layer.
    """
    masked = masked_block(block, masks, index)
    taken = (*PAIRED, *NORMS[part]) if cut and NORMS[part][0] in block else PAIRED
    whole = padded_block(walk.dims, block | {name: masked[name] for name in taken if name in masked})
    rows = feature_rows(walk.dims, index, part)
    embed = None if np.all(masks.embed) else np.asarray(masks.embed)
    fitted, held = (pick(found, rows) for found in walk.gather(part, whole, ours, after, embed))
    return fitted, held


def choose(
    dims: ViTDims,
    block: Params,
    masks: Units,
    index: int,
    part: str,
    moments: tuple[TokenMoments, TokenMoments],
    felt: Sensitivity,
    chosen: Chosen,
    *,
    use_held: bool,
) -> tuple[Params, tuple[TokenMoments, TokenMoments]]:
    """What stays of one part of one block, where that is `chosen` anew: the masks are changed in place, which keep as
    many as before. The block is returned in the basis of its value dims that they mean, with its moments in it."""
    fitted, held = moments
    both = (fitted + held if use_held else fitted).together(felt.shares(TOKENS))
    if part == "mlp":
        live = masks.mlp[index][: dims.mlp[index]] > 0
        if chosen.neurons and not live.all():
            order, _ = removal(both, felt.metric, np.ones(len(live)), ORDER)
            live = np.zeros(len(live), bool)
            live[order[len(order) - int(masks.mlp[index].sum()) :]] = True
            masks.mlp[index, : len(live)] = live
        return block, moments
    heads, width = dims.heads[index], dims.v[index]
    live = masks.v[index][:heads, :width] * masks.head[index][:heads, None]
    if not (chosen.values and live.any() and not live.all()):
        return block, moments
    masks.v[index, :heads, :width] = np.sort(live, axis=1)[:, ::-1]  # the first of the new basis
    there, fixed = masks.head[index][:heads], "proj_norm" in block
    bases, _ = rebasis.value_basis(both, felt.metric, there, width, ORDER, fixed=fixed)
    features = value_features(bases, np.ones((heads, width)))
    return rebasis.change(block, bases, None), (fitted.mapped(features), held.mapped(features))


def fit_part(
    dims: ViTDims,
    block: Params,
    masks: Units,
    index: int,
    part: str,
    moments: tuple[TokenMoments, TokenMoments],
    felt: Sensitivity,
    *,
    use_held: bool,
    powers: tuple[float, ...] = POWERS,
) -> Params:
    """One part of one block with its writer fitted to what it should write, by the features that the masks keep.

    Of a part that keeps nothing the bias is fitted: the mean of what it should write. `powers` as of `fit`.
    """
    fitted, held = moments
    _, start, _ = writer(block, part)
    if part == "mlp":
        live = masks.mlp[index][: dims.mlp[index]]
    else:
        heads, width = dims.heads[index], dims.v[index]
        live = masks.v[index][:heads, :width] * masks.head[index][:heads, None]
    keep = np.flatnonzero(live.reshape(-1))
    found = fit(pick(fitted, keep), pick(held, keep), start[keep], felt, use_held=use_held, powers=powers)
    return written(block, part, keep, found)
