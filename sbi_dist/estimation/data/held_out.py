"""Which simulations are held out for validation: a function of their number and a seed.

The rows are cut into strata of 1 / fraction, and one random row of each is held out. Nothing here
needs more than the strata that are asked about, so that of a billion rows a few can be looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from sbi_dist.errors import InputError
from sbi_dist.estimation.data.streams import stream

__all__ = ["HeldOut", "split"]

_BLOCK = 4  # float64 that Philox gives for each step of its counter


class HeldOut:
    """The rows of 0..count-1 that are held out; the others are the training rows.

    Training rows have positions 0..training-1, in order.

    Args:
        count: number of rows.
        fraction: of them that is held out, in (0, 1).
        seed: of the choice, a non-negative integer.

    Attributes:
        training, validation: number of rows of each kind.

    Raises:
        InputError: too few rows for both kinds.
    """

    def __init__(self, count: int, fraction: float, seed: int) -> None:
        self.count, self._fraction, self._seed = count, fraction, seed
        self._strata = int(count * fraction) + 1
        self.validation = self.before(count) if count else 0
        self.training = count - self.validation
        if count < 20 or self.validation < 1 or self.training < 10:
            raise InputError(
                f"train: {count} usable simulations are too few; at least 20 are needed (raise "
                "simulate.num_simulations)"
            )

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Held-out rows of the range ``start`` to ``stop``, int64, in order."""
        start, stop = max(0, start), min(stop, self.count)
        if start >= stop:
            return np.empty(0, dtype=np.int64)
        first, last = self._stratum(start), self._stratum(stop - 1)
        rows = self._picked(first, last + 1)
        return rows[(rows >= start) & (rows < stop)]

    def before(self, row: int) -> int:
        """How many rows below ``row`` are held out."""
        stratum = self._stratum(row)
        return stratum + int(self._picked(stratum, stratum + 1)[0] < min(row, self.count))

    def position(self, row: int) -> int:
        """How many training rows are below ``row``."""
        return row - self.before(row)

    def between(self, start: int, stop: int) -> tuple[int, int, np.ndarray]:
        """Where training positions ``start`` to ``stop`` are, of which there is at least one.

        Returns:
            The row of the first one, the row after the last one, and the held-out rows between
            them, int64.
        """
        first, last = self._stratum_at(start), self._stratum_at(stop - 1)
        picked = self._picked(first, last + 1)
        row = start + first + int(picked[0] <= start + first)
        end = stop + last + int(picked[-1] < stop + last)
        return row, end, picked[(picked > row) & (picked < end)]

    def _stratum_at(self, position: int) -> int:
        """The stratum of a training position: the last one with that many before it at most."""
        near = int(position * self._fraction / (1 - self._fraction))
        return self._last(near, lambda each: self._edge(each) - each <= position)

    def _edge(self, stratum: int) -> int:
        return math.floor(stratum / self._fraction)

    def _stratum(self, row: int) -> int:
        """The stratum of a row; the last one for rows beyond."""
        return self._last(int(row * self._fraction), lambda each: self._edge(each) <= row)

    def _last(self, near: int, fits: Callable[[int], bool]) -> int:
        """The last stratum that fits, as all before it do; it is not far from ``near``."""
        stratum = min(near, self._strata - 1)
        while stratum > 0 and not fits(stratum):
            stratum -= 1
        while stratum + 1 < self._strata and fits(stratum + 1):
            stratum += 1
        return stratum

    def _picked(self, first: int, end: int) -> np.ndarray:
        """The row of each stratum that is held out, int64; it may be beyond the last row."""
        edges = np.floor(np.arange(first, end + 1) / self._fraction)
        generator = stream(self._seed, (first // _BLOCK, 0, 0, 0))
        skipped = first % _BLOCK
        picks = generator.random(skipped + end - first)[skipped:]
        # Rounding must not push a pick of some 1e9 rows into the next stratum.
        rows = np.minimum(np.floor(edges[:-1] + picks * np.diff(edges)), edges[1:] - 1)
        if first == 0 and rows[0] >= self.count:  # fewer rows than one is to be held out of
            rows[0] = int(picks[0] * self.count)
        return rows.astype(np.int64)


def split(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indexes of the training and of the validation simulations.

    One random row of each 1 / fraction is held out. More rows behind these change nothing for
    them, so that what a model was trained on is not what its successor is validated on.

    Raises:
        InputError: too few simulations for both.
    """
    held_out = HeldOut(count, fraction, seed).rows(0, count)
    return np.setdiff1d(np.arange(count), held_out, assume_unique=True), held_out
