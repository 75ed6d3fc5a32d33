"""The distribution of ``U(-1, 1) + s N(0, 1)``: an interval with soft edges.

Its distribution function and density are closed expressions in the normal's. Its quantile
function has none: it is solved for once per softness s and kept as a table of polynomials, since
training maps every simulation through it in each epoch.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.special import log_ndtr

__all__ = ["SoftQuantile", "soft_cdf", "soft_log_density", "soft_tail"]

_TAIL = 7.0  # softnesses beyond the edge at which float64 can tell the image from the edge
# Softnesses beyond the edge up to which the normal's distribution function itself is used; it
# underflows at 38, and from here on its logarithm is.
_FAR = 30.0
# A row of the table is an eighth of an octave of the probability: float64's numbers of the same
# exponent and first three binary places. In such a row the quantile is a polynomial of degree 8
# to 1e-14; tests/unit/test_bijection.py compares it with the solution by bisection.
_PLACES, _DEGREE = 3, 8
_SHIFT = 52 - _PLACES
_BLOCK = 16384  # values that go through the polynomials at once: they stay in a core's cache


def _integral_of_ndtr(t: Tensor) -> Tensor:
    """t Phi(t) + phi(t), the integral of the normal distribution function up to t."""
    # Phi by erfc: torch's ndtr rounds to 1e-16, not in proportion, so that the tail is lost.
    cdf = 0.5 * torch.erfc(t / -math.sqrt(2))
    return t * cdf + torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)


def soft_tail(z: Tensor, s: Tensor) -> Tensor:
    """P(U + s N <= -|z|), for z (..., K) and s (K,) of one dtype; at most 1/2.

    By the distribution's symmetry this gives either half without cancellation.
    """
    lower = -z.abs()
    return 0.5 * s * (_integral_of_ndtr((lower + 1) / s) - _integral_of_ndtr((lower - 1) / s))


def soft_cdf(z: Tensor, s: Tensor) -> Tensor:
    """P(U + s N <= z), for float64 z (..., K) and s (K,)."""
    tail = soft_tail(z, s)
    return torch.where(z > 0, 1 - tail, tail)


def soft_log_density(z: Tensor, s: Tensor) -> Tensor:
    """Log of the derivative of :func:`soft_cdf` by z, of the same shape; finite for finite z."""
    lower = -z.abs()
    near = torch.maximum(lower, -1 - _FAR * s)
    upper = torch.erfc((near + 1) / (-math.sqrt(2) * s))
    log_density = torch.log(0.25 * (upper - torch.erfc((near - 1) / (-math.sqrt(2) * s))))
    if z.device.type == "cpu" and not bool((lower < near).any()):
        return log_density
    far = torch.minimum(lower, -1 - _FAR * s)
    upper_log = log_ndtr((far + 1) / s)
    difference = log_ndtr((far - 1) / s) - upper_log
    far_log = upper_log + torch.log(-torch.expm1(difference)) - math.log(2.0)
    return torch.where(lower < near, far_log, log_density)


class SoftQuantile:
    """The inverse of :func:`soft_cdf` for K softnesses, differentiable.

    It is evaluated by sums, products and look-ups alone, all of which IEEE 754 rounds in one way,
    so that a value does not depend on those beside it, nor on the device. On a GPU nothing waits
    for it.

    Args:
        softness: float64 of shape (K,), positive.
    """

    def __init__(self, softness: Tensor) -> None:
        tables = [_table(float(s)) for s in softness]
        rows = [len(coefficients) for _, _, coefficients in tables]
        self.softness = softness
        self._smallest = torch.tensor([smallest for smallest, _, _ in tables], dtype=torch.float64)
        self._first = torch.tensor([first for _, first, _ in tables])
        self._last = self._first + torch.tensor(rows) - 1
        # Where each softness' rows are in the table of all of them.
        self._offset = torch.tensor(rows).cumsum(0) - torch.tensor(rows) - self._first
        self._coefficients = list(
            torch.cat([coefficients for _, _, coefficients in tables]).T.contiguous()
        )

    def to(self, device: torch.device) -> SoftQuantile:
        """The same on another device."""
        moved = SoftQuantile.__new__(SoftQuantile)
        for name, value in vars(self).items():
            here = [each.to(device) for each in value] if name == "_coefficients" else None
            setattr(moved, name, value.to(device) if here is None else here)
        return moved

    def __call__(self, unit: Tensor) -> Tensor:
        """z of probabilities ``unit``, both float64 of shape (..., K).

        Probabilities nearer to 0 or 1 than those of |z| = 1 + 7 s go there.
        """
        return _Quantile.apply(unit, self)

    def _values(self, unit: Tensor) -> Tensor:
        flat = unit.reshape(-1, unit.shape[-1])
        if unit.device.type != "cpu":
            return self._of_rows(flat).reshape(unit.shape)
        result = torch.empty_like(flat)
        rows = max(1, _BLOCK // max(1, flat.shape[1]))
        for start in range(0, len(flat), rows):
            result[start : start + rows] = self._of_rows(flat[start : start + rows])
        return result.reshape(unit.shape)

    def _of_rows(self, unit: Tensor) -> Tensor:
        lower = torch.minimum(unit, 1 - unit)
        lower = torch.maximum(lower, self._smallest)
        # NaN has large bits: it takes the last row, and the polynomial makes it NaN again.
        row = (lower.view(torch.int64) >> _SHIFT).clamp_(self._first, self._last)
        centre = ((row << _SHIFT) | (1 << (_SHIFT - 1))).view(torch.float64)
        row = row.add_(self._offset).flatten()
        from_centre = (lower - centre).flatten()
        value = self._coefficients[-1].index_select(0, row)
        for coefficients in self._coefficients[-2::-1]:
            value.mul_(from_centre).add_(coefficients.index_select(0, row))
        # Of either half: the sign of the line 2 unit - 1, and the distance from it.
        bend = value.view(unit.shape)
        line = 2 * lower - 1
        return torch.where(unit > 0.5, -(line + bend), line + bend)


class _Quantile(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit: Tensor, quantile: SoftQuantile) -> Tensor:
        z = quantile._values(unit.detach())
        ctx.save_for_backward(z)
        ctx.softness = quantile.softness
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return gradient * torch.exp(-soft_log_density(z, ctx.softness)), None


@functools.lru_cache(maxsize=256)
def _table(softness: float) -> tuple[float, int, Tensor]:
    """The quantile function's distance from the line 2 unit - 1, for unit <= 1/2.

    Returns:
        The smallest probability in the table; the first 15 bits of the first row's numbers; the
        coefficients of each row's polynomial in unit less the row's centre, (rows, degree + 1).
    """
    s = torch.tensor(softness, dtype=torch.float64)
    smallest = soft_cdf(-1 - _TAIL * s, s)
    first, end = (torch.stack([smallest, 0.5 + 0 * s]).view(torch.int64) >> _SHIFT).tolist()
    left = (torch.arange(first, end + 1) << _SHIFT).view(torch.float64)
    half = 0.5 * left.diff()
    # Interpolated at Chebyshev's nodes, so nearly the best polynomial.
    order = torch.arange(_DEGREE + 1, dtype=torch.float64)
    nodes = torch.cos(math.pi * (order + 0.5) / (_DEGREE + 1))
    unit = (left[:-1] + half)[:, None] + half[:, None] * nodes
    bend = _solve(unit, s) - (2 * unit - 1)
    # 8.5 softnesses from the edge it is below 1e-18 s: the function is straight.
    bend[2 * left[:-1] > 8.5 * s] = 0.0
    inverse = torch.linalg.inv(nodes[:, None] ** order)
    return float(smallest), first, (bend @ inverse.T) / half[:, None] ** order


def _solve(unit: Tensor, s: Tensor) -> Tensor:
    """Inverse of :func:`soft_cdf` for unit <= 1/2: bisection, then Newton steps in the bracket."""
    # A softness more than the table needs: its first row starts below its smallest number.
    left = (-1 - (_TAIL + 1) * s).expand_as(unit)
    # Beyond zero, so that no root is at this end of the bracket.
    right = (0.1 * s).expand_as(unit)
    for _ in range(8):
        middle = 0.5 * (left + right)
        below = soft_cdf(middle, s) < unit
        left, right = torch.where(below, middle, left), torch.where(below, right, middle)
    z = 0.5 * (left + right)
    for _ in range(8):
        # On the logarithm, which is concave: after the first, steps approach from the left.
        cdf = soft_cdf(z, s)
        slope = torch.exp(soft_log_density(z, s)) / cdf
        z = (z - (cdf.log() - unit.log()) / slope).clamp(left, right)
    return z
