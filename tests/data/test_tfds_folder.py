"""Folders of tensorflow-datasets: read as data. No module that they name is imported, nothing in them is waited for."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from test_bad_data import limited, tree
from tfds_sets import prepare_tfds

from nvit_jax.data.datasets import for_model, load_dataset
from nvit_jax.errors import UserError
from nvit_jax.model.preprocessing import Preprocessing

GREY = Preprocessing.imagenet(8, 1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A set "tiny" of 20 grey images of two classes, with a train split alone."""
    place = tmp_path_factory.mktemp("tfds")
    for i in range(20):
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(place / f"{i:02}.png")
    rows = ((i, {"image": str(place / f"{i:02}.png"), "label": i % 2}) for i in range(20))
    prepare_tfds(place, {"shape": (8, 8, 1), "encoding_format": "png"}, train=rows)
    return place


def features(change):
    """features.json with something else in it."""

    def edit(version, t):
        file = version / "features.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return edit


def evil_module(version, t):
    (t / "evil_features.py").write_text("raise SystemExit('code from data ran')\n")
    name = "evil_features.Evil"
    features(lambda c: c["featuresDict"]["features"]["label"].update(pythonClassName=name))(version, t)


def evil_info(version, t):
    (t / "evil_features.py").write_text("raise SystemExit('code from data ran')\n")
    file = version / "dataset_info.json"
    content = json.loads(file.read_text()) | {"features": {"pythonClassName": "evil_features.Evil"}}
    file.write_text(json.dumps(content))


def evil_legacy(version, t):
    (version / "features.json").write_text('{"type": "os.path.Evil", "content": {}}')


def evil_inside(version, t):
    inside = {"jsonFeature": {"json": '{"a": {"type": "evil_features.Evil", "content": {}}}'}}
    features(lambda c: c["featuresDict"]["features"].update(more=inside))(version, t)


def pipe_for_names(version, t):
    (version / "label.labels.txt").unlink()
    os.mkfifo(version / "label.labels.txt")


def endless_info(version, t):
    (version / "dataset_info.json").unlink()
    (version / "dataset_info.json").symlink_to("/dev/zero")


def deep(version, t):
    (version / "features.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


NONE = "only tensorflow-datasets' own are read"
MISTAKES = {
    "a module beside it": (
        evil_module,
        {},
        "{v}/features.json names the feature 'evil_features.Evil', which would be imported; " + NONE,
    ),
    "in dataset_info.json": (
        evil_info,
        {},
        "{v}/dataset_info.json names the feature 'evil_features.Evil', which would be imported; " + NONE,
    ),
    "as older versions wrote it": (
        evil_legacy,
        {},
        "{v}/features.json names the feature 'os.path.Evil', which would be imported; " + NONE,
    ),
    "JSON in JSON": (
        evil_inside,
        {},
        "{v}/features.json names the feature 'evil_features.Evil', which would be imported; " + NONE,
    ),
    "2^31 classes": (
        features(lambda c: c["featuresDict"]["features"]["label"]["classLabel"].update(numClasses=str(2**31))),
        {},
        "{v}/features.json says numClasses=2147483648; more than 1,048,576 classes are not meant to be",
    ),
    "a pipe": (pipe_for_names, {}, "{v}/label.labels.txt is no regular file; a prepared set has none of these"),
    "a device": (endless_info, {}, "{v}/dataset_info.json is no regular file; a prepared set has none of these"),
    "depth": (deep, {}, "{v}/features.json is nested too deeply"),
    "half a file": (
        lambda version, t: (version / "features.json").write_text('{"a":'),
        {},
        "{v}/features.json cannot be read: Expecting value: line 1 column 6 (char 5)",
    ),
    "no validation split": (
        lambda version, t: None,
        {},
        "data.name=tfds:tiny has no validation or test split, only train: set --config.data.holdout=0.1, or slices "
        "such as --config.data.train=train[:90%] --config.data.val=train[90%:]",
    ),
    "the same split": (
        lambda version, t: None,
        {"val": "train"},
        "data.name=tfds:tiny: 20 examples of 'train', to evaluate with, are in 'train', to train with, too; set "
        "config.data.train and config.data.val apart",
    ),
    "overlapping slices": (
        lambda version, t: None,
        {"train": "train[:60%]", "val": "train[-12:]"},
        "data.name=tfds:tiny: 4 examples of 'train[-12:]', to evaluate with, are in 'train[:60%]', to train with, too; "
        "set config.data.train and config.data.val apart",
    ),
    "a sum of slices": (
        lambda version, t: None,
        {"train": "train[:5]+train[15:]", "val": "train[4:16]"},
        "data.name=tfds:tiny: 2 examples of 'train[4:16]', to evaluate with, are in 'train[:5]+train[15:]', to train "
        "with, too; set config.data.train and config.data.val apart",
    ),
    "both": (
        lambda version, t: None,
        {"holdout": 0.5, "val": "train[:10]"},
        "config.data.holdout splits config.data.train; leave config.data.val unset",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(prepared, tmp_path, monkeypatch, case):
    edit, keys, line = MISTAKES[case]
    shutil.copytree(prepared / "tiny", tmp_path / "tiny")
    version = tmp_path / "tiny" / "1.0.0"
    edit(version, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = tree(tmp_path)
    with limited(), pytest.raises(UserError) as error:
        load_dataset("tfds:tiny", str(tmp_path), preprocessing=GREY, **keys)
    assert str(error.value) == line.format(v=version)
    assert tree(tmp_path) == before and "evil_features" not in sys.modules


@pytest.mark.parametrize("name", ["", "..", "../tiny", "Tiny", "tiny/a=1,b=2", "tiny:1.0.0", "huggingface:tiny"])
def test_names(tmp_path, name):
    with limited(), pytest.raises(UserError, match=r"^data.name=tfds:"):
        load_dataset(f"tfds:{name}", str(tmp_path), preprocessing=GREY)


def test_grey_sets_are_read_held_out_and_found_by_name(prepared):
    data = load_dataset("tfds:tiny", str(prepared), holdout=0.4, preprocessing=GREY)
    known = for_model(data, 8, 1, 3, ("bee", "cow", "ant"))
    seen = {}
    for split, again in zip(data.splits.values(), known.splits.values(), strict=True):
        images, labels = split.read()
        assert images.shape[1:] == (8, 8, 1)
        assert again.read()[1].tolist() == [{0: 2, 1: 0}[k] for k in labels.tolist()]
        seen |= {int(i.flat[0]): int(k) for i, k in zip(images, labels, strict=True)}
    assert seen == {10 * i: i % 2 for i in range(20)}
    assert known.classes == ("bee", "cow", "ant") and len(known.split("val")) == len(data.split("val")) > 2
    assert known.notes == ("labels: the 2 classes of tfds:tiny are the model's of the same names",)
