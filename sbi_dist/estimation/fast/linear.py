"""LU-decomposed linear layers of nflows, all of a flow at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from nflows.transforms import LULinear
from torch import Tensor
from torch.nn import functional as F

from sbi_dist.estimation.fast.layout import Layout

__all__ = ["LinearLayers"]

Saved = tuple[Tensor, Tensor]  # diagonals (T, D) and upper triangles (T, D, D)


class LinearLayers:
    """T layers v -> L U v + b, where L has a unit diagonal and U a positive one.

    Args:
        layers: of the same number of features.
        layout: the weights' places are added to it.
    """

    def __init__(self, layers: Sequence[LULinear], layout: Layout) -> None:
        features, self.eps = layers[0].features, layers[0].eps
        lower = np.full((len(layers), features, features), -1)
        upper = lower.copy()
        for number, layer in enumerate(layers):
            lower[number][layer.lower_indices] = layout.of(layer.lower_entries)
            upper[number][layer.upper_indices] = layout.of(layer.upper_entries)
        layout.add("lower", lower, constants=np.eye(features))
        layout.add("upper", upper)
        layout.add(
            "diagonal", np.stack([layout.of(layer.unconstrained_upper_diag) for layer in layers])
        )
        layout.add("linear_bias", np.stack([layout.of(layer.bias)[:, None] for layer in layers]))

    def forward(self, weights: dict[str, Tensor], out: Tensor) -> tuple[Tensor, Saved]:
        """Write the matrices (T, D, D); the sum () of their log-determinants, and what is saved."""
        diagonal = F.softplus(weights["diagonal"]).add_(self.eps)
        upper = weights["upper"].clone()
        upper.diagonal(dim1=1, dim2=2).copy_(diagonal)
        torch.bmm(weights["lower"], upper, out=out)
        return diagonal.log().sum(), (diagonal, upper)

    def backward(
        self,
        weights: dict[str, Tensor],
        grad: Tensor,
        grad_log_det: Tensor,
        saved: Saved,
        into: dict[str, Tensor],
    ) -> None:
        """Write the weights' gradients, from those of the matrices and of the log-determinants."""
        diagonal, upper = saved
        torch.bmm(grad, upper.transpose(1, 2), out=into["lower"])
        torch.bmm(weights["lower"].transpose(1, 2), grad, out=into["upper"])
        by_diagonal = into["upper"].diagonal(dim1=1, dim2=2) + grad_log_det / diagonal
        torch.mul(by_diagonal, torch.sigmoid(weights["diagonal"]), out=into["diagonal"])
