"""Simulators, likelihoods and priors of the SBI benchmark's problems, against their definitions."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import solve_ivp

from sbi_dist.priors import prior_from_data, prior_to_data, sample_prior
from sbi_dist.problems import (
    bernoulli_glm,
    gaussian_linear,
    gaussian_linear_uniform,
    gaussian_mixture,
    lotka_volterra,
    predator_prey,
    sir,
    slcp,
    slcp_distractors,
)
from sbi_dist.problems.reference import PROBLEMS, reference_problem

# Of a test, if its hypothesis is true.
LEVEL = 1e-4


def prior_draws(task: str, count: int, seed: int = 0) -> np.ndarray:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sample_prior(reference_problem(task).prior, count).astype(np.float64)


def repeated(theta: np.ndarray, count: int) -> np.ndarray:
    return np.tile(np.asarray(theta, dtype=np.float64), (count, 1))


def assert_moments(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Means within five standard errors, and products within five of theirs."""
    count = len(x)
    scale = np.sqrt(np.diag(covariance))
    assert np.abs((x.mean(0) - mean) / scale).max() < 5 / np.sqrt(count)
    centred = (x - mean) / scale
    i, j = np.triu_indices(x.shape[1])
    products = centred[:, i] * centred[:, j]
    expected = (covariance / np.outer(scale, scale))[i, j]
    error = products.std(0) / np.sqrt(count)
    assert (np.abs(products.mean(0) - expected) < 5 * error).all()


# ---- all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", PROBLEMS)
def test_form_is_a_batch_simulator(task) -> None:
    problem = reference_problem(task)
    form = problem.form()  # also compares x's shape with that of observed
    assert (form.batched, form.library, form.takes_rng, form.note) == (True, "numpy", True, "")
    assert all((problem.title, problem.description, problem.reference))
    assert len(problem.axis.values) == form.x_shape[0]
    one = problem.simulator(problem.true_parameters.astype(np.float64), np.random.default_rng(0))
    assert one.shape == form.x_shape and one.dtype == np.float64
    rebuilt = prior_from_data(prior_to_data(problem.prior), problem.num_parameters)
    theta = torch.tensor(prior_draws(task, 20), dtype=torch.float32)
    torch.testing.assert_close(rebuilt.log_prob(theta), problem.prior.log_prob(theta))


@pytest.mark.parametrize("task", PROBLEMS)
def test_rows_do_not_depend_on_their_batch(task) -> None:
    simulator = reference_problem(task).simulator
    theta = prior_draws(task, 301, seed=1)
    whole = simulator(theta, np.random.default_rng(2))
    np.testing.assert_array_equal(simulator(theta, np.random.default_rng(2)), whole)
    rng = np.random.default_rng(2)
    parts = [simulator(part, rng) for part in np.split(theta, [1, 8, 200])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    alone = simulator(theta[0], np.random.default_rng(2))
    np.testing.assert_array_equal(alone, whole[0])
    others = np.concatenate([theta[:1], theta[50:90]])
    np.testing.assert_array_equal(simulator(others, np.random.default_rng(2))[0], whole[0])
    assert (simulator(theta, np.random.default_rng(3)) != whole).any()


@pytest.mark.parametrize("task", PROBLEMS)
def test_likelihood_of_many_x_is_that_of_each(task) -> None:
    problem = reference_problem(task)
    theta = prior_draws(task, 5, seed=3)
    x = problem.simulator(theta, np.random.default_rng(4))
    found = problem.log_likelihood(theta, x)
    assert found.shape == (5,) and np.isfinite(found).all()
    for row in range(5):
        each = problem.log_likelihood(theta, x[row])
        assert each.shape == (5,)
        assert each[row] == pytest.approx(found[row], rel=1e-12)


# ---- Gaussians ----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [gaussian_linear, gaussian_linear_uniform])
def test_gaussian_linear_noise_and_likelihood(module) -> None:
    theta = np.linspace(-1, 1, 10)
    x = module.simulator(repeated(theta, 20_000), np.random.default_rng(5))
    assert_moments(x, theta, 0.1 * np.eye(10))
    assert stats.kstest((x - theta).ravel(), stats.norm(0, np.sqrt(0.1)).cdf).pvalue > LEVEL
    expected = stats.multivariate_normal(theta, 0.1 * np.eye(10)).logpdf(x[:20])
    np.testing.assert_allclose(module.log_likelihood(theta[None], x[:20]), expected, rtol=1e-12)


def test_gaussian_linear_priors() -> None:
    assert_moments(prior_draws("gaussian_linear", 20_000), np.zeros(10), 0.1 * np.eye(10))
    uniform = prior_draws("gaussian_linear_uniform", 2000)
    assert stats.kstest(uniform.ravel(), stats.uniform(-1, 2).cdf).pvalue > LEVEL


def test_gaussian_mixture_scatters_both_components_alike() -> None:
    theta = np.array([3.0, -9.0])
    x = gaussian_mixture.simulator(repeated(theta, 50_000), np.random.default_rng(6))
    u, v = (x - theta).T

    def cdf(radius: np.ndarray) -> np.ndarray:
        return 0.5 * (stats.rayleigh.cdf(radius) + stats.rayleigh.cdf(radius, scale=0.1))

    # Were the components' widths chosen apart from each other, this would not hold.
    assert stats.kstest(np.hypot(u, v), cdf).pvalue > LEVEL
    assert stats.kstest(np.arctan2(v, u), stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > LEVEL
    wide, narrow = (stats.multivariate_normal(theta, sd**2 * np.eye(2)) for sd in (1.0, 0.1))
    expected = np.log(0.5 * wide.pdf(x[:200]) + 0.5 * narrow.pdf(x[:200]))
    found = gaussian_mixture.log_likelihood(theta[None], x[:200])
    np.testing.assert_allclose(found, expected, rtol=1e-9)


# ---- SLCP with distractors ----------------------------------------------------------------------


def test_slcp_distractors_hold_slcp() -> None:
    theta = prior_draws("slcp", 1000)
    x = slcp_distractors.simulator(theta, np.random.default_rng(7))
    noise = np.random.default_rng(7).standard_normal((1000, 102))[:, :8]
    signal = x[:, slcp_distractors.SIGNAL]
    np.testing.assert_array_equal(signal, slcp.points(theta, noise.reshape(1000, 4, 2)))
    np.testing.assert_array_equal(slcp_distractors.OBSERVED[slcp_distractors.SIGNAL], slcp.OBSERVED)
    found = slcp_distractors.log_likelihood(theta, x)
    np.testing.assert_array_equal(found, slcp.log_likelihood(theta, signal))


def test_distractors_are_a_mixture_of_t_distributions() -> None:
    draws = slcp_distractors.distractors(np.random.default_rng(8).standard_normal((20_000, 94)))
    # A component of a multivariate t is a t whose scale is its row of the scale matrix.
    scales = np.linalg.norm(slcp_distractors.SCALES, axis=2)
    for column in (0, 1, 40, 91):
        location, scale = slcp_distractors.LOCATIONS[:, column], scales[:, column]

        def cdf(value: np.ndarray, location=location, scale=scale) -> np.ndarray:
            return stats.t.cdf((value[:, None] - location) / scale, 2).mean(1)

        assert stats.kstest(draws[:, column], cdf).pvalue > LEVEL


def test_distractors_row_by_row() -> None:
    noise = np.random.default_rng(9).standard_normal((600, 94))
    found = slcp_distractors.distractors(noise)
    chosen = []
    for row, numbers in zip(found, noise, strict=True):
        y, (a, b) = numbers[:92], numbers[92:]
        component = int(20 * (np.angle(a + 1j * b) / (2 * np.pi) + 0.5))
        t = y / np.sqrt((a**2 + b**2) / 2)
        expected = slcp_distractors.LOCATIONS[component] + slcp_distractors.SCALES[component] @ t
        np.testing.assert_allclose(row, expected, rtol=1e-9, atol=1e-9 * np.abs(t).max())
        chosen.append(component)
    assert stats.chisquare(np.bincount(chosen, minlength=20)).pvalue > LEVEL


# ---- Bernoulli GLM ------------------------------------------------------------------------------


def test_bernoulli_glm_prior_is_the_one_of_smooth_filters() -> None:
    smooth = np.zeros((9, 9))
    for i in range(9):
        for offset, weight in enumerate((1.0, -2.0, 1.0)):
            if i >= offset:
                smooth[i, i - offset] += weight
        smooth[i, i] += np.sqrt(i / 9)
    precision = np.zeros((10, 10))
    precision[0, 0] = 0.5
    precision[1:, 1:] = smooth.T @ smooth
    covariance = bernoulli_glm.problem.prior.covariance_matrix.double().numpy()
    np.testing.assert_allclose(covariance @ precision, np.eye(10), atol=1e-5)
    assert_moments(prior_draws("bernoulli_glm", 20_000), np.zeros(10), np.linalg.inv(precision))


def test_bernoulli_glm_drive_is_a_convolution() -> None:
    theta = bernoulli_glm.TRUE_PARAMETERS
    stimulus = bernoulli_glm.DESIGN[:, 1]
    expected = theta[0] + np.convolve(stimulus, theta[1:])[:100]
    np.testing.assert_allclose(bernoulli_glm.DESIGN @ theta, expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_bernoulli_glm_moments(scale) -> None:
    theta = scale * bernoulli_glm.TRUE_PARAMETERS
    x = bernoulli_glm.simulator(repeated(theta, 30_000), np.random.default_rng(10))
    chance = 1 / (1 + np.exp(-bernoulli_glm.DESIGN @ theta))
    spread = bernoulli_glm.DESIGN * np.sqrt(chance * (1 - chance))[:, None]
    assert_moments(x, bernoulli_glm.DESIGN.T @ chance, spread.T @ spread)


def test_bernoulli_glm_likelihood_is_that_of_the_spikes() -> None:
    theta = prior_draws("bernoulli_glm", 20)
    spikes = np.random.default_rng(11).integers(0, 2, 100)
    # Spike-triggered sums of the stimulus, written as they are defined.
    stimulus = bernoulli_glm.DESIGN[:, 1]
    sums = [sum(stimulus[t - lag] for t in range(lag, 100) if spikes[t]) for lag in range(9)]
    found = bernoulli_glm.log_likelihood(theta, np.array([spikes.sum(), *sums]))
    drive = theta @ bernoulli_glm.DESIGN.T
    expected = stats.bernoulli.logpmf(spikes, 1 / (1 + np.exp(-drive))).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


# ---- the equations of predators and prey, and of an epidemic -----------------------------------


def populations(rates: np.ndarray, start: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Log populations of one row by scipy, shape (T, 2)."""
    alpha, beta, gamma, delta = rates

    def slope(_: float, state: np.ndarray) -> tuple[float, float]:
        p, q = np.minimum(state, 700.0)  # steps are tried in which the exponential overflows
        return alpha - beta * np.exp(q), -gamma + delta * np.exp(p)

    solution = solve_ivp(
        slope, (0, times[-1]), np.log(start), "LSODA", times, rtol=1e-10, atol=1e-10
    )
    assert solution.success
    return solution.y.T


def wide_draws(task: str, count: int, widening: float, seed: int) -> np.ndarray:
    """Draws of a log-normal prior with its sigmas multiplied."""
    theta = np.log(prior_draws(task, count, seed))
    centre = reference_problem(task).prior.base_dist.loc.double().numpy()
    return np.exp(centre + widening * (theta - centre))


# Errors of log populations are relative errors of populations. The data tell 3 % (of a binomial
# count of 1,000) or 10 %; 10,000 posterior draws, or simulations, a hundredth of that. Found were
# 3.5e-8 and 9e-8 (sir), 1.6e-6 (lotka_volterra), of which a part is scipy's.
@pytest.mark.parametrize(("widening", "bound"), [(1.0, 1e-6), (3.0, 1e-5)])
def test_sir_integration_against_scipy(widening, bound) -> None:
    theta = wide_draws("sir", 60, widening, seed=5)
    found = sir.log_infected(theta)
    start = np.array([1 - 1e-6, 1e-6])
    expected = [populations((0, b, g, b), start, sir.DAYS.astype(float))[:, 1] for b, g in theta]
    assert np.abs(found - expected).max() < bound


def test_lotka_volterra_integration_against_scipy() -> None:
    theta = prior_draws("lotka_volterra", 80)
    found = lotka_volterra.log_populations(theta).reshape(-1, 2, 10)
    expected = [populations(row, np.array([30.0, 1.0]), lotka_volterra.TIMES) for row in theta]
    expected = np.clip(np.swapaxes(expected, 1, 2), np.log(1e-10), np.log(1e4))
    # A crash to e^-100 multiplies errors before the populations come back.
    assert np.abs(found - expected).max() < 1e-5


def test_lotka_volterra_conserves_its_energy() -> None:
    theta = wide_draws("lotka_volterra", 5000, 2.0, seed=6)
    start = np.broadcast_to(lotka_volterra.START, (len(theta), 2))
    p, q = np.moveaxis(predator_prey.log_populations(theta, start, lotka_volterra.TIMES), -1, 0)
    alpha, beta, gamma, delta = theta.T[..., None]
    energy = delta * np.exp(p) - gamma * p + beta * np.exp(q) - alpha * q
    # Of the terms that it is a sum of.
    size = delta * np.exp(p) + np.abs(gamma * p) + beta * np.exp(q) + np.abs(alpha * q)
    assert (np.abs(energy - energy[:, :1]) / size).max() < 1e-5


@pytest.mark.parametrize(("task", "widening"), [("sir", 4.0), ("lotka_volterra", 3.0)])
def test_extreme_draws_simulate_or_have_no_number(task, widening) -> None:
    problem = reference_problem(task)
    theta = wide_draws(task, 2000, widening, seed=7)
    bad = theta.copy()
    bad[5, 0], bad[6, 1], bad[7] = np.nan, np.inf, -1e3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = problem.simulator(theta, np.random.default_rng(12)).astype(np.float32)
        damaged = problem.simulator(bad, np.random.default_rng(12))
        likelihood = problem.log_likelihood(theta, problem.observed)
    complete = np.isfinite(x).all(1)
    assert complete[np.isfinite(likelihood)].all()
    # Eight sigmas of the prior lie in the middle of these draws, and must be simulated.
    centre = problem.prior.base_dist.loc.double().numpy()
    scale = problem.prior.base_dist.scale.double().numpy()
    near = (np.abs(np.log(theta) - centre) < 8 * scale).all(1)
    assert near.sum() > 1000 and complete[near].all()
    assert np.isnan(damaged[[5, 6]]).any(1).all()
    np.testing.assert_array_equal(damaged[:5].astype(np.float32), x[:5])


def test_sir_counts_are_binomial() -> None:
    theta = sir.TRUE_PARAMETERS
    count = 20_000
    x = sir.simulator(repeated(theta, count), np.random.default_rng(13))
    assert (x == np.round(x)).all()
    start = np.array([1 - 1e-6, 1e-6])
    share = np.exp(populations((0, theta[0], theta[1], theta[0]), start, sir.DAYS.astype(float)))
    # Days whose counts are no mere rarity: 5 standard errors of a mean of Poisson numbers.
    chance = share[:, 1]
    error = np.sqrt(1000 * chance * (1 - chance) / count)
    frequent = 1000 * chance > 0.01
    assert (np.abs(x.mean(0) - 1000 * chance)[frequent] < 5 * error[frequent]).all()
    for day in (2, 3):
        variance = 1000 * chance[day] * (1 - chance[day])
        assert x[:, day].var() == pytest.approx(variance, rel=5 * np.sqrt(2 / count))
    found = sir.log_likelihood(theta[None], x[:50])
    expected = stats.binom.logpmf(x[:50], 1000, chance).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_sir_likelihood_where_everybody_or_nobody_is_infected() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Contacts a thousand a day, and nobody recovers: all but e^-17000 are infected by day 17.
        theta = np.array([[1000.0, 1e-12], [1e-9, 30.0]])
        all_of_them = np.array([0.0, *[1000.0] * 9])
        found = sir.log_likelihood(theta, all_of_them)
        none = sir.log_likelihood(theta, np.zeros(10))
    assert -0.01 < found[0] <= 0 and found[1] < -1e5
    assert -0.01 < none[1] <= 0 and not none[0] > -1e4


def test_lotka_volterra_noise_and_likelihood() -> None:
    theta = lotka_volterra.TRUE_PARAMETERS
    x = lotka_volterra.simulator(repeated(theta, 5000), np.random.default_rng(14))
    solution = populations(theta, np.array([30.0, 1.0]), lotka_volterra.TIMES).T.ravel()
    assert_moments(np.log(x), solution, 0.01 * np.eye(20))
    assert stats.kstest((np.log(x) - solution).ravel(), stats.norm(0, 0.1).cdf).pvalue > LEVEL
    found = lotka_volterra.log_likelihood(theta[None], x[:20])
    expected = stats.lognorm.logpdf(x[:20], 0.1, scale=np.exp(solution)).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_log_normal_priors() -> None:
    expected = {
        "sir": ([np.log(0.4), np.log(0.125)], [0.5, 0.2]),
        "lotka_volterra": ([-0.125, -3.0, -0.125, -3.0], [0.5] * 4),
    }
    for task, (centre, scale) in expected.items():
        theta = np.log(prior_draws(task, 20_000))
        assert_moments(theta, np.array(centre), np.diag(np.square(scale)))
