"""Simulations for given parameters, such as posterior draws: the posterior predictive.

Run on Ray tasks where Ray is connected, in this process otherwise; kept in memory.
"""

from __future__ import annotations

import pickle

import numpy as np

from sbi_dist.problem import Problem
from sbi_dist.progress import say
from sbi_dist.simulation.isolation import IsolatedCall
from sbi_dist.simulation.plan import PREDICTIVE
from sbi_dist.simulation.prepare import ship
from sbi_dist.simulation.rows import Call, InProcess, simulate_theta
from sbi_dist.simulation.shard import Simulations, concatenate

__all__ = ["simulate_predictive"]

_ROWS = 50


def simulate_predictive(
    problem: Problem, theta: np.ndarray, seed: int, timeout_s: float | None = None
) -> np.ndarray:
    """x of the successful simulations for theta (N, D) float32; float32 (at most N, *x_shape)."""
    import ray

    payload = ship(problem.simulator, "problem.simulator", problem)
    chunks = [
        (problem.form(), theta[start : start + _ROWS], seed, start, timeout_s)
        for start in range(0, len(theta), _ROWS)
    ]
    if not ray.is_initialized():
        parts = [_simulate_chunk(payload, *chunk) for chunk in chunks]
    else:
        packed = ray.put(payload)
        remote = ray.remote(num_cpus=1, max_retries=0)(_simulate_chunk)
        try:
            parts = ray.get([remote.remote(packed, *chunk) for chunk in chunks])
        except ray.exceptions.WorkerCrashedError:
            say("infer: the simulator ended its process; it is run again in one of its own")
            parts = ray.get([remote.remote(packed, *chunk, isolate=True) for chunk in chunks])
    rows = concatenate(parts)
    return rows.x[rows.ok]


def _simulate_chunk(
    payload: bytes,
    form: object,
    theta: np.ndarray,
    seed: int,
    start: int,
    timeout_s: float | None,
    isolate: bool = False,
) -> Simulations:
    streams = np.random.SeedSequence(seed, spawn_key=(PREDICTIVE, start)).spawn(2)
    call: Call
    if not isolate and timeout_s is None:
        call = InProcess(pickle.loads(payload))
        return simulate_theta(theta, form, (streams[0], streams[1]), call)  # type: ignore[arg-type]
    call = IsolatedCall(payload, timeout_s)
    try:
        return simulate_theta(theta, form, (streams[0], streams[1]), call)  # type: ignore[arg-type]
    finally:
        call.close()
