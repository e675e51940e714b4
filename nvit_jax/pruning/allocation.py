"""The widths solved for the target: prune.rule="solve". NumPy only.

ranking.rank goes down group by group and never looks back. Here the sum of the scores of what goes is minimised under
the constraint, in the spirit of ZipLM (Kurtic et al. 2023). Given embed, the cost of a model is a sum over the
attention and mlp parts of its blocks, so at a given price on cost each part picks the best of all its widths by itself,
and the price is bisected until the targets hold; embed, which ties the blocks, is tried at every width. Such a
Lagrangian solution can stop below the target by more than a group, so groups are given back, the largest score first,
while the targets hold. Groups and their order inside a kind are those of `ranking`; a score below 0, which is noise of
an estimate, counts as 0, or everything of that kind would go whatever the target.

With several targets the price is put on each one's cost and on their sum; all must hold, the least score wins.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.model.masks import check_masks, kept_dims, normalize
from nvit_jax.pruning.ranking import Cost, Policy, Ranking, Removal, Target, remove, weakest

_STEPS = 30  # bisections of the price
_TRIED = 4  # embed widths whose solutions are completed by giving back


class _Gone(NamedTuple):
    """What 0, 1, 2, ... groups of one kind take along."""

    units: list[int]
    score: list[float]


class _Choice(NamedTuple):
    """How many groups go: of embed, and of each block's heads, query/key dims, value dims and neurons."""

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
        def walk(kind: str, block: int, start: Units) -> tuple[_Gone, list[Units]]:
            gone, states = _Gone([0], [0.0]), [start]
            if not policy.may_go(kind, block):
                return gone, states
            while (pick := weakest((kind, block), scores, states[-1], dims, policy)) is not None:
                states.append(remove(states[-1], kind, pick))
                gone.units.append(gone.units[-1] + pick.units)
                gone.score.append(gone.score[-1] + max(pick.score, 0.0))
            return gone, states

        heads, qk, v, mlp = [], [], [], []
        for block in range(dims.depth):
            gone, states = walk("head", block, masks)
            heads.append(gone)
            qk.append([walk("qk", block, state)[0] for state in states])
            v.append([walk("v", block, state)[0] for state in states])
            mlp.append(walk("mlp", block, masks)[0])
        return cls(kept_dims(masks, dims), walk("embed", 0, masks)[0], heads, qk, v, mlp)

    def dims(self, choice: _Choice) -> ViTDims:
        now, gone = self.now, list(enumerate(choice.blocks))
        return dataclasses.replace(
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


_Part = tuple[np.ndarray, np.ndarray]  # score and cost of every option


def _parts(options: _Options, cost: Cost, embed: int) -> Iterator[tuple[_Part, _Part]]:
    """Of each block: attention [heads, qk, v] and mlp [M], the cost up to a constant."""
    now, known = options.now, {}

    def price(heads: int, qk: int, v: int, mlp: int) -> float:
        widths = (heads, qk, v, mlp)
        if widths not in known:
            one = dataclasses.replace(now, embed=embed, heads=(heads,), qk=(qk,), v=(v,), mlp=(mlp,))
            known[widths] = cost(one)
        return known[widths]

    for i, (h0, q0, v0, m0) in enumerate(zip(now.heads, now.qk, now.v, now.mlp, strict=True)):
        shape = len(options.heads[i].units), len(options.qk[i][0].units), len(options.v[i][0].units)
        score, costs = np.zeros(shape), np.zeros(shape)
        for h, q, v in np.ndindex(*shape):
            qk, values = options.qk[i][h], options.v[i][h]
            score[h, q, v] = options.heads[i].score[h] + qk.score[q] + values.score[v]
            # The mlp at its own width, since a table may know no smaller one; it is the same for every option.
            costs[h, q, v] = price(h0 - options.heads[i].units[h], q0 - qk.units[q], v0 - values.units[v], m0)
        mlp = options.mlp[i]
        yield (score, costs), (np.array(mlp.score), np.array([price(h0, q0, v0, m0 - m) for m in mlp.units]))


def _at_price(embed: int, parts: Sequence[tuple[_Part, _Part]], price: float) -> _Choice:
    def best(part: _Part) -> tuple[int, ...]:
        score, cost = part
        return tuple(int(i) for i in np.unravel_index(np.argmin(score + price * cost), score.shape))

    return _Choice(embed, tuple((*best(attention), *best(mlp)) for attention, mlp in parts))  # type: ignore[misc]


def _cheapest(holds: Callable[[_Choice], bool], at: Callable[[float], _Choice], scale: float) -> _Choice | None:
    """The choice at the least price where the targets hold; None when they hold at none."""
    low, high = 0.0, scale
    if holds(at(0.0)):
        return at(0.0)
    while not holds(at(high)):
        low, high = high, 10 * high
        if high > 1e12 * scale:
            return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(at(middle)) else (middle, high)
    return at(high)


def _give_back(options: _Options, choice: _Choice, holds: Callable[[_Choice], bool]) -> _Choice:
    """Undo groups while the targets hold, each time the one whose score is largest."""
    while True:
        steps = [choice._replace(embed=choice.embed - 1)] if choice.embed else []
        for i, block in enumerate(choice.blocks):
            for kind in np.flatnonzero(block):
                less = tuple(n - (k == kind) for k, n in enumerate(block))
                steps.append(choice._replace(blocks=(*choice.blocks[:i], less, *choice.blocks[i + 1 :])))  # type: ignore[arg-type]
        found = next((s for s in sorted(steps, key=options.score) if holds(s)), None)
        if found is None:
            return choice
        choice = found


def allocate(scores: Units, masks: Units, dims: ViTDims, policy: Policy, targets: Sequence[Target]) -> Ranking:
    """As ranking.rank, without `max_groups`: the least sum of scores found for which every target holds."""
    masks = check_masks(masks, dims)
    scores = Units(*(np.asarray(s, np.float64) for s in scores))
    options = _Options.find(scores, masks, dims, policy)
    unmet = [t for t in targets if not t.holds(options.now)]
    costs: list[Cost] = [lambda d, t=t: t.cost(d) / t.dense for t in unmet]  # type: ignore[misc]
    if len(unmet) > 1:
        costs.append(lambda d: sum(t.cost(d) / t.dense for t in unmet))

    def holds(choice: _Choice) -> bool:
        return all(t.holds(options.dims(choice)) for t in targets)

    scale = max(sum(float(np.abs(s).sum()) for s in scores), np.finfo(float).tiny)
    best = None
    for cost in costs:
        found = []
        for embed, units in enumerate(options.embed.units):
            parts = list(_parts(options, cost, options.now.embed - units))
            choice = _cheapest(holds, lambda price, e=embed, p=parts: _at_price(e, p, price), scale)  # type: ignore[misc]
            if choice is not None:
                found.append(choice)
        for choice in sorted(found, key=options.score)[:_TRIED]:
            completed = _give_back(options, choice, holds)
            if best is None or options.score(completed) < options.score(best):
                best = completed
    if best is None:
        return Ranking(masks, options.now, [], not unmet, 0, bool(unmet))
    return _carry_out(best, scores, masks, dims, policy, targets)


def _carry_out(
    choice: _Choice, scores: Units, masks: Units, dims: ViTDims, policy: Policy, targets: Sequence[Target]
) -> Ranking:
    removed: list[Removal] = []
    slots = [("embed", 0, choice.embed)]
    for i, counts in enumerate(choice.blocks):
        slots += [(kind, i, n) for kind, n in zip(("head", "qk", "v", "mlp"), counts, strict=True)]
    for kind, block, count in slots:
        for _ in range(count):
            pick = weakest((kind, block), scores, masks, dims, policy)
            assert pick is not None
            masks = remove(masks, kind, pick)
            removed.append(Removal(kind, block, pick.units, pick.score, pick.score))
    now = kept_dims(normalize(masks), dims)
    met = all(t.holds(now) for t in targets)
    return Ranking(masks, now, removed, met, sum(r.score <= 0 for r in removed))
