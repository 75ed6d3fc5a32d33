"""The data-averaged posterior is the prior: one draw for each held-out x, against the truths.

Talts et al. 2018, arXiv:1804.06788, equation 1. Draws of different rows are independent, one draw
and the truth of its row are not: both know the same x. But they are exchangeable, so the test
swaps them, within any rows, and sees whether the two distributions differ less. That keeps their
dependence, where a two-sample test for independent samples would hardly ever reject.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sbi_dist.calibration.finding import Finding, Part
from sbi_dist.calibration.swaps import SWAPS, signs
from sbi_dist.calibration.table import Ranks

__all__ = ["data_averaged"]

_LEVELS = 31
# Of distribution functions, as for limits of a parameter.
_DIFFERENT = 0.05


def data_averaged(ranks: Ranks, names: Sequence[str], seed: int = 0) -> Finding:
    """A part for each parameter; the statistic is the Kolmogorov-Smirnov distance."""
    used = ranks.usable()
    rows, size = len(used), len(names)
    if not rows:
        return Finding("data_averaged", [Part(n, 0.0, 1.0, "average", 0.0, 1.0) for n in names])
    differences = np.empty((rows, size, _LEVELS), dtype=np.float32)
    for each in range(size):
        truth, draw = used.theta[:, each], used.averaged[:, each]
        at = np.quantile(np.concatenate([truth, draw]), np.arange(1, _LEVELS + 1) / (_LEVELS + 1))
        differences[:, each] = (truth[:, None] <= at).astype(np.float32) - (draw[:, None] <= at)
    flat = differences.reshape(rows, -1)
    # Swaps change signs alone. In sd of their sums, extreme levels count as much as middle ones.
    sd = np.sqrt(np.maximum(np.abs(flat).sum(axis=0), 1.0))
    seen = np.abs(flat.sum(axis=0) / sd).reshape(size, _LEVELS).max(axis=1)
    swapped = np.concatenate([np.abs(each @ flat / sd).max(axis=1) for each in signs(rows, seed)])
    # Sums are whole numbers, exact in float32; their quotients are alike where the sums are.
    larger = (swapped[:, None] >= seen * (1 - 1e-6)).sum(axis=0)
    distance = np.abs(flat.sum(axis=0)).reshape(size, _LEVELS).max(axis=1) / rows
    return Finding(
        "data_averaged",
        [
            Part(name, float(d), float((1 + n) / (1 + SWAPS)), "average", float(d), _DIFFERENT)
            for name, d, n in zip(names, distance, larger, strict=True)
        ],
    )
