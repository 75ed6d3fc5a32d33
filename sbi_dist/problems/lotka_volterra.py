"""Predators and prey that start at known numbers: the Lotka-Volterra task of the SBI benchmark.

Prey u and predators v follow u' = alpha u - beta u v and v' = -gamma v + delta u v from u = 30 and
v = 1. x is both, log-normal around the solution with sigma 0.1, at the ten times 0, 2.1, ...,
18.9: first the prey, then the predators. alpha and gamma ~ LogNormal(-0.125, 0.5), beta and delta
~ LogNormal(-3, 0.5). Definition, observed data and true parameters are those of the
``lotka_volterra`` task of sbibm 1.1.0 (observation 1), which keeps the solution in [1e-10, 1e4].
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.distributions import LogNormal

from sbi_dist.problem import ObservationAxis, Problem
from sbi_dist.problems import predator_prey

__all__ = [
    "OBSERVED",
    "SIGMA",
    "START",
    "TIMES",
    "TRUE_PARAMETERS",
    "log_likelihood",
    "log_populations",
    "problem",
    "simulator",
]

START = (30.0, 1.0)
TIMES = 2.1 * np.arange(10)
SIGMA = 0.1
SMALLEST, LARGEST = 1e-10, 1e4

# Observation 1 of sbibm 1.1.0: tasks/lotka_volterra/files/num_observation_1.
TRUE_PARAMETERS = np.array([0.6859157, 0.10761319, 0.88789904, 0.116794825])
OBSERVED = np.array(
    [
        31.783262, 1.1971166, 0.29703617, 0.71145046, 2.9415865,
        11.482614, 36.09036, 0.46229604, 0.38081983, 0.9173736,
        0.8910395, 27.039942, 4.356176, 0.78444487, 0.17100818,
        0.1325878, 8.727008, 16.97251, 2.7902339, 0.47567415,
    ]
)  # fmt: skip


def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x of shape (N, 20) or (20,), for theta (N, 4) or (4,); NaN where there is no solution."""
    noise = rng.standard_normal((*theta.shape[:-1], 2 * len(TIMES)))
    x: np.ndarray = np.exp(log_populations(theta) + SIGMA * noise)
    return x


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), shape (N,), for theta (N, 4) and one x (20,), or one x for each theta."""
    log_x = np.log(np.asarray(x, dtype=np.float64))
    residual = (log_x - log_populations(theta)) / SIGMA
    density = -0.5 * residual**2 - log_x - math.log(SIGMA * math.sqrt(2 * math.pi))
    total: np.ndarray = density.sum(-1)
    return total


def log_populations(theta: np.ndarray) -> np.ndarray:
    """Logarithms of the prey, then of the predators, at ``TIMES``; shape (N, 20) or (20,)."""
    theta = np.asarray(theta, dtype=np.float64)
    rates = theta.reshape(-1, 4)
    start = np.broadcast_to(START, (len(rates), 2))
    populations = predator_prey.log_populations(rates, start, TIMES).swapaxes(1, 2)
    populations = np.clip(populations, math.log(SMALLEST), math.log(LARGEST))
    return populations.reshape(*theta.shape[:-1], 2 * len(TIMES))


problem = Problem(
    prior=LogNormal(torch.tensor([-0.125, -3.0, -0.125, -3.0]), torch.full((4,), 0.5)),
    simulator=simulator,
    log_likelihood=log_likelihood,
    parameter_names=("alpha", "beta", "gamma", "delta"),
    observed=OBSERVED,
    true_parameters=TRUE_PARAMETERS,
    axis=ObservationAxis(
        label="number: prey, then predators",
        values=tuple(range(1, 2 * len(TIMES) + 1)),
        value_label="population",
        log=True,
    ),
    title="Lotka-Volterra",
    description=(
        "Prey multiply and are eaten by predators, which starve without them. Both populations "
        "are known at the start and are counted at ten times, with an error of a tenth. Four "
        "rates are inferred: the growth of the prey, how fast predators eat them, the death of "
        "predators and their growth from what they eat."
    ),
    reference=(
        "Lotka (1920), Analytical note on certain rhythmic relations in organic systems, PNAS 6, "
        "410; Lueckmann et al. (2021), Benchmarking simulation-based inference, AISTATS, "
        "arXiv:2101.04653, task lotka_volterra."
    ),
)
