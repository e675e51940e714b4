"""The residual stream in another basis: the function stays, and its last channels carry little. NumPy, float64.

LayerNorm treats channels one by one, so the stream cannot be turned. It can be written as RMSNorm
(Ashkboos et al. 2024, SliceGPT): it removes the mean of x over the channels, which everything that writes the stream
can leave out; its gain and bias belong to what reads it. RMSNorm without gain sees the length of x alone, which an
orthogonal matrix Q keeps. So x Q is written instead of x, and Q' is multiplied into the readers: the same matrices, in
another basis.
"""

import dataclasses

import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.model import groups
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.groups import Params
from nvit_jax.pruning.moments import spectrum

_READERS = {"norm1": ("q", "k", "v"), "norm2": ("fc1", "fc1_gate")}  # of a block's norms
_WRITERS = {"proj": "scale1", "fc2": "scale2"}  # and their LayerScale
_INSIDE = ("q_norm", "k_norm", "rotary", "relative", "proj_norm", "fc2_norm")  # stay as they are


def to_rmsnorm(dims: ViTDims, params: Params) -> tuple[ViTDims, Params]:
    """Dims and parameters of the same function with RMSNorm, in the parameters' own types.

    Queries, keys and values get biases where they had none, since the norm's goes there. LayerScale goes into the
    matrices behind it. Raises UserError for a model whose last norm no layer with a bias reads, and for one whose first
    norm cannot go into others.
    """
    if dims.norm == "rms":
        return dims, params
    _check(dims)
    if not groups.classifier_readers(dims) or dims.projection:
        raise UserError(
            "a model without a classifier (classes=0) cannot have RMSNorm: gain and bias of its last LayerNorm go into "
            "what reads it, and nothing with a bias does"
        )
    out: Params = {}
    readers = groups.classifier_readers(dims)
    for name, value in params.items():
        if name.startswith("block_"):
            out[name] = _block(value)
        elif name == "pool":
            out[name] = value | {reader: _reader(value[reader], params["norm"]) for reader in readers}
        elif name in readers:
            out[name] = _reader(value, params["norm"])
        elif name == "patch_embed":
            out[name] = _writer(value, 1.0)
        elif groups.AXES.get(name, ())[-1:] == ("embed",):  # tokens and positions
            out[name] = _centred(value)
        elif name != "norm":
            out[name] = value
    if "head_mean" in out:  # it has no bias of its own
        shift = out["head_mean"].pop("bias")
        out["head"]["bias"] = out["head"]["bias"] + shift
    return dataclasses.replace(dims, norm="rms", norm_count=dims.embed, layer_scale=False, qkv_bias=True), out


def _check(dims: ViTDims) -> None:
    """UserError that names the part for which the channels of the stream are not alike."""
    if dims.pre_norm:
        raise UserError(
            "a model with a norm in front of its blocks (pre_norm, as CLIP has it) keeps LayerNorm: the gain of that "
            "norm writes the stream, channel by channel, and cannot be turned"
        )
    if dims.pool in ("max", "avgmax"):
        raise UserError(
            f'a model with pool="{dims.pool}" keeps LayerNorm: the largest value of a channel over the tokens is none '
            "of a turned stream"
        )


def _block(block: Params) -> Params:
    out: Params = {name: block[name] for name in _INSIDE if name in block}
    for norm, readers in _READERS.items():
        if norm in block:  # else the part is gone
            out |= {name: _reader(block[name], block[norm]) for name in readers if name in block}
    return out | {name: _writer(block[name], block.get(scale, 1.0)) for name, scale in _WRITERS.items()}


def _reader(layer: Params, norm: Params) -> Params:
    """A linear layer that reads the norm's output without gain and bias."""
    kernel = np.asarray(layer["kernel"], np.float64)
    gain = np.asarray(norm["scale"], np.float64).reshape(-1, *(1,) * (kernel.ndim - 1))
    shift = np.tensordot(np.asarray(norm["bias"], np.float64), kernel, 1)
    made = {"kernel": gain * kernel, "bias": np.asarray(layer.get("bias", 0.0), np.float64) + shift}
    return {leaf: value.astype(np.asarray(layer["kernel"]).dtype) for leaf, value in made.items()}


def _writer(layer: Params, scale: np.ndarray | float) -> Params:
    """A linear layer whose output has LayerScale in it and no mean over the channels."""
    return {leaf: _centred(value, scale) for leaf, value in layer.items()}


def _centred(values: np.ndarray, scale: np.ndarray | float = 1.0) -> np.ndarray:
    wide = np.asarray(values, np.float64) * np.asarray(scale, np.float64)
    return np.asarray((wide - wide.mean(-1, keepdims=True)).astype(np.asarray(values).dtype))


def rotate(dims: ViTDims, params: Params, basis: np.ndarray) -> Params:
    """Parameters of the same function whose stream is x Q instead of x.

    `basis`: Q [D, D], orthogonal. A writer W becomes W Q and a reader Q' W: either way Q is multiplied to its axis of
    embed channels. Raises UserError for another matrix, with LayerNorm, and where the features would be others.
    """
    if dims.norm != "rms":
        raise UserError("the stream of a model with LayerNorm cannot be rotated; to_rmsnorm makes RMSNorm of it")
    _check(dims)
    if not groups.classifier_readers(dims):
        raise UserError("a model without a classifier (classes=0) cannot be rotated: its features would be others")
    basis = np.asarray(basis, np.float64)
    if basis.shape != (dims.embed, dims.embed) or not np.allclose(basis.T @ basis, np.eye(dims.embed), atol=1e-6):
        raise UserError(f"the basis must be an orthogonal matrix of {dims.embed} x {dims.embed}")
    out = {}
    for path, leaf in groups.flatten(params):
        axes = groups.axes_of(path, inside=groups.inside(params))
        out[path] = leaf
        if "embed" in axes:
            axis = axes.index("embed")
            turned = np.tensordot(np.asarray(leaf, np.float64), basis, (axis, 0))  # the new axis is the last one
            out[path] = np.ascontiguousarray(np.moveaxis(turned, -1, axis)).astype(np.asarray(leaf).dtype)
    return groups.unflatten(out)


def principal(moments: np.ndarray) -> np.ndarray:
    """Q [D, D]: orthonormal eigenvectors of second moments [D, D] as columns, the largest first, signs made unique."""
    _, vectors = spectrum(moments)
    vectors = vectors[:, ::-1]
    largest = vectors[np.abs(vectors).argmax(0), np.arange(len(vectors))]
    return np.asarray(vectors * np.where(largest < 0, -1.0, 1.0))
