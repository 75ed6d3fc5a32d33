"""The regression that a flow starts from."""

from __future__ import annotations

import time

import pytest
import torch

from sbi_dist.estimation.regression import ridge_regression


def made(count: int, columns: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator)
    slope = torch.randn(columns, 2, generator=generator)
    slope[3:] = 0
    y = 1.5 + x @ slope + noise * torch.randn(count, 2, generator=generator)
    return x, y, slope


def test_many_rows_give_least_squares() -> None:
    x, y, _ = made(4000, 5, 0.3)
    found, intercept, sd = ridge_regression(x, y)
    ones = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    expected = torch.linalg.lstsq(ones, y.double()).solution
    # Well within a coefficient's standard error, 0.3 / sqrt(4000) = 0.005.
    torch.testing.assert_close(torch.cat([found, intercept[None]]), expected, rtol=0, atol=1e-3)
    # 4,000 rows place a standard deviation to 1 / sqrt(8000) = 1.1 %; four of these.
    assert float((sd / 0.3 - 1).abs().max()) < 0.045


@pytest.mark.parametrize(("count", "columns"), [(60, 10), (40, 100), (50, 2000)])
def test_the_residual_is_that_of_new_rows(count: int, columns: int) -> None:
    """Also where the columns could fit every row: an sd of nearly zero would be a lie."""
    x, y, _ = made(count + 4000, columns, 0.5)
    slope, intercept, sd = ridge_regression(x[:count], y[:count])
    error = y[count:].double() - x[count:].double() @ slope - intercept
    fresh = error.square().mean(0).sqrt()
    # The mean of `count` squares of normal numbers has an sd of sqrt(2 / count); its root half
    # that; choosing the best of 17 ridges adds a little optimism.
    assert float((sd / fresh - 1).abs().max()) < 4 * (0.5 / count) ** 0.5 + 0.1


def test_constant_and_equal_columns() -> None:
    x, y, _ = made(300, 4, 0.1)
    wide = torch.cat([x, x[:, :1], torch.ones(300, 2)], dim=1)
    slope, intercept, sd = ridge_regression(wide, y)
    assert torch.isfinite(slope).all() and torch.isfinite(intercept).all()
    assert float((sd / 0.1 - 1).abs().max()) < 0.2
    slope, _, sd = ridge_regression(torch.zeros(30, 2), y[:30])
    assert float(slope.abs().max()) == 0 and torch.isfinite(sd).all()


def test_ten_thousand_columns_take_seconds_at_most() -> None:
    x, y, _ = made(400, 10_000, 0.5)
    began = time.process_time()
    ridge_regression(x, y)
    assert time.process_time() - began < 10
