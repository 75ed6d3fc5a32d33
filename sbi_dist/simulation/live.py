"""How the simulate stage stands, told as metrics while it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping

from sbi_dist import metrics
from sbi_dist.simulation.shard import ShardRecord

__all__ = ["Live"]

# Ray forgets gauges that are not set again.
_SET_AGAIN_EVERY_S = 5.0


class Live:
    """Counts the shards that one driver has stored.

    Args:
        labels: ``experiment`` and ``dataset``, for the metrics; None tells nothing.
        target: simulations that the dataset is to have, where it is known.
    """

    def __init__(self, labels: Mapping[str, str] | None, target: int | None) -> None:
        self._labels, self._target = labels, target
        self._rows, self._news = 0, False
        self._began = self._set = time.monotonic()

    def landed(self, record: ShardRecord) -> None:
        """This driver has stored a shard."""
        self._rows, self._news = self._rows + record.rows, True
        if self._labels is None:
            return
        for status, count in record.statuses.items():
            labels = {**self._labels, "status": status}
            metrics.add("sbi_simulate_simulations_total", count, labels)
        metrics.add("sbi_simulate_shards_total", 1, self._labels)
        metrics.add("sbi_simulate_busy_seconds_total", record.seconds, self._labels)

    def died(self) -> None:
        """An actor was lost."""
        if self._labels is not None:
            metrics.add("sbi_simulate_actor_deaths_total", 1, self._labels)

    def tick(self, stored: int, actors: int) -> None:
        """Set the gauges where it is time to; to be called often.

        Args:
            stored: simulations that the dataset has by now, those of other drivers too.
            actors: how many simulate.
        """
        now = time.monotonic()
        if self._labels is None or not (self._news or now - self._set >= _SET_AGAIN_EVERY_S):
            return
        self._set, self._news = now, False
        metrics.set_gauge("sbi_simulate_actors", actors, self._labels)
        rate = self._rows / max(now - self._began, 1e-9)
        metrics.set_gauge("sbi_simulate_simulations_per_second", rate, self._labels)
        if rate > 0 and self._target is not None:
            left = max(0, self._target - stored) / rate
            metrics.set_gauge("sbi_simulate_seconds_left", left, self._labels)
