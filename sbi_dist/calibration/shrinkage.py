"""Does the posterior learn from the data what there is to learn?

Shrinkage 1 - E[sd^2] / Var(theta) and z-scores (theta - mean) / sd of each parameter are those of
Betancourt 2018, arXiv:1803.08393, and Schad et al. 2021, arXiv:1904.12765. A posterior that
returns the prior passes every other test that looks at draws alone, and its shrinkage is 0; yet so
is that of a parameter of which the data say nothing. A regression of theta on x tells which: one
more draw of the exact posterior lies as far from the regression's guess as the truth does. Draws
that lie farther away come from a posterior that has not learnt what a plain regression could.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sbi_dist.calibration.finding import Finding, Part
from sbi_dist.calibration.swaps import SWAPS, signs
from sbi_dist.calibration.table import Ranks

__all__ = ["shrinkage"]

# How much farther draws lie from guesses than truths do: as where a posterior is 20 % too wide.
_WIDER = 0.2
# Without a regression: less shrinkage than this of every parameter is worth a look.
_NONE = 0.05


def shrinkage(ranks: Ranks, names: Sequence[str], seed: int = 0) -> Finding:
    """A part for each parameter; the statistic is the shrinkage.

    The effect is the mean distance of a draw from the regression's guess over that of the truth,
    minus 1. Without a regression there is no p-value, and a part meets its bound where its
    parameter does not shrink.
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
    guess = used.reference[known]
    of_truth, of_draw = (np.abs(v[known] - guess) for v in (used.theta, used.averaged))
    p_values = _farther(of_draw - of_truth, seed)
    parts = []
    for each, name in enumerate(names):
        near, far = of_truth[:, each].mean(), of_draw[:, each].mean()
        farther = float(far / near) - 1.0 if near > 0 else 0.0
        error = np.square(of_truth[:, each]).mean()
        facts = {**more[each], "regression_shrinkage": float(1.0 - error / prior[each])}
        p = float(p_values[each])
        parts.append(Part(name, float(shrunk[each]), p, "prior", max(farther, 0.0), _WIDER, facts))
    return Finding("shrinkage", parts)


def _farther(differences: np.ndarray, seed: int) -> np.ndarray:
    """P-values (D,), corrected for their number, of means of (R, D) as large as these.

    Distances themselves, not their squares: of parameters with long tails, a few rows would have
    all the weight, and little would ever be seen.
    """
    rows = len(differences)
    scale = np.sqrt(np.square(differences).sum(axis=0))
    each = np.divide(differences, scale, out=np.zeros_like(differences), where=scale > 0)
    units = each.astype(np.float32)
    seen = units.sum(axis=0)
    largest = np.concatenate([(block @ units).max(axis=1) for block in signs(rows, seed)])
    larger = (largest[:, None] >= seen - 1e-4).sum(axis=0)
    return (1 + larger) / (1 + SWAPS)
