"""Checkpoint files that look like ones: named for what they are before they fill the memory or run for ever."""

import json
import struct
import zipfile

import numpy as np
import pytest
from conftest import random_params, small_dims
from safetensors.numpy import load_file, save_file

import nvit_jax as nvit
from nvit_jax.formats.export import write_safetensors

DIMS = small_dims()
HEADER = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117)


def write_array(path):
    np.save(path.with_suffix(".npy"), np.zeros(3))
    path.with_suffix(".npy").rename(path)


def write_zip(**members):
    def write(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name.replace("_", "."), content)

    return write


def write_bomb(path):
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("cls.npy", "w", force_zip64=True) as file,
    ):
        for _ in range(17):
            file.write(bytes(2**24))


def write_metadata(facts):
    header = {
        "__metadata__": {"nvit_jax": json.dumps(facts)},
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    }

    def write(path):
        content = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(16))

    return write


FILES = [
    ("x.npz", write_array, " is a single array (.npy), not an .npz file of named ones"),
    ("x.npz", write_zip(readme_txt=b"x"), " is no .npz file of arrays: it holds 'readme.txt'"),
    (
        "x.npz",
        write_zip(cls_npy=HEADER + b"\n"),
        " is truncated, holds Python objects, or is not an .npz file: cls should hold [1000000000000] float32, and "
        "has 0 bytes",
    ),
    ("x.npz", write_bomb, "bytes would become 285,212,672; no weights are so alike"),
    (
        "x.pth",
        write_zip(data_pkl=bytes(10**5)),
        " is a compressed zip file, which torch.save does not write; is it an archive?",
    ),
    ("x.safetensors", write_metadata([1]), ": its metadata is not what nvit_jax writes: must be an object"),
    (
        "x.safetensors",
        write_metadata({"dims": DIMS.to_json(), "preprocessing": {}, "classes": 3}),
        ": its metadata is not what nvit_jax writes: classes must be a list, each a text",
    ),
    (
        "x.safetensors",
        write_metadata({"dims": {"embed": 8}, "preprocessing": {}}),
        ": its metadata: dims: missing field(s) classes, heads, image, mlp, patch, qk, qk_scale, v",
    ),
]


@pytest.mark.parametrize(("name", "write", "line"), FILES, ids=range(len(FILES)))
def test_a_file_that_is_none_is_named(tmp_path, name, write, line):
    write(tmp_path / name)
    with pytest.raises(nvit.UserError) as caught:
        nvit.load(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and str(caught.value).endswith(line)


@pytest.mark.parametrize("number", ["900000", "9" * 20, "9" * 5000])
def test_a_block_of_a_number_that_cannot_be(tmp_path, number):
    """As many blocks are not looked for one by one."""
    model = nvit.Model(DIMS, random_params(DIMS, dtype=np.float32))
    write_safetensors(model, tmp_path)
    state = {
        k.replace("blocks.1.", f"blocks.{number}."): v for k, v in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(state, tmp_path / "odd.safetensors")
    (tmp_path / "config.json").unlink(missing_ok=True)
    with pytest.raises(nvit.UserError, match=rf"left over in the file: blocks\.{number[:9]}"):
        nvit.load(tmp_path / "odd.safetensors", heads=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_changed_byte_of_an_export_is_found(tmp_path, dtype):
    write_safetensors(nvit.Model(DIMS, random_params(DIMS, dtype=np.float32)), tmp_path, dtype)
    (path,) = tmp_path.glob("*.safetensors")
    assert nvit.load(path).dims == DIMS
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(nvit.UserError, match="is damaged: the checksum in its metadata is another"):
        nvit.load(path)


def test_an_export_takes_the_options_of_every_checkpoint(tmp_path):
    """None is passed over in silence."""
    facts = {"size": 8, "scale": 255.0, "mean": [0.5], "std": [0.5], "resize": 10, "interpolation": "bicubic"}
    info = {"preprocessing": facts, "classes": list("abcde")}
    model = nvit.Model(DIMS, random_params(DIMS, dtype=np.float32), info=info)
    write_safetensors(model, tmp_path)
    path = tmp_path / "model.safetensors"
    assert nvit.load(path).classes == tuple("abcde")
    for option in ({"variant": "deit_tiny"}, {"heads": 2}, {"entry": "model"}):
        with pytest.raises(nvit.UserError, match="was exported by nvit_jax and says all of itself"):
            nvit.load(path, **option)
    other = nvit.load(path, classes=3, image=16)
    assert (other.dims.classes, other.dims.image, other.classes) == (3, 16, ())
    assert (other.preprocessing.size, other.preprocessing.resize) == (16, 20)
    assert not other.params["head"]["kernel"].any() and other.params["head"]["kernel"].shape == (8, 3)
    same = other.params["block_0"]["fc1"]["kernel"]
    np.testing.assert_array_equal(same, np.asarray(model.params["block_0"]["fc1"]["kernel"]))


def test_a_folder_stands_for_the_checkpoint_in_it(tmp_path, capsys):
    from nvit_jax.run import cli

    (tmp_path / "hub").mkdir()
    facts = {"size": 8, "scale": 255.0, "mean": [0.5], "std": [0.5]}
    write_safetensors(
        nvit.Model(DIMS, random_params(DIMS, dtype=np.float32), info={"preprocessing": facts}), tmp_path / "hub"
    )
    assert cli.main(["convert", str(tmp_path / "hub"), str(tmp_path / "model")]) == 0
    assert nvit.load(tmp_path / "model").dims == DIMS
    assert cli.main(["convert", str(tmp_path / "model"), str(tmp_path / "again")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'model'} is a model directory already\n"
