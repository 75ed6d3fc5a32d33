"""Which shards a dataset has: their indexes, sizes and random streams. Pure arithmetic."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

__all__ = ["CALIBRATION", "PREDICTIVE", "SIMULATION", "Shard", "plan_shards", "shard_size_for"]

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


def shard_size_for(num_simulations: int) -> int:
    """The default shard size: some 64 shards, of 1 to 4096 rows."""
    return min(max(math.ceil(num_simulations / 64), 1), 4096)


def plan_shards(num_simulations: int, shard_size: int, existing: dict[int, int]) -> list[Shard]:
    """The shards of a dataset of ``num_simulations`` rows, stored ones first to be kept.

    Args:
        num_simulations: rows wanted in all.
        shard_size: rows of a shard that is not stored yet; the last one may be shorter.
        existing: rows of each stored shard, by index. An append keeps them, whatever their size.

    Returns:
        Shards 0, 1, ... that hold at least ``num_simulations`` rows (more only where a stored
        shard reaches beyond), each with the first row that it starts at.
    """
    shards: list[Shard] = []
    start = 0
    while start < num_simulations:
        index = len(shards)
        size = existing.get(index, min(shard_size, num_simulations - start))
        shards.append(Shard(index, start, size))
        start += size
    return shards
