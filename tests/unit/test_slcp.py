"""The SLCP problem: its simulator and its likelihood."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sbi_dist.problem import load_problem
from sbi_dist.problems import slcp


def covariance(theta: np.ndarray) -> np.ndarray:
    """As in the papers, with sbibm's 1e-6 on the diagonal."""
    one, two, rho = theta[2] ** 2, theta[3] ** 2, np.tanh(theta[4])
    return np.array([[one**2, rho * one * two], [rho * one * two, two**2]]) + 1e-6 * np.eye(2)


def test_form_is_a_batch_simulator() -> None:
    problem = load_problem("sbi_dist.problems.slcp:problem")
    form = problem.form()
    assert (form.batched, form.library, form.takes_rng) == (True, "numpy", True)
    assert (form.x_shape, form.note) == ((8,), "")
    assert slcp.simulator(slcp.TRUE_PARAMETERS, np.random.default_rng(0)).shape == (8,)


@pytest.mark.parametrize("theta", [[0.7, -2.9, -1.1, 0.8, -0.6], [-2.0, 1.0, 0.02, 2.5, 2.9]])
def test_moments(theta) -> None:
    count = 50_000
    theta = np.array(theta)
    x = slcp.simulator(np.tile(theta, (count, 1)), np.random.default_rng(1))
    draws = x.reshape(count, 4, 2)
    expected = covariance(theta)
    scale = np.sqrt(np.diag(expected))
    for k in range(4):
        # 5 standard errors of means, and of products: at most sqrt(2 / count) of both scales.
        error = (draws[:, k].mean(0) - theta[:2]) / scale
        assert np.abs(error).max() < 5 / np.sqrt(count)
        found = np.cov(draws[:, k].T)
        assert np.abs((found - expected) / np.outer(scale, scale)).max() < 5 * np.sqrt(2 / count)
    # The four draws are independent of each other.
    correlation = np.corrcoef(x.T)
    blocks = np.kron(np.eye(4), np.ones((2, 2))) > 0
    assert np.abs(correlation[~blocks]).max() < 5 / np.sqrt(count)


def test_likelihood_against_scipy() -> None:
    rng = np.random.default_rng(2)
    theta = rng.uniform(-3, 3, (50, 5))
    theta[:, 2:4] = np.sign(theta[:, 2:4]) * np.maximum(0.3, np.abs(theta[:, 2:4]))
    x = slcp.simulator(theta, rng)
    expected = [
        stats.multivariate_normal(each[:2], covariance(each)).logpdf(data.reshape(4, 2)).sum()
        for each, data in zip(theta, x, strict=True)
    ]
    np.testing.assert_allclose(slcp.log_likelihood(theta, x), expected, rtol=1e-7, atol=1e-7)
    one = slcp.log_likelihood(theta[:7], x[3])
    assert one.shape == (7,)
    assert one[3] == pytest.approx(expected[3])


def test_four_thetas_have_the_same_likelihood() -> None:
    signs = np.array([[1, 1, a, b, 1] for a in (-1, 1) for b in (-1, 1)])
    values = slcp.log_likelihood(slcp.TRUE_PARAMETERS * signs, slcp.OBSERVED)
    np.testing.assert_allclose(values, values[0], rtol=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=5, max_size=5))
def test_all_of_the_prior_simulates(theta) -> None:
    theta = np.array([theta, theta])
    x = slcp.simulator(theta, np.random.default_rng(3))
    assert np.isfinite(x).all()
    # Standard normal noise of 16 numbers: (x - mean) stays below 8 standard deviations.
    scale = np.sqrt(np.diag(covariance(theta[0])))
    assert (np.abs(x.reshape(2, 4, 2) - theta[0, :2]) <= 8 * scale).all()
    assert np.isfinite(slcp.log_likelihood(theta, x)).all()


def test_observed_data_are_likely_under_the_true_parameters() -> None:
    # The sum of squares of the whitened data is chi-squared of 8 degrees of freedom.
    theta = slcp.TRUE_PARAMETERS
    residual = slcp.OBSERVED.reshape(4, 2) - theta[:2]
    square = np.einsum("ki,ij,kj->", residual, np.linalg.inv(covariance(theta)), residual)
    assert 1e-4 < stats.chi2(8).cdf(square) < 1 - 1e-4
