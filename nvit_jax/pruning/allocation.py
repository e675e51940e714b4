"""The widths solved for the target: prune.rule="solve". NumPy and SciPy only.

ranking.rank goes down group by group and never looks back. Here the sum of the scores of what goes is the least that
there is under the constraint, in the spirit of ZipLM (Kurtic et al. 2023). Groups and their order inside a kind are
those of `ranking`; a score below 0, which is noise of an estimate, counts as 0, or everything of that kind would go
whatever the target.

Given embed, the cost of a model is a sum over the attention and mlp parts of its blocks, so that it is a
multiple-choice knapsack (Pisinger 1995): of each part one option is taken, the widths that it keeps. It is solved in
three steps, for each embed width:

1. With a price on cost each part picks its best option by itself. The sum of scores and the price of what is above the
   limit are then a lower bound for every solution. The prices with the highest bound are found by cutting planes.
2. At a multiple of these prices the targets hold. Groups are given back while they do, the largest score first. This is
   the first solution, and embed widths whose bound is not below its score are left out.
3. What an option loses to the pick of its part at these prices adds to the bound. Options that lift it above the best
   score so far are left out. The others are combined part after part. Of these beginnings those go on whose bound is
   low enough, and for which no other has neither a higher score nor a higher cost. What is left at the end is the best.

Step 3 keeps at most `_STATES` beginnings. ViT-H has some thousands with one target, and 15,000 with two that bind at
once. Beyond that the most promising go on, and the result may be a little above the least score. A cost that is no sum
over the blocks makes the bound a guess: all targets hold then, too, since every solution is tried on the dims of the
whole model, but a better one may exist. tests/ablations/solving.py measures how long all this takes.

Nothing depends on a clock. Of equal solutions the one that is met first is taken, in the order of embed's bounds,
parts and options, so that the same scores give the same answer.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from nvit_jax.model.dims import Units, ViTDims, with_widths
from nvit_jax.model.masks import check_masks, check_scores, kept_dims, normalize
from nvit_jax.pruning.ranking import Policy, Ranking, Removal, Target, costs_of, groups, remove

_STEPS = 30  # bisections of the price
_CUTS = 100  # cutting planes at most
_HIGHEST = 1e6  # price: of all that a model costs, in sums of all scores
_DEPTHS = tuple(2.0**-n for n in range(8, -1, -1))  # of the way from the bound to the best score so far, tried in turn
_STATES = 30_000  # beginnings that go on
_ROUNDING = 1e-12  # of the sum of all scores
_SURE = 5e-10  # half of what Target.holds allows, so that a sum over parts that fits holds for the whole model


class _Gone(NamedTuple):
    """What 0, 1, 2, ... groups of one kind take along."""

    units: list[int]
    score: list[float]


class _Choice(NamedTuple):
    """How many groups go: of embed, and of each block's heads, query/key dims, value dims and neurons.

    Dims that go along with the last head are not counted.
    """

    embed: int
    blocks: tuple[tuple[int, int, int, int], ...]


@dataclasses.dataclass(frozen=True)
class _Options:
    """Everything that may go, kind by kind; query/key and value dims by how many groups of heads went before."""

    now: ViTDims
    embed: _Gone
    heads: list[_Gone]  # [L]
    qk: list[list[_Gone]]  # [L][groups of heads]
    v: list[list[_Gone]]
    mlp: list[_Gone]

    @classmethod
    def find(cls, scores: Units, masks: Units, dims: ViTDims, policy: Policy) -> "_Options":
        def walk(kind: str, block: int, start: Units) -> _Gone:
            gone = _Gone([0], [0.0])
            if policy.may_go(kind, block):
                for pick in groups((kind, block), scores, start, dims, policy):
                    gone.units.append(gone.units[-1] + pick.units)
                    gone.score.append(gone.score[-1] + max(pick.score, 0.0))
            return gone

        heads, qk, v, mlp = [], [], [], []
        for block in range(dims.depth):
            states = [masks]
            if policy.may_go("head", block):
                for pick in groups(("head", block), scores, masks, dims, policy):
                    states.append(remove(states[-1], "head", pick))
            heads.append(walk("head", block, masks))
            qk.append([walk("qk", block, state) for state in states])
            v.append([walk("v", block, state) for state in states])
            mlp.append(walk("mlp", block, masks))
        return cls(kept_dims(masks, dims), walk("embed", 0, masks), heads, qk, v, mlp)

    def attention(self, block: int) -> list[tuple[int, int, int]]:
        """All that may go of an attention part: groups of heads, query/key dims and value dims."""
        rows = zip(self.qk[block], self.v[block], strict=True)
        return [
            (h, q, v)
            for h, (qk, values) in enumerate(rows)
            for q in range(len(qk.units))
            for v in range(len(values.units))
        ]

    def dims(self, choice: _Choice) -> ViTDims:
        now, gone = self.now, list(enumerate(choice.blocks))
        return with_widths(
            now,
            embed=now.embed - self.embed.units[choice.embed],
            heads=tuple(now.heads[i] - self.heads[i].units[h] for i, (h, *_) in gone),
            qk=tuple(now.qk[i] - self.qk[i][h].units[q] for i, (h, q, _, _) in gone),
            v=tuple(now.v[i] - self.v[i][h].units[v] for i, (h, _, v, _) in gone),
            mlp=tuple(now.mlp[i] - self.mlp[i].units[m] for i, (*_, m) in gone),
        )

    def score(self, choice: _Choice) -> float:
        return self.embed.score[choice.embed] + sum(
            self.heads[i].score[h] + self.qk[i][h].score[q] + self.v[i][h].score[v] + self.mlp[i].score[m]
            for i, (h, q, v, m) in enumerate(choice.blocks)
        )


class _Part(NamedTuple):
    """The options of an attention or mlp part: score [n], cost [T, n] as fractions of each target's dense cost."""

    score: np.ndarray
    cost: np.ndarray


class _Stack(NamedTuple):
    """Parts with the same costs, of alike blocks: where they are, their scores [P, n] and cost [T, n]."""

    places: list[int]
    score: np.ndarray
    cost: np.ndarray


def _together(options: _Part | _Stack, prices: np.ndarray) -> np.ndarray:
    """[..., n] score and priced cost together. No matrix product: its rounding depends on the machine."""
    return options.score + (prices[:, None] * options.cost).sum(0)


class _Knapsack(NamedTuple):
    """Given embed: of each part (attention and mlp of block 0, of block 1, ...) one option."""

    embed: int  # groups
    score: float  # of embed
    attention: list[list[tuple[int, int, int]]]  # [L] their options: groups of heads, query/key dims, value dims
    parts: list[_Part]
    stacks: list[_Stack]  # the same parts
    room: np.ndarray  # [T] what the parts may cost together

    def choice(self, picks: Sequence[int]) -> _Choice:
        blocks = zip(self.attention, picks[::2], picks[1::2], strict=True)
        return _Choice(self.embed, tuple((*options[pick], int(m)) for options, pick, m in blocks))

    def at(self, prices: np.ndarray) -> tuple[list[int], float, np.ndarray]:
        """The best options at these prices: which, their scores and embed's, and what they cost above the room [T]."""
        picks = [0] * len(self.parts)
        for stack in self.stacks:
            for place, pick in zip(stack.places, _together(stack, prices).argmin(1).tolist(), strict=True):
                picks[place] = pick
        taken = list(zip(self.parts, picks, strict=True))
        score = self.score + sum(float(part.score[pick]) for part, pick in taken)
        return picks, score, sum(part.cost[:, pick] for part, pick in taken) - self.room


def _knapsacks(options: _Options, targets: Sequence[Target]) -> Iterator[_Knapsack]:
    """One for each embed width. The cost of a part is what a model of one block costs, up to a constant."""
    now = options.now
    attention = [options.attention(block) for block in range(now.depth)]
    scores, gone, alike = [], [], []  # alike: blocks with the same widths and options have one number
    known_blocks: dict[object, int] = {}
    for i, (heads, qk, v, mlp) in enumerate(zip(options.heads, options.qk, options.v, options.mlp, strict=True)):
        score = [heads.score[h] + qk[h].score[q] + v[h].score[w] for h, q, w in attention[i]]
        scores += [np.array(score), np.array(mlp.score)]
        gone.append(tuple((heads.units[h], qk[h].units[q], v[h].units[w]) for h, q, w in attention[i]))
        own = (now.heads[i], now.qk[i], now.v[i], now.mlp[i], gone[i], tuple(mlp.units))
        alike.append(known_blocks.setdefault(own, i))
    stacked = []
    for first in dict.fromkeys(alike):
        for side in (0, 1):
            places = [2 * i + side for i, other in enumerate(alike) if other == first]
            stacked.append((places, np.array([scores[place] for place in places])))
    for embed, units in enumerate(options.embed.units):

        def price(heads: Any, qk: Any, v: Any, mlp: Any, width: int = now.embed - units) -> np.ndarray:
            """[T, n] of the models of one block with these widths."""
            return np.array([costs_of(t.cost, now, (width, heads, qk, v, mlp)) / t.dense for t in targets])

        costs: list[np.ndarray] = []
        grids: dict[object, np.ndarray] = {}
        for i, (h0, q0, v0, m0) in enumerate(zip(now.heads, now.qk, now.v, now.mlp, strict=True)):
            # The mlp of an attention part at its own width, since a table may know no smaller one; and conversely.
            if (0, alike[i]) not in grids:
                h, q, v = np.array(gone[i]).T
                grids[0, alike[i]] = price(h0 - h, q0 - q, v0 - v, m0)
                grids[1, alike[i]] = price(h0, q0, v0, m0 - np.array(options.mlp[i].units))
            costs += [grids[0, alike[i]], grids[1, alike[i]]]
        whole = with_widths(now, embed=now.embed - units)
        over = np.array([(t.cost(whole) - t.limit * (1 + _SURE)) / t.dense for t in targets])
        parts = [_Part(score, cost) for score, cost in zip(scores, costs, strict=True)]
        stacks = [_Stack(places, rows, costs[places[0]]) for places, rows in stacked]
        room = sum(cost[:, 0] for cost in costs) - over
        yield _Knapsack(embed, options.embed.score[embed], attention, parts, stacks, room)


class _Priced(NamedTuple):
    """A knapsack, the prices [T] found for it, and the bound that they give."""

    bound: float
    prices: np.ndarray
    knapsack: _Knapsack


def _priced(knapsack: _Knapsack, scale: float) -> _Priced:
    """The prices with the highest bound, by Kelley's cutting planes. Any prices give a bound that holds."""
    prices = np.zeros(len(knapsack.room))
    best = _Priced(-np.inf, prices, knapsack)
    cuts: list[tuple[float, np.ndarray]] = []
    for _ in range(_CUTS):
        _, score, excess = knapsack.at(prices)
        bound = score + float((prices * excess).sum())
        if bound > best.bound:
            best = _Priced(bound, prices, knapsack)
        found = _highest(cuts := [*cuts, (score, excess)], scale)
        if found is None or found[1] - best.bound <= 1e-9 * scale:
            break
        prices = found[0]
    return best


def _highest(cuts: Sequence[tuple[float, np.ndarray]], scale: float) -> tuple[np.ndarray, float] | None:
    """The prices [T] at which the lowest of the planes score + prices * excess is highest, and how high it is there."""
    if len(cuts[0][1]) == 1:  # lines: the last one that rises and the last one that falls are next to where they cross
        rises = [(score, float(excess[0])) for score, excess in cuts if excess[0] > 0]
        falls = [(score, float(excess[0])) for score, excess in cuts if excess[0] <= 0]
        if not rises:
            return np.zeros(1), falls[-1][0]
        score, slope = rises[-1]
        price = (falls[-1][0] - score) / (slope - falls[-1][1]) if falls else _HIGHEST * scale
        return np.array([price]), score + price * slope
    # In 1e4 scores, so that the tolerance of the solver, 1e-7, is small beside what is asked.
    found = optimize.linprog(
        np.append(np.zeros(len(cuts[0][1])), -1.0),
        np.array([1e4 * np.append(-excess, 1.0) for _, excess in cuts]),
        np.array([1e4 * score / scale for score, _ in cuts]),
        bounds=[(0, _HIGHEST)] * len(cuts[0][1]) + [(None, None)],
    )
    return (scale * found.x[:-1], scale * float(found.x[-1])) if found.success else None


def _first(priced: _Priced, holds: Callable[[_Choice], bool], scale: float) -> _Choice | None:
    """The picks at the least multiple of the prices where the targets hold; None when they hold at none."""
    knapsack, start = priced.knapsack, float(priced.prices.max()) or scale
    # Where a target has no price, raising the prices may never make it hold: then all targets get the same.
    for direction in (priced.prices / start, np.ones(len(priced.prices))):

        def at(price: float, direction: np.ndarray = direction) -> _Choice:
            return knapsack.choice(knapsack.at(price * direction)[0])

        low, high = 0.0, start
        while not holds(at(high)) and high < _HIGHEST * scale:
            low, high = high, 10 * high
        if holds(at(high)):
            for _ in range(_STEPS):
                middle = (low + high) / 2
                low, high = (low, middle) if holds(at(middle)) else (middle, high)
            return at(high)
    return None


def _give_back(options: _Options, choice: _Choice, holds: Callable[[_Choice], bool]) -> _Choice:
    """Undo groups while the targets hold and the score does not rise, each time the one whose score is largest."""
    while True:
        steps = [choice._replace(embed=choice.embed - 1)] if choice.embed else []
        for i, block in enumerate(choice.blocks):
            for kind in np.flatnonzero(block):
                less = tuple(n - (k == kind) for k, n in enumerate(block))
                steps.append(choice._replace(blocks=(*choice.blocks[:i], less, *choice.blocks[i + 1 :])))  # type: ignore[arg-type]
        # A head that comes back wants dims of its own removed, which may score more than the head.
        score = options.score(choice)
        found = next((s for s in sorted(steps, key=options.score) if options.score(s) <= score and holds(s)), None)
        if found is None:
            return choice
        choice = found


def _least(priced: _Priced, most: float, rounding: float) -> list[int] | None:
    """The options with the least sum of scores, embed's included and at most `most`; None when there are none."""
    knapsack, limit, prices = priced.knapsack, priced.knapsack.room[:, None], priced.prices[:, None]
    picks, _, _ = knapsack.at(priced.prices)
    core = []  # place, options that may be taken, their score and cost
    for place, (part, pick) in enumerate(zip(knapsack.parts, picks, strict=True)):
        lost = _together(part, priced.prices)
        kept = np.flatnonzero(priced.bound + lost - lost[pick] <= most + rounding)
        core.append((place, kept, part.score[kept], part.cost[:, kept]))
    if not all(len(kept) for _, kept, *_ in core):
        return None
    core.sort(key=lambda part: len(part[1]))

    def to_come(values: Sequence[np.ndarray]) -> np.ndarray:
        """Sums over the parts after the first 0, 1, ..."""
        return np.cumsum([np.zeros_like(values[0]), *values[::-1]], axis=0)[::-1]

    ends = [(knapsack.parts[place], picks[place]) for place, *_ in core]
    end_score = to_come([part.score[pick] for part, pick in ends])
    end_cost = to_come([part.cost[:, pick, None] for part, pick in ends])
    cheapest = to_come([cost.min(1, keepdims=True) for *_, cost in core])
    dearest = to_come([cost.max(1, keepdims=True) for *_, cost in core])
    score, cost = np.full(1, knapsack.score), np.zeros((len(limit), 1))
    origins: list[np.ndarray] = []
    for number, (_, _, part_score, part_cost) in enumerate(core, 1):
        score = (score[:, None] + part_score).ravel()
        cost = (cost[:, :, None] + part_cost[:, None]).reshape(len(limit), -1)
        # With the picks of the parts to come: a bound, and a solution where it fits.
        whole, above = score + end_score[number], cost + end_cost[number] - limit
        most = min(most, float(whole[(above <= 0).all(0)].min(initial=np.inf)))
        bound = np.maximum(whole + (prices * above).sum(0), score)  # no score is below 0
        alive = np.flatnonzero((bound <= most + rounding) & (cost + cheapest[number] <= limit).all(0))
        # Below this a cost makes no difference any more.
        alive = alive[_undominated(score[alive], np.maximum(cost, limit - dearest[number])[:, alive])]
        if len(alive) > _STATES:
            alive = np.sort(alive[np.argsort(bound[alive], kind="stable")[:_STATES]])
        if not len(alive):
            return None
        origins.append(alive)
        score, cost = score[alive], cost[:, alive]
    state = int(np.argmin(score))
    for (place, kept, *_), origin in zip(core[::-1], origins[::-1], strict=True):
        state, option = divmod(int(origin[state]), len(kept))
        picks[place] = int(kept[option])
    return picks


def _undominated(score: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices without those for which another has neither a higher score [n] nor a higher cost [T, n].

    In the order of the first cost a running minimum of the score tells. For each further cost its ranks are halved
    again and again, and the lower halves compared with the upper ones: two ranks differ first in some bit.
    """
    order = np.lexsort((score, *cost[:0:-1], cost[0]))  # what dominates comes first, of equals the first index
    count = len(order)
    value = np.unique(score[order], return_inverse=True)[1]
    ranks = np.empty((len(cost) - 1, count), int)
    for rank, further in zip(ranks, cost[1:, order], strict=True):
        rank[np.argsort(further, kind="stable")] = np.arange(count)
    alive = np.ones(count, bool)
    for bits in itertools.product(reversed(range(count.bit_length())), repeat=len(ranks)):
        left = np.flatnonzero(alive)
        family, lower, upper = np.zeros(len(left), int), np.ones(len(left), bool), np.ones(len(left), bool)
        for rank, bit in zip(ranks[:, left], bits, strict=True):
            half = (rank >> bit) & 1
            lower, upper = lower & (half == 0), upper & (half == 1)
            family = np.unique(family * (count + 1) + (rank >> (bit + 1)), return_inverse=True)[1]
        together = np.argsort(family, kind="stable")
        start = -2 * count * family[together]  # below all of the families before, so that they do not count
        own = start + value[left[together]]
        lowest = np.minimum.accumulate(np.where(lower[together], own, start + count))
        alive[left[together[1:]]] &= ~upper[together[1:]] | (own[1:] < lowest[:-1])
    return np.sort(order[alive])


def allocate(scores: Units, masks: Units, dims: ViTDims, policy: Policy, targets: Sequence[Target]) -> Ranking:
    """As ranking.rank, without `max_groups`: the least sum of scores for which every target holds."""
    masks, scores = check_masks(masks, dims), check_scores(scores, dims)
    options = _Options.find(scores, masks, dims, policy)
    unmet = [t for t in targets if not t.holds(options.now)]
    unmet = [t for t in unmet if not any(t.cost is o.cost and t.limit > o.limit for o in unmet)]
    if not unmet:
        return Ranking(masks, options.now, [], True, 0)

    def holds(choice: _Choice) -> bool:
        return all(t.holds(options.dims(choice)) for t in targets)

    best: _Choice | None = None
    least = np.inf

    def offer(choice: _Choice | None) -> None:
        nonlocal best, least
        if choice is not None and holds(choice):
            choice = _give_back(options, choice, holds)
            if options.score(choice) < least:
                best, least = choice, options.score(choice)

    scale = max(sum(float(np.abs(s).sum()) for s in scores), np.finfo(float).tiny)
    rounding = _ROUNDING * scale
    for priced in sorted((_priced(k, scale) for k in _knapsacks(options, unmet)), key=lambda p: p.bound):
        if priced.bound >= least - rounding:
            break
        offer(_first(priced, holds, scale))
        reach = min(least, scale) - priced.bound
        for part in _DEPTHS if reach > 0 else ():  # a bound above all scores: out of reach
            picks = _least(priced, priced.bound + part * reach, rounding)
            if picks is not None:
                offer(priced.knapsack.choice(picks))
                break
    if best is None:
        return Ranking(masks, options.now, [], False, 0, True)
    return _carry_out(best, scores, masks, dims, policy, targets)


def _carry_out(
    choice: _Choice, scores: Units, masks: Units, dims: ViTDims, policy: Policy, targets: Sequence[Target]
) -> Ranking:
    removed: list[Removal] = []
    slots = [("embed", 0, choice.embed)]
    for i, counts in enumerate(choice.blocks):
        slots += [(kind, i, n) for kind, n in zip(("head", "qk", "v", "mlp"), counts, strict=True)]
    for kind, block, count in slots:
        for pick in itertools.islice(groups((kind, block), scores, masks, dims, policy), count):
            masks = remove(masks, kind, pick)
            removed.append(Removal(kind, block, pick.units, pick.score, pick.score))
    now = kept_dims(normalize(masks), dims)
    met = all(t.holds(now) for t in targets)
    return Ranking(masks, now, removed, met, sum(r.score <= 0 for r in removed))
