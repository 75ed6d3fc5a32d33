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

# The integrator's accuracy and cost; measured in tests/unit/test_problems.py.
_ORDER = 12  # of the Taylor polynomials
_TOLERANCE = 1e-8  # size of their last two terms, in the log populations
_FOLDS = 6.0  # most e-folds that a population can grow in one step
_MAX_STEPS = 20_000  # prior draws need 20 to a few hundred
_BLOCK = 4096  # rows integrated together, so that their polynomials stay in the cache


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

    Solves p' = alpha - beta e^q, q' = -gamma + delta e^p for p = log u, q = log v by Taylor
    polynomials whose step every row chooses for itself (Jorba and Zou 2005, Experimental
    Mathematics 14, 99). Logarithms, because a crash leaves e^-100 and less, from which the
    population does recover.

    Args:
        theta: shape (N, 8) or (8,); the two sigmas are not used.

    Returns:
        float64 of shape (N, 21, 2) or (21, 2); NaN for years in which there is no solution: theta
        is not finite, u0 or v0 is not positive, or (outside the prior's support) it has blown up.
    """
    theta = np.asarray(theta, dtype=np.float64)
    columns = np.ascontiguousarray(theta.reshape(-1, theta.shape[-1]).T)
    if len(columns) != len(PUBLISHED):
        raise ValueError(f"theta has {len(columns)} parameters, expected {len(PUBLISHED)}")
    count = columns.shape[1]
    result = np.empty((count, len(YEARS), 2))
    # A row outside the prior's support can blow up; it comes back as NaN, without warnings.
    with np.errstate(all="ignore"):
        start = np.log(columns[4:6])
        for first in range(0, count, _BLOCK):
            block = slice(first, first + _BLOCK)
            result[block] = _integrate(columns[:4, block], start[:, block])
    return result.reshape(*theta.shape[:-1], len(YEARS), 2)


def _integrate(rates: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Log populations, shape (N, 21, 2), for rates (4, N) and initial log populations (2, N).

    Only elementwise operations along N: a matrix product or a sum could round differently with
    the size of the batch.
    """
    result = np.full((start.shape[1], len(YEARS), 2), np.nan)
    result[:, 0] = start.T
    rows = np.arange(start.shape[1])
    state = start
    time = np.zeros(len(rows))
    year = np.ones(len(rows), dtype=np.int64)  # the next to be recorded
    last = len(YEARS) - 1
    for _ in range(_MAX_STEPS):
        series = _taylor(rates, state)
        step = _step(rates, series)
        while True:
            due = np.flatnonzero((year <= time + step) & (year <= last))
            if not len(due):
                break
            at = year[due]
            result[rows[due], at] = _evaluate(series[:, :, due], at - time[due]).T
            year[due] += 1
        state = _evaluate(series, step)
        time = time + step
        # Comparisons with NaN are false, which drops the rows that have no solution.
        going = np.flatnonzero((year <= last) & (step > 1e-12) & np.isfinite(state).all(axis=0))
        if not len(going):
            break
        if len(going) < len(rows):
            rows, time, year = rows[going], time[going], year[going]
            state, rates = state[:, going], rates[:, going]
    return result


def _taylor(rates: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Taylor coefficients of the log populations in time, shape (order + 1, 2, N)."""
    alpha, beta, gamma, delta = rates
    series = np.empty((_ORDER + 1, *state.shape))  # of p, q
    growth = np.empty_like(series)  # of p', q'
    population = np.empty_like(series)  # of u, v
    series[0] = state
    np.exp(state, out=population[0])
    product = np.empty_like(state)
    for n in range(_ORDER):
        np.multiply(population[n, 1], -beta, out=growth[n, 0])
        np.multiply(population[n, 0], delta, out=growth[n, 1])
        if n == 0:
            growth[0, 0] += alpha
            growth[0, 1] -= gamma
        np.multiply(growth[n], 1.0 / (n + 1), out=series[n + 1])
        if n == _ORDER - 1:
            break
        # u' = u p' and v' = v q'
        total = population[n + 1]
        np.multiply(population[0], growth[n], out=total)
        for k in range(1, n + 1):
            np.multiply(population[k], growth[n - k], out=product)
            total += product
        total *= 1.0 / (n + 1)
    return series


def _step(rates: np.ndarray, series: np.ndarray) -> np.ndarray:
    """Time step, shape (N,), whose last two Taylor terms are at most the tolerance."""
    alpha, _, _, delta = rates
    # In a trough e^p is far below the tolerance, and so are its terms in q, even when they still
    # grow with their order. They shrink where the step is a few e-folds of the fastest growth.
    step: np.ndarray = _FOLDS / np.maximum(alpha, delta * np.exp(series[0, 0]))
    for n in (_ORDER - 1, _ORDER):
        size = np.maximum(np.abs(series[n, 0]), np.abs(series[n, 1]))
        step = np.minimum(step, np.power(_TOLERANCE / size, 1.0 / n))
    step = np.minimum(step, float(len(YEARS)))
    return step


def _evaluate(series: np.ndarray, step: np.ndarray) -> np.ndarray:
    value: np.ndarray = series[-1].copy()
    for coefficient in series[-2::-1]:
        value *= step
        value += coefficient
    return value


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
