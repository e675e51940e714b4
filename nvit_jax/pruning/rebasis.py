"""Changes of basis that leave a model's function as it is, and make its dims ones that can go. NumPy, float64.

Value dims. A head writes (v T) (T^-1 P) for any invertible T: z T is what the rest of the model sees of it. T is
orthonormal here, its columns ordered so that the first r are the best r-dim summary of the head's values, for the
output in the metric of the loss and given what the other heads hold.

Query/key dims. The logits q k' are (q A)(k B)' for any A B' = I. Let Q and K be the roots of the second moments of
queries, and of keys about their mean over the tokens (softmax does not see what all keys of an image share), and U s V'
the singular values of Q K. With A = Q^-1 U s^1/2 and B = K^-1 V s^1/2 the first r dims are the best approximation of
the logits by rank r. Biases come along.
"""

from typing import Any

import numpy as np
from scipy import linalg

from nvit_jax.errors import UserError
from nvit_jax.model import groups
from nvit_jax.model.groups import Params
from nvit_jax.pruning.leastsquares import inverse, root, without
from nvit_jax.pruning.moments import Moments

_EVEN = 1e-6  # of the mean variance is added to moments that a basis comes from


def value_basis(
    moments: Moments, metric: np.ndarray, heads: np.ndarray, width: int, strength: float, *, fixed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal bases of the value dims of all heads, and what fewer of them cost.

    Going down from `width` dims, in every head the direction goes whose loss the others make good for best, and the fit
    of all others is updated.

    Args:
      moments: of the values [heads * width], before the output projection.
      heads: [H] 1 for those that there are. A basis of another is the identity.
      fixed: the dims themselves go, and the bases are other orders of them.

    Returns:
      bases [H, V, V], columns by importance; cost [width + 1], half the error in the metric when the last 0, 1, ...
      dims of every head are gone.
    """
    count, live = len(heads), np.flatnonzero(heads)
    rows = (live[:, None] * width + np.arange(width)).reshape(-1)
    c = moments.covariance[np.ix_(rows, rows)]
    bases = np.tile(np.eye(width), (count, 1, 1))
    scale = float(np.trace(c)) / max(len(c), 1)
    if not scale > 0:
        return bases, np.zeros(width + 1)  # values that never change carry nothing
    inverted = inverse(c + strength * scale * np.eye(len(c)))
    weights = inverted @ (moments.cross[rows] @ root(metric))
    frames = [np.eye(width) for _ in live]  # of what is left of each head
    cost = [0.0]
    for rank in range(width, 0, -1):
        for i, head in enumerate(live):
            own = slice(i * rank, (i + 1) * rank)
            turn = (_last_dim if fixed else _last)(weights[own], inverted[own, own])
            weights[own] = turn.T @ weights[own]
            inverted[own] = turn.T @ inverted[own]
            inverted[:, own] = inverted[:, own] @ turn
            frames[i] = frames[i] @ turn
            bases[head][:, rank - 1], frames[i] = frames[i][:, -1], frames[i][:, :-1]
        gone = np.arange(rank - 1, len(weights), rank)
        weights, inverted, loss = without(weights, inverted, gone)
        cost.append(cost[-1] + loss)
    return bases, np.array(cost) / 2


def _last(weights: np.ndarray, inverted: np.ndarray) -> np.ndarray:
    """[r, r], orthonormal: its last column is the direction u that goes, of least |u' W|^2 / (u' C^-1 u).

    That is the optimal brain surgeon's loss, of a direction instead of a feature.
    """
    _, vectors = linalg.eigh(weights @ weights.T, inverted, subset_by_index=[0, 0])
    u = vectors[:, 0] / np.linalg.norm(vectors[:, 0])
    mirror = -np.copysign(1.0, u[-1]) * u  # below 0 in the last place: no cancellation
    mirror[-1] -= 1
    return np.asarray(np.eye(len(u)) - 2 * np.outer(mirror, mirror) / (mirror @ mirror))


def _last_dim(weights: np.ndarray, inverted: np.ndarray) -> np.ndarray:
    """As `_last`, of the dims as they are: the one that goes changes places with the last one."""
    losses = np.square(weights).sum(1) / np.maximum(np.diag(inverted), np.finfo(float).tiny)
    order = np.arange(len(weights))
    least = int(losses.argmin())
    order[[least, -1]] = order[[-1, least]]
    return np.asarray(np.eye(len(weights))[:, order])


def logit_basis(queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one head: A and B [Q, Q] with A B' = I, and the squared singular values [Q], the largest first.

    Args:
      queries, keys: [Q, Q] second moments, of keys about their mean over the tokens.
    """
    size = len(queries)

    def even(matrix: np.ndarray) -> np.ndarray:
        scale = max(float(np.trace(matrix)) / size, np.finfo(float).tiny)
        return np.asarray(matrix / scale + _EVEN * np.eye(size)), scale  # type: ignore[return-value]

    (q, q_scale), (k, k_scale) = even(queries), even(keys)
    q_root, k_root = root(q), root(k)
    u, s, _ = np.linalg.svd(q_root @ k_root)
    a = np.linalg.solve(q_root, u) * np.sqrt(s)
    return a, np.linalg.inv(a).T, np.square(s) * q_scale * k_scale


def logit_order(queries: np.ndarray, keys: np.ndarray, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Of one head that must keep its basis: its units, of `each` dims, in the order in which the logits need them.

    And the second moments [U] of what they add to the logits, in that order.

    Args:
      queries, keys: [Q, Q] as for `logit_basis`.
    """
    units = len(queries) // each
    squares = np.einsum("uaub,uaub->u", *(m.reshape(units, each, units, each) for m in (queries, keys)))
    order = np.argsort(-squares, kind="stable")
    return order, squares[order]


def reorder(params: Params, orders: np.ndarray) -> Params:
    """A block's parameters with the query/key units of each head in another order [H, Q]. The function stays."""
    embed, heads, values = params["v"]["kernel"].shape
    kept = {"embed": np.arange(embed), "head": np.arange(heads), "qk": orders}
    kept["v"] = np.tile(np.arange(values), (heads, 1))
    kept["mlp"] = np.arange(len(params["fc2"]["kernel"]) if "kernel" in params["fc2"] else 0)
    found: Params = groups.take({"block_0": params}, [kept])["block_0"]
    return found


def change(params: Params, value: np.ndarray | None, logits: tuple[np.ndarray, np.ndarray] | None) -> Params:
    """A block's parameters in other bases: value [H, V, V] orthonormal; logits (A, B), each [H, Q, Q].

    The function stays. In the parameters' own types; kernels as in vit.Block. UserError for logits of queries and keys
    that a norm or rotary positions see dim by dim, and for values that a norm sees so; their order may change.
    """
    if logits is not None and (fixed := [name for name in ("q_norm", "rotary") if name in params]):
        what = "are normalised" if fixed[0] == "q_norm" else "have rotary positions"
        raise UserError(f"queries and keys that {what} cannot be put into another basis; they can be reordered")
    if value is not None and "proj_norm" in params and not np.isin(value, (0, 1)).all():
        raise UserError("values that are normalised cannot be put into another basis; they can be reordered")
    out = {name: dict(leaves) if isinstance(leaves, dict) else leaves for name, leaves in params.items()}

    def turn(name: str, basis: np.ndarray) -> None:
        for leaf, array in out[name].items():
            turned = np.einsum("...hi,hij->...hj", np.asarray(array, np.float64), basis)
            out[name][leaf] = turned.astype(np.asarray(array).dtype)

    if value is not None:
        turn("v", value)
        if "proj_norm" in out:
            turn("proj_norm", value)
        kernel: Any = np.asarray(out["proj"]["kernel"])
        turned = np.einsum("hij,hid->hjd", value, kernel.astype(np.float64))
        out["proj"]["kernel"] = turned.astype(kernel.dtype)
    if logits is not None:
        turn("q", logits[0])
        turn("k", logits[1])
    return out
