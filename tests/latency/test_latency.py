"""The latency table: interpolation, smoothing, what is missing or does not fit, a stopped measurement; the roofline."""

import dataclasses
import itertools
import json
import threading
import time

import numpy as np
import pytest
from conftest import small_dims
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nvit_jax.errors import UserError
from nvit_jax.latency import table as latency
from nvit_jax.latency import timing
from nvit_jax.latency.roofline import Roofline
from nvit_jax.latency.table import LatencyTable, monotone
from nvit_jax.model.dims import preset
from nvit_jax.pruning.ranking import group_sizes

DIMS = preset("deit_tiny", depth=3)
AXES = {"embed": (24, 96, 192), "heads": (1, 3), "qk": (8, 64), "v": (8, 32, 64), "mlp": (16, 400, 768)}


def attention_ms(embed, heads, qk, v):
    return 1 + embed * heads * (2 * qk + v) / 1e4 + heads * 0.3


def mlp_ms(embed, mlp):
    return 0.5 + embed * mlp / 1e4


def rest_ms(embed):
    return 2 + embed / 100


EXACT = {"attention": attention_ms, "mlp": mlp_ms, "rest": rest_ms}


def true_ms(dims, factors=(1.0, 1.0, 0.0)):
    blocks = list(zip(dims.heads, dims.qk, dims.v, dims.mlp, strict=True))
    attention = sum(attention_ms(dims.embed, h, q, v) for h, q, v, _ in blocks)
    mlp = sum(mlp_ms(dims.embed, m) for *_, m in blocks)
    return float(np.dot(factors, (attention, mlp + rest_ms(dims.embed), sum(h > 1 for h in dims.heads))))


def values(factors=None, noise=0.0):
    """What measure_table returns on a device that takes the times of above."""
    rng = np.random.default_rng(0)
    cells = {
        latency._name(cell): {"ms": EXACT[cell[0]](*cell[1]) * (1 + noise * rng.standard_normal()), "spread": 0.0}
        for cell in latency.plan(AXES)
    }
    whole = [DIMS] + [latency.random_dims(DIMS, group_sizes("cpu"), rng) for _ in range(5)]
    models = [{"dims": d.to_json(), "ms": true_ms(d, factors)} for d in whole] if factors else []
    return {
        "device": "a device",
        "batch": 32,
        "dtype": "float32",
        "dims": DIMS.to_json(),
        "axes": dict(AXES),
        "cells": cells,
        "models": models,
    }


def test_a_device_whose_times_are_linear_is_predicted_exactly():
    table = LatencyTable(json.loads(json.dumps(values())))
    dims = dataclasses.replace(DIMS, embed=100, heads=(1, 2, 3), qk=(24, 64, 8), v=(16, 48, 64), mlp=(16, 500, 768))
    assert table(dims) == pytest.approx(true_ms(dims), rel=1e-12)  # multilinear in each width, so is the table
    assert table.disorder == 0.0
    assert table.piece_ms("mlp", (96, 8)) == table.piece_ms("mlp", (96, 16))  # narrower than one group
    without = dataclasses.replace(dims, heads=(1, 0, 3), mlp=(16, 500, 0))  # parts that are not there cost nothing
    gone = table.piece_ms("attention", (100, 2, 64, 48)) + table.piece_ms("mlp", (100, 768))
    assert table(without) == pytest.approx(table(dims) - gone, rel=1e-12)
    corrected = LatencyTable(values(factors=(1.2, 0.8, 0.5)))
    assert corrected.factors == pytest.approx((1.2, 0.8, 0.5), rel=1e-9)
    assert corrected.leave_one_out is not None and corrected.leave_one_out < 1e-9


def test_predictions_grow_with_every_width_however_noisy_the_cells_are():
    table = LatencyTable(values(noise=0.3))
    assert table.disorder > 0.05
    rng = np.random.default_rng(1)
    for _ in range(50):
        dims = latency.random_dims(DIMS, group_sizes("cpu"), rng)
        dims = dataclasses.replace(dims, embed=max(dims.embed, 32))
        for axis, i in itertools.product(latency.AXES, range(DIMS.depth)):
            if axis == "embed":
                less = dataclasses.replace(dims, embed=dims.embed - 8)
            else:
                widths = list(getattr(dims, axis))
                widths[i] = max(AXES[axis][0], widths[i] - (1 if axis == "heads" else 8))
                less = dataclasses.replace(dims, **{axis: tuple(widths)})
            assert table(less) <= table(dims) * (1 + 1e-12)  # rounding of the interpolation


@given(arrays.arrays(np.float64, (3, 4, 2), elements=st.floats(0.1, 10)))
def test_smoothing_is_monotone_and_leaves_monotone_grids_alone(grid):
    smooth = monotone(grid)
    for axis in range(3):
        assert (np.diff(smooth, axis=axis) >= 0).all()
    assert np.array_equal(monotone(smooth), smooth)
    assert grid.min() <= smooth.min() and smooth.max() <= grid.max()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda v: v["cells"].pop("mlp embed=96 mlp=400"), "'mlp embed=96 mlp=400' is missing"),
        (lambda v: v["cells"]["mlp embed=96 mlp=400"].update(ms=-1.0), "'mlp embed=96 mlp=400' is -1.0; it must be"),
        (lambda v: v["cells"]["rest embed=24"].update(ms=float("nan")), "'rest embed=24' is nan; it must be"),
        (lambda v: v.pop("axes"), "is not what a latency stage writes"),
        (lambda v: v["cells"].update({"rest embed=24": 3.0}), "is not what a latency stage writes"),
        (lambda v: v["axes"].update(mlp=[]), "the widths of mlp must grow from above 0"),
        (lambda v: v["axes"].update(qk=[64, 8]), r"the widths of qk must grow from above 0, they are \[64, 8\]"),
        (
            lambda v: v["axes"].update(qk=list(range(1, 10**4)), v=list(range(1, 10**4))),
            "a grid of .* x 9999 x 9999 x .* widths is not meant to be; at most 10,000,000 cells are",
        ),
        (lambda v: v.update(models=[{"dims": DIMS.to_json(), "ms": 0.0}]), "model 0 is 0.0; it must be a positive"),
    ],
)
def test_a_damaged_table_is_refused_by_name(damage, words):
    content = values()
    damage(content)
    with pytest.raises(UserError, match=words):
        LatencyTable(content)


def test_few_whole_models_share_one_factor():
    """Three factors cannot be told from one or two models: attention or the mlp would come out free."""
    for count in (1, 3):
        content = values(factors=(1.5, 1.5, 0.0))
        content["models"] = content["models"][:count]
        table = LatencyTable(content)
        assert table.factors == pytest.approx((1.5, 1.5, 0.0)) and table.leave_one_out is None


def test_no_kind_comes_out_free():
    """Where calls cost more than work, times of whole models hardly depend on the widths, and a fit finds anything."""
    shared = 0
    for seed in range(40):
        rng, content = np.random.default_rng(seed), values(factors=(1.0, 1.0, 0.0))
        for record in (*content["cells"].values(), *content["models"]):
            record["ms"] = (0.2 + record["ms"] / 1e3) * (1 + 0.05 * rng.standard_normal())
        table = LatencyTable(content)
        shared += table.shared
        assert table.factors[:2].min() > latency._LEAST * table.factors[:2].max() > 0, seed
        assert not table.shared or table.factors[0] == table.factors[1]
    assert 0 < shared < 40  # both ways are seen


def test_one_wrong_cell_makes_no_cost_negative():
    content = values()
    content["cells"]["attention embed=192 heads=3 qk=64 v=64"]["ms"] *= 3
    table = LatencyTable(content)
    for widths in itertools.product(*(AXES[axis] for axis in ("embed", "heads", "qk", "v"))):
        assert table.piece_ms("attention", widths) > 0
    assert table.disorder > 0.1


def test_a_table_for_another_model_or_setting_is_refused():
    table = LatencyTable(values(), "t.json")
    table.check_for(DIMS, 32, "float32")
    for dims, batch, dtype, words in (
        (preset("deit_tiny", depth=4), 32, "float32", "t.json was measured for depth 3, this model has 4"),
        (preset("deit_tiny", depth=3, image=384), 32, "float32", "for image 224, this model has 384"),
        (preset("deit_tiny", depth=3, layer_scale=True), 32, "float32", "for layer_scale False, this model has True"),
        (preset("deit_tiny", depth=3, pre_logits=8), 32, "float32", "for pre_logits 0, this model has 8"),
        (
            preset("deit_tiny", depth=3, activation="gelu_tanh"),
            32,
            "float32",
            "for activation gelu, this model has",
        ),
        (preset("deit_tiny", depth=3, qkv_bias=False), 32, "float32", "for qkv_bias True, this model has False"),
        (preset("deit_tiny", depth=3, norm_after_pool=True), 32, "float32", "for norm_after_pool False, this model"),
        (preset("deit_tiny", depth=3, gated=True), 32, "float32", "for gated False, this model has True"),
        (preset("deit_tiny", depth=3, pool="mean"), 32, "float32", "for pool class, this model has mean"),
        (preset("deit_tiny", depth=3, mean_over="all"), 32, "float32", "for mean_over patches, this model has all"),
        (DIMS, 64, "float32", "at batch 32 in float32, and is asked for 64 in float32"),
        (DIMS, 32, "bfloat16", "asked for 32 in bfloat16"),
        (preset("deit_small", depth=3), 32, "float32", "knows embed from 24 to 192, not 384|knows heads"),
    ):
        with pytest.raises(UserError, match=words):
            table.check_for(dims, batch, dtype)


def test_cells_that_did_not_fit_are_estimated_from_their_macs():
    content = values()
    content["cells"]["mlp embed=192 mlp=768"] = {"skipped": "needs 9 GiB"}
    table = LatencyTable(content)
    assert table.piece_ms("mlp", (192, 768)) == pytest.approx(mlp_ms(192, 400) * 768 / 400)
    assert latency.skipped(content) == ["mlp embed=192 mlp=768: needs 9 GiB"]
    for name in content["cells"]:
        if name.startswith("mlp"):
            content["cells"][name] = {"skipped": "needs 9 GiB"}
    with pytest.raises(UserError, match="no mlp piece fits in memory at this batch; lower it"):
        LatencyTable(content)


def test_the_grid_ends_at_one_group_and_at_the_full_width():
    axes = latency.grid_axes(DIMS, group_sizes("gpu"), {"embed": 4, "heads": 9, "qk": 3, "v": 2, "mlp": 5})
    assert axes["heads"] == (1, 2, 3) and axes["qk"] == (8, 32, 64) and axes["v"] == (8, 64)
    assert axes["embed"][0] == 16 and axes["embed"][-1] == 192 and all(e % 16 == 0 for e in axes["embed"])
    odd = dataclasses.replace(DIMS, embed=90, qk=(5, 5, 4), qk_scale=1.0)
    axes = latency.grid_axes(odd, group_sizes("gpu"), {"embed": 3, "heads": 3, "qk": 3, "v": 3, "mlp": 3})
    assert axes["embed"] == (16, 48, 90) and axes["qk"] == (5,)


class FakeDevice:
    """Times programs by the functions of above, drifting slower all the time; some do not fit."""

    def __init__(self, monkeypatch, too_large=()):
        self.compiled, self.drift, self.too_large = [], 1.0, too_large
        monkeypatch.setattr(timing, "compile_pieces", self.compile)
        monkeypatch.setattr(timing, "time_in_turns", self.time)

    def compile(self, pieces, batch, dtype):
        self.compiled += pieces
        return [timing.DoesNotFit("needs 9 GiB") if p in self.too_large else p for p in pieces]

    def time(self, pieces, repeats):
        rows = []
        for _ in range(repeats):
            self.drift *= 1.05
            rows.append([self.drift * self.ms(*piece) for piece in pieces])
        return np.array(rows)

    def ms(self, dims, name):
        if name == "model":
            return true_ms(dims, (1.2, 0.8, 0.5))
        widths = {"attention": (dims.heads[0], dims.qk[0], dims.v[0]), "mlp": (dims.mlp[0],), "rest": ()}[name]
        return EXACT[name](dims.embed, *widths) * (1 if name == "rest" else dims.depth)


def measure(known=None, keep=lambda records: None):
    return latency.measure_table(
        DIMS,
        latency.Grid(group_sizes("cpu"), {"embed": 3, "heads": 3, "qk": 2, "v": 2, "mlp": 3}, models=5),
        timing.Measurement(batch=32, dtype="float32", repeats=3),
        known=known or {},
        keep=keep,
    )


def test_drift_of_the_machine_cancels(monkeypatch):
    FakeDevice(monkeypatch)
    table = LatencyTable(measure())
    rng = np.random.default_rng(7)
    for _ in range(10):
        dims = latency.random_dims(DIMS, group_sizes("cpu"), rng)
        ratio = true_ms(dims, (1.2, 0.8, 0.5)) / true_ms(DIMS, (1.2, 0.8, 0.5))
        assert table(dims) / table(DIMS) == pytest.approx(ratio, rel=1e-6)  # the fit's and the rounds' rounding


def test_a_stopped_measurement_goes_on(monkeypatch):
    saved = {}

    def stop_after_the_second(records):
        saved.clear()
        saved.update(records)
        if len(records) > 12:
            raise KeyboardInterrupt

    device = FakeDevice(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        measure(keep=stop_after_the_second)
    before = len(device.compiled)
    whole = measure(known=json.loads(json.dumps(saved)))
    again = len(device.compiled) - before
    assert len(saved) > 12 and again == len(whole["cells"]) + len(whole["models"]) - len(saved) + 1  # the first, anew
    assert LatencyTable(whole)(DIMS) / LatencyTable(whole)(dataclasses.replace(DIMS, embed=96)) == pytest.approx(
        true_ms(DIMS, (1.2, 0.8, 0.5)) / true_ms(dataclasses.replace(DIMS, embed=96), (1.2, 0.8, 0.5)), rel=1e-6
    )


def test_what_does_not_fit_is_skipped_and_named(monkeypatch):
    large = dataclasses.replace(DIMS, mlp=(1,) * 3)
    FakeDevice(monkeypatch, too_large=[(large, "attention"), (DIMS, "model")])
    found = measure()
    assert latency.skipped(found) == ["attention embed=192 heads=3 qk=64 v=64: needs 9 GiB", "a model: needs 9 GiB"]
    assert LatencyTable(found)(DIMS) > 0


def test_memory_is_checked_before_a_program_runs(monkeypatch):
    dims = small_dims()
    monkeypatch.setattr(timing, "free_bytes", lambda: 100)
    assert isinstance(timing.compile_pieces([(dims, "mlp")], 4, "float32")[0], timing.DoesNotFit)
    with pytest.raises(UserError, match=r"batch=4 does not fit on this device \(needs 0.00 GiB"):
        timing.measure([dims], timing.Measurement(batch=4, dtype="float32", repeats=1))


def test_programs_are_held_against_the_memory_one_by_one(monkeypatch):
    """What one has been promised, the next must not count on."""
    dims, free, asked = small_dims(), [10_000_000], []

    def free_bytes():
        asked.append(threading.get_ident())
        time.sleep(0.02)  # in which the others would ask, too
        assert len(set(asked)) == 1, "two at once"
        return free[0]

    def ready(value):
        asked.clear()
        return value

    monkeypatch.setattr(timing, "free_bytes", free_bytes)
    monkeypatch.setattr(timing, "cores", lambda: 4)
    monkeypatch.setattr(timing.jax, "block_until_ready", ready)
    found = timing.compile_pieces([(dims, "mlp")] * 4, 4, "float32")
    assert not any(isinstance(one, timing.DoesNotFit) for one in found)


def test_pieces_are_the_model(monkeypatch):
    """The pieces in turn compute what the whole model computes."""
    import jax

    from nvit_jax.model import vit

    dims = small_dims(depth=2)
    params = vit.init(dims, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, dims.image, dims.image, dims.channels))
    _, rest_shapes, _ = vit.piece(dims, "rest", np.float32)
    assert not any(name.startswith("block") for name in rest_shapes)
    model, shapes, example = vit.piece(dims, "model", np.float32)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    assert example.shape == (1, *images.shape[1:])
    np.testing.assert_allclose(model(params, images), vit.forward(dims, params, images).mean(1), atol=1e-6)
    stream = jax.random.normal(jax.random.key(2), (2, dims.tokens, dims.embed))
    names, other = (vit.piece(dims, part, np.float32)[1] for part in ("attention", "mlp"))
    blocks = {name: value for name, value in params.items() if name.startswith("block")}
    for name, block in blocks.items():
        assert set(names[name]) | set(other[name]) == set(block) and not set(names[name]) & set(other[name])
    one = small_dims(depth=1)
    whole, _ = vit.Block(one, 0).apply({"params": params["block_0"]}, stream, 0, None, None, None)
    parts = stream
    for part in ("attention", "mlp"):
        run, wanted, _ = vit.piece(one, part, np.float32)
        parts = run({"block_0": {k: params["block_0"][k] for k in wanted["block_0"]}}, parts)
    np.testing.assert_allclose(parts, whole, atol=1e-6)  # float32, the same operations


def test_roofline_by_hand():
    dims = small_dims(depth=1)
    fast_memory = Roofline(tflops=1e-3, gbs=1e9, batch=2, itemsize=4)
    from nvit_jax.model.dims import count_macs

    for changes in ({}, {"gated": True}, {"pool": "class_mean"}):  # compute alone
        one = dataclasses.replace(dims, **changes)
        assert fast_memory(one) == pytest.approx(1e3 * 2 * 2 * count_macs(one) / 1e9, rel=1e-6)
    slow_memory = Roofline(tflops=1e9, gbs=1.0, batch=2, itemsize=4)
    n, d, m = dims.tokens, dims.embed, dims.mlp[0]
    more = dataclasses.replace(dims, mlp=(m + 8,))
    moved = 4 * (2 * (2 * n * 8) + 2 * d * 8)  # fc1's output, fc2's input, for 2 images; both weights once
    assert slow_memory(more) - slow_memory(dims) == pytest.approx(1e3 * moved / 1e9, rel=1e-9)
    tiled = Roofline(tflops=1e-3, gbs=1e9, batch=2, itemsize=4, tile=128)
    assert tiled(more) == tiled(dims)  # both are one tile
    bare = dataclasses.replace(dims, heads=(0,), mlp=(0,))  # the parts of a block cost alike, one by one or together
    assert fast_memory(bare) == pytest.approx(1e3 * 2 * 2 * count_macs(bare) / 1e9, rel=1e-6)
    for part in ({"heads": (0,)}, {"mlp": (0,)}):
        assert slow_memory(bare) < slow_memory(dataclasses.replace(dims, **part)) < slow_memory(dims)
    assert "estimate" in tiled.device
