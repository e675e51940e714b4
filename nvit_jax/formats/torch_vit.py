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
import warnings

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

MAX_PIXELS = 2**27  # of one image; a file that claims more is taken for a decompression bomb
UPRIGHT = {  # EXIF orientation -> what makes it upright
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


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
    """The model of a safetensors file written by nvit_jax, in eval mode. Half-precision weights become float32.

    ValueError, in one line, for any other file.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            if "nvit_jax" not in metadata:
                raise ValueError(f"{path} was not exported by nvit_jax: its metadata does not hold the model's widths")
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {_first_line(error)}") from error
    try:
        facts = json.loads(metadata["nvit_jax"])
        model = ViT(facts["dims"], facts.get("preprocessing"), facts.get("classes") or ())
        model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: its tensors are not those that its metadata describes: {error!r:.200}") from error
    return model.to(device).eval()


def read_image(path, preprocessing):
    """[channels, size, size], upright, resized, cropped and normalised as the model was trained. ValueError."""
    if preprocessing is None:
        raise ValueError("the model file does not say how images are prepared; give the model tensors of your own")
    from PIL import Image

    size, resize = preprocessing["size"], preprocessing.get("resize") or preprocessing["size"]
    channels = len(preprocessing["mean"])
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    try:
        image = _open_upright(path, "RGB" if channels == 3 else "L")
        short = min(image.size)
        width, height = (resize if side == short else int(resize * side / short) for side in image.size)
        if width * height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels would become {width} x {height}")
        image = image.resize((width, height), filters[preprocessing.get("interpolation") or "bicubic"])
    except Exception as error:  # Pillow raises nearly everything for broken files
        raise ValueError(f"{path} cannot be read as an image: {_first_line(error)}") from error
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, channels)
    mean, std = torch.tensor(preprocessing["mean"]), torch.tensor(preprocessing["std"])
    return ((pixels.float() / preprocessing["scale"] - mean) / std).permute(2, 0, 1)


def _open_upright(path, mode):
    """The first frame in 8 bits, turned as the camera was held."""
    from PIL import Image

    image = Image.open(path)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
    image.load()
    try:  # after loading: Pillow turns TIFF itself
        turn = UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata is no reason to lose the image
        turn = None
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    image = image.convert(mode)
    return image if turn is None else image.transpose(getattr(Image.Transpose, turn))


def _eight_bits(image):
    """16-bit grey, scaled. Pillow's own conversion would clip it."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of unknown range")
    values = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels have more than 16 bits")
    scaled = bytearray(len(values))
    torch.frombuffer(scaled, dtype=torch.uint8).copy_((values * 255 + 32767) // 65535)
    return Image.frombytes("L", image.size, bytes(scaled))


def _first_line(error):
    return (str(getattr(error, "strerror", None) or error).splitlines() or [type(error).__name__])[0]


def main(arguments):
    """Print the likeliest classes of images. Returns the exit code: 2 for a call or a file that is wrong."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata
    try:
        model = load(arguments[0])
        for path in arguments[1:]:
            _classify(model, path)
    except (ValueError, ImportError) as error:  # what is wrong with a file, or no Pillow
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _classify(model, path):
    with torch.inference_mode():
        chances = model(read_image(path, model.preprocessing)[None]).softmax(-1)[0]
    best = chances.topk(min(5, len(chances)))
    print(path)
    for chance, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        name = model.classes[index] if index < len(model.classes) else ""
        print(f"  {math.floor(1000 * chance + 0.5) / 10:5.1f} %  class {index} {name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
