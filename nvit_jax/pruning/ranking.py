"""Which units go: hardware-friendly groups, compared over the whole model, until the targets hold. NumPy only.

Each kind of each block (and embed, tied over the model) offers its weakest group; the best offer by the rule is
removed, the offers that this changes are made anew, and so on. Savings are therefore those of the model as it is
when the group goes, not of the model at the start of the step.

Groups. Units are sorted by score, ascending and stable (equal scores: the lower index goes first). A group is the
`size` weakest; where the live count is no multiple of the size, the remainder goes first, so that what is kept is
a multiple. Query/key and value dims go in rows, so that all heads of a block keep the same number: under
align="per_head" row j holds the j-th weakest live dim of every live head, under "shared" the same index of all.

Rules. "per_cost": score / saving, the saving as a fraction of the dense cost, summed over the targets not met yet;
groups with score <= 0 go first, the largest saving first, since a division would reverse them; groups that save
nothing go last. "eta" (NViT
equation 7): score - eta * milliseconds saved. Equal offers: the order of KINDS, then the lower block.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nvit_jax.errors import UserError, check_choice, nearest
from nvit_jax.model.dims import KINDS, PART_KINDS, Units, ViTDims, count_macs, count_params, with_widths
from nvit_jax.model.masks import check_masks, check_scores, kept_dims, normalize

Cost = Callable[[ViTDims], float]
_FIELD = {"embed": "embed", "head": "heads", "qk": "qk", "v": "v", "mlp": "mlp"}
PROFILES = {  # sizes of the groups: embed, head, qk, v, mlp
    "nvit": (16, 2, 8, 8, 16),
    "cpu": (8, 1, 8, 8, 16),
    "gpu": (16, 1, 8, 8, 32),
    "tpu": (128, 1, 8, 8, 128),
}
ALIGNMENTS = ("per_head", "shared")
RULES = ("per_cost", "solve", "eta", "nvit")
_FEW_HEADS = 6  # below this the head group is 1


def group_sizes(profile: str) -> dict[str, int]:
    """{"embed": 16, ...} of a profile."""
    check_choice("profile", profile, tuple(PROFILES))
    return dict(zip(KINDS, PROFILES[profile], strict=True))


class Target(NamedTuple):
    """A hard constraint: cost(dims) <= limit. `dense` is the cost before pruning."""

    name: str
    cost: Cost
    limit: float
    dense: float

    def holds(self, dims: ViTDims) -> bool:
        return self.cost(dims) <= self.limit * (1 + 1e-9)

    @property
    def is_loose(self) -> bool:
        """Whether the unpruned model costs less than it allows."""
        return self.limit > self.dense * (1 + 1e-9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """How units are grouped and compared. Sizes and floors are in units, per block (embed: of the model).

    With a floor of 0 for head (mlp) the attention (mlp) part of a block may go.
    """

    sizes: Mapping[str, int]
    floors: Mapping[str, int]
    kinds: Sequence[str] = KINDS  # what may be removed
    protected: Sequence[int] = ()  # blocks whose own units stay
    align: str = "per_head"
    rule: str = "per_cost"
    eta: float = 0.0
    latency: Cost | None = None  # milliseconds, for the rules "eta" and "nvit"

    def __post_init__(self) -> None:
        check_choice("align", self.align, ALIGNMENTS)
        check_choice("rule", self.rule, RULES)
        if self.rule in ("eta", "nvit") and (self.latency is None or not 0 <= self.eta < math.inf):
            raise UserError(f'="{self.rule}" needs a latency model and eta >= 0', "rule")
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise UserError(f": unknown kind {unknown[0]!r}; there are {', '.join(KINDS)}", "kinds")
        for name, values in (("profile", self.sizes), ("floors", self.floors)):
            if unknown := sorted(set(values) - set(KINDS)):
                raise UserError(f": unknown kind {unknown[0]!r}{nearest(unknown[0], KINDS)}", name)
            for kind in KINDS:
                least = int(name == "profile" or kind not in PART_KINDS)
                if values[kind] < least:
                    raise UserError(f": {kind} is {values[kind]}; it must be at least {least}", name)

    def may_go(self, kind: str, block: int) -> bool:
        """Whether groups of this kind may go from this block."""
        return kind in self.kinds and (kind == "embed" or block not in self.protected)

    def whole(self, kind: str, block: int) -> bool:
        """Whether all units of this kind may go from this block, which then has no attention part, or no mlp."""
        return kind in PART_KINDS and self.floors[kind] == 0 and self.may_go(kind, block)

    def size(self, kind: str, dims: ViTDims, block: int) -> int:
        if kind == "head" and dims.heads[block] < _FEW_HEADS:
            return 1
        return self.sizes[kind]


class Removal(NamedTuple):
    """One group that went."""

    kind: str
    block: int  # 0 for embed
    units: int  # how many widths: a row of query/key dims counts once
    score: float
    key: float  # what the rule compared


class Ranking(NamedTuple):
    """Result of one pruning step."""

    masks: Units
    dims: ViTDims
    removed: list[Removal]
    met: bool  # every target holds
    nonpositive: int  # groups that went with score <= 0
    exhausted: bool = False  # no further group may go

    @property
    def threshold(self) -> float | None:
        """The largest key among the groups that went."""
        return max((r.key for r in self.removed), default=None)


class Pick(NamedTuple):
    """The weakest group of one kind in one block."""

    score: float
    units: int
    entries: tuple[np.ndarray | int, ...]  # of the mask


Slot = tuple[str, int]  # a kind, and the block (0 for embed)
Key = tuple[int, float]  # what offers are compared by, the smaller one goes first


def make_targets(spec: Mapping[str, float | None], dims: ViTDims, latency_ms: Cost | None) -> list[Target]:
    """Targets from {"macs_ratio": 0.5, "latency_ms": None, ...}; a ratio is relative to `dims`.

    Raises UserError for an unknown name, a ratio outside (0, 1], a size <= 0, latency without a model, or no target.
    """
    costs: dict[str, Cost | None] = {"latency": latency_ms, "macs": count_macs, "params": count_params}
    absolute = {"latency_ms": "latency", "macs": "macs", "params": "params"}
    targets = []
    for name, value in spec.items():
        if name not in absolute and name.removesuffix("_ratio") not in costs:
            raise UserError(f": unknown target {name!r}{nearest(name, list(spec))}", "target")
        if value is None:
            continue
        if not value > 0 or (name.endswith("_ratio") and value > 1):
            raise UserError(f"={value}: it must be {'in (0, 1]' if 'ratio' in name else '> 0'}", name)
        metric = absolute.get(name, name.removesuffix("_ratio"))
        cost = costs[metric]
        if cost is None:
            raise UserError(" needs a latency model: a measured table, or an estimate", name)
        dense = cost(dims)
        if not isinstance(dense, int | float | np.integer | np.floating) or not 0 < dense < math.inf:
            raise UserError(f": the unpruned model costs {dense!r}, of which nothing can be saved", name)
        targets.append(Target(name, cost, float(value * dense if name.endswith("_ratio") else value), float(dense)))
    if not targets:
        raise UserError(": set at least one of " + ", ".join(spec), "target")
    return targets


def smallest_dims(dims: ViTDims, policy: Policy) -> ViTDims:
    """The dims that are left when every group that may go has gone."""

    if bad := [b for b in policy.protected if not 0 <= b < dims.depth]:
        raise UserError(f": there is no block {bad[0]}; the model has {dims.depth}, from 0", "protect")

    def shrink(kind: str, width: int, block: int) -> int:
        if not policy.may_go(kind, block):
            return width
        size, floor = policy.size(kind, dims, block), policy.floors[kind]
        while width and (rest := width - (width % size or size)) >= floor:
            width = rest
        return width

    per_block: dict[str, Any] = {
        _FIELD[k]: tuple(shrink(k, w, i) for i, w in enumerate(getattr(dims, _FIELD[k]))) for k in KINDS[1:]
    }
    return dataclasses.replace(dims, embed=shrink("embed", dims.embed, 0), **per_block)


def check_reachable(dims: ViTDims, policy: Policy, targets: Sequence[Target]) -> None:
    """UserError that names the smallest reachable value when a target lies below the floors.

    And when nothing would go, since all targets allow more than the unpruned model costs.
    """
    loose = [target for target in targets if target.is_loose]
    if loose and all(target.limit >= target.dense for target in targets):
        limit, dense = loose[0].limit, loose[0].dense
        text = f"={limit:.6g} is more than the unpruned model's {dense:.6g}: nothing would go; ask for less"
        raise UserError(text, loose[0].name)
    smallest = smallest_dims(dims, policy)
    for target in targets:
        if not target.holds(smallest):
            least, limit = target.cost(smallest), target.limit
            if target.name in ("macs", "params"):
                asked, shown = f"{limit:.0f}", f"{least:.0f}"
            else:
                scale = target.dense if target.name.endswith("_ratio") else 1.0
                asked, shown = f"{limit / scale:.6g}", f"{math.ceil(least / scale * 1e4) / 1e4:.10g}"
            raise UserError(
                f"={asked} cannot be met: with these floors, groups and protected blocks the smallest reachable is "
                f"{shown}",
                target.name,
            )


def rank(
    scores: Units,
    masks: Units,
    dims: ViTDims,
    policy: Policy,
    targets: Sequence[Target],
    max_groups: int | None = None,
) -> Ranking:
    """Remove groups until all targets hold, or `max_groups` have gone, or none is left to remove.

    The result is at most each target, and no further below the last one met than one group explains.
    """
    masks, scores = check_masks(masks, dims), check_scores(scores, dims)
    masks = Units(*(mask.copy() for mask in masks))
    now = kept_dims(masks, dims)
    every = {slot: place for place, slot in enumerate(_slots(dims)) if policy.may_go(*slot)}
    walks = {slot: groups(slot, scores, masks, dims, policy) for slot in every}
    picks = {slot: next(walk, None) for slot, walk in walks.items()}
    rule = _Rule(policy, targets)
    offers: dict[Slot, tuple[Key, int, Pick]] = {}
    removed: list[Removal] = []
    met_before: list[bool] | None = None
    stale: Iterable[Slot] = every
    exhausted = False
    while not all(met := [target.holds(now) for target in targets]) and len(removed) != max_groups:
        # Which targets are not met yet is part of every key.
        for slot in stale if met == met_before else every:
            offers.pop(slot, None)
            if (pick := picks[slot]) is not None:
                offers[slot] = (rule.key(pick, slot, now, met), every[slot], pick)
        if not offers:
            exhausted = True
            break
        kind, block = slot = min(offers, key=lambda slot: offers[slot][:2])
        key, _, pick = offers[slot]
        getattr(masks, kind)[pick.entries] = 0
        now, met_before = _without(now, slot, pick.units), met
        removed.append(Removal(kind, block, pick.units, pick.score, key[1]))
        picks[slot] = next(walks[slot], None)
        if kind == "head":
            for other in ("qk", "v"):  # their rows run over the live heads
                getattr(masks, other)[block][masks.head[block] == 0] = 0
                if (other, block) in picks:
                    walks[other, block] = groups((other, block), scores, masks, dims, policy)
                    picks[other, block] = next(walks[other, block], None)
        own_alone = rule.of_blocks and kind != "embed"
        stale = [other for other in every if other[1] == block or other[0] == "embed"] if own_alone else every
    nonpositive = sum(removal.score <= 0 for removal in removed)
    return Ranking(masks, dataclasses.replace(now), removed, all(t.holds(now) for t in targets), nonpositive, exhausted)


def _slots(dims: ViTDims) -> list[Slot]:
    return [("embed", 0)] + [(kind, i) for kind in KINDS[1:] for i in range(dims.depth)]


class _Savings:
    """What groups save of one cost. Blocks are remembered, where the cost is a sum over the blocks."""

    def __init__(self, cost: Cost) -> None:
        self.cost, self.of_blocks = cost, is_of_blocks(cost)
        self._known: dict[tuple[int, ...], float] = {}
        self._whole: tuple[ViTDims | None, float] = (None, 0.0)

    def __call__(self, slot: Slot, units: int, now: ViTDims) -> float:
        kind, block = slot
        then = _without(now, slot, units)
        if self.of_blocks and kind != "embed":
            return self._block(now, block) - self._block(then, block)
        if self._whole[0] is not now:
            self._whole = (now, self.cost(now))
        return self._whole[1] - self.cost(then)

    def _block(self, dims: ViTDims, block: int) -> float:
        """The cost of the model with this block alone."""
        widths = (dims.embed, dims.heads[block], dims.qk[block], dims.v[block], dims.mlp[block])
        if widths not in self._known:
            self._known[widths] = self.cost(one_block(dims, *widths))
        return self._known[widths]


class _Rule:
    """What offers are compared by."""

    def __init__(self, policy: Policy, targets: Sequence[Target]) -> None:
        self._eta = policy.eta if policy.rule == "eta" else None
        self._dense = [target.dense for target in targets]
        costs = [target.cost for target in targets]
        if self._eta is not None:
            assert policy.latency is not None
            costs = [policy.latency]
        self._savings = [_Savings(cost) for cost in costs]
        self.of_blocks = all(saving.of_blocks for saving in self._savings)

    def key(self, pick: Pick, slot: Slot, now: ViTDims, met: Sequence[bool]) -> Key:
        """Smaller goes first. `met`: which targets hold."""
        if self._eta is not None:
            return 1, pick.score - self._eta * self._savings[0](slot, pick.units, now)
        unmet = [(s, dense) for s, dense, holds in zip(self._savings, self._dense, met, strict=True) if not holds]
        saving = sum(saved(slot, pick.units, now) / dense for saved, dense in unmet)
        if pick.score <= 0:
            return 0, -saving
        # What saves nothing goes last, the least score first.
        return (1, pick.score / saving) if saving > 0 else (2, pick.score)


def is_of_blocks(cost: Cost) -> bool:
    """Whether a cost is a sum over the blocks, given embed: what a group of one saves is the same whatever the others.

    A latency says so with the attribute `of_blocks`; of any other function nothing is known.
    """
    return cost in (count_macs, count_params) or bool(getattr(cost, "of_blocks", False))


def one_block(dims: ViTDims, embed: int, heads: int, qk: int, v: int, mlp: int) -> ViTDims:
    """The model of one block of these widths."""
    return with_widths(dims, embed=embed, heads=(heads,), qk=(qk,), v=(v,), mlp=(mlp,))


def costs_of(cost: Cost, dims: ViTDims, widths: Sequence[Any]) -> np.ndarray:
    """[n] costs of the models of one block with these widths: numbers, or arrays [n], as those of `one_block`."""
    if cost in (count_macs, count_params) or getattr(cost, "of_arrays", False):  # arithmetic, of arrays as of numbers
        return np.asarray(cost(one_block(dims, *widths)), float)
    columns = [column.tolist() for column in np.broadcast_arrays(*widths)]
    return np.array([cost(one_block(dims, *each)) for each in zip(*columns, strict=True)])


def unit_savings(
    dims: ViTDims, cost: Cost, whole: Callable[[str, int], bool] = lambda kind, block: False
) -> dict[str, np.ndarray]:
    """What one width less of each kind costs less: {"embed": [], "head": [L], ...}; 0 for a width of 1.

    `whole(kind, block)`: whether a width of 1 may go as well, and the part with it (see `Policy.whole`).
    """
    before = cost(dims)

    def saved(kind: str, block: int) -> float:
        width = dims.embed if kind == "embed" else getattr(dims, _FIELD[kind])[block]
        may_go = width > 1 or (width == 1 and whole(kind, block))
        return before - cost(_without(dims, (kind, block), 1)) if may_go else 0.0

    blocks = {kind: np.array([saved(kind, i) for i in range(dims.depth)]) for kind in KINDS[1:]}
    return {"embed": np.array(saved("embed", 0)), **blocks}


def remove(masks: Units, kind: str, pick: Pick) -> Units:
    """The masks without one group; a removed head takes its query/key and value dims along."""
    changed = getattr(masks, kind).copy()
    changed[pick.entries] = 0
    masks = masks._replace(**{kind: changed})
    return normalize(masks) if kind == "head" else masks


def weakest(slot: Slot, scores: Units, masks: Units, dims: ViTDims, policy: Policy) -> Pick | None:
    """The group of this kind and block that goes first, None when none may go."""
    return next(groups(slot, scores, masks, dims, policy), None)


def groups(slot: Slot, scores: Units, masks: Units, dims: ViTDims, policy: Policy) -> Iterator[Pick]:
    """The groups of this kind and block that may go, the weakest first, each as if those before it had gone."""
    kind, block = slot
    mask, score = getattr(masks, kind), getattr(scores, kind)
    at: tuple[int, ...] = () if kind == "embed" else (block,)
    mask, score = mask[at], score[at]
    if kind in ("qk", "v"):
        heads = np.flatnonzero(masks.head[block])
        live = mask[heads] > 0
        if not len(heads):
            return
        count = int(live[0].sum())
        values = np.where(live, score[heads], np.inf)  # removed dims sort behind the live ones
        if policy.align == "shared":
            if (live != live[0]).any():
                raise UserError(f'align="shared": the heads of block {block} keep different {kind} dims')
            values = np.broadcast_to(values.sum(0), values.shape)
        order = np.argsort(values, axis=1, kind="stable")
    else:
        count = int(mask.sum())
        order = np.argsort(np.where(mask > 0, score, np.inf), kind="stable")
    size, gone = policy.size(kind, dims, block), 0
    while count > gone and count - gone - (units := (count - gone) % size or size) >= policy.floors[kind]:
        picked = order[..., gone : gone + units]
        gone += units
        if kind in ("qk", "v"):
            yield Pick(float(score[heads[:, None], picked].sum()), units, (block, heads[:, None], picked))
        else:
            yield Pick(float(score[picked].sum()), units, (*at, picked))


def _without(dims: ViTDims, slot: Slot, units: int) -> ViTDims:
    kind, block = slot
    if kind == "embed":
        return with_widths(dims, embed=dims.embed - units)
    widths = list(getattr(dims, _FIELD[kind]))
    widths[block] -= units
    return with_widths(dims, **{_FIELD[kind]: tuple(widths)})
