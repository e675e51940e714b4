"""A batch in parts gives what the whole batch gives; how many parts there are."""

import functools

import jax
import numpy as np
import pytest
from conftest import random_images, random_params, small_dims

from nvit_jax.model import parts, vit
from nvit_jax.model.dims import preset
from nvit_jax.model.directory import Model
from nvit_jax.model.masks import full_masks
from nvit_jax.parallel import Parallel
from nvit_jax.training import distill
from nvit_jax.training.losses import Objective
from nvit_jax.training.optim import adamw

DIMS = small_dims()


def batch(size):
    return {"image": np.zeros((size, 1), np.float32)}


@pytest.mark.parametrize(
    ("name", "images", "size"),
    [
        ("deit_tiny", 32, 4),
        ("deit_tiny", 25, 5),
        ("deit_tiny", 6, 6),  # they fit
        ("deit_tiny", 23, 23),  # nothing divides them
        ("deit_base", 32, 2),
        ("vit_huge", 32, 2),  # a single image keeps more: two are faster all the same
        ("vit_huge", 1, 1),
    ],
)
def test_parts_of_a_gradient_keep_300_mb(name, images, size):
    dims = preset(name)
    assert parts.gradient_parts(dims, batch(images)) == images // size
    assert parts.gradient_parts(dims, batch(4 * images), Parallel.create("jit")) == images // size  # of four devices
    assert parts.gradient_parts(dims, batch(images), Parallel.create("pmap")) == images // size  # of one of them


def test_another_device_takes_the_batch_whole(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert parts.gradient_parts(preset("deit_base"), batch(256)) == 1


@pytest.mark.parametrize(("rows", "counts"), [(32, [16]), (12, [12]), (25, [5]), (17, [17]), (1, [1])])
def test_parts_that_go_forward_have_3200_tokens_whatever_the_widths(monkeypatch, rows, counts):
    """And the results of all rows come back, in their order, from whatever structure they lie in."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for dims in (preset("deit_tiny"), preset("deit_base")):
        seen = []

        def forward(x, seen=seen):
            seen.append(len(x))
            return {"twice": 2 * x, "sum": x.sum(1)}

        x = np.arange(rows * 3.0, dtype=np.float32).reshape(rows, 3)
        found = parts.forward_in_parts(forward, dims, x)
        assert set(seen) == set(counts)
        np.testing.assert_array_equal(found["twice"], 2 * x)
        np.testing.assert_array_equal(found["sum"], x.sum(1))


def test_on_several_devices_rows_stay_where_they_are():
    """A part would lie on one of them."""
    assert jax.device_count() > 1
    assert parts.forward_in_parts(len, preset("deit_tiny"), np.zeros((64, 1))) == 64


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_answers_alike(monkeypatch, masked):
    """In parts and at once, within the rounding of float32; masks of each sample go with the whole batch."""
    masks = full_masks(DIMS) if masked else None
    if masked:
        masks.mlp[0, :3] = 0
    model, images = Model(DIMS, random_params(DIMS, dtype=np.float32), masks), random_images(DIMS, 16, dtype=np.float32)
    whole = model.apply(model.params, images)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(parts, "_TOKENS", 4 * DIMS.tokens)
    rows, forward = [], vit.forward
    monkeypatch.setattr(vit, "forward", lambda d, p, x, *a, **k: rows.append(len(x)) or forward(d, p, x, *a, **k))
    jax.clear_caches()
    np.testing.assert_allclose(model(images), whole, atol=1e-5)
    assert set(rows) == {4}


@pytest.mark.parametrize("whole", [True, False])
def test_a_loss_of_the_users_sees_the_whole_batch(monkeypatch, whole):
    """It may compare images with each other; with a loss of the library's a batch goes in parts."""
    monkeypatch.setattr(parts, "_KEPT", 2.0 * vit.kept_bytes(DIMS))
    rows, forward = [], vit.forward
    monkeypatch.setattr(vit, "forward", lambda d, p, x, *a, **k: rows.append(len(x)) or forward(d, p, x, *a, **k))
    objective = Objective(own=lambda logits, batch: (logits - logits.mean(0)).sum(-1)) if whole else Objective()
    given = {"image": random_images(DIMS, 8, dtype=np.float32), "label": np.zeros(8, np.int32), "index": np.arange(8)}
    optimizer = adamw(1e-3, weight_decay=0.0)
    inputs = distill.Inputs(distill.new_state(random_params(DIMS, dtype=np.float32), optimizer, 0), None)
    step = distill.make_train_step(DIMS, optimizer, objective)
    jax.eval_shape(functools.partial(step, mean=lambda tree: tree), inputs, given)
    assert set(rows) == {8 if whole else 2}
