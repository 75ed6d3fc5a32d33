"""Held-out simulations in the store: made for calibration alone, read by ranges of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.plan import CALIBRATION
from sbi_dist.simulation.shard import ShardRecord, Simulations, concatenate
from sbi_dist.store import ObjectStore

__all__ = ["HeldOut", "HeldOutOptions"]


@dataclasses.dataclass(frozen=True)
class HeldOutOptions(SimulateOptions):
    """As for the simulations to train on, from random streams that never meet theirs."""

    purpose = CALIBRATION


class HeldOut:
    """Held-out simulations, as a source that actors read by themselves.

    Args:
        name: of their dataset.
        store: its folder.
        records: of its shards, in order.
    """

    remote = on_disk = True

    def __init__(self, name: str, store: ObjectStore, records: Sequence[ShardRecord]) -> None:
        self.name, self._store, self.records = name, store, list(records)
        self._ends = np.cumsum([record.rows for record in records])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> Simulations:
        """Rows ``start`` to ``stop - 1``."""
        dataset, parts = Dataset(self._store), []
        first = int(np.searchsorted(self._ends, start, side="right"))
        for number in range(first, len(self.records)):
            end = int(self._ends[number])
            begin = end - self.records[number].rows
            if begin >= stop:
                break
            shard = dataset.read(self.records[number])
            parts.append(_rows(shard, max(start - begin, 0), min(stop, end) - begin))
        return concatenate(parts)

    def check(self) -> None:
        """Each shard is checked as it is read."""


def _rows(shard: Simulations, start: int, stop: int) -> Simulations:
    some = slice(start, stop)
    failed = {row - start: why for row, why in shard.failed.items() if start <= row < stop}
    return Simulations(
        shard.simulation_id[some], shard.theta[some], shard.x[some], failed, shard.duration_s[some]
    )
