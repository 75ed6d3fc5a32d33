"""The conditional affine layer, w = (u - m(c)) exp(a(c))."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from sbi_dist.estimation.flow import ConditionalAffine
from sbi_dist.posterior.sampler.step import Tile

__all__ = ["AffineStep"]


class AffineStep:
    """Shift m and scale exp(a) depend on the observation alone: a draw costs one operation."""

    products = 0

    def __init__(self, layer: ConditionalAffine) -> None:
        self._layer = layer
        self.features = layer.linear.out_features // 2
        self.condition_rows = 4 * self.features
        self.width = self.features

    def to(self, like: Tensor) -> None:
        # The layer is the estimator's own.
        self._layer = copy.deepcopy(self._layer).to(like)

    def conditions(self, context: Tensor) -> Tensor:
        """m, exp(-a), exp(a) and a, of each feature."""
        shift, log_scale = self._layer._shift_and_log_scale(context)
        parts = [shift, torch.exp(-log_scale), torch.exp(log_scale), log_scale]
        return torch.cat(parts, dim=1).T

    def bind(self, tile: Tile) -> _AffineRun:
        return _AffineRun(self, tile)


class _AffineRun:
    def __init__(self, step: AffineStep, tile: Tile) -> None:
        self._size, self._tile = step.features, tile
        self._values = tile.by_observation(tile.features)
        self._log_det = tile.log_det.view(tile.draws, tile.observations)

    def given(self, conditions: Tensor) -> None:
        parts = conditions.unsqueeze(1).split(self._size)
        self._shift, self._shrink, self._scale, self._log_scale = parts

    def inverse(self, with_log_det: bool) -> None:
        torch.addcmul(self._shift, self._values, self._shrink, out=self._values)
        if with_log_det:
            self._log_det.sub_(self._log_scale.sum(0))

    def forward(self) -> None:
        self._values.sub_(self._shift).mul_(self._scale)
        self._log_det.add_(self._log_scale.sum(0))
