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

from nvit_jax.model.groups import Params
from nvit_jax.pruning.leastsquares import root, solve
from nvit_jax.pruning.moments import Moments

_EVEN = 1e-6  # of the mean variance is added to moments that a basis comes from


def value_basis(
    moments: Moments, metric: np.ndarray, heads: np.ndarray, width: int, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal bases of the value dims of all heads, and what fewer of them cost.

    Going down from `width` dims, in every head the direction goes whose loss the others make good for best: with S what
    is left of the head's covariance when the rest is known, and W its weights in the fit, the last left singular vector
    of S^1/2 W.

    Args:
      moments: of the values [heads * width], before the output projection.
      heads: [H] 1 for those that there are. A basis of another is the identity.

    Returns:
      bases [H, V, V], columns by importance; cost [width + 1], half the error in the metric when the last 0, 1, ...
      dims of every head are gone.
    """
    count, live = len(heads), np.flatnonzero(heads)
    rows = (live[:, None] * width + np.arange(width)).reshape(-1)
    c = moments.covariance[np.ix_(rows, rows)]
    scale = max(float(np.trace(c)) / len(c), np.finfo(float).tiny)
    c = c + strength * scale * np.eye(len(c))
    cross = moments.cross[rows] @ root(metric)
    kept = [np.eye(width) for _ in live]
    spans = [[np.eye(width)] for _ in live]
    explained = [float((cross * solve(c, cross)).sum())]
    for rank in range(width, 0, -1):
        spread = _block_diagonal(kept)
        inverse = solve(spread.T @ c @ spread, np.eye(spread.shape[1]))
        weights = inverse @ (spread.T @ cross)
        for i, basis in enumerate(kept):
            own = slice(i * rank, (i + 1) * rank)
            left = root(solve(inverse[own, own], np.eye(rank)))
            directions = np.linalg.svd(left @ weights[own], full_matrices=True)[0]
            best = solve(left, directions[:, : rank - 1]) if rank > 1 else np.zeros((rank, 0))
            kept[i] = np.linalg.qr(basis @ best)[0]
            spans[i].append(kept[i])
        spread = _block_diagonal(kept)
        explained.append(
            float(((spread.T @ cross) * solve(spread.T @ c @ spread, spread.T @ cross)).sum()) if rank > 1 else 0.0
        )
    bases = np.tile(np.eye(width), (count, 1, 1))
    for i, head in enumerate(live):
        bases[head] = _nested(spans[i][::-1])
    cost = np.maximum.accumulate(np.maximum(explained[0] - np.array(explained), 0)) / 2
    return bases, cost


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    height, width = blocks[0].shape
    out = np.zeros((len(blocks) * height, len(blocks) * width))
    for i, block in enumerate(blocks):
        out[i * height : (i + 1) * height, i * width : (i + 1) * width] = block
    return out


def _nested(spans: list[np.ndarray]) -> np.ndarray:
    """An orthonormal basis whose first r columns span the r-th of spaces that lie in each other."""
    width = len(spans[-1])
    basis = np.zeros((width, 0))
    for span in spans[1:]:
        rest = span - basis @ (basis.T @ span)
        column = np.linalg.svd(rest)[0][:, :1]
        column = column - basis @ (basis.T @ column)
        basis = np.concatenate([basis, column / np.linalg.norm(column)], 1)
    return basis


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


def change(params: Params, value: np.ndarray | None, logits: tuple[np.ndarray, np.ndarray] | None) -> Params:
    """A block's parameters in other bases: value [H, V, V] orthonormal; logits (A, B), each [H, Q, Q].

    The function stays. In the parameters' own types; kernels as in vit.Block.
    """
    out = {name: dict(leaves) if isinstance(leaves, dict) else leaves for name, leaves in params.items()}

    def turn(name: str, basis: np.ndarray) -> None:
        for leaf, array in out[name].items():
            turned = np.einsum("...hi,hij->...hj", np.asarray(array, np.float64), basis)
            out[name][leaf] = turned.astype(np.asarray(array).dtype)

    if value is not None:
        turn("v", value)
        kernel: Any = np.asarray(out["proj"]["kernel"])
        turned = np.einsum("hij,hid->hjd", value, kernel.astype(np.float64))
        out["proj"]["kernel"] = turned.astype(kernel.dtype)
    if logits is not None:
        turn("q", logits[0])
        turn("k", logits[1])
    return out
