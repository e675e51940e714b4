"""Any checkpoint under timm's names: which layout it has, and every tensor through exactly one rule of its table."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.formats.layouts import (
    BIG_VISION,
    DINO,
    DINO_HEADS,
    LAYOUTS,
    NVIT_PRUNED,
    TIMM,
    VISION_TRANSFORMER,
    Layout,
    Rule,
)
from nvit_jax.formats.weights import Tensors


class Canonical(NamedTuple):
    """A checkpoint under timm's names."""

    layout: Layout
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    left_out: dict[str, str]  # name in the file -> why it is not used
    heads: tuple[int, ...] | None  # where the file's shapes tell


_OTHERS = {  # names that give other families away
    "layer1.0.conv1.weight": "a ResNet",
    "layers.0.blocks.0.attn.relative_position_bias_table": "a Swin Transformer",
    "features.1.0.attn.relative_position_bias_table": "a Swin Transformer",
    "blocks.0.attn.relative_position_bias_table": "a BEiT (relative positions)",
    "stages.0.blocks.0.conv_dw.weight": "a ConvNeXt",
    "downsample_layers.0.0.weight": "a ConvNeXt",
    "blocks.0.mlp.w12.weight": "a ViT with SwiGLU",
    "MAPHead_0/probe": "a ViT with attention pooling",
    "stages.0.blocks.0.conv1.conv.weight": "a convolutional network",
}


def identify(names: Iterable[str], where: str) -> Layout:
    """The layout of a file. UserError that says what else it looks like."""
    names = set(names)
    for mark, family in _OTHERS.items():
        if mark in names:
            raise UserError(f"{where} is {family} ({mark}), not a plain Vision Transformer")
    for layout in LAYOUTS:
        if all(mark in _stripped(layout, names) for mark in layout.marks):
            dino = layout is TIMM and any(re.fullmatch("|".join(DINO_HEADS), n) for n in names)
            return DINO if dino else layout
    shown = ", ".join(sorted(names)[:4])
    raise UserError(f"{where} is not a plain Vision Transformer of a known layout; it holds {shown}, ...")


def _stripped(layout: Layout, names: Iterable[str]) -> dict[str, str]:
    """Name without the layout's prefix -> name in the file."""

    def strip(name: str) -> str:
        return next((name.removeprefix(p) for p in layout.prefixes if name.startswith(p)), name)

    return {strip(name): name for name in names}


def canonical(tensors: Tensors, where: str) -> Canonical:
    """The same tensors under timm's names. Each is used by exactly one rule, or left out for a stated reason.

    UserError for a file of another family, and for names that no rule knows.
    """
    tensors = _unstack(tensors)
    layout = identify(tensors.shapes, where)
    names = _stripped(layout, tensors.shapes)
    made: dict[str, tuple[Rule, tuple[str, ...], int]] = {}  # target -> rule, sources in the file, which result
    used: set[str] = set()
    depth = 1 + max((int(m[1]) for n in names if (m := re.search(r"(?:blocks\.|layers?\.|_)(\d+)[./]", n))), default=0)
    for rule in layout.rules:
        for i in range(depth if "{i}" in rule.sources[0] else 1):
            sources = tuple(s.replace("{i}", str(i)) for s in rule.sources)
            targets = tuple(t.replace("{i}", str(i)) for t in rule.targets)
            if all(s in names and s not in used for s in sources) and not any(t in made for t in targets):
                used.update(sources)
                made |= {t: (rule, tuple(names[s] for s in sources), j) for j, t in enumerate(targets)}
    left_out: dict[str, str] = {}
    for name in sorted(names.keys() - used):
        why = next((text for pattern, text in layout.left_out.items() if re.fullmatch(pattern, name)), None)
        if why == "all ones" and not (tensors.read(names[name]) == 1).all():
            raise UserError(f"{where}: {name} is not all ones; pruned tokens are not supported")
        if why:
            left_out[name] = why
        else:  # interchange.check_names reports it, with what is missing
            made[name] = (Rule((name,), (name,)), (names[name],), 0)

    def read(target: str) -> np.ndarray:
        rule, sources, which = made[target]
        arrays = tuple(tensors.read(s) for s in sources)
        return arrays[0] if rule.make is None else rule.make(*arrays)[which]

    def shape(target: str) -> tuple[int, ...]:
        rule, sources, which = made[target]
        shapes = [tensors.shapes[s] for s in sources]
        if rule.make is None:
            return shapes[0]
        try:  # bytes that are never touched: no memory
            return rule.make(*(np.zeros(s, np.uint8) for s in shapes))[which].shape
        except (ValueError, IndexError) as error:
            found = ", ".join(f"{s} {tensors.shapes[s]}" for s in sources)
            raise UserError(f"{where}: the shapes of {found} do not go together") from error

    return Canonical(layout, {t: shape(t) for t in made}, read, left_out, _heads(tensors.shapes, layout))


def _unstack(tensors: Tensors) -> Tensors:
    """big_vision's scanned blocks, one array for all, as one for each."""
    stacked = {n: s for n, s in tensors.shapes.items() if n.startswith("Transformer/encoderblock/")}
    if not stacked:
        return tensors
    shapes = {n: s for n, s in tensors.shapes.items() if n not in stacked}
    place: dict[str, tuple[str, int]] = {}
    for name, shape in stacked.items():
        for i in range(shape[0]):
            single = name.replace("/encoderblock/", f"/encoderblock_{i}/")
            shapes[single], place[single] = shape[1:], (name, i)

    def read(name: str) -> np.ndarray:
        if name not in place:
            return tensors.read(name)
        source, i = place[name]
        return tensors.read(source)[i]

    return tensors._replace(shapes=shapes, read=read)


def _heads(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> tuple[int, ...] | None:
    """Heads per block where a shape tells them."""
    if layout is NVIT_PRUNED:
        key, axis = "blocks.{i}.attn.qkv.Q.weight", 2
    elif layout in (VISION_TRANSFORMER, BIG_VISION):
        key, axis = next(r.sources[0] for r in layout.rules if "query/kernel" in r.sources[0]), 1
    else:
        return None
    found: list[int] = []
    while (name := key.replace("{i}", str(len(found)))) in shapes:
        found.append(shapes[name][axis])
    return tuple(found)


def nvit_masks(read: Callable[[str], np.ndarray], heads: tuple[int, ...]) -> dict[str, Any]:
    """Which units a pruned full-size NViT keeps: those whose weights are not all zero.

    Takes canonical tensors; {"embed": [D], "head": [[H] per block], "qk": [[H, Q]], "v": [[H, V]], "mlp": [[M]]}.
    The released engine zeroes a query/key (value) index in all heads of a block.
    """
    masks: dict[str, Any] = {"embed": _live(read("patch_embed.proj.weight"))}
    masks |= {kind: [] for kind in ("head", "qk", "v", "mlp")}
    for i, h in enumerate(heads):
        q, _, v = (
            part.reshape(h, -1, part.shape[1]).any(-1) for part in np.split(read(f"blocks.{i}.attn.qkv.weight"), 3)
        )
        masks["head"].append(q.any(-1))
        for kind, live in (("qk", q), ("v", v)):
            masks[kind].append(np.broadcast_to(live.any(0), live.shape))
        masks["mlp"].append(_live(read(f"blocks.{i}.mlp.fc1.weight")))
    return masks


def _live(weight: np.ndarray) -> np.ndarray:
    return np.asarray(weight.reshape(len(weight), -1).any(-1))
