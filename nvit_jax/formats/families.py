"""What is not a plain Vision Transformer, told from the names of its tensors: the family, or the part that differs."""

import re
from collections.abc import Iterable

from nvit_jax.errors import UserError
from nvit_jax.formats.facts import Facts

SUPPORTED = (
    "read are plain ViT, DeiT, DeiT-III, DINO, DINOv2, MAE, I-JEPA, MoCo v3, CLIP, SigLIP and BEiT models of timm, "
    "Hugging Face, torchvision, vision_transformer, big_vision, OpenAI, open_clip and their own projects, EVA, EVA-02 "
    "and DINOv3 of timm, Hugging Face and their own projects, released NViT, and RegNetY teachers"
)
# Name of a tensor (from the start of one of its parts) -> the family. The more particular first.
_FAMILIES = {
    r"qweight$|.*\.qweight$|.*\.(weight_scale|SCB|quant_map|absmax|zero_point)$": "a quantised model",
    r".*\.lora_[AB]\.": "a model with LoRA adapters, which must be merged into its weights first",
    r"layer1\.0\.conv1\.weight|encoder\.stages\.0\.layers\.0\.layer\.": "a ResNet",
    r"patch_embed\.backbone\.|embeddings\.patch_embeddings\.backbone\.": "a hybrid of a ResNet and a ViT",
    r"layers\.0\.blocks\.0\.(attn|attention)\.|features\.1\.0\.attn\.relative_position_bias_table|"
    r"(encoder\.)?layers\.0\.blocks\.0\.layernorm_before": "a Swin Transformer",
    r"layers\.0\.blocks\.0\.modulation\.": "a FocalNet",
    r"stages\.\d+\.\d+\.transformer\.\d+\.|encoder\.layer\.\d+\.transformer\.layer\.\d+\.": "a MobileViT",
    r"stages\.\d+\.blocks\.\d+\.attn_(block|grid)\.": "a MaxViT",
    r"stages\.\d+\.blocks\.\d+\.attn\.rel_pos\.": "a hybrid of convolutions and attention (CoAtNet, GCViT)",
    r"stages\.\d+\.blocks\.\d+\.attn\.attention_bias|blocks\.\d+\.m\.attention_bias": "a LeViT or TinyViT",
    r"stages\.\d+\.blocks\.\d+\.attn\.(sr|kv)\.|block1\.0\.attn\.": "a hierarchical Transformer (PVT)",
    r"levels\.0\.transformer_encoder\.": "a NesT",
    r"stages\.\d+\.(blocks\.)?\d+(\.\d+)?\.(attn|token_mixer)\.": "a hierarchical Transformer or hybrid",
    r"blocks\.0\.attn\.rel_pos\.|shared_rel_pos\.": "a ViT with relative positions",
    r"embeds\.(proj|pos_embed)": "a NaFlex ViT (images of any shape)",
    r"rel_pos_bias\.relative_position_bias_table|encoder\.relative_position_bias\.|shared_position_bias\.": (
        "a BEiT whose blocks share their relative positions, as in its pretraining"
    ),
    r"blocks\.0\.attn\.gate\.": "a ViT with gates in its attention",
    r"rope\.freqs$": "a ViT with rotary positions that are learned",
    r"stages\.0\.blocks\.0\.conv_dw\.|downsample_layers\.0\.0\.|stages\.0\.0\.dwconv\.|"
    r"encoder\.stages\.0\.layers\.0\.dwconv\.|stages\.0\.layers\.0\.depthwise_conv\.|"
    r"features\.1\.0\.block\.0\.weight": "a ConvNeXt",
    r"stem\.(0|conv1?)\.(weight|conv\.weight)|conv_stem\.weight|stages\.0\.blocks\.0\.conv1\.conv\.weight|"
    r"features\.0\.0\.weight": "a convolutional network",
    r"stages\.\d+\.(blocks\.)?\d+\.|patch_embed1\.|patch_embeds\.\d|network\.0\.|transformers\.0\.blocks\.|"
    r"svtblock\d": "a hierarchical Transformer or hybrid",
    r"blocks_token_only\.": "a CaiT",
    r"blocks\.0\.(attn\.temperature|local_mp\.)": "an XCiT",
    r"blocks\.0\.mlp_(tokens|channels)\.": "an MLP-Mixer",
    r"blocks\.0\.(blocks\.0\.\d|fusion)\.": "a CrossViT",
    r"tokens_to_token\.|pixel_embed\.": "a T2T-ViT or TNT",
    r"blocks\.\d+\.proj\.weight": "a Hiera or MViT",
    r"blocks\.0\.attn\.(gating_param|rel_pos_h|pool_q)": "a ViT with other attention (ConViT, SAM or MViT)",
    r"attn_pool\.(query$|ln_q\.)": "a CoCa (many queries pool its tokens)",
    r"resblocks\.\d+\.(ln_attn\.|ln_1_kv\.|mlp\.ln\.|attn\.(ln_|head_scale|logit_scale))": "a CLIP with other blocks",
    r"embeddings\.token_embedding\.": "a model of texts",
    r"token_embedding\.weight": "a CLIP whose image tower is another one",
    r"(?<!encoder\.)layers\.\d+\.self_attn\.q_proj\.|h\.\d+\.attn\.c_attn\.": "a language model",
    r".*\brope\.(?!freqs_(cos|sin)$)": "a ViT with rotary positions that are neither DINOv3's nor EVA-02's",
    r"blocks\.0\.(attns|ffns)\.": "a ViT of parallel blocks",
    r"blocks\.0\.(in_proj|attn\.sub_norm)": "a ViT of parallel or differential blocks",
    r".*MlpBlock_\d/Dense_2/|layers\.0\.mlp\.weights_in\.": "a ViT with SwiGLU",
    r"layers\.0\.attention\.[qk]_norm\.|.*(query|key)_norm/scale": ("a ViT that normalises queries and keys (qk_norm)"),
    r"patch_embed\.norm\.": "a ViT with a norm in its patch embedding (embed_norm_layer)",
}
_LOOK = [(family, re.compile(rf"(?:^|.*[./])(?:{pattern})")) for pattern, family in _FAMILIES.items()]


def refuse(names: Iterable[str], where: str) -> None:
    """UserError when a name gives another family away, or a part that a plain ViT does not have."""
    names = sorted(names)
    for family, look in _LOOK:
        mark = next((name for name in names if look.match(name)), None)
        if mark is not None:
            raise UserError(f"{where} is {family} ({mark}), not a plain Vision Transformer; {SUPPORTED}")


def check_type(config: Facts | None) -> None:
    """UserError where a config.json says that it is of another family."""
    kind = None if config is None else config.get("model_type", str)
    if config is not None and kind is not None and kind not in (*HUGGING_FACE_TYPES, *TOWERS):
        raise UserError(f"{config.where}: model_type={kind!r} is not a plain Vision Transformer; {SUPPORTED}")


def unknown(names: Iterable[str], where: str) -> UserError:
    """For a file that nobody recognises."""
    shown = ", ".join(sorted(names)[:4])
    return UserError(f"{where} is not a plain Vision Transformer of a known layout; it holds {shown}, ...; {SUPPORTED}")


# timm's names of architectures whose tensors do not show that they have rotary positions of another kind than DINOv3.
_NAMES = {
    r"vit_\w+_patch\d+_rope_(?!reg\d_gap_)": "a ViT with rotary positions that are neither DINOv3's nor EVA-02's",
    r"vit_pe_\w+_patch": "a Perception Encoder (rotary positions)",
    r"eva02_enormous_patch": "an EVA-02 with norms behind its parts (post-norm)",
    r"vit_\w+_patch\d+_(lingbot|sapiens2)": "a ViT with rotary positions",
}


def refuse_name(name: str, where: str) -> None:
    """UserError when the name of an architecture, or of a file, is that of another family."""
    for pattern, family in _NAMES.items():
        if re.match(pattern, name):
            raise UserError(f"{where} is {family} ({name}), not a plain Vision Transformer; {SUPPORTED}")


# model_type of a Hugging Face config.json: those whose layers are ViT's.
HUGGING_FACE_TYPES = (
    *("vit", "deit", "vit_mae", "vit_msn", "ijepa", "dinov2", "dinov2_with_registers", "dinov3_vit", "timm_wrapper"),
    *("beit", "data2vec-vision"),
)
# And those of image towers, alone or beside a model of texts, whose config is then inside -> the tower's own type.
TOWERS = {
    **dict.fromkeys(("clip", "clip_vision_model"), "clip_vision_model"),
    **dict.fromkeys(("siglip", "siglip_vision_model"), "siglip_vision_model"),
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), "siglip2_vision_model"),  # NaFlex; others say siglip
}
