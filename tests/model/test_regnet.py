"""RegNetY computes what PyTorch computes, from files with the published names; any classifier can be a teacher."""

import json
import shutil

import jax
import numpy as np
import pytest
import sources
import torch
from conftest import call, random_params, small_dims
from sources import nchw

import convert_deit_weights
from nvit_jax import load_classifier, load_model, save_model
from nvit_jax.api.teachers import fit_teacher
from nvit_jax.errors import UserError
from nvit_jax.formats import torch_regnet
from nvit_jax.formats.convert import convert
from nvit_jax.model.directory import Model, save_regnet
from nvit_jax.model.groups import flatten
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.model.regnet import RegNet, RegNetDims, regnet_names, regnet_shapes
from nvit_jax.training.losses import Objective, objective_loss

SMALL = RegNetDims(widths=(16, 24), depths=(2, 3), group=8, stem=8, classes=5)


def regnet_state(dims, seed=0):
    """Random tensors under the published names; variances positive, statistics not trivial."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, _, shape, _ in regnet_names(dims):
        value = rng.standard_normal(shape)
        fan_in = max(1, int(np.prod(shape[1:])))
        positive = name.endswith(("running_var", "bn.weight"))
        state[name] = (0.5 + np.abs(value) if positive else value / fan_in**0.5).astype(np.float32)
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = np.int64(17)
    return state


def save(path, state):
    torch.save({"model": {k: torch.from_numpy(np.asarray(v)) for k, v in state.items()}}, path)
    return path


def test_regnety_160_is_the_published_one():
    """83,590,140 parameters (running statistics not counted), and the file's names as published."""
    leaves = dict(flatten(regnet_shapes(RegNetDims())))
    statistics = sum(v.size for k, v in leaves.items() if k.endswith(("/mean", "/var")))
    assert sum(v.size for v in leaves.values()) - statistics == 83_590_140
    names = {name: shape for name, _, shape, _ in regnet_names(RegNetDims())}
    assert names["stem.conv.weight"] == (32, 3, 3, 3) and names["s3.b11.conv2.conv.weight"] == (1232, 112, 3, 3)
    assert names["s2.b1.se.fc1.weight"] == (56, 448, 1, 1) and names["head.fc.bias"] == (1000,)
    assert names["s4.b1.downsample.bn.running_var"] == (3024,)


def test_regnet_equals_pytorch(tmp_path, capsys):
    state = regnet_state(SMALL)
    path = save(tmp_path / "regnet.pth", state)
    images = np.random.default_rng(1).standard_normal((2, 45, 45, 3))  # odd sizes show the padding
    tensors = {k: torch.from_numpy(np.asarray(v, np.float64)) for k, v in state.items()}
    expected = torch_regnet.forward(tensors, nchw(images)).numpy()
    with jax.enable_x64(True):
        exact = convert(path, dtype=np.float64).model
        assert np.abs(np.asarray(exact.logits(exact.params, images)) - expected).max() <= 1e-9
    command = ["c", f"--checkpoint={path}", f"--out={tmp_path / 'model'}", "--verify"]
    assert convert_deit_weights.main(command) == 0
    assert "verified: largest difference" in capsys.readouterr().out
    model = load_classifier(tmp_path / "model")
    assert isinstance(model, RegNet) and model.dims == SMALL
    with jax.default_matmul_precision("float32"):
        found = np.asarray(model.logits(model.params, images.astype(np.float32)))
    assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    half = np.asarray(model.logits(model.params, images.astype(np.float32), jax.numpy.bfloat16), np.float32)
    assert np.abs(half - expected).max() <= 0.05 * np.abs(expected).max()  # bfloat16 has 8 bits
    with pytest.raises(UserError, match="a Vision Transformer is needed here"):
        load_model(tmp_path / "model")


def test_a_bad_regnet_is_refused(tmp_path):
    state = regnet_state(SMALL)
    for change, words in (
        ({"s1.b1.se.fc1.bias": None}, "missing for the model: s1.b1.se.fc1.bias"),
        ({"s1.b1.extra.weight": np.ones(3, np.float32)}, "left over in the file: s1.b1.extra.weight"),
        ({"stem.conv.weight": None}, "stem.conv.weight is missing"),
        ({"head.fc.bias": np.ones(9, np.float32)}, "head.fc.bias has shape"),
        ({"head.fc.bias": np.full(5, np.inf, np.float32)}, "not finite"),
    ):
        changed = {k: v for k, v in (state | change).items() if v is not None}
        with pytest.raises(UserError, match=words):
            convert(save(tmp_path / "w.pth", changed))


@pytest.mark.slow
def test_timm_regnety_160(tmp_path):
    """The real size, with timm's own module."""
    timm = sources.import_timm()
    if timm is None:
        pytest.skip("timm is not installed: pip install --no-deps timm (without torchvision)")
    module = timm.create_model("regnety_160").eval()
    for name, value in module.state_dict().items():
        if name.endswith(("running_mean", "bn.bias")):
            value.normal_(0, 0.1)
    torch.save({"model": module.state_dict()}, tmp_path / "w.pth")
    model = convert(tmp_path / "w.pth").model
    assert model.info["variant"] == "regnety_160"
    images = np.random.default_rng(1).standard_normal((2, 64, 64, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = module(nchw(images, torch.float32)).numpy()
    with jax.default_matmul_precision("float32"):
        found = np.asarray(jax.jit(model.logits)(model.params, images))
    assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


def test_a_vision_transformer_is_a_teacher_too():
    dims = small_dims()
    model = Model(dims, random_params(dims, dtype=np.float32))
    images = np.ones((2, 8, 8, 1), np.float32)
    logits = jax.jit(model.logits)(model.params, images)
    assert np.array_equal(logits, model.apply(model.params, images)) and logits.shape == (2, 5)


@pytest.mark.parametrize("tau", [None, 3.0])
def test_distillation_equals_deits_formulas(tau):
    """(1 - alpha) CE(mean of heads, label) + alpha (hard or soft loss of the distillation head), in PyTorch."""
    rng = np.random.default_rng(0)
    logits, teacher, label = rng.standard_normal((6, 2, 5)), 3 * rng.standard_normal((6, 5)), rng.integers(0, 5, 6)
    heads, answer, y = (torch.from_numpy(x) for x in (logits, teacher, label))
    f = torch.nn.functional
    if tau is None:
        part = f.cross_entropy(heads[:, 1], answer.argmax(-1))
    else:
        logs = (f.log_softmax(x / tau, -1) for x in (heads[:, 1], answer))
        part = tau**2 * f.kl_div(*logs, reduction="batchmean", log_target=True)
    expected = 0.4 * f.cross_entropy(heads.mean(1), y) + 0.6 * part
    with jax.enable_x64(True):
        batch = {"label": label, "label_teacher": jax.numpy.asarray(teacher)}
        objective = Objective(teacher_alpha=0.6, teacher_tau=tau)
        each, parts = objective_loss(objective, jax.numpy.asarray(logits), batch)
        assert abs(float(each.mean()) - float(expected)) <= 1e-12
        assert abs(float(parts["teacher_loss"].mean()) - float(part)) <= 1e-12


def test_the_whole_loss_equals_pytorchs():
    """Mixed and smoothed labels, and NViT's KL as its code computes it: nn.KLDivLoss with its default reduction."""
    rng = np.random.default_rng(1)
    logits, full, label = rng.standard_normal((6, 2, 5)), rng.standard_normal((6, 2, 5)), rng.integers(0, 5, (2, 6))
    heads, unpruned, y = (torch.from_numpy(x) for x in (logits, full, label))
    one_hot = 0.9 * torch.nn.functional.one_hot(y, 5).double() + 0.1 / 5
    target = 0.3 * one_hot[0] + 0.7 * one_hot[1]
    cross = -(target * heads.mean(1).log_softmax(-1)).sum(-1).mean()
    divergence = torch.nn.KLDivLoss(reduction="none")
    each = [divergence((heads[:, i] / 20).log_softmax(-1), (unpruned[:, i] / 20).softmax(-1)) for i in (0, 1)]
    kl = (each[0].mean() + each[1].mean()) / 2  # "mean" warns that it divides by the classes, too, which is the point
    batch = {"label": label[0], "mixed_label": label[1], "label_share": 0.3, "teacher": full}
    with jax.enable_x64(True):
        objective = Objective(smoothing=0.1, kl_weight=1e5, tau=20.0, kl_per_head=True)
        found = objective_loss(objective, jax.numpy.asarray(logits), jax.tree.map(jax.numpy.asarray, batch))[0].mean()
        assert abs(float(found) - float(cross + 1e5 * kl)) <= 1e-9 * float(found)


@pytest.mark.parametrize("family", ["regnet", "vit"])
def test_finetuning_learns_from_any_classifier(family, finished, tmp_path, capsys):
    """A RegNetY with other pixel statistics, or the dense ViT: the stage runs, and the loss is what is logged."""
    workdir = tmp_path / "W"
    shutil.copytree(finished, workdir, symlinks=True)
    teacher = finished / "pretrain" / "model"
    if family == "regnet":
        dims = RegNetDims(widths=(8,), depths=(1,), group=4, stem=4, classes=10, channels=1)
        params = jax.tree.map(lambda s: np.full(s.shape, 0.1, np.float32), regnet_shapes(dims))
        facts = {"size": 8, "scale": 255.0, "mean": [0.3], "std": [0.2]}
        teacher = tmp_path / "teacher"
        save_regnet(teacher, RegNet(dims, params, {"preprocessing": facts}))
    arguments = (f"--config.finetune.teacher={teacher}", "--config.finetune.teacher_alpha=0.5", "--stage=finetune")
    assert call("--workdir", workdir, *arguments, "--config.finetune.epochs=0.5", "--force") == 0
    lines = [json.loads(line) for line in (workdir / "finetune" / "log.jsonl").read_text().splitlines()]
    for line in lines:
        label = 0.5 * line["label_loss"] + 0.5 * line["teacher_loss"]
        assert abs(line["loss"] - label - 10.0 * line["kl_loss"]) <= 1e-4 * line["loss"]
    assert call("--workdir", workdir, "--config.finetune.teacher_alpha=0.5", "--stage=finetune", "--force") == 2
    assert "set both or none" in capsys.readouterr().err
    again = [a.replace("finetune", "pretrain") for a in arguments]  # DeiT's own distillation, here a soft one
    more = ("--config.pretrain.teacher_tau=3.0", "--config.pretrain.epochs=0.5")
    assert call("--workdir", tmp_path / "P", *again, *more) == 0
    for line in map(json.loads, (tmp_path / "P" / "pretrain" / "log.jsonl").read_text().splitlines()):
        assert abs(line["loss"] - 0.5 * line["label_loss"] - 0.5 * line["teacher_loss"]) <= 1e-4 * line["loss"]


def test_a_teacher_sees_the_pixels_that_it_was_trained_with(tmp_path):
    dims = small_dims()
    student = Preprocessing(8, 16.0, (0.5,), (0.5,))
    own = Preprocessing(8, 255.0, (0.3,), (0.2,))
    model = Model(dims, random_params(dims, dtype=np.float32), info={"preprocessing": own.to_json()})
    save_model(tmp_path / "teacher", model)
    teacher = fit_teacher(load_classifier(tmp_path / "teacher"), dims, student)
    raw = np.random.default_rng(0).integers(0, 17, (3, 8, 8, 1))
    found = teacher.logits(teacher.params, student(raw))
    assert np.abs(np.asarray(found) - np.asarray(model.apply(model.params, own(raw)))).max() <= 1e-4
    with pytest.raises(UserError, match="tells 5 classes"):
        fit_teacher(load_classifier(tmp_path / "teacher"), small_dims(classes=6), student)
