"""Linear regression whose ridge is chosen by leaving each row out, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ridge_regression"]

_RIDGES = torch.logspace(-6, 2, 17, dtype=torch.float64)  # times the number of rows


def ridge_regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The linear map from x to y that predicts best a row which it was not fitted to.

    The ridge is the one of the least mean squared error with one row left out at a time (Golub,
    Heath and Wahba 1979, doi:10.1080/00401706.1979.10489751), so that columns may be constant,
    copies of each other, or more than there are rows. Cost: that of the eigenvectors of a matrix
    as large as the smaller one of rows and columns.

    Args:
        x: (N, C).
        y: (N, D).

    Returns:
        Slope (C, D), intercept (D,) and the sd of left-out residuals (D,), all float64.
    """
    wide_x, wide_y = x.double(), y.double()
    mean_x, mean_y = wide_x.mean(0), wide_y.mean(0)
    centred, target = wide_x - mean_x, wide_y - mean_y
    count = len(x)
    if centred.shape[1] <= count:
        squares, axes = torch.linalg.eigh(centred.T @ centred)
        scores = centred @ axes  # (N, C), of squared norms `squares`
    else:
        squares, left = torch.linalg.eigh(centred @ centred.T)
        scores = left * squares.clamp_min(0).sqrt()
        axes = centred.T @ left / squares.clamp_min(1e-300).sqrt()
    squares = squares.clamp_min(0)
    inner = scores.T @ target
    best: tuple[float, Tensor, Tensor] | None = None
    for ridge in _RIDGES * count:
        shrunk = 1 / (squares + ridge)
        # What a row adds to its own prediction, with the means' part.
        leverage = (scores.square() @ shrunk + 1 / count).clamp_max(1 - 1e-9)
        residual = (target - scores @ (shrunk[:, None] * inner)) / (1 - leverage)[:, None]
        error = float(residual.square().mean())
        if best is None or error < best[0]:
            best = error, shrunk, residual.square().mean(0).sqrt()
    assert best is not None
    _, shrunk, sd = best
    slope = axes @ (shrunk[:, None] * inner)
    return slope, mean_y - mean_x @ slope, sd
