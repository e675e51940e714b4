"""Sets of units by the Fisher matrix with its cross terms: against that matrix written out, and against jax.hessian."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_images, random_params, small_dims
from jax.flatten_util import ravel_pytree

from nvit_jax.errors import UserError
from nvit_jax.model import vit
from nvit_jax.model.dims import KINDS
from nvit_jax.model.masks import full_masks
from nvit_jax.parallel import Parallel
from nvit_jax.pruning import cross, saliency
from nvit_jax.pruning.ranking import Policy, group_sizes, make_targets, rank
from nvit_jax.pruning.scoring import Scoring
from nvit_jax.pruning.statistics import Images, Walk, hold_back
from nvit_jax.training.losses import Objective, draw_labels, objective_loss

DIMS = small_dims(embed=16, mlp=24)
NO_HEADS = ("embed", "qk", "v", "mlp")
DRAWS = 3


def quiet(done):
    """Hears of progress."""


def any_unit(kind, block):
    return True


def walk(dims=DIMS, images=20, batch=4, devices=1):
    parallel = Parallel.create("jit", tuple(jax.devices()[:devices]))
    values = random_images(dims, images, dtype=np.float32)
    batches = [
        parallel.shard({"image": values[i : i + batch], "index": np.arange(i, i + batch, dtype=np.int32)})
        for i in range(0, images, batch)
    ]
    return Walk(dims, Images(batches, hold_back(len(batches)), parallel), lambda image: image)


def params_of(dims=DIMS, seed=0):
    return jax.tree.map(lambda p: (0.5 * p).astype(np.float32), random_params(dims, seed))


def gradients(dims=DIMS, may_go=any_unit, devices=1):
    """(candidates, [U, S])."""
    of = cross.candidates(dims, may_go)
    return of, walk(dims, devices=devices).gate_gradients(params_of(dims), of.units, 0, DRAWS, None, quiet)


def planted(rows, saving=None, head=None):
    """Candidates and gradients of units that no model has."""
    rows = np.array(rows, np.float32)
    count = len(rows)
    saving = np.ones(count) if saving is None else np.array(saving, float)
    return cross.Candidates(np.arange(count), saving, np.full(count, -1) if head is None else np.array(head)), rows


def one_path(of, rows, weight):
    return cross.paths(of, rows, (weight,))[0]


# ------------------------------------------------------------------------------------------------ gradients


def test_gradients_are_those_of_each_sample_alone():
    """And their mean square is what the criterion fisher makes of the same labels."""
    of, found = gradients()
    params, images = params_of(), random_images(DIMS, 20, dtype=np.float32)
    masks = full_masks(DIMS)
    key = jax.random.fold_in(jax.random.key(0), 1)  # of the second draw
    labels = draw_labels(vit.forward(DIMS, params, images), key, np.arange(20))

    def loss(params, masks, batch):
        return objective_loss(Objective(), vit.forward(DIMS, params, batch["image"], masks), batch)[0]

    @jax.jit
    def one(masks, image, label):
        batch = {"image": image[None], "label": label[None]}
        return ravel_pytree(jax.grad(lambda m: loss(params, m, batch).sum())(masks))[0]

    for sample in (0, 7, 19):
        expected = np.asarray(one(masks, images[sample], labels[sample]))[of.units]
        ours = found[:, sample * DRAWS + 1]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())  # float32 sums
    fisher = jax.jit(functools.partial(saliency.fisher, loss))(params, masks, {"image": images, "label": labels})
    squares = np.square(found[:, 1::DRAWS]).mean(1)
    np.testing.assert_allclose(
        squares, np.asarray(ravel_pytree(fisher)[0])[of.units], rtol=1e-3, atol=1e-6 * squares.max()
    )


def test_the_expectation_over_all_labels_is_the_hessian_of_the_kl():
    """At the unpruned model: the sum over labels of their probability times gg' is H."""
    dims = small_dims(embed=6, depth=1, mlp=5)
    params, images = params_of(dims), random_images(dims, 2, dtype=np.float32)
    parallel = Parallel.create("jit", tuple(jax.devices()[:1]))
    index = np.arange(2, dtype=np.int32)
    labels = [np.full(2, label, np.int32) for label in range(dims.classes)]
    batches = [parallel.shard({"image": images, "index": index, "label": label}) for label in labels]
    steps = Walk(dims, Images(batches, [False] * len(batches), parallel), lambda image: image)
    of = cross.candidates(dims, any_unit)
    rows = steps.gate_gradients(
        params, of.units, 0, 1, lambda out, batch: objective_loss(Objective(), out, batch)[0], quiet
    )
    chances = jax.nn.softmax(vit.forward(dims, params, images)[:, 0])
    expected = (rows * np.asarray(chances).T.ravel()) @ rows.T / len(images)
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, full_masks(dims)))

    def kl(gates):
        ours = jax.nn.log_softmax(vit.forward(dims, params, images, unravel(gates))[:, 0])
        return (chances * (jnp.log(chances) - ours)).sum(-1).mean()

    hessian = np.asarray(jax.jit(jax.hessian(kl))(flat))[np.ix_(of.units, of.units)]
    # Second derivatives in float32.
    np.testing.assert_allclose(expected, hessian, rtol=0, atol=1e-4 * np.abs(hessian).max())


# ----------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_rises_are_those_of_the_matrix(weight):
    """Written out in float64, every step the best of all that are left."""
    of, rows = gradients(may_go=lambda kind, block: kind in NO_HEADS)
    path = one_path(of, rows, weight)
    wide = rows.astype(np.float64)
    h = wide @ wide.T / rows.shape[1]
    gone = np.zeros(len(h), bool)
    scale = np.abs(h).max()
    for unit, rise in zip(path.order, path.rises, strict=True):
        expected = h.diagonal() / 2 + weight * h[:, gone].sum(1)
        assert rise == pytest.approx(expected[unit], abs=1e-5 * scale)  # float32 sums of up to 100 gradients
        left = ~gone
        assert (
            expected[unit] / of.saving[unit]
            <= (expected[left] / of.saving[left]).min() + 1e-5 * scale / of.saving.min()
        )
        gone[unit] = True
    assert gone.all()
    v = np.ones(len(h))
    assert sum(path.rises) == pytest.approx((1 - weight) * h.trace() / 2 + weight * v @ h @ v / 2, rel=1e-4)


def test_a_head_is_what_is_left_of_it_and_takes_its_dims_along():
    """Without all of its value dims a head is nothing; a query/key dim counts no more once its head is gone."""
    of, rows = gradients(may_go=lambda kind, block: kind in ("head", "qk", "v"))
    head = int(np.flatnonzero(of.head < 0)[1])
    own = {
        kind: [int(u) for u in np.flatnonzero(of.head == head) if _kind(of.units[u]) == kind] for kind in ("qk", "v")
    }
    path = cross.Path(of, rows, 1.0)
    for unit in own["v"]:
        path.remove(unit)
    before = path.total
    path.remove(head)
    # The head's gate and its value dims' gates scale the same products, which float32 sums in another order.
    np.testing.assert_allclose(path.total, before, atol=1e-4 * np.abs(before).max())
    again = cross.Path(of, rows, 1.0)
    again.remove(own["qk"][0])
    again.remove(head)
    np.testing.assert_allclose(again.total, rows[head], atol=1e-4 * np.abs(rows[head]).max())
    assert sum(again.rises) == pytest.approx(again.loss, rel=1e-3)
    assert not again.left[own["qk"] + own["v"]].any()


def _kind(place):
    sizes = np.cumsum([np.prod(shape) for shape in DIMS.unit_shapes()])
    return KINDS[int(np.searchsorted(sizes, place, side="right"))]


def test_units_that_cancel_go_together():
    """The third undoes the first two, so that all three cost nothing; alone it is the dearest of all."""
    rng = np.random.default_rng(0)
    a, b, c, d = (r / np.sqrt(np.square(r).mean()) for r in np.linalg.qr(rng.standard_normal((200, 4)))[0].T)
    of, rows = planted([0.5 * (a + b), 0.5 * (a - b), -a, 0.9 * c, 0.9 * d])
    assert one_path(of, rows, 0.0).order[-1] == 2
    ours = one_path(of, rows, 1.0)
    assert set(ours.order[:3]) == {0, 1, 2}
    assert sum(ours.rises[:3]) == pytest.approx(0, abs=1e-6)  # of about 1, in float32
    scores = cross.unit_scores(ours)
    assert scores[:3].max() < 1e-6 < scores[3:].min()
    assert (np.diff(scores[ours.order]) > 0).all()


def test_units_that_do_the_same_do_not_all_go():
    """Three copies: one may go for little, all three cost nine times as much; the diagonal takes them all first."""
    rng = np.random.default_rng(1)
    a, b, c = (r / np.sqrt(np.square(r).mean()) for r in np.linalg.qr(rng.standard_normal((200, 3)))[0].T)
    of, rows = planted([a, a, a, 1.2 * b, 1.2 * c])
    assert set(one_path(of, rows, 0.0).order[:3]) == {0, 1, 2}
    assert (
        set(one_path(of, rows, 1.0).order[:3]) == {0, 3, 4}
        or len({0, 1, 2} & set(one_path(of, rows, 1.0).order[:3])) == 1
    )


def test_savings_are_weighed():
    of, rows = planted(np.diag([1.0, 1.2, 1.4]), saving=[1, 2, 4])
    assert one_path(of, rows, 0.5).order == [2, 1, 0]
    np.testing.assert_allclose(cross.unit_scores(one_path(of, rows, 0.5)), np.square([1.0, 1.2, 1.4]) / 6, rtol=1e-6)


def test_rounds_of_several_units_end_close_by(monkeypatch):
    of, rows = gradients(may_go=lambda kind, block: kind == "mlp")
    exact = one_path(of, rows, 0.5)
    monkeypatch.setattr(cross, "_ROUNDS", 16)
    assert cross.rounds(of) == 16
    rough = one_path(of, rows, 0.5)
    assert sorted(rough.order) == sorted(exact.order) and rough.order != exact.order
    assert sum(rough.rises) == pytest.approx(sum(exact.rises), rel=1e-4)  # the rises are exact all the same
    half = slice(len(rough.order) // 2)
    assert sum(rough.rises[half]) == pytest.approx(sum(exact.rises[half]), rel=0.25)


# ---------------------------------------------------------------------------------------------------- scores


def test_the_weight_follows_what_the_cross_terms_are_worth():
    """Units that have nothing to do with each other, and few samples: nothing. Four directions that all share: much."""
    of, _ = planted(np.zeros((60, 1)))
    rng = np.random.default_rng(3)
    scale = np.exp(0.3 * rng.standard_normal((60, 1)))
    noise = (scale * rng.standard_normal((60, 100))).astype(np.float32)
    assert cross.choose(of, noise[:, :20], noise[:, 20:], quiet) <= 0.1
    mixing = rng.standard_normal((60, 4))
    signal = (mixing @ rng.standard_normal((4, 1000))).astype(np.float32)
    assert cross.choose(of, signal[:, :800], signal[:, 800:], quiet) >= 0.25


def test_without_cross_terms_it_ranks_as_fisher():
    of, rows = gradients(may_go=lambda kind, block: kind in NO_HEADS)
    flat = np.zeros(sum(int(np.prod(s)) for s in DIMS.unit_shapes()))
    scores = []
    for values in (np.square(rows, dtype=np.float64).mean(1), cross.unit_scores(one_path(of, rows, 0.0))):
        flat[of.units] = values
        scores.append(ravel_pytree(full_masks(DIMS))[1](flat.astype(np.float32)))
    policy = Policy(sizes=group_sizes("cpu") | {"embed": 2, "mlp": 2}, floors=dict.fromkeys(KINDS, 1), kinds=NO_HEADS)
    targets = make_targets({"macs_ratio": 0.5}, DIMS, None)
    fisher, ours = (rank(s, full_masks(DIMS), DIMS, policy, targets) for s in scores)
    assert ours.dims != DIMS and [r[:3] for r in ours.removed] == [r[:3] for r in fisher.removed]
    for a, b in zip(ours.masks, fisher.masks, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_number_of_devices_does_not_matter():
    (of, one), (_, four) = gradients(), gradients(devices=4)
    np.testing.assert_allclose(four, one, rtol=0, atol=1e-5 * np.abs(one).max())
    held = np.arange(one.shape[1]) % 5 == 4
    (a, weight), (b, other) = (cross.score(DIMS, of, g, held, quiet) for g in (one, four))
    assert weight == other
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-3 * max(np.abs(s).max() for s in a))


def test_ragged_models_and_what_may_not_go():
    dims = dataclasses.replace(small_dims(), heads=(2, 1), mlp=(12, 7))
    of = cross.candidates(dims, lambda kind, block: kind == "mlp" or (kind, block) == ("head", 1))
    scores, _ = cross.score(dims, of, np.ones((len(of.units), 10), np.float32), np.zeros(10, bool), quiet)
    assert [int((s > 0).sum()) for s in scores] == [0, 0, 0, 0, 19]  # the only head of a block saves nothing by itself


def test_what_does_not_go_together_is_said():
    with pytest.raises(UserError, match="is 0 at the unpruned model"):
        Scoring(criterion="fisher_set", loss="kl")
