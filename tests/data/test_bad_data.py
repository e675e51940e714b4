"""A user's mistakes with data: one exact line, exit code 2, nothing changed on disk, and no waiting."""

import contextlib
import dataclasses
import io
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import tracemalloc
import unicodedata
import zipfile
import zlib

import numpy as np
import pytest
from conftest import ROOT, call, random_params
from PIL import Image

import nvit_jax as nvit
from nvit_jax.data.datasets import cores, load_dataset
from nvit_jax.data.feed import make_feed
from nvit_jax.data.labels import Labels, match
from nvit_jax.data.listing import list_folder
from nvit_jax.model.preprocessing import BadImage, Preprocessing, open_image, preprocess

CONFIG = str(ROOT / "configs" / "checkpoint.py")
SECONDS = 100  # none of these takes one; a hang is what fails
NAMES = ("cat", "dog", "eel")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> pathlib.Path:
    """Models of three classes: one knows their names, in an order of its own, the other does not."""
    place = tmp_path_factory.mktemp("models")
    for name, classes, channels in (("named", ["eel", "dog", "cat"], 3), ("plain", [], 3), ("grey", [], 1)):
        dims = nvit.ViTDims.uniform(image=8, patch=4, channels=channels, classes=3, embed=8, depth=1, heads=1, mlp=8)
        model = nvit.Model(dims, random_params(dims, dtype=np.float32), info={"classes": classes, "provenance": {}})
        nvit.save_model(place / name, model)
    return place


@contextlib.contextmanager
def limited():
    """Fails what hangs."""

    def stop(*_):
        raise TimeoutError(f"not done in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tree(root: pathlib.Path) -> dict:
    """Every path below, with what tells whether it changed."""
    facts = {p: p.lstat() for p in root.rglob("*")}
    return {str(p): (s.st_mode, s.st_size, s.st_mtime_ns) for p, s in facts.items()}


def picture(path: pathlib.Path, grey: int = 99, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(path, **options)


def folders(root: pathlib.Path, names=NAMES) -> pathlib.Path:
    for split in ("train", "val"):
        for i, name in enumerate(names):
            picture(root / split / name / "1.png", 10 * i + (split == "val"))
    return root


# ------------------------------------------------------------------------------------------------ mistakes
# Each makes what it needs in `t` and returns (model, arguments).


def listed(content: bytes | str, names=NAMES, model="plain", more=()):
    def make(t):
        folders(t / "d", names)
        (t / "list").write_bytes(content.encode() if isinstance(content, str) else content)
        return model, [f"path={t}/d", f"classes={t}/list", *(key.format(t=t) for key in more)]

    return make


def plain(names=NAMES, model="plain", more=lambda t: None, **keys):
    def make(t):
        folders(t / "d", names)
        more(t)
        return model, [f"path={t}/d", *(f"{key}={value}" for key, value in keys.items())]

    return make


def directory_as_list(t):
    folders(t / "d")
    (t / "list").mkdir()
    return "plain", [f"path={t}/d", f"classes={t}/list"]


def pipe_as_list(t):
    folders(t / "d")
    os.mkfifo(t / "list")
    return "plain", [f"path={t}/d", f"classes={t}/list"]


def endless_list(t):
    folders(t / "d")
    (t / "list").symlink_to("/dev/zero")
    return "plain", [f"path={t}/d", f"classes={t}/list"]


def same_folder(t):
    folders(t / "d")
    return "plain", [f"train={t}/d/train", f"val={t}/d/train"]


def linked_folder(t):
    folders(t / "d")
    (t / "e").symlink_to(t / "d" / "train")
    return "plain", [f"train={t}/d/train", f"val={t}/e"]


def root_as_train(t):
    folders(t / "d")
    return "plain", [f"train={t}/d"]


def bytes_in_a_name(t):
    folders(t / "d")
    picture(t / "d" / "train" / "x" / "1.png")
    (t / "d" / "train" / "x").rename(t / "d" / "train" / os.fsdecode(b"caf\xe9"))
    return "plain", [f"path={t}/d"]


def no_pictures(t):
    for name in NAMES:
        (t / "d" / name).mkdir(parents=True)
        (t / "d" / name / "1.heic").write_bytes(b"x")
        os.mkfifo(t / "d" / name / "2.png")
    return "plain", [f"val={t}/d"]


def pipes_for_pictures(t):
    for name in NAMES:
        (t / "d" / name).mkdir(parents=True)
        (t / "d" / name / "1.png").symlink_to("/dev/zero")
    return "plain", [f"val={t}/d"]


MISTAKES = {
    # class lists
    "short list": (
        listed("cat\ndog\n", ("cat", "dog")),
        "config.data.classes={t}/list names 2 classes, the model has 3; it needs one line for each (its first line is "
        "'cat', its last 'dog')",
    ),
    "long list": (
        listed("cat\ndog\neel\nfox\n"),
        "config.data.classes={t}/list names 4 classes, the model has 3; it needs one line for each (its first line is "
        "'cat', its last 'fox')",
    ),
    "unknown header": (
        listed("Tiere\ncat\ndog\neel\n"),
        "config.data.classes={t}/list names 4 classes, the model has 3; it needs one line for each (its first line is "
        "'Tiere', its last 'eel')",
    ),
    "empty line": (
        listed("cat\n\ndog\neel\n"),
        "config.data.classes={t}/list: line 2 is empty; a class's label is its line, so remove it",
    ),
    "empty first line": (
        listed("\ncat\ndog\neel\n"),
        "config.data.classes={t}/list: line 1 is empty; a class's label is its line, so remove it",
    ),
    "blank line of CRLF": (
        listed("cat\r\n  \r\ndog\r\neel\r\n"),
        "config.data.classes={t}/list: line 2 is empty; a class's label is its line, so remove it",
    ),
    "header": (
        listed("class\ncat\ndog\neel\n"),
        "config.data.classes={t}/list: line 1, 'class', is a header; a class's label is its line, so remove it",
    ),
    "CSV header": (
        listed("label,name\ncat,Cat\ndog,Dog\neel,Eel\n"),
        "config.data.classes={t}/list: line 1, 'label,name', is a header; a class's label is its line, so remove it",
    ),
    "header of another name": (
        listed("Class Names:\neel\ndog\ncat\n"),
        "config.data.classes={t}/list: line 1, 'Class Names:', is a header; a class's label is its line, so remove it",
    ),
    "comment of another mark": (
        listed("// pets\neel\ndog\ncat\n"),
        "config.data.classes={t}/list: line 1 is a comment; a class's label is its line, so remove it",
    ),
    "comment": (
        listed("cat\n# pets above\ndog\neel\n"),
        "config.data.classes={t}/list: line 2 is a comment; a class's label is its line, so remove it",
    ),
    "comment in the place of a class": (
        listed("# animals\ncat\ndog\n", ("cat", "dog")),
        "config.data.classes={t}/list: line 1 is a comment; a class's label is its line, so remove it",
    ),
    "twice": (
        listed("cat\ndog\ncat\neel\n"),
        "config.data.classes={t}/list must name each class once; 'cat' is in the lines 1 and 3",
    ),
    "a folder is missing": (
        listed("cat\ndog\nfox\n"),
        "the folder 'eel' is no class of config.data.classes={t}/list, whose first line is 'cat'",
    ),
    "numbers out of order": (
        listed("2,cat\n0,dog\n1,eel\n"),
        "config.data.classes={t}/list: line 1 has the number 2; a class's label is its line, so sort the lines by "
        "their numbers",
    ),
    "Latin-1": (
        listed("cat\ndog\nétoile\n".encode("latin-1")),
        "config.data.classes={t}/list is no text in UTF-8 (line 3); save it as UTF-8",
    ),
    "UTF-16": (
        listed("cat\ndog\neel\n".encode("utf-16")),
        "config.data.classes={t}/list is no text in UTF-8; save it as UTF-8",
    ),
    "empty list": (listed(""), "config.data.classes={t}/list is empty; it must name one class a line"),
    "no list": (plain(classes="/nowhere"), "config.data.classes=/nowhere: there is no such file"),
    "a directory as list": (directory_as_list, "config.data.classes={t}/list is a directory, not a file"),
    "a folder of too long a name": (
        plain(train="x" * 300),
        f"config.data.train='{'x' * 149}...{'x' * 29}': a name in it has 300 bytes; file systems take 255",
    ),
    "a file as folder": (
        listed("cat\n", model="plain", more=["train={t}/list"]),
        "config.data.train={t}/list is a file, not a directory",
    ),
    "a pipe as list": (pipe_as_list, "config.data.classes={t}/list is a named pipe, not a file"),
    "an endless list": (endless_list, "config.data.classes={t}/list is a device, not a file"),
    # labels and the model's names
    "too few folders": (
        plain(("cat", "dog")),
        "the model has 3 classes, the data 2 folders, which do not tell its labels: set --config.data.classes=FILE.tsv,"
        " one class folder's name a line in the order of the model's labels",
    ),
    "too many folders": (plain((*NAMES, "fox")), "the model has 3 classes, the data 4"),
    "some names": (
        plain(("cat", "dog", "fox"), "named"),
        "config.data.train={t}/d/train: the folder 'fox' is no class of the model, while 'cat' is; it has 0 'eel', 1 "
        "'dog', 2 'cat'. Rename the folder, or set --config.data.classes=FILE, a line for each class of the model",
    ),
    "val has a class of its own": (
        plain(more=lambda t: picture(t / "d" / "val" / "fox" / "1.png")),
        "config.data.val={t}/d/val: the folder 'fox' is no folder of {t}/d/train",
    ),
    # splits
    "the same folder": (
        same_folder,
        "config.data: 3 of 3 evaluation images are training images, too: accuracies would be too high; "
        "--config.data.holdout=0.5 instead of data.val separates them",
    ),
    "a link to it": (
        linked_folder,
        "config.data: 3 of 3 evaluation images are training images, too: accuracies would be too high; "
        "--config.data.holdout=0.5 instead of data.val separates them",
    ),
    "the folder of the splits": (
        root_as_train,
        "config.data.train={t}/d holds train, val, which are splits and no classes; name one of them, or set "
        "config.data.path for train/ and val/ together",
    ),
    # folders
    "two spellings": (
        plain(("été", unicodedata.normalize("NFD", "été"), "eel")),
        "config.data.train={t}/d/train holds 'été' twice, written in two Unicode forms (composed and decomposed); "
        "move the images into one folder",
    ),
    "no UTF-8": (
        bytes_in_a_name,
        "config.data.train={t}/d/train: the folder 'caf\\\\udce9' has a name that is not UTF-8; rename it",
    ),
    "no pictures": (
        no_pictures,
        "config.data.val={t}/d holds no images of the form {t}/d/CLASS/IMAGE.JPEG; 3 files are left out, their "
        "suffixes are no image's (3 .heic); 3 are no regular files and left out, {t}/d/cat/2.png for one",
    ),
    "links to /dev/zero": (
        pipes_for_pictures,
        "config.data.val={t}/d holds no images of the form {t}/d/CLASS/IMAGE.JPEG; 3 are no regular files and left "
        "out, {t}/d/cat/1.png for one",
    ),
    # keys
    "a thousand workers": (
        plain(workers=255),
        "config.data.workers=255: at most {workers} on this machine of {cores} cores",
    ),
    "a million threads": (
        plain(threads=1000),
        "config.data.threads=1000: at most {threads} on this machine of {cores} cores",
    ),
}


def substituted(line: str, t: pathlib.Path) -> str:
    c = cores()
    return line.format(t=t, cores=c, workers=max(16, 4 * c), threads=max(64, 16 * c))


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_with_folders(models, tmp_path, capsys, case):
    make, line = MISTAKES[case]
    check(models, tmp_path, capsys, make, line)


def check(models, tmp_path, capsys, make, line) -> None:
    """One line on standard error, exit code 2, and the disk as it was."""
    model, keys = make(tmp_path)
    before = tree(tmp_path)
    with limited():
        code = call(
            "--workdir", tmp_path / "W", "--stage=eval", f"--config.model={models}/{model}",
            *(f"--config.data.{key}" for key in keys), config=CONFIG,
        )  # fmt: skip
    error = capsys.readouterr().err
    assert error == f"error: {substituted(line, tmp_path)}\n" and code == 2
    if (tmp_path / "W").exists():  # of a run that has ended
        (tmp_path / "W" / ".lock").unlink()
        (tmp_path / "W").rmdir()
    assert tree(tmp_path) == before


# ---------------------------------------------------------------------------------------------------- npz


def arrays(**changes) -> dict[str, np.ndarray]:
    content = {}
    for i, split in enumerate(("train", "val", "test")):
        content[f"{split}_images"] = np.arange(i, i + 6 * 192, dtype=np.uint64).astype(np.uint8).reshape(6, 8, 8, 3)
        content[f"{split}_labels"] = np.arange(6) % 3
    return content | changes


def saved(change=lambda path: None, **changes):
    def make(t):
        np.savez_compressed(t / "a.npz", **arrays(**changes))
        change(t / "a.npz")
        return "plain", ["name=npz", f"path={t}/a.npz"]

    return make


def rewritten(**members: bytes):
    """The file with other members in the place of some."""

    def change(path):
        content = {f"{name}.npy": npy(value) for name, value in arrays().items()}
        content |= {f"{name}.npy": value for name, value in members.items()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, value in content.items():
                archive.writestr(name, value)

    return change


def npy(value) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(value))
    return file.getvalue()


def header(shape: str, dtype: str = "|u1") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def a_single_array(path):
    path.write_bytes(npy(np.zeros((6, 8, 8, 3), np.uint8)))


def encrypted(path):
    content = bytearray(path.read_bytes())
    place = 0
    while (place := content.find(b"PK\x01\x02", place)) >= 0:  # the flags in the directory
        content[place + 8] |= 1
        place += 4
    path.write_bytes(content)


def damaged(path):
    content = bytearray(path.read_bytes())
    content[100:300] = bytes(200)
    path.write_bytes(content)


def bomb(path):
    """3 GB of zeros in 3 MB: one packed block again and again, so that the test has not to pack them."""
    blocks, block = 192, 2**24
    head = header(f"({blocks * block // 192}, 8, 8, 3)")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    zeros = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    data += blocks * zeros + packer.flush()
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in arrays().items():
            if not name.startswith("train"):
                archive.writestr(f"{name}.npy", npy(value))
        archive.writestr("train_labels.npy", npy(np.zeros(block, np.uint8)), zipfile.ZIP_DEFLATED)
        info = zipfile.ZipInfo("train_images.npy")
        archive.writestr(info, data)
        info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, len(head) + blocks * block


ABSURD = "(1099511627776, 1099511627776, 1099511627776, 3)"
NPZ = {
    "a renamed .npy": (saved(a_single_array), "a single array (.npy); save all of them with numpy.savez"),
    "encrypted": (saved(encrypted), "train_images is encrypted; save it without a password"),
    "damaged deflate": (saved(damaged), "not a readable .npz file ("),
    "a pipe": (saved(lambda path: (path.unlink(), os.mkfifo(path))), " is a named pipe, not a file"),
    "a device": (saved(lambda path: (path.unlink(), path.symlink_to("/dev/zero"))), " is a device, not a file"),
    "no zip": (saved(lambda path: path.write_bytes(b"not a zip")), "not a readable .npz file (File is not a zip file)"),
    "cut off": (
        saved(lambda path: path.write_bytes(path.read_bytes()[:700])),
        "not a readable .npz file (File is not a zip file)",
    ),
    "an absurd shape": (
        saved(rewritten(train_images=header(ABSURD) + bytes(99))),
        f"train_images should hold [{ABSURD[1:-1]}] uint8, and has 99 bytes",
    ),
    "a negative shape": (
        saved(rewritten(train_images=header("(-1, 8, 8, 3)") + bytes(99))),
        "train_images should hold [-1, 8, 8, 3] uint8, and has 99 bytes",
    ),
    "objects": (
        saved(rewritten(train_labels=header("(6,)", "|O") + bytes(99))),
        "train_labels holds Python objects, which are not read; save it as numbers",
    ),
    "no array": (
        saved(rewritten(train_labels=b"x" * 99)),
        "not a readable .npz file (the magic string is not correct; expected b'\\x93NUMPY', got b'xxxxxx')",
    ),
    "labels of 2^31": (
        saved(train_labels=np.array([0, 1, 2, 0, 1, 2**31])),
        "train_labels go up to 2147483648; more than 1,048,576 classes are not meant to be",
    ),
    "labels of 2^64": (
        saved(train_labels=np.array([0, 1, 2, 0, 1, 2**64 - 1], np.uint64)),
        "train_labels go up to 18446744073709551615; more than 1,048,576 classes are not meant to be",
    ),
    "negative labels": (
        saved(val_labels=np.array([0, 1, 2, 0, 1, -1])),
        "val_labels go down to -1; labels count from 0",
    ),
    "floating-point labels": (
        saved(val_labels=np.zeros(6)),
        "val_labels must be integers [6]; it is float64 [6]",
    ),
    "no images at all": (
        saved(val_images=np.zeros((6, 0, 0, 3), np.uint8)),
        "val_images must be uint8 [n, height, width, channels]; it is uint8 [6, 0, 0, 3]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NPZ)
def test_mistakes_with_npz(models, tmp_path, capsys, case):
    make, line = NPZ[case]
    if case == "damaged deflate":  # zlib's words
        make(tmp_path)
        with limited(), pytest.raises(nvit.UserError, match=r"not a readable .npz file \((Error -3|Bad CRC|Bad magic)"):
            load_dataset("npz", f"{tmp_path}/a.npz")
        return
    line = line.replace("{", "{{").replace("}", "}}")
    between = "" if line[0].isdigit() or line.startswith(" is") else ": "
    check(models, tmp_path, capsys, make, f"data.path={{t}}/a.npz{between}{line}")


def test_a_bomb_is_not_unpacked(tmp_path):
    bomb(tmp_path / "a.npz")
    tracemalloc.start()
    with limited(), pytest.raises(nvit.UserError, match=r"would become 3,2\d\d,\d\d\d,\d\d\d; no images are so alike"):
        load_dataset("npz", str(tmp_path / "a.npz"))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_npz_is_read_as_numpy_reads_it(tmp_path):
    content = arrays(val_labels=np.array([2, 1, 0, 2, 1, 0], ">i2"))
    content["train_images"] = np.asfortranarray(content["train_images"])
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **content, other=np.array([None]))
        data = load_dataset("npz", str(tmp_path / "a.npz"))
        for split in ("train", "val", "test"):
            images, labels = data.split(split).read()
            assert np.array_equal(images, content[f"{split}_images"])
            assert np.array_equal(labels, content[f"{split}_labels"]) and labels.dtype == np.int32


def test_names_that_are_too_long(tmp_path):
    folders(tmp_path / "d")
    long = "x" * 300
    for keys in ({"name": "npz", "path": long}, {"name": "folder", "path": f"{tmp_path}/d", "classes": long}):
        with pytest.raises(nvit.UserError, match="a name in it has 300 bytes; file systems take 255$"):
            load_dataset(**keys)


def test_a_key_without_meaning_gets_a_word():
    data = load_dataset("digits", classes="list", holdout=0.5)
    assert data.notes == tuple(
        f"warning: config.data.{key} has no meaning for data.name=digits" for key in ("classes=list", "holdout=0.5")
    )


@pytest.mark.parametrize(
    ("scale", "mean", "std", "white"),
    [(16.0, 0.5, 0.5, "30.9"), (1.0, 0.0, 1.0, "255"), (255.0, 0.45, 0.01, "55"), (1.0, 127.5, 58.0, ""),
     (255.0, 0.45, 0.22, ""), (127.5, 1.0, 1.0, "")],
)  # fmt: skip
def test_pixels_that_no_model_is_made_for_get_a_word(tmp_path, scale, mean, std, white):
    """A model of the digits, whose pixels go to 16, on a folder of photographs."""
    folders(tmp_path / "d")
    pre = Preprocessing(8, scale, (mean,), (std,))
    notes = [n for n in load_dataset("folder", f"{tmp_path}/d", preprocessing=pre).notes if "pixels" in n]
    assert len(notes) == bool(white) and all(f" makes {white}: is the model made for such" in n for n in notes)


def test_images_of_val_in_train_are_counted_in_arrays(tmp_path):
    content = arrays()
    content["val_images"] = content["train_images"][[0, 1, 2, 3, 4, 4]]
    content["val_labels"] = content["train_labels"][[0, 1, 2, 3, 4, 5]]  # the last: another label
    np.savez(tmp_path / "a.npz", **content)
    data = load_dataset("npz", str(tmp_path / "a.npz"))
    assert data.overlap == data.copies == 5


# --------------------------------------------------------------------------------------------------- right


def labels_of_folders(data, split="val") -> dict[str, int]:
    source = data.split(split).source
    return {
        unicodedata.normalize("NFC", n.split("/")[0]): int(k) for n, k in zip(source.names, source.labels, strict=True)
    }


RIGHT = {  # files that people have, for folders cat, dog and eel
    "plain": "eel\ndog\ncat\n",
    "no end of line": "eel\ndog\ncat",
    "UTF-8 mark": b"\xef\xbb\xbfeel\ndog\ncat\n",
    "CRLF": "eel\r\ndog\r\ncat\r\n",
    "lines of old Macs": "eel\rdog\rcat\r",
    "empty lines behind": "eel\ndog\ncat\n\n\n",
    "tabs": "eel\tAal\ndog\tHund\ncat\tKatze\n",
    "CSV": "eel,Aal\ndog,Hund\ncat,Katze\n",
    "CSV with quotes": '"eel","Aal, groß"\n"dog","Hund"\n"cat","Katze, ""Mieze"""\n',
    "semicolons": "eel;Aal\ndog;Hund\ncat;Katze\n",
    "numbers in front": "0,eel\n1,dog\n2,cat\n",
    "numbers from 1": "1\teel\n2\tdog\n3\tcat\n",
    "numbers behind": "eel 0\ndog 1\ncat 2\n",
    "Kaggle's LOC_synset_mapping.txt": "eel eel, electric eel\ndog dog, hound\ncat cat, house cat\n",
    "names in front": "Aal\teel\nHund\tdog\nKatze\tcat\n",
}


@pytest.mark.parametrize("case", RIGHT)
def test_lists_that_people_have(tmp_path, case):
    make = listed(RIGHT[case])
    make(tmp_path)
    data = load_dataset("folder", f"{tmp_path}/d", classes=f"{tmp_path}/list")
    assert labels_of_folders(data) == {"cat": 2, "dog": 1, "eel": 0}


def test_copies_of_training_images_are_counted(tmp_path):
    folders(tmp_path / "d")
    shutil.copy(tmp_path / "d" / "train" / "cat" / "1.png", tmp_path / "d" / "val" / "cat" / "1.png")
    picture(tmp_path / "d" / "val" / "cat" / "2.png")
    data = load_dataset("folder", f"{tmp_path}/d")
    assert (data.overlap, data.copies) == (1, 1)
    (tmp_path / "e").symlink_to(tmp_path / "d" / "train")
    data = load_dataset("folder", train=f"{tmp_path}/d/train", val=f"{tmp_path}/e")
    assert (data.overlap, data.copies) == (3, 0)


def test_names_for_people(tmp_path):
    listed(RIGHT["Kaggle's LOC_synset_mapping.txt"])(tmp_path)
    data = load_dataset("folder", f"{tmp_path}/d", classes=f"{tmp_path}/list")
    assert data.classes == ("eel, electric eel", "dog, hound", "cat, house cat")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_other_unicode_forms(tmp_path, form):
    names = ("été", "naïf", "zoo")
    folders(tmp_path / "d", [unicodedata.normalize(form, name) for name in names])
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    (tmp_path / "list").write_text("\n".join(unicodedata.normalize(other, name) for name in reversed(names)))
    data = load_dataset("folder", f"{tmp_path}/d", classes=f"{tmp_path}/list")
    assert labels_of_folders(data) == {"été": 2, "naïf": 1, "zoo": 0}


def test_suffixes_and_junk(tmp_path):
    """What Pillow reads is taken, whatever its suffix's case, in folders of folders, too; what systems leave is not."""
    root = tmp_path / "d"
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "JPG": "JPEG", "pgm": "PPM", "avif": "AVIF", "jp2": "JPEG2000",
             "PNG": "PNG", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "gif": "GIF"}  # fmt: skip
    for suffix, kind in kinds.items():
        picture(root / "cat" / f"a.{suffix}", format=kind)
    picture(root / "dog" / "images" / "2020" / "b.png")
    for junk in ("cat/._a.png", "cat/.hidden.png", "cat/@eaDir/a.png/thumb.jpg", "cat/Thumbs.db", "cat/.DS_Store",
                 ".ipynb_checkpoints/a.png", "@eaDir/a.png", "__MACOSX/cat/._a.png", "@Recycle/a.png",
                 "~snapshot/cat/a.png"):  # fmt: skip
        (root / junk).parent.mkdir(parents=True, exist_ok=True)
        (root / junk).write_bytes(b"x")
    (root / "cat" / "notes.txt").write_text("x")
    (root / "cat" / "movie.xyz").write_text("x")
    (root / "empty").mkdir()
    (root / "cat" / "loop").symlink_to(root / "cat")
    (root / "dog" / "up").symlink_to("..")  # the images of cats are no dogs
    (root / "dog" / "self.png").symlink_to("self.png")  # a broken image, as one that leads nowhere
    picture(root / "lost.png")
    found = list_folder(root, "data.train")
    assert found.files == {"cat": sorted(f"cat/a.{s}" for s in kinds), "dog": ["dog/images/2020/b.png", "dog/self.png"]}
    where = f"config.data.train={root}: "
    assert found.notes == (
        f"{where}2 files are left out, their suffixes are no image's (1 .txt, 1 .xyz); 2 links lead back to this "
        f"folder and are left out, {root}/cat/loop for one",
        f"{where}1 images lie in folders below the one of their class, dog/images/2020/b.png for one",
        f"{where}1 images lie outside of all class folders and are left out, lost.png for one",
        f"{where}1 folders hold no images and are no classes: empty",
    )
    (root / "dog" / "self.png").unlink()
    images, _ = load_dataset("folder", train=str(root)).split("train").read()
    assert np.abs(images.astype(int) - 99).max() <= 3  # lossy formats


def test_numbered_folders_get_a_word(tmp_path):
    folders(tmp_path / "d", ("0", "1", "10", "2"))
    labels = load_dataset("folder", f"{tmp_path}/d").split("val").labels
    found = match(labels, (), 4)
    assert found.doubt and found.words.endswith(
        "; by number '2' would come before '10': if that is meant, set data.classes=FILE"
    )
    assert match(labels, ("0", "1", "2", "10"), 4).table.tolist() == [0, 1, 3, 2]
    named = dataclasses.replace(labels, folders=("class1", "class10", "class2"), names=("class1", "class10", "class2"))
    assert "by number 'class2' would come before 'class10'" in match(named, (), 3).words
    assert not match(dataclasses.replace(named, folders=("1a", "10b", "2c")), (), 3).doubt


def test_a_list_in_another_order_than_the_models_names():
    """Names that are all known count, however few stand elsewhere; of some that are, the order of the list does."""
    own = ("eel", "cat", "dog", "fox")
    labels = Labels("listed", own, own, "LIST")
    found = match(labels, ("cat", "eel", "dog", "fox"), 4)
    assert found.table.tolist() == [1, 0, 2, 3] and found.doubt and "has in another order" in found.words
    assert match(labels, ("cat", "eel", "hound", "fox"), 4).table is None


def test_the_models_names_count_and_not_the_alphabet(tmp_path, models):
    """In the library and in a run; one folder less is no matter."""
    folders(tmp_path / "d")
    shutil.rmtree(tmp_path / "d" / "val" / "dog")
    shutil.rmtree(tmp_path / "d" / "train" / "dog")
    model = nvit.load_model(models / "named")
    pre = Preprocessing.imagenet(8)
    data = nvit.load_dataset("folder", f"{tmp_path}/d", preprocessing=pre)
    model.info["preprocessing"] = pre.to_json()
    images, _ = data.split("val").read()
    right = (model(images).argmax(-1) == np.array([2, 0])).mean()  # the model's order is eel, dog, cat
    assert nvit.evaluate(model, data, progress=False)["top1"] == right
    feed = make_feed(data.split("val"), model.dims, pre, classes=model.classes)
    assert feed.split.source.labels.tolist() == [2, 0]


@pytest.mark.parametrize("chunk", ["iCCP", "zTXt", "iTXt"])
def test_png_with_a_large_profile_or_text(tmp_path, chunk):
    """Pillow refuses to unpack more than a megabyte of them; the pixels are fine."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(file, "PNG")
    plain_file = file.getvalue()
    packed = zlib.compress(bytes(3 * 2**20))
    body = {"iCCP": b"p\0\0", "zTXt": b"t\0\0", "iTXt": b"t\0\1\0\0\0"}[chunk] + packed
    name = chunk.encode()
    added = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    for place in (33, len(plain_file) - 12):  # behind the header, and behind the pixels
        content = plain_file[:place] + added + plain_file[place:]
        assert np.array_equal(open_image(content, 3), np.full((8, 8, 3), 99))


def test_no_ghostscript(tmp_path, monkeypatch):
    """An EPS is no image here: Pillow would start a program that runs what the file says."""

    def refuse(*arguments, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(ran) print\n%%EOF\n"
    with pytest.raises(BadImage, match="cannot identify it: it is none of JPEG, PNG, "):
        open_image(eps, 3)


def test_what_is_no_regular_file_is_never_waited_for(tmp_path):
    """It may take a file's place after the folder was listed."""
    folders(tmp_path / "d")
    data = load_dataset("folder", f"{tmp_path}/d")
    file = tmp_path / "d" / "val" / "cat" / "1.png"
    for make in (lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero"), lambda: file.mkdir()):
        file.unlink()
        make()
        with limited(), pytest.raises(nvit.UserError, match=r"cat/1.png cannot be read as an image: "):
            data.split("val").read()
        with limited(), pytest.raises(nvit.UserError, match=r"cat/1.png cannot be read: "):
            preprocess(str(file), Preprocessing.imagenet(8))
        if file.is_dir():
            break
