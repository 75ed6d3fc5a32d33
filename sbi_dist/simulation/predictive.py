"""Simulations for given parameters, such as posterior draws: the posterior predictive.

Run on Ray tasks where Ray is connected, in this process otherwise; kept in memory.
"""

from __future__ import annotations

import pickle

import numpy as np

from sbi_dist.problem import Problem
from sbi_dist.simulation.dataset import Simulations
from sbi_dist.simulation.plan import PREDICTIVE
from sbi_dist.simulation.rows import in_process, simulate_theta

__all__ = ["simulate_predictive"]

_ROWS = 50


def simulate_predictive(problem: Problem, theta: np.ndarray, seed: int) -> np.ndarray:
    """x of the successful simulations for theta (N, D) float32; float32 (at most N, *x_shape)."""
    from sbi_dist.simulation.driver import ship

    starts = range(0, len(theta), _ROWS)
    chunks = [(problem.form(), theta[start : start + _ROWS], seed, start) for start in starts]
    import ray

    if ray.is_initialized():
        payload = ray.put(ship(problem.simulator, "problem.simulator", problem))
        remote = ray.remote(num_cpus=1)(_simulate_chunk)
        parts = ray.get([remote.remote(payload, *chunk) for chunk in chunks])
    else:
        payload = ship(problem.simulator, "problem.simulator", problem)
        parts = [_simulate_chunk(payload, *chunk) for chunk in chunks]
    return np.concatenate([part.x[part.ok] for part in parts])


def _simulate_chunk(
    payload: bytes, form: object, theta: np.ndarray, seed: int, start: int
) -> Simulations:
    streams = np.random.SeedSequence(seed, spawn_key=(PREDICTIVE, start)).spawn(2)
    run = in_process(pickle.loads(payload))
    return simulate_theta(theta, form, (streams[0], streams[1]), run)  # type: ignore[arg-type]
