"""Are ranks uniform? The empirical distribution with simultaneous bounds, exactly.

Säilynoja, Bürkner and Vehtari (2022, arXiv:2103.10522): at each of K levels the count of ranks
below it is binomial; the statistic is the smallest of their two-sided tail probabilities, gamma;
and its distribution follows from the chain of counts from level to level. Here the p-value is
computed, not simulated: the counts are those of a Poisson process that is given its total, whose
steps from level to level are independent (Moscovich and Nadler 2017, arXiv:1503.04363). Ranks on
0..N are discrete, and levels are taken where their distribution function is exactly the level.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import scipy  # loads its parts when they are used: scipy.stats takes half a second

__all__ = ["Curve", "Deviation", "band", "curve", "holm", "levels", "marginal", "p_value", "radial"]

_LEVELS = 100
# Below this, 1 - P(inside) has lost its digits, and the sum over the levels is as good.
_SMALL = 1e-9


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """The empirical distribution of n ranks on 0..N.

    Attributes:
        levels: (K,) ascending in (0, 1), symmetric around 1/2.
        counts: (K,) int64: ranks below each level.
        total: n.
    """

    levels: np.ndarray
    counts: np.ndarray
    total: int

    @property
    def deviation(self) -> np.ndarray:
        """(K,): empirical minus uniform distribution function."""
        return self.counts / max(self.total, 1) - self.levels


@functools.lru_cache(64)
def levels(draws: int) -> tuple[int, ...]:
    """The ranks below which there are up to 99 levels' shares of 0..``draws``, symmetric."""
    places = draws + 1
    count = min(places, _LEVELS)
    lower = np.floor(np.arange(1, count // 2 + 1) * places / count + 0.5).astype(np.int64)
    both = np.unique(np.concatenate([lower, places - lower]))
    return tuple(both[(both > 0) & (both < places)].tolist())


def curve(ranks: np.ndarray, draws: int) -> Curve:
    """Of ranks (n,), integers on 0..``draws``."""
    edges = np.array(levels(draws))
    below = np.searchsorted(np.sort(ranks), edges, side="left")
    return Curve(edges / (draws + 1), below, len(ranks))


# ---- significance ------------------------------------------------------------------------------


def p_value(found: Curve) -> float:
    """Probability that uniform ranks have a gamma as small, (0, 1]; never too small a one."""
    total, at = found.total, found.levels
    if total == 0:
        return 1.0
    tails = np.minimum(
        scipy.stats.binom.cdf(found.counts, total, at),
        scipy.stats.binom.sf(found.counts - 1, total, at),
    )
    gamma = 2.0 * float(tails.min())
    if gamma < _SMALL:
        return min(1.0, max(gamma * len(at), 1e-300))
    if gamma >= 1.0:
        return 1.0
    low, high = _bounds(total, tuple(at), gamma)
    return min(1.0, max(1.0 - _inside(total, at, low, high), gamma / 2))


@functools.lru_cache(64)
def band(total: int, draws: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (K,), (K,) of the distribution function of uniform ranks, all at once with 1 - alpha.

    The narrowest of their kind that hold it with at least that probability.
    """
    at = np.array(levels(draws)) / (draws + 1)
    if total == 0:
        return np.zeros(len(at)), np.ones(len(at))
    below, above = math.log(alpha / len(at) / 2), 0.0
    for _ in range(30):
        middle = (below + above) / 2
        low, high = _bounds(total, tuple(at), math.exp(middle))
        if _inside(total, at, low, high) >= 1.0 - alpha:
            below = middle
        else:
            above = middle
    low, high = _bounds(total, tuple(at), math.exp(below))
    return low / total, high / total


@functools.lru_cache(256)
def _bounds(total: int, at: tuple[float, ...], gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """(K,), (K,) int64: the least and largest counts whose tails are both above gamma / 2."""
    half, place = gamma / 2 * (1 + 1e-9), np.array(at)  # what differs by rounding is equal
    low = scipy.stats.binom.ppf(half, total, place).astype(np.int64)
    high = scipy.stats.binom.isf(half, total, place).astype(np.int64)
    for _ in range(3):  # the quantiles are right but for one or two
        low = np.where(scipy.stats.binom.cdf(low - 1, total, place) > half, low - 1, low)
        high = np.where(scipy.stats.binom.sf(high, total, place) > half, high + 1, high)
    for _ in range(3):
        low = np.where(scipy.stats.binom.cdf(low, total, place) > half, low, low + 1)
        high = np.where(scipy.stats.binom.sf(high - 1, total, place) > half, high, high - 1)
    return np.clip(low, 0, total), np.clip(high, 0, total)


def _inside(total: int, at: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Probability that the counts of uniform ranks are within [low, high] at every level."""
    if (low > high).any():
        return 0.0
    chance, start, place = np.ones(1), 0, 0.0
    for level, least, most in zip(at, low, high, strict=True):
        steps, first = _poisson(total * (level - place))
        chance = np.convolve(chance, steps)
        start += first
        # From counts start, start + 1, ... to least ... most.
        kept = np.zeros(int(most - least + 1))
        begin, end = max(start, int(least)), min(start + len(chance), int(most) + 1)
        if begin < end:
            kept[begin - least : end - least] = chance[begin - start : end - start]
        chance, start, place = kept, int(least), float(level)
    last = total - start - np.arange(len(chance))
    rate = total * (1.0 - place)
    # The last step brings them to their total, whose own probability is divided out.
    log_last = np.where(
        last >= 0, last * math.log(rate) - rate - scipy.special.gammaln(last + 1.0), -np.inf
    )
    log_total = total * math.log(total) - total - scipy.special.gammaln(total + 1.0)
    return float(chance @ np.exp(log_last - log_total))


@functools.lru_cache(256)
def _poisson(rate: float) -> tuple[np.ndarray, int]:
    """Poisson probabilities but for parts below 1e-25, and the count of the first."""
    reach = 12.0 * math.sqrt(rate) + 40.0
    first = max(0, math.floor(rate - reach))
    counts = np.arange(first, math.ceil(rate + reach) + 1, dtype=np.float64)
    return np.exp(counts * math.log(rate) - rate - scipy.special.gammaln(counts + 1.0)), first


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values (D,) corrected for there being D of them (Holm 1979)."""
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * factors))
    return corrected


# ---- size --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Deviation:
    """How far ranks are from uniform, in probability.

    Attributes:
        over: what credible regions hold less of the truths than they say, at the worst level.
        under: what they hold more.
        bias: what one-sided limits are off by; positive where the posterior lies too high.
    """

    over: float
    under: float
    bias: float = 0.0


def marginal(found: Curve) -> Deviation:
    """Of ranks of a parameter among its draws: central intervals, and one-sided limits.

    The deviation of the distribution function is a part that is even around 1/2, the bias, and an
    odd part, of which the interval between levels z and 1 - z holds twice too much or too little.
    """
    deviation = found.deviation
    mirrored = deviation[::-1]
    missing = (deviation - mirrored)[found.levels < 0.5]
    even = (deviation + mirrored) / 2
    worst = float(even[np.argmax(np.abs(even))]) if len(even) else 0.0
    return Deviation(float(missing.max(initial=0.0)), float((-missing).max(initial=0.0)), worst)


def radial(found: Curve) -> Deviation:
    """Of ranks by density, or by distance from a guess: regions that grow around a centre."""
    deviation = found.deviation
    return Deviation(float((-deviation).max(initial=0.0)), float(deviation.max(initial=0.0)), 0.0)
