"""A checkpoint made elsewhere -> a model directory. Every tensor is accounted for, every value checked."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import nvit_jax
from nvit_jax.errors import UserError
from nvit_jax.files import check_shape, parse_json
from nvit_jax.formats import families, folder, interchange, layouts, open_clip, verify
from nvit_jax.formats.canonical import Canonical, canonical, nvit_masks
from nvit_jax.formats.configs import Said, read_config
from nvit_jax.formats.detect import Options, Shapes, find_dims, find_family, find_variant, read_periods
from nvit_jax.formats.facts import Facts, read_beside, read_processor
from nvit_jax.formats.heads import per_head
from nvit_jax.formats.preprocessors import PREPROCESSING, find_preprocessing, made_size
from nvit_jax.formats.tensors import Tensors
from nvit_jax.formats.weights import find_weights, open_checkpoint
from nvit_jax.model import positions, regnet, sizes
from nvit_jax.model.dims import Units, ViTDims, count_macs, count_params
from nvit_jax.model.directory import (
    Model,
    check_place,
    is_model,
    load_classifier,
    save_model,
    save_regnet,
)
from nvit_jax.model.groups import flatten
from nvit_jax.model.masks import check_masks, full_masks
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.model.sizes import Size
from nvit_jax.schema import ANYTHING, Each, Maybe, Record, Table, Text, whole

Read = Callable[[str], np.ndarray]
CLASSIFIER = ("head", "head_dist", "head_mean", "pre_logits")  # what tensors of classifiers are called


class Converted(NamedTuple):
    """A model, and what was found out on the way, a line each."""

    model: Model | regnet.RegNet
    notes: list[str]


class _Opened(NamedTuple):
    """The same, with the file's tensors under PyTorch's names while the file is open."""

    converted: Converted
    shapes: Shapes
    read: Read
    file: Canonical | None = None  # of a ViT of others
    said: Said = Said()


def convert(checkpoint: str | pathlib.Path, options: Options | None = None, *, dtype: Any = np.float32) -> Converted:
    """Read a checkpoint of any layout of layouts.LAYOUTS, an export of this project, or the official regnety_160.

    A folder stands for the one checkpoint in it. Raises UserError for a file that is damaged, of another family, with
    names or shapes that do not fit, or with values that are not finite.
    """
    with _opened(pathlib.Path(checkpoint), options or Options(), dtype) as opened:
        return opened.converted


@contextlib.contextmanager
def _opened(path: pathlib.Path, options: Options, dtype: Any) -> Iterator[_Opened]:
    """The file's tensors can be read inside the block."""
    path = find_weights(path) if path.is_dir() else path
    with open_checkpoint(path, options.entry) as tensors:
        tensors, is_regnet = _without_root(tensors)
        opened = (_regnet if is_regnet else _vit)(path, tensors, options, dtype)
        for name, leaf in flatten(opened.converted.model.params):
            if not np.isfinite(leaf).all():
                raise UserError(f"{path}: {name} holds values that are not finite")
        yield opened


def convert_checkpoint(
    checkpoint: str | pathlib.Path,
    out: str | pathlib.Path,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    verify: bool = False,
    say: Callable[[str], None] = print,
) -> Converted:
    """Convert and write a model directory.

    A model that stands at `out` is replaced only with `overwrite`, and only at the end; what else lies there stays.
    UserError for an `out` that is a file, or a directory of other things.
    `verify` runs PyTorch on the file's own tensors and Flax on the directory just written, on the same images.
    """
    checkpoint, out = pathlib.Path(checkpoint), pathlib.Path(out)
    check_place(out)
    if is_model(out) and not overwrite:
        raise UserError(f"--out={out} exists; --overwrite replaces it")
    found = convert(checkpoint, options)  # the file is closed, and its memory returned, before anything is written
    for note in found.notes:
        say(note)
    if isinstance(found.model, regnet.RegNet):
        save_regnet(out, found.model)
    else:
        save_model(out, found.model)
    if verify:
        say(_verified(checkpoint, load_classifier(out), options))
    return found


def verify_model(
    checkpoint: str | pathlib.Path, model: Model | regnet.RegNet, options: Options | None = None
) -> tuple[float, float]:
    """(largest absolute difference of the logits, largest absolute logit) on 4 random images: PyTorch, on the file's
    own tensors, against Flax at full float32 precision. See `verify.compare`. UserError without PyTorch."""
    found = _compared(pathlib.Path(checkpoint), model, options)
    return found.difference, found.largest


def _compared(path: pathlib.Path, model: Model | regnet.RegNet, options: Options | None) -> "verify.Compared":
    path = find_weights(path) if path.is_dir() else path
    options = options or Options()
    changed = options.image is not None or options.classes is not None
    with _opened(path, options, np.float32) as opened:
        state = {name: np.array(opened.read(name)) for name in opened.shapes}
        own = (
            None
            if changed or opened.file is None
            else {n: np.array(opened.file.own.read(n)) for n in opened.file.own.shapes}
        )
        return verify.compare(path, model, state, own, opened.said)


def _verified(path: pathlib.Path, model: Model | regnet.RegNet, options: Options | None) -> str:
    found = _compared(path, model, options)
    if found.largest == 0:
        return "not verified: logits are all 0 (a classifier of zeros), and the check says nothing"
    numbers = f"{found.difference:.1e} on logits up to {found.largest:.2f}"
    return f"verified: largest difference to PyTorch {numbers}, 4 images; {found.against}"


def _info(
    path: pathlib.Path, variant: str | None, pre: Preprocessing | None, classes: list[str], **facts: Any
) -> dict[str, Any]:
    return {
        "variant": variant,
        "preprocessing": None if pre is None else pre.to_json(),
        "classes": classes,
        "provenance": {"nvit_jax": nvit_jax.__version__, "checkpoint": path.name} | facts,
    }


# -------------------------------------------------------------------------------------------------- ViT


def _vit(path: pathlib.Path, tensors: Tensors, options: Options, dtype: Any) -> _Opened:
    if "nvit_jax" in tensors.extra:
        return _own(path, tensors, options, dtype)
    try:
        file = canonical(tensors, str(path), options.entry)
    except UserError:
        families.check_type(read_beside(path, "config.json"))  # which may tell the family
        raise
    config, processor = open_clip.config_beside(path, file.layout), None
    if file.layout in (layouts.OPEN_CLIP, *layouts.OPEN_CLIP_TIMMS):
        said = open_clip.read_facts(path, file, config, tensors.extra)
    else:
        said = read_config(path, tensors.extra)
    if config is None:
        config, processor = read_beside(path, "config.json"), read_processor(path)
    shapes = {name: shape for name, shape in file.shapes.items() if name != "reg_token" or 0 not in shape}
    read, notes = file.read, list(said.notes)
    shapes, said = read_periods(str(path), shapes, read, said)
    family = find_family(path, file, said, options)
    shapes, read, filled = _with_zero_biases(shapes, read)
    notes += filled
    if "pos_embed" not in shapes and file.layout is layouts.BIG_VISION:
        shapes, read = positions.with_sincos(shapes, read)
        notes.append("positions are big_vision's fixed sines and cosines")
    if {"dist_token", "head.weight"} <= shapes.keys() and "head_dist.weight" not in shapes:
        shapes, read = _renamed(shapes, read, "dist_token", "reg_token")
        notes.append("nothing classifies from the distillation token: it is a register here, the function is the same")
    if said.norm_after_pool:
        shapes, read = _renamed(shapes, read, "norm.", "fc_norm.")
    shapes, read, replaced = _with_classifier(shapes, read, options.classes)
    notes += replaced
    names = [name for name in (said.architecture, path.stem) if name]
    for name in names:
        families.refuse_name(name, str(path))
    dims = find_dims(str(path), file, shapes, tensors.extra, said, options, names)
    if said.image is not None and said.image != dims.image and not dims.divides(said.image):
        stated, patch = sizes.words(said.image), sizes.words(dims.patch)
        notes.append(f"{stated} is not divisible by patch {patch}: the model takes {sizes.words(dims.image)} pixels")
    image, why = _image(file, dims, said, processor, options)
    if image != dims.image:
        dims, shapes, read, note = positions.interpolated(dims, shapes, read, image, file.layout.bicubic)
        notes.append(note + why)
    if dims.gated and said.activation is None:
        notes.append("the mlps have gates, of which nothing beside the file says more: read as SwiGLU, gates first")
    shapes, read = per_head(dims, shapes, read, str(path), neighbours=bool(dims.rotary_grid))
    params = interchange.from_torch(dims, shapes, read, str(path), dtype)
    variant = find_variant(path, dims, family, options)
    pre, odd = find_preprocessing(family, dims.image, dims.channels, config, processor)
    notes += odd
    classes = list(said.classes) if len(said.classes) == dims.classes else []
    if said.classes and not classes:
        notes.append(f"{len(said.classes)} class names are stated, and there are {dims.classes} classes: left out")
    masks = None
    if file.layout is layouts.NVIT_PRUNED:
        masks = _nvit_masks(dims, file)
        notes.append(
            "pruned units are masked; LayerNorm runs over the kept channels, as in the released dense model "
            "(its full-size one normalises over the removed ones, too)"
        )
    reasons: dict[str, list[str]] = {}
    for name, why in file.left_out.items():
        reasons.setdefault(why, []).append(name)
    notes += [f"left out {len(names)} tensor(s), {names[0]} ...: {why}" for why, names in reasons.items()]
    first = f"{path.name}: {file.layout.name}" + (f", entry {tensors.entry!r}" if tensors.entry else "")
    notes.insert(0, f"{first}; {describe(dims, variant)}")
    notes.append(f"preprocessing: {pre.describe()}")
    info = _info(path, variant, pre, classes, layout=file.layout.name)
    return _Opened(Converted(Model(dims, params, masks, info), notes), shapes, read, file, said)


def _image(file: Canonical, dims: ViTDims, said: Said, processor: Facts | None, options: Options) -> tuple[Size, str]:
    """The image that the model is to take, and the words for why.

    A publisher's model that takes any image interpolates its positions to the one that its processor makes.
    """
    if options.image is not None:
        return sizes.size("--image", options.image, 1, 2**14), ""
    if not file.layout.any_image:
        return dims.image, ""
    made = None if processor is None else made_size(processor, said.image or dims.image)
    for size, name in ((made, "preprocessor_config.json"), (said.image, "config.json")):
        if size is not None and dims.divides(size):
            words = sizes.words(size)
            kept = dims.image if isinstance(dims.image, int) else "x".join(map(str, dims.image))
            return size, f", for the {words} pixels of {name}; --image={kept} keeps them"
    return dims.image, ""


def describe(dims: ViTDims, variant: str | None = None) -> str:
    """Sizes in words."""

    def widths(values: tuple[int, ...]) -> str:
        return str(values[0]) if len(set(values)) == 1 else f"{min(values)}..{max(values)}"

    pairs = " pairs" if dims.rotary else ""
    return (
        f"{variant or 'no published size'}: embed {dims.embed}, {dims.depth} blocks, heads {widths(dims.heads)} "
        f"(qk {widths(dims.qk)}{pairs}, v {widths(dims.v)}), mlp {widths(dims.mlp)}, patch {sizes.words(dims.patch)}, "
        f"image {sizes.words(dims.image)}, {dims.classes} classes, {count_params(dims):,} parameters, "
        f"{count_macs(dims) / 1e9:.2f} GMACs"
    )


_EXPORTED = Record(
    {"dims": Table(ANYTHING)},
    {
        "preprocessing": Maybe(Table(ANYTHING)),
        "classes": Maybe(Each(Text())),
        "variant": Maybe(Text()),
        "sparsity": Maybe(Text()),
        "checksum": Maybe(whole(0)),
    },
)


def _own(path: pathlib.Path, tensors: Tensors, options: Options, dtype: Any) -> _Opened:
    """A file that this project exported: its metadata says all but what is to be changed. UserError.

    The names are timm's, or transformers'.
    """
    where = f"{path}: its metadata"
    facts = parse_json(str(tensors.extra["nvit_jax"]), where)
    check_shape(where, facts, _EXPORTED, "what nvit_jax writes")
    try:
        dims, known = ViTDims.from_json(facts["dims"]), facts.get("preprocessing")
        pre = None if known is None else Preprocessing.from_json(known)
        if pre is not None:
            pre.check_for(dims.image, dims.channels)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for name in ("variant", "heads", "entry"):
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name}={getattr(options, name)}: {path} was exported by nvit_jax and says all of itself"
            )
    shapes, read, told = dict(tensors.shapes), tensors.read, facts.get("checksum")
    if told is not None and folder.checksum_of(shapes, read) != told:
        raise UserError(
            f"{path} is damaged: the checksum in its metadata is another; fetch it anew (who changes weights leaves "
            "the checksum out)"
        )
    if "patch_embed.proj.weight" not in shapes:
        file = canonical(tensors, str(path))
        shapes, read = file.shapes, file.read
    shapes, read, notes = _with_classifier(shapes, read, options.classes)
    classes = facts.get("classes") or []
    if options.classes is not None:
        inside = dims.pre_logits if options.classes else 0
        dims, classes = dataclasses.replace(dims, classes=options.classes, pre_logits=inside), []
    wanted = dims.image if options.image is None else sizes.size("--image", options.image, 1, 2**14)
    if wanted != dims.image:
        before = dims.sides
        dims, shapes, read, note = positions.interpolated(dims, shapes, read, wanted)
        if pre is not None:
            resize = pre.resize and sizes.one(
                *(round(n * new / old) for n, new, old in zip(sizes.sides(pre.resize), dims.sides, before, strict=True))
            )
            pre = dataclasses.replace(pre, size=dims.image, resize=resize)
        notes.append(note)
    params = interchange.from_torch(dims, shapes, read, str(path), dtype)
    info = _info(path, facts.get("variant"), pre, classes, layout="nvit_jax")
    info |= {name: facts[name] for name in ("sparsity",) if name in facts}
    notes.insert(0, f"{path.name}: exported by nvit_jax; {describe(dims, facts.get('variant'))}")
    return _Opened(Converted(Model(dims, params, None, info), notes), shapes, read)


def _with_zero_biases(shapes: Shapes, read: Read) -> tuple[Shapes, Read, list[str]]:
    """Layers without biases (proj_bias=False), as such with biases of zeros: the same function."""
    depth = sum(name.endswith(".mlp.fc1.weight") for name in shapes)
    layers = [[f"blocks.{i}.{part}" for i in range(depth)] for part in ("attn.proj", "mlp.fc1", "mlp.fc2")]
    new: Shapes = {}
    patches = [] if "norm_pre.weight" in shapes else [["patch_embed.proj"]]  # CLIP has no bias there
    for group in (*patches, ["head"], *layers):
        weights = [f"{name}.weight" for name in group]
        if all(w in shapes and shapes[w] for w in weights) and not any(f"{name}.bias" in shapes for name in group):
            new |= {f"{name}.bias": shapes[w][:1] for name, w in zip(group, weights, strict=True)}
    if not new:
        return shapes, read, []
    note = f"{next(iter(new))} and others ({len(new)}) are not there: zeros stand for them, the function is the same"
    return shapes | new, lambda name: np.zeros(new[name], np.float32) if name in new else read(name), [note]


def _renamed(shapes: Shapes, read: Read, old: str, new: str) -> tuple[Shapes, Read]:
    """The tensors whose names begin with `old`, under names that begin with `new`."""
    names = {(new + n.removeprefix(old) if n.startswith(old) else n): n for n in shapes}
    return {now: shapes[before] for now, before in names.items()}, lambda name: read(names[name])


_BESIDE = {"head_dist": "dist_token", "head_mean": "head_mean.weight"}  # classifier -> what it is there with


def _with_classifier(shapes: Shapes, read: Read, classes: int | None) -> tuple[Shapes, Read, list[str]]:
    """A new classifier of zeros in the place of the file's, or where it has none. With 0 classes none at all."""
    if classes is None:
        return shapes, read, []
    if not classes:
        own = [name for name in shapes if name.split(".")[0] in CLASSIFIER]
        said = "the classifier is left out: features come out" if own else "there is no classifier"
        return {name: shape for name, shape in shapes.items() if name not in own}, read, [said]
    names = ["head"] + [name for name, mark in _BESIDE.items() if mark in shapes]
    old = shapes.get("head.weight")
    if "pre_logits.fc.weight" in shapes:
        width = shapes["pre_logits.fc.weight"][0]
    else:
        width = shapes.get("patch_embed.proj.weight", (0,))[0]
    new: Shapes = {f"{n}.weight": (classes, width) for n in names}
    new |= {f"{n}.bias": (classes,) for n in names if n != "head_mean"}
    said = f"the classifier of {old[0]} classes is replaced" if old else "there is no classifier"
    if "projection.weight" in shapes:
        shapes = {name: shape for name, shape in shapes.items() if name != "projection.weight"}
        said = "the projection of its features is left out"
    said += f"; a new one of {classes} classes holds zeros and is to be trained"
    return shapes | new, lambda name: np.zeros(new[name], np.float32) if name in new else read(name), [said]


def _nvit_masks(dims: ViTDims, file: Canonical) -> Units:
    found = nvit_masks(file.read, dims.heads)
    masks = full_masks(dims)
    masks.embed[:] = found["embed"]
    for i in range(dims.depth):
        for kind in ("head", "qk", "v", "mlp"):
            getattr(masks, kind)[i] = found[kind][i]
    return check_masks(masks, dims)


# ----------------------------------------------------------------------------------------------- RegNet


def _without_root(tensors: Tensors) -> tuple[Tensors, bool]:
    """The tensors, and whether they are a RegNetY's; then what all of its names begin with ("module.") is gone."""
    mark = "s1.b1.conv1.conv.weight"
    root = next((name.removesuffix(mark) for name in tensors.shapes if name.endswith(mark)), None)
    if root is None or (root and root[-1] not in "./"):
        return tensors, False
    shapes = {name.removeprefix(root): shape for name, shape in tensors.shapes.items() if name.startswith(root)}
    return tensors._replace(shapes=shapes, read=lambda name: tensors.read(root + name)), True


def _regnet(path: pathlib.Path, tensors: Tensors, options: Options, dtype: Any) -> _Opened:
    if any(value is not None for value in (options.variant, options.image, options.heads, options.classes)):
        raise UserError(f"{path} is a RegNetY: --variant, --image, --heads and --classes are for Vision Transformers")
    shapes = {n: s for n, s in tensors.shapes.items() if not n.endswith("num_batches_tracked")}
    try:
        dims = regnet.regnet_dims(shapes)
    except (KeyError, ZeroDivisionError, IndexError) as error:
        raise UserError(f"{path} looks like a RegNetY, but {error.args[0]} is missing") from error
    interchange.check_names(shapes, [name for name, *_ in regnet.regnet_names(dims)], str(path))
    params = regnet.regnet_from_torch(dims, shapes, tensors.read, str(path), dtype)
    variant = "regnety_160" if dims == regnet.RegNetDims() else None
    ratio, interpolation, mean, std = PREPROCESSING["regnet"]
    pre = Preprocessing(224, 255.0, mean, std, round(224 * ratio), interpolation)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    notes = [
        f"{path.name}: {variant or 'a RegNetY'}: stages {dims.widths}, blocks {dims.depths}, {dims.classes} classes, "
        f"{count:,} parameters with the running statistics",
        f"preprocessing: {pre.describe()}",
    ]
    model = regnet.RegNet(dims, params, _info(path, variant, pre, []))
    return _Opened(Converted(model, notes), shapes, tensors.read)
