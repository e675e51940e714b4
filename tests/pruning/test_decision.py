"""The ranking is fast, and decides as the plain loop over all offers does, which is written out here."""

import dataclasses

import numpy as np
import pytest
from conftest import small_dims

from nvit_jax.latency.roofline import Roofline
from nvit_jax.model.dims import KINDS, Units, ViTDims, count_macs, count_params
from nvit_jax.model.masks import check_masks, full_masks, kept_dims
from nvit_jax.pruning.ranking import Policy, Removal, make_targets, one_block, rank, remove, weakest

FIELDS = {"embed": "embed", "head": "heads", "qk": "qk", "v": "v", "mlp": "mlp"}
ROOFLINE = Roofline(tflops=0.01, gbs=0.02, batch=4, itemsize=4, tile=2)
LATENCY = {
    "a sum over the blocks": ROOFLINE,
    "any function": lambda dims: float(max(dims.mlp) * dims.depth + sum(dims.heads) * dims.embed) ** 0.5,
}


def without(dims: ViTDims, kind: str, block: int, units: int) -> ViTDims:
    if kind == "embed":
        return dataclasses.replace(dims, embed=dims.embed - units)
    widths = list(getattr(dims, FIELDS[kind]))
    widths[block] -= units
    return dataclasses.replace(dims, **{FIELDS[kind]: tuple(widths)})


def slow(scores, masks, dims, policy, targets, max_groups=None):
    """Every offer is made anew before every group, of the costs of whole models."""
    masks = check_masks(masks, dims)
    now, removed = kept_dims(masks, dims), []
    slots = [("embed", 0)] + [(kind, i) for kind in KINDS[1:] for i in range(dims.depth)]
    while unmet := [t for t in targets if not t.holds(now)]:
        offers = []
        for place, slot in enumerate(slots):
            pick = weakest(slot, scores, masks, dims, policy) if policy.may_go(*slot) else None
            if pick is None:
                continue
            then = without(now, *slot, pick.units)
            saving = sum((t.cost(now) - t.cost(then)) / t.dense for t in unmet)
            if policy.rule == "eta":
                key = 1, pick.score - policy.eta * (policy.latency(now) - policy.latency(then))
            elif pick.score <= 0:
                key = 0, -saving
            else:
                key = (1, pick.score / saving) if saving > 0 else (2, pick.score)
            offers.append((key, place, pick))
        if not offers or len(removed) == max_groups:
            break
        key, place, pick = min(offers)
        kind, block = slots[place]
        masks, now = remove(masks, kind, pick), without(now, kind, block, pick.units)
        removed.append(Removal(kind, block, pick.units, pick.score, key[1]))
    return masks, now, removed


def drawn(rng, part, whole=True) -> tuple[ViTDims, Units]:
    """A small ragged model, and scores. For costs that are `whole` numbers some are below 0, and many are tied.

    Tied offers with other costs go by the rounding of their sums, which is not the same.
    """
    uniform = small_dims(embed=int(rng.integers(8, 20)), depth=int(rng.integers(1, 4)), heads=2, qk=2, v=2, mlp=4)
    widths = {
        field: tuple(int(w) for w in rng.integers(low, high, uniform.depth))
        for field, low, high in (("heads", part, 8), ("qk", 1, 7), ("v", 1, 7), ("mlp", part, 24))
    }
    dims = dataclasses.replace(uniform, **widths)
    draw = (lambda shape: rng.integers(-1, 4, shape)) if whole else rng.standard_exponential
    return dims, Units(*(draw(mask.shape) * mask for mask in full_masks(dims)))


SPECS = [
    {"macs_ratio": 0.5},
    {"params_ratio": 0.3},
    {"latency_ratio": 0.6},
    {"macs_ratio": 0.5, "params_ratio": 0.45, "latency_ratio": 0.5},
    {"macs": 1.0},
]


@pytest.mark.parametrize("rule", ["per_cost", "eta"])
@pytest.mark.parametrize("latency", LATENCY)
def test_the_decision_is_that_of_the_plain_loop(rule, latency):
    """To the unit and in the same order: over targets, sizes, floors, alignments, protected blocks and given masks."""
    cost, done = LATENCY[latency], 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        part = seed % 2  # whether parts may go whole
        spec = SPECS[seed % len(SPECS)]
        dims, scores = drawn(rng, part, whole=rule == "per_cost" and "latency_ratio" not in spec)
        align = ("per_head", "shared")[seed // 2 % 2]
        if align == "shared":
            scores = scores._replace(qk=scores.qk[:, :1] + 0 * scores.qk, v=scores.v[:, :1] + 0 * scores.v)
        policy = Policy(
            sizes={kind: int(rng.integers(1, 5)) for kind in KINDS},
            floors=dict.fromkeys(KINDS, 1) | {"head": part, "mlp": part},
            kinds=KINDS if seed % 3 else ("mlp", "head", "qk"),
            protected=(0,) if seed % 5 == 0 else (),
            align=align,
            rule=rule,
            eta=0.1 / cost(dims),
            latency=cost,
        )
        targets = make_targets(spec, dims, cost)
        some = 3 if seed % 4 == 0 else None
        masks = full_masks(dims)
        for _ in range(2):  # the second time from the masks of the first
            found = rank(scores, masks, dims, policy, targets, some)
            wanted, now, removed = slow(scores, masks, dims, policy, targets, some)
            assert [r[:4] for r in found.removed] == [r[:4] for r in removed]
            assert np.allclose([r.key for r in found.removed], [r.key for r in removed], rtol=1e-6, atol=0)  # of sums
            assert found.dims == now and all((a == b).all() for a, b in zip(found.masks, wanted, strict=True))
            masks, targets = found.masks, [t._replace(limit=0.8 * t.limit) for t in targets]
            done += len(removed)
    assert done > 200


@pytest.mark.parametrize("cost", [count_macs, count_params, ROOFLINE])
def test_what_a_block_saves_is_the_same_alone(cost):
    """What the ranking relies on for these costs, and for no others."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        dims, _ = drawn(rng, part=1)
        block, kind = int(rng.integers(dims.depth)), KINDS[1 + seed % 4]
        if getattr(dims, FIELDS[kind])[block] < 2:
            continue
        then = without(dims, kind, block, 1)
        alone = [
            cost(one_block(d, d.embed, d.heads[block], d.qk[block], d.v[block], d.mlp[block])) for d in (dims, then)
        ]
        assert cost(dims) - cost(then) == pytest.approx(alone[0] - alone[1], rel=1e-9)


def test_a_ranking_asks_a_cost_of_few_whole_models(monkeypatch):
    """Of the blocks that did not change nothing is asked again: time grows with the groups, not with their square."""
    asked = []

    class Counting(Roofline):
        def __call__(self, dims):
            asked.append(dims.depth)
            return super().__call__(dims)

    dims = small_dims(embed=8, depth=12, heads=2, qk=4, v=4, mlp=32)
    scores = Units(*(np.random.default_rng(0).exponential(size=m.shape) for m in full_masks(dims)))
    policy = Policy(sizes=dict.fromkeys(KINDS, 1), floors=dict.fromkeys(KINDS, 1), kinds=KINDS[1:])
    targets = make_targets({"latency_ratio": 0.5}, dims, Counting(tflops=0.01, gbs=0.02, batch=4, itemsize=4))
    found = rank(scores, full_masks(dims), dims, policy, targets)
    assert len(found.removed) > 50
    assert sum(depth == 12 for depth in asked) <= len(found.removed) + 4
    assert len(asked) <= 8 * len(found.removed) + 60
