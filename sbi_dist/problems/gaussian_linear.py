"""The linear Gaussian task of the SBI benchmark: ten means under a Gaussian prior.

theta ~ Normal(0, 0.1) and x ~ Normal(theta, 0.1) in each of ten independent components, both 0.1
being variances, so that the posterior is Normal(x / 2, 0.05). Definition, observed data and true
parameters are those of the ``gaussian_linear`` task of sbibm 1.1.0 (observation 1).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.distributions import Normal

from sbi_dist.problem import ObservationAxis, Problem

__all__ = ["OBSERVED", "TRUE_PARAMETERS", "VARIANCE", "log_likelihood", "problem", "simulator"]

SIZE = 10
VARIANCE = 0.1  # of the prior, and of the noise

# Observation 1 of sbibm 1.1.0: tasks/gaussian_linear/files/num_observation_1.
TRUE_PARAMETERS = np.array(
    [
        0.27184236, 0.6762953, 0.17189318, -0.04218617, -0.82151634,
        0.024290232, -0.24255924, -0.16438946, -0.13595216, 0.26958188,
    ]
)  # fmt: skip
OBSERVED = np.array(
    [
        1.0471346, 0.5566712, -0.23618454, 0.027879834, -1.0051446,
        -0.007930746, 0.06117077, -0.29286885, -0.38539964, 0.2449614,
    ]
)  # fmt: skip


def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x of shape (N, 10) or (10,), for theta of the same shape."""
    return theta + math.sqrt(VARIANCE) * rng.standard_normal(theta.shape)


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), shape (N,), for theta (N, 10) and one x (10,), or one x for each theta."""
    square = (np.asarray(x, dtype=np.float64) - theta) ** 2 / VARIANCE
    total: np.ndarray = (-0.5 * (square + math.log(2 * math.pi * VARIANCE))).sum(-1)
    return total


problem = Problem(
    prior=Normal(torch.zeros(SIZE), torch.full((SIZE,), math.sqrt(VARIANCE))),
    simulator=simulator,
    log_likelihood=log_likelihood,
    observed=OBSERVED,
    true_parameters=TRUE_PARAMETERS,
    axis=ObservationAxis(label="component", values=tuple(range(1, SIZE + 1)), value_label="x"),
    title="Gaussian linear",
    description=(
        "Ten means, each known beforehand to a variance of 0.1, are measured once with Gaussian "
        "noise of the same variance. The posterior of each is a normal distribution around half "
        "its measurement, of half that variance."
    ),
    reference=(
        "Lueckmann et al. (2021), Benchmarking simulation-based inference, AISTATS, "
        "arXiv:2101.04653, task gaussian_linear."
    ),
)
