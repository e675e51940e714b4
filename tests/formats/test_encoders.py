"""DINOv2, MAE and I-JEPA: what their publishers' libraries compute, block by block, as features or as a classifier."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from sources import hooked, nchw, numpy_state, randomise
from test_convert import IMAGES, check, check_round_trip

from nvit_jax.errors import UserError
from nvit_jax.formats.convert import Options, convert, convert_checkpoint
from nvit_jax.model.positions import Bicubic, interpolate_positions

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}
PLAIN = {"intermediate_size": 48}  # the same widths everywhere: they are compiled once
DECODER = {"decoder_num_attention_heads": 2, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 3}
FEATURES = {"classes": 0, "pool": "class"}
SWIGLU = {"gated": True, "activation": "silu", "mlp": (48, 48)}
REGISTERS = {"registers": 3, "positions": "patches"}


def make(name, **values):
    """A model of transformers with random weights, by the name of its class."""
    return randomise(getattr(transformers, name)(getattr(transformers, values.pop("config"))(**SIZES | values)))


# The module, and what its dims must be.
KINDS = {
    "dinov2": (
        lambda: make("Dinov2Model", config="Dinov2Config", mlp_ratio=2),
        FEATURES | {"layer_scale": True, "mlp": (48, 48), "gated": False, "norm_eps": 1e-6},
    ),
    "dinov2_classifier": (
        lambda: make("Dinov2ForImageClassification", config="Dinov2Config", mlp_ratio=2, num_labels=7),
        {"classes": 7, "pool": "class_mean", "mean_over": "patches"},
    ),
    "dinov2_swiglu": (
        lambda: make("Dinov2Model", config="Dinov2Config", mlp_ratio=3, use_swiglu_ffn=True, hidden_act="relu"),
        FEATURES | SWIGLU,
    ),
    "dinov2_registers": (
        lambda: make(
            "Dinov2WithRegistersForImageClassification",
            config="Dinov2WithRegistersConfig",
            mlp_ratio=3,
            num_register_tokens=3,
            use_swiglu_ffn=True,
            num_labels=7,
        ),
        {"classes": 7, "pool": "class_mean", **SWIGLU, **REGISTERS},
    ),
    "ijepa": (
        lambda: make("IJepaModel", config="IJepaConfig", **PLAIN),
        {"classes": 0, "cls_token": False, "pool": "mean", "norm_after_pool": False, "norm_eps": 1e-12},
    ),
    "ijepa_classifier": (
        lambda: make("IJepaForImageClassification", config="IJepaConfig", **PLAIN, num_labels=7),
        {"classes": 7, "cls_token": False, "pool": "mean"},
    ),
    "mae": (lambda: make("ViTMAEForPreTraining", config="ViTMAEConfig", **PLAIN, **DECODER), FEATURES),
}


def body_of(module):
    """The encoder, without a classifier or a decoder."""
    return next(
        (getattr(module, n) for n in ("dinov2", "dinov2_with_registers", "ijepa", "vit") if hasattr(module, n)), module
    )


def run(module, dtype, images=IMAGES):
    """(logits, or features pooled as the publisher does; the stream behind every block)."""
    module, body = module.to(dtype), body_of(module)
    blocks = body.layers if hasattr(body, "layers") else body.encoder.layer
    with torch.inference_mode(), hooked(blocks) as seen:
        if isinstance(module, transformers.ViTMAEForPreTraining):
            module.config.mask_ratio = 0.0
            order = torch.arange(16, dtype=torch.float32).expand(len(images), -1)  # of the patches, as they are
            return body(nchw(images, dtype), noise=order).last_hidden_state[:, 0].numpy(), seen
        out = module(nchw(images, dtype))
        if "logits" in out:
            return out.logits.numpy(), seen
        x = out.last_hidden_state
        return (x.mean(1) if isinstance(module, transformers.IJepaModel) else x[:, 0]).numpy(), seen


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_transformers_5(kind, tmp_path):
    """As they are in memory, which is not how they are saved."""
    module, path = KINDS[kind][0](), tmp_path / "model.safetensors"
    module.save_pretrained(tmp_path)
    old = convert(path).model
    save_file(numpy_state(module.state_dict()), path)
    new = convert(path).model
    assert new.dims == old.dims
    assert all(map(np.array_equal, *(jax.tree.leaves(m.params) for m in (new, old))))


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face(kind, tmp_path):
    module, wanted = KINDS[kind][0](), KINDS[kind][1]
    module.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    model = check(path, lambda dtype: run(module, dtype), Options())
    assert {name: getattr(model.dims, name) for name in wanted} == wanted and model.dims.heads == (3, 3)
    check_round_trip(model, tmp_path)
    found = convert(path)
    notes, made = " ".join(found.notes), found.model.info["preprocessing"]
    assert "nothing beside the file says how images are prepared" in notes
    assert (made["mean"][0], made["interpolation"]) == (0.485, "bicubic")  # no file says so: as they were trained
    assert ("mask_token" in notes) == kind.startswith("dinov2") and ("a decoder of pretraining" in notes) == (
        kind == "mae"
    )


def official(state):
    """Hugging Face's tensors of DINOv2 under the names of facebookresearch/dinov2."""
    out = {}
    for name, value in state.items():
        block, _, rest = name.removeprefix("encoder.layer.").partition(".")
        if not name.startswith("encoder."):
            new = name.removeprefix("embeddings.").replace("patch_embeddings.projection", "patch_embed.proj")
            out[new.replace("position_embeddings", "pos_embed").replace("layernorm", "norm")] = value
        elif ".query." in name:
            parts = [state[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            out[f"blocks.{block}.attn.qkv.{rest.rsplit('.')[-1]}"] = np.concatenate(parts)
        elif ".key." not in name and ".value." not in name:
            for old, new in (
                ("attention.output.dense", "attn.proj"),
                ("layer_scale1.lambda1", "ls1.gamma"),
                ("layer_scale2.lambda1", "ls2.gamma"),
                ("weights_in", "w12"),
                ("weights_out", "w3"),
            ):
                rest = rest.replace(old, new)
            out[f"blocks.{block}.{rest}"] = value
    return out


def timm_gates(state):
    """The gate and what it multiplies as two layers, as timm's SwiGLU has them."""
    out = {name.replace(".w3.", ".fc2."): value for name, value in official(state).items() if ".w12." not in name}
    for name, value in official(state).items():
        if ".w12." in name:
            halves = np.split(value, 2)
            out |= {
                name.replace(".w12.", f".{new}."): half.copy()
                for new, half in zip(("fc1_g", "fc1_x"), halves, strict=True)
            }
    return out


@pytest.mark.parametrize("rename", [official, timm_gates])
@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_official_dinov2(kind, rename, tmp_path):
    """Read under other names, it is the same model as under Hugging Face's."""
    module = make(f"{kind}Model", config=f"{kind}Config", mlp_ratio=2, use_swiglu_ffn=True)
    module.save_pretrained(tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    save_file(rename(state), tmp_path / "w.safetensors")
    wanted = convert(tmp_path / "hf").model
    found = convert(tmp_path / "w.safetensors", Options(heads=3))
    assert found.model.dims == wanted.dims
    assert all(map(np.array_equal, *(jax.tree.leaves(m.params) for m in (found.model, wanted))))
    assert any("read as SwiGLU, gates first" in note for note in found.notes)
    assert any("mask_token" in note for note in found.notes)


# ----------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("how", [Bicubic(), Bicubic(antialias=True), Bicubic(offset=0.1)])
def test_positions_are_interpolated_as_pytorch_does(how):
    grid = np.random.default_rng(0).standard_normal((7, 7, 2))
    planes = torch.from_numpy(grid.transpose(2, 0, 1)[None].copy())
    for side in (1, 3, 4, 7, 9, 16):
        # The official code gives PyTorch the factor in the place of the size where there is an offset.
        sizes = {"scale_factor": ((side + how.offset) / 7,) * 2} if how.offset else {"size": (side, side)}
        wanted = torch.nn.functional.interpolate(planes, mode="bicubic", antialias=how.antialias, **sizes)
        found = interpolate_positions(grid, side, side, how)
        assert np.abs(found - wanted[0].numpy().transpose(1, 2, 0)).max() <= 1e-12


PROCESSOR = {"do_resize": True, "size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 16}


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_the_processors_image_is_the_models(kind, tmp_path):
    """DINOv2 is pretrained at 518 pixels, and its processor makes 224: Hugging Face's model interpolates in between."""
    module = make(f"{kind}Model", config=f"{kind}Config", image_size=28, mlp_ratio=2)
    module.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    found = convert(tmp_path)
    model = found.model
    assert model.dims.image == 16 and model.info["preprocessing"]["size"] == 16
    assert any("from 7x7 to 4x4" in note and "--image=28 keeps them" in note for note in found.notes)
    wanted, _ = run(module, torch.float32)
    with jax.default_matmul_precision("float32"):
        logits = np.asarray(model.logits(model.params, IMAGES.astype(np.float32)))
    assert np.abs(logits - wanted).max() <= 1e-4
    assert convert(tmp_path, Options(image=28)).model.dims.image == 28
    # Without a processor config.json says it: as stored, or another size.
    (tmp_path / "preprocessor_config.json").unlink()
    assert convert(tmp_path).model.dims.image == 28
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_size": 16}))
    assert all(map(np.array_equal, *(jax.tree.leaves(m.params) for m in (convert(tmp_path).model, model))))


# -------------------------------------------------------------------------------------------------- checks


REFUSED = {
    "swiglu": ({"use_swiglu_ffn": True}, "its mlp is 48, and what is stated of it says 32"),
    "ratio": ({"mlp_ratio": 4}, "its mlp is 48, and what is stated of it says 96"),
    "ratio_text": ({"mlp_ratio": "4"}, "mlp_ratio='4' is not"),
    "registers": ({"num_register_tokens": 4}, "its registers is 0, and what is stated of it says 4"),
    "unknown": ({"rope_theta": 100.0}, "rope_theta=100.0 is a setting that is not known"),
    "image": ({"image_size": [16, 8]}, "images of 16 x 8 pixels are stated, and its positions are for 16"),
    "rectangle": ({"image_size": [32, 8]}, "images of 32 x 8 pixels are stated, and its positions are for 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_config_contradicts(case, tmp_path):
    change, words = REFUSED[case]
    make("Dinov2Model", config="Dinov2Config", mlp_ratio=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as caught:
        convert(tmp_path)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1, caught.value


@pytest.mark.parametrize(
    ("kind", "name"), [("dinov2_registers", "Dinov2WithRegistersForImageClassification"), ("mae", "ViTMAEModel")]
)
def test_verify_runs_the_encoder(kind, name, tmp_path, capsys):
    KINDS[kind][0]().save_pretrained(tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "out", verify=True)
    said = capsys.readouterr().out
    assert f"that is transformers' {name}, from its config.json" in said
    assert float(said.split("difference to PyTorch ")[1].split()[0]) < 1e-4


def test_a_new_classifier_reads_what_the_old_one_read(tmp_path):
    KINDS["dinov2_classifier"][0]().save_pretrained(tmp_path)
    model = convert(tmp_path, Options(classes=3)).model
    assert model.dims.pool == "class_mean" and model.params["head_mean"]["kernel"].shape == (24, 3)
