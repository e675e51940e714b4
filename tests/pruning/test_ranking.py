"""Literal scores in, literal masks out; targets met exactly; refusals."""

import dataclasses

import numpy as np
import pytest
from conftest import small_dims

from nvit_jax.errors import UserError
from nvit_jax.model.dims import KINDS, Units, count_macs, count_params, preset
from nvit_jax.model.masks import full_masks, kept_dims
from nvit_jax.pruning.allocation import allocate
from nvit_jax.pruning.ranking import (
    Policy,
    Target,
    check_reachable,
    group_sizes,
    make_targets,
    rank,
    smallest_dims,
)

DIMS = small_dims(embed=4, depth=2, heads=2, qk=2, v=2, mlp=4, patch=8)
ONES = dict.fromkeys(KINDS, 1)


def policy(**changes) -> Policy:
    return Policy(**({"sizes": ONES, "floors": ONES} | changes))


def scores(dims=DIMS, **values) -> Units:
    """1 everywhere but for what is given."""
    units = full_masks(dims)
    return Units(
        *(np.array(values[k], float) if k in values else u.astype(float) for k, u in zip(KINDS, units, strict=True))
    )


def width_target(kind: str, limit: float) -> Target:
    """A cost that counts the widths of one kind: savings are equal, so that scores alone decide."""
    field = {"embed": "embed", "head": "heads"}.get(kind, kind)

    def cost(dims):
        return float(np.sum(getattr(dims, field)))

    return Target(kind, cost, limit, cost(DIMS))


def test_the_weakest_neurons_of_the_whole_model_go():
    found = rank(
        scores(mlp=[[0.1, 0.9, 0.2, 0.5], [0.7, 0.8, 0.3, 0.6]]),
        full_masks(DIMS),
        DIMS,
        policy(kinds=("mlp",)),
        [width_target("mlp", 5)],
    )
    assert found.masks.mlp.tolist() == [[0, 1, 0, 1], [1, 1, 0, 1]]
    assert [(r.kind, r.block, r.units, r.score) for r in found.removed] == [
        ("mlp", 0, 1, 0.1),
        ("mlp", 0, 1, 0.2),
        ("mlp", 1, 1, 0.3),
    ]
    assert found.met and found.dims == dataclasses.replace(DIMS, mlp=(2, 3))
    assert found.threshold == pytest.approx(0.3 * 8)  # score per fraction of the cost


def test_groups_are_sums_and_the_remainder_goes_first():
    dims = small_dims(embed=4, depth=1, heads=2, qk=2, v=2, mlp=5, patch=8)
    target = Target("mlp", lambda d: float(d.mlp[0]), 4, 5.0)
    sizes = ONES | {"mlp": 2}
    units = scores(dims, mlp=[[5.0, 1.0, 2.0, 3.0, 4.0]])
    once = rank(units, full_masks(dims), dims, policy(sizes=sizes, kinds=("mlp",)), [target])
    assert once.masks.mlp.tolist() == [[1, 0, 1, 1, 1]]  # 5 = 1 + 2 x 2: what is kept is a multiple
    twice = rank(units, once.masks, dims, policy(sizes=sizes, kinds=("mlp",)), [target._replace(limit=3)])
    assert twice.masks.mlp.tolist() == [[1, 0, 0, 0, 1]]
    assert twice.removed[0].score == 5.0  # 2 + 3


def test_per_head_rows_take_each_heads_own_weakest():
    qk = [[[0.1, 0.9], [0.8, 0.2]], [[1.0, 1.0], [1.0, 1.0]]]
    target = [width_target("qk", 3)]
    per_head = rank(scores(qk=qk), full_masks(DIMS), DIMS, policy(kinds=("qk",)), target)
    assert per_head.masks.qk.tolist() == [[[0, 1], [1, 0]], [[1, 1], [1, 1]]]
    assert per_head.removed[0].score == pytest.approx(0.3)
    shared = rank(scores(qk=qk), full_masks(DIMS), DIMS, policy(kinds=("qk",), align="shared"), target)
    assert shared.masks.qk.tolist() == [[[0, 1], [0, 1]], [[1, 1], [1, 1]]]  # 0.1 + 0.8 < 0.9 + 0.2
    assert shared.removed[0].score == pytest.approx(0.9)


def test_a_removed_head_takes_its_dims_along_and_its_rows_are_made_anew():
    units = scores(head=[[0.0, 9.0], [9.0, 9.0]], qk=[[[0.0, 0.0], [7.0, 3.0]], [[9.0, 9.0], [9.0, 9.0]]])
    cost = Target("both", lambda d: float(sum(d.heads) + sum(d.qk)), 6, 8.0)
    found = rank(units, full_masks(DIMS), DIMS, policy(kinds=("head", "qk")), [cost])
    assert found.masks.head.tolist() == [[0, 1], [1, 1]]
    assert found.masks.qk.tolist() == [[[0, 0], [1, 0]], [[1, 1], [1, 1]]]
    assert [(r.kind, r.score) for r in found.removed] == [("head", 0.0), ("qk", 3.0)]


def test_ties_go_by_kind_then_block_then_index():
    found = rank(scores(), full_masks(DIMS), DIMS, policy(kinds=("mlp",)), [width_target("mlp", 5)])
    assert found.masks.mlp.tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    target = Target("all", lambda d: float(sum(d.heads) + sum(d.v)), 7, 8.0)
    first = rank(scores(), full_masks(DIMS), DIMS, policy(kinds=("v", "head")), [target]).removed
    # The score of a row of value dims is the sum over two heads, so the head, 1, is the lower.
    assert [(r.kind, r.block) for r in first] == [("head", 0)]


def test_nonpositive_scores_go_first_the_largest_saving_first():
    costs = np.array([1.0, 10.0])
    target = Target("weighted", lambda d: float(costs @ d.mlp), 30, 44.0)
    found = rank(
        scores(mlp=[[-5.0, 1, 1, 1], [-0.1, 1, 1, 1]]), full_masks(DIMS), DIMS, policy(kinds=("mlp",)), [target]
    )
    assert [(r.block, r.score) for r in found.removed[:2]] == [(1, -0.1), (0, -5.0)]
    assert found.nonpositive == 2


def test_groups_that_save_nothing_go_last_the_least_score_first():
    impossible = Target("qk alone", lambda d: float(sum(d.qk)), 0, float(sum(DIMS.qk)))
    units = scores(mlp=[[7, 7, 7, 7], [1, 1, 1, 1]])._replace(qk=50 * full_masks(DIMS).qk)
    found = rank(units, full_masks(DIMS), DIMS, policy(kinds=("mlp", "qk")), [impossible])
    order = [(r.kind, r.block) for r in found.removed]
    each = DIMS.qk[0] - 1
    assert order == [("qk", 0)] * each + [("qk", 1)] * each + [("mlp", 1)] * 3 + [("mlp", 0)] * 3
    assert np.isfinite(found.threshold)


def test_eta_rule_is_nvit_equation_7():
    latency = lambda d: float(np.array([1.0, 3.0]) @ d.mlp)  # noqa: E731
    units = scores(mlp=[[0.5, 9, 9, 9], [0.6, 9, 9, 9]])
    target = [Target("latency_ms", latency, 15, latency(DIMS))]
    low = rank(units, full_masks(DIMS), DIMS, policy(kinds=("mlp",), rule="eta", eta=0.01, latency=latency), target)
    assert [r.block for r in low.removed] == [0]  # 0.5 - 0.01 < 0.6 - 0.03
    assert low.threshold == pytest.approx(0.49)
    high = rank(units, full_masks(DIMS), DIMS, policy(kinds=("mlp",), rule="eta", eta=0.2, latency=latency), target)
    assert [r.block for r in high.removed] == [1]  # 0.5 - 0.2 > 0.6 - 0.6


def test_floors_protected_blocks_and_kinds_hold():
    rng = np.random.default_rng(0)
    dims = small_dims(embed=16, depth=3, heads=4, qk=4, v=4, mlp=16)
    units = Units(*(rng.random(m.shape) for m in full_masks(dims)))
    floors = {"embed": 10, "head": 2, "qk": 3, "v": 1, "mlp": 5}
    p = policy(floors=floors, protected=(1,), kinds=("embed", "head", "qk", "mlp"), sizes=ONES | {"mlp": 4})
    smallest = smallest_dims(dims, p)
    impossible = Target("macs", count_macs, 1.0, float(count_macs(dims)))
    found = rank(units, full_masks(dims), dims, p, [impossible])
    assert not found.met and found.dims == smallest
    assert (smallest.embed, smallest.heads, smallest.qk) == (10, (2, 4, 2), (3, 4, 3))
    assert (smallest.v, smallest.mlp) == ((4, 4, 4), (8, 16, 8))  # 16 -> 12 -> 8; 4 would be below 5


@pytest.mark.parametrize(
    "spec",
    [{"macs_ratio": 0.5}, {"params_ratio": 0.4}, {"latency_ratio": 0.6}, {"macs_ratio": 0.6, "params_ratio": 0.5}],
)
@pytest.mark.parametrize("align", ["per_head", "shared"])
def test_targets_are_met_and_one_group_explains_the_rest(spec, align):
    dims = preset("deit_tiny", depth=4)
    rng = np.random.default_rng(1)
    units = Units(*(rng.exponential(size=m.shape) for m in full_masks(dims)))

    def latency(d):
        return 0.1 + count_macs(d) / 1e9

    p = policy(sizes=group_sizes("nvit"), floors=group_sizes("nvit") | {"head": 1}, align=align, latency=latency)
    targets = make_targets(spec, dims, latency)
    found = rank(units, full_masks(dims), dims, p, targets)
    assert found.met and all(t.cost(found.dims) <= t.limit for t in targets)
    assert kept_dims(found.masks, dims) == found.dims
    before_last = rank(units, full_masks(dims), dims, p, targets, max_groups=len(found.removed) - 1)
    assert not before_last.met
    again = rank(units, full_masks(dims), dims, p, targets)
    assert all((a == b).all() for a, b in zip(found.masks, again.masks, strict=True))
    assert found.dims.mlp[0] % 16 == found.dims.qk[0] % 8 == found.dims.embed % 16 == 0


def test_max_groups_counts_groups():
    units = scores(mlp=[[0.1, 0.9, 0.2, 0.5], [0.7, 0.8, 0.3, 0.6]])
    found = rank(units, full_masks(DIMS), DIMS, policy(kinds=("mlp",)), [width_target("mlp", 2)], max_groups=2)
    assert len(found.removed) == 2 and not found.met


def test_head_groups_of_two_need_six_heads():
    few, many = small_dims(heads=4, embed=8), small_dims(heads=8, embed=8)
    p = policy(sizes=group_sizes("nvit"))
    assert [p.size("head", d, 0) for d in (few, many)] == [1, 2]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"macs_ratio": 0.0}, r"macs_ratio=0.0: it must be in \(0, 1\]"),
        ({"macs_ratio": 1.5}, r"must be in \(0, 1\]"),
        ({"macs_ratio": -0.5}, r"must be in \(0, 1\]"),
        ({"latency_ms": 0.0}, "must be > 0"),
        ({"latency_ratio": 0.5}, "latency_ratio needs a latency model"),
        ({"macs_ratio": None, "params": None}, "set at least one of macs_ratio, params"),
        ({"energy_ratio": 0.5}, "unknown target"),
    ],
)
def test_impossible_targets_are_refused(spec, words):
    with pytest.raises(UserError, match=words):
        make_targets(spec, DIMS, None)


def test_a_target_below_the_floors_names_the_smallest_reachable():
    dims = preset("deit_tiny", depth=2)
    p = policy(sizes=group_sizes("nvit"), floors=group_sizes("nvit") | {"embed": 96})
    least = count_params(smallest_dims(dims, p)) / count_params(dims)
    check_reachable(dims, p, make_targets({"params_ratio": least + 1e-3}, dims, None))
    with pytest.raises(UserError, match=r"params_ratio=0.01 cannot be met.*smallest reachable is 0.1654"):
        check_reachable(dims, p, make_targets({"params_ratio": 0.01}, dims, None))
    assert 0.1653 < least <= 0.1654
    fewest = count_params(smallest_dims(dims, p))
    with pytest.raises(UserError, match=f"params=1000 cannot be met.*smallest reachable is {fewest}$"):
        check_reachable(dims, p, make_targets({"params": 1000.0}, dims, None))
    check_reachable(dims, p, make_targets({"params": float(fewest)}, dims, None))  # what it said, typed in
    ms = lambda d: count_params(d) / 3e6  # noqa: E731
    with pytest.raises(UserError, match="latency_ms=0.01 cannot be met.*smallest reachable is ") as caught:
        check_reachable(dims, p, make_targets({"latency_ms": 0.01}, dims, ms))
    check_reachable(dims, p, make_targets({"latency_ms": float(str(caught.value).rsplit(" ", 1)[1])}, dims, ms))


@pytest.mark.parametrize("rule", ["per_cost", "solve", "eta"])
@pytest.mark.parametrize("align", ["per_head", "shared"])
def test_floors_of_zero_let_parts_go(rule, align):
    """A target that cannot be reached otherwise is met, from masks, too; with two heads in a group as well."""
    dims = small_dims(embed=8, depth=3, heads=7, qk=2, v=2, mlp=20, patch=4)
    p = policy(
        sizes=ONES | {"head": 2, "mlp": 8},
        floors=ONES | {"head": 0, "mlp": 0},
        protected=(1,),
        kinds=KINDS[1:],
        align=align,
        rule=rule,
        eta=1e-9,
        latency=count_macs,
    )
    least = smallest_dims(dims, p)
    assert (least.heads, least.qk, least.v, least.mlp) == ((0, 7, 0), (0, 2, 0), (0, 2, 0), (0, 20, 0))
    keep = dataclasses.replace(p, floors=ONES)
    targets = make_targets({"macs": float(count_macs(least))}, dims, None)
    with pytest.raises(UserError, match="smallest reachable"):
        check_reachable(dims, keep, targets)
    check_reachable(dims, p, targets)
    rng = np.random.default_rng(0)
    units = Units(*(rng.exponential(size=m.shape) for m in full_masks(dims)))
    if align == "shared":
        units = units._replace(qk=units.qk[:, :1] + 0 * units.qk, v=units.v[:, :1] + 0 * units.v)
    rule_ = allocate if rule == "solve" else rank
    some = rule_(units, full_masks(dims), dims, p, make_targets({"macs_ratio": 0.6}, dims, None))
    assert some.met and kept_dims(some.masks, dims) == some.dims
    found = rule_(units, some.masks, dims, p, targets)
    assert found.met and found.dims == least == kept_dims(found.masks, dims)
    assert rule_(units, found.masks, dims, p, make_targets({"macs": 1.0}, dims, None)).exhausted


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"align": "none"}, "align='none' is not one of per_head, shared"),
        ({"rule": "best"}, "rule='best' is not one of"),
        ({"rule": "eta"}, "needs a latency model"),
        ({"kinds": ("mlp", "token")}, "unknown kind 'token'"),
        ({"floors": ONES | {"qk": 0}}, "floors: qk is 0; it must be at least 1"),
        ({"floors": ONES | {"head": -1}}, "floors: head is -1; it must be at least 0"),
        ({"sizes": ONES | {"v": 0}}, "profile: v is 0"),
    ],
)
def test_bad_policies_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        policy(**changes)


def test_unknown_profile():
    with pytest.raises(UserError, match="nvit, cpu, gpu, tpu"):
        group_sizes("phone")
