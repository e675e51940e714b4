"""CLIP under the names of OpenAI and open_clip: what their image towers compute, and what is known of them."""

import json

import jax
import numpy as np
import pytest
import sources
import torch
from safetensors.numpy import save_file
from sources import ClipTower, numpy_state, randomise, run_torch
from test_convert import HEADS, IMAGES, check, check_round_trip
from test_eva import exact_turns

from nvit_jax.errors import UserError
from nvit_jax.formats.convert import Options, convert
from nvit_jax.formats.published import clip_tower
from nvit_jax.formats.weights import files_of, find_weights

TEXTS = {  # the other half of the file
    "transformer.resblocks.0.attn.in_proj_weight": np.ones((9, 3)),
    "transformer.resblocks.7.mlp.c_fc.weight": np.ones((9, 3)),
    "token_embedding.weight": np.ones((5, 3)),
    "positional_embedding": np.ones((7, 3)),
    "ln_final.weight": np.ones(3),
    "text_projection": np.ones((3, 10)),
    "logit_scale": np.ones(()),
}
VISION = {"width": 24, "layers": 3, "head_width": 8, "mlp_ratio": 1.7, "patch_size": 4, "image_size": 16}
PRE = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
GELU, TANH = torch.nn.GELU(), torch.nn.GELU("tanh")
# Arguments of ClipTower, quick_gelu, what vision_cfg says of them, dims.
TOWERS = {
    "openai": ({}, True, {}, {"activation": "quick_gelu", "pool": "class", "projection": 10, "norm_eps": 1e-5}),
    "open_clip": (
        {"act": GELU, "eps": 1e-3, "gains": True},
        False,
        {"norm_kwargs": {"eps": 1e-3}, "ls_init_value": 0.1},
        {"activation": "gelu", "layer_scale": True, "norm_eps": 1e-3, "pre_norm": True, "patch_bias": False},
    ),
    "clipa": (
        {"act": TANH, "pre": False, "mean": True, "norm_behind": True},
        False,
        {"act_kwargs": {"approximate": "tanh"}, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        {"activation": "gelu_tanh", "pool": "mean", "mean_over": "patches", "norm_after_pool": True, "pre_norm": False},
    ),
    "mean": ({"act": GELU, "mean": True}, False, {"pool_type": "avg"}, {"pool": "mean", "norm_after_pool": False}),
    "rectangle": ({"act": GELU, "image": (8, 32)}, False, {"image_size": [8, 32]}, {"image": (8, 32)}),
}


def write(folder, state, *, quick=False, name="open_clip_model.safetensors", vision=None, **more):
    """The file, in a folder with its config."""
    save_file(state, folder / name)
    config = {"model_cfg": {"embed_dim": 10, "vision_cfg": VISION | (vision or {}), "text_cfg": {}, **more}}
    config["model_cfg"] |= {"quick_gelu": True} if quick else {}
    (folder / "open_clip_config.json").write_text(json.dumps(config | {"preprocess_cfg": PRE}))
    return folder / name


def under_visual(module):
    return {f"visual.{name}": value for name, value in numpy_state(module.state_dict()).items()}


@pytest.mark.parametrize("kind", TOWERS)
def test_image_towers(kind, tmp_path):
    arguments, quick, vision, wanted = TOWERS[kind]
    module = randomise(ClipTower(**arguments))
    path = write(tmp_path, under_visual(module) | TEXTS, quick=quick, vision=vision)
    images = np.random.default_rng(5).standard_normal((3, *arguments.get("image", (16, 16)), 3))
    run = lambda dtype: run_torch(module, lambda m: m.transformer.resblocks, images, dtype)  # noqa: E731
    model = check(path, run, Options(), images)
    assert {name: getattr(model.dims, name) for name in wanted} == wanted and model.dims.heads == (3, 3, 3)
    (tmp_path / "out").mkdir()
    check_round_trip(model, tmp_path / "out")
    notes = convert(tmp_path).notes
    assert any("left out 7 tensor(s)" in note and note.endswith("the half for texts") for note in notes), notes
    made = model.info["preprocessing"]
    assert (made["mean"], made["std"], made.get("crop_mode", "center")) == (PRE["mean"], PRE["std"], "center")
    assert made["size"] == made["resize"] == (16 if kind != "rectangle" else [8, 32])


def test_transformers_computes_the_same(tmp_path):
    """An image tower of transformers with these weights under its own names; without a projection, too."""
    import transformers

    state = under_visual(randomise(ClipTower()))
    arguments = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
    config = transformers.CLIPVisionConfig(**arguments, image_size=16, patch_size=4, projection_dim=10)
    other = transformers.CLIPVisionModelWithProjection(config).eval()
    names = {"class_embedding": "embeddings.class_embedding", "conv1": "embeddings.patch_embedding", "proj": ""}
    names |= {"positional_embedding": "embeddings.position_embedding.weight", "ln_pre": "pre_layrnorm"}
    names |= {"ln_post": "post_layernorm", "transformer.resblocks": "encoder.layers", "ln_1": "layer_norm1"}
    names |= {"ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "c_fc": "fc1", "c_proj": "fc2"}
    theirs = {"visual_projection.weight": torch.from_numpy(state["visual.proj"].T.copy())}
    for name, value in state.items():
        new = "vision_model." + name.removeprefix("visual.")
        for old, now in names.items():
            new = new.replace(old, now) if old not in ("proj",) else new
        if ".attn.in_proj_" in new:
            for letter, part in zip("qkv", np.split(value, 3), strict=True):
                own = new.replace("attn.in_proj_", f"self_attn.{letter}_proj.")
                theirs[own] = torch.from_numpy(part.copy())
        elif name != "visual.proj":
            theirs[new] = torch.from_numpy(value)
    other.load_state_dict(theirs)
    path = write(tmp_path, state, quick=True)
    with torch.inference_mode():
        wanted = other(sources.nchw(IMAGES, torch.float32)).image_embeds.numpy()
    model = convert(path).model
    with jax.default_matmul_precision("float32"):
        found = np.asarray(model.logits(model.params, IMAGES.astype(np.float32)))
    assert np.abs(found - wanted).max() <= 1e-4
    del state["visual.proj"]
    assert convert(write(tmp_path, state, quick=True)).model.dims.projection == 0


def trunk(name, **arguments):
    """(timm's model and a projection as open_clip wraps them, their tensors)."""
    timm = sources.import_timm()
    if timm is None:
        pytest.skip("timm is not installed: pip install --no-deps timm (without torchvision)")
    module = torch.nn.Module()
    module.trunk = timm.create_model(name, pretrained=False, **arguments)
    module.head = torch.nn.Sequential()
    if "num_classes" not in arguments:
        module.trunk.reset_classifier(0, "avg")
        module.head.add_module("proj", torch.nn.Linear(module.trunk.num_features, 10, bias=False))
    module.forward = lambda x: module.head(module.trunk(x))
    return randomise(module)


def test_a_model_of_timm_with_a_projection(tmp_path):
    """The pooling is open_clip's, the sizes those of the name."""
    module = trunk("test_vit")
    with torch.no_grad():  # 6 blocks of width 64: with larger weights float32 itself is worse than 1e-5
        for value in module.parameters():
            value.mul_(0.4 if value.ndim > 1 else 1)
    vision = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
    path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save({name: torch.from_numpy(value) for name, value in (under_visual(module) | TEXTS).items()}, path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"embed_dim": 10, "vision_cfg": vision}))
    images = np.random.default_rng(5).standard_normal((2, 160, 160, 3))
    model = check(path, lambda dtype: run_torch(module, lambda m: m.trunk.blocks, images, dtype), Options(), images)
    assert (model.dims.pool, model.dims.projection, model.dims.heads[0]) == ("mean", 10, 2)
    assert model.info["preprocessing"]["mean"][0] == 0.48145466  # OpenAI's, which is open_clip's default
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match="whose pooling is in no tensor; put its open_clip_config.json"):
        convert(path)


@pytest.mark.parametrize("name", ["eva02_base_patch16_clip_224", "eva_giant_patch14_clip_224"])
def test_an_eva_clip_of_open_clip(name, tmp_path):
    """Its queries have biases, and in EVA-02 layers, of their own."""
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}
    module = exact_turns(trunk(name, **arguments, global_pool="token"))
    vision = {"timm_model_name": name, "timm_pool": "token", "timm_proj": None, "image_size": 16}
    save_file(under_visual(module) | TEXTS, tmp_path / "open_clip_model.safetensors")
    path, config = tmp_path / "open_clip_model.safetensors", tmp_path / "open_clip_config.json"
    config.write_text(json.dumps({"model_cfg": {"embed_dim": 10, "vision_cfg": vision}}))
    model = check(path, lambda dtype: run_torch(module, lambda m: m.trunk.blocks, IMAGES, dtype))
    assert (model.dims.rotary_grid, model.dims.pool) == (16 if "eva02" in name else 0, "class")
    vision["timm_model_name"] = "eva02_enormous_patch14_clip_224"
    config.write_text(json.dumps({"model_cfg": {"embed_dim": 10, "vision_cfg": vision}}))
    with pytest.raises(UserError, match="norms behind its parts"):
        convert(path, HEADS)


def test_a_siglip_of_open_clip(tmp_path):
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2}
    module = trunk("vit_base_patch16_siglip_224", **arguments, num_classes=0)
    vision = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
    squash = {"mean": 0.5, "std": 0.5, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision | {"image_size": 16}}, "preprocess_cfg": squash}
    save_file(under_visual(module), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    path = tmp_path / "open_clip_model.safetensors"
    model = check(path, lambda dtype: run_torch(module, lambda m: m.trunk.blocks, IMAGES, dtype))
    assert (model.dims.pool, model.info["preprocessing"]["crop_mode"]) == ("map", "squash")


SAYS = {  # what says the activation -> (tensors beside, file's name, JSON file beside and its content, activation)
    "openai": ({"input_resolution": np.array(16)}, "w.safetensors", {}, "quick_gelu"),
    "name": ({}, "vit_b_32-quickgelu-laion400m_e32.safetensors", {}, "quick_gelu"),
    "short_config": ({}, "w.safetensors", {"open_clip_config.json": {"model_cfg": {"quick_gelu": False}}}, "gelu"),
    "hugging_face": (
        {},
        "w.safetensors",
        {"config.json": {"model_type": "clip", "vision_config": {"hidden_act": "gelu", "num_attention_heads": 3}}},
        "gelu",
    ),
}


@pytest.mark.parametrize("case", SAYS)
def test_what_says_the_activation(case, tmp_path):
    more, name, files, activation = SAYS[case]
    state = under_visual(ClipTower()) | TEXTS
    save_file(state | more, tmp_path / name)
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    found = convert(tmp_path / name, HEADS)
    assert found.model.dims.activation == activation
    assert files or any(note.startswith(f"activation {activation}: ") for note in found.notes)


REFUSED = {  # what the config says, or which tensors are there -> words of the line
    "nothing": (None, {}, "is a CLIP whose activation is in no tensor; put its open_clip_config.json beside it"),
    "no_norm": ({}, "ln_pre", "whose pooling is in no tensor"),
    "heads": ({"head_width": 7}, {}, "head_width=7 does not divide width=24"),
    "resnet": ({"layers": [3, 4, 6, 3]}, {}, "are those of a ResNet"),
    "coca": ({"attentional_pool": True}, {}, "attentional_pool=True is not built"),
    "pool": ({"pool_type": "none"}, {}, "pool_type='none' is not built; tok, avg are"),
    "attention": ({"scale_heads": True}, {}, "scale_heads=True is not built"),
    "unknown": ({"rope": True}, {}, "rope=True is a setting that is not known here"),
    "act": ({"act_kwargs": {"approximate": "half"}}, {}, "approximate='half' is not built"),
    "norm": ({"norm_kwargs": {"eps": 2}}, {}, "eps=2 must be at least 0 and below 1"),
    "width": ({"width": 32}, {}, "its embed is 24, and what is stated of it says 32"),
    "mlp": ({"mlp_ratio": 4.0}, {}, "its mlp is 40, and what is stated of it says 96"),
    "image": ({"image_size": 32}, {}, "images of 32 pixels are stated, and its positions are for 16"),
    "type": ({"layers": "3"}, {}, "layers='3' is not a whole number"),
    "timm_pool": ({"timm_model_name": "x", "timm_pool": "abs_attn"}, {}, "timm_pool='abs_attn' is not built"),
    "timm_proj": ({"timm_model_name": "x", "timm_proj": "mlp"}, {}, "timm_proj='mlp' is not built"),
    "queries": ({}, {"visual.attn_pool.query": np.ones((4, 24))}, "is a CoCa (many queries pool its tokens)"),
    "scales": (
        {},
        {"visual.transformer.resblocks.0.attn.head_scale": np.ones((3, 1, 1))},
        "is a CLIP with other blocks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_built_is_one_line(case, tmp_path):
    vision, change, words = REFUSED[case]
    state = under_visual(ClipTower()) | TEXTS
    if change == "ln_pre":
        state = {name: value for name, value in state.items() if "ln_pre" not in name}
    path = write(tmp_path, state | (change if isinstance(change, dict) else {}), vision=vision)
    if vision is None:
        (tmp_path / "open_clip_config.json").unlink()
    if change == "ln_pre":
        (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": false}}')
    with pytest.raises(UserError) as caught:
        convert(path, HEADS if not vision else None)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1, caught.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resize_mode": "longest"}, "resize_mode='longest' is not built"),
        ({"interpolation": "cubic"}, "interpolation='cubic' is none of"),
        ({"mean": [0.5, 0.5]}, "must be 3 numbers, one for each channel"),
    ],
)
def test_preprocessing_that_is_not_built(change, words, tmp_path):
    path = write(tmp_path, under_visual(ClipTower()))
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config | {"preprocess_cfg": change}))
    with pytest.raises(UserError) as caught:
        convert(path)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1, caught.value


def test_the_files_of_its_folder(tmp_path):
    path = write(tmp_path, under_visual(ClipTower()))
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"")
    assert find_weights(tmp_path) == path
    assert files_of(path) == [path, tmp_path / "open_clip_config.json"]


@pytest.mark.filterwarnings("ignore")  # of tracing, about what is not traced again
def test_a_program_is_not_run(tmp_path):
    """OpenAI's own files are TorchScript; the line says how their weights are taken out, and those can be read."""
    module = randomise(ClipTower())
    whole = torch.nn.Module()
    whole.visual = module
    whole.forward = module.forward
    torch.jit.save(torch.jit.trace_module(whole, {"forward": torch.zeros(1, 3, 16, 16)}), tmp_path / "ViT-B-32.pt")
    with pytest.raises(UserError, match="is a TorchScript archive, which holds a program") as caught:
        convert(tmp_path / "ViT-B-32.pt")
    said = str(caught.value).partition("run: ")[2].replace("FILE", "path").replace("'weights.pt'", "out")
    exec(said, {"torch": torch, "path": tmp_path / "ViT-B-32.pt", "out": tmp_path / "quickgelu.pt"})
    found = convert(tmp_path / "quickgelu.pt", HEADS).model
    assert np.array_equal(found.params["projection"]["kernel"], module.proj.detach().numpy())


def test_other_halves_and_other_towers(tmp_path):
    for more, words in (({}, "a CLIP whose image tower"), ({"visual.layer1.0.conv1.weight": np.ones(1)}, "a ResNet")):
        save_file(TEXTS | more, tmp_path / "w.safetensors")
        with pytest.raises(UserError, match=words):
            convert(tmp_path / "w.safetensors")


def test_published_towers():
    """One activation for each size of open_clip's list, or none (checked against it where it is installed)."""
    assert clip_tower(1024, 14, 577, pre_norm=True) == "quick_gelu"  # OpenAI's ViT-L/14 for 336 pixels
    assert clip_tower(1024, 14, 257, pre_norm=True) is None  # OpenAI's, LAION's, MetaCLIP's
    assert clip_tower(1280, 14, 577, pre_norm=False) == "gelu"  # CLIPA
