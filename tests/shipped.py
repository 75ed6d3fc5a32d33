"""A flow of nflows' own modules, unmodified, for tests and benchmarks to compare with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from nflows.nn.nets import ResidualNet
from nflows.transforms import LULinear, PiecewiseRationalQuadraticCouplingTransform
from torch import nn

from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.spline import FastLULinear, FastSplineCoupling

__all__ = ["as_shipped"]


def as_shipped(model: ConditionalFlow) -> nn.Module:
    """The same flow of nflows' unmodified classes, with the same weights."""
    flow = copy.deepcopy(model.flow)
    layers = flow._transform._transforms
    for number, layer in enumerate(layers):
        if isinstance(layer, FastLULinear):
            layers[number] = LULinear(layer.features)
        elif isinstance(layer, FastSplineCoupling):
            net = layer.transform_net
            block = net.blocks[0]
            mask = torch.zeros(layer.features)
            mask[layer.transform_features] = 1

            def network(inputs: int, outputs: int, net: Any = net, block: Any = block) -> nn.Module:
                return ResidualNet(
                    inputs,
                    outputs,
                    hidden_features=net.hidden_features,
                    context_features=net.context_features,
                    num_blocks=len(net.blocks),
                    dropout_probability=block.dropout.p,
                )

            layers[number] = PiecewiseRationalQuadraticCouplingTransform(
                mask, network, layer.num_bins, "linear", layer.tail_bound
            )
    like = next(model.parameters())
    flow = flow.to(like).train(model.training)
    flow.load_state_dict(model.flow.state_dict())
    kinds = {type(layer) for layer in layers}
    assert not kinds & {FastLULinear, FastSplineCoupling}
    return flow
