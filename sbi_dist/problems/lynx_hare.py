"""Lynx and hare pelts of the Hudson's Bay Company, 1900-1920: a Lotka-Volterra model.

Data, model and priors are those of the Stan case study (Carpenter 2018); ``PUBLISHED`` is its
reference posterior. Here are the problem, a fast simulator for batches and the exact likelihood.

Hare u and lynx v (pelts in thousands) follow du/dt = (alpha - beta v) u and
dv/dt = (-gamma + delta u) v. The pelts counted in each year are log-normal around u and v.
"""

from __future__ import annotations

import math

import numpy as np
from torch.distributions import LogNormal, Normal

from sbi_dist.priors import Truncated
from sbi_dist.problem import ObservationAxis, Problem
from sbi_dist.problems import predator_prey

__all__ = [
    "OBSERVED",
    "PUBLISHED",
    "PUBLISHED_QUANTILES",
    "YEARS",
    "log_likelihood",
    "log_populations",
    "problem",
    "simulator",
]

YEARS = np.arange(1900, 1921)

# Hare and lynx pelts, thousands: Howard (2009) after Hewitt (1921), as in the case study.
OBSERVED = np.array(
    [
        (30.0, 4.0),
        (47.2, 6.1),
        (70.2, 9.8),
        (77.4, 35.2),
        (36.3, 59.4),
        (20.6, 41.7),
        (18.1, 19.0),
        (21.4, 13.0),
        (22.0, 8.3),
        (25.4, 9.1),
        (27.1, 7.4),
        (40.3, 8.0),
        (57.0, 12.3),
        (76.6, 19.5),
        (52.3, 45.7),
        (19.5, 51.1),
        (11.2, 29.7),
        (7.6, 15.8),
        (14.6, 9.7),
        (16.2, 10.1),
        (24.7, 8.6),
    ]
)

# Posterior mean and standard deviation of each parameter: reference posterior
# hudson_lynx_hare-lotka_volterra of posteriordb (Magnusson et al.), 10,000 draws of 10 chains of
# Hamiltonian Monte Carlo.
PUBLISHED: dict[str, tuple[float, float]] = {
    "alpha": (0.54686, 0.06305),
    "beta": (0.027747, 0.0041547),
    "gamma": (0.80010, 0.089370),
    "delta": (0.024086, 0.0035281),
    "u0": (34.035, 2.9169),
    "v0": (5.9359, 0.53055),
    "sigma_hare": (0.24806, 0.043263),
    "sigma_lynx": (0.25102, 0.043590),
}

# The 5 %, 50 % and 95 % quantiles of the same draws.
PUBLISHED_QUANTILES: dict[str, tuple[float, float, float]] = {
    "alpha": (0.44822, 0.54365, 0.65504),
    "beta": (0.021378, 0.027502, 0.035021),
    "gamma": (0.66422, 0.79406, 0.95768),
    "delta": (0.018857, 0.023825, 0.030307),
    "u0": (29.344, 33.944, 39.038),
    "v0": (5.1149, 5.9113, 6.8339),
    "sigma_hare": (0.18781, 0.24249, 0.32780),
    "sigma_lynx": (0.19107, 0.24484, 0.33129),
}

# Simulated pelts are kept in these bounds, which single precision can hold. Wide priors reach
# beyond them: a crash to e^-500 thousand hare, or log-normal noise of sigma 30.
SMALLEST, LARGEST = 1e-30, 1e30


def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pelt counts in thousands, float64 of shape (N, 21, 2), for theta of shape (N, 8).

    theta's columns are the parameters in the order of ``PUBLISHED``; the last axis of x is (hare,
    lynx). Also takes (8,) and gives (21, 2). Counts are clipped to [1e-30, 1e30]. Row i depends
    on theta[i] and on rows up to i of the random numbers only.
    """
    theta = np.asarray(theta, dtype=np.float64)
    noise = rng.standard_normal((*theta.shape[:-1], len(YEARS), 2))
    log_pelts = log_populations(theta) + theta[..., None, 6:8] * noise
    x: np.ndarray = np.exp(np.clip(log_pelts, math.log(SMALLEST), math.log(LARGEST)))
    return x


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), float64 of shape (N,), for theta of shape (N, 8) and x of shape (21, 2).

    Exact (up to the integration error of :func:`log_populations`), since the populations are a
    function of theta. Counts are in thousands; those at the simulator's bounds get the density of
    an unclipped count.
    """
    theta = np.asarray(theta, dtype=np.float64)
    log_x = np.log(np.asarray(x, dtype=np.float64))
    sigma = theta[..., None, 6:8]
    residual = (log_x - log_populations(theta)) / sigma
    density = -0.5 * residual**2 - np.log(sigma) - log_x - 0.5 * math.log(2.0 * math.pi)
    total: np.ndarray = density.sum(axis=(-2, -1))
    return total


def log_populations(theta: np.ndarray) -> np.ndarray:
    """Natural logarithms of hare and lynx (thousands) in each year, without noise.

    Args:
        theta: shape (N, 8) or (8,); the two sigmas are not used.

    Returns:
        float64 of shape (N, 21, 2) or (21, 2); NaN for years in which there is no solution: theta
        is not finite, u0 or v0 is not positive, or (outside the prior's support) it has blown up.
    """
    theta = np.asarray(theta, dtype=np.float64)
    rows = theta.reshape(-1, theta.shape[-1])
    if rows.shape[1] != len(PUBLISHED):
        raise ValueError(f"theta has {rows.shape[1]} parameters, expected {len(PUBLISHED)}")
    result = predator_prey.log_populations(rows[:, :4], rows[:, 4:6], YEARS - YEARS[0])
    return result.reshape(*theta.shape[:-1], len(YEARS), 2)


_NAMES = tuple(PUBLISHED)

problem = Problem(
    prior=[
        Truncated(Normal(1.0, 0.5), low=0.0),
        Truncated(Normal(0.05, 0.05), low=0.0),
        Truncated(Normal(1.0, 0.5), low=0.0),
        Truncated(Normal(0.05, 0.05), low=0.0),
        LogNormal(math.log(10.0), 1.0),
        LogNormal(math.log(10.0), 1.0),
        LogNormal(-1.0, 1.0),
        LogNormal(-1.0, 1.0),
    ],
    simulator=simulator,
    log_likelihood=log_likelihood,
    parameter_names=_NAMES,
    parameter_units=(
        "1/yr",
        "1/(yr k lynx)",
        "1/yr",
        "1/(yr k hare)",
        "k hare",
        "k lynx",
        "",
        "",
    ),
    observed=OBSERVED,
    axis=ObservationAxis(
        label="year",
        values=tuple(float(year) for year in YEARS),
        series=("hare", "lynx"),
        value_label="pelts (thousands)",
        log=True,
    ),
    title="Lynx and hare, 1900-1920",
    description=(
        "The Hudson's Bay Company recorded how many hare and lynx pelts it collected each year. "
        "The hare grow by themselves and are eaten by the lynx, which starve without them "
        "(Lotka-Volterra equations); the recorded numbers scatter log-normally around the two "
        "populations. Eight parameters are inferred from 21 years of both series: four rates, the "
        "two populations in 1900 and the two scatters."
    ),
    reference=(
        "Carpenter (2018), Predator-prey population dynamics: the Lotka-Volterra model in Stan, "
        "mc-stan.org case studies; data from Howard (2009) after Hewitt (1921); reference "
        "posterior hudson_lynx_hare-lotka_volterra of posteriordb (Magnusson et al.)."
    ),
)
