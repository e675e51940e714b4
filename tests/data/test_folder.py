"""A user's own checkpoint and image folders: labels, preprocessing, the held-out part, and the stages on them."""

import pathlib
import shutil
import unicodedata

import numpy as np
import pytest
from conftest import ROOT, call, random_params, read
from PIL import Image

from nvit_jax import save_model
from nvit_jax.data.datasets import load_dataset
from nvit_jax.data.sources import labels_of
from nvit_jax.data.splits import held_out, hold_out
from nvit_jax.errors import UserError
from nvit_jax.model.dims import ViTDims, count_macs
from nvit_jax.model.directory import Model, load_model
from nvit_jax.model.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, resize_crop

CONFIG = str(ROOT / "configs" / "checkpoint.py")
SHARED = ROOT.parent / "shared"
HELD = ["cat/0005.jpg", "été/0003.jpg", "été/0004.jpg", "été/0005.jpg"]
PRE = Preprocessing(16, 255.0, IMAGENET_MEAN, IMAGENET_STD, 18, "bicubic")


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Three of five classes, 12 images each, and the list of all five."""
    rng = np.random.default_rng(0)
    for name in ("n03", "n01", "n04"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            size = tuple(rng.integers(18, 40, 2))
            Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(
                tmp_path / "images" / name / f"{name}_{i}.JPEG"
            )
    (tmp_path / "classes.tsv").write_text("".join(f"n0{i}\tname {i}\n" for i in range(5)))
    return tmp_path


def load(folder, **changes):
    values = {"train": str(folder / "images"), "classes": str(folder / "classes.tsv"), "preprocessing": PRE}
    return load_dataset("folder", **(values | changes))


def test_labels_come_from_the_class_list(folder):
    data = load(folder, val=str(folder / "images"))
    split = data.split("val")
    assert sorted(set(split.source.labels.tolist())) == [1, 3, 4] and data.classes[3] == "name 3"
    for name, label in zip(split.source.names, split.source.labels, strict=True):
        assert name.startswith(f"n0{label}/n0{label}_")
    images, labels = split.read(np.array([35, 0]))
    assert data.overlap == 36 and images.shape == (2, 16, 16, 3) and labels.tolist() == [4, 1]
    assert len(split.some(5)) == 5 and set(labels_of(split.some(6).source).tolist()) == {1, 3, 4}


def test_the_held_out_part(folder):
    data = load(folder, holdout=0.5)
    train, val = (set(data.split(s).source.names) for s in ("train", "val"))
    assert not train & val and len(train | val) == 36 and data.overlap == 0 and min(len(train), len(val)) >= 8
    # The path within the set alone decides, wherever the set lies and however many other files there are.
    assert val == {name for name in train | val if held_out(name, 0.5)}
    (folder / "images" / "n03" / "n03_0.JPEG").unlink()
    assert set(load(folder, holdout=0.5).split("val").source.names) == val - {"n03/n03_0.JPEG"}


def test_the_split_is_fixed_and_not_by_the_files_own_names():
    """0001.jpg lies in every class; what is held out is written down here, so that no change moves it unseen."""
    names = [f"{name}/{i:04}.jpg" for name in ("cat", "dog", "été") for i in range(8)]
    _, held = hold_out(names, 0.25)
    assert [names[i] for i in held] == HELD
    decomposed = [unicodedata.normalize("NFD", name) for name in names]  # the same folders on a Mac
    assert hold_out(decomposed, 0.25)[1].tolist() == held.tolist()
    many = [f"{c}/{i:04}.jpg" for c in range(50) for i in range(40)]
    parts = np.isin(np.arange(2000), hold_out(many, 0.25)[1]).reshape(50, 40)
    assert 0.2 < parts.mean() < 0.3 and not (parts == parts[0]).all(1)[1:].any()


def test_deit_s_short_sides():
    """int(256 / 224 * size) in its code."""
    assert [Preprocessing.imagenet(size).resize for size in (224, 384, 160)] == [256, 438, 182]


def test_preprocessing_is_pillow_with_torchvisions_rounding():
    """DeiT's evaluation: Resize(256, bicubic), CenterCrop(224); the long side is cut, not rounded."""
    rng = np.random.default_rng(0)
    for width, height in ((300, 201), (201, 300), (256, 256), (500, 375), (257, 400)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
        if width <= height:
            new = (256, int(256 * height / width))
        else:
            new = (int(256 * width / height), 256)
        resized = image if min(width, height) == 256 else image.resize(new, Image.Resampling.BICUBIC)
        left, top = round((resized.width - 224) / 2.0), round((resized.height - 224) / 2.0)
        expected = np.asarray(resized)[top : top + 224, left : left + 224]
        assert np.array_equal(resize_crop(image, 256, 224, "bicubic"), expected)
    grey = Image.fromarray(rng.integers(0, 256, (30, 30)).astype(np.uint8))
    assert resize_crop(grey, 16, 16, "bilinear").shape == (16, 16, 1)


def model_dir(folder) -> pathlib.Path:
    dims = ViTDims.uniform(image=16, patch=4, classes=5, embed=16, depth=2, heads=2, mlp=32)
    info = {"preprocessing": PRE.to_json(), "classes": [], "variant": None, "provenance": {}}
    save_model(folder / "model", Model(dims, random_params(dims, dtype=np.float32), info=info))
    return folder / "model"


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_pruned_and_evaluated_again(folder, capsys):
    both = (f"--config.data.train={folder}/images", f"--config.data.classes={folder}/classes.tsv")
    small = ("--config.latency.batch=8", "--config.latency.repeats=2", "--config.prune.score.batch=8")
    arguments = (f"--config.model={model_dir(folder)}", *both, *small, "--config.prune.target.macs_ratio=0.8")
    half = "--config.data.holdout=0.5"
    workdir = folder / "W"
    assert call("--workdir", workdir, *arguments, half, "--stage", "eval", config=CONFIG) == 0
    assert list(read(workdir / "summary.json")) == ["dense"]
    first = read(workdir / "eval" / "scores.json")["dense"]
    assert call("--workdir", workdir, *arguments, half, "--config.prune.snapshots=(0.9,)", config=CONFIG) == 0
    dense, snapshot = (
        load_model(p).dims for p in (folder / "model", workdir / "prune" / "snapshots" / "0.9" / "model")
    )
    assert count_macs(snapshot) <= 0.9 * count_macs(dense)
    summary = read(workdir / "summary.json")
    assert list(summary) == ["dense", "pruned"] and summary["pruned"]["macs"] <= 0.8 * summary["dense"]["macs"]
    assert read(workdir / "eval" / "scores.json")["dense"] == first
    assert read(workdir / "prune" / "metrics.json")["calibration_overlap"] is False
    assert (workdir / "report.html").exists() and not (workdir / "finetune").exists()
    assert "warning" not in capsys.readouterr().out
    # The same files twice: refused. Copies of some: said, and written down.
    over = (*arguments, f"--config.data.val={folder}/images", "--stage", "prune")
    assert call("--workdir", folder / "V", *over, config=CONFIG) == 2
    assert "36 of 36 evaluation images are training images, too" in capsys.readouterr().err
    shutil.copytree(folder / "images", folder / "copies")
    shutil.copy(folder / "copies" / "n01" / "n01_0.JPEG", folder / "copies" / "n01" / "other.JPEG")
    over = (*arguments, f"--config.data.val={folder}/copies", "--stage", "prune")
    assert call("--workdir", folder / "V", *over, config=CONFIG) == 0
    assert "warning: 36 of 37 evaluation images are training images, too" in capsys.readouterr().out
    assert read(folder / "V" / "prune" / "metrics.json")["calibration_overlap"] is True


def test_mistakes(folder):
    (folder / "empty").mkdir()
    (folder / "flat").mkdir()
    Image.new("RGB", (20, 20)).save(folder / "flat" / "a.png")
    (folder / "twice.tsv").write_text("n01\tx\nn01\ty\n")
    (folder / "few.tsv").write_text("n01\tx\nn03\ty\n")
    for changes, words in (
        ({"train": None}, "needs --config.data.path=ROOT"),
        ({"train": str(folder / "nowhere")}, "there is no such directory"),
        ({"train": str(folder / "empty")}, "holds no images of the form"),
        ({"train": str(folder / "flat")}, "names classes, and .*flat has no folders of classes"),
        ({"classes": str(folder / "nowhere.tsv")}, "there is no such file"),
        ({"classes": str(folder / "twice.tsv")}, "must name each class once"),
        ({"classes": str(folder / "few.tsv")}, "the folder 'n04' is no class of"),
        ({"holdout": 0.5, "val": "other"}, "leave config.data.val unset"),
    ):
        with pytest.raises(UserError, match=words):
            load(folder, **changes)
    (folder / "images" / "n01" / "broken.png").write_bytes(b"no image")
    data = load(folder)
    with pytest.raises(UserError, match="broken.png cannot be read as an image"):
        data.split("train").read()
    with pytest.raises(UserError, match="no test split"):
        data.split("test")


@pytest.mark.slow
def test_a_grey_folder_is_trained_pruned_and_exported(tmp_path, capsys):
    """vit.channels=1 is all that has to be said; files of colour in it become grey. Images and patches are no squares:
    (height, width)."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in ("ink", "pen"):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (10, 10, 3) if i == 0 else (10, 10)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "d" / split / name / f"{i}.png")
    keys = {
        "stages": "('pretrain','prune','eval','export')", "vit.image": "(8,12)", "vit.patch": "[4,2]", "vit.classes": 2,
        "data.name": "folder", "data.path": tmp_path / "d",
        "pretrain.epochs": 1.0, "pretrain.batch": 8, "prune.batch": 8, "augment.crop": 0.5,
        "prune.mode": "one_shot", "prune.criterion": "magnitude", "prune.compensate": False, "eval.split": "val",
        "prune.score.batch": 8, "augment.rand_augment": "rand-m9-mstd0.5-inc1", "augment.mixup": 0.8,
        "augment.cutmix": 1.0, "augment.erasing": 0.5,
        "prune.eval_images": 8, "export.formats": "('safetensors',)",
    }  # fmt: skip
    assert call("--workdir", tmp_path / "W", *(f"--config.{k}={v}" for k, v in keys.items())) == 0, capsys.readouterr()
    assert "labels: the classes of config.data.train=" in capsys.readouterr().out
    summary = read(tmp_path / "W" / "summary.json")
    assert summary["pruned"]["images"] == 8 and summary["pruned"]["macs"] <= 0.7 * summary["dense"]["macs"]
    model = load_model(tmp_path / "W" / "prune" / "model")
    assert model.dims.channels == 1 and model.preprocessing == Preprocessing.imagenet((8, 12), 1)
    assert (model.dims.image, model.dims.patch, model.dims.grid) == ((8, 12), (4, 2), (2, 6))
    assert model.preprocessing.mean == (0.449,) and model.classes == ("ink", "pen")
    assert list((tmp_path / "W" / "export").rglob("*.safetensors"))


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real checkpoint lies beside the checkout only")
@pytest.mark.slow
def test_the_real_deit_tiny(tmp_path):
    """PyTorch: top-1 384 of 500, top-5 468 (data/README.md); the same images, the same preprocessing."""
    import convert_deit_weights

    data = SHARED / "data"
    command = [f"--checkpoint={data}/deit_tiny_patch16_224.pth", f"--out={tmp_path}/model"]
    assert convert_deit_weights.main(["c", *command]) == 0
    images, classes = f"--config.data.val={data}/imagenet_sample", f"--config.data.classes={data}/imagenet_classes.tsv"
    arguments = (f"--config.model={tmp_path}/model", images, classes, "--config.latency.repeats=1")
    assert call("--workdir", tmp_path / "W", *arguments, "--stage", "eval", config=CONFIG) == 0
    dense = read(tmp_path / "W" / "summary.json")["dense"]
    assert abs(round(500 * dense["top1"]) - 384) <= 1 and abs(round(500 * dense["top5"]) - 468) <= 1
    assert dense["images"] == 500
