"""The Lotka-Volterra equations, integrated for a batch of parameters.

Prey u and predators v follow du/dt = (alpha - beta v) u and dv/dt = (-gamma + delta u) v. Without
growth of the prey, alpha = 0, these are the equations of an epidemic: u is the share of people who
can be infected, v the share of those who are, beta = delta the contact rate, gamma the recovery
rate.
"""

from __future__ import annotations

import numpy as np

__all__ = ["BLOCK", "log_populations"]

# The integrator's accuracy and cost; measured in tests/unit/test_problems.py and
# tests/unit/test_reference_simulators.py.
_ORDER = 12  # of the Taylor polynomials
_TOLERANCE = 1e-8  # size of their last two terms, in the log populations
_FOLDS = 6.0  # most e-folds that a population can grow in one step
_MAX_STEPS = 20_000  # prior draws need 20 to a few hundred
BLOCK = 4096  # rows integrated together, so that their polynomials stay in the cache


def log_populations(rates: np.ndarray, start: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Natural logarithms of prey and predators at each time, float64 of shape (N, T, 2).

    Solves p' = alpha - beta e^q, q' = -gamma + delta e^p for p = log u, q = log v by Taylor
    polynomials whose step every row chooses for itself (Jorba and Zou 2005, Experimental
    Mathematics 14, 99). Logarithms, because a crash leaves e^-100 and less, from which the
    population does recover.

    Args:
        rates: alpha, beta, gamma and delta, shape (N, 4).
        start: u and v at time 0, shape (N, 2).
        times: ascending, shape (T,), the first 0.

    Returns:
        NaN from the time on at which there is no solution: rates or start are not finite, start is
        not positive, or (with negative rates) a population has blown up.
    """
    count = len(rates)
    rates = np.ascontiguousarray(np.asarray(rates, dtype=np.float64).T)
    times = np.asarray(times, dtype=np.float64)
    result = np.empty((count, len(times), 2))
    with np.errstate(all="ignore"):  # rows without a solution come back as NaN, without warnings
        state = np.log(np.ascontiguousarray(np.asarray(start, dtype=np.float64).T))
        for first in range(0, count, BLOCK):
            block = slice(first, first + BLOCK)
            result[block] = _integrate(rates[:, block], state[:, block], times)
    return result


def _integrate(rates: np.ndarray, start: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Log populations, shape (N, T, 2), for rates (4, N) and initial log populations (2, N).

    Only elementwise operations along N: a matrix product or a sum could round differently with
    the size of the batch.
    """
    result = np.full((start.shape[1], len(times), 2), np.nan)
    result[:, 0] = start.T
    last = len(times) - 1
    ahead = np.append(times, np.inf)
    longest = times[-1] + 1.0
    rows = np.arange(start.shape[1])
    state = start
    time = np.zeros(len(rows))
    record = np.ones(len(rows), dtype=np.int64)  # the next of times to be recorded
    for _ in range(_MAX_STEPS):
        series = _taylor(rates, state)
        step = np.minimum(_step(rates, series), longest)
        while True:
            due = np.flatnonzero(ahead[record] <= time + step)
            if not len(due):
                break
            at = record[due]
            result[rows[due], at] = _evaluate(series[:, :, due], ahead[at] - time[due]).T
            record[due] += 1
        state = _evaluate(series, step)
        time = time + step
        # Comparisons with NaN are false, which drops the rows that have no solution.
        going = np.flatnonzero((record <= last) & (step > 1e-12) & np.isfinite(state).all(axis=0))
        if not len(going):
            break
        if len(going) < len(rows):
            rows, time, record = rows[going], time[going], record[going]
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
    return step


def _evaluate(series: np.ndarray, step: np.ndarray) -> np.ndarray:
    value: np.ndarray = series[-1].copy()
    for coefficient in series[-2::-1]:
        value *= step
        value += coefficient
    return value
