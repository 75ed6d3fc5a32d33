"""The conditional affine layer, w = (u - m(c)) exp(a(c))."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sbi_dist.estimation.flow import ConditionalAffine
from sbi_dist.posterior.sampler.step import Tile, Unknown, with_bias

__all__ = ["AffineStep"]


class AffineStep:
    """Shift m and scale exp(a) depend on the observation alone: a draw costs one operation."""

    products = 0

    def __init__(self, layer: ConditionalAffine) -> None:
        network = layer.network
        plain = network.context_features is None and all(
            block.activation is F.relu and not block.use_batch_norm for block in network.blocks
        )
        if not plain:
            raise Unknown("an affine layer whose residual network is not a plain one")
        self._limit = layer._LIMIT
        self.features = layer.linear.out_features // 2
        self.condition_rows = 4 * self.features
        self.width = self.features
        self._linear, self._initial, self._final = (
            with_bias(each.weight, each.bias)
            for each in (layer.linear, network.initial_layer, network.final_layer)
        )
        self._blocks = [
            [with_bias(each.weight, each.bias) for each in block.linear_layers]
            for block in network.blocks
        ]

    def to(self, like: Tensor) -> None:
        self._linear, self._initial, self._final = (
            each.to(like) for each in (self._linear, self._initial, self._final)
        )
        self._blocks = [[each.to(like) for each in block] for block in self._blocks]

    def conditions(self, context: Tensor) -> Tensor:
        """m, exp(-a), exp(a) and a, of each feature.

        Features first: products of few rows the other way depend on where in the batch an
        observation is, in their last digits.
        """
        given = context.T.contiguous()
        hidden = _product(self._initial, given)
        for first, second in self._blocks:
            hidden = hidden + _product(second, _product(first, hidden.relu()).relu())
        shift, log_scale = (_product(self._linear, given) + _product(self._final, hidden)).chunk(2)
        log_scale = self._limit * torch.tanh(log_scale / self._limit)
        return torch.cat([shift, torch.exp(-log_scale), torch.exp(log_scale), log_scale])

    def bind(self, tile: Tile) -> _AffineRun:
        return _AffineRun(self, tile)


def _product(matrix: Tensor, given: Tensor) -> Tensor:
    return torch.addmm(matrix[:, -1:], matrix[:, :-1], given)


class _AffineRun:
    def __init__(self, step: AffineStep, tile: Tile) -> None:
        self._size, self._tile = step.features, tile
        self._values = tile.by_observation(tile.features)
        self._log_det = tile.by_observation(tile.log_det[None])[0]

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
