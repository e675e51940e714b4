"""A model, and its directory on disk: `load_model` and `save_model`."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nvit_jax import files, paths
from nvit_jax.errors import UserError, first_line
from nvit_jax.model import fitting, groups, vit
from nvit_jax.model.dims import KINDS, Units, ViTDims
from nvit_jax.model.groups import Params
from nvit_jax.model.masks import check_masks
from nvit_jax.model.parts import forward_in_parts
from nvit_jax.model.preprocessing import Preprocessing, as_images, normalise, preprocess
from nvit_jax.model.regnet import RegNet, RegNetDims, regnet_shapes
from nvit_jax.model.reshape import reshape
from nvit_jax.model.sizes import Size
from nvit_jax.model.summary import describe, one_line
from nvit_jax.parallel import fetch, is_main
from nvit_jax.schema import ANYTHING, Choice, Each, Flag, Maybe, Number, Record, Shape, Sides, Table, Text, whole

FORMAT = 1
_MODEL = f"a model of format {FORMAT}"
OWN = ("masks.npz", "model.json", "params")  # what a model directory holds; anything else in it is not ours

_PREPROCESSING = Record(
    {"size": Sides(whole(1)), "scale": Number(), "mean": Each(Number()), "std": Each(Number())},
    {"resize": Maybe(Sides(whole(1))), "interpolation": Maybe(Text())},
)
_SIZE = whole(0, 2**24)
_TYPES: dict[Any, Shape] = {
    int: _SIZE,
    Size: Sides(_SIZE),
    float: Number(),
    bool: Flag(),
    str: Text(),
    tuple[int, ...]: Each(_SIZE),
}
_DIMS = {
    family: Record({}, {field.name: _TYPES[field.type] for field in dataclasses.fields(dims)})
    for family, dims in (("vit", ViTDims), ("regnet", RegNetDims))
}
_FACTS = Record(  # model.json
    {"format": Choice((FORMAT,)), "dims": Table(ANYTHING)},
    {
        "family": Choice(("vit", "regnet")),
        "masked": Flag(),
        "checksum": Maybe(whole(0)),
        "preprocessing": Maybe(_PREPROCESSING),
        "classes": Maybe(Each(Text())),
        "variant": Maybe(Text()),
        "provenance": Maybe(Table(ANYTHING)),
    },
)


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

    def __post_init__(self) -> None:
        """UserError for dims that are none; parameters and masks are looked at where they are used."""
        if not isinstance(self.dims, ViTDims):
            raise UserError(f" is a {type(self.dims).__name__}; it must be ViTDims, such as nvit.preset gives", "dims")

    def __call__(self, images: Any) -> jax.Array:
        """Logits [B, C] of images [B, height, width, channels], or [B, channels, height, width] as PyTorch has them.

        Floating-point images are normalised ones. Integer images are raw pixels; they are normalised as
        `preprocessing` says. Raises UserError for other shapes.
        """
        images = as_images(images, self.dims.image, self.dims.channels)
        if not len(images):
            raise UserError(": there are none", "images")
        return self._run(_in_parts, self.params, normalise(images, self.preprocessing), self.masks)

    def apply(self, params: Params, images: Any, masks: Units | None = None) -> jax.Array:
        """Logits [B, C] of normalised images [B, height, width, channels]; `masks` default to the model's own.

        A model without classes gives features [B, D], the mean over its class tokens.
        """
        return self._run(_at_once, params, images, self.masks if masks is None else masks)

    def _run(self, forward: Callable[..., jax.Array], params: Params, images: Any, masks: Units | None) -> jax.Array:
        if masks is not None:  # their values cannot be seen any more inside of what is compiled
            fitting.check_masks(masks, self.dims, len(images))
        try:
            return forward(self.dims, params, images, masks)
        except Exception:  # such as JAX has for what is no array, and Flax for what is missing
            check_params(params, self.dims, "params")
            raise

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
def _at_once(dims: ViTDims, params: Params, images: jax.Array, masks: Units | None) -> jax.Array:
    return vit.forward(dims, params, images, masks).mean(1)


@functools.partial(jax.jit, static_argnums=0)
def _in_parts(dims: ViTDims, params: Params, images: jax.Array, masks: Units | None) -> jax.Array:
    """As `_at_once`, for those who want no gradient of it."""
    if masks is not None and masks.embed.ndim > 1:  # per sample
        return _at_once(dims, params, images, masks)
    return forward_in_parts(lambda rows: _at_once(dims, params, rows, masks), dims, images)


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

    model.json holds a checksum of the parameters, so that damage is found when they are read.

    A model directory that stands there is replaced, other files in it stay. Raises UserError for any other directory
    that is not empty, and for a file.
    """
    masks = None if model.masks is None else check_masks(model.masks, model.dims)
    _save(directory, model, {"family": "vit", "masked": masks is not None}, masks)


def save_regnet(directory: str | pathlib.Path, model: RegNet) -> None:
    """Write the directory of a CNN teacher: model.json and params/. As `save_model`."""
    _save(directory, model, {"family": "regnet"}, None)


def _save(directory: str | pathlib.Path, model: Model | RegNet, facts: dict[str, Any], masks: Units | None) -> None:
    params = fetch(model.params)
    check_shapes(params, model.dims, "save_model")
    check_weights(params, "save_model")
    _check_info(model.info, model.dims)
    try:
        json.dumps(model.info)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"save_model: info cannot be written as JSON: {first_line(error)}") from error
    check_place(directory)
    facts = {"format": FORMAT, "dims": model.dims.to_json(), "checksum": files.checksum(params)} | facts
    with files.new_directory(pathlib.Path(directory), OWN) as beside:
        files.write_json(beside / "model.json", facts | model.info | facts)  # in this order, and facts hold
        files.save_arrays(beside / "params", params)
        if masks is not None and is_main():
            np.savez(beside / "masks.npz", **masks._asdict())


def check_place(directory: str | pathlib.Path) -> None:
    """UserError unless a model may be written there: to a new or an empty directory, or over another model."""
    path = paths.for_writing(directory)
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
    path = paths.named(directory)
    if (found := paths.kind(path)) not in (None, "a directory"):
        raise UserError(f"{path} is not a model directory: it is {found}, not a directory")
    files.recover(path)
    if paths.kind(path) is None:
        raise UserError(f"{path} is not a model directory: it does not exist")
    info = files.read_json(path / "model.json", _FACTS, _MODEL)
    info.pop("format")
    family, values, masked = info.pop("family", "vit"), info.pop("dims"), info.pop("masked", False)
    files.check_shape(path / "model.json", {"dims": values}, Record({"dims": _DIMS[family]}), _MODEL)
    told = info.pop("checksum", None)  # directories written before 0.8 have none
    with _named(path / "model.json"):
        dims = RegNetDims.from_json(values) if family == "regnet" else ViTDims.from_json(values)
        _check_info(info, dims)
    params = files.load_arrays(path / "params")
    check_shapes(params, dims, str(path / "params"))
    if told is not None and files.checksum(params) != told:
        raise UserError(f"{path / 'params'} is damaged: the checksum in model.json is another; make or copy it anew")
    check_weights(params, str(path / "params"))
    if isinstance(dims, RegNetDims):
        return RegNet(dims, params, info)
    masks = None
    if not masked and (path / "masks.npz").exists():
        raise UserError(f"{path} holds masks.npz, and model.json says masked=false; move it away, or set masked=true")
    if masked:
        with paths.opened(path / "masks.npz") as opened:
            try:
                with zipfile.ZipFile(opened), np.load(opened, allow_pickle=False) as arrays:
                    if set(arrays.files) != set(KINDS):
                        raise UserError(f"it holds {', '.join(arrays.files)}; masks are {', '.join(KINDS)}")
                    masks = check_masks(Units(**{name: arrays[name] for name in KINDS}), dims)
            except (OSError, ValueError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
                raise UserError(f"{path / 'masks.npz'} is missing or damaged: {first_line(error)}") from error
    return Model(dims, params, masks, info)


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
    """Errors about what a file says begin with its name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error.__cause__


def _check_info(info: dict[str, Any], dims: ViTDims | RegNetDims) -> None:
    """UserError unless the known preprocessing makes images for the model, and all classes or none have names."""
    names, facts = info.get("classes"), info.get("preprocessing")
    if names and len(names) != dims.classes:
        raise UserError(f"classes names {len(names)} classes, the model has {dims.classes}; name all of them, or none")
    if facts is None:
        return
    preprocessing = Preprocessing.from_json(facts)
    if isinstance(dims, ViTDims):
        preprocessing.check_for(dims.image, dims.channels)


@functools.lru_cache(maxsize=64)
def _expected(dims: ViTDims | RegNetDims) -> dict[str, tuple[int, ...]]:
    """Shapes by path."""
    wanted = regnet_shapes(dims) if isinstance(dims, RegNetDims) else vit.shapes(dims)
    return {path: leaf.shape for path, leaf in groups.flatten(wanted)}


def check_params(params: Params, dims: ViTDims, where: str) -> None:
    """UserError for parameters of other shapes or types than the dims'; their values are not looked at."""
    check_shapes(params, dims, where)
    for path, leaf in groups.flatten(params):
        _check_type(leaf, path, where)


def check_shapes(params: Params, dims: ViTDims | RegNetDims, where: str) -> None:
    """UserError that names the first parameter which is missing, surplus or of another shape than the dims ask for."""
    if not isinstance(params, Mapping):
        raise UserError(f"{where}: a {type(params).__name__}; parameters are nested dicts of arrays")
    expected = _expected(dims)
    found = {path: np.shape(leaf) for path, leaf in groups.flatten(params)}
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise UserError(
                f"{where}: {path} has shape {found.get(path, 'none (missing)')}, "
                f"the dims ask for {expected.get(path, 'no such parameter')}"
            )


def check_weights(params: Params, where: str) -> None:
    """UserError that names the first parameter which holds NaN or infinity."""
    for path, leaf in groups.flatten(params):
        _check_type(leaf, path, where)
        values = np.asarray(leaf)
        if bad := int(np.size(values) - np.isfinite(values).sum()):
            raise UserError(f"{where}: {path} holds values that are not finite ({bad:,} of {np.size(values):,})")


def _check_type(leaf: Any, path: str, where: str) -> None:
    """ "V" is NumPy's kind of bfloat16."""
    if not hasattr(leaf, "dtype") or np.dtype(leaf.dtype).kind not in "fV":
        what = getattr(leaf, "dtype", type(leaf).__name__)
        raise UserError(f"{where}: {path} is of type {what}; parameters are arrays of floating-point numbers")
