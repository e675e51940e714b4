"""EVA, EVA-02 and BEiT: what timm's and transformers' own classes compute, under their names and their projects'."""

import itertools
import json

import numpy as np
import pytest
import sources
import torch
import transformers
from safetensors.numpy import save_file
from sources import nchw, numpy_state, randomise, run_torch
from test_convert import IMAGES, check, check_round_trip, save

from nvit_jax.errors import UserError
from nvit_jax.formats.convert import Options, convert, convert_checkpoint
from nvit_jax.model.dims import ViTDims

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 7}
EVA02 = {"swiglu_mlp": True, "mlp_ratio": 4 * 2 / 3, "use_rot_pos_emb": True, "ref_feat_shape": (16, 16)}
APART = EVA02 | {"qkv_fused": False, "scale_mlp": True}
NEAR = {"rotary": 4, "rotary_grid": 16, "rotary_base": 10_000.0, "gated": True, "activation": "silu"}


def timm():
    found = sources.import_timm()
    if found is None:
        pytest.skip("timm is not installed: pip install --no-deps timm (without torchvision)")
    return found


def exact_turns(module):
    """timm rounds sines and cosines to float32; these are the same in float64, of its own angles."""
    rope = getattr(getattr(module, "trunk", module), "rope", None)
    if rope is None:
        return module
    rows, columns = getattr(module, "trunk", module).patch_embed.grid_size
    grid = np.meshgrid(np.arange(rows) / rows * 16, np.arange(columns) / columns * 16, indexing="ij")
    bands = (1 / 10_000 ** (torch.arange(2) / 2)).double().numpy()
    angles = np.concatenate([place.reshape(-1, 1) * bands for place in grid], 1).repeat(2, 1)
    table = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], 1))
    assert (rope.get_embed().double() - table).abs().max() < 1e-6
    rope.get_embed = lambda *_, **__: table
    return module


def as_published(state):
    """Names of the projects EVA-02 and EVA-CLIP."""
    names = {"attn.norm.": "attn.inner_attn_ln.", "mlp.norm.": "mlp.ffn_ln.", "mlp.fc1_g.": "mlp.w1."}
    names |= {"mlp.fc1_x.": "mlp.w2.", "mlp.fc2.": "mlp.w3.", "q_proj.bias": "q_bias", "v_proj.bias": "v_bias"}
    out = {}
    for name, value in state.items():
        for old, new in names.items():
            name = name.replace(old, new) if name.startswith("blocks.") else name
        out[name] = value
    turns = {f"{where}rope.freqs_{t}": np.ones((16, 8), np.float32) for t in ("cos", "sin") for where in ("", _ATTN)}
    return out | turns | {"mask_token": np.ones((1, 1, 24), np.float32), "lm_head.weight": np.ones((5, 24), np.float32)}


_ATTN = "blocks.0.attn."
KINDS = {  # arguments of timm's Eva, what renames the tensors, dims
    "eva": ({}, dict, {"rotary": 0, "gated": False, "norm_after_pool": True, "pool": "mean"}),
    "eva_token": ({"global_pool": "token", "init_values": 0.1}, dict, {"pool": "class", "layer_scale": True}),
    "eva02_small": (EVA02, dict, NEAR | {"proj_norm_count": 0, "fc2_norm_count": 0}),
    "eva02_base": (APART, dict, NEAR | {"fc2_norm_count": 64}),
    "eva02_clip": (
        APART | {"scale_attn_inner": True, "global_pool": "token"},
        dict,
        NEAR | {"proj_norm_count": 24, "fc2_norm_count": 64, "pool": "class"},
    ),
    "rope_gap": (
        EVA02
        | {"swiglu_mlp": False, "mlp_ratio": 4, "use_abs_pos_emb": False, "class_token": False}
        | {"num_reg_tokens": 1, "init_values": 0.1},
        dict,
        {"rotary": 4, "rotary_grid": 16, "positions": "none", "pool": "mean", "registers": 1, "cls_token": False},
    ),
    "eva02_qk_norm": (EVA02 | {"qk_norm": True}, dict, NEAR | {"qk_norm_count": 8}),
    "eva02_published": (APART | {"scale_attn_inner": True}, as_published, NEAR | {"proj_norm_count": 24}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_eva(kind, tmp_path):
    arguments, rename, wanted = KINDS[kind]
    timm()
    from timm.models.eva import Eva

    module = exact_turns(randomise(Eva(**SMALL | arguments)))
    names = {"eva02_published": "w.pth", "rope_gap": "vit_medium_patch16_rope_reg1_gap_256.pth"}  # its turns tell
    name = names.get(kind, "eva02_base_patch4_16.pth")
    path = save(tmp_path / name, rename(numpy_state(module.state_dict())))
    model = check(path, lambda dtype: run_torch(module, lambda m: m.blocks, IMAGES, dtype), Options(heads=3, image=16))
    wanted = {"norm_eps": 1e-6, "positions": "all", "qkv_bias": True} | wanted
    assert {name: getattr(model.dims, name) for name in wanted} == wanted
    check_round_trip(model, tmp_path)


def beit_state(module):
    """With what older files hold as well."""
    state = numpy_state(module.state_dict())
    return state | {f"blocks.{i}.attn.relative_position_index": np.ones((17, 17), np.int64) for i in range(2)}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1}, {"positions": "none"}),
        ({"use_rel_pos_bias": True, "global_pool": "token"}, {"positions": "all", "pool": "class"}),
        ({"use_rel_pos_bias": True, "swiglu_mlp": True, "scale_mlp": True}, {"gated": True, "fc2_norm_count": 96}),
    ],
    ids=["v1", "token", "gated"],
)
def test_beit(arguments, wanted, tmp_path):
    """The relative positions tell heads and image."""
    timm()
    from timm.models.beit import Beit

    module = randomise(Beit(**SMALL | arguments))
    path = save(tmp_path / "w.pth", beit_state(module))
    model = check(path, lambda dtype: run_torch(module, lambda m: m.blocks, IMAGES, dtype), Options())
    wanted = {"relative": True, "heads": (3, 3), "image": 16, "rotary": 0, "pool": "mean"} | wanted
    assert {name: getattr(model.dims, name) for name in wanted} == wanted
    with pytest.raises(UserError, match="--image=32: the model has relative positions for 16 pixels"):
        convert(path, Options(image=32))
    check_round_trip(model, tmp_path)


def test_a_beit_for_rectangles(tmp_path):
    timm()
    from timm.models import save_for_hf
    from timm.models.beit import Beit

    arguments = SMALL | {"img_size": (8, 16), "use_rel_pos_bias": True, "use_abs_pos_emb": False}
    module = randomise(Beit(**arguments))
    module.pretrained_cfg = {"architecture": "beit_base_patch16_224", "input_size": (3, 8, 16)}
    save_for_hf(module, tmp_path, model_args=arguments, safe_serialization=True)
    images = IMAGES[:, :8]
    model = check(tmp_path, lambda dtype: run_torch(module, lambda m: m.blocks, images, dtype), Options(), images)
    assert model.dims.image == (8, 16) and model.dims.grid == (2, 4)


HF = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}
HF |= {"intermediate_size": 48, "num_labels": 7}
HF_KINDS = {
    "relative": ("BeitForImageClassification", {"use_relative_position_bias": True}, {"pool": "mean"}),
    "absolute": (
        "BeitForImageClassification",
        {"use_absolute_position_embeddings": True, "use_mask_token": True, "layer_scale_init_value": 0.2},
        {"relative": False, "positions": "all"},
    ),
    "class_token": (
        "BeitForImageClassification",
        {"use_relative_position_bias": True, "use_mean_pooling": False, "layer_scale_init_value": 0.0}
        | {"hidden_act": "relu"},
        {"pool": "class", "norm_after_pool": False, "layer_scale": False, "activation": "relu"},
    ),
    "features": ("BeitModel", {"use_relative_position_bias": True, "layer_norm_eps": 1e-3}, {"classes": 0}),
    "data2vec": ("Data2VecVisionForImageClassification", {"use_relative_position_bias": True}, {"classes": 7}),
}


@pytest.mark.parametrize("kind", HF_KINDS)
def test_hugging_face_beit(kind, tmp_path, capsys):
    name, changes, wanted = HF_KINDS[kind]
    config = (transformers.Data2VecVisionConfig if kind == "data2vec" else transformers.BeitConfig)(**HF | changes)
    module = randomise(getattr(transformers, name)(config))
    module.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if kind == "absolute":  # the names of transformers 5, beside those of the published files
        path = save(tmp_path / "w.pth", numpy_state(module.state_dict()))
    body = next((getattr(module, n) for n in ("beit", "data2vec_vision") if hasattr(module, n)), module)
    layers = body.layers if hasattr(body, "layers") else body.encoder.layer

    def run(dtype):
        read = lambda out: out.logits if hasattr(out, "logits") else out.pooler_output  # noqa: E731
        return run_torch(module, lambda m: layers, IMAGES, dtype, read)

    model = check(path, run, Options())
    wanted = {"relative": True, "layer_scale": True, "norm_after_pool": True} | wanted
    assert {name: getattr(model.dims, name) for name in wanted} == wanted
    assert model.dims.norm_eps == changes.get("layer_norm_eps", 1e-12)
    if kind != "absolute":
        convert_checkpoint(tmp_path, tmp_path / "out", verify=True)
        assert f"that is transformers' {name}, from its config.json" in capsys.readouterr().out
    check_round_trip(model, tmp_path)


def test_what_is_refused(tmp_path):
    """Positions that blocks share, unknown sizes of EVA-02, norms behind the parts."""
    config = transformers.BeitConfig(**HF, use_shared_relative_position_bias=True)
    randomise(transformers.BeitForImageClassification(config)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="blocks share their relative positions"):
        convert(tmp_path)
    place = tmp_path / "eva"
    place.mkdir()
    timm()
    from timm.models.eva import Eva

    state = numpy_state(Eva(**SMALL | EVA02).state_dict())
    save_file(state, place / "w.safetensors")
    with pytest.raises(UserError, match="gates in its mlps and no biases of keys"):
        convert(place / "w.safetensors", Options(heads=3))
    other = place / "eva02_enormous_patch14_clip_224.safetensors"
    save_file(state, other)
    with pytest.raises(UserError, match="norms behind its parts"):
        convert(other, Options(heads=3))


def test_rotary_positions_that_are_stated(tmp_path):
    """No tensor shows them: an EVA with them, which timm can build, is not read as one without."""
    timm()
    from timm.models.eva import Eva

    save_file(numpy_state(Eva(**SMALL).state_dict()), tmp_path / "model.safetensors")
    config = {"architecture": "eva_giant_patch14_224", "model_args": {"num_heads": 3, "use_rot_pos_emb": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="use_rot_pos_emb=True is stated, which is not built for such a model"):
        convert(tmp_path)
    config["model_args"]["use_rot_pos_emb"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert convert(tmp_path).model.dims.rotary == 0


def test_timms_own_folder(tmp_path, capsys):
    """config.json says all: nothing is asked, and timm's own model is what it is compared with."""
    library = timm()
    from timm.models import save_for_hf

    arguments = {"depth": 1, "img_size": 28, "num_classes": 5}
    for name, key in itertools.product(("eva02_tiny_patch14_224", "beit_base_patch16_224"), ("folder",)):
        place = tmp_path / name / key
        sizes = arguments | ({"img_size": 32} if name.startswith("beit") else {})
        module = randomise(library.create_model(name, **sizes))
        save_for_hf(module, place, model_args=sizes, safe_serialization=True)
        convert_checkpoint(place, tmp_path / name / "out", verify=True)
        assert f"that is timm's {name}, from config.json" in capsys.readouterr().out
        model = convert(place).model
        images = np.random.default_rng(1).standard_normal((2, *model.dims.sides, 3)).astype(np.float32)
        with torch.inference_mode():
            expected = module(nchw(images, torch.float32)).numpy()
        # float32 sums of hundreds of large random terms.
        found = np.asarray(model.logits(model.params, images))
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
        assert isinstance(model.dims, ViTDims) and model.dims.mlp == (module.blocks[0].mlp.fc2.in_features,)
