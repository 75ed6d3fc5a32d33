"""Which shards a dataset has: their indexes, sizes and random streams. Pure arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = [
    "CALIBRATION",
    "PREDICTIVE",
    "SIMULATION",
    "Extent",
    "Shard",
    "plan_shards",
    "shard_size_for",
]

# First element of a spawn key: randomness of one purpose never meets that of another.
SIMULATION, CALIBRATION, PREDICTIVE = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Shard:
    """The unit of work, of retry and of randomness.

    Attributes:
        index: number of the shard, also in its key.
        start: ``simulation_id`` of its first row.
        size: number of rows.
    """

    index: int
    start: int
    size: int

    @property
    def key(self) -> str:
        """Name of the shard's object in its dataset's folder."""
        return f"shard-{self.index:06d}.parquet"

    def streams(self, seed: int, purpose: int = SIMULATION) -> list[np.random.SeedSequence]:
        """Random streams of the shard: for theta, for batch calls, for calls of one row."""
        return np.random.SeedSequence(seed, spawn_key=(purpose, self.index)).spawn(3)


@dataclasses.dataclass(frozen=True)
class Extent:
    """A run of shards of one size: what was planned when the dataset was begun or appended to.

    Attributes:
        first: index of its first shard.
        start: ``simulation_id`` of its first row.
        shard_size: rows of each shard; the last one holds what is left.
        stop: ``simulation_id`` after its last row; None for an extent without an end.
    """

    first: int
    start: int
    shard_size: int
    stop: int | None

    def shards(self) -> Iterator[Shard]:
        """Its shards in order."""
        for number in itertools.count():
            start = self.start + number * self.shard_size
            if self.stop is not None and start >= self.stop:
                return
            left = self.shard_size if self.stop is None else self.stop - start
            yield Shard(self.first + number, start, min(self.shard_size, left))

    def after(self, shard_size: int, stop: int | None) -> Extent:
        """The extent that an append adds behind this one, which has an end."""
        assert self.stop is not None
        count = -(-(self.stop - self.start) // self.shard_size)
        return Extent(self.first + count, self.stop, shard_size, stop)


# A shard is one object in the store: large enough to be worth a request, small enough to be held
# in memory many times over.
_SHARD_BYTES = 8 * 1024**2
_SHARDS = 64
# Of a simulator of single rows, which takes at least microseconds for each, a shard of so many is
# worth its request, and more would only be more to lose.
_MOST_ROWS = {True: 65_536, False: 1_024}


def shard_size_for(num_simulations: int | None, batched: bool, floats_per_row: int) -> int:
    """The default shard size: some 64 shards, or more where these would be too large.

    ``num_simulations`` is None where only the time is limited; ``floats_per_row`` counts the
    numbers in theta and x.
    """
    most = min(_MOST_ROWS[batched], max(1, _SHARD_BYTES // (4 * floats_per_row + 24)))
    if num_simulations is None:
        return max(1, most // 16)
    return min(max(math.ceil(num_simulations / _SHARDS), 1), most)


def plan_shards(extents: Sequence[Extent], num_simulations: int | None) -> Iterator[Shard]:
    """The shards that hold the first ``num_simulations`` rows of a dataset, in order.

    They hold more than that only by the rest of the last one. None gives all shards, which may
    be without end.
    """
    for extent in extents:
        for shard in extent.shards():
            if num_simulations is not None and shard.start >= num_simulations:
                return
            yield shard
