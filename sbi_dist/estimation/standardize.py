"""What is between the scientist's numbers and the network's: scales of theta and x.

x goes to a scale (linear, log or asinh) and then to mean 0 and sd 1 in each component. theta goes
through the prior's bijection to R^D and then to mean 0 and sd 1. All of it is fitted to the
training simulations and kept in the bundle as plain numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbi_dist.bijection import SupportBijection, matched_softness

__all__ = ["Standardization"]


@dataclasses.dataclass
class Standardization:
    """The maps theta <-> u and x -> standardized x.

    Attributes:
        bijection: between the prior's support and R^D.
        theta_mean, theta_sd: of the bijection's image, float64 of shape (D,).
        x_scale: ``linear``, ``log`` or ``asinh``.
        x_low, x_centre, x_width: for log, the smallest x seen; for asinh, median and
            interquartile range; shape x_shape, float64.
        x_mean, x_sd: of x on its scale, shape x_shape, float64.
    """

    bijection: SupportBijection
    theta_mean: Tensor
    theta_sd: Tensor
    x_scale: str
    x_low: Tensor
    x_centre: Tensor
    x_width: Tensor
    x_mean: Tensor
    x_sd: Tensor

    @classmethod
    def fit(
        cls, theta: np.ndarray, x: np.ndarray, low: np.ndarray, high: np.ndarray, x_scale: str
    ) -> Standardization:
        """Fit to training simulations: theta (N, D), x (N, *x_shape), bounds of the support."""
        values = torch.from_numpy(x.astype(np.float64))
        centre = values.median(0).values
        quartiles = torch.from_numpy(np.quantile(x.astype(np.float64), [0.25, 0.75], axis=0))
        width = quartiles[1] - quartiles[0]
        width = torch.where(width > 0, width, torch.ones_like(width))
        fitted = cls(
            bijection=SupportBijection(low, high, 0.2),
            theta_mean=torch.zeros(theta.shape[1], dtype=torch.float64),
            theta_sd=torch.ones(theta.shape[1], dtype=torch.float64),
            x_scale=choose_scale(x) if x_scale == "auto" else x_scale,
            x_low=values.clamp_min(torch.finfo(torch.float32).tiny).min(0).values,
            x_centre=centre,
            x_width=width,
            x_mean=torch.zeros_like(centre),
            x_sd=torch.ones_like(centre),
        )
        scaled = fitted._scaled(values)
        fitted.x_mean, fitted.x_sd = (
            scaled.mean(0),
            _positive(scaled.std(0, correction=0), scaled.mean(0)),
        )
        residual = _residual_sd(theta, fitted.x(torch.from_numpy(x)).double())
        fitted.bijection = SupportBijection(low, high, matched_softness(residual, low, high))
        z = fitted.bijection.unconstrain(torch.from_numpy(theta))
        fitted.theta_mean, fitted.theta_sd = z.mean(0), _positive(z.std(0, correction=0), z.mean(0))
        return fitted

    def _scaled(self, x: Tensor) -> Tensor:
        if self.x_scale == "log":
            return torch.maximum(x, self.x_low).log()
        if self.x_scale == "asinh":
            return torch.asinh((x - self.x_centre) / self.x_width)
        return x

    def x(self, x: Tensor) -> Tensor:
        """Standardized x, float32, for x (N, *x_shape) of any real dtype."""
        return ((self._scaled(x.double()) - self.x_mean) / self.x_sd).float()

    def u(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """u (N, D) float32 and log |d u / d theta| (N,) float64 for theta (N, D) in the support."""
        z = self.bijection.unconstrain(theta)
        u = (z - self.theta_mean) / self.theta_sd
        return u.float(), -(self.bijection.log_det(z) + self.theta_sd.log().sum())

    def theta(self, u: Tensor) -> Tensor:
        """theta (..., D) float32, inside the support, for u (..., D)."""
        z = u.double() * self.theta_sd + self.theta_mean
        return self.bijection.constrain(z, torch.float32)

    def to_data(self) -> dict[str, Any]:
        """JSON-ready data; :meth:`from_data` is the inverse."""
        data: dict[str, Any] = {"bijection": self.bijection.to_data(), "x_scale": self.x_scale}
        for name in _TENSORS:
            data[name] = getattr(self, name).tolist()
        return data

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Standardization:
        tensors = {name: torch.tensor(data[name], dtype=torch.float64) for name in _TENSORS}
        return cls(
            bijection=SupportBijection.from_data(data["bijection"]),
            x_scale=data["x_scale"],
            **tensors,
        )


_TENSORS = ("theta_mean", "theta_sd", "x_low", "x_centre", "x_width", "x_mean", "x_sd")


def choose_scale(x: np.ndarray) -> str:
    """The scale on which x (N, *x_shape) is closest to well-behaved.

    Log where all of x is positive and its central 98 % spans more than a factor of 100 in half of
    the components; asinh where the 99 % range is over 20 times the interquartile range in half of
    the components; else linear.
    """
    flat = x.reshape(len(x), -1).astype(np.float64)
    q005, q01, q25, q75, q99, q995 = np.quantile(
        flat, [0.005, 0.01, 0.25, 0.75, 0.99, 0.995], axis=0
    )
    if flat.min() > 0 and np.median(q99 / q01) > 100:
        return "log"
    spread = np.maximum(q75 - q25, np.finfo(np.float32).tiny)
    if np.median((q995 - q005) / spread) > 20:
        return "asinh"
    return "linear"


def _positive(sd: Tensor, mean: Tensor) -> Tensor:
    """Standard deviations to divide by: a component constant to float32 rounding is left alone."""
    return torch.where(sd > 1e-7 * mean.abs(), sd, torch.ones_like(sd))


def _residual_sd(theta: np.ndarray, x: Tensor) -> np.ndarray:
    """Standard deviation of theta about its linear regression on x, shape (D,)."""
    flat = x.reshape(len(x), -1)
    centred = torch.from_numpy(theta.astype(np.float64))
    centred = centred - centred.mean(0)
    gram = flat.T @ flat + 1e-6 * len(x) * torch.eye(flat.shape[1], dtype=torch.float64)
    residual = centred - flat @ torch.linalg.solve(gram, flat.T @ centred)
    return residual.std(0).numpy()
