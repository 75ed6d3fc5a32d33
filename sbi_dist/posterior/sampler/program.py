"""A trained flow compiled for sampling: which steps, on which weights, in which order.

nflows' layers are turned into a short list of steps with the same weights and the same result.
Every step works on a tile: an array (features, K, M) of K draws for each of M observations, with
the features first, so that every operation runs over contiguous memory. What depends on the
observation alone is computed once for each observation (:meth:`FlowProgram.conditions`); a tile
only reads it. Orders of features, permutations and linear layers between two networks are one
small matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from nflows import transforms
from torch import Tensor, nn

from sbi_dist.estimation.flow import ConditionalAffine
from sbi_dist.posterior.sampler.affine import AffineStep
from sbi_dist.posterior.sampler.autoregressive import AutoregressiveStep
from sbi_dist.posterior.sampler.coupling import CouplingStep
from sbi_dist.posterior.sampler.linear import LinearStep, linear_step
from sbi_dist.posterior.sampler.step import Run, Step, Tile

__all__ = ["FlowProgram", "FlowRun", "compile_flow", "flattened"]


def compile_flow(transform: nn.Module, features: int) -> FlowProgram:
    """The program of a flow's transform, with its weights as they are now.

    Args:
        transform: of nflows, from u to noise given a context.
        features: D.

    Raises:
        Unknown: it has a layer that there is no step for; says which.
    """
    steps: list[Step] = []
    for layer in flattened(transform):
        if isinstance(layer, ConditionalAffine):
            steps.append(AffineStep(layer))
        elif isinstance(layer, transforms.PiecewiseRationalQuadraticCouplingTransform):
            coupling = CouplingStep(layer)
            # The features that are transformed come last inside.
            order = LinearStep.of_order(coupling.order)
            steps += [order, coupling, order.inverted()]
        elif isinstance(layer, transforms.MaskedAffineAutoregressiveTransform):
            steps.append(AutoregressiveStep(layer))
        else:
            steps.append(linear_step(layer, features))
    return FlowProgram(_merged(steps), features)


def flattened(transform: nn.Module) -> list[nn.Module]:
    """The layers of a transform that may be composed of others, in order."""
    if isinstance(transform, transforms.CompositeTransform):
        return [layer for each in transform._transforms for layer in flattened(each)]
    return [transform]


def _merged(steps: Sequence[Step]) -> list[Step]:
    """Neighbouring linear steps as one, and none where it does nothing."""
    merged: list[Step] = []
    for step in steps:
        if isinstance(step, LinearStep) and merged and isinstance(merged[-1], LinearStep):
            merged[-1] = merged[-1].then(step)
        else:
            merged.append(step)
    return [step for step in merged if not (isinstance(step, LinearStep) and step.is_identity)]


class FlowProgram:
    """The steps of one flow, from u to noise.

    Attributes:
        steps: in the order from u to noise; sampling goes through them backwards.
        products: multiplications in the networks' matrix products for one draw.
        width: rows of the largest array that a tile needs.
    """

    def __init__(self, steps: Sequence[Step], features: int) -> None:
        self.steps, self.features = list(steps), features
        self.products = sum(step.products for step in self.steps)
        self.width = max([features, *(step.width for step in self.steps)])
        self._rows = [step.condition_rows for step in self.steps]
        self.condition_rows = sum(self._rows)

    def to(self, like: Tensor) -> FlowProgram:
        """The program in the dtype and on the device of ``like``."""
        for step in self.steps:
            step.to(like)
        return self

    @torch.no_grad()
    def conditions(self, context: Tensor) -> Tensor:
        """All that the steps need of the observations: (rows, B) of contexts (B, C)."""
        return torch.cat([step.conditions(context) for step in self.steps if step.condition_rows])

    def run(self, draws: int, observations: int, like: Tensor) -> FlowRun:
        """Memory and views for tiles of K draws for each of M observations."""
        return FlowRun(self, Tile(self.features, draws, observations, like))


class FlowRun:
    """A program bound to the memory of one tile; to be used by one thread at a time."""

    def __init__(self, program: FlowProgram, tile: Tile) -> None:
        self.tile = tile
        self._rows = program._rows
        self._runs: list[Run] = [step.bind(tile) for step in program.steps]

    def given(self, conditions: Tensor) -> None:
        """Take the observations of the tiles to come: their conditions (rows, M)."""
        for run, part in zip(self._runs, conditions.split(self._rows), strict=True):
            run.given(part)

    def inverse(self, with_log_det: bool = False) -> None:
        """Turn the tile's noise into u.

        ``tile.log_det`` (N,) is log |d u / d noise| then, where it is asked for.
        """
        if with_log_det:
            self.tile.log_det.zero_()
        for run in reversed(self._runs):
            run.inverse(with_log_det)

    def forward(self) -> None:
        """Turn the tile's u into noise; ``tile.log_det`` (N,) is log |d noise / d u| then."""
        self.tile.log_det.zero_()
        for run in self._runs:
            run.forward()
