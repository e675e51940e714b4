"""The same Vision Transformer in PyTorch, in one file that needs torch and safetensors only.

    python vit.py model.safetensors photo.jpg      # the five likeliest classes (needs Pillow, too)

    import vit
    model = vit.load("model.safetensors")          # eval mode, float32
    logits = model(vit.read_image("photo.jpg", model.preprocessing)[None])

Names and shapes are timm's, but every block has its own number of heads, query/key dims, value dims and mlp neurons.
The widths come from the metadata of the safetensors file. Licence: Apache-2.0 (nvit_jax).
"""

import json
import math
import sys

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn


class Attention(nn.Module):
    """Multi-head attention; `qkv` holds heads * qk rows of queries, as many of keys, then heads * v of values."""

    def __init__(self, embed, heads, qk, v, scale, bias):
        super().__init__()
        self.heads, self.widths, self.scale = heads, (heads * qk, heads * qk, heads * v), scale
        self.qkv = nn.Linear(embed, sum(self.widths), bias=bias)
        self.proj = nn.Linear(heads * v, embed)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, width // self.heads)).transpose(1, 2)
            for part, width in zip(self.qkv(x).split(self.widths, -1), self.widths, strict=True)
        )
        z = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(z.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc1, GELU, fc2."""

    def __init__(self, embed, hidden, activation):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(embed, hidden), nn.Linear(hidden, embed)
        self.approximate = "tanh" if activation == "gelu_tanh" else "none"

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch."""

    def __init__(self, embed):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(embed))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Attention and mlp, pre-norm."""

    def __init__(self, dims, i):
        super().__init__()
        d = dims["embed"]
        self.norm1, self.norm2 = (nn.LayerNorm(d, eps=dims["norm_eps"]) for _ in range(2))
        self.attn = Attention(d, dims["heads"][i], dims["qk"][i], dims["v"][i], dims["qk_scale"], dims["qkv_bias"])
        self.mlp = Mlp(d, dims["mlp"][i], dims["activation"])
        self.ls1, self.ls2 = (LayerScale(d) if dims["layer_scale"] else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """[B, channels, image, image] -> [B, patches, D]."""

    def __init__(self, dims):
        super().__init__()
        self.proj = nn.Conv2d(dims["channels"], dims["embed"], dims["patch"], dims["patch"])

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class PreLogits(nn.Module):
    """A tanh layer before the classifier."""

    def __init__(self, embed, width):
        super().__init__()
        self.fc = nn.Linear(embed, width)

    def forward(self, x):
        return self.fc(x).tanh()


class ViT(nn.Module):
    """images [B, channels, image, image] -> logits [B, classes]; the mean of both classifiers where there are two."""

    def __init__(self, dims, preprocessing=None, classes=()):
        super().__init__()
        d = dims["embed"]
        self.dims, self.preprocessing, self.classes = dims, preprocessing, list(classes)
        self.patch_embed = PatchEmbed(dims)
        patches = (dims["image"] // dims["patch"]) ** 2
        prefix = dims["cls_token"] + dims["dist_token"] + dims["registers"]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d)) if dims["cls_token"] else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, d)) if dims["dist_token"] else None
        self.reg_token = nn.Parameter(torch.zeros(1, dims["registers"], d)) if dims["registers"] else None
        positions = {"all": patches + prefix, "patches": patches, "none": 0}[dims["positions"]]
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, d)) if positions else None
        self.blocks = nn.Sequential(*(Block(dims, i) for i in range(len(dims["heads"]))))
        norm = nn.LayerNorm(d, eps=dims["norm_eps"])
        self.norm, self.fc_norm = (nn.Identity(), norm) if dims["norm_after_pool"] else (norm, nn.Identity())
        width = dims["pre_logits"] or d
        self.pre_logits = PreLogits(d, width) if dims["pre_logits"] else nn.Identity()
        self.head = nn.Linear(width, dims["classes"]) if dims["classes"] else nn.Identity()
        self.head_dist = nn.Linear(width, dims["classes"]) if dims["dist_token"] and dims["classes"] else None

    def forward_blocks(self, images):
        """Yield the stream [B, N, D] behind the embedding and behind each block."""
        x = self.patch_embed(images)
        tokens = [
            t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None
        ]
        if self.dims["positions"] == "patches":
            x = x + self.pos_embed
        x = torch.cat([*tokens, x], 1)
        if self.dims["positions"] == "all":
            x = x + self.pos_embed
        yield x
        for block in self.blocks:
            x = block(x)
            yield x

    def forward(self, images):
        *_, x = self.forward_blocks(images)
        x = self.norm(x)
        if self.dims["pool"] == "mean":
            prefix = self.dims["cls_token"] + self.dims["dist_token"] + self.dims["registers"]
            x = x[:, prefix if self.dims["mean_over"] == "patches" else 0 :].mean(1, keepdim=True)
        x = self.pre_logits(self.fc_norm(x))
        logits = self.head(x[:, 0])
        return logits if self.head_dist is None else (logits + self.head_dist(x[:, 1])) / 2


def load(path, device="cpu"):
    """The model of a safetensors file written by nvit_jax, in eval mode. Half-precision weights become float32."""
    with safe_open(path, framework="pt", device=device) as file:
        facts = json.loads(file.metadata()["nvit_jax"])
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    model = ViT(facts["dims"], facts.get("preprocessing"), facts.get("classes") or ())
    model.load_state_dict(state)
    return model.to(device).eval()


def read_image(path, preprocessing):
    """[channels, size, size], resized, cropped and normalised as the model was trained."""
    from PIL import Image

    size, resize = preprocessing["size"], preprocessing.get("resize") or preprocessing["size"]
    channels = len(preprocessing["mean"])
    image = Image.open(path).convert("RGB" if channels == 3 else "L")
    short = min(image.size)
    width, height = (resize if side == short else int(resize * side / short) for side in image.size)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    image = image.resize((width, height), filters[preprocessing.get("interpolation") or "bicubic"])
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, channels)
    mean, std = torch.tensor(preprocessing["mean"]), torch.tensor(preprocessing["std"])
    return ((pixels.float() / preprocessing["scale"] - mean) / std).permute(2, 0, 1)


def main(arguments):
    """Print the likeliest classes of images; exit code 2 without arguments."""
    if len(arguments) < 2:
        print(__doc__)
        return 2
    model = load(arguments[0])
    for path in arguments[1:]:
        with torch.inference_mode():
            chances = model(read_image(path, model.preprocessing)[None]).softmax(-1)[0]
        best = chances.topk(min(5, len(chances)))
        print(path)
        for chance, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            name = model.classes[index] if index < len(model.classes) else ""
            print(f"  {math.floor(1000 * chance + 0.5) / 10:5.1f} %  class {index} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
