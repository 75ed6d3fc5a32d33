"""An epidemic: susceptible, infected and recovered people.

Of 1,000,000 people one is infected at time 0. With S, I and R the numbers of the three kinds,
S' = -beta S I / N, I' = beta S I / N - gamma I and R' = gamma I. Every 17 days, from day 0 to day
153, 1,000 people are tested: x is Binomial(1000, I / N), ten numbers. theta is the contact rate
beta ~ LogNormal(log 0.4, 0.5) and the recovery rate gamma ~ LogNormal(log 0.125, 0.2). Definition,
observed data and true parameters are those of the ``sir`` task of sbibm 1.1.0 (observation 1).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.distributions import LogNormal

from sbi_dist.problem import ObservationAxis, Problem
from sbi_dist.problems import predator_prey

__all__ = [
    "DAYS",
    "OBSERVED",
    "PEOPLE",
    "TESTED",
    "TRUE_PARAMETERS",
    "log_infected",
    "log_likelihood",
    "problem",
    "simulator",
]

PEOPLE = 1_000_000
TESTED = 1000
DAYS = np.arange(0, 161, 17)

# Observation 1 of sbibm 1.1.0: tasks/sir/files/num_observation_1.
TRUE_PARAMETERS = np.array([0.61479264, 0.19172086])
OBSERVED = np.array([0.0, 1.0, 352.0, 40.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0])


def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Number of infected among those tested, float64 of shape (N, 10) or (10,); NaN without one."""
    share = np.exp(log_infected(theta))
    known = np.isfinite(share)
    # Rounding may give a share of 1 + 1e-16.
    counts = rng.binomial(TESTED, np.where(known, np.minimum(share, 1.0), 0.0))
    return np.where(known, counts, np.nan)


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), shape (N,), for theta (N, 2) and one x (10,), or one x for each theta."""
    from scipy import special  # here, so that the simulator's processes need not load it

    x = np.asarray(x, dtype=np.float64)
    log_share = np.minimum(log_infected(theta), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_other = np.log(-np.expm1(log_share))
        # A count of nobody, or of all, says nothing of the other kind.
        density = np.where(x > 0, x * log_share, 0.0)
        density += np.where(x < TESTED, (TESTED - x) * log_other, 0.0)
    ways = special.gammaln(TESTED + 1) - special.gammaln(x + 1) - special.gammaln(TESTED - x + 1)
    total: np.ndarray = (density + ways).sum(-1)
    return total


def log_infected(theta: np.ndarray) -> np.ndarray:
    """log(I / N) on each of ``DAYS``, shape (N, 10) or (10,); NaN where there is no solution.

    The people who can be infected are the prey of those who are.
    """
    theta = np.asarray(theta, dtype=np.float64)
    contact, recovery = theta.reshape(-1, 2).T
    rates = np.stack([np.zeros_like(contact), contact, recovery, contact], axis=-1)
    infected = 1 / PEOPLE
    start = np.broadcast_to([1 - infected, infected], (len(rates), 2))
    shares = predator_prey.log_populations(rates, start, DAYS)
    return shares[..., 1].reshape(*theta.shape[:-1], len(DAYS))


problem = Problem(
    prior=LogNormal(torch.tensor([math.log(0.4), math.log(0.125)]), torch.tensor([0.5, 0.2])),
    simulator=simulator,
    log_likelihood=log_likelihood,
    parameter_names=("beta", "gamma"),
    parameter_units=("1/d", "1/d"),
    observed=OBSERVED,
    true_parameters=TRUE_PARAMETERS,
    axis=ObservationAxis(
        label="day", values=tuple(DAYS.tolist()), value_label=f"infected of {TESTED} people"
    ),
    title="SIR epidemic",
    description=(
        "One of a million people is infected. People infect each other at the contact rate beta "
        "and recover at the rate gamma, and both are inferred from the number of infected among "
        "1,000 people who are tested every 17 days for 153 days."
    ),
    reference=(
        "Kermack and McKendrick (1927), A contribution to the mathematical theory of epidemics, "
        "Proc. R. Soc. A 115, 700; Lueckmann et al. (2021), Benchmarking simulation-based "
        "inference, AISTATS, arXiv:2101.04653, task sir."
    ),
)
