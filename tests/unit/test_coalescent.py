"""The shipped coalescent problem: msprime against coalescent theory, and what the problem says."""

from __future__ import annotations

import sys

import msprime
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.special import gammaln

from sbi_dist.errors import InputError
from sbi_dist.priors import sample_prior
from sbi_dist.problem import load_problem
from sbi_dist.problems import coalescent

COPIES = 2 * coalescent.SAMPLE_SIZE
COUNTS = np.arange(1, COPIES)  # derived allele counts
SHORT = 20_000  # base pairs, for tests of means, which are proportional to the length


def expected_spectrum(theta: np.ndarray, length: int) -> np.ndarray:
    """Mean number of sites by derived allele count, shape (199,), by the theory of the coalescent.

    A branch that subtends i of the n copies while k lineages are left has probability
    C(n-i-1, k-2) / C(n-1, k-1) (Griffiths and Tavaré 1998, Stochastic Models 14, 273). The mean
    time with k lineages is the integral of their probability, whose differential equation (a pure
    death process at rate C(k, 2) / (2 N(t))) is solved numerically back to the time when growth
    began; before that, each number of lineages k that is passed lasts 2 N / C(k, 2) on average.
    """
    ancestral, growth, duration = 10.0**theta
    lineages = np.arange(2, COPIES + 1)
    pairs = lineages * (lineages - 1) / 2

    def change(time: float, state: np.ndarray) -> np.ndarray:
        size = ancestral * growth ** (1.0 - time / duration)
        probability = state[: len(lineages)]
        leaving = pairs * probability / (2.0 * size)
        entering = np.append(leaving[1:], 0.0)
        return np.concatenate([entering - leaving, probability])

    start = np.zeros(2 * len(lineages))
    start[len(lineages) - 1] = 1.0
    solution = solve_ivp(change, (0.0, duration), start, "LSODA", rtol=1e-8, atol=1e-10)
    assert solution.success
    probability, time = np.split(solution.y[:, -1], 2)
    passed = np.cumsum(probability[::-1])[::-1]  # P(at least k lineages are left)
    time = time + passed * 2.0 * ancestral / pairs

    i, k = COUNTS[:, None], lineages[None, :]
    # Where k - 2 > n - i - 1, gammaln is infinite and the probability zero.
    with np.errstate(invalid="ignore"):
        log_probability = (
            gammaln(COPIES - i)
            - gammaln(k - 1)
            - gammaln(COPIES - i - k + 2)
            - gammaln(COPIES)
            + gammaln(k)
            + gammaln(COPIES - k + 1)
        )
    subtends = np.where(k - 2 <= COPIES - i - 1, np.exp(log_probability), 0.0)
    expected: np.ndarray = coalescent.MUTATION_RATE * length * subtends @ (lineages * time)
    return expected


def simulated_spectra(theta: np.ndarray, repeats: int, length: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([coalescent.spectrum(theta, rng, length) for _ in range(repeats)])


# ---- against theory ---------------------------------------------------------------------------


def test_theory_of_a_constant_population() -> None:
    """The expectation used below, against theta / i (Fu 1995) and Watterson's theta H_{n-1}."""
    expected = expected_spectrum(np.array([4.0, 0.0, 3.3]), 1_000_000)
    scaled_rate = 4 * 1e4 * coalescent.MUTATION_RATE * 1_000_000
    np.testing.assert_allclose(expected, scaled_rate / COUNTS, rtol=1e-5)
    assert expected.sum() == pytest.approx(scaled_rate * (1.0 / COUNTS).sum(), rel=1e-5)


@pytest.mark.parametrize(
    "theta",
    [(4.0, 0.0, 3.0), tuple(coalescent.TRUE_PARAMETERS), (3.6, 2.0, 3.9)],
    ids=["constant", "observed", "old growth"],
)
def test_mean_spectrum_is_that_of_theory(theta: tuple[float, ...]) -> None:
    repeats = 70
    values = np.array(theta)
    spectra = simulated_spectra(values, repeats, SHORT, seed=1)
    expected = expected_spectrum(values, SHORT)
    classes = coalescent.class_counts(spectra)
    # Of each class, and of the number of segregating sites.
    for found, mean in (
        (classes, coalescent.class_counts(expected)),
        (spectra.sum(1, keepdims=True), expected.sum(keepdims=True)),
    ):
        error = found.std(0, ddof=1) / np.sqrt(repeats)
        assert np.abs((found.mean(0) - mean) / error).max() < 4.5
        # Sharp enough to see a factor of 1.4 in the singletons or in all sites, let alone 2.
        assert (error / mean)[0] < 0.08


def test_growth_is_an_excess_of_rare_alleles() -> None:
    constant, grown = (
        expected_spectrum(np.array([4.0, growth, 3.3]), coalescent.LENGTH) for growth in (0.0, 1.3)
    )
    assert (grown > constant * (1 - 1e-6)).all()
    assert grown[0] / grown.sum() > 2.0 * constant[0] / constant.sum()
    # Old alleles are older than the growth.
    assert (grown / constant)[-1] < 1.2


def test_recombination_makes_the_sites_more_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variance of the number of sites: theta a1 + theta² a2 without recombination (Watterson)."""
    theta = np.array([4.0, 0.0, 3.0])
    length = 3 * SHORT
    recombining = simulated_spectra(theta, 40, length, seed=2).sum(1)
    monkeypatch.setattr(coalescent, "RECOMBINATION_RATE", 0.0)
    linked = simulated_spectra(theta, 150, length, seed=3).sum(1)
    scaled_rate = 4 * 1e4 * coalescent.MUTATION_RATE * length
    independent = scaled_rate * (1 / COUNTS).sum()
    single_tree = independent + scaled_rate**2 * (1 / COUNTS**2).sum()
    # A variance of n values has a standard error of 2 / sqrt(n) where the excess kurtosis is 2.
    assert linked.var(ddof=1) == pytest.approx(single_tree, rel=4 * 2 / np.sqrt(len(linked)))
    assert independent < recombining.var(ddof=1) < 0.6 * single_tree


# ---- the problem ------------------------------------------------------------------------------


def test_form_and_texts() -> None:
    problem = load_problem("sbi_dist.problems.coalescent:problem")
    assert problem is coalescent.problem
    form = problem.form()  # also compares x's shape with that of observed
    assert (form.batched, form.library, form.takes_rng) == (False, "numpy", True)
    assert form.x_shape == (len(coalescent.CLASSES) - 1,)
    assert all((problem.title, problem.description, problem.reference))
    assert len(problem.axis.values) == form.x_shape[0]
    assert (np.diff(problem.axis.values) > 0).all()
    # The truth is inside the prior's support, and not at its edge.
    low, high = np.array([[3.5, 0.0, 2.5], [4.5, 2.0, 4.0]])
    inside = (problem.true_parameters - low) / (high - low)
    assert (inside > 0.2).all() and (inside < 0.8).all()


def test_classes_hold_every_site_once() -> None:
    counts = np.arange(2 * len(COUNTS), dtype=np.float64).reshape(2, -1)
    classes = coalescent.class_counts(counts)
    np.testing.assert_array_equal(classes.sum(1), counts.sum(1))
    for j, (first, end) in enumerate(
        zip(coalescent.CLASSES[:-1], coalescent.CLASSES[1:], strict=True)
    ):
        inside = (first <= COUNTS) & (end > COUNTS)
        np.testing.assert_array_equal(classes[:, j], counts[:, inside].sum(1))


@pytest.mark.skipif(
    msprime.__version__ != coalescent.MSPRIME_VERSION,
    reason=f"the observed data are of msprime {coalescent.MSPRIME_VERSION}",
)
def test_observed_is_the_documented_simulation() -> None:
    rng = np.random.default_rng(coalescent.OBSERVED_SEED)
    found = coalescent.simulator(coalescent.TRUE_PARAMETERS, rng)
    np.testing.assert_array_equal(found, coalescent.OBSERVED)
    np.testing.assert_array_equal(coalescent.problem.observed, coalescent.OBSERVED)


def test_observed_is_typical_of_its_parameters() -> None:
    """Whatever the version of msprime: no class is further from its mean than 30 % + 4 sd."""
    expected = coalescent.class_counts(
        expected_spectrum(coalescent.TRUE_PARAMETERS, coalescent.LENGTH)
    )
    # A lower bound of the variance (linkage adds to it), hence the 30 %.
    distance = np.abs(coalescent.OBSERVED - expected) - 0.3 * expected
    assert (distance < 4 * np.sqrt(expected)).all()


def test_a_simulation_depends_on_theta_and_rng_alone() -> None:
    theta = coalescent.TRUE_PARAMETERS
    first, again, other = (
        coalescent.spectrum(theta, np.random.default_rng(seed), SHORT) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    rng = np.random.default_rng(5)
    assert np.array_equal(first, coalescent.spectrum(theta, rng, SHORT))
    assert not np.array_equal(first, coalescent.spectrum(theta, rng, SHORT))  # the next of rng


def test_corners_of_the_prior_can_be_simulated() -> None:
    for ancestral in (3.5, 4.5):
        for growth in (0.0, 2.0):
            for time in (2.5, 4.0):
                theta = np.array([ancestral, growth, time])
                counts = coalescent.spectrum(theta, np.random.default_rng(7), SHORT)
                assert counts.shape == (COPIES - 1,)
                assert (counts >= 0).all() and (counts == np.round(counts)).all()
    draws = sample_prior(coalescent.problem.prior, 3)
    x = np.stack([coalescent.simulator(row, np.random.default_rng(8)) for row in draws])
    assert (x.astype(np.float32) == x).all() and (x > 0).all()


# ---- without msprime --------------------------------------------------------------------------


def test_without_msprime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sbi_dist.problems.coalescent")
    monkeypatch.setitem(sys.modules, "msprime", None)  # makes its import an ImportError
    with pytest.raises(InputError, match=r"pip install 'sbi_dist\[coalescent\]'"):
        load_problem("sbi_dist.problems.coalescent:problem")
