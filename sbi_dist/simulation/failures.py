"""Simulations that failed: how many, which most often, and when there are too many of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from sbi_dist.errors import StageError
from sbi_dist.simulation.shard import ShardRecord

__all__ = ["Failures", "frequent_failures"]


def frequent_failures(records: Iterable[ShardRecord], most: int = 3) -> list[dict[str, Any]]:
    """The most frequent failures over all shards, each with a theta that shows it."""
    merged: dict[str, dict[str, Any]] = {}
    for record in records:
        for entry in record.errors:
            known = merged.setdefault(entry["message"], {**entry, "count": 0})
            known["count"] += entry["count"]
    return sorted(merged.values(), key=lambda entry: -entry["count"])[:most]


class Failures:
    """Counts of what failed so far, and the limit to them.

    Args:
        allowed: largest fraction of simulations that may fail.
        expected: number of simulations in the end, where it is known.
    """

    def __init__(self, allowed: float, expected: int | None) -> None:
        self._allowed, self._expected = allowed, expected
        self._with_failures: list[ShardRecord] = []
        self.rows = self.failed = 0

    def add(self, record: ShardRecord) -> None:
        """Count a shard."""
        self.rows += record.rows
        if record.failures:
            self.failed += record.failures
            self._with_failures.append(record)

    def check(self) -> None:
        """Stop once it is all but certain that more fail than allowed.

        That is when the lower end of Wilson's interval at 4 standard deviations is above the
        limit, or the last simulation is in.

        Raises:
            StageError: too many fail; names the most frequent failures.
        """
        if not self.failed:
            return
        z, rows, fraction = 4.0, self.rows, self.failed / self.rows
        spread = z * math.sqrt(fraction * (1 - fraction) / rows + z * z / (4 * rows * rows))
        bound = (fraction + z * z / (2 * rows) - spread) / (1 + z * z / rows)
        finished = self._expected is not None and rows >= self._expected
        if bound <= self._allowed and not (finished and fraction > self._allowed):
            return
        examples = "; ".join(
            f"{entry['count']:,} x {entry['status']} ({entry['message']}), for one with theta = "
            f"{[float(f'{value:.6g}') for value in entry['theta']]}"
            for entry in frequent_failures(self._with_failures)
        )
        raise StageError(
            f"{self.failed:,} of {rows:,} simulations failed, more than "
            f"simulate.max_failure_fraction={self._allowed:g} allows. Most frequent: {examples}. "
            "Mend the simulator or the prior, or raise simulate.max_failure_fraction; the finished "
            "shards are kept"
        )
