"""The linear Gaussian problem of the sbi toolbox's tutorials, with its exact posterior.

theta ~ Uniform([-2, 2]^3) and x = theta + 1 + 0.1 * noise, with standard normal noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sbi_dist.priors import BoxUniform
from sbi_dist.problem import ObservationAxis, Problem

__all__ = ["NOISE_SD", "OBSERVED", "SHIFT", "TRUE_PARAMETERS", "analytic_posterior", "problem"]

LOW, HIGH = -2.0, 2.0
SHIFT = 1.0
NOISE_SD = 0.1

TRUE_PARAMETERS = np.array([0.5, -1.2, 0.8])

# simulator(TRUE_PARAMETERS, numpy.random.default_rng(1900)) to four decimals; written out, so that
# it stays the same should numpy change its generators.
OBSERVED = np.array([1.3549, -0.1603, 1.7982])


def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x = theta + 1 + 0.1 * noise, for theta and x of shape (N, 3) or (3,)."""
    return theta + SHIFT + NOISE_SD * rng.standard_normal(theta.shape)


def analytic_posterior(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
    """The exact posterior given x of shape (3,) or (N, 3).

    The components are independent a posteriori, each Normal(x - 1, 0.1) truncated to [-2, 2].

    Returns:
        mean and standard deviation, each of x's shape, and the frozen ``scipy.stats.truncnorm``
        of that shape (``pdf``, ``cdf``, ``ppf``, ``rvs``).
    """
    from scipy import stats  # here, so that the simulator's processes need not load it

    center = np.asarray(x, dtype=np.float64) - SHIFT
    marginals = stats.truncnorm(
        (LOW - center) / NOISE_SD, (HIGH - center) / NOISE_SD, loc=center, scale=NOISE_SD
    )
    return np.asarray(marginals.mean()), np.asarray(marginals.std()), marginals


problem = Problem(
    prior=BoxUniform([LOW] * 3, [HIGH] * 3),
    simulator=simulator,
    observed=OBSERVED,
    true_parameters=TRUE_PARAMETERS,
    axis=ObservationAxis(label="component", values=(1, 2, 3), value_label="x"),
    title="Linear Gaussian",
    description=(
        "Three parameters, each known to lie between -2 and 2, are measured once: the measurement "
        "is the parameter plus 1, with Gaussian noise of standard deviation 0.1. The exact "
        "posterior is a normal distribution around the measurement minus 1, cut off at the "
        "prior's bounds, so every result can be checked against it."
    ),
    reference=(
        "Tejero-Cantero et al. (2020), sbi: a toolkit for simulation-based inference, Journal of "
        "Open Source Software 5(52), 2505; tutorial on amortized inference."
    ),
)
