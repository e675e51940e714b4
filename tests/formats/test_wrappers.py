"""Checkpoints as training scripts leave them: the model is found under any prefix, and what is left out is named."""

import argparse
import collections
import json
import pathlib
import sys
import types

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sources import SIZES, small_vit

from nvit_jax.errors import UserError
from nvit_jax.formats.convert import Options, convert
from nvit_jax.formats.weights import find_weights, open_checkpoint
from nvit_jax.model.groups import flatten

HEADS = Options(heads=SIZES["heads"])


@pytest.fixture(scope="module")
def state():
    return small_vit().state_dict()


@pytest.fixture(scope="module")
def features():
    """Without a classifier, as encoders are."""
    return small_vit(classes=0).state_dict()


def same(model, other):
    return all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(flatten(model.params), flatten(other.params), strict=True)
    )


def expected(state, tmp_path):
    torch.save(state, tmp_path / "expected.pth")
    return convert(tmp_path / "expected.pth", HEADS).model


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def doubled(state):
    return {name: 2 * value for name, value in state.items()}


def chunked(state):
    """DINOv2's block chunks of 2, numbered through; the third block lies in the second chunk."""
    places = {"blocks.0.": "blocks.0.0.", "blocks.1.": "blocks.0.1.", "blocks.2.": "blocks.1.2."}
    return {places.get(name[:9], name[:9]) + name[9:]: value for name, value in state.items()}


ONE = torch.ones(2, 2)
WRAPPERS = {  # name -> (content from a state without classifier, words in the notes)
    "dino": (
        lambda s: {"teacher": {**under("backbone.", s), "head.mlp.0.weight": ONE}, "student": doubled(s), "epoch": 3},
        "outside of 'backbone'",
    ),
    "dinov2_training": (
        lambda s: {
            "model": {
                **under("student.backbone.", chunked(doubled(s))),
                **under("teacher.backbone.", chunked(s)),
                "teacher.dino_head.mlp.0.weight": ONE,
            },
            "optimizer": {"state": {0: {"exp_avg": ONE}}},
            "iteration": 3,
        },
        "outside of 'teacher.backbone'",
    ),
    "lightning": (
        lambda s: {
            "state_dict": {**under("model.", s), "criterion.weight": ONE, "val_acc.tp": torch.zeros(3)},
            "hyper_parameters": {"lr": 1e-3},
            "callbacks": {},
        },
        "criterion.weight ...: outside of 'model'",
    ),
    "lightning_net": (lambda s: {"state_dict": {**under("net.", s), "loss_fn.t": ONE}}, "outside of 'net'"),
    "lightning_ema": (
        lambda s: {"state_dict": {**under("model.", doubled(s)), **under("ema_model.module.", s)}},
        "outside of 'ema_model.module'",
    ),
    "compiled": (lambda s: {"model": under("_orig_mod.", s)}, ""),
    "compiled_parallel": (lambda s: {"model": under("module._orig_mod.", s)}, ""),
    "encoder": (lambda s: {**under("encoder.", s), "decoder.0.weight": ONE}, "outside of 'encoder'"),
    "vit": (lambda s: {**under("vit.", s), "fc.weight": ONE, "fc.bias": ONE}, "fc.bias ...: outside of 'vit'"),
    "mae": (
        lambda s: {
            "model": {
                **s,
                "mask_token": torch.zeros(1, 1, 24),
                **{
                    f"decoder_{n}": ONE for n in ("embed.weight", "blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.weight")
                },
            }
        },
        "a decoder of pretraining",
    ),
    "moco": (
        lambda s: {
            "state_dict": {
                **under("module.momentum_encoder.", doubled(s)),
                **under("module.base_encoder.", s),
                "module.base_encoder.head.0.weight": ONE,
                "module.base_encoder.head.1.num_batches_tracked": torch.tensor(3),
                "module.predictor.0.weight": ONE,
            }
        },
        "a projection head of pretraining",
    ),
    "ijepa": (
        lambda s: {
            "encoder": under("module.", doubled(s)),
            "predictor": {"module.x": ONE},
            "opt": {"state": {}},
            "target_encoder": under("module.", s),
        },
        "",
    ),
    "nested": (lambda s: {"state": {"model": s, "optimizer": {"x": ONE}}}, "entry 'state.model'"),
    "criterion": (lambda s: {"net": s, "criterion": {"weight": ONE}}, "entry 'net'"),
    "text_tower": (lambda s: {**under("visual.", s), **under("text.", doubled(s))}, "outside of 'visual'"),
}


@pytest.mark.parametrize("case", WRAPPERS)
def test_the_model_is_found(case, features, tmp_path):
    make, words = WRAPPERS[case]
    torch.save(make(features), tmp_path / "w.ckpt")
    found = convert(tmp_path / "w.ckpt", HEADS)
    assert same(found.model, expected(features, tmp_path)) and found.model.dims.depth == 3
    assert words in "\n".join(found.notes), found.notes


def test_chunks_that_are_numbered_each_for_itself(features, tmp_path):
    local = {n.replace("blocks.1.2.", "blocks.1.0."): v for n, v in chunked(features).items()}
    torch.save(local, tmp_path / "w.pth")
    assert same(convert(tmp_path / "w.pth", HEADS).model, expected(features, tmp_path))


def test_several_models_are_asked_about(state, tmp_path):
    torch.save({**under("a.", state), **under("b.", doubled(state))}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"holds several models \(a, b\); choose one with --entry"):
        convert(tmp_path / "w.pth", HEADS)
    assert same(convert(tmp_path / "w.pth", HEADS._replace(entry="a")).model, expected(state, tmp_path))
    with pytest.raises(UserError, match="has no entry 'c'"):
        convert(tmp_path / "w.pth", HEADS._replace(entry="c"))


def test_suffixes_in_capitals(state, tmp_path):
    for name in ("W.PTH", "w.Ckpt", "w.PT"):
        torch.save(state, tmp_path / name)
        assert same(convert(tmp_path / name, HEADS).model, expected(state, tmp_path))


def test_harmless_values_beside_the_weights(state, tmp_path, monkeypatch):
    parsing = types.ModuleType("pytorch_lightning.utilities.parsing")
    parsing.AttributeDict = type("AttributeDict", (dict,), {"__module__": parsing.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.utilities"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, parsing.__name__, parsing)
    beside = {
        "best": np.float64(81.2),
        "step": np.int64(3),
        "done": np.bool_(True),
        "history": np.arange(3.0),
        "out": pathlib.Path("runs"),
        "args": argparse.Namespace(out=pathlib.PurePosixPath("x"), n=types.SimpleNamespace(a=1)),
        "counts": collections.defaultdict(int, a=1),
        "names": {"a", "b"},
        "hyper_parameters": parsing.AttributeDict(lr=0.1),
    }
    for name, value in beside.items():
        torch.save({"model": state, name: value}, tmp_path / "w.pth")
        assert same(convert(tmp_path / "w.pth", HEADS).model, expected(state, tmp_path)), name


def flax_state(seed=0):
    """A small ViT under big_vision's names."""
    rng = np.random.default_rng(seed)
    block = {
        **{f"LayerNorm_{i}/{leaf}": (24,) for i in (0, 1) for leaf in ("scale", "bias")},
        **{f"MultiHeadDotProductAttention_0/{n}/kernel": (24, 3, 8) for n in ("query", "key", "value")},
        **{f"MultiHeadDotProductAttention_0/{n}/bias": (3, 8) for n in ("query", "key", "value")},
        **{"MultiHeadDotProductAttention_0/out/kernel": (3, 8, 24), "MultiHeadDotProductAttention_0/out/bias": (24,)},
        **{"MlpBlock_0/Dense_0/kernel": (24, 40), "MlpBlock_0/Dense_0/bias": (40,)},
        **{"MlpBlock_0/Dense_1/kernel": (40, 24), "MlpBlock_0/Dense_1/bias": (24,)},
    }
    shapes = {
        **{"cls": (1, 1, 24), "pos_embedding": (1, 17, 24), "embedding/kernel": (4, 4, 3, 24), "embedding/bias": (24,)},
        **{f"Transformer/encoderblock_{i}/{n}": s for i in range(2) for n, s in block.items()},
        **{"Transformer/encoder_norm/scale": (24,), "Transformer/encoder_norm/bias": (24,)},
        **{"head/kernel": (24, 7), "head/bias": (7,)},
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {**under("params/", s), **under("opt/0/mu/", doubled(s)), "chrono/steps": np.ones(1, np.float32)},
        lambda s: {**under("opt/target/", s), **under("opt/state/param_states/", {f"{n}/m": v for n, v in s.items()})},
        lambda s: {
            **under("params/img/", s),
            "params/txt/head/kernel": np.ones((2, 2), np.float32),
            "params/t": np.ones(1),
        },
    ],
)
def test_npz_of_big_vision_training(wrap, tmp_path):
    state = flax_state()
    np.savez(tmp_path / "plain.npz", **state)
    np.savez(tmp_path / "w.npz", **wrap(state))
    found = convert(tmp_path / "w.npz")
    assert same(found.model, convert(tmp_path / "plain.npz").model)
    assert any("left out" in note for note in found.notes)


def test_bfloat16_in_npz(tmp_path):
    state = flax_state()
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in state.items()}
    np.savez(tmp_path / "half.npz", **half)
    np.savez(tmp_path / "same.npz", **{name: value.astype(np.float32) for name, value in half.items()})
    assert same(convert(tmp_path / "half.npz").model, convert(tmp_path / "same.npz").model)
    np.savez(tmp_path / "eight.npz", a=np.ones(3, ml_dtypes.float8_e4m3fn))
    with open_checkpoint(tmp_path / "eight.npz") as tensors, pytest.raises(UserError, match="without a type"):
        tensors.read("a")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_becomes_float32(kind, state, tmp_path):
    from safetensors.torch import save_file as save_torch

    eight = {name: value.to(kind) for name, value in state.items()}
    torch.save(eight, tmp_path / "w.pth")
    save_torch(eight, tmp_path / "w.safetensors")
    plain = expected({name: value.float() for name, value in eight.items()}, tmp_path)
    for name in ("w.pth", "w.safetensors"):
        assert same(convert(tmp_path / name, HEADS).model, plain), name


def in_parts(state, folder, suffix="safetensors"):
    names = sorted(state)
    halves = (names[::2], names[1::2])
    places = {}
    for i, part in enumerate(halves, 1):
        file = f"model-{i:05}-of-00002.{suffix}"
        if suffix == "safetensors":
            save_file({n: state[n].numpy() for n in part}, folder / file)
        else:
            torch.save({n: state[n] for n in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index, places


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_checkpoint_in_several_files(suffix, state, tmp_path):
    plain = expected(state, tmp_path)
    folder = tmp_path / "parts"
    folder.mkdir()
    index, _ = in_parts(state, folder, suffix)
    assert find_weights(folder) == index
    for path in (folder, index, folder / f"model-00002-of-00002.{suffix}"):
        assert same(convert(path, HEADS).model, plain)


def test_indices_that_are_wrong(state, tmp_path):
    index, places = in_parts(state, tmp_path)
    first = tmp_path / "model-00001-of-00002.safetensors"
    for text, words in (
        ("[1]", "is not an index"),
        ('{"weight_map": 3}', "is not an index"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "must list files beside it"),
        ('{"weight_map": {"a": 3}}', "weight_map.a must be a text"),
        ('{"weight_map": {}}', "must list files beside it"),
        ('{"weight_map": {"a": "no.safetensors"}}', "lists no.safetensors, which is not there"),
        (json.dumps({"weight_map": {**places, "more": first.name}}), "lists more, which"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=words):
            convert(index, HEADS)
    index.unlink()
    with pytest.raises(UserError, match="is one of 2 files, and their index"):
        convert(first, HEADS)


def odd(state, name, value):
    return {**state, name: value}


ODD = {
    "numbers": (lambda s: {0: ONE, 1: ONE}, "tensors under numbers"),
    "numbers_inside": (lambda s: {"model": {0: ONE}}, "holds no tensors"),
    "sparse": (lambda s: odd(s, "norm.weight", s["norm.weight"].to_sparse()), "norm.weight is sparse"),
    "meta": (lambda s: odd(s, "norm.weight", torch.ones(24, device="meta")), "norm.weight has a shape and no values"),
    "quantised": (
        lambda s: odd(s, "norm.weight", torch.quantize_per_tensor(s["norm.weight"], 0.1, 0, torch.qint8)),
        "norm.weight is quantised",
    ),
    "integers": (lambda s: odd(s, "norm.weight", torch.ones(24, dtype=torch.int8)), "holds integers (int8)"),
    "truths": (lambda s: odd(s, "norm.weight", torch.ones(24, dtype=torch.bool)), "holds integers (bool)"),
    "nested": (
        lambda s: odd(s, "norm.weight", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        "norm.weight is a nested tensor",
    ),
    "complex": (lambda s: odd(s, "norm.weight", torch.ones(24, dtype=torch.complex64)), "holds complex numbers"),
    "scalar": (lambda s: odd(s, "pos_embed", torch.tensor(1.0)), "pos_embed has shape (); 3 axes"),
    "scalar_patches": (lambda s: odd(s, "patch_embed.proj.weight", torch.tensor(1.0)), "has shape (); 4 axes"),
    "scalar_mlp": (lambda s: odd(s, "blocks.1.mlp.fc1.weight", torch.tensor(1.0)), "has shape (); 2 axes"),
    "scalar_fc2": (lambda s: odd(s, "blocks.1.mlp.fc2.weight", torch.tensor(1.0)), "has shape ()"),
    "scalar_head": (lambda s: odd(s, "head.weight", torch.tensor(1.0)), "head.weight has shape ()"),
    "empty": (lambda s: odd(s, "patch_embed.proj.weight", torch.ones(24, 3, 0, 0)), "axes that are not empty"),
    "rectangle": (lambda s: odd(s, "patch_embed.proj.weight", torch.ones(24, 3, 4, 8)), "patches that are not square"),
    "final_norm": (lambda s: {n: v for n, v in s.items() if not n.startswith("norm.")}, "final_norm=False"),
    "rms": (lambda s: {n: v for n, v in s.items() if not n.endswith(("norm1.bias", "norm2.bias"))}, "RMSNorm?"),
    "packed": (
        lambda s: odd(s, "blocks.0.mlp.fc2.weight", torch.ones(24, 20)),
        "blocks.1.mlp.fc2.weight has shape (24, 40), the model asks for (24, 20)",
    ),
    "lora": (lambda s: odd(s, "blocks.0.attn.qkv.lora_A.weight", ONE), "LoRA adapters"),
    "scales": (lambda s: odd(s, "blocks.0.attn.qkv.weight_scale", ONE), "a quantised model"),
    "pre_norm": (lambda s: odd(s, "norm_pre.weight", ONE), "is a CLIP: its activation (quick_gelu, gelu)"),
    "one_block": (lambda s: {n: v for n, v in s.items() if n != "blocks.1.attn.proj.weight"}, "blocks.1.attn.proj"),
    "gap": (lambda s: {n: v for n, v in s.items() if not n.startswith("blocks.1.")}, "left over in the file: blocks.2"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", ODD)
def test_odd_tensors_are_one_line(case, state, tmp_path):
    make, words = ODD[case]
    torch.save(make(state), tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "w.pth", HEADS)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1, caught.value


def test_missing_biases_are_zeros(state, tmp_path):
    gone = ("patch_embed.proj.bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias", "head.bias")
    torch.save({n: v for n, v in state.items() if not n.endswith(gone)}, tmp_path / "w.pth")
    zero = {n: torch.zeros_like(v) if n.endswith(gone) else v for n, v in state.items()}
    found = convert(tmp_path / "w.pth", HEADS)
    assert same(found.model, expected(zero, tmp_path)) and any("zeros stand" in note for note in found.notes)


OTHERS = {  # a name of another family's checkpoint -> what it is called
    "layers.0.blocks.0.attn.qkv.weight": "a Swin Transformer",
    "swin.encoder.layers.0.blocks.0.layernorm_before.weight": "a Swin Transformer",
    "stages.0.blocks.0.conv_dw.weight": "a ConvNeXt",
    "convnext.encoder.stages.0.layers.0.dwconv.weight": "a ConvNeXt",
    "stages.2.1.transformer.0.attn.qkv.weight": "a MobileViT",
    "stages.0.blocks.0.attn_grid.attn.qkv.weight": "a MaxViT",
    "stages.0.blocks.0.attn.attention_biases": "a LeViT or TinyViT",
    "stages.0.blocks.0.attn.kv.weight": "a hierarchical Transformer (PVT)",
    "stages.2.blocks.0.attn.rel_pos.relative_position_bias_table": "(CoAtNet, GCViT)",
    "blocks.0.attn.temperature": "an XCiT",
    "blocks.2.proj.weight": "a Hiera or MViT",
    "blocks.0.attn.rel_pos.mlp.fc1.weight": "a ViT with relative positions",
    "rel_pos_bias.relative_position_bias_table": "a BEiT whose blocks share their relative positions",
    "patch_embed.backbone.stem.conv.weight": "a hybrid of a ResNet and a ViT",
    "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight": "a ResNet",
    "conv_stem.weight": "a convolutional network",
    "features.0.0.weight": "a convolutional network",
    "model.stages.0.layers.0.depthwise_conv.weight": "a ConvNeXt",
    "beit.encoder.relative_position_bias.relative_position_bias_table": "a BEiT whose blocks share",
    "blocks.0.attn.gate.weight": "a ViT with gates in its attention",
    "rope.freqs": "a ViT with rotary positions that are learned",
    "blocks.0.attn.rope.bands": "a ViT with rotary positions that are neither",
    "text_model.embeddings.token_embedding.weight": "a model of texts",
    "token_embedding.weight": "a CLIP whose image tower is another one",
    "blocks_token_only.0.norm1.weight": "a CaiT",
    "blocks.0.mlp_tokens.fc1.weight": "an MLP-Mixer",
    "model.layers.0.self_attn.q_proj.weight": "a language model",
    "block1.0.attn.q.weight": "a hierarchical Transformer",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_named(name, tmp_path):
    save_file({name: np.ones((2, 2), np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "w.safetensors")
    assert OTHERS[name] in str(caught.value) and "read are plain ViT, DeiT" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_config_names_the_family(tmp_path):
    """Of tensors that nobody knows."""
    save_file({"some.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "efficientformer"}')
    with pytest.raises(UserError, match="config.json: model_type='efficientformer' is not a plain Vision Transformer"):
        convert(tmp_path)
