"""Prior times likelihood of each problem of the SBI benchmark, against the benchmark's posteriors.

For each of the ten observations of a task the means and second moments of 10,000 reference draws
are compared with those of our posterior, in closed form, on a grid or by importance sampling. A
difference is divided by its standard error, which both sides share.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from importlib import metadata

import numpy as np
import pytest
import torch
from scipy import stats

from sbi_dist.problem import Problem
from sbi_dist.problems import bernoulli_glm, gaussian_linear_uniform, slcp, slcp_distractors
from sbi_dist.problems.gaussian_linear import VARIANCE
from sbi_dist.problems.reference import (
    DRAWS,
    INSTALL,
    OBSERVATIONS,
    PROBLEMS,
    Reference,
    load_reference,
    reference_problem,
)

# Of a failure of any comparison below, if all are of the same posterior (Bonferroni): each task has
# ten observations, of D means and D (D + 1) / 2 second moments.
LEVEL = 1e-3
COMPARISONS = sum(
    10 * size * (size + 3) // 2
    for task in PROBLEMS
    if task != "slcp_distractors"
    for size in (reference_problem(task).num_parameters,)
)
BOUND = float(stats.norm.isf(LEVEL / 2 / COMPARISONS))

# A mean of this many is normal enough for a bound of five standard errors.
LEAST_EFFECTIVE = 1000


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    try:
        metadata.version("sbibm")
    except metadata.PackageNotFoundError:
        reason = f"sbibm is not installed, which has the reference draws; {INSTALL}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


def references(task: str) -> Iterator[Reference]:
    for number in OBSERVATIONS:
        yield load_reference(task, number)


def log_posterior(problem: Problem, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Up to a constant."""
    prior = problem.prior.log_prob(torch.from_numpy(theta)).double().numpy()
    return prior + problem.log_likelihood(theta, x)


def products(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """theta - centre, and its products with itself; shape (N, D (D + 3) / 2)."""
    away = theta - centre
    i, j = np.triu_indices(theta.shape[1])
    return np.concatenate([away, away[:, i] * away[:, j]], axis=1)


def scores(
    draws: np.ndarray,
    centre: np.ndarray,
    expected: np.ndarray,
    variance: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Differences of the draws' moments from those expected, in standard errors.

    ``variance`` is that of ``expected`` itself.
    """
    found = products(draws, centre)
    return (found.mean(0) - expected) / np.sqrt(found.var(0) / len(draws) + variance)


def weighted_scores(
    draws: np.ndarray, theta: np.ndarray, log_weight: np.ndarray, least: float = LEAST_EFFECTIVE
) -> np.ndarray:
    """The same, against weighted draws."""
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    assert 1 / (weight**2).sum() > least
    centre = draws.mean(0)
    moments = products(theta, centre)
    expected = weight @ moments
    return scores(draws, centre, expected, (weight**2) @ (moments - expected) ** 2)


def assert_equal_posteriors(found: list[np.ndarray]) -> None:
    assert np.abs(np.stack(found)).max() < BOUND


# ---- the benchmark's files ----------------------------------------------------------------------


@pytest.mark.parametrize("task", PROBLEMS)
def test_first_observation_is_the_shipped_one(task) -> None:
    problem, first = reference_problem(task), load_reference(task, 1)
    np.testing.assert_array_equal(first.observation.astype(np.float32), problem.observed)
    np.testing.assert_array_equal(first.true_parameters.astype(np.float32), problem.true_parameters)
    assert first.draws.shape == (DRAWS, problem.num_parameters)


def stored(path: str) -> bytes:
    return metadata.distribution("sbibm").locate_file(f"sbibm/tasks/{path}").read_bytes()


def test_stimulus_is_the_benchmarks() -> None:
    content = stored("bernoulli_glm/files/design_matrix.pt")
    assert bernoulli_glm.DESIGN.astype(np.float32).tobytes() in content


def test_bernoulli_glm_statistics_of_the_benchmarks_spikes() -> None:
    for number in OBSERVATIONS:
        text = stored(f"bernoulli_glm/files/num_observation_{number}/observation_raw.csv")
        spikes = np.array(text.decode().splitlines()[1].split(","), dtype=float)
        x = load_reference("bernoulli_glm", number).observation
        # In single precision, of sums of up to 100 numbers of up to 3.
        np.testing.assert_allclose(bernoulli_glm.DESIGN.T @ spikes, x, atol=300 * 2**-24)


def test_distractors_are_the_benchmarks() -> None:
    order = stored("slcp/files/permutation_idx.torch")
    assert slcp_distractors.ORDER.astype(np.int64).tobytes() in order
    mixture = stored("slcp/files/gmm.torch")
    for expected in (slcp_distractors.LOCATIONS, slcp_distractors.SCALES):
        # An array's numbers follow their count; that of its place the file has elsewhere too.
        count = np.int64(expected.size).tobytes()
        place, errors = mixture.find(count), []
        while place >= 0:
            data = mixture[place + 8 : place + 8 + 8 * expected.size]
            if len(data) == 8 * expected.size:
                values = np.frombuffer(data).reshape(expected.shape)
                with np.errstate(all="ignore"):
                    errors.append(np.abs(values - expected).max())
            place = mixture.find(count, place + 1)
        assert np.nanmin(errors) < 1e-13


@pytest.mark.parametrize("number", OBSERVATIONS)
def test_distractors_hide_the_data_of_slcp(number) -> None:
    hidden, plain = load_reference("slcp_distractors", number), load_reference("slcp", number)
    np.testing.assert_array_equal(hidden.observation[slcp_distractors.SIGNAL], plain.observation)
    np.testing.assert_array_equal(hidden.draws, plain.draws)


# ---- closed forms -------------------------------------------------------------------------------


def test_gaussian_linear() -> None:
    problem, found = reference_problem("gaussian_linear"), []
    for reference in references("gaussian_linear"):
        x, draws = reference.observation, reference.draws
        posterior = stats.multivariate_normal(x / 2, VARIANCE / 2 * np.eye(10))
        # The prior's scale is in single precision.
        constant = log_posterior(problem, draws, x) - posterior.logpdf(draws)
        assert np.ptp(constant) < 1e-4
        second = (VARIANCE / 2 * np.eye(10))[np.triu_indices(10)]
        found.append(scores(draws, x / 2, np.concatenate([np.zeros(10), second])))
    assert_equal_posteriors(found)


def test_gaussian_linear_uniform() -> None:
    problem, found = reference_problem("gaussian_linear_uniform"), []
    sd, bound = math.sqrt(VARIANCE), gaussian_linear_uniform.BOUND
    for reference in references("gaussian_linear_uniform"):
        x, draws = reference.observation, reference.draws
        posterior = stats.truncnorm((-bound - x) / sd, (bound - x) / sd, x, sd)
        constant = log_posterior(problem, draws, x) - posterior.logpdf(draws).sum(1)
        assert np.ptp(constant) < 1e-8
        second = np.diag(posterior.var())[np.triu_indices(10)]
        found.append(scores(draws, posterior.mean(), np.concatenate([np.zeros(10), second])))
    assert_equal_posteriors(found)


# ---- grids --------------------------------------------------------------------------------------


def on_grid(
    problem: Problem, x: np.ndarray, low: np.ndarray, high: np.ndarray, cells: int
) -> tuple[np.ndarray, np.ndarray]:
    """Middles of cells and their log weights, where these are not negligible."""
    axes = [a + (b - a) * (np.arange(cells) + 0.5) / cells for a, b in zip(low, high, strict=True)]
    theta = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    log_weight = problem.log_likelihood(theta, x)
    kept = log_weight > log_weight.max() - 40
    return theta[kept], log_weight[kept]


def grid_scores(draws: np.ndarray, theta: np.ndarray, log_weight: np.ndarray) -> np.ndarray:
    weight = np.exp(log_weight - log_weight.max())
    centre = draws.mean(0)
    return scores(draws, centre, weight @ products(theta, centre) / weight.sum())


def test_gaussian_mixture() -> None:
    problem, found = reference_problem("gaussian_mixture"), []
    for reference in references("gaussian_mixture"):
        # The prior, as far as 7 of the wide component's standard deviations; cells of 0.4 of the
        # narrow one's.
        low = np.maximum(reference.observation - 7, -10)
        high = np.minimum(reference.observation + 7, 10)
        theta, log_weight = on_grid(problem, reference.observation, low, high, 350)
        found.append(grid_scores(reference.draws, theta, log_weight))
    assert_equal_posteriors(found)


def test_two_moons() -> None:
    problem, found = reference_problem("two_moons"), []
    for reference in references("two_moons"):
        # Cells of a fifth of the crescent's standard deviation across.
        theta, log_weight = on_grid(problem, reference.observation, -np.ones(2), np.ones(2), 1000)
        found.append(grid_scores(reference.draws, theta, log_weight))
    assert_equal_posteriors(found)


# ---- importance sampling ------------------------------------------------------------------------


def student_t(draws: np.ndarray, freedom: int, widening: float) -> stats.multivariate_t:
    """A t distribution around ``draws``, with their covariance widened for its shape."""
    return stats.multivariate_t(draws.mean(0), widening * np.cov(draws.T), freedom)


@pytest.mark.parametrize("task", ["bernoulli_glm", "sir", "lotka_volterra"])
def test_unimodal_posteriors(task) -> None:
    """By a t distribution fitted to the reference draws; of the logarithms of rates.

    With ten times as many draws the reference means of lotka_volterra are off by up to 0.035
    posterior standard deviations (observation 4), beyond chance. Its solver may be why: scipy's
    RK45 with a tolerance of 1e-4 moves these means by 0.024, though the other way.
    """
    problem, found = reference_problem(task), []
    rates = task != "bernoulli_glm"
    for reference in references(task):
        proposal = student_t(np.log(reference.draws) if rates else reference.draws, 8, 1.2)
        line = proposal.rvs(10_000, random_state=np.random.default_rng(reference.number))
        theta = np.exp(line) if rates else line
        log_weight = log_posterior(problem, theta, reference.observation) - proposal.logpdf(line)
        if rates:
            log_weight += line.sum(1)
        found.append(weighted_scores(reference.draws, theta, log_weight, least=5000))
    assert_equal_posteriors(found)


def slcp_proposal(
    draws: np.ndarray, x: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws of theta in the prior's box with positive theta_3 and theta_4, and log densities.

    theta_3 to theta_5 come from a t distribution around the reference draws (of the logarithms of
    the first two) or, a quarter of them, from the prior. Given these, theta_1 and theta_2 come from
    what would be their posterior under a flat prior: normal around the mean of the four points,
    with a quarter of the covariance. The weights are bounded.
    """
    proposal = student_t(np.column_stack([np.log(draws[:, 2:4]), draws[:, 4]]), 4, 1.5)
    line = proposal.rvs(count, random_state=rng)
    flat = rng.uniform([0, 0, -3], 3, (count // 4, 3))
    line[: len(flat)] = np.column_stack([np.log(flat[:, :2]), flat[:, 2]])
    line = line[(line[:, :2] < math.log(3)).all(1) & (np.abs(line[:, 2]) < 3)]
    one, two = np.exp(line[:, :2]).T
    log_density = np.logaddexp(
        math.log(0.75) + proposal.logpdf(line) - line[:, :2].sum(1), math.log(0.25 / (3 * 3 * 6))
    )
    covariance = np.empty((len(line), 2, 2))
    covariance[:, 0, 0], covariance[:, 1, 1] = one**4 + 1e-6, two**4 + 1e-6
    covariance[:, 0, 1] = covariance[:, 1, 0] = np.tanh(line[:, 2]) * one**2 * two**2
    factor = np.linalg.cholesky(covariance / slcp.DRAWS)
    noise = rng.standard_normal((len(line), 2))
    mean = x.reshape(slcp.DRAWS, 2).mean(0) + np.einsum("nij,nj->ni", factor, noise)
    log_density += -0.5 * (noise**2).sum(1) - np.log(factor[:, 0, 0] * factor[:, 1, 1])
    theta = np.column_stack([mean, one, two, line[:, 2]])
    inside = (np.abs(theta) <= slcp.BOUND).all(1)
    return theta[inside], log_density[inside]


def test_slcp() -> None:
    problem, found = reference_problem("slcp"), []
    for reference in references("slcp"):
        rng = np.random.default_rng(reference.number)
        # The four modes are each other's images, and hold as many draws.
        modes = (reference.draws[:, 2] > 0) + 2 * (reference.draws[:, 3] > 0)
        assert stats.chisquare(np.bincount(modes)).pvalue > LEVEL / 10
        draws = reference.draws * np.where(
            np.isin(np.arange(5), (2, 3)), np.sign(reference.draws), 1
        )
        theta, log_density = slcp_proposal(draws, reference.observation, 150_000, rng)
        log_weight = problem.log_likelihood(theta, reference.observation) - log_density
        found.append(weighted_scores(draws, theta, log_weight))
    assert_equal_posteriors(found)
