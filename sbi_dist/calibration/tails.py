"""Truths far out: how many lie beyond 5 sd of their posterior, and how many of its draws do.

One of N + 1 exchangeable values is the truth. Given which of these are far from the others, the
truth is one of them with the probability K / (N + 1), so that their number over all rows is a sum
of independent binomials, whatever the shape of the posteriors: no Gaussian is assumed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy  # loads its parts when they are used: scipy.stats takes half a second

from sbi_dist.calibration.finding import Finding, Part
from sbi_dist.calibration.table import Ranks
from sbi_dist.calibration.uniformity import holm

__all__ = ["tails"]

# Of the truths, beyond what the draws do: half of what lies outside a region of 99 %.
_SHARE = 0.005


def tails(ranks: Ranks, names: Sequence[str]) -> Finding:
    """A part for each parameter; the statistic is the share of truths beyond 5 sd."""
    used = ranks.usable()
    rows = max(len(used), 1)
    far = used.theta_beyond.sum(axis=0)
    pool = used.beyond + used.theta_beyond
    values = [_more_than(int(n), k, ranks.draws) for n, k in zip(far, pool.T, strict=True)]
    corrected = holm(np.array(values))
    parts = []
    for each, name in enumerate(names):
        share = float(far[each] / rows)
        of_draws = float(used.beyond[:, each].sum() / (rows * ranks.draws))
        more = {"of_draws": of_draws, "truths": float(far[each])}
        effect = max(0.0, share - of_draws)
        parts.append(Part(name, share, float(corrected[each]), "tail", effect, _SHARE, more))
    return Finding("tails", parts)


def _more_than(observed: int, pool: np.ndarray, draws: int) -> float:
    """P(at least so many far truths), where row i has one with probability pool_i / (N + 1)."""
    if observed == 0:
        return 1.0
    # The sum of all, up to what was observed; what goes beyond is left over.
    chance = np.ones(1)
    for each, rows in zip(*np.unique(pool[pool > 0], return_counts=True), strict=True):
        terms = scipy.stats.binom.pmf(np.arange(observed), rows, each / (draws + 1))
        chance = np.convolve(chance, terms)[:observed]
    left = 1.0 - float(chance.sum())
    if left > 1e-9:
        return left
    # Lost to rounding: Chernoff's bound for a sum of binomials of this mean.
    mean = float(pool.sum() / (draws + 1))
    return float(max(1e-300, np.exp(observed - mean - observed * np.log(observed / mean))))
