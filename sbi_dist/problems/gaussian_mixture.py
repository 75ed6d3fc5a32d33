"""A mixture of a wide and a narrow Gaussian around the same mean.

theta ~ Uniform([-10, 10]^2), and x is drawn around it with a standard deviation of 1 or of 0.1 in
both components, each with probability 1/2. So is the posterior around x, cut at the prior's edge.
Definition, observed data and true parameters are those of the ``gaussian_mixture`` task of sbibm
1.1.0 (observation 1), which names Sisson et al. (2007).
"""

from __future__ import annotations

import math

import numpy as np

from sbi_dist.priors import BoxUniform
from sbi_dist.problem import ObservationAxis, Problem

__all__ = ["BOUND", "OBSERVED", "TRUE_PARAMETERS", "log_likelihood", "problem", "simulator"]

BOUND = 10.0
WIDE, NARROW = 1.0, 0.1

# Observation 1 of sbibm 1.1.0: tasks/gaussian_mixture/files/num_observation_1.
TRUE_PARAMETERS = np.array([-9.527071, -1.4817104])
OBSERVED = np.array([-9.472713, -1.4950509])


def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x of shape (N, 2) or (2,), for theta of the same shape."""
    # The sign of a third normal number chooses the component, so that a row's numbers lie one
    # after the other, whatever the number of rows.
    noise = rng.standard_normal((*theta.shape[:-1], 3))
    x: np.ndarray = theta + np.where(noise[..., 2:] > 0, WIDE, NARROW) * noise[..., :2]
    return x


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), shape (N,), for theta (N, 2) and one x (2,), or one x for each theta."""
    square = ((np.asarray(x, dtype=np.float64) - theta) ** 2).sum(-1)
    wide, narrow = (-0.5 * square / sd**2 - 2 * math.log(sd) for sd in (WIDE, NARROW))
    return np.logaddexp(wide, narrow) - math.log(4 * math.pi)


problem = Problem(
    prior=BoxUniform([-BOUND] * 2, [BOUND] * 2),
    simulator=simulator,
    log_likelihood=log_likelihood,
    observed=OBSERVED,
    true_parameters=TRUE_PARAMETERS,
    axis=ObservationAxis(label="component", values=(1, 2), value_label="x"),
    title="Gaussian mixture",
    description=(
        "The two coordinates of a point, each known to lie between -10 and 10, are measured once. "
        "Half of the measurements have Gaussian noise of standard deviation 1, half of 0.1, and "
        "which is not known: the posterior is a sharp peak on a broad one."
    ),
    reference=(
        "Sisson, Fan and Tanaka (2007), Sequential Monte Carlo without likelihoods, PNAS 104, "
        "1760; Lueckmann et al. (2021), Benchmarking simulation-based inference, AISTATS, "
        "arXiv:2101.04653, task gaussian_mixture."
    ),
)
