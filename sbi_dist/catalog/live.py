"""How a catalog job stands, told while it runs: progress, rates and metrics."""

from __future__ import annotations

import collections
import time

from sbi_dist import metrics
from sbi_dist.catalog.actor import PartRecord
from sbi_dist.progress import Progress

__all__ = ["Live", "with_posterior"]

# Ray forgets gauges that are not set again.
_SET_AGAIN_EVERY_S = 5.0


def with_posterior(statuses: dict[str, int]) -> int:
    """How many of the observations have draws."""
    return statuses.get("ok", 0) + statuses.get("low_ess", 0)


class Live:
    """Counts parts as they land.

    Args:
        observations: in all.
        num_samples: draws of each.
        labels: ``experiment`` and ``catalog``, for the metrics.
        progress: shows it.
    """

    def __init__(
        self, observations: int, num_samples: int, labels: dict[str, str], progress: Progress
    ) -> None:
        self._observations, self._num_samples = observations, num_samples
        self._labels, self._progress = labels, progress
        self.statuses: collections.Counter[str] = collections.Counter()
        self.reason = ""
        self._began, self._begun_with = time.monotonic(), 0
        self._set = self._began

    @property
    def done(self) -> int:
        """Observations whose results are stored."""
        return self.statuses.total()

    def already(self, records: list[PartRecord]) -> None:
        """What was stored before, which does not count for the rate."""
        for record in records:
            self.statuses.update(record.statuses)
        self._begun_with = self.done

    def landed(self, record: PartRecord | None = None) -> None:
        """A part is in the store, or nothing new is to be told."""
        if record is not None:
            self.statuses.update(record.statuses)
            self.reason = self.reason or record.reason
            for status, count in record.statuses.items():
                labels = {**self._labels, "status": status}
                metrics.add("sbi_infer_observations_total", count, labels)
            draws = with_posterior(record.statuses) * self._num_samples
            metrics.add("sbi_infer_draws_total", draws, self._labels)
            metrics.add("sbi_infer_parts_total", 1, self._labels)
            self._progress.update(self.done, self._note())
        now = time.monotonic()
        if record is not None or now - self._set >= _SET_AGAIN_EVERY_S:
            self._set = now
            self._export()

    def died(self) -> None:
        """An actor was lost."""
        metrics.add("sbi_infer_actor_deaths_total", 1, self._labels)

    def _rate(self) -> float:
        """Observations a second."""
        return (self.done - self._begun_with) / max(time.monotonic() - self._began, 1e-9)

    def _note(self) -> str:
        failed = self.done - with_posterior(self.statuses)
        rate = self._rate() * self._num_samples
        return f"{rate:,.3g} draws/s" + (f", {failed:,} without a posterior" if failed else "")

    def _export(self) -> None:
        rate = self._rate()
        if rate <= 0:
            return
        left = (self._observations - self.done) / rate
        metrics.set_gauge("sbi_infer_observations_per_second", rate, self._labels)
        metrics.set_gauge("sbi_infer_seconds_left", left, self._labels)
