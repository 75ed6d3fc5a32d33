"""Standardization from parts of the rows: the same as from all of them, and bounded for wide x."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.bijection import SupportBijection, matched_softness
from sbi_dist.estimation import standardize
from sbi_dist.estimation.moments import Moments
from sbi_dist.estimation.standardize import Standardization, choose_scale, sample_runs

LINE = np.full(2, -math.inf), np.full(2, math.inf)
BOX = np.full(2, -4.0), np.full(2, 4.0)


def simulate(rows: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """theta in the box, x linear in it with noise of sd 0.5 in each component."""
    rng = np.random.default_rng(seed)
    theta = rng.uniform(-4, 4, (rows, 2)).astype(np.float32)
    slopes = rng.standard_normal((2, width)) / math.sqrt(width)
    return theta, (theta @ slopes + 0.5 * rng.standard_normal((rows, width))).astype(np.float32)


# ---- moments ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.floats(-12, 12),
    st.floats(-12, 12),
    st.integers(0, 2**32),
)
def test_moments_of_parts(sizes, where, spread, seed) -> None:
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.standard_normal((sum(sizes), 3)) * 10**spread + 10**where)
    total = Moments.total(map(Moments.of, values.split(sizes)))
    assert total.count == len(values)
    # Each value is rounded to 1e-16 of itself, and so are deviations from the mean; the sums of
    # up to 320 values add as many roundings of a tenth of that.
    scale = float(values.abs().max())
    np.testing.assert_allclose(total.mean, values.mean(0), rtol=0, atol=1e-14 * scale)
    np.testing.assert_allclose(
        total.sd(), values.std(0, correction=0), rtol=1e-12, atol=1e-14 * scale
    )


def test_moments_of_extremes() -> None:
    largest = float(torch.finfo(torch.float32).max)
    values = torch.tensor(
        [[largest, 5.0], [-largest, 5.0], [largest, 5.0], [-largest, 5.0]]
    ).double()
    total = Moments.total(map(Moments.of, values.split(1)))
    assert total.mean.tolist() == [0.0, 5.0]
    np.testing.assert_allclose(total.sd(), [largest, 0.0], rtol=1e-15)


# ---- the sample ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 10**9), st.integers(8, 10**6))
def test_the_sample_is_spread_evenly(rows, row_bytes) -> None:
    runs = sample_runs(rows, row_bytes)
    lengths = runs[:, 1] - runs[:, 0]
    size = int(lengths.sum())
    assert size == rows or size == min(100_000, max(100, 64_000_000 // row_bytes))
    assert lengths.min() >= 1 and runs[0, 0] == 0 and runs[-1, 1] <= rows
    gaps = runs[1:, 0] - runs[:-1, 1]
    assert len(runs) <= 1000 and (len(gaps) == 0 or gaps.min() >= 0)
    if len(gaps):
        assert gaps.max() - gaps.min() <= 1 and rows - runs[-1, 1] <= gaps.max() + 1


# ---- what is fitted -----------------------------------------------------------------------------


def test_it_is_what_all_rows_give(monkeypatch) -> None:
    monkeypatch.setattr(standardize, "_CHUNK_ROWS", 37)
    theta, x = simulate(1000, 6)
    fitted = Standardization.fit(theta, x, *BOX, "linear")
    wide = torch.from_numpy(x).double()
    np.testing.assert_allclose(fitted.x_mean, wide.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(fitted.x_sd, wide.std(0, correction=0), rtol=1e-12)
    flat = ((wide - wide.mean(0)) / wide.std(0, correction=0)).float().double()
    centred = torch.from_numpy(theta).double()
    centred = centred - centred.mean(0)
    gram = flat.T @ flat + 1e-6 * len(x) * torch.eye(6, dtype=torch.float64)
    residual = centred - flat @ torch.linalg.solve(gram, flat.T @ centred)
    softness = matched_softness(residual.std(0).numpy(), *BOX)
    # float32 roundings of standardized x may differ where the means do in their last bits.
    np.testing.assert_allclose(fitted.bijection.softness, softness, rtol=1e-6)
    z = SupportBijection(*BOX, fitted.bijection.softness.numpy()).unconstrain(
        torch.from_numpy(theta)
    )
    np.testing.assert_allclose(fitted.theta_mean, z.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(fitted.theta_sd, z.std(0, correction=0), rtol=1e-12)
    u, log_det = fitted.u(torch.from_numpy(theta))
    assert torch.equal(u, fitted.u_alone(torch.from_numpy(theta)))
    np.testing.assert_allclose(u.mean(0), 0, atol=1e-6)
    sums = fitted.sums([(theta, x)])
    assert fitted.mean_log_det(sums.log_det, 1000) == pytest.approx(float(log_det.mean()))


@pytest.mark.parametrize("scale", ["linear", "log", "asinh"])
def test_a_row_does_not_depend_on_those_beside_it(scale) -> None:
    rng = np.random.default_rng(1)
    theta = rng.uniform(0, 4, (3000, 2)).astype(np.float32)
    x = np.exp(2 * rng.standard_normal((3000, 3))).astype(np.float32)
    for bounds in (BOX, (np.zeros(2), np.full(2, math.inf))):
        fitted = Standardization.fit(theta, x, *bounds, scale)
        wide_theta, wide_x = torch.from_numpy(theta), torch.from_numpy(x)
        u, standardized = fitted.u_alone(wide_theta), fitted.x(wide_x)
        for start in (0, 1, 2, 3, 5, 1000):
            for length in (1, 2, 3, 7, 8, 9, 17, 100, 1999):
                rows = slice(start, start + length)
                assert torch.equal(fitted.u_alone(wide_theta[rows]), u[rows])
                assert torch.equal(fitted.x(wide_x[rows]), standardized[rows])


def test_scales_are_chosen_by_columns_at_a_time(monkeypatch) -> None:
    rng = np.random.default_rng(2)
    normal = rng.standard_normal((500, 9)).astype(np.float32)
    cases = {
        "linear": normal,
        "log": np.exp(3 * normal),
        "asinh": (normal / rng.standard_normal((500, 1)) ** 3).astype(np.float32),
    }
    for name, x in cases.items():
        whole = choose_scale(x)
        assert whole == name
        with monkeypatch.context() as patched:
            patched.setattr(standardize, "_CHUNK_FLOATS", 125)  # two columns at a time
            assert choose_scale(x) == whole
            again = Standardization.fit(normal[:, :2], x, *LINE, name)
        first = Standardization.fit(normal[:, :2], x, *LINE, name)
        for each in ("x_low", "x_centre", "x_width"):
            assert torch.equal(getattr(first, each), getattr(again, each))


def test_medians_and_quartiles_are_those_of_each_column() -> None:
    x = np.random.default_rng(3).standard_normal((101, 2, 2)).astype(np.float32)
    theta = np.zeros((101, 2), dtype=np.float32)
    fitted = Standardization.fit(theta, x, *LINE, "asinh")
    wide = x.astype(np.float64)
    np.testing.assert_array_equal(fitted.x_centre, np.median(wide, axis=0))
    quartiles = np.quantile(wide, [0.25, 0.75], axis=0)
    np.testing.assert_array_equal(fitted.x_width, quartiles[1] - quartiles[0])


def test_very_wide_x() -> None:
    """The regression is on leading components then: as good as on the ones that matter."""
    theta, x = simulate(600, 3000)
    fitted = Standardization.fit(theta, x, *BOX, "auto")
    assert fitted.x_mean.shape == (3000,)
    # Of noise of sd 0.5 in each of 3,000 components, the best regression leaves 0.5 of theta (the
    # slopes' squares add up to 1), which is softness 1.25 * 0.5 / 4. The two directions are found
    # in 600 rows with an overlap short of 1: what is left of theta is larger, but by far less than
    # the 2.3 that theta itself has. On all 3,000 components nothing would be left of 600 rows.
    softness = fitted.bijection.softness.numpy()
    assert (softness > 0.8 * 1.25 * 0.5 / 4).all() and (softness < 0.6 * 1.25 * 2.3 / 4).all()


def test_wide_x_of_few_directions() -> None:
    """Where x lies near a few directions, the leading components have all of it."""
    rng = np.random.default_rng(4)
    theta = rng.uniform(-4, 4, (3000, 2)).astype(np.float32)
    seen = theta + 0.5 * rng.standard_normal((3000, 2))
    x = (seen @ rng.standard_normal((2, 1200))).astype(np.float32)
    softness = Standardization.fit(theta, x, *BOX, "linear").bijection.softness.numpy()
    # theta's residual about its regression on ``seen``: an sd of 2.309 and noise of 0.5 leave
    # 0.4886; 3,000 rows know it to 1 / sqrt(6000) = 1.3 %.
    np.testing.assert_allclose(softness, 1.25 * 0.4886 / 4, rtol=0.06)
