"""Swaps of a truth and a draw of its posterior, which are exchangeable given x.

A statistic that is a sum over rows of something that changes its sign with the swap has, under a
correct posterior, the distribution that random signs give it: exactly, for any number of rows and
whatever the shape of the posteriors. Parameters are swapped together, so that the largest of their
statistics corrects for their number exactly (Westfall and Young 1993).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

__all__ = ["SWAPS", "signs"]

SWAPS = 4999
# Floats of swaps at once.
_AT_ONCE = 2**23


def signs(rows: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (S, ``rows``) of +-1, 4,999 rows in all: a block in memory at a time."""
    block = max(1, min(SWAPS, _AT_ONCE // rows))
    for first in range(0, SWAPS, block):
        yield _draw(seed, first, min(block, SWAPS - first), rows)


@functools.lru_cache(1)
def _draw(seed: int, first: int, count: int, rows: int) -> np.ndarray:
    rng = np.random.default_rng([seed, first])
    bits = np.unpackbits(np.frombuffer(rng.bytes(-(-count * rows // 8)), np.uint8))
    return (2.0 * bits[: count * rows].reshape(count, rows) - 1.0).astype(np.float32)
