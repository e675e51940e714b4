"""The released engine's numbers (reference numbers beside the checkout): criterion, averages, masks, latency."""

import importlib
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import ROOT, call, read

from nvit_jax import load_model
from nvit_jax.errors import UserError
from nvit_jax.latency.released import ReleasedTable
from nvit_jax.model.dims import Units, ViTDims, count_macs, count_params, preset, revit
from nvit_jax.model.masks import full_masks, kept_dims
from nvit_jax.pruning import released, saliency
from nvit_jax.pruning.ranking import group_sizes
from nvit_jax.run.validation import check_config
from nvit_jax.run.workdir import STOP, StageDir
from nvit_jax.training.monitor import read_lines

GOLDEN = ROOT.parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference numbers lie beside the checkout only")
DIMS = preset("deit_base_distilled")
SIZES = [16] + [2, 8, 8, 16] * 12
KINDS = ["embed"] + ["head", "qk", "v", "mlp"] * 12
ROOFLINE = ("latency.roofline.tflops=0.1", "latency.roofline.gbs=10.0")
LAYERS = [768] + [12, 64, 64, 3072] * 12


def layers(flat):
    return np.split(np.asarray(flat), np.cumsum(LAYERS)[:-1])


def units(flat) -> Units:
    """Layers -> masks of all heads."""
    masks = full_masks(DIMS)
    parts = layers(flat)
    masks.embed[:] = parts[0]
    for i in range(12):
        head, qk, v, mlp = parts[1 + 4 * i : 5 + 4 * i]
        masks.head[i], masks.mlp[i] = head, mlp
        masks.qk[i], masks.v[i] = head[:, None] * qk, head[:, None] * v
    return masks


@pytest.fixture(scope="module")
def table():
    return ReleasedTable.read(GOLDEN / "latency_head.json")


@needs_golden
def test_the_released_table_reads_as_it_is(table):
    points = np.load(GOLDEN / "latency_points.npz")
    found = np.array([table.block_seconds(*(int(n) for n in point)) for point in points["points"]])
    assert np.abs(found / points["latency"] - 1).max() <= 1e-12
    assert abs(table(DIMS) / 1e3 / points["full_model"] - 1) <= 1e-12
    assert abs(table.blocks(DIMS)[3] / points["full_block"] - 1) <= 1e-12
    for changes, words in (
        ({"heads": (16,) * 12}, "heads from 1 to 12, not 16"),
        ({"heads": (0,) * 12}, "knows no block without heads; keep the floor of head at 1"),
        ({"mlp": (4096,) * 12}, "MLP from 0 to 3072, not 4096"),
        ({"embed": 1024}, "EMB from 0 to 768, not 1024"),
        ({"gated": True}, "knows no gated mlp"),
    ):
        with pytest.raises(UserError, match=words):
            table(ViTDims.from_json(DIMS.to_json() | changes))


@needs_golden
def test_a_damaged_table_is_refused(tmp_path):
    for change, words in (
        (lambda t: t["EMB_512"]["QK_3_16"]["V_32"].pop("MLP_256"), "EMB_512 QK_3_16 V_32 MLP_256 is missing"),
        (lambda t: t["EMB_512"].pop("QK_3_16"), "EMB_512 QK_3_16 V_1 MLP_1 is missing"),
        (lambda t: t["EMB_256"]["QK_1_1"]["V_1"].update(MLP_128=-1.0), "MLP_128 is -1.0; it must be a positive"),
        (lambda t: t.clear(), "not a latency table of the released NViT"),
    ):
        content = json.loads((GOLDEN / "latency_head.json").read_text())
        change(content)
        (tmp_path / "t.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=words):
            ReleasedTable.read(tmp_path / "t.json")


@needs_golden
@pytest.mark.parametrize(("run", "groups", "iterations"), [("A", 2, 12), ("C", 250, 10)])
def test_runs_from_the_stored_contributions(run, groups, iterations, table):
    """Averages, adjusted scores, groups, thresholds, masks bit for bit, widths and latency of every pruning."""
    golden, facts = np.load(GOLDEN / f"run_{run}.npz"), json.loads((GOLDEN / f"run_{run}.json").read_text())
    gates, average, seconds_embed = [np.ones(n) for n in LAYERS], None, 768
    for i in range(iterations):
        contribution = golden[f"contribution_{i}"].astype(np.float64)
        average = contribution if average is None else 0.9 * average + 0.1 * contribution
        scale = np.maximum(np.repeat([a.max() for a in layers(np.abs(average))], LAYERS), 1e-30)
        # The engine averages in float32.
        assert (np.abs(average - golden[f"averaged_{i}"]) / scale).max() <= 1e-6
        now = kept_dims(units(np.concatenate(gates)), DIMS)
        savings = released.unit_savings(table, now)
        assert np.abs(np.array(savings) - facts["lat_improve"][i]).max() <= 1e-12
        step = released.prune_step(layers(average), gates, savings, SIZES, eta=5e-4, done=i, per_iteration=16 * groups)
        if f"adjusted_{i}" in golden.files:
            assert (np.abs(np.concatenate(step.adjusted) - golden[f"adjusted_{i}"]) / scale).max() <= 1e-6
        if f"group_scores_{i}" in golden.files:
            found = np.concatenate(step.group_scores)
            assert np.abs(np.sort(found) - np.sort(golden[f"group_scores_{i}"])).max() <= 1e-6 * np.abs(found).max()
        assert abs(step.threshold - facts["threshold"][i]) <= 1e-6 * abs(facts["threshold"][i]) + 1e-12
        gates = step.gates
        assert np.array_equal(np.packbits(np.concatenate(gates).astype(bool)), golden[f"gates_{i}"])
        widths = [int(g.sum()) for g in gates]
        assert widths == facts["dims"][i]
        # The engine reports the latency with the embed of before the step.
        blocks = [table.block_seconds(seconds_embed, *widths[1 + 4 * b : 5 + 4 * b]) for b in range(12)]
        assert abs(sum(blocks) / facts["latency"][i] - 1) <= 1e-9
        seconds_embed = widths[0]
        if i == 0 and facts["config"]["momentum_reset_after_first"]:
            average = 0 * average


def test_the_rule_runs_a_whole_pruning(finished, tmp_path, capsys):
    """Iterative, shared, with the device's own latency model."""
    shutil.copytree(finished / "pretrain", tmp_path / "W" / "pretrain")
    shutil.copytree(finished / "latency", tmp_path / "W" / "latency")
    values = {
        "rule": "nvit", "mode": "iterative", "align": "shared", "criterion": "taylor", "profile": "nvit", "interval": 2,
        "ema": 0.9, "reset_scores": True, "groups_per_step": 2, "score.loss": "mix",
    }  # fmt: skip
    arguments = ["--workdir", tmp_path / "W", "--stage=prune", *(f"--config.prune.{k}={v}" for k, v in values.items())]
    assert call(*arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "W" / "prune" / "history.jsonl").read_text().splitlines()]
    assert lines[0]["groups"] == 1 and lines[-1]["macs_ratio"] <= 0.7
    assert all(a["macs"] >= b["macs"] for a, b in itertools.pairwise(lines))
    for change, words in (
        ("--config.prune.align=per_head", 'needs prune.align="shared"'),
        ("--config.prune.eta=-1", "must be >= 0"),
        ("--config.latency.table=" + str(tmp_path / "none.json"), "is missing"),
    ):
        assert call(*arguments, "--force", change) == 2
        assert words in capsys.readouterr().err
    if GOLDEN.is_dir():
        assert call(*arguments, "--force", f"--config.latency.table={GOLDEN / 'latency_head.json'}") == 2
        assert "was measured for 12 blocks at 224 pixels" in capsys.readouterr().err


def load_golden_model(dtype):
    """The regenerated DeiT-B as converted parameters, its batches, and the loss of the engine."""
    from nvit_jax.formats.canonical import canonical
    from nvit_jax.formats.interchange import from_torch
    from nvit_jax.formats.weights import Tensors
    from nvit_jax.model import vit
    from nvit_jax.training.losses import cross_entropy

    code: dict = {}
    exec(compile((GOLDEN / "recipe.py").read_text(), "recipe", "exec"), code)
    state = code["weights"](json.loads((GOLDEN / "names_shapes.json").read_text())["names_shapes"])
    file = canonical(Tensors({k: v.shape for k, v in state.items()}, state.__getitem__, {}, ""), "golden")
    params = from_torch(DIMS, file.shapes, file.read, "golden", dtype)

    def batch(number):
        images, labels = code["batch"](number)
        return {"image": images.transpose(0, 2, 3, 1).astype(dtype), "label": labels.astype(np.int32)}

    def loss(params, masks, batch):
        return cross_entropy(vit.forward(DIMS, params, batch["image"], masks).mean(1), batch["label"])

    return params, batch, loss


@needs_golden
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_taylor_is_the_released_criterion(dtype, tolerance):
    """Batch 0 of DeiT-B, every unit, relative to the largest of its layer; products summed in float64."""
    with jax.enable_x64(True), jax.default_matmul_precision("float32"):
        params, batch, loss = load_golden_model(dtype)
        step = jax.jit(lambda p, m, b: saliency.taylor(loss, p, m, b, align="shared"))
        found = released.flatten(Units(*(np.asarray(s) for s in step(params, full_masks(DIMS), batch(0)))))
    expected = np.load(GOLDEN / "batch0_float64.npz")["batch0_criteria_float64"]
    for name, ours, theirs in zip(KINDS, found, layers(expected), strict=True):
        assert np.abs(ours - theirs).max() <= tolerance * theirs.max(), name


@needs_golden
@pytest.mark.slow
def test_run_a_from_our_own_gradients(table):
    """Twelve prunings of the unchanged weights on 25 batches: the released masks bit for bit."""
    golden, facts = np.load(GOLDEN / "run_A.npz"), json.loads((GOLDEN / "run_A.json").read_text())
    params, batch, loss = load_golden_model(np.float32)
    step = jax.jit(lambda p, m, b: saliency.taylor(loss, p, m, b, align="shared"))
    masks, average, number = full_masks(DIMS), None, 0
    policy_sizes = {"embed": 16, "head": 2, "qk": 8, "v": 8, "mlp": 16}
    for i in range(12):
        total = None
        with jax.default_matmul_precision("float32"):
            for _ in range(facts["n_batches"][i]):
                part = Units(*(np.asarray(s, np.float64) for s in step(params, masks, batch(number))))
                total = part if total is None else Units(*map(np.add, total, part))
                number += 1
        fresh = Units(*(t / facts["n_batches"][i] for t in total))
        average = fresh if average is None else Units(*(0.9 * a + 0.1 * b for a, b in zip(average, fresh, strict=True)))
        expected = layers(golden[f"averaged_{i}"])
        gates = released.flatten(masks)
        for name, ours, theirs, gate in zip(KINDS, released.flatten(average), expected, gates, strict=True):
            assert np.abs((ours - theirs) * (gate > 0)).max() <= 1e-4 * theirs.max(), (i, name)
        found = released.rank(average, masks, DIMS, policy_sizes, [], table, eta=5e-4, done=i, per_iteration=32)
        masks = found.masks
        flat = np.concatenate([layer > 0 for layer in released.flatten(masks)])
        assert np.array_equal(np.packbits(flat), golden[f"gates_{i}"]), i
        assert abs(found.removed[0].key - facts["threshold"][i]) <= 1e-4 * abs(facts["threshold"][i])


@needs_golden
def test_the_revit_rule_gives_the_published_widths():
    golden = json.loads((GOLDEN / "revit.json").read_text())
    for name, facts in golden.items():
        if not name.startswith("EMB_"):
            continue
        dims = revit(facts["dims"]["EMB"])
        found = {"EMB": dims.embed, "head": dims.heads, "QK": dims.qk, "V": dims.v, "MLP": dims.mlp}
        assert {k: v if k == "EMB" else list(v) for k, v in found.items()} == facts["dims"]
        assert count_params(dims) == facts["params_without_token_mask"]
        assert abs(count_macs(dims) / 1e9 - facts["gmacs"]) <= 1e-9
    assert preset("revit_t") == revit(176) and preset("revit_s").embed == 384


@pytest.mark.parametrize("name", ["nvit_b", "nvit_h", "nvit_s", "nvit_t", "revit_s", "revit_t"])
def test_the_configs_say_what_the_paper_says(name):
    module = importlib.import_module(f"configs.{name}")
    check_config(module.get_config("tiny"))
    c = module.get_config()
    if name.startswith("nvit"):
        with pytest.raises(UserError, match="goes with config.prune.teacher"):
            check_config(c)
        c.prune.teacher = c.finetune.teacher = "regnety_160"
    check_config(c)
    needed = ("Ours: not run", f"--config {name} ", "Published: ", "Hardware", "Expected time, computed", "top-1")
    assert all(words in module.__doc__ for words in needed)
    if name.startswith("nvit"):
        ratios = (*c.prune.snapshots, c.prune.target.latency_ratio)
        assert ratios == (0.54, 0.50, 0.39, 0.19)[: len(ratios)]
        p, f = c.prune, c.finetune  # design.md sections 7 and 9, as the released commands set them
        assert (p.criterion, p.rule, p.align, p.mode, p.eta) == ("taylor", "nvit", "shared", "iterative", 5e-4)
        assert (p.interval, p.groups_per_step, p.ema, p.reset_scores, p.plain_first) == (100, 2, 0.9, True, True)
        assert p.score.from_training
        assert group_sizes(p.profile) == {"embed": 16, "head": 2, "qk": 8, "v": 8, "mlp": 16}
        assert (p.label_weight, p.teacher_alpha, p.kl_weight, p.tau, p.drop_path) == (1.0, 0.5, 1e5, 3.0, 0.1)
        assert (f.epochs, f.label_weight, f.teacher_alpha, f.kl_weight, f.tau) == (300, 1.0, 0.5, 1e5, 20.0)
        assert (f.drop_path, f.teacher_tau, f.ema, f.smoothing) == (0.0, None, 0.99996, 0.1)
        assert c.finetune.learning_rate * c.finetune.batch / c.finetune.learning_rate_batch == pytest.approx(1.8e-3)


@pytest.mark.parametrize("variant", ["cifar10", "cifar100", "inat18", "inat19"])
def test_the_configs_of_other_data_sets(variant):
    module = importlib.import_module("configs.transfer")
    check_config(module.get_config(variant))
    assert f":{variant}" in module.__doc__ and "Ours: not run" in module.__doc__


@pytest.mark.slow
def test_nvit_t_at_the_size_of_a_test(tmp_path, capsys):
    """All stages, with the three snapshots on the way; one of them is finetuned in the place of the last model.

    Latency is the roofline's: what a busy machine measures of models this small may leave the target out of reach.
    """
    config = f"{ROOT / 'configs' / 'nvit_t.py'}:tiny"
    workdir = tmp_path / "W"
    roofline = [f"--config.{key}" for key in ROOFLINE]
    assert call("--workdir", workdir, *roofline, config=config) == 0
    metrics = read(workdir / "prune" / "metrics.json")
    assert metrics["predicted_latency_ratio"] <= 0.676 and metrics["dims"]["dist_token"]
    history = read_lines(workdir / "prune" / "history.jsonl")
    whole = metrics["predicted_latency_ms"] / metrics["predicted_latency_ratio"]
    macs = []
    for ratio in (0.816, 0.8, 0.756):  # the first pruning at it or below; a group can be more than lies between two
        first = next(line for line in history if line["predicted_latency_ms"] <= ratio * whole)
        place = workdir / "prune" / "snapshots" / str(ratio)
        compact, masked = load_model(place / "model"), load_model(place / "masked")
        assert kept_dims(masked.masks, masked.dims) == compact.dims
        macs.append(count_macs(compact.dims))
        assert macs[-1] == first["macs"] and compact.dims.embed == first["dims"]["embed"]
    assert history[-1]["macs"] == count_macs(load_model(workdir / "prune" / "model").dims) <= macs[-1]
    again = ("--workdir", workdir, *roofline, "--force")
    assert call(*again, "--stage=finetune", "--config.finetune.snapshot=0.8", config=config) == 0
    assert count_macs(load_model(workdir / "finetune" / "model").dims) == macs[1]
    capsys.readouterr()
    wrong = "--config.prune.snapshots=(0.7,0.75)"
    assert call(*again, "--stage=prune", wrong, config=config) == 2
    assert "must decrease" in capsys.readouterr().err


@pytest.mark.slow
def test_scores_of_the_training_steps_survive_a_stop(tmp_path, monkeypatch):
    """Stopped between two prunings, with gradients collected since the first: the same numbers in the end."""
    config = f"{ROOT / 'configs' / 'nvit_b.py'}:tiny"
    keys = ("prune.interval=3", "prune.target.latency_ratio=None", "prune.target.macs_ratio=0.9", "prune.save_every=1")
    arguments = ["--stage=prune", *(f"--config.{key}" for key in (*keys, *ROOFLINE))]
    assert call("--workdir", tmp_path / "W", "--stage=pretrain", config=config) == 0
    arguments.append(f"--config.model={tmp_path / 'W' / 'pretrain' / 'model'}")
    assert call("--workdir", tmp_path / "W", *arguments, config=config) == 0
    advance = StageDir.advance

    def stop_at_4(self, step, text, total=None):
        STOP.received = step == 4
        advance(self, step, text, total)

    with monkeypatch.context() as patched:
        patched.setattr(StageDir, "advance", stop_at_4)
        assert call("--workdir", tmp_path / "V", *arguments, config=config) == 143
    assert call("--workdir", tmp_path / "V", *arguments, config=config) == 0
    for name in ("history.jsonl", "log.jsonl"):
        texts = [(tmp_path / place / "prune" / name).read_text() for place in "WV"]
        assert texts[0] == texts[1] and len(texts[0].splitlines()) > 1
    saved = [load_model(tmp_path / place / "prune" / "masked") for place in "WV"]
    for a, b in zip(*(jax.tree.leaves((m.params, m.masks)) for m in saved), strict=True):
        np.testing.assert_array_equal(a, b)
    line = read_lines(tmp_path / "V" / "prune" / "history.jsonl")[0]
    assert line["step"] == 3 and line["groups"] == 1


@pytest.mark.slow
def test_revit_t_trains(tmp_path):
    config = f"{ROOT / 'configs' / 'revit_t.py'}:tiny"
    assert call("--workdir", tmp_path / "W", "--stage=pretrain", config=config) == 0
    assert load_model(tmp_path / "W" / "pretrain" / "model").dims.heads[:4] == (10, 2, 2, 4)
