"""What a checkpoint is: its dims and published variant, read off its names, shapes and neighbours."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.formats import interchange, layouts
from nvit_jax.formats.canonical import Canonical
from nvit_jax.formats.configs import Said
from nvit_jax.formats.published import Widths, is_dinov3, is_eva02, is_rope_gap, named_reading, readings
from nvit_jax.model import sizes
from nvit_jax.model.dims import ViTDims, preset, preset_names
from nvit_jax.model.sizes import Size

Shapes = dict[str, tuple[int, ...]]


class Options(NamedTuple):
    """What a user may say about a checkpoint; None is "find out"."""

    variant: str | None = None  # a name that `dims.preset` takes; must fit the shapes
    image: Size | None = None  # position embeddings are interpolated to this size
    heads: int | None = None  # per block, where nothing tells
    classes: int | None = None  # a new classifier of zeros with this many classes
    entry: str | None = None  # the part of a file, "model" or "model_ema", or the prefix of the names


def read_periods(where: str, shapes: Shapes, read: Callable[[str], np.ndarray], said: Said) -> tuple[Shapes, Said]:
    """Without the periods of rotary positions, which tell their base, and the heads: there are four dims for each.
    UserError for periods that are no powers of one base, as DINOv3's are."""
    if layouts.PERIODS not in shapes:
        return shapes, said
    periods, embed = read(layouts.PERIODS).astype(np.float64).reshape(-1), shapes["patch_embed.proj.weight"][0]
    powers = np.arange(len(periods)) / max(len(periods), 1)
    bases = (100.0, float(periods[1] ** len(periods)) if len(periods) > 1 else 100.0)
    # Published ones may be rounded to 16 bits; other bases are taken where they are exact.
    base = next(
        (b for b, error in zip(bases, (5e-3, 1e-5), strict=True) if np.allclose(periods, b**powers, rtol=error)), None
    )
    if base is None or embed % (4 * len(periods)):
        raise UserError(f"{where}: {layouts.PERIODS} are not the powers of one base for heads of {embed} channels")
    heads = embed // (4 * len(periods))
    if said.heads not in (None, heads):
        raise UserError(f"{where}: {said.heads} heads are stated, and its rotary positions are for {heads}")
    rest = {name: shape for name, shape in shapes.items() if name != layouts.PERIODS}
    return rest, said._replace(rotary_base=base, heads=heads)


def find_family(path: pathlib.Path, file: Canonical, said: Said, options: Options) -> str:
    """Whose preprocessing and names: what the user says, else the architecture beside the file, else its name."""
    if file.layout.family == "vit_hf" and "dist_token" in file.shapes:
        return "deit"
    if said.kind in ("vit_mae", "vit_msn", "ijepa"):
        return "mae"
    if file.layout in layouts.OPEN_CLIP_TIMMS:
        return "siglip" if "attn_pool.latent" in file.shapes else "clip"
    if file.layout is layouts.BIG_VISION and "attn_pool.latent" in file.shapes and "head.weight" not in file.shapes:
        return "siglip_npz"
    names = [text for text in (options.variant, said.architecture, path.stem) if text]
    if "pos_embed" not in file.shapes and any(is_dinov3(name) for name in names):
        return "dinov3_timm"
    if "pos_embed" not in file.shapes and any(is_rope_gap(name) for name in names):
        return "rope_gap"
    if file.layout.family != "deit":
        return file.layout.family
    for text in (options.variant, said.architecture, path.stem):
        tower = next((name for name in ("clip", "siglip") if text and f"_{name}_" in text), None)
        if tower is not None:
            return tower
        for family in ("deit3", "deit", "dinov2", "beit3", "vit"):
            if text and text.startswith(f"{family}_"):
                return family
    return "vit" if "augreg" in path.stem else "deit"


def find_variant(path: pathlib.Path, dims: ViTDims, family: str, options: Options) -> str | None:
    """The preset with these dims, whatever the image size and classes; UserError when the user named another."""
    free = {name: getattr(dims, name) for name in ("classes", "norm_eps", "activation", "mean_over")}
    if options.variant is not None:
        wanted = preset(options.variant, **free)
        for field in dataclasses.fields(dims):
            if field.name != "image" and getattr(wanted, field.name) != getattr(dims, field.name):
                raise UserError(
                    f"--variant={options.variant} contradicts {path}: {field.name} is "
                    f"{getattr(wanted, field.name)} there, {getattr(dims, field.name)} in the file"
                )
        return options.variant
    presets = {n: preset(n, **free) for n in preset_names() if n.endswith("_384") == (dims.image == 384)}
    same_patch = {n: d for n, d in presets.items() if d.patch == dims.patch}
    fits = [n for n, d in same_patch.items() if dataclasses.replace(dims, image=d.image) == d]
    stem = family.split("_")[0]
    return next((n for n in fits if n.startswith(f"{stem}_")), fits[0] if fits else None)


def find_dims(
    where: str,
    file: Canonical,
    shapes: Shapes,
    extra: Mapping[str, Any],
    said: Said,
    options: Options,
    names: Sequence[str],
) -> ViTDims:
    """Read off the shapes. What they do not show comes from what is stated, or from the one published model there is.

    `names` may say which architecture it is. UserError where nothing tells, and where the sources contradict.
    """
    depth = _check_shapes(where, shapes)
    d, channels, *patch_sides = shapes["patch_embed.proj.weight"]
    patch = sizes.one(*patch_sides)
    blocks = range(depth)
    mlp, gated = _neurons(shapes, depth)
    rows = tuple(shapes[f"blocks.{i}.attn.qkv.weight"][0] for i in blocks)
    columns = tuple(shapes[f"blocks.{i}.attn.proj.weight"][1] for i in blocks)
    dist, registers = "dist_token" in shapes, shapes.get("reg_token", (1, 0))[1]
    cls = "cls_token" in shapes
    timms = "pos_embed" not in shapes and any(is_dinov3(name) for name in names)
    usual = layouts.DINOV3 if timms else file.layout
    rotary, rotary_grid = _rotary(file, shapes, said, names, gated=gated)
    table = shapes.get("blocks.0.attn.relative_position_bias_table")
    if rotary and "pos_embed" not in shapes:
        positions, grid = "none", _stated_patches(where, patch, said, options)
    elif table and "pos_embed" not in shapes:
        positions, grid = "none", _related_patches(where, table[0], patch, said)
        if grid[0] != grid[1] and file.layout in layouts.HUGGING_FACE_BEIT:  # whose code then mixes up the sides
            raise UserError(f"{where}: a BEiT of Hugging Face for images that are no squares is not built")
    else:
        positions, grid = _stated_positions(where, file, shapes, cls + dist + registers, patch, said.image)
    image = sizes.one(grid[0] * patch_sides[0], grid[1] * patch_sides[1])
    plain = cls and not (dist or registers or "pre_logits.fc.weight" in shapes or "blocks.0.ls1.gamma" in shapes)
    anyone = (layouts.TIMM.name, layouts.HUGGING_FACE.name, layouts.HUGGING_FACE_5.name)  # whose names others use, too
    plain = plain and positions == "all" and file.layout.name in anyone
    classes = shapes.get("head.weight", (0,))[0]
    attention = "attn_pool.latent" in shapes
    plain = plain and not ("norm_pre.weight" in shapes or attention)
    widths = Widths(d, mlp, patch, image, cls, plain, "fc_norm.weight" in shapes, bool(classes), attention, gated)
    stated = _stated_heads(where, file, depth, extra, said, options)
    heads, activation, eps = _reading(where, file, widths, stated, said, names)
    qk, v, scale = _attention_widths(where, file, heads, rows, columns)
    if rotary_grid and gated:
        _check_eva02(where, file, widths, names)
    if rotary and qk[0] % 4:
        raise UserError(f"{where}: {qk[0]} query/key dims of a head are no multiple of 4, which rotary positions need")
    normed = "blocks.0.attn.q_norm.weight" in shapes
    if said.qk_norm is not None and said.qk_norm != normed:
        raise UserError(f"{where}: qk_norm={said.qk_norm} is stated, and its tensors say {normed}")
    if said.rotary not in (None, bool(rotary)):
        raise UserError(f"{where}: use_rot_pos_emb={said.rotary} is stated, which is not built for such a model")
    dims = ViTDims(
        image=image, patch=patch, channels=channels, classes=classes, embed=d, heads=heads, v=v, mlp=mlp,
        qk=tuple(q // 2 for q in qk) if rotary else qk,
        qk_scale=scale, cls_token=cls, dist_token=dist, registers=registers, positions=positions,
        pre_logits=shapes.get("pre_logits.fc.weight", (0,))[0], layer_scale="blocks.0.ls1.gamma" in shapes,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes, activation=activation, gated=gated,
        norm_eps=usual.norm_eps if timms and said.norm_eps is None else eps,
        patch_bias="patch_embed.proj.bias" in shapes, pre_norm="norm_pre.weight" in shapes,
        qk_norm_count=qk[0] if normed else 0, rotary=qk[0] // 2 if rotary else 0, rotary_base=rotary or 100.0,
        rotary_grid=rotary_grid, relative=table is not None,
        proj_norm_count=columns[0] if "blocks.0.attn.norm.weight" in shapes else 0,
        fc2_norm_count=mlp[0] if "blocks.0.mlp.norm.weight" in shapes else 0,
        **_pooling(where, shapes, said, heads[0], mean=timms),
    )  # fmt: skip
    for field, wanted in said.sizes.items():
        found = getattr(dims, field)[0] if field in ("mlp", "qk") else getattr(dims, field)
        if found != wanted:
            raise UserError(f"{where}: its {field} is {found}, and what is stated of it says {wanted}")
    return dims


def _pooling(where: str, shapes: Shapes, said: Said, heads: int, *, mean: bool) -> dict[str, Any]:
    """How tokens become what comes out, as fields of ViTDims; attention pooling has the `heads` of a block. Where
    nothing is stated, `mean` is the publisher's. UserError where what is stated and the tensors contradict."""
    cls, norm_after_pool = "cls_token" in shapes, "fc_norm.weight" in shapes
    width = shapes.get("attn_pool.latent", (0, 0, 0))[-1]
    usual = "map" if width else "mean" if mean or norm_after_pool or not cls else "class"
    pool = "class_mean" if "head_mean.weight" in shapes else said.pool or usual
    if (pool == "map") != bool(width):
        there = "has tensors" if width else "has no tensors"
        raise UserError(f"{where}: pool={pool!r} is stated, and the file {there} of attention pooling")
    if pool == "class" and not cls:
        raise UserError(f"{where}: pooling from a class token is stated, and the file has none")
    return {
        "pool": pool,
        "mean_over": said.mean_over or "patches",
        "norm_after_pool": norm_after_pool,
        "pool_width": width,
        "pool_heads": heads if width else 0,
        "pool_mlp": shapes.get("attn_pool.mlp.fc1.weight", (0,))[0],
        "projection": shapes.get("projection.weight", (0,))[0],
    }


_MATRICES = ("head", "head_mean", "pre_logits.fc", "projection", "attn_pool.mlp.fc1")
_RANKS = {
    **{"patch_embed.proj.weight": 4, "pos_embed": 3, "reg_token": 3, "attn_pool.latent": 3},
    **dict.fromkeys((f"{name}.weight" for name in _MATRICES), 2),
}


def _check_shapes(where: str, shapes: Shapes) -> int:
    """The number of blocks. UserError unless everything that dims are read off is there and has its axes."""
    depth = 0
    while f"blocks.{depth}.mlp.fc1.weight" in shapes:
        depth += 1
    parts = [f"blocks.{i}.{part}.weight" for i in range(max(depth, 1)) for part in ("mlp.fc1", "attn.qkv", "attn.proj")]
    for name in ("patch_embed.proj.weight", *parts):
        if name not in shapes:
            interchange.check_names(shapes, [*shapes, name], where)
    for name, rank in (_RANKS | dict.fromkeys(parts, 2)).items():
        if len(shapes.get(name, (1,) * rank)) != rank or 0 in shapes.get(name, (1,)):
            raise UserError(f"{where}: {name} has shape {shapes[name]}; {rank} axes that are not empty are expected")
    if "norm.weight" not in shapes and "fc_norm.weight" not in shapes:
        raise UserError(f"{where} has no norm behind its blocks (final_norm=False), which is not built")
    if "blocks.0.norm1.weight" in shapes and not any(f"blocks.{i}.norm1.bias" in shapes for i in range(depth)):
        raise UserError(f"{where}: its norms have no biases (RMSNorm?), which is not built")
    return depth


def _neurons(shapes: Shapes, depth: int) -> tuple[tuple[int, ...], bool]:
    """Of the mlp of each block, and whether they have gates: then fc1 is twice as wide as what fc2 reads."""
    rows = tuple(shapes[f"blocks.{i}.mlp.fc1.weight"][0] for i in range(depth))
    reads = shapes.get("blocks.0.mlp.fc2.weight", ())
    gated = len(reads) == 2 and rows[0] == 2 * reads[1]
    return (tuple(n // 2 for n in rows) if gated else rows), gated


def _stated_heads(
    where: str, file: Canonical, depth: int, extra: Mapping[str, Any], said: Said, options: Options
) -> tuple[int, ...] | None:
    """Heads per block, from the file's shapes, the user, what lies beside the file, or the variant. UserError where
    they contradict."""
    shown = _dense_heads(where, extra) if file.layout is layouts.NVIT_DENSE else file.heads
    for words, heads in (
        (f"--heads={options.heads}", options.heads),
        (f"a statement of {said.heads} heads", said.heads),
    ):
        if heads and shown is not None and shown != (heads,) * depth:
            raise UserError(f"{where}: {words} contradicts the file, whose heads are {', '.join(map(str, shown))}")
    if options.heads and said.heads and options.heads != said.heads:
        raise UserError(f"{where}: --heads={options.heads} contradicts what is stated beside it, {said.heads} heads")
    one = options.heads or said.heads
    if shown or one:
        return shown or (one,) * depth  # type: ignore[return-value]
    wanted = preset(options.variant).heads if options.variant is not None else ()
    return wanted if len(wanted) == depth else None


def _reading(
    where: str, file: Canonical, widths: Widths, stated: tuple[int, ...] | None, said: Said, names: Sequence[str]
) -> tuple[tuple[int, ...], str, float]:
    """Heads per block, the activation, and eps of the norms: what is stated, else what one of the `names` means, else
    what is published of the widths. UserError that asks for --heads where that is nothing, or not one thing; and for
    a CLIP without a config, of which there are several kinds."""
    named = next((r for n in names if (r := named_reading(n, widths.embed, said.arguments))), None)
    found = {named} if named else readings(widths)
    depth, usual = len(widths.mlp), "silu" if widths.gated else file.layout.activation
    possible = sorted({reading.heads for reading in found})
    if stated is None and len(possible) != 1:
        several = f"has been published with {' and with '.join(map(str, possible))} heads"
        what = f"embed {widths.embed} with {depth} blocks of mlp {widths.mlp[0]}"
        raise UserError(f"{where}: {what} {several if possible else 'is no published size'}; say --heads=N")
    heads, eps = stated or (possible[0],) * depth, file.layout.norm_eps
    timm = file.layout.name in (
        layouts.TIMM.name,
        layouts.OPEN_CLIP_TIMM.name,
    )  # the other layouts have one activation each
    if timm and named:
        usual, eps = named.activation, named.norm_eps or eps
    elif timm:
        usual = next((reading.activation for reading in found if reading.heads == heads[0]), usual)
    inner = {"blocks.0.attn.norm.weight", "blocks.0.mlp.norm.weight"} & file.shapes.keys()
    if timm and inner and not (named or any(is_eva02(name) for name in names)):
        raise UserError(
            f"{where} has norms inside of its parts, and no tensor tells their eps (1e-5 in BEiT-3): say what it is by "
            "the architecture in a config.json beside it, or name the file as timm does (beit3_...)"
        )
    if not (said.activation or usual) or (timm and "norm_pre.weight" in file.shapes and not named):
        name = ", or name it as timm does, vit_base_..._clip_..." if timm else ""
        raise UserError(
            f"{where} is a CLIP: its activation (quick_gelu, gelu) and the eps of its norms are in no tensor; put the "
            f"config.json of its publisher beside it{name}"
        )
    return heads, said.activation or usual, eps if said.norm_eps is None else said.norm_eps


def _dense_heads(where: str, extra: Mapping[str, Any]) -> tuple[int, ...]:
    try:
        return tuple(int(h) for h in extra["dim"]["head"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{where}: a dense NViT file needs its widths beside the weights, in "dim"') from error


def _attention_widths(
    where: str, file: Canonical, heads: tuple[int, ...], rows: tuple[int, ...], columns: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    """qk, v per block, and qk_scale."""
    if len(heads) != len(rows):
        raise UserError(f"{where}: heads are told for {len(heads)} blocks, and there are {len(rows)}")
    widths = []
    for i, (h, r, c) in enumerate(zip(heads, rows, columns, strict=True)):
        v, q = c // h, (r - c) // 2 // h
        if c % h or h * (2 * q + v) != r or min(q, v) < 1:
            raise UserError(f"{where}: block {i}: {r} rows of q, k, v and {c} of the projection are not {h} heads")
        widths.append((q, v))
    qk, v_widths = tuple(q for q, _ in widths), tuple(v for _, v in widths)
    pruned = file.layout is layouts.NVIT_DENSE  # whose scale is that of the model before
    return qk, v_widths, 64**-0.5 if pruned else float(qk[0]) ** -0.5


def _grid(image: Size | None, patch: Size) -> tuple[int, int] | None:
    """Rows and columns of whole patches."""
    if image is None:
        return None
    rows, columns = (side // part for side, part in zip(sizes.sides(image), sizes.sides(patch), strict=True))
    return rows, columns


def _stated_patches(where: str, patch: Size, said: Said, options: Options) -> tuple[int, int]:
    """Rows and columns of patches, where no tensor tells."""
    wanted = None if options.image is None else sizes.size("--image", options.image, 1, 2**14)
    grid = _grid(said.image or wanted or said.usual_image, patch)
    if grid is None:
        raise UserError(f"{where} holds no position embeddings, so that its image size cannot be known; say --image=N")
    return grid


def _related_patches(where: str, distances: int, patch: Size, said: Said) -> tuple[int, int]:
    """Rows and columns of patches from the number of relative positions: those that are stated, else a square.
    UserError where they are not these."""
    side = (math.isqrt(max(distances - 3, 0)) + 1) // 2
    rows, columns = _grid(said.image, patch) or (side, side)
    if (2 * rows - 1) * (2 * columns - 1) + 3 != distances:
        what = f"a grid of {rows} x {columns} patches" if said.image else "a square of patches; state img_size"
        raise UserError(f"{where}: {distances} relative positions are not those of {what}")
    return rows, columns


def _rotary(file: Canonical, shapes: Shapes, said: Said, names: Sequence[str], *, gated: bool) -> tuple[float, int]:
    """Base and grid of rotary positions, as fields of ViTDims; a base of 0 where there are none."""
    learned = "pos_embed" in shapes
    if not learned and any(is_dinov3(name) for name in names):
        return said.rotary_base or layouts.DINOV3.rotary, 0
    apart = any(name.endswith(("attn.q_bias", "attn.q_proj.weight")) for name in file.own.shapes)
    eva = file.layout in (layouts.EVA, layouts.EVA_APART, *layouts.OPEN_CLIP_TIMMS)
    if (learned and gated and apart and eva) or (not learned and any(is_rope_gap(name) for name in names)):
        return 10_000.0, 16
    return file.layout.rotary and (said.rotary_base or file.layout.rotary), 0


def _check_eva02(where: str, file: Canonical, widths: Widths, names: Sequence[str]) -> None:
    """UserError where nothing tells that a model with gates and biases of queries alone is an EVA-02: its rotary
    positions are in no tensor."""
    shown = any("rope." in name for name in file.left_out)
    if not (shown or readings(widths) or any(is_eva02(name) for name in names)):
        raise UserError(
            f"{where} has gates in its mlps and no biases of keys, as EVA-02 has, and its size is not published: say "
            "what it is by the architecture in a config.json beside it, or name the file as timm does (eva02_...)"
        )


def _stated_positions(
    where: str, file: Canonical, shapes: Shapes, prefix: int, patch: Size, image: Size | None
) -> tuple[str, tuple[int, int]]:
    """As `_positions`. UserError where they are not for the `image` that is stated, unless a publisher's code
    interpolates them; that code takes them for those of a square."""
    odd = file.layout.any_image and isinstance(image, tuple)
    stated = None if odd else _grid(image, patch)
    positions, grid = _positions(where, shapes, prefix, stated, square=isinstance(patch, int))
    if image is not None and stated != grid and (odd or not file.layout.any_image):
        found = (side * part for side, part in zip(grid, sizes.sides(patch), strict=True))
        words = f"{sizes.words(image)} pixels are stated, and its positions are for {sizes.words(sizes.one(*found))}"
        raise UserError(f"{where}: images of {words}")
    return positions, grid


def _positions(
    where: str, shapes: Shapes, prefix: int, stated: tuple[int, int] | None, *, square: bool
) -> tuple[str, tuple[int, int]]:
    """Which tokens have a position embedding, and the grid of patches: what is `stated`, else a square one.

    UserError where neither fits, and for patches that are not `square` themselves where nothing is stated."""
    if "pos_embed" not in shapes:
        raise UserError(f"{where} holds no position embeddings, so that its image size cannot be known")
    count = shapes["pos_embed"][1]
    counts = {"all": count - prefix, "patches": count} if prefix else {"all": count}
    fits = {name: stated for name, n in counts.items() if stated and stated[0] * stated[1] == n}
    if not fits and square:
        sides = {name: math.isqrt(n) for name, n in counts.items() if n > 0}
        fits = {name: (side, side) for name, side in sides.items() if side**2 == counts[name]}
    if not fits:
        what = "no square of patches" if square else "for patches that are not square"
        raise UserError(
            f"{where}: {count} position embeddings are {what}, with or without {prefix} token(s); state img_size in a "
            "config.json beside it"
        )
    if len(fits) != 1:
        raise UserError(f"{where}: {count} position embeddings are for all tokens or for patches only; state img_size")
    return next(iter(fits.items()))
