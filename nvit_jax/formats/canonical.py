"""Any checkpoint under timm's names: which layout it has, and every tensor through exactly one rule of its table."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.formats import families
from nvit_jax.formats.layouts import (
    BIG_VISION,
    DINO,
    DINO_HEADS,
    LAYOUTS,
    NOT_THE_ENCODER,
    NVIT_PRUNED,
    TIMM,
    TRUNK,
    VISION_TRANSFORMER,
    Layout,
    Rule,
)
from nvit_jax.formats.tensors import Tensors


class Canonical(NamedTuple):
    """A checkpoint under timm's names."""

    layout: Layout
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    left_out: dict[str, str]  # name in the file -> why it is not used
    heads: tuple[int, ...] | None  # where the file's shapes tell
    own: Tensors  # under the publisher's names


def _outer(name: str, layout: Layout) -> str | None:
    """What stands before the layout's own names, where this name is the layout's first mark; None where it is not."""
    mark = layout.marks[0]
    if not name.endswith(mark):
        return None
    outer = name.removesuffix(mark)
    if outer and outer[-1] not in "./":
        return None
    return next((outer.removesuffix(p) for p in layout.prefixes if ("." + outer).endswith("." + p)), outer)


def _candidates(names: Iterable[str]) -> dict[str, Layout]:
    """Prefix -> layout, for every Vision Transformer among the tensors of a file."""
    names = set(names)
    found: dict[str, Layout] = {}
    for layout in LAYOUTS:
        for outer in {o for n in names if (o := _outer(n, layout)) is not None}:
            inner = _stripped(layout, (n.removeprefix(outer) for n in names if n.startswith(outer)))
            if outer.removesuffix(TRUNK) not in found and all(mark in inner for mark in layout.marks):
                found[outer] = layout
    return found


# Of several models in one file: the averaged one, the one that is published; never what only training needs.
_PREFERRED = ("ema", "teacher", "target", "base_encoder")
_NOT_IT = re.compile(r"(^|[./])(decoder|predictor|momentum_encoder|opt(?!/target)|txt|text)[\w-]*[./]")


def _choose(found: Mapping[str, Layout], where: str, entry: str | None) -> str:
    """The prefix of the model that is meant. UserError where nothing tells which."""
    outers = list(found)
    if entry is not None:
        chosen = [outer for outer in outers if outer.rstrip("./") == entry]
        if not chosen:
            there = ", ".join(outer.rstrip("./") or "(all)" for outer in outers)
            raise UserError(f"{where} has no entry {entry!r}; there are {there}")
        return chosen[0]
    outers = [outer for outer in outers if not _NOT_IT.search(outer)] or outers
    for word in _PREFERRED:
        liked = [outer for outer in outers if word in outer]
        if len(outers) > 1 and len(liked) == 1:
            return liked[0]
    if len(outers) > 1:
        there = ", ".join(outer.rstrip("./") or "(all)" for outer in sorted(outers))
        raise UserError(f"{where} holds several models ({there}); choose one with --entry")
    return outers[0]


class _Located(NamedTuple):
    layout: Layout
    tensors: Tensors  # under the layout's own names
    outside: dict[str, str]  # names in the file that are not the model's -> why


def _locate(tensors: Tensors, where: str, entry: str | None) -> _Located:
    """The model inside of what a training script saved. UserError that says what else the file looks like."""
    found = _candidates(tensors.shapes)
    if not found:
        families.refuse(tensors.shapes, where)
        raise families.unknown(tensors.shapes, where)
    outer = _choose(found, where, None if entry == tensors.entry else entry)
    layout = found[outer]
    shapes = {n.removeprefix(outer): s for n, s in tensors.shapes.items() if n.startswith(outer)}
    families.refuse((n for n in shapes if not _left_out(layout, n)), where)
    usual = f"outside of {outer.rstrip('./')!r}, where the model is"
    outside = {n: _why(layout.beside, n) or usual for n in sorted(tensors.shapes) if not n.startswith(outer)}
    inside = tensors._replace(shapes=shapes, read=lambda name: tensors.read(outer + name))
    dino = layout is TIMM and any(re.fullmatch("|".join(DINO_HEADS), n) for n in shapes)
    return _Located(DINO if dino else layout, inside, outside)


def _left_out(layout: Layout, name: str) -> str | None:
    """Why a tensor is not part of the function; None where it may be."""
    return _why({**layout.left_out, **NOT_THE_ENCODER}, name)


def _why(patterns: Mapping[str, str], name: str) -> str | None:
    return next((why for pattern, why in patterns.items() if re.fullmatch(pattern, name)), None)


def _stripped(layout: Layout, names: Iterable[str]) -> dict[str, str]:
    """Name without the layout's prefix -> name in the file."""

    def strip(name: str) -> str:
        return next((name.removeprefix(p) for p in layout.prefixes if name.startswith(p)), name)

    return {strip(name): name for name in names}


def canonical(tensors: Tensors, where: str, entry: str | None = None) -> Canonical:
    """The same tensors under timm's names. Each is used by exactly one rule, or left out for a stated reason.

    The model may lie under any prefix, beside other things; `entry` names the prefix where there are several. UserError
    for a file of another family, and for names that no rule knows.
    """
    layout, tensors, left_out = _locate(_unstack(_unchunk(tensors)), where, entry)
    names = _stripped(layout, tensors.shapes)
    made: dict[str, tuple[Rule, tuple[str, ...], int]] = {}  # target -> rule, sources in the file, which result
    used: set[str] = set()
    numbered = (re.search(r"(?:blocks\.|layers?\.|_)(\d{1,6})[./]", name) for name in names)
    depth = min(1 + max((int(m[1]) for m in numbered if m), default=0), len(names))  # a block has a name at least
    for rule in layout.rules:
        for i in range(depth if "{i}" in rule.sources[0] else 1):
            sources = tuple(s.replace("{i}", str(i)) for s in rule.sources)
            targets = tuple(t.replace("{i}", str(i)) for t in rule.targets)
            if all(s in names and s not in used for s in sources) and not any(t in made for t in targets):
                used.update(sources)
                made |= {t: (rule, tuple(names[s] for s in sources), j) for j, t in enumerate(targets)}
    for name in sorted(names.keys() - used):
        why = _left_out(layout, name)
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

    own = {name: shape for name, shape in tensors.shapes.items() if not _left_out(layout, name)}
    heads = _heads({inner: tensors.shapes[name] for inner, name in names.items()}, layout, where)
    return Canonical(layout, {t: shape(t) for t in made}, read, left_out, heads, tensors._replace(shapes=own))


def _unchunk(tensors: Tensors) -> Tensors:
    """DINOv2's training file has its blocks in chunks, "blocks.2.8.": all are numbered through."""
    chunked = re.compile(r"(^|.*\.)blocks\.(\d{1,6})\.(\d{1,6})\.(norm1|norm2|attn|mlp|ls1|ls2)\.")
    numbers: dict[str, set[tuple[int, int]]] = {}
    for name in tensors.shapes:
        if m := chunked.match(name):
            numbers.setdefault(m[1], set()).add((int(m[2]), int(m[3])))
    if not numbers:
        return tensors
    places = {(root, pair): i for root, pairs in numbers.items() for i, pair in enumerate(sorted(pairs))}

    def through(m: re.Match[str]) -> str:
        return f"{m[1]}blocks.{places[m[1], (int(m[2]), int(m[3]))]}.{m[4]}."

    names = {chunked.sub(through, name): name for name in tensors.shapes}
    return tensors._replace(
        shapes={new: tensors.shapes[old] for new, old in names.items()}, read=lambda name: tensors.read(names[name])
    )


def _unstack(tensors: Tensors) -> Tensors:
    """big_vision's scanned blocks, one array for all, as one for each."""
    stacked = {n: s for n, s in tensors.shapes.items() if "Transformer/encoderblock/" in n and s}
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


def _heads(shapes: Mapping[str, tuple[int, ...]], layout: Layout, where: str) -> tuple[int, ...] | None:
    """Heads per block where a shape tells them. UserError where the pooling has others."""
    if layout is NVIT_PRUNED:
        key, axis = "blocks.{i}.attn.qkv.Q.weight", 2
    elif layout in (VISION_TRANSFORMER, BIG_VISION):
        key, axis = next(r.sources[0] for r in layout.rules if "query/kernel" in r.sources[0]), 1
    elif table := next((r.sources[0] for r in layout.rules if "relative_position_bias_table" in r.sources[0]), None):
        key, axis = table, 1
    else:
        return None
    found: list[int] = []
    while len(shapes.get(name := key.replace("{i}", str(len(found))), ())) > axis:
        found.append(shapes[name][axis])
    pool = shapes.get("MAPHead_0/MultiHeadDotProductAttention_0/query/kernel", ())
    if layout is BIG_VISION and len(pool) > axis and found and pool[axis] != found[0]:
        raise UserError(f"{where}: its attention pooling has {pool[axis]} heads and a block {found[0]}: not built")
    return tuple(found) or None


def nvit_masks(read: Callable[[str], np.ndarray], heads: tuple[int, ...]) -> dict[str, Any]:
    """Which units a pruned full-size NViT keeps: those whose weights are not all zero.

    Takes canonical tensors; {"embed": [D], "head": [[H] per block], "qk": [[H, Q]], "v": [[H, V]], "mlp": [[M]]}.
    The released engine zeroes a query/key (value) index in all heads of a block.
    """
    masks: dict[str, Any] = {"embed": _live(read("patch_embed.proj.weight"))}
    masks |= {kind: [] for kind in ("head", "qk", "v", "mlp")}
    for i, h in enumerate(heads):
        q, _, v = (  # [h, width]
            part.reshape(h, -1, part.shape[1]).any(-1) for part in np.split(read(f"blocks.{i}.attn.qkv.weight"), 3)
        )
        masks["head"].append(v.any(-1))  # without values nothing is left of a head
        for kind, live in (("qk", q), ("v", v)):
            masks[kind].append(np.broadcast_to(live.any(0), live.shape))
        masks["mlp"].append(_live(read(f"blocks.{i}.mlp.fc1.weight")))
    return masks


def _live(weight: np.ndarray) -> np.ndarray:
    return np.asarray(weight.reshape(len(weight), -1).any(-1))
