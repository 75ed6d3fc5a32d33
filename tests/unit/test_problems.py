"""The shipped problems: their numbers, their simulators and, where known, their posteriors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import solve_ivp

from sbi_dist.priors import sample_prior
from sbi_dist.problem import load_problem
from sbi_dist.problems import gaussian, lynx_hare, predator_prey

PUBLISHED_MEAN, PUBLISHED_SD = np.array(list(lynx_hare.PUBLISHED.values())).T


def prior_draws(count: int, seed: int = 0) -> np.ndarray:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sample_prior(lynx_hare.problem.prior, count).astype(np.float64)


def near_posterior(count: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((count, 8))
    return PUBLISHED_MEAN + PUBLISHED_SD * np.clip(2.0 * noise, -5.0, 5.0)


def reference_solution(theta: np.ndarray) -> np.ndarray:
    """Log populations of one parameter vector by scipy's LSODA, shape (21, 2)."""
    alpha, beta, gamma, delta, u0, v0 = theta[:6]

    def slope(_: float, state: np.ndarray) -> tuple[float, float]:
        # LSODA tries steps beyond the solution, where the exponential overflows.
        p, q = np.minimum(state, 700.0)
        return alpha - beta * np.exp(q), -gamma + delta * np.exp(p)

    solution = solve_ivp(
        slope, (0, 20), np.log([u0, v0]), "LSODA", np.arange(21.0), rtol=1e-10, atol=1e-10
    )
    assert solution.success
    return solution.y.T


def energy(theta: np.ndarray, log_populations: np.ndarray) -> np.ndarray:
    """The conserved quantity of the Lotka-Volterra equations in each year, shape (N, 21)."""
    alpha, beta, gamma, delta = theta.T[:4, :, None]
    p, q = np.moveaxis(log_populations, -1, 0)
    return delta * np.exp(p) - gamma * p + beta * np.exp(q) - alpha * q


# ---- both -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "x_shape"), [(gaussian, (3,)), (lynx_hare, (21, 2))], ids=["gaussian", "lynx_hare"]
)
def test_form_is_a_batch_simulator(module, x_shape) -> None:
    problem = load_problem(f"{module.__name__}:problem")
    assert problem is module.problem
    form = problem.form()  # also compares x's shape with that of observed
    assert (form.batched, form.library, form.takes_rng) == (True, "numpy", True)
    assert form.x_shape == x_shape
    assert form.note == ""  # it would say that rows depend on each other
    assert all((problem.title, problem.description, problem.reference))
    assert len(problem.axis.values) == x_shape[0]


# ---- Gaussian ---------------------------------------------------------------------------------


def test_gaussian_observed_is_the_documented_draw() -> None:
    draw = gaussian.simulator(gaussian.TRUE_PARAMETERS, np.random.default_rng(1900))
    np.testing.assert_allclose(gaussian.problem.observed, draw, atol=6e-5)
    np.testing.assert_allclose(gaussian.problem.true_parameters, gaussian.TRUE_PARAMETERS)


def test_gaussian_noise() -> None:
    count = 4000
    theta = np.linspace(-2.0, 2.0, 3 * count).reshape(count, 3)
    noise = gaussian.simulator(theta, np.random.default_rng(0)) - theta - 1.0
    # 5 standard errors of a mean and of a standard deviation.
    assert np.abs(noise.mean(0)).max() < 5 * 0.1 / np.sqrt(count)
    assert np.abs(noise.std(0) / 0.1 - 1.0).max() < 5 / np.sqrt(2 * count)


def test_gaussian_posterior_against_quadrature() -> None:
    x = np.array([1.2, 2.97, -1.4])  # inside the prior's box, near its edge, outside it
    mean, sd, marginals = gaussian.analytic_posterior(x)
    grid = np.linspace(-2.0, 2.0, 40_001)
    for j in range(3):
        weight = stats.norm.pdf(x[j], loc=grid + 1.0, scale=0.1)
        weight /= weight.sum()
        expected = weight @ grid
        assert mean[j] == pytest.approx(expected, abs=1e-4)
        assert sd[j] == pytest.approx(np.sqrt(weight @ (grid - expected) ** 2), rel=2e-3)
        median = grid[np.searchsorted(weight.cumsum(), 0.5)]
        assert marginals.ppf(0.5)[j] == pytest.approx(median, abs=2e-4)
    batch_mean, batch_sd, _ = gaussian.analytic_posterior(np.stack([x, x + 0.1]))
    np.testing.assert_array_equal(batch_mean[0], mean)
    assert batch_sd.shape == (2, 3)


# ---- lynx and hare: the problem's numbers -------------------------------------------------------


def test_lynx_hare_prior_is_the_case_studys() -> None:
    rate = stats.truncnorm(-2.0, np.inf, loc=1.0, scale=0.5)
    meeting = stats.truncnorm(-1.0, np.inf, loc=0.05, scale=0.05)
    start = stats.lognorm(1.0, scale=10.0)
    scatter = stats.lognorm(1.0, scale=np.exp(-1.0))
    marginals = [rate, meeting, rate, meeting, start, start, scatter, scatter]
    theta = prior_draws(50)
    expected = sum(marginals[j].logpdf(theta[:, j]) for j in range(8))
    found = lynx_hare.problem.prior.log_prob(torch.tensor(theta)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_lynx_hare_names_and_data() -> None:
    problem = lynx_hare.problem
    assert problem.parameter_names == tuple(lynx_hare.PUBLISHED)
    assert tuple(lynx_hare.PUBLISHED_QUANTILES) == problem.parameter_names
    assert list(problem.axis.values) == list(range(1900, 1921))
    # Checksums of the two series; hare first.
    np.testing.assert_allclose(problem.observed.sum(0), [715.7, 423.5], rtol=1e-6)
    np.testing.assert_allclose(problem.observed[0], [30.0, 4.0])
    np.testing.assert_allclose(problem.observed[-1], [24.7, 8.6], rtol=1e-6)


# ---- lynx and hare: the integrator --------------------------------------------------------------


def test_integrator_against_scipy_on_prior_draws() -> None:
    theta = prior_draws(150)
    found = lynx_hare.log_populations(theta)
    expected = np.stack([reference_solution(row) for row in theta])
    # An error of log u is a relative error of u.
    assert np.abs(found - expected).max() < 1e-4


def test_integrator_against_scipy_near_the_posterior() -> None:
    theta = near_posterior(60)
    found = lynx_hare.log_populations(theta)
    expected = np.stack([reference_solution(row) for row in theta])
    assert np.abs(found - expected).max() < 1e-6


def test_integrator_conserves_energy_on_many_prior_draws() -> None:
    theta = prior_draws(20_000, seed=1)
    populations = lynx_hare.log_populations(theta)
    assert np.isfinite(populations).all()
    values = energy(theta, populations)
    drift = np.abs(values - values[:, :1]).max(1) / np.abs(values[:, 0])
    assert drift.max() < 1e-3
    assert np.quantile(drift, 0.99) < 1e-6


def test_integrator_does_not_step_over_a_recovery() -> None:
    """Populations so small that they do not act, until they have grown by e^50."""
    rng = np.random.default_rng(0)
    low, high = np.log([[0.01, 1e-4, 0.01, 1e-4], [4.0, 0.4, 4.0, 0.4]])
    theta = np.ones((2000, 8))
    theta[:, :4] = np.exp(rng.uniform(low, high, (2000, 4)))
    theta[:, 4:6] = np.exp(rng.uniform(-60.0, 3.0, (2000, 2)))
    values = energy(theta, lynx_hare.log_populations(theta))
    drift = np.abs(values - values[:, :1]).max(1) / np.abs(values[:, 0])
    assert drift.max() < 1e-5  # not finite with the error estimate alone


def test_no_solution_is_nan_in_its_own_row_only() -> None:
    theta = near_posterior(5)
    good = lynx_hare.log_populations(theta)
    bad = theta.copy()
    bad[1, 1] = -1.0  # hare that grow on lynx: infinite in finite time
    bad[2, 0] = np.nan
    bad[3, 4] = -3.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lynx_hare.log_populations(bad)
    np.testing.assert_array_equal(found[[0, 4]], good[[0, 4]])
    assert np.isnan(found[1:4, -1]).all()


def test_wrong_number_of_parameters() -> None:
    with pytest.raises(ValueError, match="7 parameters, expected 8"):
        lynx_hare.log_populations(np.ones((2, 7)))


# ---- lynx and hare: the simulator ---------------------------------------------------------------


def test_rows_are_bitwise_independent() -> None:
    # More rows than are integrated together, of all degrees of stiffness.
    theta = prior_draws(predator_prey.BLOCK + 100, seed=2)
    whole = lynx_hare.log_populations(theta)
    order = np.random.default_rng(0).permutation(len(theta))
    np.testing.assert_array_equal(lynx_hare.log_populations(theta[order]), whole[order])
    for count in (1, 2, 3, 7, 64, 333):
        np.testing.assert_array_equal(lynx_hare.log_populations(theta[:count]), whole[:count])
    for row in range(20):
        np.testing.assert_array_equal(lynx_hare.log_populations(theta[row]), whole[row])


def test_simulator_does_not_depend_on_how_rows_are_batched() -> None:
    theta = prior_draws(301, seed=3)
    whole = lynx_hare.simulator(theta, np.random.default_rng(4))
    rng = np.random.default_rng(4)
    parts = [lynx_hare.simulator(part, rng) for part in np.split(theta, [1, 8, 200])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    others = np.concatenate([theta[:1], prior_draws(30, seed=5)])
    np.testing.assert_array_equal(
        lynx_hare.simulator(others, np.random.default_rng(4))[0], whole[0]
    )


def test_simulator_noise_is_log_normal_around_the_populations() -> None:
    count = 4000
    theta = np.tile(PUBLISHED_MEAN, (count, 1))
    theta[:, 6:8] = 0.2, 0.7
    x = lynx_hare.simulator(theta, np.random.default_rng(6))
    assert x.shape == (count, 21, 2)
    center = reference_solution(PUBLISHED_MEAN)
    residual = (np.log(x) - center) / [0.2, 0.7]
    # 5 standard errors of a mean, a standard deviation and a correlation.
    assert np.abs(residual.mean(0)).max() < 5 / np.sqrt(count)
    assert np.abs(residual.std(0) - 1.0).max() < 5 / np.sqrt(2 * count)
    correlation = np.corrcoef(residual.reshape(count, 42).T) - np.eye(42)
    assert np.abs(correlation).max() < 5 / np.sqrt(count)
    assert stats.kstest(residual.ravel(), "norm").pvalue > 1e-4


def test_simulated_pelts_fit_single_precision() -> None:
    theta = prior_draws(5000, seed=7)
    theta[:, 6:8] *= 30.0
    x = lynx_hare.simulator(theta, np.random.default_rng(8)).astype(np.float32)
    assert np.isfinite(x).all()
    # e^(log 1e30) is not quite 1e30.
    assert [x.min(), x.max()] == pytest.approx([1e-30, 1e30], rel=1e-5, abs=0.0)


# ---- lynx and hare: likelihood and posterior ----------------------------------------------------


def test_log_likelihood_against_scipy() -> None:
    x = lynx_hare.OBSERVED
    theta = near_posterior(5, seed=9)
    found = lynx_hare.log_likelihood(theta, x)
    assert found.shape == (5,)
    for row, value in zip(theta, found, strict=True):
        populations = np.exp(reference_solution(row))
        expected = stats.lognorm.logpdf(x, row[6:8], scale=populations).sum()
        assert value == pytest.approx(expected, abs=1e-3)
    best = lynx_hare.log_likelihood(PUBLISHED_MEAN, x)
    shifted = lynx_hare.log_likelihood(PUBLISHED_MEAN + 3.0 * np.diag(PUBLISHED_SD), x)
    assert (shifted < best - 1.0).all()


def test_posterior_is_the_published_one() -> None:
    """Importance sampling with the exact likelihood: model, data, priors and units agree.

    The proposal is a t distribution of log theta. It starts with the published means and standard
    deviations, and takes the correlations from three short passes.
    """
    rng = np.random.default_rng(10)
    freedom = 8
    center = np.log(PUBLISHED_MEAN)
    covariance = np.diag((PUBLISHED_SD / PUBLISHED_MEAN) ** 2)
    for final in (False, False, False, True):
        count = 40_000 if final else 8000
        normal = rng.standard_normal((count, 8))
        stretch = rng.chisquare(freedom, count) / freedom
        log_theta = center + (normal / np.sqrt(stretch)[:, None]) @ np.linalg.cholesky(covariance).T
        distance = (normal**2).sum(1) / stretch
        log_proposal = -0.5 * (freedom + 8) * np.log1p(distance / freedom)
        theta = np.exp(log_theta)
        log_prior = lynx_hare.problem.prior.log_prob(torch.tensor(theta)).numpy()
        log_posterior = log_prior + lynx_hare.log_likelihood(theta, lynx_hare.OBSERVED)
        log_weight = log_posterior + log_theta.sum(1) - log_proposal
        weight = np.exp(log_weight - log_weight.max())
        if not final:
            # A few large weights would make the covariance singular.
            weight = np.minimum(weight, np.sort(weight)[-50])
        weight /= weight.sum()
        center = weight @ log_theta
        covariance = ((log_theta - center).T * weight) @ (log_theta - center)
    effective = 1.0 / (weight**2).sum()
    assert effective > 0.4 * count

    # 10,000 published draws: their means have errors of sd / 100, their standard deviations of
    # about 1 % (excess kurtosis 1); the importance sampler's own errors add to that.
    published = 1.0 / 10_000
    mean = weight @ theta
    sd = np.sqrt(weight @ (theta - mean) ** 2)
    own = (weight**2) @ (theta - mean) ** 2 / PUBLISHED_SD**2
    error = np.sqrt(published + own)
    assert (np.abs(mean - PUBLISHED_MEAN) / PUBLISHED_SD < 4 * error).all()
    sd_error = np.sqrt(0.75 * (published + 1.0 / effective))
    assert np.abs(sd / PUBLISHED_SD - 1.0).max() < 5 * sd_error
    # A quantile at level 5 % has an error of sqrt(0.05 * 0.95 / n) / density, 2.1 sd / sqrt(n) for
    # a normal density.
    for j, quantiles in enumerate(lynx_hare.PUBLISHED_QUANTILES.values()):
        order = np.argsort(theta[:, j])
        found = np.interp((0.05, 0.5, 0.95), weight[order].cumsum(), theta[order, j])
        bound = 5 * 2.1 * np.sqrt(published + 1.0 / effective) * PUBLISHED_SD[j]
        assert np.abs(found - quantiles).max() < bound
