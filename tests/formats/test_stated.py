"""What config.json and preprocessor_config.json state is built, or named in one line."""

import json

import numpy as np
import pytest
import sources
import torch
import transformers
from safetensors.numpy import save_file
from sources import SIZES, numpy_state, randomise, small_vit

from nvit_jax.errors import UserError
from nvit_jax.formats.convert import Options, convert, convert_checkpoint, verify_model
from nvit_jax.model.directory import load_model
from nvit_jax.model.preprocessing import Preprocessing, resize_crop

IMAGES = np.random.default_rng(5).standard_normal((3, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def state():
    return numpy_state(small_vit().state_dict())


@pytest.fixture(scope="module")
def hf_state():
    """Under Hugging Face's names, with the config that its library writes."""
    values = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
    config = transformers.ViTConfig(**values, image_size=16, patch_size=4, num_labels=7)
    module = randomise(transformers.ViTForImageClassification(config))
    return numpy_state(module.state_dict()), {**config.to_dict(), "architectures": ["ViTForImageClassification"]}


def written(folder, state, config=None, processor=None, name="model.safetensors"):
    save_file(state, folder / name)
    for file, value in (("config.json", config), ("preprocessor_config.json", processor)):
        if value is not None:
            (folder / file).write_text(json.dumps(value))
    return folder / name


TIMM_BUILT = {
    "heads": ({"model_args": {"num_heads": 3}}, {"heads": (3, 3, 3), "activation": "gelu"}),
    "heads_of_pairs": ({"model_args": {"num_heads": 12}}, {"heads": (12,) * 3, "qk": (2,) * 3}),
    "at_the_top": ({"num_heads": 3, "act_layer": "relu"}, {"heads": (3, 3, 3), "activation": "relu"}),
    "quick_gelu": ({"model_args": {"num_heads": 3, "act_layer": "quick_gelu"}}, {"activation": "quick_gelu"}),
    "tanh": ({"model_args": {"num_heads": 3, "act_layer": "gelu_tanh"}}, {"activation": "gelu_tanh"}),
    "mean": ({"model_args": {"num_heads": 3, "global_pool": "avg", "fc_norm": False}}, {"pool": "mean"}),
    "mean_at_the_top": ({"global_pool": "avg", "model_args": {"num_heads": 3}}, {"pool": "mean"}),
    "mean_of_all": (
        {"model_args": {"num_heads": 3, "global_pool": "avg", "pool_include_prefix": True}},
        {"pool": "mean", "mean_over": "all"},
    ),
    "max": ({"model_args": {"num_heads": 3, "global_pool": "max"}}, {"pool": "max"}),
    "avgmax": ({"model_args": {"num_heads": 3, "global_pool": "avgmax"}}, {"pool": "avgmax"}),
    "rectangle": ({"model_args": {"num_heads": 3, "img_size": [32, 8]}}, {"image": (32, 8), "grid": (8, 2)}),
    "rectangle_cfg": (
        {"pretrained_cfg": {"input_size": [3, 8, 32]}, "model_args": {"num_heads": 3}},
        {"image": (8, 32), "grid": (2, 8)},
    ),
    "harmless": (
        {"model_args": {"num_heads": 3, "drop_path_rate": 0.1, "img_size": [16, 16], "qk_norm": False}},
        {"heads": (3, 3, 3)},
    ),
}


@pytest.mark.parametrize("case", TIMM_BUILT)
def test_timm_states(case, state, tmp_path):
    config, wanted = TIMM_BUILT[case]
    dims = convert(written(tmp_path, state, config)).model.dims
    assert {name: getattr(dims, name) for name in wanted} == wanted


def args(**values):
    return {"model_args": {"num_heads": 3} | values}


REFUSED = {
    "prr": (args(global_pool="prr"), "global_pool='prr' (pooling by attention of patches) is not built"),
    "map": (args(global_pool="map"), "pool='map' is stated, and the file has no tensors of attention pooling"),
    "top_pool": ({"global_pool": "prr", **args()}, "global_pool='prr'"),
    "mish": (args(act_layer="mish"), "act_layer='mish' is no activation that is built"),
    "qk_norm": (args(qk_norm=True), "qk_norm=True is stated, and its tensors say False"),
    "pre_norm": (args(pre_norm=True), "its pre_norm is False, and what is stated of it says True"),
    "final_norm": (args(final_norm=False), "final_norm=False"),
    "rms": (args(norm_layer="rmsnorm"), "norm_layer='rmsnorm'"),
    "swiglu": (args(mlp_layer="SwiGLU"), "mlp_layer='SwiGLU'"),
    "unknown": (args(rope=True), "rope=True is a setting that is not known"),
    "rectangle": (args(img_size=[32, 16]), "images of 32 x 16 pixels are stated, and its positions are for 16"),
    "size": (args(img_size=[32, "8"]), "img_size=[32, '8'] is not a size"),
    "patch": (args(patch_size=[4, 8]), "its patch is 4, and what is stated of it says (4, 8)"),
    "other_image": (args(img_size=32), "images of 32 pixels are stated, and its positions are for 16"),
    "other_embed": (args(embed_dim=48), "its embed is 24, and what is stated of it says 48"),
    "heads": (args(num_heads=5), "are not 5 heads"),
    "heads_text": (args(num_heads="three"), "num_heads='three' is not a whole number"),
    "heads_list": (args(num_heads=[3]), "num_heads=[3] is not a whole number"),
    "heads_true": (args(num_heads=True), "num_heads=True is not a whole number"),
    "heads_zero": (args(num_heads=0), "num_heads=0 must be at least 1"),
    "model_args": ({"model_args": [1]}, "model_args=[1] is not an object"),
    "cfg": ({"pretrained_cfg": "x", **args()}, "pretrained_cfg='x' is not an object"),
    "labels": ({"label_names": 3, **args()}, "label_names=3 is not a list"),
    "pool_number": (args(global_pool=3), "global_pool=3 is not a text"),
    "crop_mode": ({"pretrained_cfg": {"crop_mode": "border"}, **args()}, "crop_mode='border' is not built"),
    "filter": ({"pretrained_cfg": {"interpolation": "cubic"}, **args()}, "interpolation='cubic' is none of"),
    "crop_pct": ({"pretrained_cfg": {"crop_pct": -1}, **args()}, "crop_pct=-1 must be above 0"),
    "std": ({"pretrained_cfg": {"std": [1, 0, 1]}, **args()}, "numbers above 0"),
    "mean": ({"pretrained_cfg": {"mean": ["a"] * 3}, **args()}, "must be 3 numbers"),
    "swin": ({"model_type": "swin"}, "model_type='swin' is not a plain Vision Transformer; read are plain ViT"),
    "list": ([1, 2], "holds a list, not an object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_timm_states_and_is_not_built(case, state, tmp_path):
    config, words = REFUSED[case]
    with pytest.raises(UserError) as caught:
        convert(written(tmp_path, state, config))
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1, caught.value


HF_REFUSED = {
    "act": ({"hidden_act": "mish"}, "hidden_act='mish' is no activation"),
    "act_number": ({"hidden_act": 3}, "hidden_act=3 is not a text"),
    "eps": ({"layer_norm_eps": "1e-12"}, "layer_norm_eps='1e-12' is not a number"),
    "eps_negative": ({"layer_norm_eps": -1}, "must be at least 0 and below 1"),
    "image": ({"image_size": [16, 8]}, "images of 16 x 8 pixels are stated, and its positions are for 16"),
    "depth": ({"num_hidden_layers": 4}, "its depth is 3, and what is stated of it says 4"),
    "mlp": ({"intermediate_size": 44}, "its mlp is 40, and what is stated of it says 44"),
    "swiglu": ({"use_swiglu_ffn": True}, "use_swiglu_ffn=True is a setting that is not known"),
    "layerscale": ({"layerscale_value": 1.0}, "layerscale_value=1.0"),
    "pruned": ({"pruned_heads": {"0": [1]}}, "pruned_heads={'0': [1]} is not built"),
    "quantised": ({"quantization_config": {"bits": 8}}, "quantization_config"),
    "labels": ({"id2label": ["a", "b"]}, "id2label=['a', 'b'] is not an object"),
    "label_keys": ({"id2label": {"a": 0}}, "a key of id2label is no number"),
    "type": ({"model_type": "dinov3_convnext"}, "model_type='dinov3_convnext'"),
    "type_number": ({"model_type": 3}, "model_type=3 is not a text"),
}


@pytest.mark.parametrize("case", HF_REFUSED)
def test_what_hugging_face_states_and_is_not_built(case, hf_state, tmp_path):
    state, config = hf_state
    change, words = HF_REFUSED[case]
    with pytest.raises(UserError) as caught:
        convert(written(tmp_path, state, config | change))
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1, caught.value


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"hidden_act": "relu"}, {"activation": "relu"}),
        ({"hidden_act": "gelu_fast"}, {"activation": "gelu_tanh"}),
        ({"layer_norm_eps": 1e-3}, {"norm_eps": 1e-3}),
        ({"num_attention_heads": None}, {"heads": (12,) * 3}),  # what the class has without it
        ({"model_type": "vit_msn", "_name_or_path": "x", "finetuning_task": "y"}, {"heads": (3,) * 3}),
    ],
)
def test_hugging_face_states(change, wanted, hf_state, tmp_path):
    state, config = hf_state
    dims = convert(written(tmp_path, state, config | change)).model.dims
    assert {name: getattr(dims, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("id2label", "names"),
    [
        ({str(i): f"c{i}" for i in range(7)}, [f"c{i}" for i in range(7)]),
        ({str(i + 1): f"c{i}" for i in range(7)}, [f"c{i}" for i in range(7)]),
        ({str(i): f"c{i}" for i in reversed(range(4, 11))}, [f"c{i}" for i in range(4, 11)]),
        ({str(i): f"c{i}" for i in range(5)}, []),
    ],
)
def test_class_names_in_any_order_from_any_number(id2label, names, hf_state, tmp_path):
    state, config = hf_state
    found = convert(written(tmp_path, state, config | {"id2label": id2label}))
    assert found.model.info["classes"] == names
    assert bool(names) != any("class names are stated" in note for note in found.notes)


def test_class_names_of_timm(state, tmp_path):
    names = [f"n{i:08d}" for i in range(7)]
    for config in ({"label_names": names, **args()}, {"pretrained_cfg": {"label_names": names}, **args()}):
        assert convert(written(tmp_path, state, config)).model.info["classes"] == names


def test_a_config_of_something_else_is_passed_over_and_said(state, tmp_path):
    found = convert(written(tmp_path, state, {"theme": "dark"}), Options(heads=3))
    assert any("passed over" in note for note in found.notes)


def test_sources_that_contradict(state, tmp_path):
    with pytest.raises(UserError, match="--heads=6 contradicts"):
        convert(written(tmp_path, state, args()), Options(heads=6))


def test_arguments_of_training(state, tmp_path):
    import argparse

    weights = {k: torch.from_numpy(v) for k, v in state.items()}
    given = argparse.Namespace(
        model="vit_tiny_patch16_224", model_kwargs={"num_heads": 12, "act_layer": "relu"}, gp=None
    )
    torch.save({"state_dict": weights, "arch": "vit_tiny_patch16_224", "args": given}, tmp_path / "w.pth")
    dims = convert(tmp_path / "w.pth").model.dims
    assert dims.heads == (12,) * 3 and dims.activation == "relu"
    given.gp = "prr"
    torch.save({"state_dict": weights, "args": given}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="pooling by attention of patches"):
        convert(tmp_path / "w.pth")


# -------------------------------------------------------------------------------------------- preprocessing

PROCESSORS = {  # processor -> size, resize, mode, filter, scale, mean
    "vit": ({"size": {"height": 16, "width": 16}, "resample": 2}, (16, "squash", "bilinear", 255.0, 0.5)),
    "old_vit": ({"size": 16, "resample": 3}, (16, "squash", "bicubic", 255.0, 0.5)),
    "deit": (
        {"size": {"height": 18, "width": 18}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}},
        (18, "squash", "bilinear", 255.0, 0.5),
    ),
    "shortest": (
        {"size": {"shortest_edge": 18}, "crop_size": 16, "do_center_crop": True, "resample": 1},
        (18, "center", "lanczos", 255.0, 0.5),
    ),
    "bit": (
        {"size": 18, "crop_size": 16, "do_center_crop": True, "image_processor_type": "BitImageProcessor"},
        (18, "center", "bilinear", 255.0, 0.5),
    ),
    "no_crop": ({"crop_size": 12, "do_center_crop": False}, (16, "squash", "bilinear", 255.0, 0.5)),
    "null_crop": (
        {"size": {"height": 18, "width": 18}, "crop_size": None, "do_center_crop": None},
        (16, "squash", "bilinear", 255.0, 0.5),
    ),
    "plain": ({"do_resize": False}, (16, "none", "bilinear", 255.0, 0.5)),
    "raw": ({"do_normalize": False, "do_rescale": False}, (16, "squash", "bilinear", 1.0, 0.0)),
    "unnormalised": ({"do_normalize": False}, (16, "squash", "bilinear", 255.0, 0.0)),
    "factor": ({"rescale_factor": 1 / 127.5}, (16, "squash", "bilinear", 127.5, 0.5)),
    "other_size": ({"size": {"height": 8, "width": 8}}, (16, "squash", "bilinear", 255.0, 0.5)),
    "mean": ({"image_mean": [0.1, 0.1, 0.1]}, (16, "squash", "bilinear", 255.0, 0.1)),
}  # fmt: skip


@pytest.mark.parametrize("case", PROCESSORS)
def test_processors(case, hf_state, tmp_path):
    processor, (resize, mode, interpolation, scale, mean) = PROCESSORS[case]
    model = convert(written(tmp_path, *hf_state, processor)).model
    pre = model.preprocessing
    assert (pre.resize, pre.crop_mode, pre.interpolation, pre.scale) == (
        resize,
        mode,
        interpolation,
        pytest.approx(scale),
    )
    assert pre.size == 16 and pre.mean == (mean,) * 3 and Preprocessing.from_json(pre.to_json()) == pre


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        ({"size": "16"}, "size='16' is not"),
        ({"size": {"height": 16, "width": 8}}, "it makes images of 16 x 8 pixels, the model takes 16"),
        ({"size": {"longest_edge": 16}}, "is no height and width, and no shortest_edge"),
        ({"size": [16, 16, 16]}, "is no height and width"),
        ({"rescale_factor": 0}, "must be above 0"),
        ({"image_std": [0, 1, 1]}, "numbers above 0"),
        ({"image_mean": "half"}, "image_mean='half' is not"),
        ({"resample": 9}, "none of Pillow's filters"),
        ({"do_resize": "yes"}, "do_resize='yes' is not true or false"),
    ],
)
def test_processors_that_are_wrong(processor, words, hf_state, tmp_path):
    with pytest.raises(UserError) as caught:
        convert(written(tmp_path, *hf_state, processor))
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("cfg", "wanted"),
    [
        ({"crop_pct": None}, {"resize": 18, "crop_mode": "center"}),  # timm's own default, 0.875
        ({"crop_pct": 1.0, "crop_mode": "squash"}, {"resize": 16, "crop_mode": "squash"}),
        ({"interpolation": "lanczos"}, {"interpolation": "lanczos"}),
        ({"interpolation": "random"}, {"interpolation": "bicubic"}),
        ({"mean": [0.5], "std": 0.25}, {"mean": (0.5,) * 3, "std": (0.25,) * 3}),
    ],
)
def test_preprocessing_of_timm(cfg, wanted, state, tmp_path):
    pre = convert(written(tmp_path, state, {"pretrained_cfg": cfg, **args()})).model.preprocessing
    assert {name: getattr(pre, name) for name in wanted} == wanted


def test_images_are_squashed_or_left_as_they_are():
    from PIL import Image

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8))
    whole = np.asarray(image.resize((20, 20), Image.Resampling.LANCZOS))
    assert np.array_equal(resize_crop(image, 20, 16, "lanczos", "squash"), whole[2:18, 2:18])
    assert np.array_equal(resize_crop(image, 99, 16, "bicubic", "none"), np.asarray(image)[12:28, 22:38])
    assert not np.array_equal(resize_crop(image, 20, 16, "lanczos"), whole[2:18, 2:18])
    # Rectangles: height and width. The shape of the image is kept, and the larger side of the two is cut.
    wide = np.asarray(image.resize((45, 30), Image.Resampling.LANCZOS))
    assert np.array_equal(resize_crop(image, (20, 45), (10, 41), "lanczos"), wide[10:20, 2:43])
    flat = np.asarray(image.resize((20, 30), Image.Resampling.LANCZOS))
    assert np.array_equal(resize_crop(image, (30, 20), (30, 18), "lanczos", "squash"), flat[:, 1:19])
    assert np.array_equal(resize_crop(image, 99, (20, 58), "bicubic", "none"), np.asarray(image)[10:30, 1:59])


def test_the_processor_of_images_and_texts(hf_state, tmp_path):
    """transformers 5 writes both halves into one file; an image processor of its own comes first."""
    path = written(tmp_path, *hf_state)
    inner = {"size": {"shortest_edge": 18}, "crop_size": 16, "do_center_crop": True, "image_mean": [0.1] * 3}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    pre = convert(path).model.preprocessing
    assert (pre.resize, pre.crop_mode, pre.mean) == (18, "center", (0.1,) * 3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.2] * 3}))
    assert convert(path).model.preprocessing.mean == (0.2,) * 3


def test_a_rectangle_is_prepared_as_its_publisher_does(state, tmp_path):
    """timm scales both sides by crop_pct; a processor that makes rectangles squashes to them."""
    cfg = {"input_size": [3, 32, 8], "crop_pct": 0.8}
    pre = convert(written(tmp_path, state, {"pretrained_cfg": cfg, **args()})).model.preprocessing
    assert (pre.size, pre.resize, pre.crop_mode) == ((32, 8), (40, 10), "center")
    processor = {"size": {"height": 64, "width": 16}}
    pre = convert(written(tmp_path, state, args(img_size=[32, 8]), processor)).model.preprocessing
    assert (pre.size, pre.resize, pre.crop_mode) == ((32, 8), (32, 8), "squash")


def test_the_exported_file_prepares_images_alike(tmp_path):
    from PIL import Image

    from nvit_jax.formats import torch_vit

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    image.save(tmp_path / "i.png")
    for mode in ("center", "squash", "none"):
        for size, resize in ((16, 20), ((16, 8), (20, 11)), ((8, 16), 20)):
            pre = Preprocessing(size, 255.0, (0.5,) * 3, (0.25,) * 3, resize, "lanczos", mode)
            assert Preprocessing.from_json(json.loads(json.dumps(pre.to_json()))) == pre
            ours = pre(pre.crop()((tmp_path / "i.png").read_bytes())[None])[0]
            theirs = torch_vit.read_image(tmp_path / "i.png", pre.to_json()).numpy().transpose(1, 2, 0)
            assert np.abs(ours - theirs).max() <= 1e-6, (mode, size)  # float32 rounding of the normalisation


# --------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_verify_builds_the_publishers_model(act, tmp_path, capsys):
    values = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    config = transformers.ViTConfig(**values, image_size=16, patch_size=4, num_labels=7, hidden_act=act)
    module = randomise(transformers.ViTForImageClassification(config))
    module.save_pretrained(tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "out", verify=True)
    said = capsys.readouterr().out
    assert "that is transformers' ViTForImageClassification, from its config.json" in said
    assert float(said.split("difference to PyTorch ")[1].split()[0]) < 1e-4
    model = load_model(tmp_path / "out")
    # The judge does not share what was found: a wrong activation is seen.
    import dataclasses

    wrong = dataclasses.replace(model, dims=dataclasses.replace(model.dims, activation="gelu"))
    assert verify_model(tmp_path / "hf", wrong)[0] > 1e-3


def test_verify_against_timm(tmp_path, capsys):
    timm = sources.import_timm()
    if timm is None:
        pytest.skip("timm is not installed: pip install --no-deps timm (without torchvision)")
    from timm.models import save_for_hf

    given = {"num_classes": 5, "depth": 2, "img_size": 32, "num_heads": 6, "global_pool": "avg", "fc_norm": False}
    module = randomise(timm.create_model("vit_tiny_patch16_224", **given))
    save_for_hf(module, tmp_path / "hub", model_args=given, safe_serialization=True)
    convert_checkpoint(tmp_path / "hub", tmp_path / "out", verify=True)
    said = capsys.readouterr().out
    assert "that is timm's vit_tiny_patch16_224, from config.json" in said
    largest = float(said.split("logits up to ")[1].split(",")[0])
    assert float(said.split("difference to PyTorch ")[1].split()[0]) < 1e-5 * max(1, largest)


def test_verify_says_what_it_does_not_know(state, tmp_path, capsys):
    path = written(tmp_path, state)
    convert_checkpoint(path, tmp_path / "out", Options(heads=SIZES["heads"]), verify=True)
    assert "this checked the mapping of the tensors only" in capsys.readouterr().out
    convert_checkpoint(path, tmp_path / "zero", Options(heads=3, classes=4), verify=True)
    assert "logits are all 0" in capsys.readouterr().out


def test_torchvision_is_verified_by_a_second_writing(tmp_path):
    from nvit_jax.formats.verify import _torchvision

    module = randomise(sources.TorchvisionViT(embed=768, heads=12, depth=1, mlp=8))
    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        found, wanted = _torchvision(numpy_state(module.state_dict())).run(images), module(images)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()  # float32 sums of 768 large random terms
