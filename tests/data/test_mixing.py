"""Augmentation of batches on the device: against NumPy, in numbers over many draws, the same under both backends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from nvit_jax.data.mixing import Mixing, cut_box, erase, prepare
from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims
from nvit_jax.parallel import Parallel
from nvit_jax.training import distill, optim
from nvit_jax.training.losses import Objective, cross_entropy, objective_loss

S = 16


def batch(n: int = 8) -> dict:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, n).astype(np.int32)
    return {"image": rng.normal(size=(n, S, S, 1)).astype(np.float32), "label": labels, "index": np.arange(n)}


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_mixed_images_are_what_the_share_says(shards):
    given = batch()
    mirror = np.arange(8).reshape(shards, -1)[:, ::-1].ravel()
    for seed in range(10):
        found = Mixing(mixup=0.8, shards=shards)(jax.random.key(seed), 3, given)
        share = float(found["label_share"])
        expected = share * given["image"] + (1 - share) * given["image"][mirror]
        np.testing.assert_allclose(found["image"], expected, rtol=0, atol=1e-6)
        assert np.array_equal(found["mixed_label"], given["label"][mirror])
        found = Mixing(cutmix=1.0, shards=shards)(jax.random.key(seed), 3, given)
        other = given["image"][mirror]
        taken = (np.asarray(found["image"]) == other).all((0, 3)) & ~(given["image"] == other).all((0, 3))
        rows, columns = taken.any(1), taken.any(0)
        assert np.array_equal(taken, rows[:, None] & columns)  # a rectangle, the same in all images
        assert np.array_equal(np.where(taken[..., None], other, given["image"]), found["image"])
        assert float(found["label_share"]) == pytest.approx(1 - taken.mean(), abs=1e-6)


def test_images_without_labels_are_mixed_alike():
    given = batch()
    images = {name: value for name, value in given.items() if name != "label"}
    one, other = (Mixing(mixup=0.8)(jax.random.key(0), 3, b) for b in (given, images))
    assert np.array_equal(one["image"], other["image"]) and "mixed_label" not in other


def test_shares_and_switching_in_numbers():
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)); 2,000 draws, 5 standard errors."""
    mix = Mixing(mixup=0.8, cutmix=1.0)
    given = {k: jnp.asarray(v) for k, v in batch(2).items()}
    keys = jax.random.split(jax.random.key(0), 2000)
    shares = np.asarray(jax.vmap(lambda k: Mixing(mixup=0.8)(k, 0, given)["label_share"])(keys))
    assert abs(shares.mean() - 0.5) < 5 * shares.std() / 2000**0.5
    assert abs(shares.var() - 1 / (4 * 2.6)) < 5 * (0.5 * shares.var()) / 2000**0.5
    images = np.asarray(jax.vmap(lambda k: mix(k, 0, given)["image"])(keys))
    pure = (images == given["image"]) | (images == given["image"][::-1])
    cut = pure.all((1, 2, 3, 4)).mean()
    assert abs(cut - 0.5) < 5 * 0.5 / 2000**0.5
    # cutmix: the box is (1 - share) of the area before it is clipped at the border.
    sides = []
    for key in keys[:300]:
        mask, left = cut_box(key, S, jnp.float32(0.75))
        assert float(left) == pytest.approx(1 - np.asarray(mask).mean(), abs=1e-6)
        sides.append(np.asarray(mask).any(1).sum())
    assert max(sides) == 8 and min(sides) >= 4  # sqrt(1/4) of 16, half of it at the border


def test_erasing_in_numbers():
    image = jnp.zeros((32, 32, 3))
    keys = jax.random.split(jax.random.key(1), 2000)
    found = np.asarray(jax.vmap(lambda k: erase(k, image, 0.25))(keys))
    erased = (found != 0).all(-1)
    done = erased.any((1, 2))
    assert abs(done.mean() - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5
    parts = erased[done].mean((1, 2))
    assert 0.01 < parts.min() < 0.03 and 0.3 < parts.max() < 0.36
    assert abs(parts.mean() - (0.02 + 1 / 3) / 2) < 0.01  # uniform; sides are rounded
    for one in erased[done][:50]:
        assert np.array_equal(one, one.any(1)[:, None] & one.any(0))
    heights, widths = erased[done].any(2).sum(1), erased[done].any(1).sum(1)
    assert abs(np.log(heights / widths).mean()) < 0.1 and (heights / widths).max() > 2
    noise = found[erased]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_the_loss_of_mixed_labels_is_that_of_the_mixed_distribution():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 1, 10)).astype(np.float32)
    given = batch() | {"mixed_label": np.arange(8), "label_share": np.float32(0.3)}
    loss, _ = objective_loss(Objective(smoothing=0.1), logits, given)
    both = 0.3 * np.eye(10)[given["label"]] + 0.7 * np.eye(10)[given["mixed_label"]]
    target = 0.9 * both + 0.1 / 10
    log_p = jax.nn.log_softmax(logits[:, 0])
    np.testing.assert_allclose(loss, -(target * log_p).sum(-1), rtol=1e-5)
    same = given | {"mixed_label": given["label"]}
    plain = cross_entropy(logits[:, 0], given["label"], 0.1)
    np.testing.assert_allclose(objective_loss(Objective(smoothing=0.1), logits, same)[0], plain, rtol=1e-5)


def test_one_step_on_any_number_of_devices():
    """jit on 1 and 4 devices and pmap on 4: the same draws, since partners are found inside of 4 shards."""
    dims = ViTDims.uniform(image=8, patch=4, channels=1, classes=10, embed=16, depth=1, heads=2, mlp=32)
    optimizer = optim.adamw(1e-3, weight_decay=0.05)
    params = random_params(dims, 0, np.float32)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 17, (8, 8, 8, 1)).astype(np.uint8)
    given = {"image": raw, "label": np.arange(8, dtype=np.int32), "index": np.arange(8, dtype=np.int32)}
    mixing = Mixing(mixup=0.8, cutmix=1.0, erasing=0.5, shards=4)
    found = []
    for backend, devices in (("jit", 1), ("jit", 4), ("pmap", 4), ("fsdp", 4)):
        p = Parallel.create(backend, tuple(jax.devices()[:devices]))
        step = distill.make_train_step(dims, optimizer, Objective(smoothing=0.1), drop_path=0.1)
        seen = 4 // devices if backend == "pmap" else None
        compiled = p.compile_training(prepare(lambda x: x.astype(np.float32) / 8 - 1, step, mixing, seen))
        state = p.place(distill.new_state(params, optimizer, 0))
        losses = []
        for _ in range(3):
            state, metrics = compiled(distill.Inputs(state, None), p.shard(given))
            losses.append(float(metrics["loss"]))
        found.append(losses)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)  # float32 sums in another order
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[3], found[0], rtol=1e-5)
    assert len(set(found[0])) == 3
    assert vit.forward(dims, params, raw.astype(np.float32)).shape == (8, 1, 10)
