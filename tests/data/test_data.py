"""Batches by position: any number of workers and processes, repeated views, broken files, tensorflow-datasets."""

import collections
import multiprocessing
import pathlib
import tarfile

import jax
import numpy as np
import pytest
from conftest import ROOT, call, read
from PIL import Image
from tfds_sets import prepare_tfds

from nvit_jax import load_model
from nvit_jax.data.augment import RandAugment, TrainCrop
from nvit_jax.data.datasets import Loading, Split, load_dataset
from nvit_jax.data.pipeline import eval_batches, train_stream
from nvit_jax.data.sources import Arrays
from nvit_jax.errors import UserError
from nvit_jax.model.preprocessing import Preprocessing

PRE = Preprocessing(16, 255.0, (0.5,) * 3, (0.5,) * 3, 18, "bicubic")
VIEW = TrainCrop(16, 3, (128,) * 3, rand_augment=RandAugment())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    """NViT's layout: root/train/CLASS/*.jpeg and root/val/CLASS/*.jpeg, 2 classes, 40 and 10 images."""
    place = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 5)):
        for name in ("ant", "bee"):
            (place / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (*rng.integers(18, 40, 2), 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / split / name / f"{i:02}.jpeg")
    return place


def load(root, **loading):
    return load_dataset("folder", str(root), preprocessing=PRE, loading=Loading(**loading))


def take(split: Split, steps, **options) -> list[dict]:
    stream = train_stream(split, 16, (7, 0), **options)
    try:
        return [stream(step) for step in steps]
    finally:
        stream.close()


def same(a: list[dict], b: list[dict]) -> None:
    for x, y in zip(a, b, strict=True):
        assert all(np.array_equal(x[name], y[name]) for name in ("image", "label", "index"))


def test_folders_without_a_class_list(root):
    data = load(root)
    assert data.classes == ("ant", "bee") and data.split("train").labels.kind == "folders"
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 40, "val": 10}


def test_the_same_batches_for_any_number_of_workers_threads_and_starts(root):
    steps = range(5)  # 40 images: two batches an epoch
    expected = take(load(root, threads=1).split("train"), steps, pixels=VIEW)
    same(take(load(root, threads=4).split("train"), steps, pixels=VIEW), expected)
    same(take(load(root, workers=2).split("train"), steps, pixels=VIEW), expected)
    same(take(load(root, workers=1, threads=2).split("train"), range(3, 5), pixels=VIEW), expected[3:])
    back_and_forth = [4, 0, 1, 3]
    same(take(load(root).split("train"), back_and_forth, pixels=VIEW), [expected[i] for i in back_and_forth])
    halves = [take(load(root).split("train"), steps, pixels=VIEW, rows=slice(i, i + 8)) for i in (0, 8)]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)]
    same(joined, expected)  # two processes
    seen = np.concatenate([b["image"] for b in expected[:2]])
    assert len(np.unique(seen.reshape(32, -1), axis=0)) == 32
    assert not np.array_equal(expected[0]["image"], expected[2]["image"])  # another epoch, other views


def test_a_killed_worker_is_replaced(root):
    expected = take(load(root).split("train"), range(30))
    stream, told, found = train_stream(load(root, workers=2).split("train"), 16, (7, 0)), [], []
    stream.report = told.append
    for step in range(30):
        found.append(stream(step))
        if step == 3:
            multiprocessing.active_children()[0].kill()
    stream.close()
    same(found, expected)
    assert len(told) == 1 and told[0].startswith("reading starts again at batch")


def test_every_epoch_is_a_permutation():
    split = Split(Arrays(np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1), np.arange(50, dtype=np.int32)))
    labels = [b["label"] for b in take(split, range(9))]
    for epoch in range(3):
        assert len(set(np.concatenate(labels[3 * epoch : 3 * epoch + 3]).tolist())) == 48
    assert len({tuple(b.tolist()) for b in labels}) == 9


def test_repeated_views():
    """DeiT's repeated augmentation: an epoch covers a third of the images, each three times, apart in the batch."""
    split = Split(Arrays(np.arange(96, dtype=np.uint8).reshape(96, 1, 1, 1), np.arange(96, dtype=np.int32)))
    stream = train_stream(split, 24, (0,), repeats=3)
    batches = [stream(step)["label"] for step in range(4)]  # 4 batches are an epoch of 96 views
    for labels in batches:
        assert np.unique(labels, return_counts=True)[1].tolist() == [3] * 8
        assert all(labels[i] != labels[23 - i] for i in range(24))  # a copy is no mixup partner
    assert len(np.unique(np.concatenate(batches))) == 32


def test_evaluation_sees_every_image_once(root):
    split = load(root).split("val")
    images, labels = split.read()
    for batch, rows in ((4, slice(None)), (10, slice(None)), (16, slice(None)), (4, slice(0, 2)), (4, slice(2, 4))):
        found = list(eval_batches(split, batch, rows))
        valid = np.concatenate([b["valid"] for b in found]) == 1
        mine = [i for i in range(10) if i % batch in range(batch)[rows]]
        assert np.array_equal(np.concatenate([b["image"] for b in found])[valid], images[mine])
        assert np.array_equal(np.concatenate([b["label"] for b in found])[valid], labels[mine])


def test_broken_files_are_skipped_counted_and_limited(root, tmp_path):
    import shutil

    place = tmp_path / "images"
    shutil.copytree(root, place)
    for split, name in (("train", "ant/03.jpeg"), ("val", "bee/01.jpeg")):
        (place / split / name).write_bytes(b"")
    data = load(place, max_bad_fraction=0.1)
    stream, told = train_stream(data.split("train"), 16, (7, 0), pixels=VIEW), []
    stream.report = told.append
    for step in range(6):  # three epochs
        assert stream(step)["image"].shape == (16, 16, 16, 3)
    stream.close()
    assert told == [f"skipped {place}/train/ant/03.jpeg: the file is empty"]
    assert len(take(data.split("train"), range(2))) == 2 and len(told) == 1  # another stream of it: known
    strict = load(place, max_bad_fraction=0.0)
    with pytest.raises(UserError, match=r"1 of 40 examples cannot be read.*max_bad_fraction=0$"):
        take(strict.split("train"), range(3))
    assert take(load(place, max_bad_fraction=0.1, processes=2).split("train"), range(3))  # two may be bad in each
    valid = np.concatenate([b["valid"] for b in eval_batches(data.split("val"), 4, report=told.append)])
    assert valid.tolist() == [1] * 6 + [0] + [1] * 3 + [0] * 2 and told[1].startswith(f"skipped {place}/val/bee/01")
    for i in range(8):
        (place / "train" / "bee" / f"{i:02}.jpeg").write_bytes(b"no image")
    words = r"5 of 40 examples cannot be read, .*more than config.data.max_bad_fraction=0.1"
    with pytest.raises(UserError, match=words):
        take(data.split("train"), range(4), pixels=VIEW)
    for file in (place / "val").rglob("*.jpeg"):
        file.unlink() if "ant" in str(file) else file.write_bytes(b"x")
    with pytest.raises(UserError, match="none of the 10 examples can be read"):
        list(eval_batches(data.split("val"), 4))


def test_a_prepared_tfds_set(root, tmp_path):
    """Built here from the images of the folder, without TensorFlow; the same pixels come out."""
    import sys

    def rows(split):
        return ((str(f), {"image": str(f), "label": f.parent.name}) for f in sorted((root / split).rglob("*.jpeg")))

    with pytest.raises(UserError, match="is not prepared as ArrayRecord in .*download_and_prepare"):
        load_dataset("tfds:mnist", str(tmp_path), preprocessing=PRE)
    prepare_tfds(
        tmp_path, {"shape": (None, None, 3), "encoding_format": "jpeg"}, train=rows("train"), validation=rows("val")
    )
    data = load_dataset("tfds:tiny", str(tmp_path), preprocessing=PRE)
    assert data.classes == ("ant", "bee") and {k: len(s) for k, s in data.splits.items()} == {"train": 40, "val": 10}
    folder = load(root)
    for split in ("train", "val"):
        ours, theirs = data.split(split).read(), folder.split(split).read()
        order = [np.lexsort(np.concatenate([i.reshape(len(i), -1), lab[:, None]], 1).T) for i, lab in (ours, theirs)]
        assert np.array_equal(ours[0][order[0]], theirs[0][order[1]])
        assert np.array_equal(ours[1][order[0]], theirs[1][order[1]])
    part = load_dataset("tfds:tiny", str(tmp_path), train="train[:50%]", val="train[50%:]", preprocessing=PRE)
    assert len(part.split("train")) == len(part.split("val")) == 20
    with pytest.raises(UserError, match="4 examples of 'train.40%:.', to evaluate with, are in 'train.:50%.'"):
        load_dataset("tfds:tiny", str(tmp_path), train="train[:50%]", val="train[40%:]", preprocessing=PRE)
    held = load_dataset("tfds:tiny", str(tmp_path), holdout=0.25, preprocessing=PRE)
    sets = [set(held.split(name).source.index.tolist()) for name in ("train", "val")]
    assert not sets[0] & sets[1] and len(sets[0] | sets[1]) == 40 and 4 <= len(sets[1]) <= 16
    again = load_dataset("tfds:tiny", str(tmp_path), train="train[:50%]", preprocessing=PRE, loading=Loading(workers=1))
    same(take(again.split("train"), range(2), pixels=VIEW), take(part.split("train"), range(2), pixels=VIEW))
    shard = next(file for file in (tmp_path / "tiny" / "1.0.0").iterdir() if "train" in file.name)
    content = bytearray(shard.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 4000] = bytes(4000)
    shard.write_bytes(content)
    torn = load_dataset("tfds:tiny", str(tmp_path), preprocessing=PRE, loading=Loading(max_bad_fraction=0.9))
    with pytest.raises(UserError, match="none of the 40 examples can be read"):  # all are in one chunk of the file
        take(torn.split("train"), [0])
    with pytest.raises(OSError, match="the record is damaged"):
        torn.split("train").source.read(3)
    with pytest.raises(UserError, match="sets of other people's repositories"):
        load_dataset("tfds:someone:tiny", str(tmp_path), preprocessing=PRE)
    with pytest.raises(UserError, match="split 'train.90%:10%.'"):
        load_dataset("tfds:tiny", str(tmp_path), train="train[90%:10%]", preprocessing=PRE)
    with pytest.raises(UserError, match="split 'nothing'"):
        load_dataset("tfds:tiny", str(tmp_path), train="nothing", preprocessing=PRE)
    with pytest.raises(UserError, match="data.name=tfds:no_such_set"):
        load_dataset("tfds:no_such_set", str(tmp_path), preprocessing=PRE)
    assert "tensorflow" not in sys.modules


def test_a_split_without_labels_is_not_evaluated():
    split = Split(Arrays(np.zeros((4, 2, 2, 1), np.uint8), np.full(4, -1, np.int32)))
    with pytest.raises(UserError, match="have no label"):
        list(eval_batches(split, 4))


def test_cifar10_as_folders(tmp_path):
    """Real images of 32 pixels, as DeiT evaluates and trains on them."""
    archive = ROOT.parent / "shared" / "data" / "cifar10_jpeg.tar.gz"
    if not archive.exists():
        pytest.skip("the CIFAR-10 archive is not here")
    with tarfile.open(archive) as file:
        members, counts = [], collections.Counter()
        for member in file:  # the first images of each class and split
            parts = pathlib.PurePosixPath(member.name).parts[-3:]
            if member.isfile() and len(parts) == 3 and counts[parts[:2]] < 6:
                counts[parts[:2]] += 1
                members.append(member)
            if len(counts) == 20 and min(counts.values()) == 6:
                break
        file.extractall(tmp_path, members, filter="data")
    (train,) = tmp_path.rglob("train")
    data = load_dataset("folder", train=str(train), val=str(train.parent / "test"))
    assert len(data.classes) == 10 and {k: len(s) for k, s in data.splits.items()} == {"train": 60, "val": 60}
    images, labels = data.split("val").read()
    assert images.shape == (60, 224, 224, 3) and np.bincount(labels).tolist() == [6] * 10
    assert images.std() > 20 and 90 < images.mean() < 150
    view = TrainCrop(224, 3, (124, 116, 104), rand_augment=RandAugment())
    assert take(data.split("train"), [0], pixels=view)[0]["image"].shape == (16, 224, 224, 3)


@pytest.mark.slow
def test_a_run_on_folders_with_deits_augmentation(root, tmp_path, capsys):
    """pretrain from NViT's layout: crops, RandAugment, erasing, mixup and cutmix, three views, worker threads."""
    vit = {"image": 16, "patch": 8, "channels": 3, "classes": 2, "embed": 16, "depth": 1, "heads": 2, "mlp": 32}
    arguments = [f"--config.vit.{k}={v}" for k, v in vit.items()]
    arguments += ["--config.data.name=folder", f"--config.data.path={root}", "--stage=pretrain"]
    arguments += ["--config.augment.crop=0.08", "--config.augment.rand_augment=rand-m9-mstd0.5-inc1"]
    arguments += ["--config.augment.erasing=0.25", "--config.augment.mixup=0.8", "--config.augment.cutmix=1.0"]
    arguments += ["--config.augment.repeats=3", "--config.pretrain.batch=12", "--config.pretrain.epochs=2.0"]
    arguments += ["--config.pretrain.smoothing=0.1"]
    config = str(ROOT / "tests" / "tiny.py")
    assert call("--workdir", tmp_path / "W", *arguments, config=config) == 0, capsys.readouterr().err
    assert read(tmp_path / "W" / "pretrain" / "metrics.json")["steps"] == 6
    assert "data.path" not in read(tmp_path / "W" / "pretrain" / "stage.json")["inputs"]  # ImageNet is not hashed
    preview = [a for a in arguments if a != "--stage=pretrain"]
    assert call("--workdir", tmp_path / "W", *preview, "--stage=preview", config=config) == 0
    page = (tmp_path / "W" / "preview.html").read_text()
    assert "ant: as evaluated" in page and page.count("data:image/png;base64,") == 6 * 7 + 3 * 8
    start = [f"--config.pretrain.start={tmp_path}/W/pretrain/model", "--config.pretrain.learning_rate=1e-30"]
    start += ["--config.pretrain.weight_decay=0.0", "--config.pretrain.accumulate=3"]
    assert call("--workdir", tmp_path / "S", *arguments, *start, config=config) == 0
    before, after = (load_model(tmp_path / w / "pretrain" / "model").params for w in "WS")
    # A step of AdamW moves a weight by about the learning rate: 6 steps of 1e-30 move none but those that are 0.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-28), before, after)
    more = [*arguments, "--config.vit.classes=5"]
    assert call("--workdir", tmp_path / "V", *more, config=config) == 2
    assert "the model has 5 classes, the data 2 folders" in capsys.readouterr().err
    digits = ["--stage=pretrain", "--config.augment.crop=0.5"]
    assert call("--workdir", tmp_path / "U", *digits, config=config) == 2
    assert "images of 0..255 are needed, these are 0..16" in capsys.readouterr().err
