"""An ensemble: the equal mixture of density estimators trained from different seeds.

The mixture is wider where its members disagree, so that it is less overconfident than any one of
them (Hermans et al. 2022, arXiv:2110.06581).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sbi_dist.errors import InputError
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.options import TrainOptions

__all__ = ["Ensemble", "Estimator"]


class Ensemble(nn.Module):
    """q(theta | x) = mean over K members of q_k(theta | x); as a :class:`DensityEstimator`.

    Args:
        members: estimators of one problem: same x_shape and same support. Their architectures
            and standardizations are their own.

    Raises:
        InputError: no members, or members of different problems.
    """

    def __init__(self, members: Sequence[Estimator]) -> None:
        super().__init__()
        self.members: tuple[DensityEstimator, ...] = _checked(members)
        self._members = nn.ModuleList(self.members)
        first, count = self.members[0], len(self.members)
        self.options: TrainOptions = dataclasses.replace(first.options, ensemble=count)
        self.x_shape = first.x_shape
        # A normal number is below the k-th of these with probability k / K.
        steps = torch.arange(1, count, dtype=torch.float64) / count
        self._thresholds = torch.special.ndtri(steps).float()
        with torch.no_grad():
            x = torch.zeros(1, *self.x_shape)
            self._widths = [member.embed(x).shape[1] for member in self.members]

    @property
    def num_parameters(self) -> int:
        """D."""
        return self.members[0].num_parameters

    @property
    def num_weights(self) -> int:
        """Trainable numbers of all members."""
        return sum(member.num_weights for member in self.members)

    @property
    def noise_size(self) -> int:
        """D + 1: the last number chooses the member."""
        return self.num_parameters + 1

    @property
    def support(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of theta, float64 of shape (D,) each; may be infinite."""
        return self.members[0].support

    def embed(self, x: Tensor) -> Tensor:
        """Context vectors of observations x (B, *x_shape): all members', side by side."""
        return torch.cat([member.embed(x) for member in self.members], dim=1)

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        """log q(theta | x), shape (N,), float32; -inf outside the support.

        Args:
            theta: (N, D).
            x: (N, *x_shape).
        """
        return self.log_prob_given_context(theta, self.embed(x))

    def log_prob_given_context(self, theta: Tensor, context: Tensor) -> Tensor:
        """As :meth:`log_prob`, with x already embedded."""
        each = [
            member.log_prob_given_context(theta, part)
            for member, part in zip(self.members, self._parts(context), strict=True)
        ]
        return torch.logsumexp(torch.stack(each), dim=0) - math.log(len(each))

    def chosen(self, noise: Tensor) -> Tensor:
        """Number of the member that each standard normal number chooses, of the same shape."""
        return torch.bucketize(noise.contiguous(), self._thresholds.to(noise.device))

    def _parts(self, context: Tensor) -> tuple[Tensor, ...]:
        """Each member's part of the context."""
        return context.split(self._widths, dim=1)

    # ---- in coordinates without bounds: the first member's ----

    def unconstrained(self, theta: Tensor) -> Tensor:
        """u of theta (N, D): coordinates on R^D, with sd 1 under the prior, float32."""
        return self.members[0].unconstrained(theta)

    def constrained(self, u: Tensor) -> Tensor:
        """theta (N, D), float32, inside the support; the inverse of :meth:`unconstrained`."""
        return self.members[0].constrained(u)

    def log_prob_unconstrained(self, u: Tensor, context: Tensor) -> Tensor:
        """log q(theta | x), a density over theta, at theta of u (N, D); for gradients by u."""
        standardization = self.members[0].standardization
        z = u.double() * standardization.theta_sd + standardization.theta_mean
        # In float64: float32 has too few numbers at an edge to tell how far theta is from it.
        return self.log_prob_given_context(standardization.bijection.constrain(z), context)


Estimator = DensityEstimator | Ensemble
"""What a posterior is made of."""


def _checked(members: Sequence[Estimator]) -> tuple[DensityEstimator, ...]:
    checked: list[DensityEstimator] = []
    for number, member in enumerate(members):
        if not isinstance(member, DensityEstimator):
            raise InputError(
                f"member {number} of an ensemble is a {type(member).__name__}; it must be a "
                "DensityEstimator (combine the members of ensembles, not the ensembles)"
            )
        first = checked[0] if checked else member
        if member.x_shape != first.x_shape:
            raise InputError(
                f"member {number} of an ensemble takes x of shape {member.x_shape}, member 0 of "
                f"shape {first.x_shape}; combine estimators of one problem"
            )
        bounds = zip(member.support, first.support, strict=True)
        if not all(torch.equal(mine, theirs) for mine, theirs in bounds):
            raise InputError(
                f"member {number} of an ensemble has another support of theta than member 0; "
                "combine estimators trained under one prior"
            )
        checked.append(member)
    if not checked:
        raise InputError("an ensemble has no members; give one or more density estimators")
    return tuple(checked)
