"""Means and second moments that add up over batches, and how much a loss feels an error."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nvit_jax.errors import NotFinite


class Moments(NamedTuple):
    """Means and centred second moments of features x [F] and targets y [D], float64."""

    weight: float  # of all samples
    x: np.ndarray  # [F] mean
    y: np.ndarray  # [D] mean
    xx: np.ndarray  # [F, F] sum of (x - mean)(x - mean)'
    xy: np.ndarray  # [F, D]
    yy: np.ndarray  # [D] the diagonal alone

    def __add__(self, other: "Moments") -> "Moments":  # type: ignore[override]
        """Of both samples together (Chan, Golub and LeVeque 1983)."""
        if not self.weight or not other.weight:
            return self if self.weight else other
        total = self.weight + other.weight
        share, dx, dy = other.weight / total, other.x - self.x, other.y - self.y
        between = self.weight * share
        return Moments(
            total,
            self.x + share * dx,
            self.y + share * dy,
            self.xx + other.xx + between * np.outer(dx, dx),
            self.xy + other.xy + between * np.outer(dx, dy),
            self.yy + other.yy + between * dy**2,
        )

    def scaled(self, factor: float) -> "Moments":
        """As if every sample counted `factor` times."""
        return Moments(factor * self.weight, self.x, self.y, factor * self.xx, factor * self.xy, factor * self.yy)

    def mapped(self, features: np.ndarray) -> "Moments":
        """Of other features x' = x F, F [F, F']."""
        return self._replace(x=self.x @ features, xx=features.T @ self.xx @ features, xy=features.T @ self.xy)

    def about_zero(self) -> "Moments":
        """With means of 0 and second moments about 0: what a fit without a shift is made of."""
        w, x, y = self.weight, self.x, self.y
        whole = self.xx + w * np.outer(x, x), self.xy + w * np.outer(x, y), self.yy + w * y**2
        return Moments(w, 0 * x, 0 * y, *whole)

    @property
    def covariance(self) -> np.ndarray:
        """[F, F] of the features."""
        return self.xx / self.weight

    @property
    def cross(self) -> np.ndarray:
        """[F, D] covariance of features and targets."""
        return self.xy / self.weight


NOTHING = Moments(0.0, *(np.zeros(0),) * 5)  # no sample


def moments(x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
    """The fields of Moments of one batch: x [B, N, F], y [B, N, D], every token with weight 1, in x's type."""
    mean_x, mean_y = x.mean((0, 1)), y.mean((0, 1))
    cx, cy = x - mean_x, y - mean_y
    cross = jnp.einsum("bni,bnj->ij", cx, cy)
    weight = jnp.asarray(x.shape[0] * x.shape[1], x.dtype)
    return weight, mean_x, mean_y, jnp.einsum("bni,bnj->ij", cx, cx), cross, jnp.square(cy).sum((0, 1))


def check_finite(matrix: np.ndarray) -> None:
    """NotFinite where a model's features have overflowed."""
    if not np.isfinite(matrix).all():
        raise NotFinite("calibration: what flows in the model is not finite; look at its weights and the images")


def spectrum(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of a symmetric matrix. Raises NotFinite."""
    check_finite(matrix)
    values, vectors = np.linalg.eigh(matrix)
    return values, vectors


def of_batches(batches: list[tuple[Any, ...]], within: tuple[Any, ...]) -> Moments:
    """Moments of all batches, float64.

    Args:
      batches: the first three fields of each: its weight and means.
      within: xx, xy and yy about the batches' own means, summed over the batches.
    """
    if not batches:
        return NOTHING
    weights, x, y = (np.array([np.asarray(one[i], np.float64) for one in batches]) for i in range(3))
    total = float(weights.sum())
    means = weights @ x / total, weights @ y / total
    dx, dy = (np.sqrt(weights)[:, None] * (one - mean) for one, mean in zip((x, y), means, strict=True))
    xx, xy, yy = within
    return Moments(total, *means, xx + dx.T @ dx, xy + dx.T @ dy, yy + np.square(dy).sum(0))


def add(total: Any, more: Any) -> Any:
    """(sums, what their rounding has lost), with more on top. A sum of many is as exact as one of two (Kahan 1965).

    All are trees of arrays on devices. What was added up is sums - lost, in a wider type.
    """
    sums, lost = total
    more = jax.tree.map(jnp.subtract, more, lost)
    new = jax.tree.map(jnp.add, sums, more)
    return new, jax.tree.map(lambda new, old, more: (new - old) - more, new, sums, more)


class TokenMoments(NamedTuple):
    """Moments over the prefix tokens (class, distillation, registers) and over the patches, apart."""

    prefix: Moments
    patches: Moments

    def __add__(self, other: "TokenMoments") -> "TokenMoments":  # type: ignore[override]
        return TokenMoments(self.prefix + other.prefix, self.patches + other.patches)

    def mapped(self, features: np.ndarray) -> "TokenMoments":
        """Of other features x' = x F."""
        return TokenMoments(*(one.mapped(features) if one.weight else one for one in self))

    def about_zero(self) -> "TokenMoments":
        """As of Moments."""
        return TokenMoments(*(one.about_zero() if one.weight else one for one in self))

    def together(self, shares: tuple[float, float]) -> Moments:
        """With these weights of a token."""
        found = self.prefix.scaled(shares[0]) + self.patches.scaled(shares[1])
        return found.scaled(1 / found.weight) if found.weight else found


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """How much a loss feels a change of what a part writes into the stream.

    metric: [D, D] mean over images of the sum over tokens of g g', g the gradient of the loss at the part's output.
      With labels drawn from the model it is the Fisher matrix there: the loss of an error e is about e' metric e / 2.
    prefix, patches: the mean over such tokens of |g|^2.
    """

    metric: np.ndarray
    prefix: float
    patches: float

    def of(self, embed: np.ndarray) -> "Sensitivity":
        """To errors in the channels that are left alone; `embed` [D] is 0 for the others."""
        return dataclasses.replace(self, metric=self.metric * np.outer(embed, embed))

    def shares(self, power: float) -> tuple[float, float]:
        """Weights of a prefix token and of a patch in a regression: what the loss feels of it, to a power.

        At 0 they are alike. At 1 it is the loss's own weight: the class token alone decides in the last block. It is
        too few samples to fit weights to.
        """
        most = max(self.prefix, self.patches)
        if not most > 0:
            return 1.0, 1.0
        return max(self.prefix / most, 1e-9) ** power, max(self.patches / most, 1e-9) ** power
