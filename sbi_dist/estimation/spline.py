"""Monotone rational-quadratic splines (Durkan et al. 2019, arXiv:1906.04032) in few operations.

The same function as nflows' ``unconstrained_rational_quadratic_spline``, to rounding: identity
outside [-bound, bound]. nflows selects the points inside by boolean masks and looks at their
range, each of which stops the device; here every point goes through the same operations.
"""

from __future__ import annotations

import torch
from nflows.transforms import LULinear, PiecewiseRationalQuadraticCouplingTransform
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FastLULinear", "FastSplineCoupling", "rational_quadratic_spline"]

_MIN_WIDTH = _MIN_HEIGHT = _MIN_DERIVATIVE = 1e-3


def rational_quadratic_spline(
    inputs: Tensor, parameters: Tensor, bins: int, bound: float, scale: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Spline of each input and the logarithm of its derivative.

    Args:
        inputs: any shape S.
        parameters: S + (3 * bins - 1,): unnormalized widths, heights (both divided by ``scale``
            first) and inner derivatives, as nflows orders them.
        bins, bound: number of bins, and half-width of the interval that they fill.
        inverse: the inverse function instead.

    Returns:
        Outputs and log-derivatives, both of shape S.
    """
    sizes = parameters[..., : 2 * bins].unflatten(-1, (2, bins))
    sizes = _MIN_WIDTH + (1 - _MIN_WIDTH * bins) * F.softmax(sizes / scale, dim=-1)
    knots = torch.cumsum(sizes[..., :-1], dim=-1) * (2 * bound) - bound
    knots = F.pad(F.pad(knots, (1, 0), value=-bound), (0, 1), value=bound)
    slopes = _MIN_DERIVATIVE + F.softplus(parameters[..., 2 * bins :])
    slopes = F.pad(slopes, (1, 1), value=1.0)
    table = torch.cat([knots, slopes.unsqueeze(-2)], dim=-2)

    inside = (inputs >= -bound) & (inputs <= bound)
    point = inputs.clamp(-bound, bound)
    searched = table[..., 1 if inverse else 0, 1:-1]
    index = (point.unsqueeze(-1) >= searched).sum(-1)
    both = torch.stack([index, index + 1], dim=-1).unsqueeze(-2)
    ends = table.gather(-1, both.expand(*index.shape, 3, 2))
    (x0, x1), (y0, y1), (d0, d1) = (ends[..., k, :].unbind(-1) for k in range(3))

    width, height = x1 - x0, y1 - y0
    slope = height / width
    curvature = d0 + d1 - 2 * slope
    if inverse:
        rise = point - y0
        a = height * (slope - d0) + rise * curvature
        b = height * d0 - rise * curvature
        c = -slope * rise
        root = torch.sqrt((b * b - 4 * a * c).clamp_min(0))
        position = 2 * c / (-b - root)
    else:
        position = (point - x0) / width
    mixed = position * (1 - position)
    denominator = slope + curvature * mixed
    if inverse:
        outputs = position * width + x0
    else:
        outputs = y0 + height * (slope * position * position + d0 * mixed) / denominator
    rest = 1 - position
    numerator = slope * slope * (d1 * position * position + 2 * slope * mixed + d0 * rest * rest)
    log_derivative = torch.log(numerator) - 2 * torch.log(denominator)
    if inverse:
        log_derivative = -log_derivative
    zero = torch.zeros_like(log_derivative)
    return torch.where(inside, outputs, inputs), torch.where(inside, log_derivative, zero)


class FastSplineCoupling(PiecewiseRationalQuadraticCouplingTransform):
    """nflows' spline coupling layer: its parameters and its function, in fewer operations."""

    def _piecewise_cdf(
        self, inputs: Tensor, transform_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        scale = float(self.transform_net.hidden_features) ** 0.5
        return rational_quadratic_spline(
            inputs, transform_params, self.num_bins, self.tail_bound, scale, inverse
        )


class FastLULinear(LULinear):
    """nflows' LU-decomposed linear layer, with the inverse in torch's current triangular solve."""

    def inverse_no_cache(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = self._create_lower_upper()
        outputs = (inputs - self.bias).T
        outputs = torch.linalg.solve_triangular(lower, outputs, upper=False, unitriangular=True)
        outputs = torch.linalg.solve_triangular(upper, outputs, upper=True).T
        return outputs, -self.logabsdet() * inputs.new_ones(outputs.shape[0])
