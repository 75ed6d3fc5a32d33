"""Monotone rational-quadratic splines (Durkan et al. 2019, arXiv:1906.04032), bins first.

The function is that of nflows' ``unconstrained_rational_quadratic_spline``. With the bins in the
first dimension every operation runs over the contiguous batch; the gradient is in closed form and
needs no look at which points lie where.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["END_SLOPE", "Spline", "SplineRun"]

_MINIMUM = 1e-3  # of a bin's width and height, relative to the interval, and of a slope
END_SLOPE = math.log(math.expm1(1 - _MINIMUM))  # unnormalized, gives a slope of one

_softplus_backward = torch.ops.aten.softplus_backward.grad_input


class Spline:
    """Splines of K bins on [-bound, bound], identity beyond.

    Args:
        bins, bound: K, and half-width of the interval.
        like: tells dtype and device.
    """

    def __init__(self, bins: int, bound: float, like: Tensor) -> None:
        self.bins, self.bound = bins, bound
        scale, smallest = 2 * bound * (1 - _MINIMUM * bins), 2 * bound * _MINIMUM
        # knots = ends + sums @ softmax; the first and the last are the interval's ends exactly.
        sums = torch.ones(bins + 1, bins, dtype=torch.float64).tril(-1) * scale
        ends = torch.arange(bins + 1, dtype=torch.float64)[:, None] * smallest - bound
        sums[bins], ends[bins] = 0.0, bound
        self.sums, self.ends = sums.to(like), ends.to(like)
        # Of the knots by a bin's fraction: widths move the point's position against them.
        self.signs = torch.tensor([-scale, scale], dtype=torch.float64).view(2, 1, 1).to(like)
        self.one = torch.ones((), dtype=torch.float64).to(like)

    def rows(self, size: int) -> int:
        """Parameters of splines of ``size`` inputs."""
        return (3 * self.bins + 1) * size


class SplineRun:
    """Splines of F inputs each of N rows, in memory set apart.

    Args:
        x: (F, N), inputs.
        parameters, by_parameters: ((3 K + 1) F, N): unnormalized bin sizes as (K, 2, F, N),
            widths and then heights, and unnormalized slopes at the knots as (K + 1, F, N), of
            which the first and the last are END_SLOPE; and their gradients.
        outputs, slopes: (F, N), results: the splines, and their derivatives.
        by_outputs: (F, N), gradient of the outputs, which backward turns into that of x.
        by_logs: (N,), gradient of each logarithm of a slope.
    """

    def __init__(
        self,
        spline: Spline,
        x: Tensor,
        parameters: Tensor,
        by_parameters: Tensor,
        outputs: Tensor,
        slopes: Tensor,
        by_outputs: Tensor,
        by_logs: Tensor,
    ) -> None:
        self._spline, self._x, self._outputs, self._slopes = spline, x, outputs, slopes
        self._by_outputs, self._by_logs = by_outputs, by_logs
        bins, (size, count) = spline.bins, x.shape
        split = 2 * bins * size
        self._sizes_in = parameters[:split].view(bins, 2 * size * count)
        self._slopes_in = parameters[split:].view(bins + 1, size, count)
        self._by_sizes = by_parameters[:split].view(bins, 2, size, count)
        self._by_sizes_in = by_parameters[:split].view(bins, 2 * size * count)
        self._by_slopes_in = by_parameters[split:].view(bins + 1, size, count)
        self._fractions = torch.empty_like(self._sizes_in)
        self._knots = x.new_empty((bins + 1, 2, size, count))
        self._flat_knots = self._knots.view(bins + 1, -1)
        self._inner = self._knots[1:bins, 0]
        # [k] is 1 where the point is at or above knot k; 1 for the first, 0 for the last.
        above = x.new_zeros((bins + 1, size, count))
        above[0].fill_(1)
        self._above_inner = above[1:bins]
        self._above, self._above_next = above[:-1].unsqueeze(1), above[1:].unsqueeze(1)
        self._index = torch.zeros((2, size, count), dtype=torch.int64, device=x.device)
        self._index_low, self._index_high = self._index.unbind()
        self._index_ends = self._index.unsqueeze(1).expand(2, 2, size, count)
        self._ends = x.new_empty((2, 2, size, count))
        self._low, self._high = self._ends.unbind()
        self._x0, self._y0 = self._low.unbind()
        pairs = x.new_empty((6, 2, size, count)).unbind()
        self._raw, self._slope_ends, self._bin, self._by_slopes = pairs[:4]
        self._moves, self._stretches = pairs[4:]
        self._d0, self._d1 = self._slope_ends.unbind()
        self._width, self._height = self._bin.unbind()
        self._by_d0, self._by_d1 = self._by_slopes.unbind()
        self._by_point, self._by_y = self._moves.unbind()
        self._by_width, self._by_height = self._stretches.unbind()
        self._values = x.new_empty((11, size, count)).unbind()
        self._spares = x.new_empty((12, size, count)).unbind()

    def forward(self) -> None:
        """Outputs and slopes of x."""
        point, index, s, at, t, curve, mixed, bottom, rise, second, top = self._values
        x, height = self._x, self._height
        torch._softmax(self._sizes_in, 0, False, out=self._fractions)
        torch.addmm(self._spline.ends, self._spline.sums, self._fractions, out=self._flat_knots)
        torch.clamp(x, -self._spline.bound, self._spline.bound, out=point)
        torch.ge(point, self._inner, out=self._above_inner)
        torch.sum(self._above_inner, 0, out=index)
        self._index_low.copy_(index)
        torch.add(self._index_low, 1, out=self._index_high)
        torch.gather(self._knots, 0, self._index_ends, out=self._ends)
        torch.gather(self._slopes_in, 0, self._index, out=self._raw)
        F.softplus(self._raw, out=self._slope_ends)  # type: ignore[call-arg]
        self._slope_ends.add_(_MINIMUM)
        torch.sub(self._high, self._low, out=self._bin)
        torch.div(height, self._width, out=s)
        torch.sub(point, self._x0, out=at)
        at.div_(self._width)
        torch.sub(s, self._d0, out=t)
        torch.sub(self._d1, s, out=curve)
        curve.sub_(t)
        torch.addcmul(at, at, at, value=-1, out=mixed)
        torch.addcmul(s, curve, mixed, out=bottom)
        torch.addcmul(self._d0, at, t, out=top)
        torch.addcmul(t, at, curve, out=second)
        torch.mul(top, at, out=rise)  # in units of the bin's height
        rise.div_(bottom)
        outputs, slopes = self._outputs, self._slopes
        torch.sub(x, point, out=index)  # zero but beyond the interval
        index.add_(self._y0)
        torch.addcmul(index, height, rise, out=outputs)
        top.addcmul_(at, second)
        torch.div(s, bottom, out=slopes)
        slopes.mul_(slopes).mul_(top)

    def backward(self) -> None:
        """Gradients of the parameters and of x."""
        point, _, s, at, _, curve, mixed, bottom, rise, second, top = self._values
        a, both, per_top, share, square, rest, by_s, lean, by_at, inside, grad, by_logs = (
            self._spares
        )
        width, by_x = self._width, self._by_outputs
        # Beyond the interval the spline is the identity, whatever its parameters.
        torch.eq(point, self._x, out=inside)
        torch.mul(by_x, inside, out=grad)
        torch.mul(self._by_logs, inside, out=by_logs)
        torch.mul(grad, self._height, out=a)
        torch.mul(a, rise, out=both)
        both.add_(by_logs, alpha=2)
        torch.div(by_logs, top, out=per_top)
        torch.div(mixed, bottom, out=share)
        torch.sub(at, mixed, out=square)
        # By the slopes at the ends of the bin.
        torch.sub(self._spline.one, at, out=rest)
        rest.sub_(mixed)
        torch.mul(rest, per_top, out=self._by_d0)
        torch.sub(a, both, out=rest)
        self._by_d0.addcmul_(rest, share)
        torch.mul(square, per_top, out=self._by_d1)
        self._by_d1.addcmul_(share, both, value=-1)
        # By the mean slope of the bin.
        torch.mul(a, square, out=by_s)
        by_s.sub_(both)
        by_s.addcmul_(both, mixed, value=2).div_(bottom)
        by_s.addcmul_(mixed, per_top, value=2)
        torch.div(by_logs, s, out=rest)
        by_s.add_(rest, alpha=2).div_(width)
        # By the position in the bin, and so by the point.
        torch.mul(by_logs, curve, out=lean)
        lean.div_(bottom)
        torch.mul(second, per_top, out=by_at)
        by_at.sub_(lean).addcmul_(lean, at, value=2).div_(width)
        torch.mul(grad, self._slopes, out=self._by_point)
        self._by_point.add_(by_at, alpha=2)
        # By the knots: the bins before the point's move it, its own stretches.
        self._by_y.copy_(grad)
        torch.mul(by_s, s, out=self._by_width)
        self._by_width.addcmul_(self._by_point, at)
        torch.addcmul(by_s, grad, rise, out=self._by_height)
        by_x.sub_(grad).add_(self._by_point)
        self._stretches.mul_(self._spline.signs)
        self._moves.mul_(self._spline.signs).sub_(self._stretches)
        torch.mul(self._above, self._stretches, out=self._by_sizes)
        self._by_sizes.addcmul_(self._above_next, self._moves)
        torch._softmax_backward_data(
            self._by_sizes_in, self._fractions, 0, point.dtype, grad_input=self._by_sizes_in
        )
        _softplus_backward(self._by_slopes, self._raw, 1, 20, grad_input=self._by_slopes)
        self._by_slopes_in.zero_()
        self._by_slopes_in.scatter_(0, self._index, self._by_slopes)
