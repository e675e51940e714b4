"""The rule "solve": the least score there is, as found by trying all widths and by an integer program."""

import dataclasses
import itertools

import numpy as np
import pytest
from conftest import small_dims
from scipy import optimize
from test_ranking import DIMS, ONES, policy, scores

from nvit_jax.model.dims import KINDS, Units, count_macs, preset
from nvit_jax.model.masks import full_masks, kept_dims
from nvit_jax.pruning import allocation
from nvit_jax.pruning.allocation import allocate
from nvit_jax.pruning.ranking import Target, group_sizes, make_targets, rank, remove, smallest_dims, weakest

NONE = ONES | {"head": 0, "mlp": 0}  # floors: parts may go whole
FIELDS = ("heads", "qk", "v", "mlp")


def drawn(dims, seed, below=0.0) -> Units:
    """Exponential, shifted so that a few are below 0."""
    rng = np.random.default_rng(seed)
    return Units(*(rng.exponential(size=m.shape) - below for m in full_masks(dims)))


def width_target(kind: str, limit: float) -> Target:
    """A cost that counts the widths of one kind."""
    return Target(kind, lambda d: float(np.sum(getattr(d, kind))), limit, float(np.sum(getattr(DIMS, kind))))


def total(found) -> float:
    """The sum that is the least."""
    return sum(max(r.score, 0) for r in found.removed)


def removed_score(units, masks, dims):
    """Of what went, the dims of a removed head not counted on their own."""
    gone = Units(*(np.asarray(m) == 0 for m in masks))
    alive = np.asarray(masks.head)[:, :, None] > 0
    total = sum(float(getattr(units, k)[getattr(gone, k)].sum()) for k in ("embed", "head", "mlp"))
    return total + sum(float((getattr(units, k) * getattr(gone, k) * alive).sum()) for k in ("qk", "v"))


def least_score(units, dims, p, targets):
    """By trying all widths; without heads there is one way for the dims."""
    best = np.inf
    for embed in range(1, dims.embed + 1):
        for blocks in itertools.product(
            itertools.product(
                *(range(p.floors[k], getattr(dims, f)[0] + 1) for k, f in zip(KINDS[1:], FIELDS, strict=True))
            ),
            repeat=dims.depth,
        ):
            heads, qk, v, mlp = zip(*blocks, strict=True)
            if any(not h and (q, w) != (1, 1) for h, q, w in zip(heads, qk, v, strict=True)):
                continue
            small = dataclasses.replace(dims, embed=embed, heads=heads, qk=qk, v=v, mlp=mlp)
            if all(t.holds(small) for t in targets):
                masks = full_masks(dims)
                for slot, count in slots_of(dims, small):
                    for _ in range(count):
                        masks = remove(masks, slot[0], weakest(slot, units, masks, dims, p))
                best = min(best, removed_score(units, masks, dims))
    return best


def slots_of(dims, small):
    yield ("embed", 0), dims.embed - small.embed
    for kind, field in (("head", "heads"), ("qk", "qk"), ("v", "v"), ("mlp", "mlp")):
        for i in range(dims.depth):
            along = kind in ("qk", "v") and not small.heads[i]
            yield (kind, i), 0 if along else getattr(dims, field)[i] - getattr(small, field)[i]


def steps(kind, block, units, masks, dims, p):
    """What goes group by group: [(units, sum of scores, masks)], the first with nothing gone."""
    found = [(0, 0.0, masks)]
    while p.may_go(kind, block) and (pick := weakest((kind, block), units, found[-1][2], dims, p)) is not None:
        gone, score, masks = found[-1]
        found.append((gone + pick.units, score + max(pick.score, 0), remove(masks, kind, pick)))
    return found


def least_by_milp(units, masks, dims, p, targets):
    """The plain integer program, without bounds and prices: for each embed width one variable for every option."""
    now, best = kept_dims(masks, dims), np.inf
    limits = np.array([t.limit / t.dense for t in targets])
    for gone, score, _ in steps("embed", 0, units, masks, dims, p):
        wide = dataclasses.replace(now, embed=now.embed - gone)
        whole = np.array([t.cost(wide) / t.dense for t in targets])
        options = []  # part, score, what is saved of each cost
        for i in range(dims.depth):
            alone = {f: getattr(wide, f)[i] for f in ("heads", "qk", "v", "mlp")}

            def cost(wide=wide, alone=alone, **less):
                one = dataclasses.replace(wide, **{f: (w - less.get(f, 0),) for f, w in alone.items()})
                return np.array([t.cost(one) / t.dense for t in targets])

            for heads, of_heads, left in steps("head", i, units, masks, dims, p):
                rows = (steps(kind, i, units, left, dims, p) for kind in ("qk", "v"))
                for (qk, of_qk, _), (v, of_v, _) in itertools.product(*rows):
                    saved = cost() - cost(heads=heads, qk=qk, v=v)
                    options.append((2 * i, of_heads + of_qk + of_v, saved))
            for mlp, of_mlp, _ in steps("mlp", i, units, masks, dims, p):
                options.append((2 * i + 1, of_mlp, cost() - cost(mlp=mlp)))
        part, sums, saved = (np.array(column) for column in zip(*options, strict=True))
        one_each = (part == np.arange(2 * dims.depth)[:, None]).astype(float)
        found = optimize.milp(
            sums,
            integrality=np.ones(len(sums)),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                # In thousandths, so that the solver's 1e-6 is less than a MAC or a parameter.
                optimize.LinearConstraint(1e3 * saved.T, 1e3 * (whole - limits) - 1e-5),
            ],
            options={"mip_rel_gap": 0},
        )
        if found.x is not None:
            best = min(best, score + found.fun)
    return best


@pytest.mark.parametrize(
    ("align", "spec", "floors"),
    [
        ("per_head", {"macs_ratio": 0.6}, ONES),
        ("shared", {"macs_ratio": 0.7, "params_ratio": 0.6}, ONES),
        ("shared", {"macs_ratio": 0.6}, NONE),
        ("per_head", {"macs_ratio": 0.45, "params_ratio": 0.5}, NONE),
    ],
)
def test_solve_is_the_best_of_all_widths(align, spec, floors):
    dims, p = small_dims(embed=3, depth=2, heads=2, qk=2, v=2, mlp=3, patch=8), policy(align=align, floors=floors)
    for seed in range(3):
        units, targets = drawn(dims, seed), make_targets(spec, dims, None)
        found = allocate(units, full_masks(dims), dims, p, targets)
        assert found.met and all(t.cost(found.dims) <= t.limit for t in targets)
        assert kept_dims(found.masks, dims) == found.dims
        score = removed_score(units, found.masks, dims)
        assert score == pytest.approx(total(found)) == pytest.approx(least_score(units, dims, p, targets))
        assert score <= removed_score(units, rank(units, full_masks(dims), dims, p, targets).masks, dims) + 1e-9


@pytest.mark.parametrize("kinds", [KINDS, KINDS[1:]])
@pytest.mark.parametrize(
    ("spec", "floors"),
    [
        ({"macs_ratio": 0.55}, ONES | {"mlp": 4}),
        ({"params": 2900.0}, ONES | {"mlp": 4}),
        ({"macs_ratio": 0.6, "params_ratio": 0.58}, ONES | {"mlp": 4}),
        ({"macs_ratio": 0.35, "params_ratio": 0.48}, NONE),
    ],
)
def test_solve_is_what_an_integer_program_finds(kinds, spec, floors):
    dims = small_dims(embed=9, depth=3, heads=3, qk=6, v=5, mlp=22, patch=4)
    sizes = {"embed": 3, "head": 1, "qk": 2, "v": 2, "mlp": 4}  # v and mlp leave a remainder
    p = policy(sizes=sizes, kinds=kinds, floors=floors)
    targets = make_targets(spec, dims, None)
    above_bound = 0
    for seed in range(3):
        units = drawn(dims, seed, below=0.05)
        found = allocate(units, full_masks(dims), dims, p, targets)
        least = least_by_milp(units, full_masks(dims), dims, p, targets)
        assert found.met and total(found) == pytest.approx(least, abs=1e-6)  # what the integer program is exact to
        if floors is NONE and kinds is not KINDS:  # otherwise embed may do
            assert 0 in (*found.dims.heads, *found.dims.mlp)
        above_bound += total(rank(units, full_masks(dims), dims, p, targets)) > least + 1e-6
    assert above_bound  # a rule that stops short of the best would be seen


def test_solve_goes_on_from_masks_and_ragged_blocks():
    widths = {"heads": (3, 2, 4), "qk": (6, 4, 2), "v": (4, 6, 4), "mlp": (12, 9, 20)}
    dims = dataclasses.replace(small_dims(embed=8, depth=3), **widths)
    p = policy(sizes={"embed": 2, "head": 1, "qk": 2, "v": 2, "mlp": 3}, protected=(1,))
    units, masks = drawn(dims, 0), full_masks(dims)
    for ratio in (0.8, 0.6):
        targets = make_targets({"macs_ratio": ratio}, dims, None)
        found = allocate(units, masks, dims, p, targets)
        assert found.met and total(found) == pytest.approx(least_by_milp(units, masks, dims, p, targets), abs=1e-6)
        masks = found.masks


@pytest.mark.parametrize("kinds", [KINDS, KINDS[1:]])
def test_a_looser_target_never_costs_a_higher_score(kinds):
    dims = preset("deit_tiny", depth=3)
    units, sizes = drawn(dims, 0), group_sizes("cpu") | {"embed": 48}
    sums = []
    for ratio in np.linspace(0.4, 0.95, 8):
        targets = make_targets({"macs_ratio": ratio}, dims, None)
        found = allocate(units, full_masks(dims), dims, policy(sizes=sizes, kinds=kinds), targets)
        assert found.met
        sums.append(total(found))
    assert sums == sorted(sums, reverse=True) and sums[0] > sums[-1]


@pytest.mark.parametrize(
    "cost",
    [
        lambda d: count_macs(d) ** 0.5,
        lambda d: float(max(d.mlp) * d.depth + sum(d.heads) * min(d.qk)),
        lambda d: sum(h * q * m for h, q, m in zip(d.heads, d.qk, (*d.mlp[1:], d.mlp[0]), strict=True)) / d.embed**0.5,
    ],
)
def test_targets_hold_for_costs_that_are_no_sum_over_the_blocks(cost):
    dims, p = small_dims(embed=8, depth=3, heads=2, qk=4, v=4, mlp=12, patch=4), policy(floors=ONES | {"embed": 4})
    target = Target("latency_ms", cost, 0.6 * cost(dims), cost(dims))
    for seed in range(3):
        found = allocate(drawn(dims, seed), full_masks(dims), dims, p, [target])
        assert found.met and cost(found.dims) <= target.limit and found.removed


def test_ties_are_broken_the_same_way():
    dims, p = small_dims(embed=8, depth=3, heads=2, qk=4, v=4, mlp=12, patch=4), policy()
    targets = make_targets({"macs_ratio": 0.6, "params_ratio": 0.7}, dims, None)
    rng = np.random.default_rng(0)
    units = Units(*(rng.integers(0, 3, m.shape).astype(float) for m in full_masks(dims)))
    found, again = (allocate(units, full_masks(dims), dims, p, targets) for _ in range(2))
    assert found.removed == again.removed and total(found) == pytest.approx(
        least_by_milp(units, full_masks(dims), dims, p, targets), abs=1e-6
    )


@pytest.mark.parametrize("costs", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 60])
def test_what_is_dominated_goes_and_nothing_else(costs, count):
    rng = np.random.default_rng(count)
    for most in (3, 30):  # with many ties, and with few
        score, cost = rng.integers(0, most, count).astype(float), rng.integers(0, most, (costs, count)).astype(float)
        all_of = np.vstack([score, cost])
        no_worse = (all_of[:, :, None] <= all_of[:, None]).all(0)  # [i, j]
        equal = no_worse & no_worse.T
        dominated = (no_worse & ~equal).any(0) | (equal & (np.arange(count)[:, None] < np.arange(count))).any(0)
        assert allocation._undominated(score, cost).tolist() == np.flatnonzero(~dominated).tolist()


def test_what_does_not_fit_in_memory_costs_score_and_not_the_target(monkeypatch):
    dims, p = small_dims(embed=9, depth=3, heads=3, qk=6, v=5, mlp=22, patch=4), policy()
    targets = make_targets({"macs_ratio": 0.5, "params_ratio": 0.55}, dims, None)
    units = drawn(dims, 1)
    whole = allocate(units, full_masks(dims), dims, p, targets)
    monkeypatch.setattr(allocation, "_STATES", 2)
    some = allocate(units, full_masks(dims), dims, p, targets)
    assert some.met and total(some) >= total(whole) - 1e-9


def test_solve_reaches_the_floors_and_scores_of_zero():
    p = policy(floors=ONES | {"mlp": 2})
    smallest = smallest_dims(DIMS, p)
    floor = [Target("macs", count_macs, float(count_macs(smallest)), float(count_macs(DIMS)))]
    assert allocate(scores(), full_masks(DIMS), DIMS, p, floor).dims == smallest
    none = Units(*(0 * u for u in scores()))
    found = allocate(none, full_masks(DIMS), DIMS, p, make_targets({"macs_ratio": 0.7}, DIMS, None))
    assert found.met and total(found) == 0 and count_macs(found.dims) > count_macs(smallest)


@pytest.mark.parametrize("spec", [{"macs_ratio": 0.5}, {"latency_ratio": 0.54}, {"params": 1.5e6}])
def test_solve_ends_at_the_target_or_less_than_a_group_below(spec):
    """No group can be given back."""
    dims = preset("deit_tiny", depth=4)
    units = Units(*(np.random.default_rng(1).exponential(size=m.shape) for m in full_masks(dims)))
    targets = make_targets(spec, dims, lambda d: 0.1 + count_macs(d) / 1e9)
    p = policy(sizes=group_sizes("cpu"), floors=group_sizes("cpu"))
    found = allocate(units, full_masks(dims), dims, p, targets)
    assert found.met and targets[0].cost(found.dims) <= targets[0].limit
    for (kind, block), count in slots_of(dims, found.dims):
        if count:
            more = min(p.size(kind, dims, block), count)
            if kind == "embed":
                wider = dataclasses.replace(found.dims, embed=found.dims.embed + more)
            else:
                field = {"head": "heads"}.get(kind, kind)
                widths = list(getattr(found.dims, field))
                widths[block] += more
                wider = dataclasses.replace(found.dims, **{field: tuple(widths)})
            assert not targets[0].holds(wider), (kind, block)


def test_solve_sees_what_a_single_group_does_not_save():
    """Pairs of neurons cost; one alone saves nothing, so going down group by group starts in the wrong block."""
    units = scores(mlp=[[0.5, 9, 9, 9], [1, 1, 9, 9]])
    target = [Target("pairs", lambda d: float(sum(-(-m // 2) for m in d.mlp)), 3, 4.0)]
    p = policy(kinds=("mlp",))
    found = allocate(units, full_masks(DIMS), DIMS, p, target)
    assert found.dims.mlp == (4, 2) and [r.score for r in found.removed] == [1, 1]
    assert removed_score(units, rank(units, full_masks(DIMS), DIMS, p, target).masks, DIMS) > 9


def test_solve_does_not_go_below_the_target_for_scores_below_zero():
    units = scores(mlp=[[-1, -1, -1, 1], [-1, -1, -1, 1]])
    found = allocate(units, full_masks(DIMS), DIMS, policy(kinds=("mlp",)), [width_target("mlp", 5)])
    assert sum(found.dims.mlp) == 5 and found.nonpositive == 3


def test_solve_keeps_floors_protected_blocks_and_masks():
    dims = preset("deit_tiny", depth=4)
    rng = np.random.default_rng(1)
    units = Units(*(rng.exponential(size=m.shape) for m in full_masks(dims)))
    sizes = group_sizes("cpu")
    p = policy(sizes=sizes, floors=sizes | {"mlp": 400}, protected=(1,), kinds=("mlp", "head", "qk"))
    target = make_targets({"macs_ratio": 0.8}, dims, None)
    found = allocate(units, full_masks(dims), dims, p, target)
    assert found.met and found.dims.embed == dims.embed and found.dims.v == dims.v and min(found.dims.mlp) >= 400
    assert (found.dims.heads[1], found.dims.qk[1], found.dims.mlp[1]) == (3, 64, 768)
    more = allocate(units, found.masks, dims, p, make_targets({"macs_ratio": 0.75}, dims, None))
    assert all((a <= b).all() for a, b in zip(more.masks, found.masks, strict=True)) and more.met
    kept = allocate(units, found.masks, dims, p, target)
    assert not kept.removed and kept.met
    impossible = allocate(units, full_masks(dims), dims, p, make_targets({"macs_ratio": 0.1}, dims, None))
    assert impossible.exhausted and not impossible.met
