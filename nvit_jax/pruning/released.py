"""The released NViT's own pruning step, quirks included, for its numbers to be had here. NumPy only.

The rule "nvit" uses `rank`; eta is then per second, as there. It differs from ranking.rank in what the released
engine does and the paper does not say:
  - one query/key (value) index stands for all heads of a block (align="shared");
  - units are sorted inside a layer by score - eta * seconds saved, cut into runs of the group size, and only the sums
    of the runs are compared between layers; removed units stay in the sort, with a score of 0;
  - savings are those of the model before the step, for one unit less, and 0 near the bottom of a width;
  - pruning number p (from 0) removes every run up to the one of rank max(0, p * per_iteration // 16 - 1), removed runs
    counted, whatever their sizes: with 32 the first pruning removes one run and each later one about two more;
  - the last run of a layer stays, whatever the floors say.
One thing is left out: the engine's stop test takes the embed of before the step, so it may go on for a step more.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.model.masks import check_scores, kept_dims
from nvit_jax.pruning import ranking
from nvit_jax.pruning.ranking import Cost, Ranking, Removal, Target

# Below these widths (inclusive) a layer's saving counts as 0; embed has no such guard.
_SMALL = {"head": 2, "qk": 8, "v": 8, "mlp": 16}
_FIELD = {"head": "heads", "qk": "qk", "v": "v", "mlp": "mlp"}


class Step(NamedTuple):
    """What one pruning computed, layer by layer: embed, then head, qk, v, mlp of each block."""

    adjusted: list[np.ndarray]  # score * gate - eta * seconds saved, per unit
    group_scores: list[np.ndarray]  # ascending within the layer
    threshold: float
    gates: list[np.ndarray]  # afterwards
    removed: list[tuple[int, int, float]]  # (layer, live units, score) of the runs that went


def flatten(units: Units) -> list[np.ndarray]:
    """Layers of per-index values; query/key and value indices are summed over the heads."""
    layers = [np.asarray(units.embed, np.float64)]
    for i in range(len(units.head)):
        layers += [units.head[i], units.qk[i].sum(0), units.v[i].sum(0), units.mlp[i]]
    return [np.asarray(layer, np.float64) for layer in layers]


def unit_savings(table: Cost, dims: ViTDims) -> list[float]:
    """Seconds saved by one unit less of each layer, in the order of `flatten`; `table(dims)` gives milliseconds."""
    savings = ranking.unit_savings(dims, table)
    out = [float(savings["embed"])]
    for i in range(dims.depth):
        out += [0.0 if getattr(dims, _FIELD[k])[i] <= least else float(savings[k][i]) for k, least in _SMALL.items()]
    return [ms / 1e3 for ms in out]


def prune_step(
    scores: Sequence[np.ndarray],
    gates: Sequence[np.ndarray],
    savings: Sequence[float],
    sizes: Sequence[int],
    *,
    eta: float,
    done: int,
    per_iteration: int,
) -> Step:
    """One pruning of the released engine on layers of values; `sizes` are group sizes, `done` the prunings before.

    `per_iteration` is its --prune_per_iter, counted in sixteenths of a run.
    """
    adjusted = [s * g - eta * saving for s, g, saving in zip(scores, gates, savings, strict=True)]
    orders = [np.argsort(a, kind="stable") for a in adjusted]
    runs = [[order[i : i + n] for i in range(0, len(order), n)] for order, n in zip(orders, sizes, strict=True)]
    group_scores = [np.array([a[r].sum() for r in rs]) for a, rs in zip(adjusted, runs, strict=True)]
    everything = np.sort(np.concatenate(group_scores))
    threshold = float(everything[min(max(0, done * per_iteration // 16 - 1), len(everything) - 1)])
    after, removed = [], []
    for layer, (gate, rs, values) in enumerate(zip(gates, runs, group_scores, strict=True)):
        new = np.array(gate, np.float64)
        for run, value in list(zip(rs, values, strict=True))[:-1]:  # the last one stays
            if value <= threshold and new[run].any():
                removed.append((layer, int(new[run].sum()), float(value)))
                new[run] = 0
        after.append(new)
    return Step(adjusted, group_scores, threshold, after, removed)


def rank(
    scores: Units,
    masks: Units,
    dims: ViTDims,
    sizes: Mapping[str, int],
    targets: Sequence[Target],
    table: Cost,
    *,
    eta: float,
    done: int,
    per_iteration: int,
) -> Ranking:
    """`prune_step` between masks, as ranking.rank. `table(dims)` gives milliseconds; eta is per second."""
    scores, now = check_scores(scores, dims), kept_dims(masks, dims)
    gates = [(layer > 0).astype(np.float64) for layer in flatten(masks)]
    per_layer = [sizes["embed"]] + [sizes[kind] for _ in range(dims.depth) for kind in _FIELD]
    step = prune_step(
        flatten(scores),
        gates,
        unit_savings(table, now),
        per_layer,
        eta=eta,
        done=done,
        per_iteration=per_iteration,
    )
    new = Units(*(np.zeros_like(m) for m in masks))
    new.embed[:] = step.gates[0]
    for i in range(dims.depth):
        head, qk, v, mlp = step.gates[1 + 4 * i : 5 + 4 * i]
        new.head[i], new.mlp[i] = head, mlp
        new.qk[i], new.v[i] = head[:, None] * qk, head[:, None] * v
    names = [("embed", 0)] + [(kind, i) for i in range(dims.depth) for kind in _FIELD]
    removed = [Removal(*names[layer], count, score, step.threshold) for layer, count, score in step.removed]
    compact = kept_dims(new, dims)
    exhausted = all(gate.sum() <= size for gate, size in zip(step.gates, per_layer, strict=True))
    return Ranking(new, compact, removed, all(t.holds(compact) for t in targets), 0, exhausted)
