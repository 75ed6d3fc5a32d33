"""Spline coupling layers: a residual network of some features gives the splines of the others."""

from __future__ import annotations

import torch
from nflows.nn.nets import ResidualNet
from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform
from torch import Tensor
from torch.nn import functional as F

from sbi_dist.posterior.sampler.spline import Spline, SplineRun
from sbi_dist.posterior.sampler.step import Tile, Unknown, with_bias

__all__ = ["CouplingStep"]


class CouplingStep:
    """One coupling layer, with its features in an order of its own.

    What the context adds to the network's first layer, and the gates of its blocks, are computed
    once for each observation.

    Attributes:
        order: features of the layer in the step's order; those that are transformed come last.
    """

    def __init__(self, layer: PiecewiseRationalQuadraticCouplingTransform) -> None:
        network = layer.transform_net
        if (
            not isinstance(network, ResidualNet)
            or network.context_features is None
            or layer.tails != "linear"
            or layer.unconditional_transform is not None
        ):
            raise Unknown("a spline coupling without linear tails or without a residual network")
        for block in network.blocks:
            if block.use_batch_norm or block.activation is not F.relu:
                raise Unknown("a residual network with batch norm or without ReLU")
        fixed, moved = (
            layer.identity_features.tolist(),
            layer.transform_features.tolist(),
        )
        self.order = [*fixed, *moved]
        self.fixed, self.moved = len(fixed), len(moved)
        self.hidden, self.blocks = network.hidden_features, len(network.blocks)
        self.spline = Spline(
            layer.num_bins,
            layer.tail_bound,
            (layer.min_bin_width, layer.min_bin_height, layer.min_derivative),
        )
        first = network.initial_layer.weight.detach()
        # Given the features as they are, and one: the last column is the observation's.
        self._initial = first[:, : self.fixed].contiguous()
        contexts = [
            first[:, self.fixed :],
            *(each.context_layer.weight for each in network.blocks),
        ]
        biases = [
            network.initial_layer.bias,
            *(each.context_layer.bias for each in network.blocks),
        ]
        self._context = with_bias(torch.cat(contexts), torch.cat(biases))
        self.condition_rows = len(self._context)
        self._layers = [
            with_bias(each.weight, each.bias)
            for block in network.blocks
            for each in block.linear_layers
        ]
        self._final = self.spline.arranged(
            with_bias(network.final_layer.weight, network.final_layer.bias),
            self.moved,
            network.hidden_features,
        )
        self.width = max(self.hidden, len(self._final))
        self.products = (
            self.hidden * self.fixed
            + 2 * self.blocks * self.hidden**2
            + self.hidden * len(network.final_layer.bias)
        )

    def to(self, like: Tensor) -> None:
        self._initial, self._context, self._final = (
            each.to(like) for each in (self._initial, self._context, self._final)
        )
        self._layers = [each.to(like) for each in self._layers]
        self.spline.to(like)

    def conditions(self, context: Tensor) -> Tensor:
        rows = torch.addmm(self._context[:, -1:], self._context[:, :-1], context.T)
        rows[self.hidden :].sigmoid_()
        return rows

    def bind(self, tile: Tile) -> _CouplingRun:
        return _CouplingRun(self, tile)


class _CouplingRun:
    def __init__(self, step: CouplingStep, tile: Tile) -> None:
        self._step, hidden = step, step.hidden
        self._one = tile.apart
        self._tile = tile
        self._fixed = tile.features[: step.fixed]
        self._hidden_one, self._first_one, self._second_one = (
            tile.with_ones(name, hidden + 1, -1) for name in ("hidden", "first", "second")
        )
        self._hidden, self._first, self._second = (
            memory[:-1] for memory in (self._hidden_one, self._first_one, self._second_one)
        )
        self._hidden_by, self._first_by = map(tile.by_observation, (self._hidden, self._first))
        self._parameters = tile.space("parameters", len(step._final), tile.count)
        self._spline = SplineRun(step.spline, tile.features[step.fixed :], self._parameters, tile)

    def given(self, conditions: Tensor) -> None:
        step = self._step
        base, *gates = conditions.split(step.hidden)
        firsts, seconds = step._layers[::2], step._layers[1::2]
        if self._one:
            # A gate is a factor of a row of the matrix before it.
            seconds = [gate * matrix for gate, matrix in zip(gates, seconds, strict=True)]
        else:
            base, gates = base.unsqueeze(1), [gate.unsqueeze(1) for gate in gates]
        self._base = base
        self._blocks = list(zip(firsts, seconds, gates, strict=True))

    def _network(self) -> None:
        """The splines' parameters, of the features that stay."""
        step = self._step
        if not step.fixed:
            self._hidden_by.copy_(self._base.view(step.hidden, 1, -1).expand_as(self._hidden_by))
        elif self._one:
            torch.addmm(self._base, step._initial, self._fixed, out=self._hidden)
        else:
            torch.mm(step._initial, self._fixed, out=self._hidden)
            self._hidden_by.add_(self._base)
        for first, second, gate in self._blocks:
            torch.clamp_min(self._hidden, 0, out=self._first)
            torch.mm(first, self._first_one, out=self._second)
            self._second.relu_()
            if self._one:
                self._hidden.addmm_(second, self._second_one)
            else:
                torch.mm(second, self._second_one, out=self._first)
                self._hidden_by.addcmul_(self._first_by, gate)
        torch.mm(step._final, self._hidden_one, out=self._parameters)

    def inverse(self, with_log_det: bool) -> None:
        self._network()
        self._spline.inverse(with_log_det)

    def forward(self) -> None:
        self._network()
        self._spline.forward()
