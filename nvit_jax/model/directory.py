"""A model, and its directory on disk: `load_model` and `save_model`."""

import dataclasses
import functools
import json
import pathlib
import zipfile
from typing import Any

import jax
import numpy as np

from nvit_jax import files
from nvit_jax.errors import UserError
from nvit_jax.model import groups, vit
from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.model.groups import Params
from nvit_jax.model.masks import check_masks
from nvit_jax.model.preprocessing import Preprocessing, as_images, normalise, preprocess
from nvit_jax.model.regnet import RegNet, RegNetDims, regnet_shapes
from nvit_jax.model.reshape import reshape
from nvit_jax.model.summary import describe, one_line
from nvit_jax.parallel import is_main

FORMAT = 1
OWN = ("masks.npz", "model.json", "params")  # what a model directory holds; anything else in it is not ours


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A Vision Transformer: its dims, its parameters, its masks if it is a masked one, and facts about it.

    A pytree whose leaves are the arrays, so that it passes through `jax.jit` as an argument.

        >>> model = nvit.load("deit_tiny_patch16_224.pth")
        >>> logits = model(model.preprocess(["photo.jpg"]))  # [1, 1000]
    """

    dims: ViTDims
    params: Params
    masks: Units | None = None
    info: dict[str, Any] = dataclasses.field(default_factory=dict)  # preprocessing, classes, variant, provenance

    def __call__(self, images: Any) -> jax.Array:
        """Logits [B, C] of images [B, image, image, channels], or [B, channels, image, image] as PyTorch has them.

        Floating-point images are normalised ones. Integer images are raw pixels; they are normalised as
        `preprocessing` says. Raises UserError for other shapes.
        """
        images = as_images(images, self.dims.image, self.dims.channels)
        return self.apply(self.params, normalise(images, self.preprocessing))

    def apply(self, params: Params, images: Any, masks: Units | None = None) -> jax.Array:
        """Logits [B, C] of normalised images [B, image, image, channels]; `masks` default to the model's own.

        A model without classes gives features [B, D], the mean over its class tokens.
        """
        return _apply(self.dims, params, images, self.masks if masks is None else masks)

    def logits(self, params: Params, images: Any, dtype: Any = None) -> jax.Array:
        """Logits [B, C] as `apply`, to be traced inside a larger function: the protocol of a teacher."""
        return vit.forward(self.dims, params, images, self.masks, dtype=dtype).mean(1)

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What the model expects of its images; None where nothing is known."""
        facts = self.info.get("preprocessing")
        return None if facts is None else Preprocessing.from_json(facts)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of the logits; () where they are not known."""
        return tuple(self.info.get("classes") or ())

    def preprocess(self, images: Any) -> np.ndarray:
        """float32 [B, image, image, channels], ready for the model, from photographs.

        `images`: a sequence of PIL images, uint8 arrays [H, W, channels] or paths, or one of them. Each is turned
        upright, resized, cropped and normalised as the model was evaluated. Raises UserError for a file that is no
        image, and for a model that does not know its preprocessing.
        """
        if self.preprocessing is None:
            raise UserError('the model does not know its preprocessing; set model.info["preprocessing"]')
        return preprocess(images, self.preprocessing)

    def compact(self) -> "Model":
        """The smaller dense model that the masks leave; the model itself when it has none."""
        if self.masks is None:
            return self
        return Model(*reshape(self.params, self.masks, self.dims), info=self.info)

    def save(self, directory: str | pathlib.Path) -> None:
        """Write a model directory; see `save_model`."""
        save_model(directory, self)

    def summary(self) -> str:
        """A table of the widths of every block, with parameters and MACs, for people."""
        return describe(self.dims, self.masks)

    def __repr__(self) -> str:
        return f"Model({one_line(self.dims, self.masks, self.info.get('variant'))})"


@functools.partial(jax.jit, static_argnums=0)
def _apply(dims: ViTDims, params: Params, images: jax.Array, masks: Units | None) -> jax.Array:
    return vit.forward(dims, params, images, masks).mean(1)


class _Facts:
    """`Model.info` as JAX wants what is no array: comparable and hashable, by content."""

    def __init__(self, info: dict[str, Any]) -> None:
        self.info = info
        self._key = json.dumps(info, sort_keys=True, default=repr)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Facts) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return self._key


jax.tree_util.register_pytree_with_keys(
    Model,
    lambda m: (
        ((jax.tree_util.GetAttrKey("params"), m.params), (jax.tree_util.GetAttrKey("masks"), m.masks)),
        (m.dims, _Facts(m.info)),
    ),
    lambda facts, leaves: Model(facts[0], *leaves, facts[1].info),  # type: ignore[call-arg]
)


def save_model(directory: str | pathlib.Path, model: Model) -> None:
    """Write a MODEL_DIR: model.json, params/ (Orbax), masks.npz when there are masks. Atomic.

    A model directory that stands there is replaced, other files in it stay. Raises UserError for any other directory
    that is not empty, and for a file.
    """
    masks = None if model.masks is None else check_masks(model.masks, model.dims)
    _save(directory, model, {"family": "vit", "masked": masks is not None}, masks)


def save_regnet(directory: str | pathlib.Path, model: RegNet) -> None:
    """Write the directory of a CNN teacher: model.json and params/. As `save_model`."""
    _save(directory, model, {"family": "regnet"}, None)


def _save(directory: str | pathlib.Path, model: Model | RegNet, facts: dict[str, Any], masks: Units | None) -> None:
    _check_params(model.params, model.dims, "save_model")
    check_place(directory)
    with files.new_directory(pathlib.Path(directory), OWN) as beside:
        files.write_json(beside / "model.json", {"format": FORMAT, "dims": model.dims.to_json()} | facts | model.info)
        files.save_arrays(beside / "params", model.params)
        if masks is not None and is_main():
            np.savez(beside / "masks.npz", **masks._asdict())


def check_place(directory: str | pathlib.Path) -> None:
    """UserError unless a model may be written there: to a new or an empty directory, or over another model."""
    path = pathlib.Path(directory)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; a model needs a directory")
    others = sorted(path.iterdir()) if path.is_dir() else []
    if others and not is_model(path):
        raise UserError(
            f"{path} is no model directory and holds {others[0].name}, which a model does not replace; give another "
            "directory"
        )


def is_model(path: pathlib.Path) -> bool:
    """Whether a directory is one that `save_model` or `save_regnet` has written."""
    try:
        info = files.read_json(path / "model.json")
    except UserError:
        return False
    return isinstance(info, dict) and info.get("format") == FORMAT


def load_model(directory: str | pathlib.Path) -> Model:
    """Read a MODEL_DIR. UserError when it is missing, damaged, of another family, or its arrays do not fit its dims."""
    model = load_classifier(directory)
    if not isinstance(model, Model):
        raise UserError(f"{directory} holds a RegNet, which can be a teacher; a Vision Transformer is needed here")
    return model


def load_classifier(directory: str | pathlib.Path) -> Model | RegNet:
    """Read the directory of a Vision Transformer or of a CNN teacher. UserError as `load_model`."""
    path = pathlib.Path(directory)
    files.recover(path)
    if not path.is_dir():
        raise UserError(
            f"{path} is not a model directory: {'not a directory' if path.exists() else 'it does not exist'}"
        )
    info = files.read_json(path / "model.json")
    if not isinstance(info, dict) or info.pop("format", None) != FORMAT:
        raise UserError(f"{path / 'model.json'}: not a model of format {FORMAT}")
    family, values, masked = info.pop("family", "vit"), info.pop("dims", {}), info.pop("masked", False)
    dims = RegNetDims.from_json(values) if family == "regnet" else ViTDims.from_json(values)
    params = files.load_arrays(path / "params")
    _check_params(params, dims, str(path / "params"))
    if isinstance(dims, RegNetDims):
        return RegNet(dims, params, info)
    masks = None
    if masked:
        try:
            with np.load(path / "masks.npz", allow_pickle=False) as arrays:
                masks = check_masks(Units(**{name: arrays[name] for name in arrays.files}), dims)
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path / 'masks.npz'} is missing or damaged: {error}") from error
    return Model(dims, params, masks, info)


def _check_params(params: Params, dims: ViTDims | RegNetDims, where: str) -> None:
    wanted = regnet_shapes(dims) if isinstance(dims, RegNetDims) else vit.shapes(dims)
    expected = {path: leaf.shape for path, leaf in groups.flatten(wanted)}
    found = {path: np.shape(leaf) for path, leaf in groups.flatten(params)}
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise UserError(
                f"{where}: {path} has shape {found.get(path, 'none (missing)')}, "
                f"the dims ask for {expected.get(path, 'no such parameter')}"
            )
    for path, leaf in groups.flatten(params):
        if not np.isfinite(np.asarray(leaf)).all():
            raise UserError(f"{where}: {path} holds values that are not finite")
