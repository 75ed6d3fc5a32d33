"""Simulate the rows of one shard in this process: a function of (problem, seed, shard) alone.

No Ray and no store here. What happens to a row whose simulation raises or gives no finite number
is decided here too: it stays a row, with its status. Hanging and crashing simulators need another
process; that is ``isolation.py``, which calls the same steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from sbi_dist.priors import sample_prior
from sbi_dist.problem import Problem
from sbi_dist.simulation.dataset import Simulations
from sbi_dist.simulation.plan import SIMULATION, Shard
from sbi_dist.simulator import SimulatorForm, call, row_streams, seed_stream

__all__ = ["Call", "Outcome", "in_process", "simulate_shard", "simulate_theta"]

# What came of one call of the simulator: x, or (status, message); and the seconds that it took.
Outcome = tuple[np.ndarray | tuple[str, str], float]


class Call(Protocol):
    """Calls the simulator on theta with a random stream and never raises for its faults."""

    def __call__(self, form: SimulatorForm, theta: np.ndarray, stream: object) -> Outcome: ...


def in_process(simulator: Callable[..., object]) -> Call:
    """The plain call: in this process, without a time limit."""

    def run(form: SimulatorForm, theta: np.ndarray, stream: object) -> Outcome:
        started = time.perf_counter()
        try:
            x: np.ndarray | tuple[str, str] = call(simulator, form, theta, stream)
        except (Exception, SystemExit) as error:
            x = ("error", describe(error))
        return x, time.perf_counter() - started

    return run


def describe(error: BaseException) -> str:
    """One line about an exception, short enough to keep with a row."""
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:300]


def simulate_shard(
    problem: Problem,
    form: SimulatorForm,
    shard: Shard,
    seed: int,
    run: Call,
    batch_size: int | None = None,
) -> Simulations:
    """Draw theta from the prior and simulate x for every row of a shard."""
    for_theta, for_batches, for_rows = shard.streams(seed, SIMULATION)
    seed_stream(for_theta)
    theta = sample_prior(problem.prior, shard.size)
    simulations = simulate_theta(theta, form, (for_batches, for_rows), run, batch_size)
    simulations.simulation_id = shard.start + np.arange(shard.size, dtype=np.int64)
    return simulations


def simulate_theta(
    theta: np.ndarray,
    form: SimulatorForm,
    streams: tuple[np.random.SeedSequence, np.random.SeedSequence],
    run: Call,
    batch_size: int | None = None,
) -> Simulations:
    """Simulate x for given theta, float32 of shape (N, D); the streams are for batches and rows."""
    for_batches, for_rows = streams
    count = len(theta)
    x = np.full((count, *form.x_shape), np.nan, dtype=np.float32)
    status = ["ok"] * count
    error: list[str | None] = [None] * count
    duration = np.zeros(count, dtype=np.float32)
    keys = row_streams(for_rows, count)

    def keep(row: int, outcome: Outcome) -> None:
        value, duration[row] = outcome
        if isinstance(value, tuple):
            status[row], error[row] = value
        else:
            x[row] = value

    for batch, rows in _batches(count, batch_size or count) if form.batched else ():
        stream = np.random.SeedSequence(
            for_batches.entropy, spawn_key=(*for_batches.spawn_key, batch)
        )
        value, seconds = run(form, theta[rows], stream)
        if not isinstance(value, tuple):
            x[rows] = value
            duration[rows] = seconds / (rows.stop - rows.start)
            continue
        # One bad row spoils the call of its batch only: the rows are simulated one at a time.
        for row in range(rows.start, rows.stop):
            value, seconds = run(form, theta[row : row + 1], keys[row])
            keep(row, (value if isinstance(value, tuple) else value[0], seconds))
    if not form.batched:
        for row in range(count):
            keep(row, run(form, theta[row], keys[row]))

    finite = np.isfinite(x.reshape(count, -1)).all(axis=1)
    for row in np.flatnonzero(~finite).tolist():
        if status[row] == "ok":
            status[row], error[row] = "nonfinite", "x is NaN or infinite"
    return Simulations(np.arange(count, dtype=np.int64), theta, x, status, error, duration)


def _batches(count: int, size: int) -> Iterator[tuple[int, slice]]:
    for number, start in enumerate(range(0, count, size)):
        yield number, slice(start, min(start + size, count))
