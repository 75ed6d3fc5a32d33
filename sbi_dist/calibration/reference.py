"""What theta is like before and after a glance at x: its scale, and a regression of theta on x.

TARP only sees a posterior that ignores x if its reference points depend on x (Lemos et al. 2023,
arXiv:2302.03026, section 3), and any function of x is valid. A plain regression is a good one: it
is near the truth wherever the data say something, so that draws of a posterior that ignores them
lie farther away than the truth does.

Fitted to simulations of the training: fitted to held-out ones, its guess would know their theta.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

__all__ = ["Regression", "Scale"]

_FEATURES, _RIDGES = 256, np.logspace(-3, 5, 17)
# Of x in sd: beyond, only the logarithm counts, so that one wild number is not all there is.
_LINEAR = 3.0
# Numbers of x that are looked at, evenly spaced: ten thousand rows of these take 160 MB.
_MOST_X = 2048


@dataclasses.dataclass(frozen=True, eq=False)
class Scale:
    """Mean and sd of each parameter, (D,) each: the units of distances between parameters."""

    mean: np.ndarray
    sd: np.ndarray

    @classmethod
    def of(cls, theta: np.ndarray) -> Scale:
        """Of theta (M, D); a parameter that does not vary has the unit 1."""
        values = np.asarray(theta, dtype=np.float64)
        sd = values.std(axis=0)
        return cls(values.mean(axis=0), np.where(sd > 0, sd, 1.0))


@dataclasses.dataclass(frozen=True, eq=False)
class Regression:
    """Ridge regression of theta on x, its squashed values and random ReLU features of them.

    Attributes:
        x_mean, x_sd: (C,) of x, flattened, of which at most 2,048 numbers are taken.
        inner: (C + 1, F) weights and biases of the features, as drawn.
        outer: (C + F + 1, D) fitted weights, or (F + 1, D) where x is longer than F.
        r2: (D,) share of the variance of theta that it explains in simulations left out.
    """

    x_mean: np.ndarray
    x_sd: np.ndarray
    inner: np.ndarray
    outer: np.ndarray
    r2: np.ndarray

    @classmethod
    def fit(cls, theta: np.ndarray, x: np.ndarray, seed: int = 0) -> Regression:
        """Fit to theta (M, D) and x (M, *x_shape); the ridge is chosen on every fifth row.

        Ten thousand rows are plenty. Values of x that are not finite count as their mean.

        Raises:
            ValueError: fewer than 20 rows.
        """
        if len(theta) < 20:
            raise ValueError(f"a regression on {len(theta)} simulations; needs at least 20")
        target, values = np.asarray(theta, dtype=np.float64), _flat(x)
        with np.errstate(invalid="ignore", over="ignore"):
            finite = np.where(np.isfinite(values), values, np.nan)
            known = np.isfinite(values).any(axis=0)
            x_mean = np.zeros(values.shape[1])
            x_sd = np.ones(values.shape[1])
            x_mean[known] = np.nanmean(finite[:, known], axis=0)
            x_sd[known] = np.nanstd(finite[:, known], axis=0)
        x_sd = np.where(np.isfinite(x_sd) & (x_sd > 0), x_sd, 1.0)
        inner = np.random.default_rng(seed).standard_normal((values.shape[1] + 1, _FEATURES))
        inner[:-1] /= np.sqrt(max(values.shape[1], 1))
        empty = np.zeros((0, target.shape[1]))
        bare = cls(x_mean, x_sd, inner, empty, np.zeros(target.shape[1]))
        features = bare._features(values)
        left_out = np.arange(len(target)) % 5 == 4
        kept, known_target = features[~left_out], target[~left_out]
        gram, product = kept.T @ kept, kept.T @ known_target
        tried = [_solve(gram, product, ridge) for ridge in _RIDGES]
        rest = target[left_out]
        spread = np.square(rest - known_target.mean(axis=0)).mean(axis=0)
        spread = np.where(spread > 0, spread, 1.0)
        errors = [np.square(rest - features[left_out] @ w).mean(axis=0) / spread for w in tried]
        best = int(np.argmin([each.mean() for each in errors]))
        outer = _solve(features.T @ features, features.T @ target, _RIDGES[best])
        return dataclasses.replace(bare, outer=outer, r2=1.0 - errors[best])

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(B, D) guesses of theta for x (B, *x_shape)."""
        values = _flat(x)
        # A row at a time: a product of matrices may add up in another order for another B.
        guesses = [self._features(row[None])[0] @ self.outer for row in values]
        return np.array(guesses).reshape(len(values), self.outer.shape[1])

    def _features(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = (values - self.x_mean) / self.x_sd
        scaled = np.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0)
        scaled = _LINEAR * np.arcsinh(scaled / _LINEAR)
        relu = np.maximum(scaled @ self.inner[:-1] + self.inner[-1], 0.0)
        parts = [relu, np.ones((len(scaled), 1))]
        # A long x is only seen through the random features, which are then linear in it in part.
        return np.concatenate([scaled, *parts] if scaled.shape[1] <= _FEATURES else parts, axis=1)


def _flat(x: np.ndarray) -> np.ndarray:
    values = np.asarray(x)
    values = values.reshape(len(values), math.prod(values.shape[1:]))
    step = max(1, math.ceil(values.shape[1] / _MOST_X))
    return values[:, ::step].astype(np.float64)


def _solve(gram: np.ndarray, product: np.ndarray, ridge: float) -> np.ndarray:
    penalty = np.full(len(gram), ridge)
    penalty[-1] = 1e-8  # the constant is not shrunk
    return np.linalg.solve(gram + np.diag(penalty), product)
