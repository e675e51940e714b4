"""Criteria against autodiff done the long way, on a ViT small enough for the full Hessian of its gates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_images, random_params, run_forward, small_dims
from jax.flatten_util import ravel_pytree
from scipy.stats import spearmanr

from nvit_jax.errors import UserError
from nvit_jax.model import vit
from nvit_jax.model.dims import KINDS, Units
from nvit_jax.model.masks import full_masks
from nvit_jax.pruning import saliency
from nvit_jax.pruning.scoring import Scoring
from nvit_jax.training.losses import Objective, draw_labels, objective_loss

DIMS = small_dims(dist_token=True)
BATCH = 4


def make_batch(dims=DIMS, size=BATCH, seed=0):
    rng = np.random.default_rng([seed, 2])
    labels = rng.integers(0, dims.classes, size)
    return {
        "image": random_images(dims, size, seed),
        "label": labels.astype(np.int32),
        "index": np.arange(size, dtype=np.int32),
    }


def make_loss(dims=DIMS, objective=None):
    def loss(params, masks, batch):
        logits = vit.forward(dims, params, batch["image"], masks)
        return objective_loss(objective or Objective(), logits, batch)[0]

    return loss


def float_masks(dims=DIMS) -> Units:
    return Units(*(jnp.asarray(m, jnp.float64) for m in full_masks(dims)))


@pytest.fixture
def setting(x64):
    """(loss, params, masks, batch, exact Hessian [U, U] and gradient [U] of the mean loss in the gates)."""
    params, masks, batch = random_params(DIMS), float_masks(), make_batch()
    loss = make_loss()
    flat, unravel = ravel_pytree(masks)

    @jax.jit
    def both(m):
        mean = lambda m: loss(params, unravel(m), batch).mean()  # noqa: E731
        return jax.hessian(mean)(m), jax.grad(mean)(m)

    hessian, gradient = both(flat)
    return loss, params, masks, batch, np.asarray(hessian), np.asarray(gradient)


def flat(units) -> np.ndarray:
    return np.asarray(ravel_pytree(units)[0])


def score(criterion, loss, params, masks, batch, key=0, **options):
    run = jax.jit(lambda p, m, b, k: criterion(loss, p, m, b, k, **options))
    return run(params, masks, batch, jax.random.key(key))


def test_hvp_columns_are_those_of_jax_hessian(setting):
    loss, params, masks, batch, hessian, _ = setting
    gates, unravel = ravel_pytree(masks)
    grad = jax.grad(lambda m: loss(params, unravel(m), batch).mean())
    product = jax.jit(lambda v: jax.jvp(grad, (gates,), (v,))[1])
    for i in range(0, len(gates), 3):
        np.testing.assert_allclose(
            product(jnp.eye(len(gates))[i]), hessian[:, i], rtol=0, atol=1e-9 * np.abs(hessian[:, i]).max()
        )


def test_unit_probes_are_the_exact_diagonal(setting):
    loss, params, masks, batch, hessian, gradient = setting
    exact = np.diag(hessian)
    np.testing.assert_allclose(
        flat(score(saliency.hvp, loss, params, masks, batch, scheme="unit")), exact, atol=1e-9 * np.abs(exact).max()
    )
    np.testing.assert_allclose(
        flat(score(saliency.obd, loss, params, masks, batch, scheme="unit")),
        exact / 2 - gradient,
        atol=1e-9 * np.abs(gradient).max(),
    )


@pytest.mark.parametrize("scheme", ["all", "kind", "block", "part", "chunk"])
def test_hvp_is_unbiased(setting, scheme):
    loss, params, masks, batch, hessian, _ = setting
    run = jax.jit(lambda k: ravel_pytree(saliency.hvp(loss, params, masks, batch, k, scheme=scheme))[0])
    draws = np.asarray(jax.lax.map(run, jax.random.split(jax.random.key(1), 400)))
    error = draws.mean(0) - np.diag(hessian)
    deviation = draws.std(0, ddof=1) / np.sqrt(len(draws))
    # Standard scores: mean square 1, none beyond 5 among the ~50 units (a chance below 1e-4).
    z = error[deviation > 0] / deviation[deviation > 0]
    assert np.abs(z).max() < 5
    assert 0.5 < np.mean(z**2) < 1.7
    assert np.abs(error[deviation == 0]).max(initial=0) < 1e-9 * np.abs(hessian).max()


@pytest.mark.slow
def test_finer_probing_ranks_better(setting):
    """The order of the curve in saliency's docstring, on a small model: the same number of probes per part."""
    loss, params, masks, batch, hessian, _ = setting
    exact = np.diag(hessian)

    def rho(scheme):
        run = jax.jit(lambda k: ravel_pytree(saliency.hvp(loss, params, masks, batch, k, scheme=scheme, probes=2))[0])
        return np.mean([spearmanr(run(jax.random.key(k)), exact)[0] for k in range(8)])

    found = {scheme: rho(scheme) for scheme in ("all", "kind", "part", "unit")}
    assert found["unit"] > 0.999
    assert found["all"] < found["kind"] < found["part"] < found["unit"], found


def test_fisher_is_the_loop_over_samples(setting):
    loss, params, masks, batch, _, _ = setting
    one = jax.jit(jax.grad(lambda m, b: loss(params, m, b).sum()))
    squares = [
        np.square(flat(one(masks, {name: value[i : i + 1] for name, value in batch.items()}))) for i in range(BATCH)
    ]
    expected = np.mean(squares, 0)
    np.testing.assert_allclose(
        flat(score(saliency.fisher, loss, params, masks, batch)), expected, atol=1e-12 * expected.max()
    )


def test_drawn_labels_give_the_gauss_newton_diagonal(x64):
    """At the unpruned model the Hessian of the KL is the Gauss-Newton matrix, which drawn labels estimate."""
    params, masks, batch = random_params(DIMS), float_masks(), make_batch()
    batch["teacher"] = run_forward(DIMS, params, batch["image"])
    kl = make_loss(objective=Objective(label_weight=0.0, kl_weight=float(DIMS.classes)))
    exact = flat(score(saliency.hvp, kl, params, masks, batch, scheme="unit"))

    def draw(key):
        drawn = batch | {"label": draw_labels(batch["teacher"], key, batch["index"])}
        return ravel_pytree(saliency.fisher(make_loss(), params, masks, drawn))[0]

    draws = np.asarray(jax.jit(lambda keys: jax.lax.map(draw, keys))(jax.random.split(jax.random.key(0), 2000)))
    z = (draws.mean(0) - exact) / (draws.std(0, ddof=1) / np.sqrt(len(draws)) + 1e-12)
    assert np.abs(z).max() < 5


def test_hvp_joint_is_the_row_sum(setting):
    loss, params, masks, batch, hessian, _ = setting
    np.testing.assert_allclose(
        flat(score(saliency.hvp_joint, loss, params, masks, batch)),
        hessian.sum(1),
        atol=1e-9 * np.abs(hessian).sum(1).max(),
    )


@pytest.mark.parametrize("align", ["per_head", "shared"])
def test_taylor_is_the_square_of_weight_times_gradient(setting, align):
    """Written out for a few units from the released recipe: which weights count, and what the sum is divided by."""
    loss, params, masks, batch, _, _ = setting
    found = score(saliency.taylor, loss, params, masks, batch, align=align)
    gradient = jax.grad(lambda p: loss(p, masks, batch).mean())(params)
    wg = jax.tree.map(lambda w, g: np.asarray(w * g), params, gradient)
    block = wg["block_1"]
    q_terms = block["q"]["kernel"].sum(0) + block["q"]["bias"]  # [H, Q]
    heads = DIMS.heads[1]
    if align == "shared":
        expected = np.tile((q_terms.sum(0) / 2) ** 2 / heads, (heads, 1))
    else:
        expected = (q_terms / 2) ** 2
    np.testing.assert_allclose(found.qk[1], expected, rtol=1e-9)
    mlp = block["fc1"]["kernel"].sum(0) + block["fc1"]["bias"]
    np.testing.assert_allclose(found.mlp[1], mlp**2, rtol=1e-9)
    head = sum(block[n]["kernel"].sum((0, 2)) + block[n]["bias"].sum(1) for n in "qkv")
    np.testing.assert_allclose(found.head[1], (head / 12) ** 2, rtol=1e-9)
    embed = wg["patch_embed"]["kernel"].sum((0, 1, 2)) + wg["patch_embed"]["bias"]
    for i in range(DIMS.depth):
        b = wg[f"block_{i}"]
        embed = embed + sum(b[n]["kernel"].sum((1, 2)) for n in "qkv") + b["proj"]["kernel"].sum((0, 1))
        embed = embed + b["proj"]["bias"] + b["fc1"]["kernel"].sum(1) + b["fc2"]["kernel"].sum(0) + b["fc2"]["bias"]
    np.testing.assert_allclose(found.embed, (embed / 12) ** 2, rtol=1e-9)


@pytest.fixture(scope="module")
def trained():
    """(dims, params, loss, batch): a ViT that has learnt to tell noisy templates apart, and images of them."""
    dims = small_dims(embed=32, heads=4, mlp=32)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, dims.classes, 64).astype(np.int32)
    templates = rng.standard_normal((dims.classes, dims.image, dims.image, 1))
    images = (templates[labels] + rng.standard_normal((64, dims.image, dims.image, 1))).astype(np.float32)
    batch = {"image": images, "label": labels, "index": np.arange(64, dtype=np.int32)}
    loss, optimizer = make_loss(dims), optax.adam(3e-3)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(
            jax.grad(lambda p: loss(p, full_masks(dims), batch).mean())(params), state, params
        )
        return (optax.apply_updates(params, updates), state), None

    params = vit.init(dims, jax.random.key(0), std=0.1, position_std=0.5)
    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=60)[0][0])
    return dims, run(params), loss, batch


@pytest.mark.parametrize("kind", KINDS)
def test_obd_predicts_the_true_loss_change(trained, kind):
    """Removing each unit for real, against -g + H/2.

    Two kinds are coarser: a whole head is a large step for a second-order prediction, and in embed the prediction
    leaves out that LayerNorm's statistics run over one channel less (the gate is a constant there).
    """
    dims, params, loss, batch = trained
    masks = jax.tree.map(jnp.asarray, full_masks(dims))
    predicted = np.asarray(getattr(score(saliency.obd, loss, params, masks, batch, scheme="part", probes=16), kind))
    mean = jax.jit(lambda m: loss(params, m, batch).mean())
    full, true = mean(masks), np.zeros(predicted.shape)
    for index in np.ndindex(*predicted.shape):
        mask = np.asarray(getattr(masks, kind)).copy()
        mask[index] = 0
        true[index] = mean(masks._replace(**{kind: mask})) - full
    correlation = np.corrcoef(true.ravel(), predicted.ravel())[0, 1]
    print(f"{kind}: correlation of the predicted with the true loss change {correlation:.3f}")
    assert correlation > (0.8 if kind in ("embed", "head") else 0.95)


def test_magnitude_and_random(x64):
    params, masks = random_params(DIMS), float_masks()
    masks = masks._replace(head=masks.head.at[0, 1].set(0))
    found = score(saliency.magnitude, None, params, masks, None)
    expected = sum(np.square(params["block_1"][n]["kernel"]).sum(a) for n, a in (("fc1", 0), ("fc2", 1)))
    np.testing.assert_allclose(found.mlp[1], expected, rtol=1e-12)
    a, b, c = (score(saliency.random, None, params, masks, None, key=k) for k in (0, 0, 1))
    assert (flat(a) == flat(b)).all() and not (flat(a) == flat(c)).all()
    for units in (found, a):
        # A dim of a removed head counts as removed.
        assert (np.asarray(units.qk[0, 1]) == 0).all() and (np.asarray(units.v[0, 1]) == 0).all()


@pytest.mark.parametrize("name", saliency.CRITERIA)
def test_no_recompilation_from_pruning_to_pruning(name):
    """Masks and parameters change their values, the program stays."""
    dims = small_dims()
    traces = []
    criterion = saliency.criterion(name)
    loss = make_loss(dims)

    @jax.jit
    def run(params, masks, batch, key):
        traces.append(1)
        return criterion(loss, params, masks, batch, key)

    params, masks = random_params(dims, dtype=np.float32), full_masks(dims)
    batch = make_batch(dims) | {"image": random_images(dims, BATCH, dtype=np.float32)}
    for pruning in range(3):
        masks.mlp[0, pruning] = 0
        run(params, masks, batch, jax.random.key(pruning))
    assert len(traces) == 1


def test_non_finite_scores_name_the_unit():
    scores = full_masks(DIMS)
    saliency.check_finite(scores)
    scores.qk[1, 0, 3] = np.nan
    with pytest.raises(FloatingPointError, match="block 1 head 0 qk 3 is not finite"):
        saliency.check_finite(scores)
    scores.embed[5] = np.inf
    with pytest.raises(FloatingPointError, match="embed 5"):
        saliency.check_finite(scores)


def test_scores_that_would_all_be_zero_are_refused():
    for name in ("taylor", "fisher"):
        with pytest.raises(UserError, match="no gradient"):
            Scoring(criterion=name, loss="kl")
    with pytest.raises(UserError, match="drawn"):
        Scoring(criterion="hvp", loss="entropy")
    with pytest.raises(UserError, match="unknown criterion"):
        saliency.criterion("hessian")
    with pytest.raises(UserError, match="probing scheme"):
        saliency.hvp(make_loss(), random_params(DIMS), full_masks(DIMS), make_batch(), jax.random.key(0), scheme="x")
