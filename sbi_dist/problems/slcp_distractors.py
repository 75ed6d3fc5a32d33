"""SLCP with 92 distractors: the data of ``slcp`` among numbers that say nothing of theta.

The eight numbers of ``slcp`` and 92 of noise, in a fixed random order. The noise is one draw of a
mixture of 20 multivariate t distributions of two degrees of freedom, so heavy in its tails that it
has no variance. The posterior is that of ``slcp``. Definition, observed data and true parameters
are those of the ``slcp_distractors`` task of sbibm 1.1.0 (observation 1).
"""

from __future__ import annotations

import math

import numpy as np

from sbi_dist.problem import ObservationAxis, Problem
from sbi_dist.problems import slcp
from sbi_dist.problems.slcp import TRUE_PARAMETERS

__all__ = [
    "OBSERVED",
    "SIGNAL",
    "TRUE_PARAMETERS",
    "distractors",
    "log_likelihood",
    "problem",
    "simulator",
]

SIZE = 92
COMPONENTS = 20
_BLOCK = 512  # rows together, so that they stay in the cache

# Observation 1 of sbibm 1.1.0: tasks/slcp/files/num_observation_1/observation_distractors.csv.
OBSERVED = np.array(
    [
        -60.45943, 122.823166, -67.01942, -12.581524, -22.893969,
        32.517273, 67.27135, -115.6545, 385.10355, 35.331844,
        -78.32788, -20.674372, -81.68816, 74.251755, -90.91423,
        -61.497875, -1.2343777, 29.395075, -42.870472, 19.187525,
        3.1666663, -1.9067793, 2.3718784, 9.931435, -27.483328,
        -44.683464, -75.65134, -88.41149, 78.22429, -19.491358,
        -87.48924, 186.3353, -2.0567365, 0.49947417, 9.588209,
        -62.24843, -37.90078, -111.08592, 23.009779, -162.13936,
        19.562742, 80.61907, -10.436423, 17.018816, -112.77521,
        80.616554, -27.125841, 2.8041465, -79.734665, 115.96121,
        2.7012832, -67.9851, -47.83357, 54.03682, 14.431202,
        -112.27578, -12.678788, 69.45191, -62.345306, -18.428486,
        83.55713, 167.05466, 36.280495, -10.09448, -112.102516,
        -6.868362, 12.451546, 1.7136912, -48.29132, -30.129011,
        177.97679, 118.24041, -33.984577, -21.839827, 95.868256,
        -22.492027, -151.0377, 24.236076, 46.813725, 181.59402,
        -110.25067, 36.143417, -113.94097, 48.485554, -53.97667,
        -2.9170897, 58.22745, 153.59654, -121.075356, 128.1089,
        -0.09735, 61.27503, 62.488945, -8.37021, -10.590089,
        49.07796, -35.693996, 146.29234, -45.086143, 5.237772,
    ]
)  # fmt: skip


def _mixture() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Locations (20, 92) and scale matrices (20, 92, 92) of the noise; the order of x (100,).

    Made as sbibm made its files, from numpy's RandomState, which never changes its numbers; the
    last digits may differ. A scale matrix is lower triangular.
    """
    random = np.random.RandomState(42)
    locations = 15.0 * random.normal(size=(COMPONENTS, SIZE))
    scales = np.empty((COMPONENTS, SIZE, SIZE))
    for scale in scales:
        scale[:] = np.tril(random.normal(size=(SIZE, SIZE)))
        scale += np.diag(np.exp(random.normal(size=SIZE)))
    return locations, 3.0 * scales, random.permutation(8 + SIZE)


LOCATIONS, SCALES, ORDER = _mixture()
# Where the eight numbers of slcp are in x.
SIGNAL = np.argsort(ORDER)[:8]
# The columns of the scale matrices, below and on their diagonals.
_COLUMNS = [np.ascontiguousarray(SCALES[:, column:, column]) for column in range(SIZE)]


def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x of shape (N, 100) or (100,), for theta of shape (N, 5) or (5,)."""
    # A row's numbers one after the other, so that they do not change with the number of rows.
    noise = rng.standard_normal((*theta.shape[:-1], 8 + SIZE + 2))
    points = slcp.points(theta, noise[..., :8].reshape(*theta.shape[:-1], slcp.DRAWS, 2))
    return np.concatenate([points, distractors(noise[..., 8:])], axis=-1)[..., ORDER]


def distractors(noise: np.ndarray) -> np.ndarray:
    """Draws (..., 92) of the mixture, made from standard normal ``noise`` (..., 94).

    In polar coordinates of its last two numbers the angle, which is uniform, chooses the component,
    and the squared radius is the chi-squared of two degrees of freedom that a t distribution is
    divided by.
    """
    rows = noise.reshape(-1, SIZE + 2)
    turn = np.arctan2(rows[:, -1], rows[:, -2]) / (2 * math.pi) + 0.5
    component = np.minimum((COMPONENTS * turn).astype(np.int64), COMPONENTS - 1)
    stretched = rows[:, :SIZE] / np.sqrt(0.5 * (rows[:, -2:] ** 2).sum(-1, keepdims=True))
    draws = LOCATIONS[component]
    for start in range(0, len(rows), _BLOCK):
        block = slice(start, start + _BLOCK)
        # Column by column: a matrix product could round differently with the number of rows.
        for column, scale in enumerate(_COLUMNS):
            draws[block, column:] += scale[component[block]] * stretched[block, column, None]
    return draws.reshape(*noise.shape[:-1], SIZE)


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta) up to a term free of theta, for theta (N, 5) and x (100,) or (N, 100).

    The term is the log density of the distractors. Their scale matrices' condition numbers, up to
    1e19, do not let it be computed from an x in single precision.
    """
    return slcp.log_likelihood(theta, np.asarray(x)[..., SIGNAL])


problem = Problem(
    prior=slcp.problem.prior,
    simulator=simulator,
    log_likelihood=log_likelihood,
    observed=OBSERVED,
    true_parameters=TRUE_PARAMETERS,
    axis=ObservationAxis(
        label="number", values=tuple(range(1, 8 + SIZE + 1)), value_label="coordinate or distractor"
    ),
    title="Simple likelihood, complex posterior, with distractors",
    description=(
        "Four points are drawn from a Gaussian in the plane, whose mean, standard deviations and "
        "correlation are functions of five parameters. Their eight coordinates are hidden among 92 "
        "numbers of heavy-tailed noise that do not depend on the parameters. The posterior is that "
        "of the problem slcp, with four modes."
    ),
    reference=(
        "Greenberg, Nonnenmacher and Macke (2019), Automatic posterior transformation for "
        "likelihood-free inference, ICML; Lueckmann et al. (2021), Benchmarking simulation-based "
        "inference, AISTATS, arXiv:2101.04653, task slcp_distractors."
    ),
)
