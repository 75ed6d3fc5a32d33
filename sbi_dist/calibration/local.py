"""Is the posterior of one observation right? A classifier two-sample test that is local in x.

l-C2ST (Linhart, Gramfort and Rodrigues 2023, arXiv:2306.03580): a classifier is trained to tell
(theta_i, x_i) from (draw_i, x_i) over all held-out simulations, and asked at the user's own
observation. If it is sure of itself anywhere among the draws there, the posterior is wrong there,
however well it does on average. Differences from the paper, each for exactness or speed:

- The classifier is a ridge regression on random features of (theta, x) in place of a network. To
  fit it again is one product of matrices: thousands of fits under the null hypothesis take seconds.
- The null hypothesis swaps a truth and its draw, within any rows, in place of permuting all labels:
  exact for any number of rows, as the two are exchangeable given x.
- x enters through the posterior's mean and sd and a regression's guess of theta, and theta in units
  of that sd (as in the paper's variant for flows, which looks at their base space). So the table of
  ranks is all that it takes; what these do not tell apart is averaged over.
"""

from __future__ import annotations

import numpy as np

from sbi_dist.calibration.finding import Part
from sbi_dist.calibration.table import Ranks

__all__ = ["FEWEST_ROWS", "local_c2st"]

_FEATURES, _SWAPS, _MOST_ROWS, FEWEST_ROWS = 384, 1999, 10_000, 50
# Of the mean eigenvalue of the features' Gram matrix.
_RIDGE = 0.03
# Beyond, only the logarithm counts: of theta in sd of its posterior, of x in sd over simulations.
_LINEAR = 3.0
# Of the probability from 1/2, as the best classifier has it for a parameter shifted by 0.3 sd.
_BOUND = 0.075


def local_c2st(ranks: Ranks, draws: np.ndarray, reference: np.ndarray, seed: int = 0) -> Part:
    """Test the posterior of one observation; takes seconds.

    The statistic is the mean squared distance of the classifier's probability from 1/2, over the
    observation's draws; the effect its root, less what chance adds. It says nothing about whether
    the observation is one that the simulator could give: see the out-of-distribution score.

    Args:
        ranks: of held-out simulations, at best 2,000 or more, with a reference for each.
        draws: (S, D) of the observation's posterior, by the same model.
        reference: (D,) what the same regression guesses for the observation.
        seed: of features and swaps.

    Raises:
        ValueError: fewer than 50 usable rows, rows without reference, or shapes that do not agree.
    """
    used = ranks.usable()
    size = used.theta.shape[1]
    if draws.ndim != 2 or draws.shape[1] != size or len(draws) < 2 or reference.shape != (size,):
        raise ValueError(
            f"draws {draws.shape} and reference {reference.shape}; of {size} parameters"
        )
    if len(used) < FEWEST_ROWS or not np.isfinite(used.reference).all():
        raise ValueError(f"needs at least {FEWEST_ROWS} rows with a reference each")
    rng = np.random.default_rng(seed)
    # Whatever was asked first, rows are ordered by identifier, not by what they are.
    chosen = np.sort(rng.permutation(len(used))[:_MOST_ROWS])
    theta, draw = used.theta[chosen], used.averaged[chosen]
    mean, sd = _of_all(used, chosen)
    place = np.concatenate([mean, np.log(sd), used.reference[chosen]], axis=1)
    centre, spread = place.mean(axis=0), place.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    weights = rng.standard_normal((4 * size + 1, _FEATURES))
    # A direction of one theta and a place weigh as much as each other, whatever the size.
    weights[:size] /= np.sqrt(size)
    weights[size:-1] /= np.sqrt(3 * size)

    def features(values: np.ndarray, where: np.ndarray) -> np.ndarray:
        inner = (
            _squashed(values) @ weights[:size]
            + _squashed((where - centre) / spread) @ weights[size:-1]
        )
        return np.maximum(inner + weights[-1], 0.0)

    of_truths = features((theta - mean) / sd, place)
    of_draws = features((draw - mean) / sd, place)
    here, here_sd = draws.mean(axis=0), draws.std(axis=0, ddof=1)
    here_sd = np.where(here_sd > 0, here_sd, 1.0)
    there = np.concatenate([here, np.log(here_sd), reference])[None]
    asked = features((draws - here) / here_sd, np.repeat(there, len(draws), axis=0))
    # Least squares for labels +1 and -1; the Gram matrix does not change with swaps.
    gram = of_truths.T @ of_truths + of_draws.T @ of_draws
    gram[np.diag_indices(_FEATURES)] += _RIDGE * np.trace(gram) / _FEATURES
    # sum over draws of (features @ w)^2 / 4, as a sum of squares of as many numbers as features.
    root = np.linalg.qr(asked, mode="r") / (2 * np.sqrt(len(asked)))
    effects = (of_truths - of_draws) @ np.linalg.solve(gram, root.T)
    statistic = float(np.square(effects.sum(axis=0)).sum())
    null = np.concatenate(
        [
            np.square((2.0 * rng.integers(0, 2, (count, len(effects))) - 1.0) @ effects).sum(axis=1)
            for count in [100] * (_SWAPS // 100) + [_SWAPS % 100]
        ]
    )
    p_value = float((1 + (null >= statistic * (1 - 1e-9)).sum()) / (1 + _SWAPS))
    effect = float(np.sqrt(max(statistic - null.mean(), 0.0)))
    return Part("", statistic, p_value, "local", effect, _BOUND)


def _of_all(used: Ranks, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd (R, D) of the draws and the truth together: a swap does not change them."""
    count, theta, mean = used.draws, used.theta[chosen], used.mean[chosen]
    squares = (count - 1) * np.square(used.sd[chosen])
    squares += count / (count + 1) * np.square(theta - mean)
    sd = np.sqrt(squares / count)
    return mean + (theta - mean) / (count + 1), np.where(sd > 0, sd, 1.0)


def _squashed(values: np.ndarray) -> np.ndarray:
    return _LINEAR * np.arcsinh(values / _LINEAR)
