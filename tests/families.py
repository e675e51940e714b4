"""Which families of models go all the way: in, pruned, into another basis, and out. Each cell of the table is a test.

A row has the test that reads the family's file, and the variant of `conftest.VARIANTS` with the same parts: every
variant goes through the tests of the other columns. The page docs/export.md prints the table; tests/docs/test_pages.py
looks whether the tests exist and whether the libraries have a class.
"""

from typing import NamedTuple

CONVERT = "tests/formats/test_convert.py"
EVA = "tests/formats/test_eva.py"
ENCODERS = "tests/formats/test_encoders.py"
OPEN_CLIP = "tests/formats/test_open_clip.py"
TOWERS = "tests/formats/test_towers.py"
COLUMNS = {  # every test of these runs all variants
    "prune": "tests/pruning/test_reshape.py::test_every_variant",
    "re-base": "tests/pruning/test_compensation.py::test_a_change_of_basis_keeps_the_function",
    "export": "tests/formats/test_folders.py::test_every_variant_goes_out_and_comes_back",
}


class Family(NamedTuple):
    """One row."""

    name: str
    read_by: str  # a test
    variant: str
    loads: str  # libraries with a class for it, while all blocks are alike


FAMILIES = (
    Family("DeiT, ViT (timm's names)", f"{CONVERT}::test_timm_names[deit]", "plain", "timm, transformers"),
    Family("DeiT, distilled", f"{CONVERT}::test_timm_names[distilled]", "distilled", "timm, transformers"),
    Family("DeiT-III", f"{CONVERT}::test_timm_names[deit3]", "layer_scale", "timm"),
    Family("ViT with a tanh layer", f"{CONVERT}::test_timm_names[augreg_in21k]", "pre_logits", ""),
    Family("ViT with mean pooling", f"{CONVERT}::test_timm_names[mean_pool_without_class_token]", "mean_pool", "timm"),
    Family("DINO, MoCo v3, MAE", f"{CONVERT}::test_timm_names[dino_without_head]", "plain", "timm, transformers"),
    Family("DINOv2", f"{CONVERT}::test_timm_names[dinov2]", "layer_scale", "timm"),
    Family("DINOv2 with registers", f"{CONVERT}::test_timm_names[dinov2_registers]", "registers", "timm"),
    Family("Hugging Face ViT", f"{CONVERT}::test_hugging_face[vit]", "plain", "timm, transformers"),
    Family("Hugging Face DeiT", f"{CONVERT}::test_hugging_face[deit_with_teacher]", "distilled", "timm, transformers"),
    Family("Hugging Face DINOv2", f"{ENCODERS}::test_hugging_face[dinov2]", "layer_scale", "timm"),
    Family("its classifier, registers", f"{ENCODERS}::test_hugging_face[dinov2_registers]", "class_mean", ""),
    Family("SwiGLU (DINOv2 giant)", f"{ENCODERS}::test_hugging_face[dinov2_swiglu]", "gated", ""),
    Family("Hugging Face ViT-MAE", f"{ENCODERS}::test_hugging_face[mae]", "plain", "timm, transformers"),
    Family("Hugging Face I-JEPA", f"{ENCODERS}::test_hugging_face[ijepa]", "mean_pool", "timm"),
    Family("Hugging Face DINOv3", f"{CONVERT}::test_hugging_face_dinov3[small]", "rotary", ""),
    Family("official DINOv3", f"{CONVERT}::test_dinov3_of_its_own_project[mlp]", "rotary", ""),
    Family("EVA", f"{EVA}::test_eva[eva]", "mean_pool_all_after_norm", "timm"),
    Family("EVA-02", f"{EVA}::test_eva[eva02_clip]", "eva02", ""),
    Family(
        "EVA-CLIP of open_clip", f"{OPEN_CLIP}::test_an_eva_clip_of_open_clip[eva02_base_patch16_clip_224]", "eva02", ""
    ),
    Family("BEiT (timm's names)", f"{EVA}::test_beit[v1]", "beit", ""),
    Family("Hugging Face BEiT, data2vec", f"{EVA}::test_hugging_face_beit[relative]", "beit", ""),
    Family("timm's qk_norm", f"{CONVERT}::test_norms_of_queries_and_keys[layer]", "qk_norm", ""),
    Family("Hugging Face CLIP", f"{TOWERS}::test_hugging_face_towers[clip]", "clip", ""),
    Family("its projection", f"{TOWERS}::test_hugging_face_towers[clip_with_projection]", "clip", ""),
    Family("the image half of CLIPModel", f"{TOWERS}::test_hugging_face_towers[clip_whole]", "clip", ""),
    Family("timm's CLIP", f"{TOWERS}::test_timm[clip_quickgelu]", "clip", ""),
    Family("Hugging Face SigLIP", f"{TOWERS}::test_hugging_face_towers[siglip]", "siglip", ""),
    Family("its classifier", f"{TOWERS}::test_hugging_face_towers[siglip_classifier]", "mean_pool", "timm"),
    Family("SigLIP 2 NaFlex, squares", f"{TOWERS}::test_hugging_face_towers[siglip2]", "siglip", ""),
    Family("timm's SigLIP", f"{TOWERS}::test_timm[siglip_tanh]", "siglip", ""),
    Family("attention pooling", f"{TOWERS}::test_timm[map_of_all]", "map", ""),
    Family("pooling by the largest", f"{TOWERS}::test_timm[max]", "max", "timm"),
    Family("half mean, half largest", f"{TOWERS}::test_timm[avgmax]", "avgmax", "timm"),
    Family("CLIP of OpenAI's names", f"{OPEN_CLIP}::test_image_towers[openai]", "clip", ""),
    Family("open_clip's (GELU, LayerScale)", f"{OPEN_CLIP}::test_image_towers[open_clip]", "clip", ""),
    Family("CLIPA (mean of the patches)", f"{OPEN_CLIP}::test_image_towers[clipa]", "clip", ""),
    Family("open_clip with timm's ViT", f"{OPEN_CLIP}::test_a_model_of_timm_with_a_projection", "clip", ""),
    Family("open_clip's SigLIP", f"{OPEN_CLIP}::test_a_siglip_of_open_clip", "siglip", ""),
    Family("big_vision's SigLIP", f"{CONVERT}::test_npz[siglip_scan]", "siglip", ""),
    Family("rectangles", f"{TOWERS}::test_rectangles[timm]", "rectangle", ""),
    Family("torchvision", f"{CONVERT}::test_torchvision[False]", "plain", "timm, transformers"),
    Family("vision_transformer", f"{CONVERT}::test_npz[vision_transformer]", "pre_logits", ""),
    Family("big_vision", f"{CONVERT}::test_npz[big_vision]", "rgb_tanh_no_qkv_bias", "timm, transformers"),
    Family("released NViT", "tests/formats/test_convert_nvit.py::test_released_nvit_dense", "wide_heads", ""),
)


def markdown() -> list[str]:
    """The table, and what its cells are."""
    rows = []
    for family in FAMILIES:
        cells = [family.read_by, *(f"{test}[{family.variant}]" for test in COLUMNS.values())]
        short = [f"`{cell.rpartition('::')[2]}`" for cell in cells]
        rows.append(f"| {family.name} | {' | '.join(short)} | {family.loads or '-'} |")
    files = ", ".join(f"{name}: `{test.partition('::')[0]}`" for name, test in COLUMNS.items())
    return [
        f"| family | in | {' | '.join(COLUMNS)} | loaded by |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"The tests of each column lie in one file ({files}). Those of the first lie beside `{CONVERT}`.",
    ]
