"""The one solver of compensation: what stays makes good for what goes, by regularised least squares. NumPy, float64.

A part of a block writes y = x W + b into the residual stream, x its features (value dims or mlp neurons). When features
go, W over the others is fitted anew, so that x W + b comes as close as it can to a target, in the mean over tokens:

    W = W0 + (C + r mean(diag C) I)^-1 (cov(x, y) - C W0),  C = cov(x)

with the means taken care of by b. The ridge r pulls towards the weights W0 that are there, so that what the images do
not determine keeps its value, and no image at all changes nothing.
"""

from typing import NamedTuple

import numpy as np

from nvit_jax.pruning.moments import Moments, Sensitivity, TokenMoments, check_finite, spectrum

# Tried on held-back images:
RIDGES = (1e-6, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)  # parts of the mean variance
POWERS = (0.0, 0.25, 0.5)  # of the tokens' weights
_LEAST = 1e-9  # of the mean variance: what is smaller is rounding
_SMALL = 1e-150  # the squares of smaller numbers, and of their inverses, are not in float64
_CHUNKS = 96  # in which the features of wide layers go
_WAITING = 256  # features that are gone, before C^-1 is written anew without them


# NumPy alone: SciPy has a BLAS of its own, and the threads of both, in turns, wait for each other.


def positive(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric positive (semi)definite matrix with more on its diagonal, if it needs that, and its Cholesky factor.

    The factor is the lower one; none of its diagonal is below _SMALL.
    """
    check_finite(matrix)
    scale = max(float(np.trace(matrix)) / max(len(matrix), 1), np.finfo(float).tiny)
    more = 0.0
    while True:
        try:
            raised = matrix + more * scale * np.eye(len(matrix)) if more else matrix
            factor = np.linalg.cholesky(raised)
            if (factor.diagonal() > _SMALL).all():
                return raised, factor
        except np.linalg.LinAlgError:
            pass
        more = 10 * more or _LEAST


def solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """matrix^-1 right, of a matrix that is made `positive`."""
    return np.linalg.solve(positive(matrix)[0], right)


def inverse(matrix: np.ndarray) -> np.ndarray:
    """Of a matrix that is made `positive`."""
    return np.linalg.inv(positive(matrix)[0])


def bias(moments: Moments, weights: np.ndarray) -> np.ndarray:
    """[D] that makes the mean right."""
    return np.asarray(moments.y - moments.x @ weights)


def ridge_errors(tried: list[Moments], start: np.ndarray, held: Moments, metric: np.ndarray) -> np.ndarray:
    """[P, R]: of the fits to each of `tried` with each of RIDGES, the mean of |x W + b - y|^2 over what `held` is of.

    With C = V diag(v) V', R = V' (cov(x, y) - C W0) and s = 1 / (v + r mean(v)) a fit is W0 + V diag(s) R, so that its
    error is a polynomial of second degree in s: all ridges take one eigendecomposition.

    Args:
      start: W0 [F, D], the weights that a fit is drawn towards.
      metric: [D], the weights of the outputs in the error.
    """
    product = held.covariance @ start
    about_mean = held.yy / held.weight + (start * (product - 2 * held.cross)).sum(0)
    found = np.empty((len(tried), len(RIDGES)))
    for row, moments in enumerate(tried):
        values, vectors = spectrum(moments.covariance)
        values = np.maximum(values, 0)
        shift = held.x - moments.x
        wrong = shift @ start + moments.y - held.y  # the bias makes the mean right on `moments`
        found[row] = metric @ (about_mean + wrong**2)
        if not values.sum() > 0:
            continue  # features that never change explain nothing
        right = moments.cross - moments.covariance @ start
        slope = held.cross - product - np.outer(shift, wrong)
        right, slope = np.split(vectors.T @ np.concatenate([right, slope], 1), 2, axis=1)
        weighed, shift = right * metric, vectors.T @ shift
        square = (vectors.T @ held.covariance @ vectors + np.outer(shift, shift)) * (weighed @ right.T)
        shares = 1 / (values + np.array(RIDGES)[:, None] * values.mean())
        found[row] += ((shares @ square) * shares).sum(1) - 2 * shares @ (slope * weighed).sum(1)
    return found


def ridge(moments: Moments, start: np.ndarray, strength: float) -> np.ndarray:
    """[F, D], the fit with one ridge, drawn towards `start`."""
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


def fit(
    fitted: TokenMoments,
    held: TokenMoments,
    start: np.ndarray,
    felt: Sensitivity,
    *,
    use_held: bool,
    powers: tuple[float, ...] = POWERS,
) -> Fit:
    """Ridge and token weights are those that err least on the held-back images, in the loss's own metric.

    Args:
      use_held: all images are fitted to in the end. Without held-back images the middle of RIDGES is taken.
      powers: of the tokens' weights, that are tried.
    """
    metric, own = np.maximum(np.diag(felt.metric), 0), held.together(felt.shares(1.0))
    power, strength = powers[0], RIDGES[len(RIDGES) // 2]
    if own.weight:
        wrong = ridge_errors([fitted.together(felt.shares(power)) for power in powers], start, own, metric)
        row, column = np.unravel_index(wrong.argmin(), wrong.shape)
        power, strength = powers[row], RIDGES[column]
    moments = (fitted + held if use_held else fitted).together(felt.shares(power))
    weights = ridge(moments, start, strength)
    return Fit(weights, bias(moments, weights), strength, power)


def root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semidefinite matrix; what rounding made negative is 0."""
    values, vectors = spectrum(matrix)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)


def without(weights: np.ndarray, inverted: np.ndarray, gone: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The best fit of the features that are left: weights, C^-1 of these, and by how much more it errs.

    The optimal brain surgeon (Hassibi and Stork 1993) for whole rows of W: without the features g the best fit of the
    others errs by tr(W_g' ((C^-1)_gg)^-1 W_g) more.

    Args:
      weights, inverted: the best fit W [F, D] of all features, and C^-1 [F, F].
    """
    stay = np.setdiff1d(np.arange(len(weights)), gone)
    between = inverted[np.ix_(stay, gone)]
    both = solve(inverted[np.ix_(gone, gone)], np.concatenate([weights[gone], between.T], 1))
    of_weights, of_inverse = np.split(both, [weights.shape[1]], axis=1)
    loss = max(float((weights[gone] * of_weights).sum()), 0.0)
    return weights[stay] - between @ of_weights, inverted[np.ix_(stay, stay)] - between @ of_inverse, loss


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
    # C^-1 of what is left is inverted - taken taken'; every chunk g that goes adds (C^-1)_xg K^-T to `taken`, with
    # (C^-1)_gg = K K'. That product is made after many chunks, so that most of the work is in large ones.
    left = np.flatnonzero(live)
    chunk = max(least, len(left) // _CHUNKS)
    c = moments.covariance[np.ix_(left, left)]
    scale = max(float(np.trace(c)) / max(len(c), 1), np.finfo(float).tiny)
    inverted = inverse(c + strength * scale * np.eye(len(c)))
    weights = inverted @ (moments.cross[left] @ root(metric))
    order: list[int] = []
    cost = [0.0]
    while len(left):
        there, diagonal, taken = np.ones(len(left), bool), np.diag(inverted).copy(), np.zeros((0, len(left)))
        change = np.empty_like(weights)
        while there.any() and len(taken) < _WAITING:
            loss = np.einsum("fd,fd->f", weights, weights) / np.maximum(diagonal, np.finfo(float).tiny)
            gone = np.argsort(np.where(there, loss, np.inf), kind="stable")[: min(chunk, there.sum())]
            rows = inverted[gone] - taken[:, gone].T @ taken
            _, factor = positive(rows[:, gone])
            new, of_weights = np.linalg.solve(factor, rows), np.linalg.solve(factor, weights[gone])
            weights -= np.matmul(new.T, of_weights, out=change)
            diagonal -= np.square(new).sum(0)
            taken, there[gone] = np.concatenate([taken, new]), False
            order += left[gone].tolist()
            cost += list(np.linspace(cost[-1], cost[-1] + float(np.square(of_weights).sum()), len(gone) + 1)[1:])
        left, weights, taken = left[there], weights[there], taken[:, there]
        inverted = inverted[np.ix_(there, there)] - taken.T @ taken
    return np.array(order, int), np.array(cost) / 2
