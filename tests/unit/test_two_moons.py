"""The two moons problem: its simulator, its likelihood and its exact posterior."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sbi_dist.problem import load_problem
from sbi_dist.problems import two_moons

ORIGIN = np.zeros(2)


def grid(low: float, high: float, cells: int) -> tuple[np.ndarray, float]:
    """Middles of a square grid's cells (cells^2, 2), and a cell's area."""
    step = (high - low) / cells
    middles = low + step * (np.arange(cells) + 0.5)
    return np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 2), step**2


def test_form_is_a_batch_simulator() -> None:
    problem = load_problem("sbi_dist.problems.two_moons:problem")
    form = problem.form()
    assert (form.batched, form.library, form.takes_rng) == (True, "numpy", True)
    assert (form.x_shape, form.note) == ((2,), "")
    rng = np.random.default_rng(0)
    assert two_moons.simulator(two_moons.TRUE_PARAMETERS, rng).shape == (2,)


def test_crescent_in_polar_coordinates() -> None:
    count = 20_000
    x = two_moons.simulator(np.zeros((count, 2)), np.random.default_rng(1))
    u, v = x[:, 0] - 0.25, x[:, 1]
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    # Kolmogorov-Smirnov at a level of 1e-4.
    assert stats.kstest(radius, stats.norm(0.1, 0.01).cdf).pvalue > 1e-4
    assert stats.kstest(angle, stats.uniform(-np.pi / 2, np.pi).cdf).pvalue > 1e-4
    assert abs(stats.pearsonr(radius, angle).statistic) < 4 / np.sqrt(count)


def test_parameters_shift_the_crescent() -> None:
    # The same noise for all: differences are those of the shifts. Worked out by hand, in units of
    # sqrt(2): (0.6, 0.2) gives (-0.8, -0.4), and so does (-0.2, -0.6); their mirror images along
    # the second axis, (0.2, 0.6) and (-0.6, -0.2), give (-0.8, 0.4).
    places = np.array([[0.6, 0.2], [-0.2, -0.6], [0.2, 0.6], [-0.6, -0.2]])
    start = two_moons.simulator(ORIGIN, np.random.default_rng(2))
    shifts = [two_moons.simulator(each, np.random.default_rng(2)) - start for each in places]
    expected = np.array([[-0.8, -0.4], [-0.8, -0.4], [-0.8, 0.4], [-0.8, 0.4]]) / np.sqrt(2)
    np.testing.assert_allclose(shifts, expected, atol=1e-12)


def test_likelihood_is_a_density_of_x() -> None:
    theta = np.array([0.3, -0.4])
    # All of the crescent of this theta lies in [-0.75, 0.75]^2; midpoints in cells of 0.0015, where
    # the radius has a standard deviation of 0.01.
    points, area = grid(-0.75, 0.75, 1000)
    density = np.exp(two_moons.log_likelihood(np.tile(theta, (len(points), 1)), points))
    # The density jumps where the half ring ends: along 2 * 0.1 of edge, half a cell.
    assert density.sum() * area == pytest.approx(1.0, abs=5e-3)
    draws = two_moons.simulator(np.tile(theta, (40_000, 1)), np.random.default_rng(3))
    mean, sd = draws.mean(0), draws.std(0)
    # 5 standard errors (sd of a coordinate below 0.08, of 40,000) and the jump's error.
    np.testing.assert_allclose(density @ points * area, mean, atol=5 * 0.08 / 200 + 1e-3)
    spread = np.sqrt(density @ (points - mean) ** 2 * area)
    np.testing.assert_allclose(spread, sd, rtol=0.03)


def test_posterior_density_integrates_to_one_over_the_prior() -> None:
    # Observed data, whose crescents lie in the box, and an x whose crescents leave it in part.
    for x in (two_moons.OBSERVED, np.array([-1.05, 0.1])):
        points, area = grid(-1.0, 1.0, 1600)
        density = np.exp(two_moons.posterior_log_prob(points, x))
        assert density.sum() * area == pytest.approx(1.0, abs=1e-2)


def test_posterior_draws_have_the_posterior_density() -> None:
    x = np.array([-1.05, 0.1])
    draws = two_moons.posterior_sample(20_000, x, np.random.default_rng(4))
    assert draws.shape == (20_000, 2)
    assert np.abs(draws).max() <= 1.0
    log_density = two_moons.posterior_log_prob(draws, x)
    assert np.isfinite(log_density).all()
    # The entropy of the draws against that of the density by quadrature: 5 standard errors, and
    # 0.02 for the quadrature (its integral of the density is off by less than 0.01, see above).
    points, area = grid(-1.0, 1.0, 1600)
    on_grid = two_moons.posterior_log_prob(points, x)
    on_grid = on_grid[np.isfinite(on_grid)]
    entropy = -(np.exp(on_grid) * on_grid).sum() * area
    error = log_density.std() / np.sqrt(len(draws))
    assert -log_density.mean() == pytest.approx(entropy, abs=5 * error + 0.02)


def test_both_moons_are_drawn_alike() -> None:
    draws = two_moons.posterior_sample(10_000, two_moons.OBSERVED, np.random.default_rng(5))
    side = (draws.sum(1) > 0).mean()
    assert abs(side - 0.5) < 5 * 0.5 / np.sqrt(len(draws))


def test_true_parameters_can_have_made_the_observed_data() -> None:
    theta = two_moons.TRUE_PARAMETERS[None]
    assert np.isfinite(two_moons.log_likelihood(theta, two_moons.OBSERVED))
    # A hundredth of a unit is one standard deviation of the radius: five are ruled out here.
    moved = theta + np.array([[0.0, 0.2]])
    far, near = (two_moons.log_likelihood(each, two_moons.OBSERVED)[0] for each in (moved, theta))
    assert near - far > 12.5
