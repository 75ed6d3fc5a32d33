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

from sbi_dist.soft_uniform import SoftQuantile, soft_log_density, soft_tail

__all__ = ["SupportBijection", "matched_softness"]


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

    Works on the device of what it is given, without waiting for it.

    Args:
        low, high: bounds of the support, float64 of shape (D,); may be infinite.
        softness: shape (D,), positive; used by bounded components only.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray, softness: np.ndarray | float) -> None:
        self.low = torch.as_tensor(np.asarray(low, dtype=np.float64))
        self.high = torch.as_tensor(np.asarray(high, dtype=np.float64))
        size = self.low.shape[0]
        self.softness = torch.as_tensor(
            np.broadcast_to(np.asarray(softness, dtype=np.float64), size).copy()
        )
        self._components = _Components(self.low, self.high, self.softness)
        used = self.softness[self._components.box]
        if not bool(((used > 0) & torch.isfinite(used)).all()):
            raise ValueError(f"softness is {used.tolist()}; it must be positive and finite")
        self._converted = {(torch.device("cpu"), torch.float64): self._components}
        self._bounds: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._quantiles: dict[torch.device, SoftQuantile] = {}

    def _on(self, device: torch.device, dtype: torch.dtype = torch.float64) -> _Components:
        if (device, dtype) not in self._converted:
            self._converted[device, dtype] = self._components.to(device, dtype)
        return self._converted[device, dtype]

    def _representable(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if (device, dtype) not in self._bounds:
            self._bounds[device, dtype] = self._on(device).representable_bounds(dtype)
        return self._bounds[device, dtype]

    def _quantile(self, device: torch.device) -> SoftQuantile:
        if device not in self._quantiles:
            cpu = torch.device("cpu")
            if cpu not in self._quantiles:
                self._quantiles[cpu] = SoftQuantile(self._components.softness)
            self._quantiles[device] = self._quantiles[cpu].to(device)
        return self._quantiles[device]

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
        """Read what :meth:`to_data` gave.

        Raises:
            ValueError, TypeError, LookupError or ArithmeticError: it is no such data.
        """
        low = [-math.inf if b is None else _number(b) for b in data["low"]]
        high = [math.inf if b is None else _number(b) for b in data["high"]]
        softness = [_number(s) for s in data["softness"]]
        if not len(low) == len(high) == len(softness):
            raise ValueError("bounds and softness of the support are of different lengths")
        made = cls(np.array(low), np.array(high), np.array(softness))
        first, last = made._representable(torch.device("cpu"), torch.float32)
        if not bool((first < last).all() and torch.isfinite(made._components.width).all()):
            raise ValueError("a lower bound of the support is not below the upper one")
        # The table of a softness far from these has rows without number, or none.
        used = made._components.softness
        if not bool(((used >= _LEAST_SOFTNESS) & (used <= _LARGEST_SOFTNESS)).all()):
            raise ValueError("a softness is not in its range")
        return made

    def contains(self, theta: Tensor) -> Tensor:
        """Whether theta (..., D) lies in the support, bool of shape (...)."""
        on = self._on(theta.device)
        inside = (theta >= on.low) & (theta <= on.high)
        return inside.all(-1)

    def unconstrain(self, theta: Tensor) -> Tensor:
        """z of theta (..., D), float64. Points on an edge go to the nearest finite image."""
        theta = theta.to(torch.float64)
        on = self._on(theta.device)
        if on.only_box:
            return self._quantile(theta.device)(((theta - on.low) / on.width).clamp(0.0, 1.0))
        z = theta.clone()
        if on.box.numel():
            unit = (theta[..., on.box] - on.low[on.box]) / on.width
            z[..., on.box] = self._quantile(theta.device)(unit.clamp(0.0, 1.0))
        if on.above.numel():
            distance = theta[..., on.above] - on.low[on.above]
            z[..., on.above] = distance.clamp_min(_TINY).log()
        if on.below.numel():
            distance = on.high[on.below] - theta[..., on.below]
            z[..., on.below] = -distance.clamp_min(_TINY).log()
        return z

    def constrain(self, z: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """theta of z (..., D), in ``dtype`` (default z's); always inside the support's closure.

        Computed in z's dtype, float32 or float64. The distance from the nearer edge has that
        dtype's relative precision.
        """
        dtype = dtype or z.dtype
        on = self._on(z.device, z.dtype)
        if on.only_box:
            theta = on.of_box(z)
        else:
            theta = z.clone()
        if on.box.numel() and not on.only_box:
            theta[..., on.box] = on.of_box(z[..., on.box])
        if on.above.numel():
            theta[..., on.above] = on.low[on.above] + z[..., on.above].exp()
        if on.below.numel():
            theta[..., on.below] = on.high[on.below] - (-z[..., on.below]).exp()
        return theta.to(dtype).clamp(*self._representable(z.device, dtype))

    def log_det(self, z: Tensor) -> Tensor:
        """log |d theta / d z| summed over components, float64 of shape (...)."""
        z = z.to(torch.float64)
        on = self._on(z.device)
        total = torch.zeros(z.shape[:-1], dtype=torch.float64, device=z.device)
        if on.box.numel():
            soft = soft_log_density(z if on.only_box else z[..., on.box], on.softness)
            total = total + (on.width.log() + soft).sum(-1)
        if on.above.numel():
            total = total + z[..., on.above].sum(-1)
        if on.below.numel():
            total = total - z[..., on.below].sum(-1)
        return total


class _Components:
    """The bounds, and which components have two, one or none, on one device."""

    def __init__(self, low: Tensor, high: Tensor, softness: Tensor) -> None:
        has_low, has_high = torch.isfinite(low), torch.isfinite(high)
        self.low, self.high = low, high
        self.box = torch.nonzero(has_low & has_high).squeeze(-1)
        self.above = torch.nonzero(has_low & ~has_high).squeeze(-1)
        self.below = torch.nonzero(~has_low & has_high).squeeze(-1)
        self.only_box = len(self.box) == len(low)
        # Of the components with two bounds alone.
        self.width, self.softness = (high - low)[self.box], softness[self.box]

    def to(self, device: torch.device, dtype: torch.dtype) -> _Components:
        moved = _Components.__new__(_Components)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                value = value.to(device, dtype if value.is_floating_point() else None)
            setattr(moved, name, value)
        return moved

    def of_box(self, z: Tensor) -> Tensor:
        """theta of the components with two bounds, from the edge that is nearer."""
        distance = self.width * soft_tail(z, self.softness)
        return torch.where(z > 0, self.high[self.box] - distance, self.low[self.box] + distance)

    def representable_bounds(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The outermost finite numbers of a dtype inside the support."""
        low, high = self.low.to(dtype), self.high.to(dtype)
        inf = torch.full_like(low, math.inf)
        low = torch.where(low.to(torch.float64) < self.low, low.nextafter(inf), low)
        high = torch.where(high.to(torch.float64) > self.high, high.nextafter(-inf), high)
        largest = torch.finfo(dtype).max
        return low.clamp_min(-largest), high.clamp_max(largest)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a bound or a softness is of type {type(value).__name__}")
    return float(value)


_TINY = 1e-300
_LEAST_SOFTNESS, _LARGEST_SOFTNESS = 1e-6, 1e6
