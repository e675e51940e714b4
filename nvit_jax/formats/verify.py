"""`--verify`: PyTorch on the file's own tensors against Flax, with the publisher's own model where it can be built."""

import contextlib
import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from nvit_jax.errors import UserError, first_line
from nvit_jax.formats import interchange
from nvit_jax.formats.configs import Said
from nvit_jax.formats.facts import read_beside
from nvit_jax.formats.open_clip import CONFIG as OPEN_CLIP_CONFIG
from nvit_jax.formats.published import architecture
from nvit_jax.model import regnet
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.directory import Model
from nvit_jax.model.reshape import reshape
from nvit_jax.model.sizes import sides

State = Mapping[str, np.ndarray]


class Compared(NamedTuple):
    """What came out."""

    difference: float  # largest absolute one of the logits
    largest: float  # absolute logit
    against: str  # which PyTorch model it was, in words


class _Theirs(NamedTuple):
    run: Callable[[Any], Any]  # images [B, channels, size, size] -> logits [B, C]
    name: str


def compare(path: pathlib.Path, model: Model | regnet.RegNet, state: State, own: State | None, said: Said) -> Compared:
    """Logits of 4 random images, in PyTorch and in Flax at full float32 precision.

    `state` are the file's tensors under timm's names, `own` the same under the publisher's (None where options have
    changed the model). timm's and Hugging Face's models are built from what lies beside the file, torchvision's from
    its names. Where none can be, PyTorch runs the dims that were found: that checks the mapping of the tensors only.
    Of a masked model it runs what the masks leave. UserError without PyTorch.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"--verify needs PyTorch: pip install torch ({error})") from error
    tensors = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in state.items()}
    theirs = _theirs(path, model, tensors, own, said)
    size = model.dims.image if isinstance(model, Model) else model.info["preprocessing"]["size"]
    shape = (4, *sides(size), model.dims.channels)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with torch.inference_mode():
        expected = theirs.run(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    with jax.default_matmul_precision("float32"):
        ours = np.asarray(jax.jit(model.logits)(model.params, images))
    return Compared(float(np.abs(ours - expected).max()), float(np.abs(expected).max()), theirs.name)


def _theirs(
    path: pathlib.Path, model: Model | regnet.RegNet, tensors: Mapping[str, Any], own: State | None, said: Said
) -> _Theirs:
    from nvit_jax.formats import torch_regnet, torch_vit

    if isinstance(model, regnet.RegNet):
        return _Theirs(lambda images: torch_regnet.forward(tensors, images), "a RegNetY of its own in PyTorch")
    found = None if own is None or model.masks is not None else _publishers(path, own, said, model.dims)
    if isinstance(found, _Theirs):
        return found
    dims = model.dims
    if model.masks is not None:  # PyTorch has no masks: it runs what they leave
        dims, compact = reshape(model.params, model.masks, model.dims)
        return _twin(torch_vit, dims, _as_torch(interchange.to_torch(dims, compact)), found)
    return _twin(torch_vit, dims, tensors, found)


def _twin(torch_vit: Any, dims: Any, tensors: Mapping[str, Any], why: str | None) -> _Theirs:
    twin = torch_vit.ViT(dims.to_json())
    twin.load_state_dict(tensors)
    said = f" ({why})" if why else ""
    return _Theirs(twin.eval(), f"this checked the mapping of the tensors only, with the dims that are printed{said}")


def _as_torch(state: State) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(np.array(value, np.float32)) for name, value in state.items()}


def _publishers(path: pathlib.Path, own: State, said: Said, dims: ViTDims) -> _Theirs | str:
    """The publisher's own model on the file's tensors, or why there is none."""
    name = said.architecture or architecture(path.stem)
    try:
        if said.publisher == "transformers":
            return _hugging_face(path, dims)
        if said.publisher == "open_clip":
            return _open_clip(path, own)
        if "conv_proj.weight" in own and "encoder.pos_embedding" in own:
            return _torchvision(own)
        if name and "patch_embed.proj.weight" in own:
            return _timm(name, own, said)
    except ImportError as error:
        return f"{first_line(error)}: the publisher's own model cannot be built"
    except Exception as error:  # whatever a library of others raises over a file that it does not take
        return f"the publisher's own model cannot be built: {first_line(error)}"
    return "nothing beside the file says what its publisher builds"


def _hugging_face(path: pathlib.Path, dims: ViTDims) -> _Theirs:
    """A classifier, or an encoder whose features are pooled as the dims say."""
    import transformers

    if not path.name.startswith(("model", "pytorch_model")):
        raise ValueError(f"transformers loads the weights of its folder, and {path.name} is not their name")
    config = transformers.AutoConfig.from_pretrained(path.parent, local_files_only=True)
    name = (getattr(config, "architectures", None) or ["ViTForImageClassification"])[0]
    classifies = name.endswith(("ForImageClassification", "WithTeacher"))
    kind = getattr(transformers, name) if classifies or name in _FEATURES else transformers.AutoModel
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0  # MAE sees all patches, as it does after its pretraining
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        model, info = kind.from_pretrained(
            path.parent,
            config=config,
            local_files_only=True,
            output_loading_info=True,
            use_safetensors="safetensors" in path.name,
        )
    if missing := sorted(key for key in info["missing_keys"] if "pooler." not in key):
        raise ValueError(f"the file does not fill {type(model).__name__}: {missing[0]} is missing")
    if classifies != bool(dims.classes):
        raise ValueError(f"{name} has no classifier like the file's")
    model, first = model.eval().float(), dims.prefix if dims.mean_over == "patches" else 0

    def run(images: Any) -> Any:
        given = _naflex(images, dims) if name.startswith("Siglip2") else {"pixel_values": images}
        if classifies:
            return model(**given).logits
        if name in _FEATURES:
            return _FEATURES[name](model, given)
        x = model(**given).last_hidden_state
        return x[:, first:].mean(1) if dims.pool == "mean" else x[:, 0]

    return _Theirs(run, f"that is transformers' {type(model).__name__}, from its config.json")


def _naflex(images: Any, dims: ViTDims) -> dict[str, Any]:
    """What SigLIP 2's NaFlex takes: patches with their pixels in the order (p1 p2 c), all of them there."""
    import torch

    (rows, columns), (high, wide) = dims.grid, sides(dims.patch)
    patches = images.unfold(2, high, high).unfold(3, wide, wide).permute(0, 2, 3, 4, 5, 1)  # [B, R, C, p1, p2, 3]
    patches = patches.reshape(len(images), rows * columns, -1)
    there, shape = torch.ones(patches.shape[:2], dtype=torch.int64), torch.tensor([[rows, columns]] * len(images))
    return {"pixel_values": patches, "pixel_attention_mask": there, "spatial_shapes": shape}


def _image_features(model: Any, given: Mapping[str, Any]) -> Any:
    found = model.get_image_features(**given)
    return getattr(found, "pooler_output", found)  # transformers 4 gives the features alone


_FEATURES: dict[str, Callable[[Any, Mapping[str, Any]], Any]] = {  # what towers of images give out
    **dict.fromkeys(
        ("CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel", "BeitModel", "Data2VecVisionModel"),
        lambda model, given: model(**given).pooler_output,
    ),
    **dict.fromkeys(("CLIPModel", "SiglipModel", "Siglip2Model"), _image_features),
    "CLIPVisionModelWithProjection": lambda model, given: model(**given).image_embeds,
}


def _open_clip(path: pathlib.Path, own: State) -> _Theirs:
    """The image half of its CLIP, beside the smallest half for texts."""
    import open_clip

    config = read_beside(path, OPEN_CLIP_CONFIG)
    if config is None:
        raise ValueError(f"{OPEN_CLIP_CONFIG} is not there")
    model = dict(config.inner("model_cfg").values) or dict(config.values)
    texts = {"context_length": 2, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}
    vision = dict(model["vision_cfg"]) | {"timm_model_pretrained": False}
    quick = bool(model.get("quick_gelu"))
    whole = open_clip.CLIP(embed_dim=model["embed_dim"], vision_cfg=vision, text_cfg=texts, quick_gelu=quick)
    whole.visual.load_state_dict(_as_torch(own))
    return _Theirs(whole.visual.eval(), f"that is open_clip's image tower, from {OPEN_CLIP_CONFIG}")


def _timm(name: str, own: State, said: Said) -> _Theirs:
    import timm

    classes = own["head.weight"].shape[0] if "head.weight" in own else 0
    arguments = {"num_classes": classes, **said.arguments}
    model = timm.create_model(name, pretrained=False, **arguments)
    model.load_state_dict(_as_torch(own))
    source = "config.json" if said.publisher else "its name"
    return _Theirs(model.eval(), f"that is timm's {name}, from {source}")


def _torchvision(own: State) -> _Theirs:
    """By PyTorch's own attention, with the heads that torchvision publishes for the width."""
    import torch
    from torch.nn import functional as F

    s = _as_torch(own)
    width, _, *patch = s["conv_proj.weight"].shape
    heads = {768: 12, 1024: 16, 1280: 16}[width]
    depth = sum(name.endswith("self_attention.in_proj_weight") for name in s)

    def norm(x: Any, name: str) -> Any:
        return F.layer_norm(x, (width,), s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    def linear(x: Any, *names: str) -> Any:
        name = next(n for n in names if f"{n}.weight" in s)
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    def run(images: Any) -> Any:
        x = F.conv2d(images, s["conv_proj.weight"], s["conv_proj.bias"], stride=patch).flatten(2).transpose(1, 2)
        x = torch.cat([s["class_token"].expand(len(x), -1, -1), x], 1) + s["encoder.pos_embedding"]
        for i in range(depth):
            layer = f"encoder.layers.encoder_layer_{i}"
            y = norm(x, f"{layer}.ln_1").transpose(0, 1)
            attention = f"{layer}.self_attention"
            weights = (s[f"{attention}.in_proj_weight"], s[f"{attention}.in_proj_bias"], None, None, False, 0.0)
            out = (s[f"{attention}.out_proj.weight"], s[f"{attention}.out_proj.bias"])
            y, _ = F.multi_head_attention_forward(y, y, y, width, heads, *weights, *out, training=False)
            x = x + y.transpose(0, 1)
            hidden = F.gelu(linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.linear_1", f"{layer}.mlp.0"))
            x = x + linear(hidden, f"{layer}.mlp.linear_2", f"{layer}.mlp.3")
        x = norm(x, "encoder.ln")[:, 0]
        if "heads.pre_logits.weight" in s:
            x = torch.tanh(linear(x, "heads.pre_logits"))
        return linear(x, "heads.head")

    return _Theirs(run, f"that is torchvision's model of width {width}, written a second time with PyTorch's attention")
