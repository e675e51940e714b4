"""Models on disk: `load_model` and `save_model`."""

import dataclasses
import functools
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
from nvit_jax.model.regnet import RegNet, RegNetDims, regnet_shapes
from nvit_jax.parallel import is_main

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Model:
    """A Vision Transformer: its dims, its parameters, its masks if it is a masked one, and facts about it."""

    dims: ViTDims
    params: Params
    masks: Units | None = None
    info: dict[str, Any] = dataclasses.field(default_factory=dict)  # preprocessing, classes, variant, provenance

    @functools.cached_property
    def _apply(self) -> Any:
        return jax.jit(lambda params, images, masks: vit.forward(self.dims, params, images, masks).mean(1))

    def logits(self, params: Params, images: Any, dtype: Any = None) -> jax.Array:
        """Logits [B, C] as `apply`, to be traced inside a larger function: the protocol of a teacher."""
        return vit.forward(self.dims, params, images, self.masks, dtype=dtype).mean(1)

    def apply(self, params: Params, images: Any, masks: Units | None = None) -> jax.Array:
        """Logits [B, C] of normalised images [B, image, image, channels]; `masks` default to the model's own.

        A model without classes gives features [B, D], the mean over its class tokens.
        """
        return self._apply(params, images, self.masks if masks is None else masks)


def save_model(directory: str | pathlib.Path, model: Model) -> None:
    """Write a MODEL_DIR: model.json, params/ (Orbax), masks.npz when there are masks. Atomic."""
    masks = None if model.masks is None else check_masks(model.masks, model.dims)
    _save(directory, model, {"family": "vit", "masked": masks is not None}, masks)


def save_regnet(directory: str | pathlib.Path, model: RegNet) -> None:
    """Write the directory of a CNN teacher: model.json and params/. Atomic."""
    _save(directory, model, {"family": "regnet"}, None)


def _save(directory: str | pathlib.Path, model: Model | RegNet, facts: dict[str, Any], masks: Units | None) -> None:
    _check_params(model.params, model.dims, "save_model")
    with files.new_directory(pathlib.Path(directory)) as beside:
        files.write_json(beside / "model.json", {"format": FORMAT, "dims": model.dims.to_json()} | facts | model.info)
        files.save_arrays(beside / "params", model.params)
        if masks is not None and is_main():
            np.savez(beside / "masks.npz", **masks._asdict())


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
