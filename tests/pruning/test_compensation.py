"""Statistics, least squares, changes of basis, compensation: each against its definition."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import VARIANTS, random_params, run_forward, small_dims

from nvit_jax.errors import NotFinite, UserError
from nvit_jax.model import vit
from nvit_jax.model.masks import full_masks, normalize
from nvit_jax.parallel import Parallel
from nvit_jax.pruning import leastsquares, obs, rebasis
from nvit_jax.pruning.compensation import Chosen, align, compensate, value_features
from nvit_jax.pruning.moments import NOTHING, Moments, Sensitivity, TokenMoments, add, moments, of_batches
from nvit_jax.pruning.statistics import Images, Walk, hold_back

KEEP = Chosen(values=False, neurons=False)
ANEW = Chosen(values=True, neurons=True)


def walk(dims, images=40, batch=8, devices=1, seed=0, values=None):
    """A walk over random images, float32."""
    parallel = Parallel.create("jit", tuple(jax.devices()[:devices]))
    shape = (images, *dims.sides, dims.channels)
    if values is None:
        values = np.random.default_rng([seed, 1]).standard_normal(shape)
    values = np.asarray(values, np.float32)
    batches = [
        parallel.shard({"image": values[i : i + batch], "index": np.arange(i, i + batch, dtype=np.int32)})
        for i in range(0, images, batch)
    ]
    return Walk(dims, Images(batches, hold_back(len(batches)), parallel), lambda image: image)


def host(tree):
    return jax.tree.map(np.array, tree)


def sensitivities(found, params, draws=1):
    return found.sensitivities(params, 0, draws, None, told=lambda done: None)


def model(seed=0, **changes):
    dims = small_dims(**({"image": 16, "depth": 2, "mlp": 24, "embed": 16} | changes))
    # Small weights: activations of about 1, as in a trained model.
    return dims, jax.tree.map(lambda p: (0.5 * p).astype(np.float32), random_params(dims, seed))


def logits(dims, params, found, masks=None):
    images = np.concatenate([np.asarray(b["image"]) for b in found.images.batches])
    return run_forward(dims, params, images, masks)


# ----------------------------------------------------------------------------------------------- statistics


def test_moments_of_batches_are_those_of_all():
    rng = np.random.default_rng(0)
    x, y = 5 + rng.standard_normal((12, 3, 4)), rng.standard_normal((12, 3, 2))
    with jax.enable_x64(True):
        parts = [moments(jnp.asarray(x[i : i + 5]), jnp.asarray(y[i : i + 5])) for i in (0, 5, 10)]
    found = of_batches([one[:3] for one in parts], tuple(np.sum([one[i] for one in parts], 0) for i in (3, 4, 5)))
    flat, target = x.reshape(-1, 4), y.reshape(-1, 2)
    assert found.weight == 36
    np.testing.assert_allclose(found.covariance, np.cov(flat.T, bias=True), rtol=1e-12)
    np.testing.assert_allclose(found.cross, (flat - flat.mean(0)).T @ (target - target.mean(0)) / 36, atol=1e-12)


def test_sums_of_many_batches_are_as_exact_as_of_two():
    """A number too small to change the sum in float32 is added 10,000 times."""
    adding = jax.jit(lambda total, more: jax.lax.fori_loop(0, 10_000, lambda _, t: add(t, more), total))
    start, more = {"a": jnp.ones(3), "b": jnp.float32(-7)}, {"a": jnp.full(3, 1e-8), "b": jnp.float32(0.1)}
    sums, lost = jax.device_get(adding((start, jax.tree.map(jnp.zeros_like, start)), more))
    for name, value in sums.items():
        found, each = value.astype(np.float64) - lost[name], np.asarray(more[name], np.float64)
        np.testing.assert_allclose(found, np.asarray(start[name]) + 10_000 * each, rtol=1e-9)
    assert np.ones(3, np.float32)[0] + np.float32(1e-8) == 1  # so a plain sum would still be 1


def test_moments_of_a_walk_are_those_of_its_features():
    """On the devices batch by batch, against NumPy in float64 on all tokens at once, to fit and held back."""
    dims, params = model()
    steps = walk(dims)
    block = jax.tree.map(lambda leaf: leaf[0], vit.stack_blocks(params)["blocks"])
    streams = steps.advance("attention", block, steps.begin(params))  # before it all class tokens are alike
    after = steps.advance("mlp", block, streams)
    for held, found in zip((False, True), steps.gather("mlp", block, streams, after), strict=True):
        own = [i for i, back in enumerate(steps.images.held) if back == held]
        x = np.concatenate([vit.part(dims, "mlp", block, streams[i])[1]["features"] for i in own]).astype(np.float64)
        y = np.concatenate([after[i] - streams[i] for i in own]).astype(np.float64)
        for tokens, one in zip((slice(0, dims.prefix), slice(dims.prefix, None)), found, strict=True):
            flat, target = (v[:, tokens].reshape(-1, v.shape[-1]) for v in (x, y))
            assert one.weight == len(flat)
            c = np.cov(flat.T, target.T, bias=True)
            tolerance = 1e-5 * np.abs(c).max()  # features of about 1 vary by 0.01, and are known to 6e-8
            np.testing.assert_allclose(one.covariance, c[: flat.shape[1], : flat.shape[1]], atol=tolerance)
            np.testing.assert_allclose(one.cross, c[: flat.shape[1], flat.shape[1] :], atol=tolerance)
            np.testing.assert_allclose(one.x, flat.mean(0), atol=1e-6)


def test_statistics_do_not_depend_on_devices():
    dims, params = model()
    found = []
    for devices in (1, 4):
        steps = walk(dims, devices=devices)
        felt = sensitivities(steps, params)
        masks = host(full_masks(dims))
        masks.mlp[:, 12:] = 0
        done = compensate(steps, params, params, masks, felt, KEEP, use_held=True)
        answers = np.concatenate([np.asarray(x) for x in done.logits])
        found.append((felt[0].metric, felt[-1].metric, answers, done.params["block_1"]["fc2"]["kernel"]))
    # Weights: a fit multiplies the rounding of its float32 moments by the condition of C, which its ridge bounds.
    for one, four, tolerance in zip(*found, (1e-5, 1e-5, 1e-5, 1e-4), strict=True):
        np.testing.assert_allclose(four, one, rtol=0, atol=tolerance * np.abs(one).max())


def test_the_metric_is_the_mean_of_squared_gradients():
    """By jax.grad of a loss of one's own with respect to what an mlp writes."""
    dims, params = model()
    steps = walk(dims, images=8, batch=4)

    def loss(out, batch):
        return jnp.square(out.mean(1)).sum(-1)

    felt = steps.sensitivities(params, 0, 1, loss, told=lambda done: None)
    images = np.concatenate([np.asarray(b["image"]) for b in steps.images.batches])

    def of_bias(bias, image):  # the same for every token: the sum of their gradients
        block = params["block_1"] | {"fc2": params["block_1"]["fc2"] | {"bias": bias}}
        return loss(vit.forward(dims, params | {"block_1": block}, image[None]), None)[0]

    def at_tokens(tap, image):
        x = vit.stem(dims, params, image[None])
        stack = vit.stack_blocks(params)["blocks"]
        for i in range(dims.depth):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
            for name in vit.PARTS:
                x = vit.part(dims, name, block, x)[0]
        return loss(vit.classify(dims, params, x + tap), None)[0]

    gradients = jax.vmap(jax.grad(at_tokens), (None, 0))(jnp.zeros((1, dims.tokens, dims.embed)), images)[:, 0]
    np.testing.assert_allclose(
        gradients.sum(1),
        jax.vmap(jax.grad(of_bias), (None, 0))(params["block_1"]["fc2"]["bias"], images),
        rtol=1e-4,
        atol=1e-6,
    )
    expected = np.einsum("bnd,bne->de", gradients, gradients) / len(images)
    np.testing.assert_allclose(felt[-1].metric, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


# ------------------------------------------------------------------------------------------- least squares


def test_ridge_is_the_solution_of_the_normal_equations():
    rng = np.random.default_rng(1)
    x, y, start = rng.standard_normal((50, 6)) + 3, rng.standard_normal((50, 4)), rng.standard_normal((6, 4))
    cx, cy = x - x.mean(0), y - y.mean(0)
    own = Moments(50.0, x.mean(0), y.mean(0), cx.T @ cx, cx.T @ cy, np.square(cy).sum(0))
    r = 0.1 * np.trace(own.covariance) / 6
    expected = start + np.linalg.solve(cx.T @ cx / 50 + r * np.eye(6), cx.T @ (cy - cx @ start) / 50)
    found = leastsquares.ridge(own, start, 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(leastsquares.bias(own, found), (y - x @ found).mean(0), rtol=1e-10)


@pytest.mark.parametrize("samples", [9, 50])
def test_the_errors_of_all_ridges_are_those_of_their_fits(samples):
    """Fewer samples than features as well; and features that never change keep their weights, broken ones are named."""
    rng = np.random.default_rng(2)

    def drawn(count):
        x, y = rng.standard_normal((count, 12)) + 2, rng.standard_normal((count, 4)) - 1
        cx, cy = x - x.mean(0), y - y.mean(0)
        return Moments(float(count), x.mean(0), y.mean(0), cx.T @ cx, cx.T @ cy, np.square(cy).sum(0)), x, y

    (own, _, _), (other, _, _), (held, x, y) = (drawn(count) for count in (samples, samples, 30))
    start, metric = rng.standard_normal((12, 4)), np.arange(1.0, 5.0)
    still = own._replace(xx=0 * own.xx)
    np.testing.assert_array_equal(leastsquares.ridge(still, start, 0.1), start)
    tried = [own, other, still]
    found = leastsquares.ridge_errors(tried, start, held, metric)
    for row, one in enumerate(tried):
        for column, strength in enumerate(leastsquares.RIDGES):
            weights = leastsquares.ridge(one, start, strength)
            wrong = np.square(x @ weights + leastsquares.bias(one, weights) - y) @ metric
            # Two ways to solve in float64: they differ by the rounding times the condition number, here up to 1e7.
            assert found[row, column] == pytest.approx(wrong.mean(), rel=1e-8)
    broken = own._replace(xx=own.xx * np.inf)
    with pytest.raises(NotFinite, match="not finite"):
        leastsquares.ridge(broken, start, 0.1)
    with pytest.raises(NotFinite, match="not finite"):
        leastsquares.ridge_errors([broken], start, held, metric)


def test_matrices_that_are_not_positive_are_made_so():
    """All zeros, rank 1, rounded below 0, so small that squares vanish; what is positive stays as it is."""
    right = np.eye(3)
    rounded = np.diag([1.0, 1.0, -1e-13])
    for matrix in (np.zeros((3, 3)), np.ones((3, 3)), rounded, 1e-200 * np.eye(3), 1e-320 * np.eye(3)):
        raised, factor = leastsquares.positive(matrix)
        np.testing.assert_allclose(factor @ factor.T, raised, atol=1e-15 * np.abs(raised).max())
        assert np.abs(raised - matrix).max() <= 1e-8 * max(np.abs(matrix).max(), 1e-200)
        for found in (leastsquares.solve(matrix, right), leastsquares.inverse(matrix)):
            assert np.isfinite(found).all() and np.isfinite(np.square(found / np.abs(found).max())).all()
    good = np.array([[2.0, 1.0], [1.0, 2.0]])
    assert leastsquares.positive(good)[0] is good
    np.testing.assert_allclose(leastsquares.inverse(good), np.linalg.inv(good), rtol=1e-14)
    with pytest.raises(NotFinite, match="not finite"):
        leastsquares.solve(np.full((2, 2), np.nan), np.ones((2, 1)))
    assert leastsquares.solve(np.zeros((0, 0)), np.zeros((0, 4))).shape == (0, 4)


def test_removal_costs_what_the_best_fit_of_the_rest_errs():
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((200, 8)) @ rng.standard_normal((8, 8)), rng.standard_normal((8, 3))
    metric = np.diag([1.0, 2.0, 3.0])
    x = x - x.mean(0)
    own = Moments(200.0, np.zeros(8), np.zeros(3), x.T @ x, x.T @ (x @ w), np.square(x @ w).sum(0))
    order, cost = leastsquares.removal(own, metric, np.ones(8), 1e-9, least=2)
    assert sorted(order) == list(range(8)) and (np.diff(cost) >= 0).all()
    for gone in (2, 4, 6):
        rest = np.sort(order[gone:])
        error = x @ w - x[:, rest] @ np.linalg.lstsq(x[:, rest], x @ w, rcond=None)[0]
        assert cost[gone] == pytest.approx(0.5 * np.einsum("nd,de,ne->", error, metric, error) / 200, rel=1e-5)


def test_removal_is_updated_fit_by_fit(monkeypatch):
    """`without` after every chunk gives the same order and costs; some features are not there."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((300, 40)) @ rng.standard_normal((40, 40)) + 1
    y, live = x @ rng.standard_normal((40, 6)), rng.random(40) < 0.8
    cx, cy, metric = x - x.mean(0), y - y.mean(0), np.diag(np.arange(1.0, 7.0))
    own = Moments(300.0, x.mean(0), y.mean(0), cx.T @ cx, cx.T @ cy, np.square(cy).sum(0))
    left = np.flatnonzero(live)
    c = own.covariance[np.ix_(left, left)]
    inverse = np.linalg.inv(c + 0.01 * np.trace(c) / len(c) * np.eye(len(c)))
    weights = inverse @ own.cross[left] @ np.sqrt(metric)
    order, cost = [], [0.0]
    while len(left):
        loss = np.square(weights).sum(1) / np.diag(inverse)
        gone = np.argsort(loss)[:3]
        order += left[gone].tolist()
        left = np.delete(left, gone)
        weights, inverse, more = leastsquares.without(weights, inverse, gone)
        cost.append(cost[-1] + more / 2)
    for waiting in (1, 7, 256):
        monkeypatch.setattr(leastsquares, "_WAITING", waiting)
        found, costs = leastsquares.removal(own, metric, live, 0.01, least=3)
        assert found.tolist() == order
        np.testing.assert_allclose(costs[np.minimum(np.arange(0, len(order) + 3, 3), len(order))], cost, rtol=1e-8)


# ------------------------------------------------------------------------------------------------- rebasis


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_change_of_basis_keeps_the_function(variant, x64):
    dims = small_dims(**({"embed": 8, "qk": 3, "v": 5, "heads": 2} | VARIANTS[variant]))
    params = random_params(dims)
    rng, turned = np.random.default_rng(3), dict(params)
    for i, (heads, qk, v) in enumerate(zip(dims.heads, dims.qk, dims.v, strict=True)):
        values = np.stack([np.linalg.qr(rng.standard_normal((v, v)))[0] for _ in range(heads)])
        found = [rebasis.logit_basis(*(m.T @ m for m in rng.standard_normal((2, 2 * qk, qk)))) for _ in range(heads)]
        logits = np.stack([f[0] for f in found]), np.stack([f[1] for f in found])
        if dims.proj_norm_count:
            with pytest.raises(UserError, match="values that are normalised"):
                rebasis.change(params[f"block_{i}"], values, None)
            values = np.stack([np.eye(v)[:, rng.permutation(v)] for _ in range(heads)])
        if dims.rotary or dims.qk_norm_count:
            with pytest.raises(UserError, match="normalised|rotary"):
                rebasis.change(params[f"block_{i}"], values, logits)
            orders = np.stack([rng.permutation(qk) for _ in range(heads)])
            turned[f"block_{i}"] = rebasis.reorder(rebasis.change(params[f"block_{i}"], values, None), orders)
            continue
        turned[f"block_{i}"] = rebasis.change(params[f"block_{i}"], values, logits)
    images = np.random.default_rng(4).standard_normal((3, *dims.sides, dims.channels))
    before, after = (run_forward(dims, p, images) for p in (params, turned))
    assert before.dtype == np.float64
    np.testing.assert_allclose(after, before, rtol=1e-10, atol=1e-10)


def test_the_first_dims_of_a_logit_basis_are_the_best_approximation():
    """Of rank r: the singular values that are left out are the mean squared error of the logits."""
    rng = np.random.default_rng(5)
    q, k = rng.standard_normal((300, 6)), rng.standard_normal((200, 6)) @ np.diag([3, 2, 1, 1, 0.5, 0.1])
    a, b, squares = rebasis.logit_basis(q.T @ q / 300, k.T @ k / 200)
    np.testing.assert_allclose(a @ b.T, np.eye(6), atol=1e-9)
    for rank in (2, 4):
        error = np.square(q @ k.T - (q @ a[:, :rank]) @ (k @ b[:, :rank]).T).mean()
        assert error == pytest.approx(squares[rank:].sum(), rel=1e-4)  # the moments are evened by 1e-6


def test_the_order_of_a_fixed_basis_is_that_of_the_logits():
    """Units of two dims: what each adds to the logits of independent queries and keys, in the mean over their pairs."""
    rng = np.random.default_rng(5)
    q, k = rng.standard_normal((300, 6)), rng.standard_normal((200, 6)) * [0.1, 0.2, 3, 2, 1, 0.5]
    order, squares = rebasis.logit_order(q.T @ q / 300, k.T @ k / 200, 2)
    alone = [np.square(q[:, u] @ k[:, u].T).mean() for u in (slice(0, 2), slice(2, 4), slice(4, 6))]
    assert order.tolist() == [1, 2, 0]
    np.testing.assert_allclose(squares, [alone[i] for i in order], rtol=1e-12)


@pytest.mark.parametrize("changes", [{"rotary": 6, "qk": 6}, {"qk": 6, "qk_norm_count": 6}])
def test_dims_that_stay_what_they_are_are_reordered(changes):
    """Planted: the even units of each head hardly count. They come last, and the function stays; rotary numbers too."""
    dims, params = model(**changes)
    params = host(params)
    for i, name in itertools.product(range(dims.depth), ("q_norm",) if "qk_norm_count" in changes else ("q", "k")):
        for leaf in params[f"block_{i}"][name].values():
            rows = leaf if leaf.ndim == 2 + ("rotary" in changes) else np.moveaxis(leaf, 0, -1)
            rows[:, ::2] *= 1e-3
    steps = walk(dims)
    scored = obs.score(steps, params, sensitivities(steps, params))
    np.testing.assert_allclose(logits(dims, scored.params, steps), logits(dims, params, steps), rtol=1e-4, atol=1e-4)
    for i in range(dims.depth):
        assert (np.diff(scored.scores.qk[i], axis=-1) < 0).all()
        before, after = (np.asarray(p[f"block_{i}"]["q"]["kernel"]) for p in (params, scored.params))
        for head in range(2):
            here = [np.flatnonzero([np.array_equal(a, b) for b in np.moveaxis(before[:, head], 1, 0)])
                    for a in np.moveaxis(after[:, head], 1, 0)]  # fmt: skip
            places = np.concatenate(here)
            assert sorted(places[:3]) == [1, 3, 5] and sorted(places[3:]) == [0, 2, 4]
            if dims.rotary:
                np.testing.assert_array_equal(
                    scored.params[f"block_{i}"]["rotary"][head], params[f"block_{i}"]["rotary"][head][places]
                )


def test_value_bases_are_orthonormal_and_cost_rises():
    rng = np.random.default_rng(6)
    x, w = rng.standard_normal((400, 8)) @ rng.standard_normal((8, 8)), rng.standard_normal((8, 5))
    x = x - x.mean(0)
    own = Moments(400.0, np.zeros(8), np.zeros(5), x.T @ x, x.T @ (x @ w), np.square(x @ w).sum(0))
    bases, cost = rebasis.value_basis(own, np.eye(5), np.ones(2), 4, 1e-9)
    np.testing.assert_allclose(np.einsum("hij,hik->hjk", bases, bases), np.tile(np.eye(4), (2, 1, 1)), atol=1e-10)
    assert cost[0] == pytest.approx(0, abs=1e-9) and (np.diff(cost) >= 0).all()
    for gone in (1, 2, 3):
        features = x @ value_features(bases, np.tile(np.arange(4) < 4 - gone, (2, 1)).astype(float))
        error = x @ w - features @ np.linalg.lstsq(features, x @ w, rcond=None)[0]
        assert cost[gone] == pytest.approx(0.5 * np.square(error).sum() / 400, rel=1e-5)


# ------------------------------------------------------------------------------------------- compensation


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_cut_changes_nothing(variant):
    dims = small_dims(**VARIANTS[variant])
    params = jax.tree.map(lambda p: (0.5 * p).astype(np.float32), random_params(dims))
    steps = walk(dims)
    felt = sensitivities(steps, params)
    found = compensate(steps, params, params, host(full_masks(dims)), felt, ANEW, use_held=True)
    before = logits(dims, params, steps)
    scale = np.abs(before).max()
    np.testing.assert_allclose(logits(dims, found.params, steps, found.masks), before, atol=1e-6 * max(scale, 1))


@pytest.mark.parametrize("changes", [{}, {"gated": True, "activation": "silu"}])
def test_planted_dependencies_cost_nothing(changes):
    """Neurons, with their gates, and value dims that repeat others go; the rest takes over what they wrote."""
    dims, params = model(heads=2, qk=8, v=8, **changes)
    params = host(params)
    masks = host(full_masks(dims))
    for i in range(dims.depth):
        block = params[f"block_{i}"]
        for name in {"fc1", "fc1_gate"} & block.keys():
            for leaf in block[name].values():
                leaf[..., 16:] = leaf[..., :8]
        for leaf in block["v"].values():
            leaf[..., 6:] = 2 * leaf[..., :2]
        masks.mlp[i, 16:] = 0
        masks.v[i, :, 6:] = 0
    steps = walk(dims, images=80)
    felt = sensitivities(steps, params)
    before = logits(dims, params, steps)
    cut = logits(dims, params, steps, masks)
    found = compensate(steps, params, params, masks, felt, KEEP, use_held=True)
    scale = np.abs(before).max()
    assert np.abs(cut - before).max() > 1e-2 * scale
    np.testing.assert_allclose(logits(dims, found.params, steps, found.masks), before, atol=1e-5 * scale)


def test_both_readers_of_a_pooling_make_good_for_channels_that_are_gone(x64):
    """Channels that follow from others go; the shift of the mean's reader, which has no bias, goes into the other's."""
    rng = np.random.default_rng(7)
    x, embed = rng.standard_normal((60, 2, 8)), np.array([1.0] * 5 + [0.0] * 3)
    x[..., 5:] = x[..., :5] @ rng.standard_normal((5, 3)) + 2
    one = tuple(map(np.asarray, moments(x * embed, x)))
    found = TokenMoments(NOTHING, of_batches([one[:3]], one[3:]))
    params = {"head": {"kernel": rng.standard_normal((8, 3)), "bias": np.ones(3)}}
    params["head_mean"] = {"kernel": rng.standard_normal((8, 3))}
    felt = Sensitivity(np.zeros((0, 0)), 1.0, 1.0)
    new = align(params, tuple(params), (found, found), embed, felt, use_held=False)  # the least ridge is the best

    def logits(params, x):
        return x[:, 0] @ params["head"]["kernel"] + x[:, 1] @ params["head_mean"]["kernel"] + params["head"]["bias"]

    assert set(new["head_mean"]) == {"kernel"}
    np.testing.assert_allclose(logits(new, x * embed), logits(params, x), atol=1e-4)  # the ridge of 1e-6


def test_masked_parameters_of_what_goes_do_not_matter():
    """Compensated weights stand for the masked model: the logits of the walk are those of the model."""
    dims, params = model()
    steps = walk(dims)
    felt = sensitivities(steps, params)
    scored = obs.score(steps, params, felt)
    np.testing.assert_allclose(logits(dims, scored.params, steps), logits(dims, params, steps), rtol=1e-4, atol=1e-4)
    masks = host(full_masks(dims))
    masks.mlp[:, 10:], masks.v[:, :, 5:], masks.qk[:, :, 5:] = 0, 0, 0
    masks = host(normalize(masks))
    found = compensate(steps, params, scored.params, masks, felt, ANEW, use_held=False)
    assert [m.sum() for m in found.masks] == [m.sum() for m in masks]
    walked = np.concatenate([np.asarray(x) for x in found.logits])
    np.testing.assert_allclose(logits(dims, found.params, steps, found.masks), walked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["dead", "constant", "few", "saturated"])
def test_hard_statistics_give_finite_weights(case):
    dims, params = model(embed=16, mlp=24)
    params, values, images = host(params), None, 40
    if case == "dead":
        for i in range(dims.depth):
            params[f"block_{i}"]["fc1"]["bias"][:8] = -100
            params[f"block_{i}"]["v"]["kernel"][..., :4] = 0
            params[f"block_{i}"]["proj"]["kernel"][:] = 0
    if case == "constant":
        values = np.ones((40, dims.image, dims.image, dims.channels))
    if case == "few":
        images = 2
    if case == "saturated":
        params["head"]["kernel"] *= 1e4
    steps = walk(dims, images=images, batch=1 if case == "few" else 8, values=values)
    felt = sensitivities(steps, params)
    scored = obs.score(steps, params, felt)
    assert all(np.isfinite(s).all() for s in scored.scores)
    masks = host(full_masks(dims))
    masks.mlp[:, 6:], masks.v[:, :, 3:], masks.qk[:, :, 2:] = 0, 0, 0
    found = compensate(steps, params, scored.params, host(normalize(masks)), felt, ANEW, use_held=True)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params))
    assert np.isfinite(logits(dims, found.params, steps, found.masks)).all()


def test_held_back_images_are_in_no_fit():
    one = Moments(4.0, np.zeros(2), np.zeros(1), np.eye(2), np.ones((2, 1)), np.ones(1))
    other = one._replace(xx=2 * np.eye(2))
    dims, params = model()
    felt = sensitivities(walk(dims), params)[0]
    felt = dataclasses.replace(felt, metric=np.ones((1, 1)))
    start = np.zeros((2, 1))
    fitted, held = TokenMoments(NOTHING, one), TokenMoments(NOTHING, other)
    found = leastsquares.fit(fitted, held, start, felt, use_held=False)
    np.testing.assert_allclose(found.weights, leastsquares.ridge(one.scaled(0.25), start, found.strength), rtol=1e-12)
    assert hold_back(10) == [False] * 4 + [True] + [False] * 4 + [True] and hold_back(1) == [False]
