"""2:4 sparsity: of 4 weights in a row that a product sums over, at most 2 are not 0. N:M in general.

Sparse tensor cores skip the others (Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks",
arXiv:2104.08378). As there, and as NVIDIA's ASP does it: choose once which weights of a trained model stay, then train
on with the others held at 0. It works on every linear layer: q, k, v, proj, fc1, fc2, pre_logits and the classifiers.
Not on the patch embedding: sparse convolutions count along the input channels, of which an image has 3.

Every matrix is seen as PyTorch stores it, [outputs, inputs], so that a group is 4 neighbours of a row of the exported
file. The last group of a row may be incomplete; it is what hardware sees when it pads the row with zeros.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nvit_jax.model.groups import Params, flatten, unflatten

N, M = 2, 4  # what hardware takes
PATTERN = f"{N}:{M}"
SPARSITY = ("magnitude", "gradient")  # the scores by which weights are chosen


def _inputs(path: str) -> int:
    """How many leading axes of a parameter its product sums over; 0 for what is no linear layer."""
    if not path.endswith("kernel") or path.startswith("patch_embed"):
        return 0
    return 2 if path.endswith("proj/kernel") else 1  # [H, V, D] and [inputs, ...]


def _matrix(leaf: np.ndarray, inputs: int) -> np.ndarray:
    """[outputs, inputs]."""
    return np.asarray(leaf).reshape(int(np.prod(leaf.shape[:inputs])), -1).T


def matrices(params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(path, [outputs, inputs]) of every linear layer."""
    for path, leaf in flatten(params):
        if inputs := _inputs(path):
            yield path, _matrix(leaf, inputs)


def _groups(rows: np.ndarray, m: int, fill: float) -> np.ndarray:
    """[outputs, groups, m] of [outputs, inputs]; an incomplete group is filled up."""
    missing = -rows.shape[1] % m
    return np.pad(rows, ((0, 0), (0, missing)), constant_values=fill).reshape(len(rows), -1, m)


def keep_largest(scores: np.ndarray, n: int = N, m: int = M) -> np.ndarray:
    """Scores [outputs, inputs] -> bool of that shape: True for the n largest of each m in a row.

    Of equal ones the earlier stays. An incomplete last group keeps n, too, or all that it has.
    """
    grouped = _groups(scores, m, -np.inf)
    first = np.argsort(-grouped, axis=-1, kind="stable")[..., :n]
    kept = np.zeros(grouped.shape, bool)
    np.put_along_axis(kept, first, True, axis=-1)
    return kept.reshape(len(scores), -1)[:, : scores.shape[1]]


def find_masks(params: Mapping[str, Any], squares: Mapping[str, Any] | None = None, n: int = N, m: int = M) -> Params:
    """Masks in the tree of `params`: bool in the shape of a linear layer's kernel, a single True for all else.

    Without `squares` the magnitude |w| decides, as in ASP. With them w^2 * squares does, where `squares`, in the tree
    of `params`, is the mean over batches of (dl/dw)^2, l being the mean loss of a batch. That is optimal brain damage
    (LeCun et al. 1990) but for a factor, with an empirical Fisher diagonal, taken by batch, for the Hessian's.
    """
    gradients: Mapping[str, Any] = {} if squares is None else dict(flatten(squares))
    out: dict[str, Any] = {}
    for path, leaf in flatten(params):
        inputs, scores = _inputs(path), np.square(np.asarray(leaf, np.float64))
        if not inputs:
            out[path] = np.True_
            continue
        if squares is not None:
            scores = scores * np.asarray(gradients[path], np.float64)
        out[path] = keep_largest(_matrix(scores, inputs), n, m).T.reshape(leaf.shape)
    return unflatten(out)


def apply(params: Params, masks: Params) -> Params:
    """0 where a mask is False."""
    return jax.tree.map(lambda p, kept: np.where(kept, p, np.zeros_like(p)), params, masks)


def count_nonzero(params: Params) -> int:
    """Parameters that are not 0, of all kinds."""
    return sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(params))


def check(named: Iterable[tuple[str, np.ndarray]], n: int = N, m: int = M) -> int:
    """The number of matrices; RuntimeError that names the first one, [outputs, inputs], with more than n of m not 0."""
    count = 0
    for name, rows in named:
        worst = int(np.count_nonzero(_groups(rows != 0, m, False), axis=-1).max(initial=0))
        if worst > n:
            raise RuntimeError(f"{name} is not {n}:{m} sparse: {worst} of {m} weights in a row are not 0")
        count += 1
    return count


# ------------------------------------------------------------------------------------------------ training


def held(optimizer: optax.GradientTransformation, masks: Params) -> optax.GradientTransformation:
    """`optimizer`, for weights that are 0 where `masks` are False and stay 0: their gradient is taken for 0.

    So the moments stay 0, weight decay finds nothing, and clipping sees the norm of what is trained. The masks are part
    of the state: a saved run resumes with its own.
    """

    def init(params: Params) -> Any:
        return jax.tree.map(jnp.asarray, masks), optimizer.init(params)

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        kept, inner = state
        gradient = jax.tree.map(lambda g, k: jnp.where(k, g, 0), gradient, kept)
        updates, inner = optimizer.update(gradient, inner, params)
        return updates, (kept, inner)

    return optax.GradientTransformation(init, update)


def sum_of_squares() -> optax.GradientTransformation:
    """An optimizer that leaves the weights alone; its state is the sum of the squared gradients that it has seen."""

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.zeros_like, gradient), jax.tree.map(lambda s, g: s + g * g, state, gradient)

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
