"""SLCP: a simple likelihood with a complex posterior, in five parameters and eight numbers.

theta ~ Uniform([-3, 3]^5), and x is four draws from a Gaussian in the plane, one after the other.
theta_1 and theta_2 are its mean, theta_3^2 and theta_4^2 its standard deviations, and
tanh(theta_5) its correlation, so that the signs of theta_3 and theta_4 cannot be known: the
posterior has four modes. Definition, observed data and true parameters are those of the ``slcp``
task of sbibm 1.1.0 (observation 1), which adds 1e-6 to both variances.
"""

from __future__ import annotations

import math

import numpy as np

from sbi_dist.priors import BoxUniform
from sbi_dist.problem import ObservationAxis, Problem

__all__ = [
    "DRAWS",
    "OBSERVED",
    "TRUE_PARAMETERS",
    "log_likelihood",
    "points",
    "problem",
    "simulator",
]

BOUND = 3.0
DRAWS = 4
EXTRA_VARIANCE = 1e-6

# Observation 1 of sbibm 1.1.0: tasks/slcp/files/num_observation_1.
TRUE_PARAMETERS = np.array([-2.8581212, -0.44451332, 2.9473476, 1.2396116, 2.9712725])
OBSERVED = np.array(
    [
        2.3718784, 0.49947417,
        9.931435, 1.7136912,
        -10.436423, -1.9067793,
        -1.2343777, -0.09735,
    ]
)  # fmt: skip


def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x of shape (N, 8) or (8,), for theta of shape (N, 5) or (5,)."""
    return points(theta, rng.standard_normal((*theta.shape[:-1], DRAWS, 2)))


def points(theta: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """x of shape (..., 8), made from standard normal ``noise`` (..., 4, 2)."""
    first, slope, second = (each[..., None] for each in _cholesky(theta))
    draws = np.stack(
        [
            theta[..., 0, None] + first * noise[..., 0],
            theta[..., 1, None] + slope * noise[..., 0] + second * noise[..., 1],
        ],
        axis=-1,
    )
    return draws.reshape(*theta.shape[:-1], 2 * DRAWS)


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), shape (N,), for theta (N, 5) and one x (8,), or one x for each theta."""
    draws = np.asarray(x, dtype=np.float64).reshape(*np.shape(x)[:-1], DRAWS, 2)
    first, slope, second = (each[..., None] for each in _cholesky(np.asarray(theta, np.float64)))
    one = (draws[..., 0] - theta[..., 0, None]) / first
    two = (draws[..., 1] - theta[..., 1, None] - slope * one) / second
    log_density = -0.5 * (one**2 + two**2) - np.log(2 * math.pi * first * second)
    total: np.ndarray = log_density.sum(-1)
    return total


def _cholesky(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lower Cholesky factor of the covariance: [0, 0], [1, 0] and [1, 1], each of shape (N,).

    The Schur complement, ``v_2 - covariance^2 / v_1``, is written without a difference of numbers
    that may be nearly equal: 1 - tanh^2 is 1 / cosh^2.
    """
    variance_1, variance_2 = theta[..., 2] ** 4, theta[..., 3] ** 4
    wide_1 = variance_1 + EXTRA_VARIANCE
    first = np.sqrt(wide_1)
    covariance = np.tanh(theta[..., 4]) * theta[..., 2] ** 2 * theta[..., 3] ** 2
    free = variance_1 / np.cosh(theta[..., 4]) ** 2 + EXTRA_VARIANCE
    return first, covariance / first, np.sqrt(variance_2 * free / wide_1 + EXTRA_VARIANCE)


problem = Problem(
    prior=BoxUniform([-BOUND] * 5, [BOUND] * 5),
    simulator=simulator,
    log_likelihood=log_likelihood,
    observed=OBSERVED,
    true_parameters=TRUE_PARAMETERS,
    axis=ObservationAxis(
        label="number", values=tuple(range(1, 2 * DRAWS + 1)), value_label="coordinate"
    ),
    title="Simple likelihood, complex posterior",
    description=(
        "Four points are drawn from a Gaussian in the plane, whose mean, standard deviations and "
        "correlation are functions of five parameters, each known to lie between -3 and 3. The "
        "standard deviations are squares of parameters, so that the posterior has four modes, "
        "with sharp edges where the prior ends."
    ),
    reference=(
        "Papamakarios, Sterratt and Murray (2019), Sequential neural likelihood, AISTATS; "
        "Lueckmann et al. (2021), Benchmarking simulation-based inference, AISTATS, "
        "arXiv:2101.04653, task slcp."
    ),
)
