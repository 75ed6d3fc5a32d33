"""Embedding networks: from standardized x of some shape to a vector that conditions the flow."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from sbi_dist.errors import InputError
from sbi_dist.estimation.options import TrainOptions

__all__ = ["build_embedding"]


def build_embedding(options: TrainOptions, x_shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """The embedding net for x of ``x_shape`` and the length of its output.

    Raises:
        InputError: x has a shape that the chosen network can't take.
    """
    kind = options.embedding
    width, features = options.embedding_hidden, options.embedding_features
    size = math.prod(x_shape)
    if kind == "none":
        return _Flat(), size
    if kind == "fully_connected":
        return nn.Sequential(_Flat(), _mlp([size, width, width, features])), features
    if kind == "permutation_invariant":
        _need(kind, x_shape, len(x_shape) in (1, 2), "(trials,) or (trials, values)")
        return _DeepSet(x_shape[1] if len(x_shape) == 2 else 1, width, features), features
    if kind == "convolutional_1d":
        _need(kind, x_shape, len(x_shape) in (1, 2), "(length,) or (length, channels)")
        channels = x_shape[1] if len(x_shape) == 2 else 1
        return _Convolutional(nn.Conv1d, channels, x_shape[:1], width, features), features
    _need(kind, x_shape, len(x_shape) in (2, 3), "(height, width) or (channels, height, width)")
    channels = x_shape[0] if len(x_shape) == 3 else 1
    return _Convolutional(nn.Conv2d, channels, x_shape[-2:], width, features), features


def _need(kind: str, x_shape: tuple[int, ...], right: bool, allowed: str) -> None:
    if not right:
        raise InputError(
            f"train.embedding={kind} takes x of shape {allowed}, but x has shape {x_shape}"
        )


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class _Flat(nn.Module):
    """x as vectors. Unlike ``nn.Flatten`` also where x is a scalar."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1)


class _DeepSet(nn.Module):
    """Mean over trials of a network of each trial (Zaheer et al. 2017, arXiv:1703.06114)."""

    def __init__(self, values: int, width: int, features: int) -> None:
        super().__init__()
        self.values = values
        self.each = _mlp([values, width, width])
        self.all = _mlp([width, width, features])

    def forward(self, x: Tensor) -> Tensor:
        trials = x.reshape(len(x), -1, self.values)
        return self.all(self.each(trials).mean(dim=1))


class _Convolutional(nn.Module):
    """Strided convolutions until few places are left, then a fully connected network."""

    def __init__(
        self,
        convolution: type[nn.Conv1d] | type[nn.Conv2d],
        channels: int,
        places: tuple[int, ...],
        width: int,
        features: int,
    ) -> None:
        super().__init__()
        self.channels, self.places = channels, places
        layers: list[nn.Module] = []
        count, depth = channels, max(8, width // 4)
        remaining = places
        while max(remaining) > 4 and len(layers) < 12:
            layers += [convolution(count, depth, 5, stride=2, padding=2), nn.SiLU()]
            remaining = tuple((length + 1) // 2 for length in remaining)
            count, depth = depth, min(2 * depth, width)
        self.convolutions = nn.Sequential(*layers)
        self.head = _mlp([count * math.prod(remaining), width, features])

    def forward(self, x: Tensor) -> Tensor:
        if len(self.places) == 1:
            # A series comes as (length, channels); torch convolves (channels, length).
            x = x.reshape(len(x), self.places[0], self.channels).transpose(1, 2)
        else:
            x = x.reshape(len(x), self.channels, *self.places)
        return self.head(torch.flatten(self.convolutions(x), 1))
