"""The fitted density estimator q(theta | x): a flow between standardizations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.standardize import Standardization

__all__ = ["DensityEstimator"]


class DensityEstimator(nn.Module):
    """q(theta | x), a normalized density over the prior's support.

    Args:
        options: the flow's architecture.
        standardization: maps of theta and x to the network's scales.
        x_shape: shape of one x.
    """

    def __init__(
        self, options: TrainOptions, standardization: Standardization, x_shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.options, self.standardization, self.x_shape = options, standardization, tuple(x_shape)
        self.flow = ConditionalFlow(options, standardization.bijection.size, self.x_shape)

    @property
    def num_parameters(self) -> int:
        """D."""
        return self.flow.features

    @property
    def num_weights(self) -> int:
        """Trainable numbers."""
        return sum(weight.numel() for weight in self.flow.parameters())

    @property
    def support(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of theta, float64 of shape (D,) each; may be infinite."""
        return self.standardization.bijection.low, self.standardization.bijection.high

    def embed(self, x: Tensor) -> Tensor:
        """Context vectors (B, C) of observations x (B, *x_shape)."""
        return self.flow.embedding(self.standardization.x(x))

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        """log q(theta | x), shape (N,), float32; -inf outside the support.

        Args:
            theta: (N, D).
            x: (N, *x_shape).
        """
        return self.log_prob_given_context(theta, self.embed(x))

    def log_prob_given_context(self, theta: Tensor, context: Tensor) -> Tensor:
        """As :meth:`log_prob`, with x already embedded (N, C)."""
        u, log_det = self.standardization.u(theta)
        log_q = self.flow.log_prob(u, context) + log_det.float()
        inside = self.standardization.bijection.contains(theta.double())
        return torch.where(inside, log_q, torch.full_like(log_q, -torch.inf))

    def push(self, noise: Tensor, context: Tensor) -> Tensor:
        """theta (N, D) in the support from standard normal noise (N, D) and context (N, C)."""
        return self.standardization.theta(self.flow.push(noise, context))

    # ---- in coordinates without bounds ----

    def unconstrained(self, theta: Tensor) -> Tensor:
        """u of theta (N, D): coordinates on R^D, with sd 1 under the prior, float32."""
        return self.standardization.u(theta)[0]

    def constrained(self, u: Tensor) -> Tensor:
        """theta (N, D), float32, inside the support; the inverse of :meth:`unconstrained`."""
        return self.standardization.theta(u)

    def log_prob_unconstrained(self, u: Tensor, context: Tensor) -> Tensor:
        """log q(theta | x), a density over theta, at theta of u (N, D); for gradients by u."""
        standardization = self.standardization
        z = u.double() * standardization.theta_sd + standardization.theta_mean
        log_det = standardization.bijection.log_det(z) + standardization.theta_sd.log().sum()
        return self.flow.flow.log_prob(u, context) - log_det
