"""A flow through nflows' own modules, behind the interface of a compiled one.

For layers that no step is written for: right, but as slow as nflows is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sbi_dist.posterior.sampler.step import Tile

__all__ = ["NflowsProgram", "NflowsRun"]


class NflowsProgram:
    """See :class:`sbi_dist.posterior.sampler.program.FlowProgram`; the condition is the context."""

    products = 0

    def __init__(self, transform: nn.Module, features: int, context: int) -> None:
        self._transform, self.features, self.condition_rows = (
            transform,
            features,
            context,
        )
        self.width = max(features, context)

    def conditions(self, context: Tensor) -> Tensor:
        return context.T

    def run(self, draws: int, observations: int, like: Tensor) -> NflowsRun:
        return NflowsRun(self._transform, Tile(self.features, draws, observations, like))


class NflowsRun:
    def __init__(self, transform: Any, tile: Tile) -> None:
        self._transform, self.tile = transform, tile
        used = tile.draws * tile.observations
        self._features, self._log_det = tile.features[:, :used], tile.log_det[:used]

    def given(self, conditions: Tensor) -> None:
        shape = (len(conditions), self.tile.draws, self.tile.observations)
        self._context = conditions.unsqueeze(1).expand(shape).reshape(len(conditions), -1).T

    def inverse(self, with_log_det: bool = False) -> None:
        u, log_det = self._transform.inverse(self._features.T, context=self._context)
        self._features.copy_(u.T)
        self._log_det.copy_(log_det)

    def forward(self) -> None:
        noise, log_det = self._transform(self._features.T, context=self._context)
        self._features.copy_(noise.T)
        self._log_det.copy_(log_det)
