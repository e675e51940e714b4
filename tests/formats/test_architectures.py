"""Every architecture of timm's vision_transformer and deit modules: read as timm builds it, or refused in one line."""

import pathlib

import pytest
import sources
import torch

from nvit_jax.errors import UserError
from nvit_jax.formats import families, interchange
from nvit_jax.formats.canonical import canonical
from nvit_jax.formats.configs import Said
from nvit_jax.formats.convert import _with_zero_biases
from nvit_jax.formats.detect import Options, find_dims
from nvit_jax.formats.heads import per_head
from nvit_jax.formats.published import architecture
from nvit_jax.formats.weights import Tensors

ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}
# Tensors and settings of a plain ViT; an architecture that has others is to be refused.
PLAIN = {
    *("cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"),
    *(f"{name}.{leaf}" for name in ("norm_pre", "norm", "fc_norm", "head", "head_dist") for leaf in ("weight", "bias")),
    *("attn_pool.latent",),
    *(
        f"attn_pool.{n}.{leaf}"
        for n in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")
        for leaf in ("weight", "bias")
    ),
    *(
        f"blocks.0.{name}.{leaf}"
        for name in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for leaf in ("weight", "bias")
    ),
    *("blocks.0.ls1.gamma", "blocks.0.ls2.gamma"),
    *(f"blocks.0.{n}.{leaf}" for n in ("attn.q_norm", "attn.k_norm") for leaf in ("weight", "bias")),
    *(f"blocks.0.{n}.{leaf}" for n in ("attn.norm", "mlp.norm") for leaf in ("weight", "bias")),
}


def built(timm, name, kind=None):
    """(timm's model of one block, shapes of all blocks), without memory: the blocks are alike."""
    from timm.models import vision_transformer

    kind = kind or vision_transformer.VisionTransformer
    depths, original = [], kind.__init__

    def init(self, *args, depth=12, **kwargs):
        depths.append(depth)
        original(self, *args, depth=1, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(kind, "__init__", init)
        model = timm.create_model(name, pretrained=False)
    shapes = {}
    for key, value in model.state_dict().items():
        for i in range(depths[0] if key.startswith("blocks.0.") else 1):
            shapes[key.replace("blocks.0.", f"blocks.{i}.", 1)] = tuple(value.shape)
    return model, shapes, depths[0]


def found(shapes, names, image=None):
    """Dims of a file of these shapes, whose name or config may be one of `names`."""
    file = canonical(Tensors(shapes, None, {}, ""), "w.safetensors")
    shapes, _, _ = _with_zero_biases(file.shapes, None)
    dims = find_dims("w.safetensors", file, shapes, {}, Said(), Options(image=image), names)
    shapes, _ = per_head(dims, shapes, None, "w.safetensors")
    interchange.check_names(shapes, [entry.torch for entry in interchange.entries(dims)], "w.safetensors")
    return dims


def same(dims, model, depth):
    block = model.blocks[0]
    assert dims.heads == (block.attn.num_heads,) * depth
    assert dims.qk_scale == pytest.approx(block.attn.scale, rel=1e-12)
    assert dims.qk_norm_count == (0 if isinstance(block.attn.q_norm, torch.nn.Identity) else dims.qk[0])
    assert dims.activation == ACTIVATIONS[type(block.mlp.act).__name__]
    assert dims.gated == (type(block.mlp).__name__ == "GluMlp") and not getattr(block.mlp, "gate_last", False)
    assert dims.mlp == (block.mlp.fc2.in_features,) * depth
    assert dims.norm_eps == block.norm1.eps and type(block.norm1).__name__ == "LayerNorm"
    assert {"class": "token", "mean": "avg"}.get(dims.pool, dims.pool) == model.global_pool
    assert dims.pre_norm == (not isinstance(model.norm_pre, torch.nn.Identity))
    if dims.pool == "map":
        pool = model.attn_pool
        assert dims.pool_heads == pool.num_heads and dims.activation == ACTIVATIONS[type(pool.mlp.act).__name__]
    assert dims.norm_after_pool == (not isinstance(model.fc_norm, torch.nn.Identity))
    assert (dims.mean_over == "all") == model.pool_include_prefix
    assert dims.image == model.patch_embed.grid_size[0] * dims.patch


def test_every_architecture_of_timm():
    timm = sources.import_timm()
    if timm is None:
        pytest.skip("timm is not installed: pip install --no-deps timm (without torchvision)")
    read: dict[bool, list[str]] = {False: [], True: []}
    names = [n for module in ("vision_transformer", "deit") for n in timm.list_models(module=module)]
    for name in names:
        model, shapes, depth = built(timm, name)
        plain = {key for key in shapes if not key.startswith("blocks.") or key.startswith("blocks.0.")} <= PLAIN
        plain = (
            plain
            and {"norm.bias", "fc_norm.bias"} & shapes.keys()
            and type(model.blocks[0].mlp).__name__ in ("Mlp", "GluMlp")
        )
        for named in (False, True):
            try:
                dims = found(shapes, [name] if named else [])
            except UserError as error:
                assert len(str(error).splitlines()) == 1 and not (named and plain and architecture(name)), error
                continue
            assert plain, name
            same(dims, model, depth)
            read[named].append(name)
    # Without a name ViT-S with patches of 16 (MoCo v3 has 12 heads) and mean-pooled ViT-B are asked about, and CLIPs,
    # of two activations, and BEiT-3, of another eps.
    asked = set(read[True]) - set(read[False])
    assert len(read[True]) >= 140 and {"vit_small_patch16_224", "vit_base_patch16_gap_224"} <= asked, asked
    assert all(
        ("small" in n and "16" in n)
        or ("base_patch16" in n and "gap" in n)
        or "rpn" in n
        or "_clip_" in n
        or "beit3" in n
        for n in asked
    ), asked


def test_every_architecture_of_timms_eva():
    """EVA, EVA-02 and DINOv3 are read; the others have rotary positions that no tensor shows, or parts that a plain ViT
    lacks."""
    timm = sources.import_timm()
    if timm is None:
        pytest.skip("timm is not installed: pip install --no-deps timm (without torchvision)")
    from timm.models import eva

    read: dict[str, set[str]] = {"dinov3": set(), "eva02": set(), "eva": set(), "vit": set()}
    for name in timm.list_models(module="eva"):
        if "sapiens2" in name:  # a number of heads for each block, which one block alone cannot have
            continue
        model, shapes, depth = built(timm, name, eva.Eva)
        # Without a name these cannot be told from DeiT-III.
        for named in (True,) if "rope_ape" in name else (False, True):
            try:
                if named:
                    families.refuse_name(name, "w.safetensors")
                dims = found(shapes, [name] if named else [], image=256)
            except UserError as error:
                assert len(str(error).splitlines()) == 1, error
                continue
            family = "dinov3" if "dinov3" in name else name.split("_")[0]
            assert (named or family in ("eva", "eva02")) and dims.heads == (model.blocks[0].attn.num_heads,) * depth, (
                name
            )
            assert dims.norm_eps == model.blocks[0].norm1.eps and dims.image in (224, 256, 336, 448, 560)
            assert dims.pool == {"avg": "mean", "token": "class"}[model.global_pool], name
            assert (dims.rotary, dims.rotary_grid) == {
                **{"dinov3": (32, 0), "eva02": (32, 16), "vit": (32, 16), "eva": (0, 0)}
            }[family]
            if dims.rotary_grid:
                rope = model.rope
                assert tuple(rope.ref_feat_shape) == (16, 16) and rope.temperature == dims.rotary_base == 10_000
                assert not rope.in_pixels and not model.blocks[0].attn.rotate_half
            read[family].add(name)
    names = timm.list_models(module="eva")
    sizes = ("small_patch16_dinov3", "base_patch16_dinov3", "large_patch16_dinov3")
    assert read["dinov3"] == {f"vit_{size}{biases}" for size in sizes for biases in ("", "_qkvb")} | {
        "vit_tiny_patch16_dinov3_qkvb"
    }
    assert read["eva02"] == {n for n in names if n.startswith("eva02_") and "enormous" not in n}
    assert read["eva"] == {n for n in names if n.startswith("eva_")}
    assert read["vit"] == {n for n in names if "_rope_reg" in n}


def test_every_architecture_of_timms_beit():
    timm = sources.import_timm()
    if timm is None:
        pytest.skip("timm is not installed: pip install --no-deps timm (without torchvision)")
    from timm.models import beit

    for name in timm.list_models(module="beit"):
        model, shapes, depth = built(timm, name, beit.Beit)
        dims = found(shapes, [])
        assert dims.heads == (model.blocks[0].attn.num_heads,) * depth and dims.relative and dims.norm_after_pool, name
        assert (dims.image, dims.patch, dims.pool) == (model.patch_embed.img_size[0], 16, "mean")
        assert dims.qk_scale == model.blocks[0].attn.scale and dims.norm_eps == model.blocks[0].norm1.eps


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("deit_small_patch16_224-cd65a155", 6),
        ("deit_3_small_224_1k", 6),
        ("vit_small_patch16_224.augreg_in21k_ft_in1k", 6),
        ("dino_deitsmall16_pretrain", 6),
        ("deit_small", 6),
        ("vit_small", None),  # MoCo v3's files say that of 12 heads
        ("vit_small_patch16_224_moco", None),
        ("weights", None),
    ],
)
def test_what_a_name_says(name, size):
    from nvit_jax.formats.published import named_reading

    reading = named_reading(name, 384, {})
    assert (reading and reading.heads) == size
    assert named_reading(name, 768, {}) is None  # an old ViT-S of another width


def test_names_of_files_are_taken_apart():
    for name, wanted in (
        ("vit_base_patch16_224.orig_in21k", "vit_base_patch16_224"),
        ("deit_tiny_patch16_224-a1311bcf", "deit_tiny_patch16_224"),
        ("model", None),
        ("resnet50", None),
    ):
        assert architecture(pathlib.Path(name).name) == wanted
