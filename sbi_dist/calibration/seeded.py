"""Random numbers of a row: functions of (seed, row, stream) alone, whatever block it is in."""

from __future__ import annotations

import numpy as np
import scipy  # loads its parts when they are used

__all__ = ["normal", "uniform"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014): each bit in, half of the bits out."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def uniform(seed: int, row: np.ndarray, stream: int) -> np.ndarray:
    """(B,) float64 in (0, 1) for rows (B,) int64; another stream, independent numbers."""
    words = _mixed(np.array([seed & (2**64 - 1), stream], dtype=np.uint64) + _GOLDEN)
    with np.errstate(over="ignore"):  # the wrap of 64 bits is meant
        words = _mixed(_mixed(row.astype(np.int64).view(np.uint64) * _GOLDEN + words[0]) ^ words[1])
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normal(seed: int, row: np.ndarray, stream: int) -> np.ndarray:
    """(B,) float64, standard normal."""
    return scipy.special.ndtri(uniform(seed, row, stream))
