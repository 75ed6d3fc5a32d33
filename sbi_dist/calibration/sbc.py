"""Simulation-based calibration: the rank of each true parameter among its draws is uniform.

Talts et al. 2018, arXiv:1804.06788; tested as in Säilynoja et al. 2022, arXiv:2103.10522.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sbi_dist.calibration.finding import Finding, part_of
from sbi_dist.calibration.table import Ranks
from sbi_dist.calibration.uniformity import curve, holm, marginal, p_value

__all__ = ["sbc"]


def sbc(ranks: Ranks, names: Sequence[str]) -> Finding:
    """A part for each parameter; the statistic is the largest deviation of the ranks' ECDF."""
    used = ranks.usable()
    curves = [curve(each, ranks.draws) for each in used.rank.T]
    corrected = holm(np.array([p_value(each) for each in curves]))
    parts = []
    for name, found, p in zip(names, curves, corrected, strict=True):
        size = marginal(found)
        more = {"over": size.over, "under": size.under, "bias": size.bias}
        statistic = float(np.abs(found.deviation).max())
        parts.append(part_of(name, statistic, float(p), size, more))
    return Finding("sbc", parts)
