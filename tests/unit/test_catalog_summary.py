"""Summaries of draws against their definitions, written out with numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.catalog import summary
from sbi_dist.catalog.summary import Summary, summarize

LEVELS = [0.0, 0.025, 0.16, 0.5, 0.84, 1.0]


def definition(draws: np.ndarray, mass: float) -> Summary:
    """One posterior after the other."""
    exact = draws.astype(np.float64)
    covariance = [np.atleast_2d(np.cov(each, rowvar=False)) for each in exact]
    hdi = [[_shortest(each[:, size], mass) for size in range(each.shape[1])] for each in exact]
    return Summary(
        exact.mean(axis=1),
        exact.std(axis=1, ddof=1),
        np.array(covariance),
        np.quantile(exact, LEVELS, axis=1).transpose(1, 0, 2),
        np.array(hdi).transpose(0, 2, 1),
    )


def _shortest(values: np.ndarray, mass: float) -> tuple[float, float]:
    """The shortest interval from a draw to the one floor(mass N) above it, by trying all."""
    ordered = np.sort(values)
    inside = min(math.floor(mass * len(values) + 1e-9), len(values) - 1)
    return min(
        zip(ordered, ordered[inside:], strict=False), key=lambda ends: (ends[1] - ends[0], ends[0])
    )


def agree(draws: np.ndarray, mass: float = 0.9) -> None:
    found, expected = summarize(draws, LEVELS, mass), definition(draws, mass)
    # A result is rounded to float32; a variance is a sum of squares of either sign's error.
    size = np.abs(draws).max()
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6, atol=1e-7 * size)
    scale = expected.sd[:, :, None] * expected.sd[:, None, :]
    np.testing.assert_allclose(found.sd, expected.sd, rtol=1e-6, atol=1e-12 * size)
    error = np.abs(found.covariance - expected.covariance)
    assert (error <= 1e-6 * scale + 1e-12 * size**2).all()
    np.testing.assert_allclose(found.quantiles, expected.quantiles, rtol=1e-6, atol=1e-7 * size)
    widths = found.hdi[:, 1] - found.hdi[:, 0]
    wanted = expected.hdi[:, 1] - expected.hdi[:, 0]
    np.testing.assert_allclose(widths, wanted, rtol=1e-6, atol=1e-6 * size)
    assert (np.isin(found.hdi, draws)).all()
    for field in ("mean", "sd", "covariance", "quantiles", "hdi"):
        assert getattr(found, field).dtype == np.float32


@given(
    st.integers(1, 4),
    st.integers(2, 40),
    st.integers(1, 4),
    st.sampled_from([0.0, 1.0, -3e4, 1e6]),
    st.sampled_from([0.0, 1e-3, 1.0, 1e10]),
    st.floats(0.01, 0.99),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=100)
def test_summaries_are_what_their_definitions_say(batch, count, size, at, sd, mass, seed) -> None:
    noise = np.random.default_rng(seed).standard_normal((batch, count, size))
    agree((at + sd * noise).astype(np.float32), mass)


@pytest.mark.parametrize("count", [3, 50])
def test_many_draws_are_added_up_in_pieces(monkeypatch, count) -> None:
    monkeypatch.setattr(summary, "_AT_ONCE", 70)
    monkeypatch.setattr(summary, "_DRAWS_AT_ONCE", 20)
    draws = np.random.default_rng(0).standard_normal((30, count, 3)).astype(np.float32)
    agree(5.0 + draws)


def test_a_narrow_posterior_far_away_keeps_its_width() -> None:
    """Ten thousand draws of 4096 +- 0.001, where float32 is 0.0005 apart: sums in it would lose."""
    rng = np.random.default_rng(0)
    draws = (4096 + 1e-3 * rng.standard_normal((2, 10_000, 2))).astype(np.float32)
    found = summarize(draws, LEVELS, 0.9)
    np.testing.assert_allclose(found.sd, draws.astype(np.float64).std(axis=1, ddof=1), rtol=1e-5)
    assert (np.abs(found.mean - 4096) <= 5e-4).all()


def test_the_interval_of_100_draws_holds_what_it_says() -> None:
    """90 of 100, though 0.9 * 100 need not be 90 in binary; and 29 of 100 for 0.29 likewise."""
    ordered = np.cumsum(np.r_[10.0, np.arange(1, 100)]).astype(np.float32)  # ever wider apart
    for mass, inside in ((0.9, 90), (0.29, 29), (0.57, 57)):
        found = summarize(ordered[None, :, None], [0.5], mass)
        assert found.hdi[0, :, 0].tolist() == [ordered[0], ordered[inside]]


def test_quantiles_of_a_normal_distribution() -> None:
    """The error of a quantile of N draws is sqrt(p (1 - p) / N) / density."""
    from scipy import stats

    count, levels = 400_000, np.array([0.025, 0.16, 0.5, 0.84, 0.975])
    draws = np.random.default_rng(1).standard_normal((1, count, 1)).astype(np.float32)
    found = summarize(draws, levels, 0.9)
    exact = stats.norm.ppf(levels)
    error = np.sqrt(levels * (1 - levels) / count) / stats.norm.pdf(exact)
    assert (np.abs(found.quantiles[0, :, 0] - exact) < 5 * error).all()
    # The shortest interval's ends are free to move where the density is alike: N^(-1/3).
    width = float(np.diff(found.hdi[0, :, 0])[0])
    assert abs(width - 2 * stats.norm.ppf(0.95)) < 0.02
