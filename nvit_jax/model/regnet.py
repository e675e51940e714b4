"""CNN teachers: RegNetY ("Designing Network Design Spaces", CVPR 2020) as NViT distils from, for inference only."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.model.groups import Params, flatten, unflatten
from nvit_jax.model.values import real, whole


class Teacher(Protocol):
    """Any classifier. `nvit_jax.Model` is one, `RegNet` is one, and so is an object of a user's own."""

    @property
    def params(self) -> Any: ...

    def logits(self, params: Any, images: jax.Array, dtype: Any = None) -> jax.Array:
        """[B, C] of normalised images [B, image, image, channels]; may be traced. `dtype` is the type of compute."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegNetDims:
    """Widths of a RegNetY. `regnety_160` is NViT's teacher, RegNetY-16GF: 83,590,140 parameters."""

    widths: tuple[int, ...] = (224, 448, 1232, 3024)  # of the stages
    depths: tuple[int, ...] = (2, 4, 11, 1)
    group: int = 112  # channels of one group of the 3x3 convolutions
    stem: int = 32
    squeeze: float = 0.25  # of a block's input width: the width inside squeeze-and-excitation
    classes: int = 1000
    channels: int = 3

    def __post_init__(self) -> None:
        """UserError for numbers that cannot be a model."""
        for name, most in (("group", 2**12), ("stem", 2**12), ("classes", 2**24), ("channels", 2**10)):
            whole(f"dims of a RegNet: {name}", getattr(self, name), 1, most)
        real("dims of a RegNet: squeeze", self.squeeze, 1e-3, 16.0)
        for name, most in (("widths", 2**14), ("depths", 2**8)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not 0 < len(values) <= 16 or len(values) != len(self.widths):
                raise UserError(f"dims of a RegNet: {name}={values!r} must hold one number for each of 1 to 16 stages")
            for i, value in enumerate(values):
                whole(f"dims of a RegNet: {name}[{i}]", value, 1, most)
        if bad := [width for width in self.widths if width % self.group]:
            raise UserError(f"dims of a RegNet: width {bad[0]} is not divisible by group={self.group}")

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RegNetDims":
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if unknown := sorted(fields.keys() - {field.name for field in dataclasses.fields(cls)}):
            raise UserError(f"dims of a RegNet: unknown field(s) {', '.join(unknown)}")
        return cls(**fields)


class _Norm(nn.Module):
    """BatchNorm with its stored statistics."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale, var = (self.param(name, nn.initializers.ones, shape) for name in ("scale", "var"))
        bias, mean = (self.param(name, nn.initializers.zeros, shape) for name in ("bias", "mean"))
        factor = scale * jax.lax.rsqrt(var + 1e-5)
        return x * factor.astype(x.dtype) + (bias - mean * factor).astype(x.dtype)


class _ConvNorm(nn.Module):
    features: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        edge = self.kernel // 2
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            strides=self.stride,
            padding=[(edge, edge)] * 2,  # as PyTorch pads, the same on both sides
            feature_group_count=self.groups,
            use_bias=False,
            dtype=self.dtype,
            name="conv",
        )(x)
        return _Norm(name="bn")(x)


class _Bottleneck(nn.Module):
    """1x1, grouped 3x3 with the stride, squeeze-and-excitation, 1x1, and the shortcut."""

    features: int
    stride: int
    group: int
    squeeze: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(_ConvNorm, self.features, dtype=self.dtype)
        y = nn.relu(conv(name="conv1")(x))
        y = nn.relu(conv(kernel=3, stride=self.stride, groups=self.features // self.group, name="conv2")(y))
        s = y.mean((1, 2), keepdims=True)
        s = nn.relu(nn.Conv(self.squeeze, (1, 1), dtype=self.dtype, name="se1")(s))
        y = y * nn.sigmoid(nn.Conv(self.features, (1, 1), dtype=self.dtype, name="se2")(s))
        y = conv(name="conv3")(y)
        if self.stride > 1 or x.shape[-1] != self.features:
            x = conv(stride=self.stride, name="downsample")(x)
        return nn.relu(x + y)


class _RegNet(nn.Module):
    dims: RegNetDims
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        d = self.dims
        x = nn.relu(_ConvNorm(d.stem, kernel=3, stride=2, dtype=self.dtype, name="stem")(images))
        for stage, (width, depth) in enumerate(zip(d.widths, d.depths, strict=True), 1):
            for j in range(depth):
                squeeze = round(x.shape[-1] * d.squeeze)
                block = _Bottleneck(width, 1 if j else 2, d.group, squeeze, self.dtype, name=f"s{stage}_b{j + 1}")
                x = block(x)
        return nn.Dense(d.classes, dtype=self.dtype, name="head")(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class RegNet:
    """A RegNetY: dims, parameters and facts, as `nvit_jax.Model` for Vision Transformers."""

    dims: RegNetDims
    params: Params
    info: dict[str, Any] = dataclasses.field(default_factory=dict)

    def logits(self, params: Params, images: Any, dtype: Any = None) -> jax.Array:
        """[B, C] of normalised images [B, size, size, channels]."""
        return _RegNet(self.dims, dtype).apply({"params": params}, images)  # type: ignore[return-value]


def regnet_shapes(dims: RegNetDims) -> Params:
    """Shapes and types of the parameters (jax.ShapeDtypeStruct)."""
    images = jax.ShapeDtypeStruct((1, 64, 64, dims.channels), jnp.float32)
    return jax.eval_shape(lambda x: _RegNet(dims).init(jax.random.key(0), x)["params"], images)


def regnet_names(dims: RegNetDims) -> Iterator[tuple[str, str, tuple[int, ...], Callable[[np.ndarray], np.ndarray]]]:
    """The key table: (name in the official file, our path, shape in the file, file -> ours)."""
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    modules = {"se1": "se.fc1", "se2": "se.fc2"}
    for path, leaf in flatten(regnet_shapes(dims)):
        first, *middle, last = path.split("/")
        torch = [first.replace("_", "."), *(modules.get(m, m) for m in middle), leaves[last]]
        shape = tuple(leaf.shape)
        if last == "kernel":
            order = (3, 2, 0, 1) if len(shape) == 4 else (1, 0)
            shape = tuple(shape[axis] for axis in order)
        into = {4: lambda x: x.transpose(2, 3, 1, 0), 2: lambda x: x.T}.get(len(shape), lambda x: x)
        yield ".".join(torch).replace("head.", "head.fc."), path, shape, into


def regnet_dims(shapes: Mapping[str, tuple[int, ...]]) -> RegNetDims:
    """Read off the shapes of an official file. KeyError for a name that is not there."""
    depths: list[int] = []
    while f"s{len(depths) + 1}.b1.conv1.conv.weight" in shapes:
        stage = len(depths) + 1
        depths.append(sum(f"s{stage}.b{j}.conv1.conv.weight" in shapes for j in range(1, 1 + len(shapes))))
    widths = tuple(shapes[f"s{i + 1}.b1.conv3.conv.weight"][0] for i in range(len(depths)))
    return RegNetDims(
        widths=widths,
        depths=tuple(depths),
        group=shapes["s1.b1.conv2.conv.weight"][1],
        stem=shapes["stem.conv.weight"][0],
        squeeze=shapes["s1.b1.se.fc1.weight"][0] / shapes["stem.conv.weight"][0],
        classes=shapes["head.fc.weight"][0],
        channels=shapes["stem.conv.weight"][1],
    )


def regnet_from_torch(
    dims: RegNetDims, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], where: str, dtype: Any
) -> Params:
    """Parameters from the tensors of an official file (names checked by the caller). UserError for a wrong shape."""
    leaves = {}
    for name, path, shape, into in regnet_names(dims):
        if shapes[name] != shape:
            raise UserError(f"{where}: {name} has shape {shapes[name]}, the model asks for {shape}")
        leaves[path] = np.array(into(read(name)), dtype, order="C")
    return unflatten(leaves)
