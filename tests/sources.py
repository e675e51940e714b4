"""Files as publishers make them, with random weights, and what PyTorch (or Flax) computes from them on its own.

A source is (name, arrays under the publisher's names, function [B, image, image, channels] -> (logits, stream after
every block or None)). Weights are far from trivial: norms, biases and LayerScale are random, too.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types

import numpy as np
import torch
from torch import nn

from nvit_jax.formats import torch_vit
from nvit_jax.model.dims import ViTDims

SIZES = {"image": 16, "patch": 4, "channels": 3, "classes": 7, "embed": 24, "depth": 3, "heads": 3, "mlp": 40}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and running statistic random; variances and scales positive."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=rng, dtype=torch.float64)
                positive = name.endswith("running_var") or (value.ndim <= 1 and name.endswith(("weight", "gamma")))
                value.copy_(0.5 + noise.abs() if positive else 0.3 * noise)
    return module.eval()


def small_vit(**changes) -> torch_vit.ViT:
    """The PyTorch twin of a small model."""
    return randomise(torch_vit.ViT(ViTDims.uniform(**(SIZES | changes)).to_json()))


def numpy_state(state) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in state.items()}


def nchw(images: np.ndarray, dtype=torch.float64) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype)


@contextlib.contextmanager
def hooked(blocks):
    """Collect the outputs of modules."""
    seen: list[np.ndarray] = []
    hooks = [
        b.register_forward_hook(lambda m, i, out: seen.append((out[0] if isinstance(out, tuple) else out).numpy()))
        for b in blocks
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def run_torch(module, blocks, images, dtype, pick=lambda out: out):
    """(logits, streams) of a PyTorch module in a dtype."""
    module = module.to(dtype)
    with torch.inference_mode(), hooked(blocks(module)) as seen:
        logits = pick(module(nchw(images, dtype))).numpy()
    return logits, seen


# ------------------------------------------------------------------------------------------ torchvision


class TorchvisionBlock(nn.Module):
    """Pre-norm block on nn.MultiheadAttention, with torchvision's names."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width), nn.Identity()
        )

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TorchvisionViT(nn.Module):
    """torchvision's vit_b_16, small."""

    def __init__(self, image=16, patch=4, channels=3, classes=7, embed=24, depth=3, heads=3, mlp=40) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(channels, embed, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, embed))
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, embed))
        self.encoder.layers = nn.Sequential()
        for i in range(depth):
            self.encoder.layers.add_module(f"encoder_layer_{i}", TorchvisionBlock(embed, heads, mlp))
        self.encoder.ln = nn.LayerNorm(embed, eps=1e-6)
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(embed, classes))

    def forward(self, images):
        x = self.conv_proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.encoder.pos_embedding
        return self.heads(self.encoder.ln(self.encoder.layers(x))[:, 0])


# ---------------------------------------------------------------------------------- OpenAI's CLIP, open_clip


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Gains(nn.Module):
    """LayerScale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class ClipBlock(nn.Module):
    """OpenAI's ResidualAttentionBlock on nn.MultiheadAttention; LayerScale is open_clip's."""

    def __init__(self, width: int, heads: int, hidden: int, act, eps: float, *, gains: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        for name, layer in (("c_fc", nn.Linear(width, hidden)), ("gelu", act), ("c_proj", nn.Linear(hidden, width))):
            self.mlp.add_module(name, layer)
        self.ls_1, self.ls_2 = (Gains(width), Gains(width)) if gains else (nn.Identity(), nn.Identity())

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.ls_1(self.attn(y, y, y, need_weights=False)[0])
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class ClipTower(nn.Module):
    """The image tower of OpenAI's CLIP, small, with what open_clip adds."""

    def __init__(
        self, act=None, eps=1e-5, *, image=(16, 16), patch=4, pre=True, gains=False, mean=False, norm_behind=False
    ):
        super().__init__()
        width, heads, hidden = (SIZES[name] for name in ("embed", "heads", "mlp"))
        self.mean, self.norm_behind = mean, norm_behind
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        count = 1 + (image[0] // patch) * (image[1] // patch)
        self.positional_embedding = nn.Parameter(torch.zeros(count, width))
        self.ln_pre = nn.LayerNorm(width, eps=eps) if pre else nn.Identity()
        self.transformer = nn.Module()
        blocks = [ClipBlock(width, heads, hidden, act or QuickGELU(), eps, gains=gains) for _ in range(SIZES["depth"])]
        self.transformer.resblocks = nn.ModuleList(blocks)
        self.ln_post = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Parameter(torch.zeros(width, 10))

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        x = x if self.norm_behind else self.ln_post(x)
        x = x[:, 1:].mean(1) if self.mean else x[:, 0]
        return (self.ln_post(x) if self.norm_behind else x) @ self.proj


# -------------------------------------------------------------------------------- released NViT's layouts


def nvit_forward(state: dict[str, np.ndarray], images: np.ndarray, heads: list[int], patch: int = 4) -> np.ndarray:
    """Mean logits of a released NViT file, straight from its tensors, in float64 NumPy and PyTorch primitives.

    Dense files hold Q, K, V as [h q, e]; full-size ones as [q, e, h] with a head mask.
    """
    s = {name: torch.from_numpy(value).double() for name, value in state.items()}

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    b, size, _, c = images.shape
    n = size // patch
    pixels = torch.from_numpy(images.astype(np.float64)).reshape(b, n, patch, n, patch, c).permute(0, 1, 3, 2, 4, 5)
    weight = s["patch_embed.proj.weight"][:, :, 0, 0]
    x = pixels.reshape(b, n * n, -1) @ weight.T + s["patch_embed.proj.bias"]
    tokens = torch.cat([s["cls_token"], s["dist_token"]], 1).expand(b, -1, -1)
    x = torch.cat([tokens, x], 1) + s["pos_embed"]
    for i, h in enumerate(heads):
        name = f"blocks.{i}.attn.qkv"
        y = norm(x, f"blocks.{i}.norm1")
        q, k, v = (s[f"{name}.{letter}.weight"] for letter in "QKV")
        biases = [s[f"{name}.{letter}.bias"] for letter in "QKV"]
        if q.ndim == 3:
            gate = s[f"{name}.head_mask.weight"][:, 0]
            parts = [
                torch.einsum("bne,qeh->bhnq", y, w * gate) + (bias * gate).T[None, :, None]
                for w, bias in zip((q, k, v), biases, strict=True)
            ]
        else:
            parts = [
                (y @ w.T + bias).unflatten(-1, (h, -1)).transpose(1, 2)
                for w, bias in zip((q, k, v), biases, strict=True)
            ]
        q, k, v = parts
        scale = 64**-0.5 if state[f"{name}.Q.weight"].ndim == 2 else q.shape[-1] ** -0.5
        z = (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v
        if f"blocks.{i}.attn.proj.proj.weight" in s:
            x = x + linear(z.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj.proj")
        else:
            x = (
                x
                + torch.einsum("bhnv,evh->bne", z, s[f"blocks.{i}.attn.proj.weight"])
                + s[f"blocks.{i}.attn.proj.bias"]
            )
        y = torch.nn.functional.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(y, f"blocks.{i}.mlp.fc2")
    x = norm(x, "norm")
    return ((linear(x[:, 0], "head") + linear(x[:, 1], "head_dist")) / 2).numpy()


def nvit_state(widths: dict, seed: int = 0, *, dense: bool, image=16, patch=4, classes=7) -> dict[str, np.ndarray]:
    """Random weights under the released names; `widths`: EMB, and per block head, QK, V, MLP."""
    rng = np.random.default_rng(seed)
    e, tokens = widths["EMB"], (image // patch) ** 2 + 2
    shapes = {"cls_token": (1, 1, e), "dist_token": (1, 1, e), "pos_embed": (1, tokens, e)}
    shapes |= {"patch_embed.proj.weight": (e, 3 * patch**2, 1, 1), "patch_embed.proj.bias": (e,)}
    for i, (h, q, v, m) in enumerate(zip(*(widths[k] for k in ("head", "QK", "V", "MLP")), strict=True)):
        block = f"blocks.{i}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (e,), f"{block}.{norm}.bias": (e,)}
        for letter, width in (("Q", q), ("K", q), ("V", v)):
            name = f"{block}.attn.qkv.{letter}"
            shapes[f"{name}.weight"] = (h * width, e) if dense else (width, e, h)
            shapes[f"{name}.bias"] = (h * width,) if dense else (width, h)
        shapes[f"{block}.attn.proj.proj.weight" if dense else f"{block}.attn.proj.weight"] = (
            (e, h * v) if dense else (e, v, h)
        )
        shapes[f"{block}.attn.proj.proj.bias" if dense else f"{block}.attn.proj.bias"] = (e,)
        shapes |= {f"{block}.mlp.fc1.weight": (m, e), f"{block}.mlp.fc1.bias": (m,)}
        shapes |= {f"{block}.mlp.fc2.weight": (e, m), f"{block}.mlp.fc2.bias": (e,)}
    shapes |= {"norm.weight": (e,), "norm.bias": (e,)}
    for head in ("head", "head_dist"):
        shapes |= {f"{head}.weight": (classes, e), f"{head}.bias": (classes,)}
    state = {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    for i, h in enumerate(widths["head"]):
        state[f"blocks.{i}.attn.qkv.token_mask"] = np.ones((tokens, 1), np.float32)
        if not dense:
            state[f"blocks.{i}.attn.qkv.head_mask.weight"] = np.ones((h, 1), np.float32)
    return state


# --------------------------------------------------------------------------------------------------- timm


class _Stub(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in the place of torchvision, which timm imports for its data loading."""

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []

        def get(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return _Stub(name, (), {})

        module.__getattr__ = get
        return module

    def exec_module(self, module):
        pass


def import_timm():
    """timm, or None where it is not installed (pip install --no-deps timm; it would pull in torchvision)."""
    if importlib.util.find_spec("timm") is None:
        return None
    if "timm" not in sys.modules:
        finder = _Torchvision()
        sys.meta_path.insert(0, finder)
        try:
            import timm  # noqa: F401
        finally:
            sys.meta_path.remove(finder)
            for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
                del sys.modules[name]
    return sys.modules["timm"]
