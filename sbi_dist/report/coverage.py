"""Coverage: how many values lie within the intervals that should hold them, and by chance.

Of posterior predictive intervals, for which observations are divided into *series*: what gets one
sentence and, where it fits, one panel. And of posterior intervals of known parameters.  No
plotting here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sbi_dist.report.arrays import FloatArray, as_float_array
from sbi_dist.report.content import RecoveryFacts

MAX_COMPONENTS = 12
MAX_SERIES = 12

Kind = Literal["components", "bands", "flattened"]


@dataclass(frozen=True, eq=False)
class PredictiveSeries:
    """Simulated observations arranged for checking.

    Attributes:
        kind: ``components`` for a scalar or short vector, ``bands`` for values along a
            coordinate, ``flattened`` for everything else.
        draws: (S, C, T) float64: draw, series, position.  C is 1 unless ``bands``.
        observed: (C, T) float64.
        dropped: draws left out because they hold non-finite values.
    """

    kind: Kind
    draws: FloatArray
    observed: FloatArray
    dropped: int


def arrange(x_draws: Any, observed: Any, *, with_coordinate: bool = False) -> PredictiveSeries:
    """Check and arrange predictive draws (S, *x_shape) and the observation (*x_shape).

    Raises:
        ValueError: shapes that do not agree, or fewer than two finite draws.
    """
    draws = as_float_array(x_draws, "x_draws")
    seen = as_float_array(observed, "observed")
    if draws.ndim == 0 or draws.shape[1:] != seen.shape:
        raise ValueError(
            f"x_draws has shape {draws.shape}; allowed: (S, *x_shape) with the shape of "
            f"observed, {seen.shape}, after the first axis"
        )
    if seen.size == 0:
        raise ValueError(f"observed has shape {seen.shape}; allowed: at least one value")
    finite = np.isfinite(draws).reshape(len(draws), -1).all(axis=1)
    kept = draws[finite]
    if len(kept) < 2:
        raise ValueError(
            f"x_draws has {len(kept)} draws with finite values, of {len(draws)}; allowed: at "
            "least 2"
        )
    count, dropped = len(kept), int(len(draws) - len(kept))
    kind: Kind = "flattened"
    if seen.ndim == 0 or (seen.ndim == 1 and len(seen) <= MAX_COMPONENTS and not with_coordinate):
        kind = "components"
    elif seen.ndim == 1 or (seen.ndim == 2 and seen.shape[1] <= MAX_SERIES and len(seen) > 1):
        kind = "bands"
    if kind == "bands" and seen.ndim == 2:
        return PredictiveSeries(kind, np.swapaxes(kept, 1, 2), seen.T, dropped)
    return PredictiveSeries(kind, kept.reshape(count, 1, -1), seen.reshape(1, -1), dropped)


def inside(series: PredictiveSeries, level: float) -> list[tuple[int, int]]:
    """For each series, observed values within the central ``level`` interval, and their total.

    Observed values that are not finite count as missing.
    """
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(series.draws, [tail, 1.0 - tail], axis=0)
    present = np.isfinite(series.observed)
    within = present & (series.observed >= low) & (series.observed <= high)
    return [(int(w.sum()), int(p.sum())) for w, p in zip(within, present, strict=True)]


def predictive_coverage(x_draws: Any, observed: Any, level: float = 0.95) -> list[tuple[int, int]]:
    """Count the observed values inside their central posterior predictive intervals.

    Args:
        x_draws: posterior predictive simulations (S, *x_shape), torch or numpy.
        observed: the observation (*x_shape); values that are not finite count as missing.
        level: probability of the central interval, between 0 and 1.

    Returns:
        ``(inside, total)`` for each series: one for each column of an x of shape (T, C), one in
        all for any other shape.

    Raises:
        ValueError: shapes that do not agree, or a level outside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level!r}; allowed: a number between 0 and 1")
    return inside(arrange(x_draws, observed), level)


def recovered(recovery: RecoveryFacts) -> tuple[list[int], list[float]]:
    """Of each parameter: how many true values the intervals hold, and corr(median, truth)."""
    truth, median = recovery.truth, recovery.median
    within = (truth >= recovery.low) & (truth <= recovery.high)
    correlations = [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(truth.T, median.T, strict=True)]
    return within.sum(axis=0).tolist(), correlations


def chance_range(total: int, probability: float, level: float = 0.95) -> tuple[int, int]:
    """The central range that holds a binomial count with at least probability ``level``."""
    from scipy.stats import binom  # here, since it takes a second to import

    low, high = binom.interval(level, total, probability)
    return int(low), int(high)
