"""Converted weights compute what PyTorch computes, for every layout: logits, every block, and the way back."""

import itertools
import re
import shutil

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sources
import torch
import transformers
from conftest import ROOT, random_params
from safetensors.numpy import save_file
from sources import SIZES, nchw, numpy_state, randomise, run_torch, small_vit

from nvit_jax.errors import UserError
from nvit_jax.formats import export, interchange
from nvit_jax.formats.convert import Options, convert, convert_checkpoint
from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims, preset
from nvit_jax.model.directory import Model
from nvit_jax.model.groups import flatten

IMAGES = np.random.default_rng(5).standard_normal((3, 16, 16, 3))
HEADS = Options(heads=SIZES["heads"])
SHARED = ROOT.parent / "shared"


def block_outputs(model, images) -> list[np.ndarray]:
    """The residual stream behind every block, from the unrolled model."""
    module = vit.ViT(model.dims, scan=False)
    _, kept = module.apply(
        {"params": model.params},
        images,
        capture_intermediates=lambda m, name: isinstance(m, vit.Block) and name == "__call__",
        mutable=["intermediates"],
    )
    return [np.asarray(kept["intermediates"][f"block_{i}"]["__call__"][0][0]) for i in range(model.dims.depth)]


def check(path, run, options=HEADS, given=IMAGES) -> Model:
    """`run(dtype)` -> (logits, streams) of the other framework on images. Returns the float32 model."""
    with jax.enable_x64(True):
        exact = convert(path, options, dtype=np.float64).model
        logits, streams = run(torch.float64)
        # The mapping is exact; what is left is the order of float64 additions.
        assert np.abs(np.asarray(exact.logits(exact.params, given)) - logits).max() <= 1e-9
        for ours, theirs in zip(block_outputs(exact, given), streams, strict=True):
            assert np.abs(ours - theirs).max() <= 1e-9 * max(1, np.abs(theirs).max())
    model = convert(path, options).model
    logits, streams = run(torch.float32)
    with jax.default_matmul_precision("float32"):
        images = given.astype(np.float32)
        assert np.abs(np.asarray(model.logits(model.params, images)) - logits).max() <= 1e-4
        for ours, theirs in zip(block_outputs(model, images), streams, strict=True):
            assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    return model


def check_round_trip(model: Model, tmp_path):
    """Out and in again, by names alone and through an exported file: every bit the same."""
    state = interchange.to_torch(model.dims, model.params)
    shapes = {name: value.shape for name, value in state.items()}
    again = interchange.from_torch(model.dims, shapes, state.__getitem__, "here", np.float32)
    written = export.write_safetensors(model, tmp_path)
    file = convert(written.path).model
    assert file.dims == model.dims
    for (path, a), (_, b), (_, c) in zip(
        *(sorted(flatten(p)) for p in (model.params, again, file.params)), strict=True
    ):
        assert np.array_equal(a, b) and np.array_equal(a, c), path


def save(path, state, **wrapper):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(wrapper | {"model": {k: torch.from_numpy(v) for k, v in state.items()}}, path)
    return path


def rename_deit3(state):
    return {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in state.items()}


def as_dinov2(state):
    """The official names: positions for the class token too, registers without, and a mask token."""
    out = {k.replace("reg_token", "register_tokens"): v for k, v in state.items()}
    cut = 0.25 * out["cls_token"]
    out["cls_token"] = out["cls_token"] - cut
    out["pos_embed"] = np.concatenate([cut, out["pos_embed"]], axis=1)
    return out | {"mask_token": np.ones((1, 24), np.float32)}


TIMM_VARIANTS = {
    "deit": ({}, dict),
    "distilled": ({"dist_token": True}, dict),
    "deit3": ({"layer_scale": True, "positions": "patches"}, rename_deit3),
    "augreg_in21k": ({"pre_logits": 10}, dict),
    "mean_pool": ({"pool": "mean", "norm_after_pool": True}, dict),
    "mean_pool_without_class_token": ({"pool": "mean", "cls_token": False}, dict),
    "no_qkv_bias": ({"qkv_bias": False}, dict),
    "dinov2": ({"layer_scale": True}, lambda s: s | {"mask_token": np.ones((1, 24), np.float32)}),
    "dinov2_registers": ({"layer_scale": True, "registers": 4, "positions": "patches"}, as_dinov2),
    "dino_without_head": ({"classes": 0}, lambda s: s | {"head.mlp.0.weight": np.ones((3, 24), np.float32)}),
}


@pytest.mark.parametrize("variant", TIMM_VARIANTS)
def test_timm_names(variant, tmp_path):
    changes, rename = TIMM_VARIANTS[variant]
    module = small_vit(**changes)
    # The position of the class token is added to it, in float64, as the converter does.
    path = save(tmp_path / "w.pth", rename(numpy_state(module.state_dict())))
    if variant == "dinov2_registers":
        state = torch.load(path)["model"]
        module.cls_token.data = state["cls_token"].double() + state["pos_embed"][:, :1]
    model = check(path, lambda dtype: run_torch(module, lambda m: m.blocks, IMAGES, dtype))
    assert model.dims == ViTDims.uniform(**(SIZES | changes))
    check_round_trip(model, tmp_path)


@pytest.mark.parametrize("kind", ["vit", "deit", "deit_with_teacher", "new_names", "gelu_new"])
def test_hugging_face(kind, tmp_path):
    values = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "image_size": 16,
        "patch_size": 4,
        "num_labels": 7,
        "hidden_act": "gelu_new" if kind == "gelu_new" else "gelu",
    }
    if kind in ("deit", "deit_with_teacher"):
        config = transformers.DeiTConfig(**values)
        names = {"deit": "DeiTForImageClassification", "deit_with_teacher": "DeiTForImageClassificationWithTeacher"}
        module = getattr(transformers, names[kind])(config)
    else:
        module = transformers.ViTForImageClassification(transformers.ViTConfig(**values))
    randomise(module)
    module.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if kind == "new_names":
        path = save(tmp_path / "w.pth", numpy_state(module.state_dict()))
    body = module.vit if hasattr(module, "vit") else module.deit

    def run(dtype):
        return run_torch(module, lambda m: body.layers, IMAGES, dtype, lambda out: out.logits)

    model = check(path, run, Options())  # config.json beside tells the heads, the activation and eps
    assert model.info["classes"] == [f"LABEL_{i}" for i in range(7)] and model.dims.norm_eps == 1e-12
    assert model.dims.registers == (kind == "deit") and model.dims.dist_token == (kind == "deit_with_teacher")
    check_round_trip(model, tmp_path)


DINOV3 = {  # config -> dims
    "small": ({"num_register_tokens": 4}, {"registers": 4}),
    "gated": ({"use_gated_mlp": True, "hidden_act": "silu"}, {"gated": True, "activation": "silu", "mlp": (40,) * 3}),
    "theta_k_bias": ({"rope_theta": 30.0, "key_bias": True, "query_bias": False}, {"rotary_base": 30.0}),
    "no_biases": (
        {"query_bias": False, "value_bias": False, "proj_bias": False, "mlp_bias": False, "layer_norm_eps": 1e-3},
        {"qkv_bias": False, "norm_eps": 1e-3},
    ),
}


@pytest.mark.parametrize("kind", DINOV3)
def test_hugging_face_dinov3(kind, tmp_path, capsys):
    """Rotary positions, on patches only."""
    changes, wanted = DINOV3[kind]
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
    config = transformers.DINOv3ViTConfig(**sizes, image_size=16, patch_size=4, **changes)
    module = randomise(transformers.DINOv3ViTModel(config))
    module.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if kind == "small":  # the names of transformers 5, beside those of the published files
        path = save(tmp_path / "w.pth", numpy_state(module.state_dict()))

    def run(dtype):
        return run_torch(module, lambda m: m.model.layer, IMAGES, dtype, lambda out: out.pooler_output)

    model = check(path, run, Options())
    assert (model.dims.rotary, model.dims.qk, model.dims.qk_scale) == (4, (4,) * 3, 8**-0.5)
    assert {name: getattr(model.dims, name) for name in wanted} == wanted
    assert model.info["preprocessing"]["crop_mode"] == "squash" and model.dims.positions == "none"
    if kind == "theta_k_bias":
        convert_checkpoint(tmp_path, tmp_path / "out", verify=True)
        assert "that is transformers' DINOv3ViTModel, from its config.json" in capsys.readouterr().out
        larger = convert(tmp_path, Options(image=32)).model  # any image size, and its own patches
        images = np.random.default_rng(6).standard_normal((2, 32, 32, 3)).astype(np.float32)
        with torch.inference_mode():
            expected = module.float()(nchw(images, torch.float32)).pooler_output.numpy()
        assert np.abs(np.asarray(larger.logits(larger.params, images)) - expected).max() <= 1e-4
    check_round_trip(model, tmp_path)


def as_dinov3(state, masked):
    """The project's own names."""
    names = {"embeddings.register_tokens": "storage_tokens", "embeddings.patch_embeddings": "patch_embed.proj"}
    names |= {"embeddings.": "", "model.layer.": "blocks.", "layer.": "blocks.", "attention.o_proj": "attn.proj"}
    names |= {"layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "mlp.gate_proj": "mlp.w1"}
    gated = any("gate_proj" in name for name in state)
    names |= {"mlp.up_proj": "mlp.w2", "mlp.down_proj": "mlp.w3"} if gated else {}
    names |= {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"} if not gated else {}
    out = {}
    for name, value in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        out[name] = value
    for i in range(3):
        parts = [f"blocks.{i}.attention.{n}_proj" for n in "qkv"]
        out[f"blocks.{i}.attn.qkv.weight"] = np.concatenate([out.pop(f"{p}.weight") for p in parts])
        biases = [out.pop(f"{p}.bias", np.full(24, 9.0, np.float32)) for p in parts]  # of keys there is none
        out[f"blocks.{i}.attn.qkv.bias"] = np.concatenate(biases)
        there = np.repeat(np.array([1.0, 0.0, 1.0], np.float32), 24)
        out |= {f"blocks.{i}.attn.qkv.bias_mask": there} if masked else {}
        if not masked:
            out[f"blocks.{i}.attn.qkv.bias"] = np.where(there, out[f"blocks.{i}.attn.qkv.bias"], 0)
    periods = (100.0 ** (np.arange(2) / 2)).astype(np.float32)
    out = {name: value for name, value in out.items() if "inv_freq" not in name}
    return out | {"rope_embed.periods": periods, "local_cls_norm.weight": np.ones(24, np.float32)}


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_dinov3_of_its_own_project(kind, tmp_path):
    """Names of facebookresearch/dinov3: the periods tell heads and base, a mask the biases that are none."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
    changes = {"use_gated_mlp": True, "hidden_act": "silu"} if kind == "swiglu" else {}
    config = transformers.DINOv3ViTConfig(**sizes, image_size=16, patch_size=4, num_register_tokens=4, **changes)
    module = randomise(transformers.DINOv3ViTModel(config))
    state = as_dinov3(numpy_state(module.state_dict()), masked=kind == "mlp")
    path = save(tmp_path / "dinov3_vits16_pretrain_lvd1689m.pth", state)
    layers = [m for name, m in module.named_modules() if re.fullmatch(r"(model\.)?layer\.\d+", name)]

    def run(dtype):
        return run_torch(module, lambda m: layers, IMAGES, dtype, lambda out: out.pooler_output)

    model = check(path, run, Options(image=16))
    assert (model.dims.heads, model.dims.rotary, model.dims.registers, model.dims.norm_eps) == ((3,) * 3, 4, 4, 1e-5)
    assert model.dims.gated == (kind == "swiglu") and model.info["preprocessing"]["crop_mode"] == "squash"
    with pytest.raises(UserError, match="say --image=N"):
        convert(path)
    odd = save(tmp_path / "odd.pth", state | {"rope_embed.periods": np.array([1.0, 3.0, 4.0], np.float32)})
    with pytest.raises(UserError, match="are not the powers of one base"):
        convert(odd, Options(image=16))
    check_round_trip(model, tmp_path)


def test_dinov3_of_timm(tmp_path):
    """Its file does not show the rotary positions; the name says it, in config.json or of the file."""
    timm = sources.import_timm()
    if timm is None:
        pytest.skip("timm is not installed: pip install --no-deps timm (without torchvision)")
    from timm.models import save_for_hf

    name = "vit_small_patch16_dinov3"
    module = randomise(timm.create_model(name, depth=2, img_size=32, num_classes=5))
    save_for_hf(module, tmp_path, model_args={"img_size": 32, "num_classes": 5}, safe_serialization=True)
    images = np.random.default_rng(1).standard_normal((24, 32, 32, 3)).astype(np.float32)
    with torch.inference_mode():
        rounded = module(nchw(images, torch.float32)).numpy()
        expected = module.double()(nchw(images, torch.float64)).numpy()
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "other" / f"{name}.lvd1689m.safetensors")
    for path, options in ((tmp_path, Options()), (tmp_path / "other", Options(image=32))):
        with jax.enable_x64(True):
            model = convert(path, options, dtype=np.float64).model
            found = np.asarray(model.logits(model.params, images.astype(np.float64)))
        assert (model.dims.rotary, model.dims.pool, model.dims.norm_eps, model.dims.heads) == (32, "mean", 1e-5, (6, 6))
        # timm's sines and cosines stay float32, at any precision.
        assert np.abs(found - expected).max() <= 3e-6 * np.abs(expected).max()
        single = convert(path, options).model
        wrong = np.abs(np.asarray(single.logits(single.params, images)) - expected).max()
        # These random weights are ill-conditioned: float32 errs in PyTorch as well, and not twice as much here.
        assert wrong <= 2 * np.abs(rounded - expected).max()
    nameless = shutil.copy(tmp_path / "model.safetensors", tmp_path / "other" / "w.safetensors")
    with pytest.raises(UserError, match="no position embeddings"):
        convert(nameless, Options(image=32, heads=6))
    other = shutil.copy(nameless, tmp_path / "other" / "vit_base_patch16_rope_ape_224.safetensors")
    with pytest.raises(UserError, match="rotary positions that are neither DINOv3's nor EVA-02's"):
        convert(other)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_of_queries_and_keys(norm, tmp_path):
    """timm's names; its own model where it is installed, else its attention written out."""
    module = small_vit()
    state = numpy_state(module.state_dict())
    rng = np.random.default_rng(7)
    leaves = ("weight", "bias") if norm == "layer" else ("weight",)
    for i, name, leaf in itertools.product(range(3), ("q_norm", "k_norm"), leaves):
        state[f"blocks.{i}.attn.{name}.{leaf}"] = rng.normal(0.5, 0.5, 8).astype(np.float32)
    path = save(tmp_path / "w.pth", state)

    def normed(x, weights):
        if norm == "layer":
            return torch.nn.functional.layer_norm(x, (8,), weights["weight"], weights["bias"], 1e-6)
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights["weight"]

    def attention(block, i):
        names = ("q_norm", "k_norm")
        own = [{leaf: torch.from_numpy(state[f"blocks.{i}.attn.{n}.{leaf}"]) for leaf in leaves} for n in names]

        def forward(x):
            q, k, v = block.attn.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
            q, k = (normed(t, {n: w.to(t.dtype) for n, w in o.items()}) for t, o in zip((q, k), own, strict=True))
            z = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return block.attn.proj(z.transpose(1, 2).flatten(2))

        return forward

    for i, block in enumerate(module.blocks):
        block.attn.forward = attention(block, i)
    model = check(path, lambda dtype: run_torch(module, lambda m: m.blocks, IMAGES, dtype))
    assert model.dims.qk_norm_count == 8 and model.params["block_0"]["q_norm"]["scale"].shape == (3, 8)
    check_round_trip(model, tmp_path)


@pytest.mark.parametrize("old_names", [False, True])
def test_torchvision(old_names, tmp_path):
    module = randomise(sources.TorchvisionViT())
    state = numpy_state(module.state_dict())
    if old_names:
        state = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in state.items()}
    path = save(tmp_path / "w.safetensors", state)
    model = check(path, lambda dtype: run_torch(module, lambda m: m.encoder.layers, IMAGES, dtype))
    assert model.info["preprocessing"]["interpolation"] == "bilinear"
    check_round_trip(model, tmp_path)


class FlaxBlock(linen.Module):
    """A block on Flax's own attention module, with the names of vision_transformer or big_vision."""

    names: tuple[str, str, str, str]

    @linen.compact
    def __call__(self, x):
        norm1, attention, norm2, mlp = self.names
        y = linen.LayerNorm(name=norm1)(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=3, name=attention)(y, y)
        y = linen.LayerNorm(name=norm2)(x)

        class Mlp(linen.Module):
            @linen.compact
            def __call__(self, z):
                return linen.Dense(24, name="Dense_1")(linen.gelu(linen.Dense(40, name="Dense_0")(z)))

        return x + Mlp(name=mlp)(y)


NPZ_NAMES = {
    "vision_transformer": ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
    "big_vision": ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
}


class FlaxPool(linen.Module):
    """big_vision's MAPHead, on Flax's own attention module."""

    @linen.compact
    def __call__(self, x):
        class MlpBlock(linen.Module):
            @linen.compact
            def __call__(self, z):
                return linen.Dense(24, name="Dense_1")(linen.gelu(linen.Dense(40, name="Dense_0")(z)))

        probe = self.param("probe", linen.initializers.normal(0.3), (1, 1, 24))
        x = linen.MultiHeadDotProductAttention(num_heads=3)(jnp.broadcast_to(probe, (len(x), 1, 24)), x)
        return (x + MlpBlock(name="MlpBlock_0")(linen.LayerNorm()(x)))[:, 0]


def stacked(state):
    """Blocks as one array for all, as big_vision's scan leaves them."""
    names = {n.split("encoderblock_0/")[1] for n in state if "encoderblock_0/" in n}
    rest = {n: v for n, v in state.items() if "encoderblock_" not in n}
    blocks = {n: np.stack([state[f"Transformer/encoderblock_{i}/{n}"] for i in range(3)]) for n in names}
    return rest | {f"Transformer/encoderblock/{n}": value for n, value in blocks.items()}


SIGLIP_BESIDE = {  # of a training file of SigLIP: the half for texts, the loss, the optimizer, times
    "params/txt/Encoder_0/encoderblock/LayerNorm_0/scale": np.ones((3, 8)),
    "params/txt/MAPHead_0/probe": np.ones((1, 1, 8)),
    "params/t": np.ones(1),
    "params/b": np.ones(1),
    "opt/0/0/mu/img/embedding/kernel": np.ones((4, 4, 3, 24)),
    "chrono/accum_train_time": np.ones(()),
}
NPZ_KINDS = (
    "vision_transformer",
    "big_vision",
    "big_vision_scan",
    "big_vision_gap_sincos",
    "siglip",
    "siglip_scan",
    "siglip_naflex",
)


@pytest.mark.parametrize("kind", NPZ_KINDS)
def test_npz(kind, tmp_path, x64):
    siglip = kind.startswith("siglip")
    gap, image = kind.endswith("sincos"), 224 if kind.endswith("sincos") else 16
    patch = image // 4
    names = NPZ_NAMES["vision_transformer" if kind == "vision_transformer" else "big_vision"]
    images = np.random.default_rng(5).standard_normal((2, image, image, 3))

    class Encoder(linen.Module):
        @linen.compact
        def __call__(self, x):
            if kind == "vision_transformer":
                x = x + self.param("posembed_input/pos_embedding", linen.initializers.normal(0.3), (1, 17, 24))
            for i in range(3):
                x = FlaxBlock(names, name=f"encoderblock_{i}")(x)
            return linen.LayerNorm(name="encoder_norm")(x)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(24, (patch, patch), strides=patch, padding="VALID", name="embedding")(x)
            x = x.reshape(len(x), -1, 24)
            if gap:  # fixed sines and cosines, written out: columns sin x, cos x, sin y, cos y
                table = np.zeros((16, 24))
                for row in range(4):
                    for column in range(4):
                        for j in range(6):
                            w = 10_000 ** (-j / 5)
                            waves = [np.sin(column * w), np.cos(column * w), np.sin(row * w), np.cos(row * w)]
                            table[row * 4 + column, j::6] = waves
                x = x + table.astype(np.float32)
            elif siglip:
                x = x + self.param("pos_embedding", linen.initializers.normal(0.3), (1, 16, 24))
            elif kind != "vision_transformer":
                x = x + self.param("pos_embedding", linen.initializers.normal(0.3), (1, 17, 24))[:, 1:]
            if not gap and not siglip:
                token = self.param("cls", linen.initializers.normal(0.3), (1, 1, 24))
                if kind != "vision_transformer":
                    token = token + self.variables["params"]["pos_embedding"][:, :1]
                x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 24)), x], 1)
            x = Encoder(name="Transformer")(x)
            if siglip:
                return FlaxPool(name="MAPHead_0")(x)
            x = x.mean(1) if gap else x[:, 0]
            if kind == "vision_transformer":
                x = jnp.tanh(linen.Dense(10, name="pre_logits")(x))
            return linen.Dense(7, name="head")(x)

    net = Net()
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape) + 0.1).astype(np.float32),
        net.init(jax.random.key(0), images)["params"],
    )
    expected = np.asarray(net.apply({"params": jax.tree.map(lambda p: p.astype(np.float64), params)}, images))
    state = dict(flatten(params))
    state = stacked(state) if kind.endswith("scan") else state
    if kind.endswith("naflex"):  # patches are a matrix, positions a grid
        state["embedding/kernel"] = state["embedding/kernel"].reshape(-1, 24)
        state["pos_embedding"] = state["pos_embedding"].reshape(4, 4, 24)
    prefix = "" if kind == "vision_transformer" else "params/img/" if siglip else "params/"
    np.savez(tmp_path / "w.npz", **{prefix + n: v for n, v in state.items()}, **(SIGLIP_BESIDE if siglip else {}))
    found = convert(tmp_path / "w.npz", dtype=np.float64)
    assert found.model.dims.activation == "gelu_tanh" and found.model.dims.heads == (3, 3, 3)
    assert np.abs(np.asarray(found.model.logits(found.model.params, images)) - expected).max() <= 1e-9
    if gap:
        assert any("sines" in note for note in found.notes)
    if siglip:
        assert (found.model.dims.pool, found.model.dims.pool_heads, found.model.dims.classes) == ("map", 3, 0)
        assert found.model.info["preprocessing"]["crop_mode"] == "squash"
        notes = "\n".join(found.notes)
        for why in ("2 tensor(s), params/txt/", "temperature and bias", "the optimizer", "times of the training"):
            assert why in notes, notes


@pytest.mark.parametrize(
    ("name", "options", "rename"),
    [
        ("deit_tiny_distilled_patch16_224", {}, dict),
        ("deit3_small_patch16_224", {"embed_dim": 384}, dict),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "num_classes": 5}, dict),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, dict),
        ("vit_tiny_patch16_224", {"qk_norm": True, "img_size": 32}, dict),
    ],
)
def test_timm_itself(name, options, rename, tmp_path):
    timm = sources.import_timm()
    if timm is None:
        pytest.skip("timm is not installed: pip install --no-deps timm (without torchvision)")
    options = {k: v for k, v in options.items() if k != "embed_dim"}
    module = randomise(timm.create_model(name, depth=2, **options))
    path = save(tmp_path / "w.safetensors", rename(numpy_state(module.state_dict())))
    size = module.patch_embed.img_size[0]
    images = np.random.default_rng(1).standard_normal((2, size, size, 3))
    heads = module.blocks[0].attn.num_heads
    with jax.enable_x64(True):
        model = convert(path, Options(heads=heads), dtype=np.float64).model
        with torch.inference_mode():
            expected = module.double()(nchw(images)).numpy()
        assert np.abs(np.asarray(model.logits(model.params, images)) - expected).max() <= 1e-9


def test_compact_models_come_back(tmp_path):
    """A ragged compact model, distilled, with LayerScale and registers: out, into PyTorch, and in again."""
    dims = ViTDims(
        image=16, patch=4, classes=7, embed=18, heads=(2, 1), qk=(5, 3), v=(4, 6), mlp=(9, 20), qk_scale=0.3,
        dist_token=True, registers=2, layer_scale=True, activation="gelu_tanh", norm_eps=1e-5,
    )  # fmt: skip
    pre = {"size": 16, "scale": 255.0, "mean": [0.5] * 3, "std": [0.5] * 3, "resize": 18, "interpolation": "bicubic"}
    model = Model(dims, random_params(dims, dtype=np.float32), info={"preprocessing": pre, "classes": list("abcdefg")})
    check_round_trip(model, tmp_path)
    found = export.write_safetensors(model, tmp_path).run(IMAGES.astype(np.float32))
    expected = np.asarray(model.apply(model.params, IMAGES.astype(np.float32)))
    assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


def test_published_parameter_counts():
    from nvit_jax.model.dims import count_params

    published = {"deit_tiny": 5_717_416, "deit_small": 22_050_664, "deit_base": 86_567_656, "vit_large": 304_326_632}
    published |= {"deit_base_distilled": 87_338_192, "vit_huge": 632_045_800, "deit3_small": 22_059_496}
    for name, count in published.items():
        assert count_params(preset(name)) == count, name
    assert count_params(preset("dinov2_giant", classes=0)) == 1_136_479_232  # timm's vit_giant_patch14_dinov2
