"""Simulate rows of one shard in this process: a function of (problem, seed, shard) alone.

No Ray and no store here. What happens to a row whose simulation raises or gives no finite number
is decided here too: it stays a row, with its status. Hanging and crashing simulators need another
process; that is ``isolation.py``, which calls the same steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from sbi_dist.priors import sample_prior
from sbi_dist.problem import Problem
from sbi_dist.simulation.plan import SIMULATION, Shard
from sbi_dist.simulation.shard import STATUSES, Simulations
from sbi_dist.simulator import (
    MOST_IN_BLOCK,
    RowStreams,
    SimulatorForm,
    call_batch,
    call_rows,
    row_streams,
    seed_stream,
)

__all__ = ["Call", "Failure", "InProcess", "never", "simulate_shard", "simulate_theta"]

# (status, message) of a call that gave no data.
Failure = tuple[str, str]
Keep = Callable[[int, "np.ndarray | Failure", float], bool]


class Call(Protocol):
    """Calls the simulator and never raises for its faults."""

    def batch(
        self, form: SimulatorForm, theta: np.ndarray, stream: np.random.SeedSequence
    ) -> tuple[np.ndarray | Failure, float]:
        """x of a whole batch, or why there is none; and the seconds that it took."""
        ...

    def rows(self, form: SimulatorForm, theta: np.ndarray, keys: np.ndarray, keep: Keep) -> None:
        """Give ``keep`` each row's number, its x or why there is none, and its seconds.

        Ends early where ``keep`` gives False.
        """
        ...


class InProcess:
    """The plain call: in this process, without a time limit.

    Args:
        simulator: the callable.
    """

    def __init__(self, simulator: Callable[..., object]) -> None:
        self._simulator = simulator
        self._streams: RowStreams | None = None
        self.block = MOST_IN_BLOCK

    def batch(
        self, form: SimulatorForm, theta: np.ndarray, stream: np.random.SeedSequence
    ) -> tuple[np.ndarray | Failure, float]:
        started = time.perf_counter()
        x: np.ndarray | Failure
        try:
            x = call_batch(self._simulator, form, theta, stream)
        except (Exception, SystemExit) as error:
            x = describe(error)
        return x, time.perf_counter() - started

    def rows(self, form: SimulatorForm, theta: np.ndarray, keys: np.ndarray, keep: Keep) -> None:
        def described(row: int, outcome: Any, seconds: float) -> bool:
            if isinstance(outcome, BaseException):
                outcome = describe(outcome)
            return keep(row, outcome, seconds)

        if self._streams is None:
            self._streams = RowStreams()
        call_rows(self._simulator, form, theta, keys, described, self._streams, self.block)


def describe(error: BaseException) -> Failure:
    """Status and one line about an exception, short enough to keep with a row.

    An exception may name its own status (an external program that ran out of its time, say).
    """
    # Without what no encoding can write down.
    text = str(error).encode("utf-8", "replace").decode()
    status = getattr(error, "status", None)
    if status in STATUSES:
        return status, " ".join(text.split())[:1200]
    first_line = (text.splitlines() or [""])[0]
    return "error", f"{type(error).__name__}: {first_line}"[:300]


def never() -> bool:
    """Not interrupted."""
    return False


def simulate_shard(
    problem: Problem,
    form: SimulatorForm,
    shard: Shard,
    seed: int,
    call: Call,
    batch_size: int | None = None,
    start: int = 0,
    stop: int | None = None,
    interrupted: Callable[[], bool] = never,
    purpose: int = SIMULATION,
) -> Simulations:
    """Draw theta from the prior and simulate x for rows ``start`` to ``stop`` of a shard.

    Rows come out the same whatever range they are part of; with a batch simulator a range starts
    at a multiple of ``batch_size``. Ends early, with the rows so far, once ``interrupted``.
    ``purpose`` is what they are for: the random streams of one never meet those of another.
    """
    for_theta, for_batches, for_rows = shard.streams(seed, purpose)
    seed_stream(for_theta)
    theta = sample_prior(problem.prior, shard.size)
    simulations = simulate_theta(
        theta, form, (for_batches, for_rows), call, batch_size, start, stop, interrupted
    )
    simulations.simulation_id += shard.start
    return simulations


def simulate_theta(
    theta: np.ndarray,
    form: SimulatorForm,
    streams: tuple[np.random.SeedSequence, np.random.SeedSequence],
    call: Call,
    batch_size: int | None = None,
    start: int = 0,
    stop: int | None = None,
    interrupted: Callable[[], bool] = never,
) -> Simulations:
    """Simulate x for given theta, float32 of shape (N, D); the streams are for batches and rows.

    Only rows ``start`` to ``stop``, and fewer once ``interrupted``.
    """
    for_batches, for_rows = streams
    stop = len(theta) if stop is None else stop
    rows = _Rows(stop - start, form.x_shape, interrupted)
    if form.batched:
        keys = None
        for number, batch in _batches(start, stop, batch_size or len(theta)):
            stream = np.random.SeedSequence(
                for_batches.entropy, spawn_key=(*for_batches.spawn_key, number)
            )
            value, seconds = call.batch(form, theta[batch], stream)
            if isinstance(value, tuple):
                # One bad row spoils the call of its batch only: they are simulated one by one.
                if keys is None:
                    keys = row_streams(for_rows, len(theta))
                first = batch.start - start
                call.rows(form, theta[batch], keys[batch], rows.keeper(first))
            else:
                rows.keep_batch(value, seconds)
            if interrupted():
                break
    else:
        keys = row_streams(for_rows, len(theta))[start:stop]
        call.rows(form, theta[start:stop], keys, rows.keeper(0))
    return rows.finished(theta[start:stop], start)


def _batches(start: int, stop: int, size: int) -> Iterator[tuple[int, slice]]:
    assert start % size == 0
    for first in range(start, stop, size):
        yield first // size, slice(first, min(first + size, stop))


# How often a run of rows looks whether it is to stop.
_LOOK_EVERY_S = 0.02


class _Rows:
    """The rows that were simulated so far."""

    def __init__(
        self, count: int, x_shape: tuple[int, ...], interrupted: Callable[[], bool]
    ) -> None:
        self.x = np.empty((count, *x_shape), dtype=np.float32)
        self.duration_s = np.zeros(count, dtype=np.float32)
        self.failed: dict[int, Failure] = {}
        self.reached = 0
        self._interrupted, self._since_look = interrupted, 0.0

    def keep_batch(self, x: np.ndarray, seconds: float) -> None:
        rows = slice(self.reached, self.reached + len(x))
        self.x[rows] = x
        self.duration_s[rows] = seconds / len(x)
        self.reached += len(x)

    def keeper(self, first: int) -> Keep:
        """What keeps the rows from ``first`` on, one by one."""
        x, duration_s = self.x, self.duration_s

        def keep(row: int, outcome: np.ndarray | Failure, seconds: float) -> bool:
            row += first
            duration_s[row] = seconds
            if type(outcome) is tuple:
                x[row] = np.nan
                self.failed[row] = outcome
            else:
                x[row] = outcome
            self.reached = row + 1
            self._since_look += seconds
            if self._since_look < _LOOK_EVERY_S:
                return True
            self._since_look = 0.0
            return not self._interrupted()

        return keep

    def finished(self, theta: np.ndarray, start: int) -> Simulations:
        count = self.reached
        x, theta = self.x[:count], theta[:count]
        # A sum is finite only where all of its terms are, and much faster to have.
        with np.errstate(over="ignore", invalid="ignore"):
            if not np.isfinite(x.sum(dtype=np.float64)):
                finite = np.isfinite(x.reshape(count, -1)).all(axis=1)
                for row in np.flatnonzero(~finite).tolist():
                    self.failed.setdefault(row, ("nonfinite", "x is NaN or infinite"))
        identity = np.arange(start, start + count, dtype=np.int64)
        return Simulations(
            identity, theta, x, dict(sorted(self.failed.items())), self.duration_s[:count]
        )
