"""Two moons: two parameters whose posterior is a pair of thin crescents, known exactly.

theta ~ Uniform([-1, 1]^2). A point of a crescent of radius 0.1, ``r (cos a, sin a)`` with
a ~ Uniform(-pi/2, pi/2) and r ~ Normal(0.1, 0.01), is shifted by 0.25 and by the rotated
parameters, whose first coordinate enters by its absolute value:

    x = (r cos a + 0.25 - |theta_1 + theta_2| / sqrt(2),  r sin a + (theta_2 - theta_1) / sqrt(2))

so that every x comes from two places. Definition, observed data and true parameters are those of
the ``two_moons`` task of sbibm 1.1.0 (observation 1), which names Greenberg et al. (2019).
"""

from __future__ import annotations

import math

import numpy as np

from sbi_dist.priors import BoxUniform
from sbi_dist.problem import ObservationAxis, Problem

__all__ = [
    "OBSERVED",
    "TRUE_PARAMETERS",
    "log_likelihood",
    "posterior_log_prob",
    "posterior_sample",
    "problem",
    "simulator",
]

BOUND = 1.0
OFFSET = 0.25
RADIUS, RADIUS_SD = 0.1, 0.01

# Observation 1 of sbibm 1.1.0: tasks/two_moons/files/num_observation_1.
TRUE_PARAMETERS = np.array([-0.8176656, -0.5756806])
OBSERVED = np.array([-0.6396706, 0.16234657])


def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x of shape (N, 2) or (2,), for theta of the same shape."""
    return _crescent(theta.shape[:-1], rng) + _shift(theta)


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), shape (N,), for theta (N, 2) and one x (2,), or one x for each theta.

    x minus its shift is ``r (cos a, sin a)``, whose density in the plane is that of r, over the
    crescent's length pi r. A negative r (ten standard deviations away) is left out.
    """
    u, v = np.moveaxis(np.asarray(x, dtype=np.float64) - _shift(theta), -1, 0)
    u = u - OFFSET
    radius = np.hypot(u, v)
    with np.errstate(divide="ignore"):
        log_radius = np.log(radius)
    score = (radius - RADIUS) / RADIUS_SD
    log_density = (
        -0.5 * score**2 - math.log(RADIUS_SD * math.sqrt(2 * math.pi)) - math.log(math.pi)
    ) - log_radius
    return np.where(u > 0, log_density, -np.inf)


def posterior_log_prob(theta: np.ndarray, x: np.ndarray, nodes: int = 200) -> np.ndarray:
    """The exact log p(theta | x), shape (N,), for theta (N, 2) in the prior's box and one x (2,).

    On each side of the line theta_1 + theta_2 = 0 the map from the crescent to theta keeps areas.
    So the likelihood integrates over the box to the probability that a point of the crescent has
    a theta in the box, summed over both sides: a quadrature in a and r with ``nodes`` squared
    points, each axis in equal steps of probability.
    """
    from scipy import stats  # here, so that the simulator's processes need not load it

    middles = (np.arange(nodes) + 0.5) / nodes
    angle, radius = np.meshgrid(
        math.pi * (middles - 0.5), stats.norm.ppf(middles, RADIUS, RADIUS_SD), indexing="ij"
    )
    points = np.stack([radius * np.cos(angle) + OFFSET, radius * np.sin(angle)], axis=-1)
    inside = sum(_origin(points, x, side)[1].mean() for side in (-1.0, 1.0))
    return log_likelihood(theta, x) - math.log(inside)


def posterior_sample(count: int, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``count`` exact draws (count, 2) from p(theta | x), for one x (2,).

    A point of the crescent and a side of the line theta_1 + theta_2 = 0 have one theta; those in
    the box are kept.
    """
    kept: list[np.ndarray] = []
    missing = count
    while missing > 0:
        points = _crescent((4 * missing + 100,), rng)
        side = rng.choice((-1.0, 1.0), len(points))
        theta, inside = _origin(points, x, side)
        kept.append(theta[inside][:missing])
        missing -= len(kept[-1])
    return np.concatenate(kept)


def _crescent(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Points of the crescent, shifted by 0.25, shape (*shape, 2)."""
    # A row's numbers one after the other, so that they do not change with the number of rows; the
    # direction of two normal numbers is uniform.
    across, along, spread = np.moveaxis(rng.standard_normal((*shape, 3)), -1, 0)
    scale = (RADIUS + RADIUS_SD * spread) / np.hypot(across, along)
    return np.stack([np.abs(across) * scale + OFFSET, along * scale], axis=-1)


def _shift(theta: np.ndarray) -> np.ndarray:
    first, second = np.moveaxis(theta, -1, 0)
    return np.stack([-np.abs(first + second), second - first], axis=-1) / math.sqrt(2)


def _origin(
    points: np.ndarray, x: np.ndarray, side: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """The theta (..., 2) that puts ``points`` (..., 2) at x, on one side; and whether it may be."""
    across = points[..., 0] - x[0]  # |theta_1 + theta_2| / sqrt(2)
    along = x[1] - points[..., 1]
    theta = np.stack([side * across - along, side * across + along], axis=-1) / math.sqrt(2)
    return theta, (across >= 0) & (np.abs(theta) <= BOUND).all(-1)


problem = Problem(
    prior=BoxUniform([-BOUND] * 2, [BOUND] * 2),
    simulator=simulator,
    log_likelihood=log_likelihood,
    observed=OBSERVED,
    true_parameters=TRUE_PARAMETERS,
    axis=ObservationAxis(label="component", values=(1, 2), value_label="x"),
    title="Two moons",
    description=(
        "Two parameters, each known to lie between -1 and 1, move a thin crescent of points, of "
        "which one is observed. The sum of the parameters enters by its absolute value, so that "
        "the posterior is two crescents, on both sides of the line where the sum is 0."
    ),
    reference=(
        "Greenberg, Nonnenmacher and Macke (2019), Automatic posterior transformation for "
        "likelihood-free inference, ICML; Lueckmann et al. (2021), Benchmarking simulation-based "
        "inference, AISTATS, arXiv:2101.04653, task two_moons."
    ),
)
