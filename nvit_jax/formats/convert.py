"""A checkpoint made elsewhere -> a model directory. Every tensor is accounted for, every value checked."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import nvit_jax
from nvit_jax.errors import UserError
from nvit_jax.formats import interchange, layouts
from nvit_jax.formats.canonical import Canonical, canonical, nvit_masks
from nvit_jax.formats.detect import (
    PREPROCESSING,
    Options,
    Shapes,
    find_dims,
    find_family,
    find_preprocessing,
    find_variant,
)
from nvit_jax.formats.weights import Tensors, open_checkpoint, read_beside
from nvit_jax.model import positions, regnet
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
from nvit_jax.model.reshape import reshape

Read = Callable[[str], np.ndarray]


class Converted(NamedTuple):
    """A model, and what was found out on the way, a line each."""

    model: Model | regnet.RegNet
    notes: list[str]


class _Opened(NamedTuple):
    """The same, with the file's tensors under PyTorch's names while the file is open."""

    converted: Converted
    shapes: Shapes
    read: Read


def convert(checkpoint: str | pathlib.Path, options: Options | None = None, *, dtype: Any = np.float32) -> Converted:
    """Read a checkpoint of any layout of layouts.LAYOUTS, an export of this project, or the official regnety_160.

    Raises UserError for a file that is damaged, of another family, with names or shapes that do not fit, or with
    values that are not finite.
    """
    with _opened(pathlib.Path(checkpoint), options or Options(), dtype) as opened:
        return opened.converted


@contextlib.contextmanager
def _opened(path: pathlib.Path, options: Options, dtype: Any) -> Iterator[_Opened]:
    """The file's tensors can be read inside the block."""
    with open_checkpoint(path, options.entry) as tensors:
        regnet = "s1.b1.conv1.conv.weight" in tensors.shapes
        opened = (_regnet if regnet else _vit)(path, tensors, options, dtype)
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
    out = pathlib.Path(out)
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
        difference, largest = verify_model(checkpoint, load_classifier(out), options)
        say(f"verified: largest difference to PyTorch {difference:.1e} on logits up to {largest:.2f}, 4 images")
    return found


def verify_model(
    checkpoint: str | pathlib.Path, model: Model | regnet.RegNet, options: Options | None = None
) -> tuple[float, float]:
    """(largest absolute difference of the logits, largest absolute logit) on 4 random images: PyTorch, on the file's
    own tensors (of a masked model: on those that its masks leave), against Flax at full float32 precision. UserError
    without PyTorch."""
    try:
        import torch

        from nvit_jax.formats import torch_regnet, torch_vit
    except ImportError as error:
        raise UserError(f"--verify needs PyTorch: pip install torch ({error})") from error
    with _opened(pathlib.Path(checkpoint), options or Options(), np.float32) as opened:
        state = {name: np.array(opened.read(name)) for name in opened.shapes}
    dims = model.dims
    if isinstance(model, Model) and model.masks is not None:  # PyTorch has no masks: it runs what they leave
        dims, compact = reshape(model.params, model.masks, model.dims)
        state = interchange.to_torch(dims, compact)
    tensors = {name: torch.from_numpy(value).float() for name, value in state.items()}
    size, channels = model.info["preprocessing"]["size"], model.dims.channels
    images = np.random.default_rng(0).standard_normal((4, size, size, channels)).astype(np.float32)
    with torch.inference_mode():
        inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        if isinstance(dims, regnet.RegNetDims):
            theirs = torch_regnet.forward(tensors, inputs).numpy()
        else:
            twin = torch_vit.ViT(dims.to_json())
            twin.load_state_dict(tensors)
            theirs = twin.eval()(inputs).numpy()
    with jax.default_matmul_precision("float32"):
        ours = np.asarray(jax.jit(model.logits)(model.params, images))
    return float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())


def _info(
    path: pathlib.Path, variant: str | None, pre: Preprocessing, classes: list[str], **facts: Any
) -> dict[str, Any]:
    return {
        "variant": variant,
        "preprocessing": pre.to_json(),
        "classes": classes,
        "provenance": {"nvit_jax": nvit_jax.__version__, "checkpoint": path.name} | facts,
    }


# -------------------------------------------------------------------------------------------------- ViT


def _vit(path: pathlib.Path, tensors: Tensors, options: Options, dtype: Any) -> _Opened:
    if "nvit_jax" in tensors.extra:
        return _own(path, tensors, dtype)
    file = canonical(tensors, str(path))
    shapes, read, notes = file.shapes, file.read, []
    beside, processor = read_beside(path, "config.json"), read_beside(path, "preprocessor_config.json")
    family = find_family(path, file, beside, options)
    if "pos_embed" not in shapes and file.layout is layouts.BIG_VISION:
        shapes, read = positions.with_sincos(shapes, read)
        notes.append("positions are big_vision's fixed sines and cosines")
    if {"dist_token", "head.weight"} <= shapes.keys() and "head_dist.weight" not in shapes:
        shapes, read = _as_register(shapes, read)
        notes.append("nothing classifies from the distillation token: it is a register here, the function is the same")
    shapes, read, replaced = _with_classifier(shapes, read, options.classes)
    notes += replaced
    dims = find_dims(str(path), file, shapes, tensors.extra, beside, options)
    if options.image is not None and options.image != dims.image:
        dims, shapes, read, note = positions.interpolated(dims, shapes, read, options.image)
        notes.append(note)
    params = interchange.from_torch(dims, shapes, read, str(path), dtype)
    variant = find_variant(path, dims, family, options)
    pre = find_preprocessing(family, dims, beside, processor)
    labels = beside.get("id2label") or {}
    classes = [labels[str(i)] for i in range(len(labels))] if len(labels) == dims.classes else []
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
    return _Opened(Converted(Model(dims, params, masks, info), notes), shapes, read)


def describe(dims: ViTDims, variant: str | None = None) -> str:
    """Sizes in words."""

    def widths(values: tuple[int, ...]) -> str:
        return str(values[0]) if len(set(values)) == 1 else f"{min(values)}..{max(values)}"

    return (
        f"{variant or 'no published size'}: embed {dims.embed}, {dims.depth} blocks, heads {widths(dims.heads)} "
        f"(qk {widths(dims.qk)}, v {widths(dims.v)}), mlp {widths(dims.mlp)}, patch {dims.patch}, image {dims.image}, "
        f"{dims.classes} classes, {count_params(dims):,} parameters, {count_macs(dims) / 1e9:.2f} GMACs"
    )


def _own(path: pathlib.Path, tensors: Tensors, dtype: Any) -> _Opened:
    """A file that this project exported: its metadata says all."""
    try:
        facts = json.loads(tensors.extra["nvit_jax"])
        dims = ViTDims.from_json(facts["dims"])
        pre = Preprocessing.from_json(facts["preprocessing"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its metadata is damaged: {error!r}") from error
    params = interchange.from_torch(dims, tensors.shapes, tensors.read, str(path), dtype)
    info = _info(path, facts.get("variant"), pre, facts.get("classes") or [], layout="nvit_jax")
    info |= {name: facts[name] for name in ("sparsity",) if name in facts}
    notes = [f"{path.name}: exported by nvit_jax; {describe(dims, facts.get('variant'))}"]
    return _Opened(Converted(Model(dims, params, None, info), notes), tensors.shapes, tensors.read)


def _as_register(shapes: Shapes, read: Read) -> tuple[Shapes, Read]:
    names = {("reg_token" if n == "dist_token" else n): n for n in shapes}
    return {new: shapes[old] for new, old in names.items()}, lambda name: read(names[name])


def _with_classifier(shapes: Shapes, read: Read, classes: int | None) -> tuple[Shapes, Read, list[str]]:
    """A new classifier of zeros in the place of the file's, or where it has none."""
    if classes is None:
        return shapes, read, []
    names = ["head"] + ["head_dist"] * ("dist_token" in shapes)
    old = shapes.get("head.weight")
    if "pre_logits.fc.weight" in shapes:
        width = shapes["pre_logits.fc.weight"][0]
    else:
        width = shapes.get("patch_embed.proj.weight", (0,))[0]
    new = {f"{n}.weight": (classes, width) for n in names} | {f"{n}.bias": (classes,) for n in names}
    said = f"the classifier of {old[0]} classes is replaced" if old else "there is no classifier"
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


def _regnet(path: pathlib.Path, tensors: Tensors, options: Options, dtype: Any) -> _Opened:
    if any((options.variant, options.image, options.heads, options.classes)):
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
