"""The linear Gaussian task of the SBI benchmark with a uniform prior: posteriors cut at edges.

theta ~ Uniform(-1, 1) and x ~ Normal(theta, 0.1), 0.1 being the variance, in each of ten
independent components. The posterior of each is Normal(x, 0.1) truncated to [-1, 1]. Definition,
observed data and true parameters are those of the ``gaussian_linear_uniform`` task of sbibm 1.1.0
(observation 1).
"""

from __future__ import annotations

import numpy as np

from sbi_dist.priors import BoxUniform
from sbi_dist.problem import ObservationAxis, Problem
from sbi_dist.problems.gaussian_linear import SIZE, VARIANCE, log_likelihood, simulator

__all__ = [
    "BOUND",
    "OBSERVED",
    "TRUE_PARAMETERS",
    "VARIANCE",
    "log_likelihood",
    "problem",
    "simulator",
]

BOUND = 1.0

# Observation 1 of sbibm 1.1.0: tasks/gaussian_linear_uniform/files/num_observation_1.
TRUE_PARAMETERS = np.array(
    [
        -0.95270705, -0.14817107, 0.9824493, 0.41320384, 0.99042416,
        -0.74023414, 0.7862458, 0.043799043, -0.6261761, -0.76511395,
    ]
)  # fmt: skip
OBSERVED = np.array(
    [
        -0.53739023, -0.23864163, 0.81923723, 0.6407443, 0.41616207,
        -0.09746933, 1.1292295, -0.05842293, -0.97055256, -0.9423423,
    ]
)  # fmt: skip


problem = Problem(
    prior=BoxUniform([-BOUND] * SIZE, [BOUND] * SIZE),
    simulator=simulator,
    log_likelihood=log_likelihood,
    observed=OBSERVED,
    true_parameters=TRUE_PARAMETERS,
    axis=ObservationAxis(label="component", values=tuple(range(1, SIZE + 1)), value_label="x"),
    title="Gaussian linear, uniform prior",
    description=(
        "Ten means, each known to lie between -1 and 1, are measured once with Gaussian noise of "
        "variance 0.1. The posterior of each is a normal distribution around its measurement, "
        "cut off at the prior's bounds."
    ),
    reference=(
        "Lueckmann et al. (2021), Benchmarking simulation-based inference, AISTATS, "
        "arXiv:2101.04653, task gaussian_linear_uniform."
    ),
)
