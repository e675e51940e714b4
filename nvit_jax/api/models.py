"""load and convert: models from files; reshape: a model from its masks."""

from pathlib import Path
from typing import Any

from nvit_jax.api.arguments import checked
from nvit_jax.errors import UserError
from nvit_jax.formats.convert import Options, convert_checkpoint
from nvit_jax.formats.convert import convert as convert_in_memory
from nvit_jax.formats.weights import find_weights
from nvit_jax.model.dims import Units
from nvit_jax.model.directory import Model
from nvit_jax.model.directory import load_classifier as load_directory
from nvit_jax.model.masks import check_masks
from nvit_jax.model.regnet import RegNet
from nvit_jax.model.sizes import Size
from nvit_jax.paths import named


@checked
def load(
    path: str | Path,
    *,
    variant: str | None = None,
    image: Size | None = None,
    classes: int | None = None,
    heads: int | None = None,
    entry: str | None = None,
) -> Model:
    """A Vision Transformer from a model directory, a checkpoint file, or a Hugging Face snapshot folder.

    A checkpoint (.pth, .pt, .bin, .ckpt, .safetensors, .npz) is converted in memory; nothing is written.

    Args:
      variant: a published model that it must be, such as "deit_small": publishers normalise pixels differently.
      image: interpolate the position embeddings to another image size: one side, or (height, width).
      classes: put a new classifier of zeros there, to be trained; 0: leave the classifier out, features come out.
      heads: heads of a block, where neither a config.json beside the file nor its published widths tell.
      entry: the part of a .pth file, such as "model" or "model_ema" (the default where it exists), or a prefix.

    Raises UserError for what is missing, damaged, or no plain Vision Transformer.

        >>> nvit.load("deit_tiny_patch16_224.pth")
        Model(deit_tiny, 12 blocks of embed 192, 224 x 224 x 3 -> 1000 classes, 5.72 M parameters, 1.26 GMACs)
    """
    model = load_classifier(path, variant=variant, image=image, classes=classes, heads=heads, entry=entry)
    if not isinstance(model, Model):
        raise UserError(f"{path} holds a RegNet, which can be a teacher; nvit.load_classifier reads it")
    return model


@checked
def load_classifier(
    path: str | Path,
    *,
    variant: str | None = None,
    image: Size | None = None,
    classes: int | None = None,
    heads: int | None = None,
    entry: str | None = None,
) -> Model | RegNet:
    """As `load`, and CNN teachers (RegNetY), too."""
    place, options = named(path), Options(variant, image, heads, classes, entry)
    if place.is_dir() and (place / "model.json").exists():
        if given := [name for name, value in options._asdict().items() if value is not None]:
            raise UserError(f" is for checkpoints; {place} is a model directory", given[0])
        return load_directory(place)
    if not place.exists():
        raise UserError(f"{place}: there is no such file or directory")
    return convert_in_memory(find_weights(place) if place.is_dir() else place, options).model


@checked
def convert(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = False,
    variant: str | None = None,
    image: Size | None = None,
    classes: int | None = None,
    heads: int | None = None,
    entry: str | None = None,
    say: Any = print,
) -> Model | RegNet:
    """Write the model directory of a checkpoint; the options are those of `load`.

    A model directory that is there is replaced only with `overwrite`. `verify` runs PyTorch on the file's own tensors
    and JAX on the directory just written, on the same images. `say` takes each line of what was found.
    """
    options, path = Options(variant, image, heads, classes, entry), named(checkpoint)
    if path.is_dir():
        path = find_weights(path)
    return convert_checkpoint(path, directory, options, overwrite=overwrite, verify=verify, say=say).model


@checked
def reshape(model: Model, masks: Units | None = None) -> Model:
    """The smaller dense model that masks leave (the model's own where none are given): the same function.

    Raises UserError when they do not fit the model or leave no dense one.
    """
    if masks is None and model.masks is None:
        raise UserError(": the model has none; give some", "masks")
    masks = check_masks(model.masks if masks is None else masks, model.dims)  # type: ignore[arg-type]
    return Model(model.dims, model.params, masks, model.info).compact()
