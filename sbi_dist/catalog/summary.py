"""Summaries of posterior draws, of many observations at once.

Moments are added up in float64 around the first draw, so that a posterior at 1e6 +- 1e-3 keeps
its width. Quantiles are those of the empirical distribution with linear interpolation, as
``numpy.quantile`` has them by default.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["Summary", "of_highest_density", "summarize"]

# Numbers in float64 at once; and draws of one sum, as BLAS brings in other threads for more.
_AT_ONCE, _DRAWS_AT_ONCE = 2**18, 8192


@dataclasses.dataclass(frozen=True)
class Summary:
    """Summaries of B posteriors of D parameters, float32.

    Attributes:
        mean, sd: (B, D); the sd with N - 1.
        covariance: (B, D, D).
        quantiles: (B, Q, D).
        hdi: (B, 2, D): ends of the shortest interval that holds its part of the draws, of each
            parameter by itself; of several modes it holds what is between them too.
    """

    mean: np.ndarray
    sd: np.ndarray
    covariance: np.ndarray
    quantiles: np.ndarray
    hdi: np.ndarray


def summarize(draws: np.ndarray, levels: Sequence[float], mass: float) -> Summary:
    """Summaries of draws.

    Args:
        draws: float32 of shape (B, N, D), finite, N at least 2.
        levels: of the Q quantiles, between 0 and 1.
        mass: of the highest-density interval, between 0 and 1. It runs from one draw to the one
            ``floor(mass N)`` above it, as in ArviZ.
    """
    batch, count, size = draws.shape
    mean, covariance = _moments(draws)
    sd = np.sqrt(np.maximum(np.einsum("bii->bi", covariance), 0.0))
    quantiles = np.empty((batch, len(levels), size), dtype=np.float32)
    hdi = np.empty((batch, 2, size), dtype=np.float32)
    ordered = np.empty((batch, count), dtype=np.float32)
    for each in range(size):
        ordered[:] = draws[:, :, each]
        ordered.sort(axis=1)
        quantiles[:, :, each] = _quantiles(ordered, levels)
        hdi[:, :, each] = _shortest(ordered, mass)
    with np.errstate(over="ignore"):  # a variance beyond float32 is infinite
        mean, sd, covariance = (each.astype(np.float32) for each in (mean, sd, covariance))
    return Summary(mean, sd, covariance, quantiles, hdi)


def of_highest_density(draws: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """(B, D): of draws (B, N, D) those of the largest log q (B, N), where NaN is none."""
    return draws[np.arange(len(draws)), np.where(np.isnan(log_q), -math.inf, log_q).argmax(axis=1)]


def _moments(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (B, D) and covariance (B, D, D), float64."""
    batch, count, size = draws.shape
    first = draws[:, 0].astype(np.float64)
    total = np.zeros((batch, size))
    products = np.zeros((batch, size, size))
    draws_at_once = max(1, min(count, _DRAWS_AT_ONCE, _AT_ONCE // size))
    rows_at_once = max(1, _AT_ONCE // (size * draws_at_once))
    for row in range(0, batch, rows_at_once):
        rows = slice(row, row + rows_at_once)
        for start in range(0, count, draws_at_once):
            chunk = draws[rows, start : start + draws_at_once]
            # A parameter after the other: short matrix products take longer than their sums.
            centered = np.empty((size, *chunk.shape[:2]))
            for each in range(size):
                np.subtract(chunk[:, :, each], first[rows, each, None], out=centered[each])
                total[rows, each] += centered[each].sum(axis=1)
                products[rows, each, : each + 1] += np.vecdot(
                    centered[each], centered[: each + 1]
                ).T
    shift = total / count
    for each in range(size):
        products[:, :each, each] = products[:, each, :each]
    products -= count * shift[:, :, None] * shift[:, None, :]
    return first + shift, products / (count - 1)


def _quantiles(ordered: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """(B, Q) of draws (B, N) in order."""
    place = np.asarray(levels) * (ordered.shape[1] - 1)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, ordered.shape[1] - 1)
    low = ordered[:, below].astype(np.float64)
    return low + (place - below) * (ordered[:, above] - low)


def _shortest(ordered: np.ndarray, mass: float) -> np.ndarray:
    """(B, 2): the shortest of the intervals between draws that are so many apart."""
    count = ordered.shape[1]
    # Not 89 where 0.9 * 100 is a little less than 90 in binary.
    inside = min(math.floor(mass * count * (1 + 1e-12)), count - 1)
    widths = ordered[:, inside:] - ordered[:, : count - inside]
    low = widths.argmin(axis=1)[:, None]
    ends = np.concatenate([low, low + inside], axis=1)
    return np.take_along_axis(ordered, ends, axis=1)
