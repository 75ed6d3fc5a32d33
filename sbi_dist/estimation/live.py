"""What the workers of a training tell while it runs, for ``live_view`` and others to follow.

The first worker writes ``metrics.json`` and TensorBoard's files to the model's folder and exports
metrics. All of it is told from a thread of its own, and what fails there is noted, not raised: no
store can hold up a training step or end the training.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from sbi_dist import metrics
from sbi_dist.estimation.event_files import EventFiles
from sbi_dist.estimation.live_view import shown
from sbi_dist.estimation.snapshot import METRICS, NOW, Snapshot
from sbi_dist.store import ObjectStore

__all__ = ["Live", "Snapshot", "shown"]

# Ray forgets gauges that are not set again, however long a step takes.
_SET_AGAIN_EVERY_S = 5.0
# Files of points: a hundredth of the run apart, which makes some hundred files in a day.
_EVENTS_SHARE, _EVENTS_AT_MOST_S = 0.01, 120.0


class Live:
    """Tells how a training stands; called after each step.

    Args:
        model: the model's folder.
        labels: ``experiment`` and ``model``, for the metrics.
        rank: this worker's; those behind the first one tell nothing.
        hyperparameters: for TensorBoard.
        every_s: the least time between two snapshots. None is 1 s, or 5 s where each costs a
            request to a bucket.
        events_every_s: the least time between two of TensorBoard's files.
    """

    def __init__(
        self,
        model: ObjectStore,
        labels: Mapping[str, str],
        rank: int = 0,
        *,
        hyperparameters: Mapping[str, Any] | None = None,
        every_s: float | None = None,
        events_every_s: float = 10.0,
    ) -> None:
        self._model, self._active = model, rank == 0
        in_bucket = model.uri.startswith("s3://")
        self._every_s = (5.0 if in_bucket else 1.0) if every_s is None else every_s
        self._events_every_s = events_every_s
        self._hyperparameters = dict(hyperparameters or {})
        self._exporter = _Exporter(labels)
        self._points: _Points | None = None
        self._failures: dict[str, tuple[int, str]] = {}
        self._taken = -math.inf
        self._last: tuple[Snapshot, dict[str, Any]] | None = None
        self._news: list[tuple[Snapshot, dict[str, Any]]] = []
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._tell_until_closed, daemon=True)

    def __call__(self, snapshot: Callable[[], Snapshot], history: dict[str, Any]) -> None:
        """Tell how things stand, where it is time to; ``snapshot`` is only called then.

        The history is copied. It consists of numbers, text, and lists of these by epoch.
        """
        now = time.monotonic()
        if not self._active or self._closed or now - self._taken < self._every_s:
            return
        self._taken = now
        news = (snapshot(), _copy(history))
        self._tried("metrics", lambda: self._exporter.export(*news))
        with self._changed:
            self._last = news
            self._news.append(news)
            self._changed.notify()
        if self._thread.ident is None:
            self._thread.start()

    def close(self, history: dict[str, Any], snapshot: Snapshot | None = None) -> str:
        """Write all that is known and stop; without a snapshot the last one with this history.

        Waits for a write to the store that is on its way, as one that came later would replace
        what others write after this call. Raises nothing: the result says what failed, all in all,
        and is empty where nothing did.
        """
        if not self._active or self._closed:
            return self._trouble()
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        if snapshot is None and self._last is not None:
            snapshot = _brought_up(self._last[0], history)
        if snapshot is not None:
            last = (snapshot, _copy(history))
            self._tried("metrics", lambda: self._exporter.export(*last))
            self._news.append(last)
        self._tell(self._news)
        self._put_events()
        return self._trouble()

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._closed:
            self.close(self._last[1] if self._last else {}, self._last[0] if self._last else None)

    # ---- in the thread, and behind it ----

    def _tell_until_closed(self) -> None:
        started = put = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._news, _SET_AGAIN_EVERY_S)
                if self._closed:
                    return
                news, self._news = self._news, []
            self._tried("metrics", self._exporter.set_again)
            self._tell(news)
            now = time.monotonic()
            wait = min((now - started) * _EVENTS_SHARE, _EVENTS_AT_MOST_S)
            if now - put >= max(wait, self._events_every_s):
                put = now
                self._put_events()

    def _tell(self, news: list[tuple[Snapshot, dict[str, Any]]]) -> None:
        if not news:
            return
        if self._points is None:
            self._points = _Points(self._model, news[0][0], self._hyperparameters)
        for each in news:
            self._points.add(*each)
        # Where the store was slow, the others are old by now.
        snapshot, history = news[-1]
        note = "; ".join(text for text in (snapshot.note, self._trouble()) if text)
        now = dataclasses.asdict(dataclasses.replace(snapshot, note=note))
        content = json.dumps({**history, NOW: now}).encode()
        self._tried(METRICS, lambda: self._model.put(METRICS, content))

    def _put_events(self) -> None:
        points = self._points
        if points is not None:
            self._tried("TensorBoard's files", points.files.put)

    def _tried(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            count = self._failures.get(what, (0, ""))[0]
            self._failures[what] = (count + 1, f"{type(error).__name__}: {error}")

    def _trouble(self) -> str:
        return "; ".join(
            f"{what}: could not be written {count} time{'s' if count > 1 else ''}, last {reason}"
            for what, (count, reason) in list(self._failures.items())
        )


def _copy(history: dict[str, Any]) -> dict[str, Any]:
    """Its lists grow while it is written."""
    return {name: list(v) if isinstance(v, list) else v for name, v in history.items()}


def _brought_up(snapshot: Snapshot, history: dict[str, Any]) -> Snapshot:
    """A snapshot from before the end, with what the history at the end says."""
    end = Snapshot.read({name: value for name, value in history.items() if name != NOW})
    if end is None:
        return snapshot
    return dataclasses.replace(
        snapshot,
        epoch=end.epoch,
        step=snapshot.steps,
        training_loss=end.training_loss,
        validation_loss=end.validation_loss,
        best_validation_loss=end.best_validation_loss,
        best_epoch=end.best_epoch,
        seconds=max(snapshot.seconds, end.seconds),
        seconds_left=0.0,
        skipped_steps=max(snapshot.skipped_steps, end.skipped_steps),
    )


class _Points:
    """What TensorBoard is told: by step, and the validation loss of each epoch at its end."""

    def __init__(
        self, model: ObjectStore, first: Snapshot, hyperparameters: Mapping[str, Any]
    ) -> None:
        # The first snapshot comes after a step: what was before it is in earlier files.
        self._begin = max(0, first.steps_in_all - 1)
        self.files = EventFiles(model, self._begin, hyperparameters)
        self._told, self._step = 0, -1  # epochs of the history, and the last step

    def add(self, now: Snapshot, history: dict[str, Any]) -> None:
        epochs, losses = history.get("epoch", []), history.get("validation_loss", [])
        for epoch, loss in list(zip(epochs, losses, strict=False))[self._told :]:
            if epoch * now.steps >= self._begin:
                self.files.add(epoch * now.steps, {"loss/validation": loss})
        self._told = len(epochs)
        if now.steps_in_all <= self._step:  # the end, where the last step was told already
            return
        self._step = now.steps_in_all
        self.files.add(
            now.steps_in_all,
            {
                "loss/training": now.training_loss,
                "learning_rate": now.learning_rate,
                "simulations_per_second": now.simulations_per_second,
                **{f"input_wait/rank-{rank}": wait for rank, wait in enumerate(now.input_wait)},
            },
        )


class _Exporter:
    """Sets the metrics of the catalogue from snapshots.

    Counters count what happened since this process began; a run that goes on is not counted twice.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._gauges: dict[str, float] = {}
        self._counted: dict[tuple[str, str], float] | None = None
        self._lock = threading.Lock()

    def export(self, now: Snapshot, history: dict[str, Any]) -> None:
        gauges = {
            "sbi_train_loss": now.training_loss,
            "sbi_train_validation_loss": now.validation_loss,
            "sbi_train_best_validation_loss": now.best_validation_loss,
            "sbi_train_learning_rate": now.learning_rate,
            "sbi_train_epoch": float(now.epoch),
            "sbi_train_simulations_per_second": now.simulations_per_second,
            "sbi_train_seconds_left": now.seconds_left,
        }
        with self._lock:
            self._gauges = {
                name: value
                for name, value in gauges.items()
                if value is not None and math.isfinite(value)
            }
        self._count(now, int(history.get("batch_size", 0)))
        self.set_again()

    def set_again(self) -> None:
        with self._lock:
            gauges = dict(self._gauges)
        for name, value in gauges.items():
            metrics.set_gauge(name, value, self._labels)

    def _count(self, now: Snapshot, batch_size: int) -> None:
        totals = {
            ("sbi_train_simulations_total", ""): float(now.steps_in_all * batch_size),
            ("sbi_train_skipped_steps_total", ""): float(now.skipped_steps),
            ("sbi_train_checkpoints_total", ""): float(now.checkpoints),
            ("sbi_train_restarts_total", ""): float(now.restarts),
        }
        for number, waited in enumerate(now.input_wait_seconds):
            totals["sbi_train_input_wait_seconds_total", str(number)] = waited
        if self._counted is None:
            self._counted = self._before(now, batch_size)
        for (name, rank), total in totals.items():
            grown = total - self._counted.get((name, rank), 0.0)
            if grown > 0:
                of_rank = {"rank": rank} if rank else {}
                metrics.add(name, grown, {**self._labels, **of_rank})
                self._counted[name, rank] = total

    @staticmethod
    def _before(first: Snapshot, batch_size: int) -> dict[tuple[str, str], float]:
        """The totals before the step that the first snapshot comes after."""
        steps = max(0, first.steps_in_all - 1)
        return {
            ("sbi_train_simulations_total", ""): float(steps * batch_size),
            # A step or two may be skipped before the first snapshot of a new training.
            ("sbi_train_skipped_steps_total", ""): float(first.skipped_steps if steps else 0),
            ("sbi_train_restarts_total", ""): float(max(0, first.restarts - 1)),
        }
