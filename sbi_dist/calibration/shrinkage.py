"""Does the posterior learn from the data what there is to learn?

Shrinkage 1 - E[sd^2] / Var(theta) and z-scores (theta - mean) / sd of each parameter are those of
Betancourt 2018, arXiv:1803.08393, and Schad et al. 2021, arXiv:1904.12765. A posterior that
returns the prior passes every other test that looks at draws alone, and its shrinkage is 0; yet so
is that of a parameter of which the data say nothing. A regression of theta on x tells which: no
guess has a smaller mean squared error than the exact posterior's variance, so a posterior that is
wider than a plain regression's error has not learnt what it could.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy  # loads its parts when they are used

from sbi_dist.calibration.finding import Finding, Part
from sbi_dist.calibration.table import Ranks
from sbi_dist.calibration.uniformity import holm

__all__ = ["shrinkage"]

# Of the sd of draws over the error of a regression: 20 % too wide, as in the coverage of intervals.
_WIDER = 0.2
# Without a regression: less shrinkage than this of every parameter is worth a look.
_NONE = 0.05


def shrinkage(ranks: Ranks, names: Sequence[str]) -> Finding:
    """A part for each parameter; the statistic is the shrinkage.

    The effect is the sd of the draws over the regression's error, minus 1. Without a regression
    there is one part for all, without p-value, that meets its bound where nothing shrinks.
    """
    used = ranks.usable()
    prior = used.theta.var(axis=0) if len(used) else np.ones(len(names))
    variance = np.square(used.sd)
    with np.errstate(invalid="ignore", divide="ignore"):
        shrunk = 1.0 - (variance.mean(axis=0) / prior if len(used) else np.ones(len(names)))
        z = (used.theta - used.mean) / used.sd
    more: list[dict[str, float | None]] = [
        {
            "shrinkage": float(shrunk[each]),
            "z_mean": float(z[:, each].mean()) if len(used) else None,
            "z_rms": float(np.sqrt(np.square(z[:, each]).mean())) if len(used) else None,
        }
        for each in range(len(names))
    ]
    known = np.isfinite(used.reference).all(axis=1)
    if known.sum() < 20:
        lost = max(0.0, 1.0 - float(np.nan_to_num(shrunk, nan=0.0).max()))
        parts = [
            Part(name, float(s), None, "prior", lost, 1.0 - _NONE, m)
            for name, s, m in zip(names, shrunk, more, strict=True)
        ]
        return Finding("shrinkage", parts)
    errors = np.square(used.theta - used.reference)[known]
    gains = errors - variance[known]
    corrected = holm(np.array([_mean_below_zero(each) for each in gains.T]))
    parts = []
    for each, name in enumerate(names):
        error, width = errors[:, each].mean(), variance[known, each].mean()
        wider = float(np.sqrt(width / error)) - 1.0 if error > 0 else 0.0
        facts = {**more[each], "regression_shrinkage": float(1.0 - error / prior[each])}
        p = float(corrected[each])
        parts.append(Part(name, float(shrunk[each]), p, "prior", max(wider, 0.0), _WIDER, facts))
    return Finding("shrinkage", parts)


def _mean_below_zero(values: np.ndarray) -> float:
    """One-sided p-value for the mean of (n,) being below 0.

    Student's t with Hall's (1992) correction for skewness: squared errors have long tails, and
    without it a correct posterior is rejected twice as often as it should be.
    """
    count, spread = len(values), float(values.std())
    if spread == 0.0:
        return 1.0 if float(values.mean()) >= 0.0 else 1e-300
    t = float(values.mean()) / spread
    skew = float(np.mean(((values - values.mean()) / spread) ** 3))
    corrected = t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / (6 * count)
    return float(scipy.special.ndtr(np.sqrt(count) * corrected))
