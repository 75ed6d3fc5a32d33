"""The smooth bijection between a prior's support and R^D on which the flow acts.

Because the flow's density lives on R^D and is carried through this map, posterior draws never
leave the support and the density integrates to one over it: nothing is rejected.

A half-line uses the logarithm, a line the identity. An interval [a, b] uses the quantile function
of ``U(-1, 1) + softness * N(0, 1)``, which is straight inside the interval and bends only within
about two softnesses of an edge, with Gaussian tails like the flow's base distribution. With the
softness near the posterior's own width (:func:`matched_softness`) the image of a normal is close
to a truncated normal, so that a posterior cut by the prior's edge is as easy to fit as one that
is not. For large softness the map tends to the probit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.special import log_ndtr

__all__ = ["SupportBijection", "matched_softness"]

_TAIL = 7.0  # softnesses beyond the edge at which float64 can tell the image from the edge


def matched_softness(residual_sd: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Softness of each component from the width to which x pins theta down, shape (D,).

    ``residual_sd`` is the standard deviation of theta about its linear regression on x. A normal
    cut at its centre by an edge is 0.006 nats (Kullback-Leibler) from the nearest image of a
    normal at 1.25 times its sd (in units of the half-width); 0.0004 at 0.8 times, where the
    distance is least, and over 0.04 at 0.3 or 4 times. See tests/unit/test_bijection.py.
    """
    half_width = np.where(np.isfinite(high - low), (high - low) / 2, 1.0)
    return np.clip(1.25 * residual_sd / half_width, 0.01, 0.6)


class SupportBijection:
    """Map theta in the support to z in R^D and back, component by component.

    Args:
        low, high: bounds of the support, float64 of shape (D,); may be infinite.
        softness: shape (D,); used by bounded components only.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray, softness: np.ndarray | float) -> None:
        self.low = torch.as_tensor(np.asarray(low, dtype=np.float64))
        self.high = torch.as_tensor(np.asarray(high, dtype=np.float64))
        size = self.low.shape[0]
        self.softness = torch.as_tensor(
            np.broadcast_to(np.asarray(softness, dtype=np.float64), size).copy()
        )
        has_low, has_high = torch.isfinite(self.low), torch.isfinite(self.high)
        self._box = torch.nonzero(has_low & has_high).squeeze(-1)
        self._above = torch.nonzero(has_low & ~has_high).squeeze(-1)
        self._below = torch.nonzero(~has_low & has_high).squeeze(-1)

    @property
    def size(self) -> int:
        """D, the number of parameters."""
        return int(self.low.shape[0])

    def to_data(self) -> dict[str, Any]:
        """JSON-ready data; :meth:`from_data` is the inverse."""

        def finite(values: Tensor) -> list[float | None]:
            return [None if math.isinf(value) else value for value in values.tolist()]

        return {
            "low": finite(self.low),
            "high": finite(self.high),
            "softness": self.softness.tolist(),
        }

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> SupportBijection:
        low = np.array([-math.inf if b is None else b for b in data["low"]], dtype=np.float64)
        high = np.array([math.inf if b is None else b for b in data["high"]], dtype=np.float64)
        return cls(low, high, np.array(data["softness"], dtype=np.float64))

    def contains(self, theta: Tensor) -> Tensor:
        """Whether theta (..., D) lies in the support, bool of shape (...)."""
        inside = (theta >= self.low) & (theta <= self.high)
        return inside.all(-1)

    def unconstrain(self, theta: Tensor) -> Tensor:
        """z of theta (..., D), float64. Points on an edge go to the nearest finite image."""
        theta = theta.to(torch.float64)
        z = theta.clone()
        if self._box.numel():
            low, high = self.low[self._box], self.high[self._box]
            unit = ((theta[..., self._box] - low) / (high - low)).clamp(0.0, 1.0)
            z[..., self._box] = _soft_quantile(unit, self.softness[self._box])
        if self._above.numel():
            distance = theta[..., self._above] - self.low[self._above]
            z[..., self._above] = distance.clamp_min(_TINY).log()
        if self._below.numel():
            distance = self.high[self._below] - theta[..., self._below]
            z[..., self._below] = -distance.clamp_min(_TINY).log()
        return z

    def constrain(self, z: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """theta of z (..., D), in ``dtype`` (default z's); always inside the support's closure."""
        dtype = dtype or z.dtype
        z = z.to(torch.float64)
        theta = z.clone()
        if self._box.numel():
            low, high = self.low[self._box], self.high[self._box]
            unit = _soft_cdf(z[..., self._box], self.softness[self._box])
            theta[..., self._box] = low + (high - low) * unit
        if self._above.numel():
            theta[..., self._above] = self.low[self._above] + z[..., self._above].exp()
        if self._below.numel():
            theta[..., self._below] = self.high[self._below] - (-z[..., self._below]).exp()
        return theta.to(dtype).clamp(*self._representable_bounds(dtype))

    def _representable_bounds(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The outermost finite numbers of a dtype inside the support."""
        low, high = self.low.to(dtype), self.high.to(dtype)
        inf = torch.full_like(low, math.inf)
        low = torch.where(low.to(torch.float64) < self.low, low.nextafter(inf), low)
        high = torch.where(high.to(torch.float64) > self.high, high.nextafter(-inf), high)
        largest = torch.finfo(dtype).max
        return low.clamp_min(-largest), high.clamp_max(largest)

    def log_det(self, z: Tensor) -> Tensor:
        """log |d theta / d z| summed over components, float64 of shape (...)."""
        z = z.to(torch.float64)
        total = torch.zeros(z.shape[:-1], dtype=torch.float64)
        if self._box.numel():
            width = (self.high - self.low)[self._box]
            soft = _soft_log_density(z[..., self._box], self.softness[self._box])
            total = total + (width.log() + soft).sum(-1)
        if self._above.numel():
            total = total + z[..., self._above].sum(-1)
        if self._below.numel():
            total = total - z[..., self._below].sum(-1)
        return total


_TINY = 1e-300


def _integral_of_ndtr(t: Tensor) -> Tensor:
    """t Phi(t) + phi(t), the integral of the normal distribution function up to t."""
    # Phi by erfc: torch's ndtr rounds to 1e-16, not in proportion, so that the tail is lost.
    cdf = 0.5 * torch.erfc(t / -math.sqrt(2))
    return t * cdf + torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)


def _soft_cdf(z: Tensor, s: Tensor) -> Tensor:
    # By symmetry computed on the lower half, where no cancellation occurs.
    lower = -z.abs()
    cdf = 0.5 * s * (_integral_of_ndtr((lower + 1) / s) - _integral_of_ndtr((lower - 1) / s))
    return torch.where(z > 0, 1 - cdf, cdf)


def _soft_log_density(z: Tensor, s: Tensor) -> Tensor:
    lower = -z.abs()
    upper_log = log_ndtr((lower + 1) / s)
    difference = log_ndtr((lower - 1) / s) - upper_log
    return upper_log + torch.log(-torch.expm1(difference)) - math.log(2.0)


def _soft_quantile(unit: Tensor, s: Tensor) -> Tensor:
    """Inverse of :func:`_soft_cdf`: bisection, then Newton steps kept inside the bracket."""
    lower_half = torch.minimum(unit, 1 - unit)
    left = (-1 - _TAIL * s).expand_as(unit).clone()
    # Beyond zero, so that no root is at this end of the bracket.
    right = (0.1 * s).expand_as(unit).clone()
    for _ in range(8):
        middle = 0.5 * (left + right)
        below = _soft_cdf(middle, s) < lower_half
        left, right = torch.where(below, middle, left), torch.where(below, right, middle)
    z = 0.5 * (left + right)
    for _ in range(8):
        # On the logarithm, which is concave: after the first, steps approach from the left.
        cdf = _soft_cdf(z, s).clamp_min(_TINY)
        slope = torch.exp(_soft_log_density(z, s)) / cdf
        step = (cdf.log() - lower_half.clamp_min(_TINY).log()) / slope
        z = (z - step).clamp(left, right)
    return torch.where(unit > 0.5, -z, z)
