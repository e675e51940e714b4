"""The one solver of compensation: what stays makes good for what goes, by regularised least squares. NumPy, float64.

A part of a block writes y = x W + b into the residual stream, x its features (value dims or mlp neurons). When features
go, W over the others is fitted anew, so that x W + b comes as close as it can to a target, in the mean over tokens:

    W = W0 + (C + r mean(diag C) I)^-1 (cov(x, y) - C W0),  C = cov(x)

with the means taken care of by b. The ridge r pulls towards the weights W0 that are there, so that what the images do
not determine keeps its value, and no image at all changes nothing.
"""

from typing import NamedTuple

import numpy as np
from scipy import linalg

from nvit_jax.pruning.moments import Moments, Sensitivity, TokenMoments, check_finite, spectrum

# Tried on held-back images:
RIDGES = (1e-6, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)  # parts of the mean variance
POWERS = (0.0, 0.25, 0.5)  # of the tokens' weights
_LEAST = 1e-9  # of the mean variance: what is smaller is rounding
_SMALL = 1e-150  # the squares of smaller numbers, and of their inverses, are not in float64
_CHUNKS = 96  # in which the features of wide layers go
_WAITING = 256  # features that are gone, before C^-1 is written anew without them


def cholesky(matrix: np.ndarray) -> np.ndarray:
    """The lower factor of a symmetric positive (semi)definite matrix: more on the diagonal if it fails."""
    check_finite(matrix)
    scale = max(float(np.trace(matrix)) / max(len(matrix), 1), np.finfo(float).tiny)
    more = 0.0
    while True:
        try:
            raised = matrix + more * scale * np.eye(len(matrix)) if more else matrix
            factor = linalg.cholesky(raised, lower=True, check_finite=False)
            if (factor.diagonal() > _SMALL).all():
                return np.asarray(factor)
        except linalg.LinAlgError:
            pass
        more = 10 * more or _LEAST


def solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """matrix^-1 right, by `cholesky`."""
    return np.asarray(linalg.cho_solve((cholesky(matrix), True), right, check_finite=False))


def bias(moments: Moments, weights: np.ndarray) -> np.ndarray:
    """[D] that makes the mean right."""
    return np.asarray(moments.y - moments.x @ weights)


def error(moments: Moments, weights: np.ndarray, offset: np.ndarray, metric: np.ndarray) -> float:
    """Mean of |x W + b - y|^2 over what the moments are of, the outputs weighted by metric [D]."""
    wrong = moments.x @ weights + offset - moments.y
    squares = moments.yy / moments.weight - 2 * (weights * moments.cross).sum(0)
    squares = squares + (weights * (moments.covariance @ weights)).sum(0) + wrong**2
    return float((squares * metric).sum())


def ridge_errors(moments: Moments, start: np.ndarray, held: Moments, metric: np.ndarray) -> np.ndarray:
    """[len(RIDGES)] `error` on other moments of the fits with all RIDGES: one eigendecomposition for all of them.

    With C = V diag(v) V', R = V' (cov(x, y) - C W0) and s = 1 / (v + r mean(v)) a fit is W0 + V diag(s) R, so that its
    error is a polynomial of second degree in s.

    Args:
      start: W0 [F, D], the weights that a fit is drawn towards.
      metric: [D] as for `error`.
    """
    values, vectors = spectrum(moments.covariance)
    values = np.maximum(values, 0)
    at_start = error(held, start, bias(moments, start), metric)
    if not values.sum() > 0:
        return np.full(len(RIDGES), at_start)
    right = vectors.T @ (moments.cross - moments.covariance @ start)
    # The bias makes the mean right on `moments`, so the mean of the error on `held` moves with the weights, too.
    shift, gap = held.x - moments.x, moments.y - held.y
    second = held.covariance + np.outer(shift, shift)
    slope = vectors.T @ (held.cross - np.outer(shift, gap) - second @ start)
    weighed = right * metric
    linear = (slope * weighed).sum(1)
    square = (vectors.T @ second @ vectors) * (weighed @ right.T)
    shares = 1 / (values + np.array(RIDGES)[:, None] * values.mean())
    return np.asarray(at_start - 2 * shares @ linear + ((shares @ square) * shares).sum(1))


def ridge(moments: Moments, start: np.ndarray, strength: float) -> np.ndarray:
    """[F, D], the fit with one ridge, drawn towards `start`. By Cholesky: no eigenvalues are needed."""
    c = moments.covariance
    check_finite(c)
    scale = float(np.trace(c)) / max(len(c), 1)
    if not scale > 0:
        return start  # features that never change explain nothing
    return np.asarray(start + solve(c + strength * scale * np.eye(len(c)), moments.cross - c @ start))


class Fit(NamedTuple):
    """Weights that compensate, and how they were found."""

    weights: np.ndarray  # [F, D]
    bias: np.ndarray  # [D]
    strength: float  # the ridge
    power: float  # of the tokens' weights, see Sensitivity.shares


def fit(fitted: TokenMoments, held: TokenMoments, start: np.ndarray, felt: Sensitivity, *, use_held: bool) -> Fit:
    """Ridge and token weights are those that err least on the held-back images, in the loss's own metric.

    use_held: all images are fitted to in the end. Without held-back images the middle of RIDGES is taken.
    """
    metric, own = np.maximum(np.diag(felt.metric), 0), held.together(felt.shares(1.0))
    power, strength, least = POWERS[0], RIDGES[len(RIDGES) // 2], np.inf
    for tried in POWERS if own.weight else ():
        wrong = ridge_errors(fitted.together(felt.shares(tried)), start, own, metric)
        best = int(wrong.argmin())
        if wrong[best] < least:
            power, strength, least = tried, RIDGES[best], wrong[best]
    moments = (fitted + held if use_held else fitted).together(felt.shares(power))
    weights = ridge(moments, start, strength)
    return Fit(weights, bias(moments, weights), strength, power)


def root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semidefinite matrix; what rounding made negative is 0."""
    values, vectors = spectrum(matrix)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)


def without(weights: np.ndarray, inverse: np.ndarray, gone: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The best fit of the features that are left: weights, C^-1 of these, and by how much more it errs.

    The optimal brain surgeon (Hassibi and Stork 1993) for whole rows of W: without the features g the best fit of the
    others errs by tr(W_g' ((C^-1)_gg)^-1 W_g) more.

    Args:
      weights, inverse: the best fit W [F, D] of all features, and C^-1 [F, F].
    """
    stay = np.setdiff1d(np.arange(len(weights)), gone)
    between = inverse[np.ix_(stay, gone)]
    both = solve(inverse[np.ix_(gone, gone)], np.concatenate([weights[gone], between.T], 1))
    of_weights, of_inverse = np.split(both, [weights.shape[1]], axis=1)
    loss = max(float((weights[gone] * of_weights).sum()), 0.0)
    return weights[stay] - between @ of_weights, inverse[np.ix_(stay, stay)] - between @ of_inverse, loss


def removal(
    moments: Moments, metric: np.ndarray, live: np.ndarray, strength: float, least: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """The order in which features go, those that can best be made good for first, and what that costs.

    At least `least` of those that alone cost least go together, with their joint cost; then the fit is updated, see
    `without`.

    Args:
      metric: [D, D] of the error, see moments.Sensitivity.
      live: [F] 0 for features that are not there.

    Returns:
      order [n] of the live features; cost [n + 1], half the error in the metric when the first 0, 1, ... n are gone.
    """
    # C^-1 of what is left is inverse - taken taken', by the block that goes: taken = (C^-1)_xg K^-T, (C^-1)_gg = K K'.
    # `taken` grows for a while before that product is made, so that most of the work is large products.
    left = np.flatnonzero(live)
    chunk = max(least, len(left) // _CHUNKS)
    c = moments.covariance[np.ix_(left, left)]
    scale = max(float(np.trace(c)) / max(len(c), 1), np.finfo(float).tiny)
    inverse = solve(c + strength * scale * np.eye(len(c)), np.eye(len(c)))
    weights = inverse @ (moments.cross[left] @ root(metric))
    order: list[int] = []
    cost = [0.0]
    while len(left):
        there, diagonal, taken = np.ones(len(left), bool), np.diag(inverse).copy(), np.zeros((len(left), 0))
        while there.any() and taken.shape[1] < _WAITING:
            loss = np.square(weights).sum(1) / np.maximum(diagonal, np.finfo(float).tiny)
            gone = np.argsort(np.where(there, loss, np.inf), kind="stable")[: min(chunk, there.sum())]
            columns = inverse[:, gone] - taken @ taken[gone].T
            factor = cholesky(columns[gone])
            new = linalg.solve_triangular(factor, columns.T, lower=True, check_finite=False).T
            of_weights = linalg.solve_triangular(factor, weights[gone], lower=True, check_finite=False)
            weights, diagonal = weights - new @ of_weights, diagonal - np.square(new).sum(1)
            taken, there[gone] = np.concatenate([taken, new], 1), False
            order += left[gone].tolist()
            cost += list(np.linspace(cost[-1], cost[-1] + float(np.square(of_weights).sum()), len(gone) + 1)[1:])
        left, weights, taken = left[there], weights[there], taken[there]
        inverse = inverse[np.ix_(there, there)] - taken @ taken.T
    return np.array(order, int), np.array(cost) / 2
