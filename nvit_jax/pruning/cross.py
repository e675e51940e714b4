"""The criterion "fisher_set": what a unit is worth once those that matter less are gone.

To second order the loss of removing a set of units is v'Hv / 2, where v is 1 for the units of the set and H is the
Fisher matrix of the gates, the mean of gg' over samples of their gradient g. A diagonal criterion takes H_ii alone. The
cross terms H_ij tell that two units which do the same are dear together, and that two which cancel are cheap together.
There are far more of them than samples, so what is found of them is partly noise, and they count with a weight w <= 1
(a shrinkage to the diagonal). Units go one by one, each time the one for which

    H_ii / 2 + w sum over the units j that are gone of H_ij

is least for the MACs that it saves; sum_j H_ij is the mean over samples of g_i (sum_j g_j). The weight is the one
whose sets cost least on held-back images. The loss along that path, as a function of the MACs saved, is made convex:
its slope times a unit's saving is the unit's score, so that any rule which goes by score and saving goes along the
path. With w = 0 the order is that of `fisher`.

Where a head goes, its query/key and value dims go along. A head that has lost dims is what is left of it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import isotonic_regression

from nvit_jax.model.dims import Units, ViTDims, count_macs
from nvit_jax.model.masks import full_masks
from nvit_jax.pruning.ranking import unit_savings

WEIGHTS = (0.0, 0.1, 0.25, 0.5, 1.0)  # of the cross terms, that are tried
USUAL = 0.25  # where no images are held back
SHARES = (0.25, 0.5)  # of the MACs of the units, at which sets are judged
_ROUNDS = 1024  # in each of which the units that matter least go


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The units that may go, [U] each."""

    units: np.ndarray  # places among all units of the model, kind after kind, flattened
    saving: np.ndarray  # MACs, > 0
    head: np.ndarray  # of a query/key or value dim: its head's place among the candidates; otherwise -1


def candidates(
    dims: ViTDims, may_go: Callable[[str, int], bool], whole: Callable[[str, int], bool] = lambda kind, block: False
) -> Candidates:
    """`may_go(kind, block)`; what saves nothing stays, such as the only head of a block that may not go `whole`."""
    masks, saved = full_masks(dims), unit_savings(dims, count_macs, whole)
    saving = Units(*(np.zeros(m.shape) for m in masks))
    if may_go("embed", 0):
        saving.embed[:] = saved["embed"]
    for block in range(dims.depth):
        for kind, share in (("head", 1), ("qk", dims.heads[block]), ("v", dims.heads[block]), ("mlp", 1)):
            if may_go(kind, block) and share:
                getattr(saving, kind)[block] = saved[kind][block] / share
    number = dims.embed + np.arange(masks.head.size).reshape(*masks.head.shape, 1)
    nobody = Units(*(np.full(m.shape, -1) for m in masks))
    heads_of = nobody._replace(qk=nobody.qk * 0 + number, v=nobody.v * 0 + number)
    flat = _flat(saving) * _flat(masks)
    units = np.flatnonzero(flat > 0)
    place = np.full(len(flat) + 1, -1)  # the last one is that of no head
    place[units] = np.arange(len(units))
    return Candidates(units, flat[units], place[_flat(heads_of)[units]])


def _flat(units: Units) -> np.ndarray:
    return np.concatenate([np.ravel(u) for u in units])


class Path:
    """A set of units that grows."""

    def __init__(self, of: Candidates, gradients: np.ndarray, weight: float) -> None:
        """`gradients` [U, S]."""
        self.of, self.gradients, self.weight = of, gradients, weight
        self.total = np.zeros(gradients.shape[1], gradients.dtype)  # sum of the gradients of what is gone
        self.left = np.ones(len(of.units), bool)
        self.order: list[int] = []
        self.rises: list[float] = []
        # Of heads that have lost dims: the gradient of the rest.
        self.rests: dict[int, np.ndarray] = {}

    def gradient(self, unit: int) -> np.ndarray:
        """[S] of what is left of a unit."""
        return self.rests.get(unit, self.gradients[unit])

    def remove(self, unit: int) -> None:
        """One more."""
        gradient, head = self.gradient(unit), self.of.head[unit]
        self.order.append(unit)
        self.rises.append(float(np.mean(gradient * (gradient / 2 + self.weight * self.total), dtype=np.float64)))
        self.total = self.total + gradient
        self.left[unit] = False
        self.left[self.of.head == unit] = False
        if head >= 0:
            self.rests[head] = self.gradient(head) - gradient

    @property
    def loss(self) -> float:
        """Of the whole set, to second order."""
        return float(np.mean(np.square(self.total, dtype=np.float64))) / 2


def rounds(of: Candidates) -> int:
    """Products with all gradients that a path takes."""
    return -(-len(of.units) // _each(of))


def _each(of: Candidates) -> int:
    """Units that go in a round."""
    return -(-len(of.units) // _ROUNDS)


def paths(
    of: Candidates, gradients: np.ndarray, weights: Sequence[float], told: Callable[[int], None] = lambda done: None
) -> list[Path]:
    """One for each weight, until everything is gone. Up to _ROUNDS units each goes in a round of its own."""
    found = [Path(of, gradients, w) for w in weights]
    alone = np.einsum("us,us->u", gradients, gradients) / 2
    done = 0
    while any(path.left.any() for path in found):
        products = gradients @ np.stack([path.total for path in found], 1)
        for path, product in zip(found, products.T, strict=True):
            rise = alone + path.weight * product
            for head, rest in path.rests.items():
                rise[head] = rest @ (rest / 2 + path.weight * path.total)
            left = np.flatnonzero(path.left)
            for unit in left[np.argsort(rise[left] / of.saving[left], kind="stable")][: _each(of)]:
                if path.left[unit]:  # its head has not gone in this round
                    path.remove(int(unit))
        done += 1
        told(done)
    return found


def set_losses(path: Path, held: np.ndarray) -> list[float]:
    """What the sets at SHARES of the way cost on other samples [U, S]."""
    again, losses = Path(path.of, held, 1.0), []
    saved = np.cumsum(path.of.saving[path.order])
    ends = np.searchsorted(saved, np.array(SHARES) * saved[-1])
    for first, last in itertools.pairwise([0, *(ends + 1)]):
        for unit in path.order[first:last]:
            again.remove(unit)
        losses.append(again.loss)
    return losses


def choose(of: Candidates, fitted: np.ndarray, held: np.ndarray, told: Callable[[int], None]) -> float:
    """The weight whose sets, found from some samples [U, S], cost least on others."""
    found = paths(of, fitted, WEIGHTS, told)
    tiny = np.finfo(float).tiny
    judged = [np.log(np.maximum(set_losses(path, held), tiny)).mean() for path in found]
    return WEIGHTS[int(np.argmin(judged))]


def score(
    dims: ViTDims, of: Candidates, gradients: np.ndarray, held: np.ndarray, told: Callable[[int], None]
) -> tuple[Units, float]:
    """Scores of all units, 0 for those that may not go, and the weight of the cross terms.

    Args:
      gradients: [U, S] of all samples, float32. Four labels of 2,048 images and 14,000 units (DeiT-Tiny) take 460 MB,
        and as much again while the weight is chosen.
      held: [S] the samples that are held back from sets which the weight is chosen by.
      told: hears of every round, of 2 * `rounds(of)`.
    """
    weight = choose(of, gradients[:, ~held], gradients[:, held], told) if held.any() else USUAL
    (path,) = paths(of, gradients, (weight,), lambda done: told(rounds(of) + done))
    flat = np.zeros(sum(int(np.prod(shape)) for shape in dims.unit_shapes()))
    flat[of.units] = unit_scores(path)
    sizes = np.cumsum([np.prod(shape) for shape in dims.unit_shapes()])[:-1]
    shaped = (part.reshape(shape) for part, shape in zip(np.split(flat, sizes), dims.unit_shapes(), strict=True))
    return Units(*shaped), weight


def unit_scores(path: Path) -> np.ndarray:
    """[U] the slope of the convex path, times what the unit saves; those that go later have strictly more.

    Dims that went along with their head have the slope that it went at.
    """
    of, order = path.of, np.array(path.order)
    saving = of.saving[order]
    convex = isotonic_regression(np.array(path.rises) / saving, weights=saving).x
    convex = np.maximum(convex, 0)
    floor = max(float(convex[-1]), np.finfo(float).tiny) * 1e-12
    slope = np.empty(len(of.units))
    slope[order] = convex + floor * np.arange(1, len(order) + 1)
    along = np.setdiff1d(np.arange(len(of.units)), order)
    slope[along] = slope[of.head[along]]
    return np.asarray(slope * of.saving)
