"""A neuron's spikes in response to white noise: a Bernoulli generalized linear model.

In each of 100 time bins the neuron spikes with probability 1 / (1 + exp(-psi)). psi is an offset
plus the convolution of a white-noise stimulus with a filter of nine bins, and theta is the offset
and the filter. The prior is Gaussian and favours smooth filters. x is the sufficient statistic:
the number of spikes, and the spike-triggered sum of the stimulus at lags 0 to 8. Definition,
observed data and true parameters are those of the ``bernoulli_glm`` task of sbibm 1.1.0
(observation 1).
"""

from __future__ import annotations

import numpy as np
import torch
from torch.distributions import MultivariateNormal

from sbi_dist.problem import ObservationAxis, Problem

__all__ = ["DESIGN", "OBSERVED", "TRUE_PARAMETERS", "log_likelihood", "problem", "simulator"]

BINS = 100
LAGS = 9

# Observation 1 of sbibm 1.1.0: tasks/bernoulli_glm/files/num_observation_1.
TRUE_PARAMETERS = np.array(
    [
        1.215716, 2.1386335, 3.6156292, 3.3703978, 0.3342961,
        -1.5749966, -2.4357948, -2.1009881, -1.1669482, 0.3189116,
    ]
)  # fmt: skip
OBSERVED = np.array(
    [
        56.0, 3.32306, 14.356438, 11.104893, -4.167525,
        -18.507809, -21.917496, -9.553517, -0.357257, -5.497825,
    ]
)  # fmt: skip


def _design() -> np.ndarray:
    """What multiplies theta in each bin, shape (100, 10): 1, and the stimulus of lags 0 to 8.

    The stimulus is sbibm's, in single precision; numpy's RandomState never changes its numbers.
    """
    stimulus = np.random.RandomState(42).randn(BINS).astype(np.float32)
    design = np.zeros((BINS, 1 + LAGS))
    design[:, 0] = 1.0
    for lag in range(LAGS):
        design[lag:, 1 + lag] = stimulus[: BINS - lag]
    return design


def _prior() -> MultivariateNormal:
    """An offset of variance 2, and a filter h with F h ~ Normal(0, 1).

    F is the second difference, plus sqrt(i / 9) on its diagonal, i = 0 ... 8.
    """
    difference = np.eye(LAGS) - np.eye(LAGS, k=-1)
    smooth = difference @ difference + np.diag(np.sqrt(np.arange(LAGS) / LAGS))
    factor = np.zeros((1 + LAGS, 1 + LAGS))
    factor[0, 0] = np.sqrt(2.0)
    factor[1:, 1:] = np.tril(np.linalg.inv(smooth))  # which has zeros there but for rounding
    scale_tril = torch.tensor(factor, dtype=torch.float32)
    return MultivariateNormal(torch.zeros(1 + LAGS), scale_tril=scale_tril)


DESIGN = _design()


def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x of shape (N, 10) or (10,), for theta of the same shape."""
    drive = theta @ DESIGN.T
    # A bin spikes where a logistic number, 100 for each row, lies below its drive. A matrix
    # product may round differently with the number of rows: of the drive that is 1e-16, which
    # changes no spike; of x it is nothing, as sums of 100 of the stimulus' single-precision
    # numbers are exact in double precision.
    spikes = (rng.logistic(size=drive.shape) < drive).astype(np.float64)
    x: np.ndarray = spikes @ DESIGN
    return x


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta) up to a term free of theta, for theta (N, 10) and x (10,) or (N, 10).

    The term is the logarithm of the number of spike trains that have this x.
    """
    drive = theta @ DESIGN.T
    total: np.ndarray = (theta * np.asarray(x, dtype=np.float64)).sum(-1)
    return total - np.logaddexp(0.0, drive).sum(-1)


problem = Problem(
    prior=_prior(),
    simulator=simulator,
    log_likelihood=log_likelihood,
    parameter_names=("offset", *(f"filter_{lag}" for lag in range(LAGS))),
    observed=OBSERVED,
    true_parameters=TRUE_PARAMETERS,
    axis=ObservationAxis(
        label="statistic",
        values=tuple(range(1, 2 + LAGS)),
        value_label="spikes; spike-triggered sum of the stimulus",
    ),
    title="Bernoulli generalized linear model",
    description=(
        "A neuron is driven by white noise for 100 time bins, in each of which it spikes or not. "
        "The logit of its probability to spike is an offset plus the convolution of the noise "
        "with a filter of nine bins; these ten numbers are inferred, under a prior of smooth "
        "filters, from the number of spikes and the sums of the noise at lags 0 to 8 over the "
        "spikes, which hold all that the spikes tell."
    ),
    reference=(
        "Gonçalves et al. (2020), Training deep neural density estimators to identify mechanistic "
        "models of neural dynamics, eLife 9, e56261; Lueckmann et al. (2021), Benchmarking "
        "simulation-based inference, AISTATS, arXiv:2101.04653, task bernoulli_glm."
    ),
)
