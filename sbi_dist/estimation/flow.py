"""The conditional normalizing flow q(u | x), built of nflows' layers.

u is the standardized image of theta in R^D (see ``standardize.py``). The first layer standardizes
u given x: ``w = (u - m(x)) exp(a(x))``, with m and a linear in the embedded x plus a residual
network that starts at zero. It is initialized by regression, so that training starts from the
linear-Gaussian regression of theta on x and every layer after it sees residuals of order one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from nflows import transforms
from nflows.nn.nets import ResidualNet
from torch import Tensor, nn

from sbi_dist.estimation.embedding import build_embedding
from sbi_dist.estimation.fast import FastLogProb, fast_log_prob
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.regression import ridge_regression
from sbi_dist.estimation.spline import FastLULinear, FastSplineCoupling

__all__ = ["ConditionalAffine", "ConditionalFlow"]


class ConditionalAffine(transforms.Transform):
    """w = (u - m(c)) exp(a(c)), with m and a from the context c of shape (N, C).

    |a| stays below 12, so that an x far from all training data gives a finite density.
    """

    _LIMIT = 12.0

    def __init__(self, features: int, context_features: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.linear = nn.Linear(context_features, 2 * features)
        self.network = ResidualNet(
            context_features, 2 * features, hidden_features=hidden, num_blocks=blocks
        )
        for layer in (self.linear, self.network.final_layer):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def initialize(self, u: Tensor, context: Tensor) -> None:
        """Set m to the linear regression of u on the context, a to the scale of its errors."""
        size = u.shape[1]
        slope, intercept, sd = ridge_regression(context, u)
        with torch.no_grad():
            self.linear.weight[:size] = slope.T.to(u)
            self.linear.bias[:size] = intercept.to(u)
            self.linear.bias[size:] = -sd.clamp_min(1e-4).log().to(u)

    def _shift_and_log_scale(self, context: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = (self.linear(context) + self.network(context)).chunk(2, dim=-1)
        return shift, self._LIMIT * torch.tanh(log_scale / self._LIMIT)

    def forward(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._shift_and_log_scale(context)
        return (inputs - shift) * torch.exp(log_scale), log_scale.sum(-1)

    def inverse(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._shift_and_log_scale(context)
        return inputs * torch.exp(-log_scale) + shift, -log_scale.sum(-1)


class _ToNoise(nn.Module):
    """Layers that make standard normal noise of u; nflows' ``Flow``, with its names of the weights.

    Not that itself: importing it imports matplotlib, half a second of every process that draws.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self._transform = transforms.CompositeTransform(layers)

    def log_prob(self, u: Tensor, context: Tensor) -> Tensor:
        """log q(u | x), shape (N,), for u (N, D) and embedded x (N, C)."""
        noise, log_det = self._transform(u, context=context)
        log_z = 0.5 * u.shape[1] * math.log(2 * math.pi)
        return -0.5 * (noise**2).sum(1) - log_z + log_det


class ConditionalFlow(nn.Module):
    """q(u | x) on R^D.

    Args:
        options: estimator and its sizes.
        features: D.
        x_shape: shape of one x (standardized) that the embedding takes.
    """

    def __init__(self, options: TrainOptions, features: int, x_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.features = features
        self.embedding, context = build_embedding(options, x_shape)
        layers: list[nn.Module] = [
            ConditionalAffine(features, context, options.hidden_features, options.blocks)
        ]
        for number in range(options.transforms):
            if options.estimator == "maf":
                layers.append(_autoregressive(options, features, context))
                layers.append(transforms.ReversePermutation(features))
            else:
                layers.append(_spline_coupling(options, features, context, number))
                if features > 1:
                    layers.append(FastLULinear(features, identity_init=True))
        self.flow = _ToNoise(layers)
        self._fast: FastLogProb | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles prepare the fast computation for their own weights.
        return {**self.__dict__, "_fast": None}

    def initialize(self, u: Tensor, x: Tensor) -> None:
        """Start from the linear regression of u on the embedded x."""
        with torch.no_grad():
            self.flow._transform._transforms[0].initialize(u, self.embedding(x))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        """log q(u | x), shape (N,), for u (N, D) and x (N, *x_shape)."""
        return self.log_prob(u, self.embedding(x))

    def log_prob(self, u: Tensor, context: Tensor) -> Tensor:
        """log q(u | x), shape (N,), for u (N, D) and embedded x (N, C).

        The same as ``flow.log_prob``, of nflows' layers, to rounding; differentiable once.
        """
        if self._fast is None:
            self._fast = fast_log_prob(self)
        return self._fast(u, context)

    def push(self, noise: Tensor, context: Tensor) -> Tensor:
        """u (N, D) from standard normal noise (N, D) and embedded x (N, C)."""
        return self.flow._transform.inverse(noise, context=context)[0]


def _spline_coupling(
    options: TrainOptions, features: int, context: int, number: int
) -> FastSplineCoupling:
    def network(inputs: int, outputs: int) -> ResidualNet:
        return ResidualNet(
            inputs,
            outputs,
            hidden_features=options.hidden_features,
            context_features=context,
            num_blocks=options.blocks,
            dropout_probability=options.dropout,
        )

    # With one parameter there is nothing to condition on but x.
    mask = [1] if features == 1 else [(i + number) % 2 for i in range(features)]
    layer = FastSplineCoupling(
        mask=mask,
        transform_net_create_fn=network,
        num_bins=options.bins,
        tails="linear",
        tail_bound=options.tail_bound,
    )
    # Start as the identity: equal bins and slopes of one.
    final = layer.transform_net.final_layer
    nn.init.zeros_(final.weight)
    nn.init.zeros_(final.bias)
    slopes = final.bias.data.view(-1, 3 * options.bins - 1)[:, 2 * options.bins :]
    slopes.fill_(math.log(math.expm1(1 - 1e-3)))
    return layer


def _autoregressive(options: TrainOptions, features: int, context: int) -> nn.Module:
    layer = transforms.MaskedAffineAutoregressiveTransform(
        features,
        hidden_features=options.hidden_features,
        context_features=context,
        num_blocks=options.blocks,
        use_residual_blocks=False,
        activation=torch.tanh,
        dropout_probability=options.dropout,
    )
    # Start as the identity: scales of one (nflows' own start is 0.7) and no shifts.
    final = layer.autoregressive_net.final_layer
    nn.init.zeros_(final.weight)
    nn.init.zeros_(final.bias)
    final.bias.data.view(-1, 2)[:, 0].fill_(math.log(math.expm1(1 - 1e-3)))
    return layer
