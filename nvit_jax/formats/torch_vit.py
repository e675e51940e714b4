"""The same Vision Transformer in PyTorch, in one file that needs torch and safetensors only.

    python vit.py model.safetensors photo.jpg      # the five likeliest classes (needs Pillow, too)

    import vit
    model = vit.load("model.safetensors")          # eval mode, float32
    logits = model(vit.read_image("photo.jpg", model.preprocessing)[None])

Names and shapes are timm's, but every block has its own number of heads, query/key dims, value dims and mlp neurons.
A block without heads, or without neurons, adds the bias of that part's last layer and nothing else. A classifier of
class token and mean has the mean's weights in head_mean.
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


class Constant(nn.Module):
    """What is left of a last layer without inputs: its bias."""

    def __init__(self, embed):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(embed))

    def forward(self, x):
        return self.bias.expand(x.shape)


class HeadNorm(nn.Module):
    """The norm of queries or keys [B, H, N, Q]: RMSNorm over a head's dims, `count` of them before pruning."""

    def __init__(self, heads, width, count, eps):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(heads * width)), nn.Parameter(torch.zeros(heads * width))
        self.heads, self.count, self.eps = heads, count, eps

    def forward(self, x):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = (y * (y.square().sum(-1, keepdim=True) / self.count + self.eps).rsqrt()).to(x.dtype)
        return y * self.weight.view(self.heads, 1, -1) + self.bias.view(self.heads, 1, -1)


class InnerNorm(nn.Module):
    """The norm of the values of all heads, or of the neurons [B, N, W]: LayerNorm over `count` of them before pruning,
    of which those that are gone count as 0."""

    def __init__(self, width, count, eps):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.count, self.eps = count, eps

    def forward(self, x):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = y.sum(-1, keepdim=True) / self.count
        gone = self.count - y.shape[-1]
        variance = ((y - mean).square().sum(-1, keepdim=True) + gone * mean.square()) / self.count
        return ((y - mean) * (variance + self.eps).rsqrt()).to(x.dtype) * self.weight + self.bias


def relative_index(rows, columns):
    """[N, N]: which bias a query (row) adds to its logit of a key (column), the class token in front, as in BEiT."""
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")).flatten(1)
    down, across = places[:, :, None] - places[:, None, :]
    patches = (down + rows - 1) * (2 * columns - 1) + across + columns - 1
    last = (2 * rows - 1) * (2 * columns - 1)
    index = F.pad(patches, (1, 0, 1, 0), value=last)
    index[1:, 0], index[0, 0] = last + 1, last + 2
    return index


def sides(size):
    """(height, width) of a size: one number where they are alike."""
    return (size, size) if isinstance(size, int) else tuple(size)


class Rotary(nn.Module):
    """Cosines and sines of the angles by which the pairs of query/key dims are turned at each token, as in DINOv3, or
    with rotary_grid as in EVA-02.

    Class tokens and registers are not turned. Places and frequencies are rounded to float32, as published.
    """

    def __init__(self, dims):
        super().__init__()
        half = dims["rotary"] // 2
        rows, columns = (a // b for a, b in zip(sides(dims["image"]), sides(dims["patch"]), strict=True))
        exponents = (torch.arange(half, dtype=torch.float64) / half).float().double()
        frequencies = (1 / (dims["rotary_base"] ** exponents).float()).double()

        def along(side):
            if dims.get("rotary_grid"):
                numbers = torch.arange(side, dtype=torch.float32) / side * dims["rotary_grid"]
                return numbers.double()[:, None] * frequencies
            centres = 2 * (torch.arange(0.5, side, dtype=torch.float32) / side) - 1
            return (2 * math.pi * centres).double()[:, None] * frequencies

        places = torch.cat([along(rows).repeat_interleave(columns, 0), along(columns).repeat(rows, 1)], 1)
        prefix = dims["cls_token"] + dims["dist_token"] + dims["registers"]
        angles = torch.cat([torch.zeros(prefix, 2 * half, dtype=torch.float64), places])
        self.register_buffer("cos", angles.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", angles.sin().to(torch.get_default_dtype()), persistent=False)

    def forward(self, x, numbers):
        """x [B, H, N, 2 Q], all first dims before all second ones; numbers [H Q] of the pairs."""
        pairs = x.shape[-1] // 2
        cos, sin = (t[:, numbers].unflatten(1, (-1, pairs)).transpose(0, 1) for t in (self.cos, self.sin))
        first, second = x.to(cos.dtype).split(pairs, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention; `qkv` holds heads * qk rows of queries, as many of keys, then heads * v of values."""

    def __init__(self, dims, i):
        super().__init__()
        embed, heads, v = dims["embed"], dims["heads"][i], dims["v"][i]
        qk = dims["qk"][i] * (2 if dims.get("rotary") else 1)
        self.heads, self.widths, self.scale = heads, (heads * qk, heads * qk, heads * v), dims["qk_scale"]
        self.qkv = nn.Linear(embed, sum(self.widths), bias=dims["qkv_bias"]) if heads else None
        self.proj = nn.Linear(heads * v, embed) if heads else Constant(embed)
        self.q_norm = self.k_norm = self.turn = self.norm = self.relative_position_bias_table = None
        if heads and dims.get("qk_norm_count"):
            self.q_norm, self.k_norm = (HeadNorm(heads, qk, dims["qk_norm_count"], dims["norm_eps"]) for _ in "qk")
        if heads and dims.get("rotary"):
            self.turn = Rotary(dims)
            self.register_buffer("rotary", torch.zeros(heads * qk // 2))  # the numbers of its pairs
        if heads and dims.get("proj_norm_count"):
            self.norm = InnerNorm(heads * v, dims["proj_norm_count"], dims["norm_eps"])
        if heads and dims.get("relative"):
            grid = (a // b for a, b in zip(sides(dims["image"]), sides(dims["patch"]), strict=True))
            self.register_buffer("index", relative_index(*grid), persistent=False)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(int(self.index.max()) + 1, heads))

    def forward(self, x):
        if not self.heads:
            return self.proj(x)
        q, k, v = (
            part.unflatten(-1, (self.heads, width // self.heads)).transpose(1, 2)
            for part, width in zip(self.qkv(x).split(self.widths, -1), self.widths, strict=True)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.turn is not None:
            q, k = (self.turn(part, self.rotary.long()) for part in (q, k))
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if self.relative_position_bias_table is not None:
            logits = logits + self.relative_position_bias_table[self.index].permute(2, 0, 1)
        z = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.proj(z if self.norm is None else self.norm(z))


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


class Mlp(nn.Module):
    """fc1, the activation, fc2, perhaps with a norm in front.

    Gated: the activation of fc1's first half times the other half.
    """

    def __init__(self, embed, hidden, activation, gated, norm=None):
        super().__init__()
        self.gated = gated
        self.fc1 = nn.Linear(embed, (1 + gated) * hidden) if hidden else None
        self.fc2 = nn.Linear(hidden, embed) if hidden else Constant(embed)
        self.activation = activation
        self.norm = InnerNorm(hidden, *norm) if hidden and norm else nn.Identity()

    def forward(self, x):
        if self.fc1 is None:
            return self.fc2(x)
        activation = ACTIVATIONS[self.activation]
        if not self.gated:
            return self.fc2(self.norm(activation(self.fc1(x))))
        gate, hidden = self.fc1(x).chunk(2, -1)
        return self.fc2(self.norm(activation(gate) * hidden))


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch."""

    def __init__(self, embed):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(embed))

    def forward(self, x):
        return x * self.gamma


class RMSNorm(nn.Module):
    """x / sqrt(sum of x^2 / count + eps), `count` the channels before pruning; in float32 at least."""

    def __init__(self, count, eps):
        super().__init__()
        self.count, self.eps = count, eps

    def forward(self, x):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        return (y * (y.square().sum(-1, keepdim=True) / self.count + self.eps).rsqrt()).to(x.dtype)


def make_norm(dims):
    """A norm of the kind that the dims say; older files know LayerNorm only."""
    if dims.get("norm", "layer") == "rms":
        return RMSNorm(dims["norm_count"], dims["norm_eps"])
    return nn.LayerNorm(dims["embed"], eps=dims["norm_eps"])


class Block(nn.Module):
    """Attention and mlp, pre-norm."""

    def __init__(self, dims, i):
        super().__init__()
        d = dims["embed"]
        self.norm1, self.norm2 = (make_norm(dims) if dims[units][i] else nn.Identity() for units in ("heads", "mlp"))
        self.attn = Attention(dims, i)
        count = dims.get("fc2_norm_count")  # older files have none, and no gates
        norm = (count, dims["norm_eps"]) if count else None
        self.mlp = Mlp(d, dims["mlp"][i], dims["activation"], dims.get("gated", False), norm)
        self.ls1, self.ls2 = (LayerScale(d) if dims["layer_scale"] else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """[B, channels, height, width] -> [B, patches, D]."""

    def __init__(self, dims):
        super().__init__()
        bias = dims.get("patch_bias", True)
        patch = sides(dims["patch"])
        self.proj = nn.Conv2d(dims["channels"], dims["embed"], patch, patch, bias=bias)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class PreLogits(nn.Module):
    """A tanh layer before the classifier."""

    def __init__(self, embed, width):
        super().__init__()
        self.fc = nn.Linear(embed, width)

    def forward(self, x):
        return self.fc(x).tanh()


class AttentionPool(nn.Module):
    """What a learned query sees of all tokens, and an mlp behind it: [B, N, D] -> [B, width]."""

    def __init__(self, dims):
        super().__init__()
        width, self.heads = dims["pool_width"], dims["pool_heads"]
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q, self.kv = nn.Linear(width, width), nn.Linear(dims["embed"], 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=dims["norm_eps"])
        self.mlp = Mlp(width, dims["pool_mlp"], dims["activation"], gated=False)

    def forward(self, x):
        parts = self.q(self.latent), *self.kv(x).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        z = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        x = self.proj(z.transpose(1, 2).flatten(2))[:, 0]
        return x + self.mlp(self.norm(x))


class ViT(nn.Module):
    """images [B, channels, height, width] -> logits [B, classes]; the mean of both classifiers where there are two.

    Without classes features [B, width] come out, the mean over what the classifiers would read.
    """

    def __init__(self, dims, preprocessing=None, classes=()):
        super().__init__()
        d = dims["embed"]
        self.dims, self.preprocessing, self.classes = dims, preprocessing, list(classes)
        self.patch_embed = PatchEmbed(dims)
        patches = math.prod(side // part for side, part in zip(sides(dims["image"]), sides(dims["patch"]), strict=True))
        prefix = dims["cls_token"] + dims["dist_token"] + dims["registers"]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d)) if dims["cls_token"] else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, d)) if dims["dist_token"] else None
        self.reg_token = nn.Parameter(torch.zeros(1, dims["registers"], d)) if dims["registers"] else None
        positions = {"all": patches + prefix, "patches": patches, "none": 0}[dims["positions"]]
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, d)) if positions else None
        self.norm_pre = make_norm(dims) if dims.get("pre_norm") else nn.Identity()
        self.blocks = nn.Sequential(*(Block(dims, i) for i in range(len(dims["heads"]))))
        norm = make_norm(dims)
        self.norm, self.fc_norm = (nn.Identity(), norm) if dims["norm_after_pool"] else (norm, nn.Identity())
        self.attn_pool = AttentionPool(dims) if dims["pool"] == "map" else None
        features = dims.get("pool_width") or d
        outputs = dims.get("projection")
        self.projection = nn.Linear(features, outputs, bias=False) if outputs else nn.Identity()
        width = dims["pre_logits"] or features
        self.pre_logits = PreLogits(d, width) if dims["pre_logits"] else nn.Identity()
        self.head = nn.Linear(width, dims["classes"]) if dims["classes"] else nn.Identity()
        self.head_dist = nn.Linear(width, dims["classes"]) if dims["dist_token"] and dims["classes"] else None
        self.head_mean = nn.Linear(d, dims["classes"], bias=False) if dims["pool"] == "class_mean" else None

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
        x = self.norm_pre(x)
        yield x
        for block in self.blocks:
            x = block(x)
            yield x

    def forward(self, images):
        *_, x = self.forward_blocks(images)
        x = self.norm(x)
        if self.dims["pool"] != "class":
            prefix = self.dims["cls_token"] + self.dims["dist_token"] + self.dims["registers"]
            pooled = self.pool(x[:, prefix if self.dims["mean_over"] == "patches" else 0 :])[:, None]
        x = x if self.dims["pool"] in ("class", "class_mean") else pooled
        x = self.projection(self.pre_logits(self.fc_norm(x)))
        if not self.dims["classes"]:
            return x[:, : 1 + self.dims["dist_token"]].mean(1)
        logits = self.head(x[:, 0])
        if self.head_mean is not None:
            logits = logits + self.head_mean(pooled[:, 0])
        return logits if self.head_dist is None else (logits + self.head_dist(x[:, 1])) / 2

    def pool(self, x):
        """[B, N, D] -> [B, width]."""
        if self.attn_pool is not None:
            return self.attn_pool(x)
        if self.dims["pool"] in ("mean", "class_mean"):
            return x.mean(1)
        largest = x.amax(1)
        return largest if self.dims["pool"] == "max" else (largest + x.mean(1)) / 2


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
    """[channels, height, width], upright, resized, cropped and normalised as the model was trained. ValueError."""
    if preprocessing is None:
        raise ValueError("the model file does not say how images are prepared; give the model tensors of your own")
    from PIL import Image

    high, wide = sides(preprocessing["size"])
    channels, mode = len(preprocessing["mean"]), preprocessing.get("crop_mode", "center")
    try:
        image = _open_upright(path, "RGB" if channels == 3 else "L")
        if mode == "none" and (image.width < wide or image.height < high):
            least = f"{wide} x {high}"
            raise ValueError(f"{image.width} x {image.height} pixels are less than {least}, and nothing is resized")
        resize = sides(preprocessing.get("resize") or preprocessing["size"])
        width, height = image.size if mode == "none" else _resized(image.size, resize, mode)
        if width * height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels would become {width} x {height}")
        how = Image.Resampling[(preprocessing.get("interpolation") or "bicubic").upper()]
        image = image.resize((width, height), how)
    except Exception as error:  # Pillow raises nearly everything for broken files
        raise ValueError(f"{path} cannot be read as an image: {_first_line(error)}") from error
    left, top = round((width - wide) / 2), round((height - high) / 2)
    image = image.crop((left, top, left + wide, top + high))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(high, wide, channels)
    mean, std = torch.tensor(preprocessing["mean"]), torch.tensor(preprocessing["std"])
    return ((pixels.float() / preprocessing["scale"] - mean) / std).permute(2, 0, 1)


def _resized(found, resize, mode):
    """(width, height) of an image of such a pair, before the crop; `resize` is (height, width)."""
    high, wide = resize
    if mode == "squash":
        return wide, high
    if high == wide:  # the short side
        short = min(found)
        return tuple(high if side == short else int(high * side / short) for side in found)
    ratio = min(found[0] / wide, found[1] / high)  # both sides are covered
    return tuple(round(side / ratio) for side in found)


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
