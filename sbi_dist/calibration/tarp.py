"""TARP: coverage of balls around reference points, which needs draws alone.

Lemos et al. 2023, arXiv:2302.03026. For any point that does not depend on theta, the share of
draws nearer to it than theta is uniform. Points drawn at random without regard to x (``tarp``, the
paper's default) see errors of shape in all parameters together, but not a posterior that ignores
x: that takes points that depend on x (``tarp_data``, whose points are a regression's guesses).
"""

from __future__ import annotations

import numpy as np

from sbi_dist.calibration.finding import Finding, part_of
from sbi_dist.calibration.table import Ranks
from sbi_dist.calibration.uniformity import Curve, curve, marginal, p_value, radial

__all__ = ["atc", "tarp", "tarp_data"]


def tarp(ranks: Ranks) -> Finding:
    """One part, of random points; the statistic is :func:`atc`."""
    found = curve(ranks.usable().tarp_rank, ranks.draws)
    # A random point lies beside the posterior more often than within: like one of its margins.
    size = marginal(found)
    more = {"over": size.over, "under": size.under, "bias": size.bias}
    return Finding("tarp", [part_of("", atc(found), p_value(found), size, more)])


def tarp_data(ranks: Ranks) -> Finding | None:
    """One part, of points that a regression made of x; None where there are none."""
    used = ranks.usable()
    known = used.tarp_data_rank >= 0
    if not known.any():
        return None
    found = curve(used.tarp_data_rank[known], ranks.draws)
    return Finding("tarp_data", [part_of("", atc(found), p_value(found), radial(found))])


def atc(found: Curve) -> float:
    """Area between expected coverage and credibility, for credibilities above 1/2.

    Below 0: truths lie farther out than draws, as for a posterior that is too narrow or biased.
    """
    upper = found.levels >= 0.5
    ends = np.append(found.levels[upper], 1.0)
    return float((found.deviation[upper] * np.diff(ends)).sum())
