"""Image towers of CLIP and SigLIP, and timm's poolings: what their own libraries compute, block by block."""

import json

import einops
import jax
import numpy as np
import pytest
import sources
import torch
import transformers
from safetensors.numpy import load_file, save_file
from sources import numpy_state, randomise, run_torch
from test_convert import IMAGES, check, check_round_trip

from nvit_jax.errors import UserError
from nvit_jax.formats.convert import Options, convert, convert_checkpoint

VISION = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
VISION |= {"image_size": 16, "patch_size": 4}
TEXT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 20, "vocab_size": 30}
CLIP_PLAIN = {"pre_norm": True, "patch_bias": False, "cls_token": True, "pool": "class", "classes": 0, "pool_width": 0}
MAP = {"pre_norm": False, "patch_bias": True, "cls_token": False, "pool": "map", "pool_mlp": 40, "pool_width": 24}


def clip_module(kind):
    """(module, its blocks, what it gives out, dims)."""
    small = transformers.CLIPVisionConfig(**VISION, projection_dim=10)
    if kind == "clip":
        return transformers.CLIPVisionModel(small), "encoder", "pooler_output", CLIP_PLAIN
    if kind == "clip_with_projection":
        module = transformers.CLIPVisionModelWithProjection(small)
        return module, "vision_model.encoder", "image_embeds", CLIP_PLAIN | {"projection": 10}
    config = transformers.CLIPConfig(
        vision_config=VISION | {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, text_config=TEXT, projection_dim=11
    )
    wanted = CLIP_PLAIN | {"projection": 11, "activation": "gelu", "norm_eps": 1e-3}
    return transformers.CLIPModel(config), "vision_model.encoder", "features", wanted


def naflex(images):
    """What NaFlex's models take."""
    patches = einops.rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4)
    shapes = torch.full((len(images), 2), 4)
    return {"pixel_values": patches, "pixel_attention_mask": torch.ones(patches.shape[:2]), "spatial_shapes": shapes}


def siglip2_module(kind):
    vision = {name: value for name, value in VISION.items() if name != "image_size"} | {"num_patches": 16}
    if kind == "siglip2":
        module = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**vision))
        return module, "encoder", "pooler_output", MAP | {"activation": "gelu_tanh", "image": 16}
    config = transformers.Siglip2Config(vision_config=vision, text_config=TEXT, num_labels=7)
    if kind == "siglip2_classifier":
        module = transformers.Siglip2ForImageClassification(config)
        return module, "vision_model.encoder", "logits", {"pool": "mean", "classes": 7, "image": 16}
    return transformers.Siglip2Model(config), "vision_model.encoder", "features", MAP


def siglip_module(kind):
    if kind == "siglip":
        config = transformers.SiglipVisionConfig(**VISION)
        return transformers.SiglipVisionModel(config), "encoder", "pooler_output", MAP | {"activation": "gelu_tanh"}
    config = transformers.SiglipConfig(vision_config=VISION, text_config=TEXT, num_labels=7)
    if kind == "siglip_classifier":
        module = transformers.SiglipForImageClassification(config)
        return module, "vision_model.encoder", "logits", {"pool": "mean", "classes": 7, "pool_width": 0}
    return transformers.SiglipModel(config), "vision_model.encoder", "features", MAP


HF = {
    **dict.fromkeys(("clip", "clip_with_projection", "clip_whole"), clip_module),
    **dict.fromkeys(("siglip", "siglip_whole", "siglip_classifier"), siglip_module),
    **dict.fromkeys(("siglip2", "siglip2_whole", "siglip2_classifier"), siglip2_module),
}


@pytest.fixture
def tower(tmp_path):
    """Makes the files of a kind of HF: (module, blocks, what it gives out, dims, folder)."""

    def make(kind):
        module, blocks, out, wanted = HF[kind](kind)
        randomise(module).save_pretrained(tmp_path)
        return module, blocks, out, wanted, tmp_path

    return make


@pytest.mark.parametrize("kind", HF)
def test_hugging_face_towers(kind, tower):
    """`--verify` builds the same class, of the file's own config."""
    module, blocks, out, wanted, folder = tower(kind)

    def pick(found):
        return getattr(found, "pooler_output" if out == "features" else out)

    forward = module.get_image_features if out == "features" else module.forward
    given = naflex if kind.startswith("siglip2") else lambda images: {"pixel_values": images}
    module.forward = lambda images: forward(**given(images))
    model = check(
        folder / "model.safetensors",
        lambda dtype: run_torch(module, lambda m: m.get_submodule(f"{blocks}.layers"), IMAGES, dtype, pick),
        Options(),
    )
    assert {name: getattr(model.dims, name) for name in wanted} == wanted
    out_folder = folder / "out"
    out_folder.mkdir()
    check_round_trip(model, out_folder)
    said = []
    convert_checkpoint(folder, folder / "model", verify=True, say=said.append)
    assert f"that is transformers' {type(module).__name__}, from its config.json" in said[-1], said
    assert any("of any shape (NaFlex) is taken for squares" in line for line in said) == kind.startswith("siglip2")


def test_names_of_transformers_4_and_no_config(tower):
    """The tower's names began with "vision_model."; without config.json a CLIP's activation is not known."""
    *_, folder = tower("clip")
    state = load_file(folder / "model.safetensors")
    before = convert(folder / "model.safetensors").model
    old = {f"vision_model.{name}": value for name, value in state.items()}
    old["vision_model.embeddings.position_ids"] = np.arange(17)[None]
    save_file(old, folder / "model.safetensors")
    again = convert(folder / "model.safetensors").model
    assert again.dims == before.dims
    assert all(np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(m.params) for m in (again, before)), strict=True))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="is a CLIP: its activation"):
        convert(folder / "model.safetensors", Options(heads=3))


SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2, "num_classes": 7}
PLAIN = "vit_base_patch16_224"
TIMM = {
    "clip": ("vit_base_patch16_clip_224", {}, {"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5}),
    "clip_quickgelu": ("vit_base_patch32_clip_quickgelu_224", {}, {"activation": "quick_gelu", "norm_eps": 1e-5}),
    "siglip": ("vit_base_patch16_siglip_224", {"num_classes": 0}, {"pool": "map", "activation": "gelu", "classes": 0}),
    "siglip_tanh": ("vit_base_patch32_siglip_256", {}, {"pool": "map", "activation": "gelu_tanh", "pool_heads": 3}),
    "map_of_all": (
        PLAIN,
        {"global_pool": "map", "reg_tokens": 2, "pool_include_prefix": True},
        {"pool": "map", "mean_over": "all", "registers": 2},
    ),
    "max": (PLAIN, {"global_pool": "max"}, {"pool": "max", "norm_after_pool": True}),
    "avgmax": (PLAIN, {"global_pool": "avgmax", "fc_norm": False}, {"pool": "avgmax", "norm_after_pool": False}),
}


@pytest.mark.parametrize("kind", TIMM)
def test_timm(kind, tmp_path):
    """Activation and eps of a CLIP, and of a SigLIP, are those of the architecture's name."""
    timm = sources.import_timm()
    if timm is None:
        pytest.skip("timm is not installed: pip install --no-deps timm (without torchvision)")
    name, changes, wanted = TIMM[kind]
    arguments = SMALL | changes
    module = randomise(timm.create_model(name, pretrained=False, **arguments))
    save_file(numpy_state(module.state_dict()), tmp_path / "model.safetensors")
    config = {"architecture": name, "num_classes": arguments["num_classes"], "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "model.safetensors"
    model = check(path, lambda dtype: run_torch(module, lambda m: m.blocks, IMAGES, dtype), Options())
    assert {name: getattr(model.dims, name) for name in wanted} == wanted
    (tmp_path / "out").mkdir()
    check_round_trip(model, tmp_path / "out")


def rectangle(library):
    """(module, its blocks, what of its output are logits, config, dims); 16 patches that are no 4 x 4."""
    if library == "timm":
        arguments = SMALL | {"img_size": [16, 32], "patch_size": [8, 4]}
        module = sources.import_timm().create_model(PLAIN, pretrained=False, **arguments)
        config = {"architecture": PLAIN, "num_classes": 7, "model_args": arguments}
        return module, lambda m: m.blocks, lambda out: out, config, {"image": (16, 32), "patch": (8, 4), "grid": (2, 8)}
    config = transformers.ViTConfig(**VISION | {"image_size": [32, 8]}, num_labels=7)
    module = transformers.ViTForImageClassification(config)
    stated = config.to_dict() | {"architectures": [type(module).__name__]}
    return (
        module,
        lambda m: m.vit.layers,
        lambda out: out.logits,
        stated,
        {"image": (32, 8), "patch": 4, "grid": (8, 2)},
    )


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_rectangles(library, tmp_path):
    if library == "timm" and sources.import_timm() is None:
        pytest.skip("timm is not installed: pip install --no-deps timm (without torchvision)")
    module, blocks, pick, config, wanted = rectangle(library)
    randomise(module)
    save_file(numpy_state(module.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = np.random.default_rng(5).standard_normal((2, *wanted["image"], 3))
    path = tmp_path / "model.safetensors"
    model = check(path, lambda dtype: run_torch(module, blocks, images, dtype, pick), Options(), images)
    assert {name: getattr(model.dims, name) for name in wanted} == wanted
    (tmp_path / "out").mkdir()
    check_round_trip(model, tmp_path / "out")
    said = []
    convert_checkpoint(path, tmp_path / "model", verify=True, say=said.append)
    assert said[-1].startswith("verified: ") and f"that is {library}" in said[-1], said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["CLIPForImageClassification"]}, "without a norm behind the blocks"),
        ({"vision_config": VISION | {"hidden_act": "mish"}}, "vision_config: hidden_act='mish' is no activation"),
        ({"vision_config": VISION | {"num_attention_heads": 5}}, "are not 5 heads"),
        ({"vision_config": VISION | {"rope_theta": 100.0}}, "vision_config: rope_theta=100.0 is a setting"),
        ({"vision_config": [1]}, "vision_config=[1] is not an object"),
        ({"model_type": "siglip3"}, "model_type='siglip3' is not a plain Vision Transformer"),
    ],
)
def test_what_a_tower_states_and_is_not_built(change, words, tower):
    *_, folder = tower("clip_whole")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as caught:
        convert(folder / "model.safetensors")
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1, caught.value
