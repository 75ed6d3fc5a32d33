"""Monotone rational-quadratic splines (Durkan et al. 2019, arXiv:1906.04032), bins first.

The function is nflows' ``unconstrained_rational_quadratic_spline``. There are no masks and no look
at the values: every point goes through the same operations, and only the two knots around it are
gathered.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sbi_dist.posterior.sampler.step import Tile

__all__ = ["Spline", "SplineRun"]


# Powers of two beyond these leave the numbers that float32 has; sums of them do not come near.
_LARGEST = 60.0


class Spline:
    """Splines of K bins on [-bound, bound], identity beyond.

    The sizes of the bins are a softmax, whose numerators are taken as powers of two: the fastest
    function of its kind. Knots are sums of these, and are divided by the whole after two of them
    are chosen.

    Args:
        bins, bound: K, and half-width of the interval.
        smallest: width and height of a bin, relative to the interval, and slope.
    """

    def __init__(self, bins: int, bound: float, smallest: tuple[float, float, float]) -> None:
        self.bins, self.bound = bins, bound
        self.least_slope = smallest[2]
        # Distances of the knots from the interval's start, times the whole (which is the last of
        # them) by the interval's length; and the whole itself by that length.
        below = torch.ones(bins + 1, bins, dtype=torch.float64).tril(-1)
        number = torch.arange(bins + 1, dtype=torch.float64)[:, None]
        share = torch.full((1, bins), 0.5 / bound, dtype=torch.float64)
        self._sums = [
            torch.cat([below * (1 - least * bins) + number * least, share])
            for least in smallest[:2]
        ]

    def arranged(self, final: Tensor, inputs: int, hidden: int) -> Tensor:
        """Rows of the network's last layer, (.., H + 1), as :class:`SplineRun` takes them.

        nflows' order is by input; here the bins come first, and the slopes at the interval's ends
        are there as well.
        """
        bins = self.bins
        rows = final.view(inputs, 3 * bins - 1, -1)
        widths, heights, slopes = rows.split([bins, bins, bins - 1], dim=1)
        sizes = torch.stack([widths, heights]) / (math.sqrt(hidden) * math.log(2))
        end = final.new_zeros(inputs, 1, final.shape[1])
        end[..., -1] = math.log(math.expm1(1 - self.least_slope))  # gives a slope of one
        slopes = torch.cat([end, slopes, end], dim=1)
        parts = [sizes.permute(2, 0, 1, 3), slopes.transpose(0, 1)]
        return torch.cat([part.reshape(-1, final.shape[1]) for part in parts])

    def to(self, like: Tensor) -> None:
        self._sums = [each.to(like) for each in self._sums]


class SplineRun:
    """Splines of T inputs, in place.

    Args:
        values: (T, N), inputs and then outputs.
        parameters: ((3 K + 1) T, N): unnormalized bin sizes as (K, 2, T, N), widths and then
            heights, as logarithms to base 2, and unnormalized slopes at the knots as
            (K + 1, T, N); are overwritten.
    """

    def __init__(self, spline: Spline, values: Tensor, parameters: Tensor, tile: Tile) -> None:
        self._spline, self._values, self._tile = spline, values, tile
        bins, (size, count) = spline.bins, values.shape
        split = 2 * bins * size
        self._sizes = parameters[:split].view(bins, 2, -1)
        self._slopes = parameters[split:].view(bins + 1, -1)
        self._on_cpu = values.device.type == "cpu"
        columns = size * count
        self._flat = values.view(-1)
        self._knots = tile.space("knots", bins + 2, 2, columns)
        self._share = self._knots[bins + 1]
        self._above = tile.space("above", bins - 1, columns)
        self._found = tile.space("found", columns)
        self._index = tile.space("index", 2, columns, dtype=torch.int64)
        self._low, self._high = self._index.unbind()  # numbers of the knots around the point
        self._at = self._index.unsqueeze(1).expand(2, 2, -1)
        self._ends = tile.space("ends", 2, 2, columns)
        self._first, self._last = self._ends.unbind()
        self._bin = tile.space("bin", 2, columns)
        self._width, self._height = self._bin.unbind()
        self._unit = tile.space("unit", 2, columns)
        self._slope = tile.space("slope", 2, columns)
        self._d0, self._d1 = self._slope.unbind()
        self._spare = tile.space("spare", 8, columns).unbind()

    def _look_up(self, searched: int) -> tuple[Tensor, ...]:
        """Find the bin of each point on the x (0) or y (1) axis, its size and its slopes.

        Returns:
            What the point is beyond the interval's start, further than the interval goes; its
            position in the bin on that axis, from 0 to 1; the bin's start on the other axis, from
            that of the interval; the bin's mean slope; and memory.
        """
        spline, bins, bound = self._spline, self._spline.bins, self._spline.bound
        beyond, at, start, mean, *spare = self._spare
        sizes = self._sizes
        # Far from all training data a network may give numbers of any size.
        if not self._on_cpu or not _moderate(sizes):
            # Of the columns that need it alone, so that the others are what they are without them.
            largest = sizes.amax(0)
            calm = (largest < _LARGEST) & (sizes.amin(0) > -_LARGEST)
            sizes.sub_(largest.masked_fill_(calm, 0.0))
        torch.exp2(sizes, out=sizes)
        for axis in range(2):
            torch.mm(spline._sums[axis], sizes[:, axis], out=self._knots[:, axis])
        torch.add(self._flat, bound, out=at)
        torch.clamp(at, 0, 2 * bound, out=start)
        torch.sub(self._flat, start, out=beyond)
        torch.mul(start, self._share[searched], out=at)
        torch.ge(at, self._knots[1:bins, searched], out=self._above)
        torch.sum(self._above, 0, out=self._found)
        self._low.copy_(self._found)
        torch.add(self._low, 1, out=self._high)
        torch.gather(self._knots, 0, self._at, out=self._ends)
        torch.sub(self._last, self._first, out=self._bin)
        at.sub_(self._first[searched]).div_(self._bin[searched])
        torch.reciprocal(self._share, out=self._unit)
        self._bin.mul_(self._unit)
        torch.mul(self._first[1 - searched], self._unit[1 - searched], out=start)
        torch.div(self._height, self._width, out=mean)
        torch.gather(self._slopes, 0, self._index, out=self._slope)
        F.softplus(self._slope, out=self._slope)  # type: ignore[call-arg]
        self._slope.add_(spline.least_slope)
        return beyond, at, start, mean, *spare

    def inverse(self, with_log_det: bool) -> None:
        """Inputs on the y axis, outputs on the x axis."""
        beyond, rise, start, s, curve, a, b, root = self._look_up(1)
        torch.add(self._d0, self._d1, out=curve)
        curve.sub_(s, alpha=2)
        # The quadratic a t^2 + b t - s rise = 0 of the position t in the bin.
        torch.addcmul(self._d0, rise, curve, value=-1, out=b)
        torch.sub(s, b, out=a)
        rise.mul_(s)
        torch.mul(b, b, out=root)
        root.addcmul_(a, rise, value=4).clamp_min_(0).sqrt_().add_(b)
        torch.div(rise, root, out=root)
        root.mul_(2)
        start.add_(beyond)
        torch.addcmul(start, root, self._width, out=self._flat)
        if with_log_det:
            self._add_log_slope(root, s, curve, (a, b, rise), -1)

    def forward(self) -> None:
        """Inputs on the x axis, outputs on the y axis."""
        beyond, at, start, s, curve, a, b, c = self._look_up(0)
        torch.add(self._d0, self._d1, out=curve)
        curve.sub_(s, alpha=2)
        torch.addcmul(at, at, at, value=-1, out=a)  # t (1 - t)
        torch.addcmul(s, curve, a, out=b)
        a.mul_(self._d0)
        torch.mul(at, at, out=c)
        a.addcmul_(s, c).div_(b)
        start.add_(beyond)
        torch.addcmul(start, a, self._height, out=self._flat)
        self._add_log_slope(at, s, curve, (a, b, c), 1)

    def _add_log_slope(
        self, at: Tensor, s: Tensor, curve: Tensor, spare: tuple[Tensor, ...], sign: int
    ) -> None:
        """Add the logarithm of the splines' slopes, times sign, to the tile's.

        Beyond the interval it is that at the interval's end, zero.
        """
        a, b, c = spare
        torch.addcmul(at, at, at, value=-1, out=a)  # t (1 - t)
        torch.addcmul(s, curve, a, out=b)
        # d1 t^2 + 2 s t (1 - t) + d0 (1 - t)^2
        torch.mul(at, at, out=c)
        c.mul_(self._d1).addcmul_(a, s, value=2)
        torch.sub(1, at, out=a)
        a.mul_(a)
        c.addcmul_(a, self._d0)
        torch.div(s, b, out=a)
        c.mul_(a).mul_(a).log_()
        self._tile.log_det.add_(c.view(len(self._values), -1).sum(0), alpha=sign)


def _moderate(sizes: Tensor) -> bool:
    smallest, largest = torch.aminmax(sizes)
    return bool(smallest > -_LARGEST) and bool(largest < _LARGEST)
