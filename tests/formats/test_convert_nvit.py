"""Files of the released NViT, dense and pruned at full size, compute what its code computes."""

import json

import jax
import numpy as np
import pytest
import sources
import torch
from conftest import run_forward
from test_convert import IMAGES, SHARED, check_round_trip, save

from nvit_jax.formats.convert import convert, verify_model
from nvit_jax.model import vit
from nvit_jax.model.masks import kept_dims
from nvit_jax.model.reshape import reshape

WIDTHS = {"EMB": 20, "head": [2, 3, 1], "QK": [8, 4, 12], "V": [6, 8, 4], "MLP": [16, 40, 24]}


def test_released_nvit_dense(tmp_path):
    state = sources.nvit_state(WIDTHS, dense=True)
    torch.save(
        {"model": {k: torch.from_numpy(v) for k, v in state.items()}, "dim": WIDTHS, "epoch": 3}, tmp_path / "w.pth"
    )
    expected = sources.nvit_forward(state, IMAGES, WIDTHS["head"])
    with jax.enable_x64(True):
        model = convert(tmp_path / "w.pth", dtype=np.float64).model
        assert np.abs(np.asarray(model.logits(model.params, IMAGES)) - expected).max() <= 1e-9
    model = convert(tmp_path / "w.pth").model
    assert model.dims.heads == (2, 3, 1) and model.dims.qk_scale == 64**-0.5 and model.masks is None
    check_round_trip(model, tmp_path)


def test_released_nvit_pruned(tmp_path):
    """Zeroed weights become masks. Without embed's, the masked models agree; with them, the compact ones do."""
    full = {"EMB": 24, "head": [3] * 2, "QK": [8] * 2, "V": [8] * 2, "MLP": [32] * 2}
    for embed in (False, True):
        state = sources.nvit_state(full, dense=False)
        head, q, v, m = [1], [0, 5], [3], [2, 7, 9]
        for letter, gone in (("Q", q), ("K", q), ("V", v)):
            for leaf in ("weight", "bias"):
                value = state[f"blocks.1.attn.qkv.{letter}.{leaf}"]
                value[gone] = 0
                value[..., head] = 0
        state["blocks.1.attn.proj.weight"][:, v] = 0
        state["blocks.1.attn.proj.weight"][..., head] = 0
        state["blocks.0.mlp.fc1.weight"][m] = state["blocks.0.mlp.fc1.bias"][m] = 0
        state["blocks.0.mlp.fc2.weight"][:, m] = 0
        state["blocks.0.attn.qkv.head_mask.weight"][2] = 0  # a head switched off by its mask alone
        if embed:
            gone = [4, 11]
            for name, value in state.items():
                if value.shape[-1:] == (24,) and ("token" in name or "pos" in name or "norm" in name):
                    value[..., gone] = 0
                elif name.split(".")[-2:] in (["proj", "weight"], ["proj", "bias"], ["fc2", "weight"], ["fc2", "bias"]):
                    value[gone] = 0
        path = save(tmp_path / "w.pth", state)
        single = convert(path).model
        difference, largest = verify_model(path, single)
        assert difference <= 1e-4 * max(1, largest)
        with jax.enable_x64(True):
            found = convert(path, dtype=np.float64)
            model = found.model
            dims = kept_dims(model.masks, model.dims)
            assert (dims.embed, dims.heads, dims.qk, dims.v) == (22 if embed else 24, (2, 2), (8, 6), (8, 7))
            assert dims.mlp == (29, 32) and any("masked" in note for note in found.notes)
            ours = np.asarray(model.logits(model.params, IMAGES))
            if embed:
                _, compact = reshape(model.params, model.masks, model.dims)
                assert np.abs(run_forward(dims, compact, IMAGES).mean(1) - ours).max() <= 1e-9
            else:
                assert np.abs(ours - sources.nvit_forward(state, IMAGES, full["head"])).max() <= 1e-9
    state["blocks.0.attn.qkv.token_mask"][3] = 0
    with pytest.raises(Exception, match="token_mask is not all ones"):
        convert(save(tmp_path / "t.pth", state))


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the reference numbers lie beside the checkout only")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "iteration"),
    [
        ("full_unpruned", None),
        ("run_C_iter1_EMB528", 1),
        ("run_C_final", 9),
        ("run_C_final_EMB_restored", 9),
        ("only_EMB_528_pruned", None),
    ],
)
def test_released_nvit_numbers(case, iteration, tmp_path):
    """DeiT-B pruned by the released engine at full size, converted: the logits of its own dense conversion."""
    golden = SHARED / "golden"
    code: dict = {}
    exec(compile((golden / "recipe.py").read_text(), "recipe", "exec"), code)
    state = code["weights"](json.loads((golden / "names_shapes.json").read_text())["names_shapes"])
    expected = np.load(golden / "dense.npz")
    gates = np.ones(39312, np.float32)
    if iteration is not None:
        gates = np.unpackbits(np.load(golden / "run_C.npz")[f"gates_{iteration}"])[:39312].astype(np.float32)
    for i, block in enumerate(gates[768:].reshape(12, -1)):
        head, qk, v, mlp = np.split(block, [12, 76, 140])
        for letter, units in (("Q", qk), ("K", qk), ("V", v)):
            state[f"blocks.{i}.attn.qkv.{letter}.weight"] *= units[:, None, None] * head
            state[f"blocks.{i}.attn.qkv.{letter}.bias"] *= units[:, None] * head
        state[f"blocks.{i}.mlp.fc1.weight"] *= mlp[:, None]
        state[f"blocks.{i}.mlp.fc1.bias"] *= mlp
    state["patch_embed.proj.weight"] *= (expected[f"{case}__emb_mask"] != 0)[:, None, None, None]
    model = convert(save(tmp_path / "w.pth", state)).model
    assert model.info["variant"] == "deit_base_distilled"
    images = code["batch"](1000)[0].transpose(0, 2, 3, 1)
    with jax.default_matmul_precision("float32"):
        logits = np.asarray(vit.forward(model.dims, model.params, images, model.masks))
    for i, head in enumerate(("cls", "dist")):
        # float32 of 12 blocks in two frameworks; the released pair differs by 1.7e-6 itself.
        assert np.abs(logits[:, i] - expected[f"{case}__dense_{head}"]).max() <= 2e-5
