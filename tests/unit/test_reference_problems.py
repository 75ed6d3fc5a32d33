"""The problems of the SBI benchmark against its published observations and reference draws."""

from __future__ import annotations

import os
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from sbi_dist.errors import InputError
from sbi_dist.problem import Problem, load_problem
from sbi_dist.problems import gaussian_mixture, reference, slcp
from sbi_dist.problems.reference import OBSERVATIONS, PROBLEMS, load_reference, parse_table


@pytest.fixture(scope="module")
def references() -> None:
    """Where sbibm is installed, which is read as data."""
    try:
        metadata.distribution("sbibm")
    except metadata.PackageNotFoundError:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"sbibm is not installed; {reference.INSTALL}")


def log_prior(problem: Problem, theta: np.ndarray) -> np.ndarray:
    return problem.prior.log_prob(torch.from_numpy(theta)).double().numpy()


# ---- posteriors ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("task", PROBLEMS)
def test_observation_and_parameters_are_those_published(task) -> None:
    problem, found = reference.reference_problem(task), load_reference(task, 1)
    assert np.array_equal(problem.observed, found.observation.astype(np.float32))
    assert np.array_equal(problem.true_parameters, found.true_parameters.astype(np.float32))
    assert found.draws.shape == (10_000, problem.num_parameters)
    assert np.isfinite(log_prior(problem, found.draws)).all()


# Of so many comparisons, one would be beyond this in a thousand runs of a right program.
def bound(comparisons: int) -> float:
    return float(stats.norm.isf(0.5e-3 / comparisons))


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("task", ["gaussian_linear", "gaussian_linear_uniform"])
def test_marginals_in_closed_form(task) -> None:
    p_values = []
    for number in OBSERVATIONS:
        found = load_reference(task, number)
        for x, draws in zip(found.observation, found.draws.T, strict=True):
            if task == "gaussian_linear":
                exact = stats.norm(x / 2, np.sqrt(0.05))
            else:
                sd = np.sqrt(0.1)
                exact = stats.truncnorm((-1 - x) / sd, (1 - x) / sd, x, sd)
            p_values.append(stats.kstest(draws, exact.cdf).pvalue)
    assert min(p_values) > 1e-3 / len(p_values)


@pytest.mark.usefixtures("references")
def test_marginals_of_a_mixture_cut_at_the_prior() -> None:
    p_values = []
    sds = np.array([gaussian_mixture.WIDE, gaussian_mixture.NARROW])
    edge = gaussian_mixture.BOUND
    for number in OBSERVATIONS:
        found = load_reference("gaussian_mixture", number)
        below = special.ndtr((-edge - found.observation[:, None]) / sds)
        mass = special.ndtr((edge - found.observation[:, None]) / sds) - below
        for each in range(2):
            weights = mass[1 - each]

            def cdf(t, each=each, weights=weights, below=below, found=found):
                part = special.ndtr((t[:, None] - found.observation[each]) / sds) - below[each]
                return (weights * part).sum(-1) / mass.prod(axis=0).sum()  # noqa: B023

            p_values.append(stats.kstest(found.draws[:, each], cdf).pvalue)
    assert min(p_values) > 1e-3 / len(p_values)


@pytest.mark.usefixtures("references")
def test_moons_in_polar_coordinates() -> None:
    """Of a flat prior, theta's posterior is the noise's distribution around the observation."""
    p_values = []
    for number in OBSERVATIONS:
        found = load_reference("two_moons", number)
        if np.abs(found.draws).max() > 0.995:  # the prior's edge cuts it
            continue
        one, two = found.draws.T
        shift = np.stack([-np.abs(one + two), two - one], axis=-1) / np.sqrt(2)
        noise = found.observation - shift - np.array([0.25, 0.0])
        radius, angle = np.hypot(*noise.T), np.arctan2(noise[:, 1], noise[:, 0])
        p_values.append(stats.kstest(radius, stats.norm(0.1, 0.01).cdf).pvalue)
        uniform = stats.uniform(-np.pi / 2, np.pi)
        p_values.append(stats.kstest(angle, uniform.cdf).pvalue)
        p_values.append(stats.binomtest(int((one + two > 0).sum()), len(one)).pvalue)
    assert len(p_values) >= 3 * 3
    assert min(p_values) > 1e-3 / len(p_values)


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("task", ["sir", "lotka_volterra", "bernoulli_glm", "slcp"])
def test_likelihood_times_prior_agrees_with_the_reference_draws(task) -> None:
    """Moments of importance-weighted draws against those of the half of the draws not fitted to."""
    problem = reference.reference_problem(task)
    assert problem.log_likelihood is not None
    far, comparisons = [], 0
    for number in (1, 4, 7) if task == "slcp" else (1, 2, 5, 8, 10):
        found = load_reference(task, number)
        fitted, rest = (flat(task, half) for half in np.split(found.draws, 2))
        proposal = Kernels(fitted[:1500], np.random.default_rng(number))
        at, log_proposal = proposal.draw(12_000)
        theta, log_volume = unflat(task, at)
        log_weight = log_prior(problem, theta) + log_volume
        usable = np.isfinite(log_weight)
        log_weight[usable] += problem.log_likelihood(theta[usable], found.observation)
        log_weight -= log_proposal
        weight = special.softmax(np.where(usable, log_weight, -np.inf))
        effective = 1 / (weight**2).sum()
        assert effective > 300, (task, number, effective)
        centre = rest.mean(axis=0)
        values = [(part - centre) for part in (at, rest)]
        moments = [np.concatenate([part, part**2], axis=1) for part in values]
        mean = weight @ moments[0]
        error = (weight**2) @ (moments[0] - mean) ** 2 + moments[1].var(axis=0) / len(rest)
        z = (mean - moments[1].mean(axis=0)) / np.sqrt(error)
        comparisons += len(z)
        far.append((float(np.abs(z).max()), number))
    assert max(far)[0] < bound(comparisons), far


def flat(task: str, theta: np.ndarray) -> np.ndarray:
    """Coordinates in which a posterior is near to one Gaussian."""
    if task in ("sir", "lotka_volterra"):
        return np.log(theta)
    if task == "slcp":  # whose posterior does not know the signs of the third and fourth
        return np.concatenate([theta[:, :2], np.abs(theta[:, 2:4]), theta[:, 4:]], axis=1)
    return theta


def unflat(task: str, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """theta, and the logarithm of the volume that goes with it."""
    if task in ("sir", "lotka_volterra"):
        return np.exp(at), at.sum(axis=1)
    if task == "slcp":
        return at, np.where((at[:, 2:4] > 0).all(axis=1), 0.0, -np.inf)
    return at, np.zeros(len(at))


class Kernels:
    """A mixture of t distributions around points, of the points' own covariance."""

    FREEDOM = 5.0

    def __init__(self, points: np.ndarray, rng: np.random.Generator) -> None:
        self.points, self.rng = points, rng
        count, self.size = points.shape
        width = (4 / (self.size + 2) / count) ** (1 / (self.size + 4))
        self.factor = width * np.linalg.cholesky(np.cov(points.T).reshape(self.size, self.size))

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws (count, D), and their log density."""
        centres = self.points[self.rng.integers(0, len(self.points), count)]
        chi = self.rng.chisquare(self.FREEDOM, (count, 1)) / self.FREEDOM
        at = centres + (self.rng.normal(size=centres.shape) / np.sqrt(chi)) @ self.factor.T
        exact = stats.multivariate_t(np.zeros(self.size), np.eye(self.size), self.FREEDOM)
        constant = exact.logpdf(np.zeros(self.size)) - np.log(np.diag(self.factor)).sum()
        inverse = np.linalg.inv(self.factor).T
        whitened, around = at @ inverse, self.points @ inverse
        log_density = np.empty(count)
        for start in range(0, count, 2000):
            some = whitened[start : start + 2000]
            square = (some**2).sum(1)[:, None] + (around**2).sum(1) - 2 * some @ around.T
            power = (
                -0.5 * (self.FREEDOM + self.size) * np.log1p(np.maximum(square, 0) / self.FREEDOM)
            )
            log_density[start : start + 2000] = special.logsumexp(power, axis=1)
        return at, log_density + constant - np.log(len(self.points))


@pytest.mark.usefixtures("references")
def test_distractors_leave_the_posterior_as_it_is() -> None:
    for number in OBSERVATIONS:
        with_them, without = (load_reference(task, number) for task in ("slcp_distractors", "slcp"))
        assert np.array_equal(with_them.draws, without.draws)
        signal = load_problem("sbi_dist.problems.slcp_distractors:problem")
        theta = without.draws[:100]
        own = signal.log_likelihood(theta, with_them.observation)
        other = slcp.log_likelihood(theta, without.observation)
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-4)


# ---- reading them -------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_tables_are_read_as_they_were_written(rows, columns, seed) -> None:
    numbers = np.random.default_rng(seed).normal(size=(rows, columns)) * 10.0 ** (seed % 60 - 30)
    lines = [",".join(f"p{each}" for each in range(columns))]
    lines += [",".join(map(repr, row)) for row in numbers.tolist()]
    text = "\n".join(lines).encode() + b"\n"
    assert np.array_equal(parse_table(text, rows, columns, "a.csv"), numbers)
    for wrong in ((rows + 1, columns), (rows, columns + 1)):
        with pytest.raises(InputError, match=r"reference\.source: a\.csv"):
            parse_table(text, *wrong, "a.csv")


@given(st.binary(max_size=60))
def test_what_is_no_table_is_told(content) -> None:
    for name in ("a.csv", "a.csv.bz2"):
        with pytest.raises(InputError, match=r"reference\.source"):
            parse_table(content, 3, 2, name)


@pytest.mark.usefixtures("references")
def test_from_a_wheel_a_folder_and_what_is_installed(tmp_path: Path) -> None:
    installed = load_reference("two_moons", 3)
    folder = Path(str(metadata.distribution("sbibm").locate_file("sbibm")))
    wheel = tmp_path / "sbibm.whl"
    with zipfile.ZipFile(wheel, "w") as to:
        for path in folder.glob("tasks/two_moons/files/num_observation_3/*"):
            to.write(path, f"sbibm/{path.relative_to(folder)}")
    for source in (wheel, folder, folder.parent):
        found = load_reference("two_moons", 3, source)
        assert np.array_equal(found.draws, installed.draws)
    for arguments, message in (
        (("two_moon", 1), "did you mean 'two_moons'"),
        (("two_moons", 11), "reference.observation is 11; it must be an integer from 1 to 10"),
        (("two_moons", 1, tmp_path / "none.whl"), "which is not there"),
        (("two_moons", 1, __file__), "which is no wheel"),
        (("two_moons", 1, tmp_path), r"has no .*pip install --no-deps sbibm==1.1.0"),
        (("two_moons", 1, wheel), "has no "),
    ):
        with pytest.raises(InputError, match=message):
            load_reference(*arguments)
