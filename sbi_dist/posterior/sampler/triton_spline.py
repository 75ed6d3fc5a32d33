"""The inverse of monotone rational-quadratic splines in a kernel; see ``spline.py``.

The bins of one feature are the columns of a tile. Which bin a point is in is the number of knots at
or below it, and what is known of that bin is a sum over all bins with one that is not zero, so that
nothing is looked up in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sbi_dist.posterior.sampler.triton_tile import split

__all__ = ["softplus", "spline_inverse"]


@triton.jit
def spline_inverse(
    value: tl.tensor,
    widths: tl.tensor,
    heights: tl.tensor,
    slopes: tl.tensor,
    BINS: tl.constexpr,
    BOUND: tl.constexpr,
    LEAST_WIDTH: tl.constexpr,
    LEAST_HEIGHT: tl.constexpr,
    LEAST_SLOPE: tl.constexpr,
    END: tl.constexpr,
    LOG_DET: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """x with spline(x) = value, (BLOCK, 1), and log dx/dvalue (zero without LOG_DET).

    Args:
        value: (BLOCK, 1).
        widths, heights: logarithms to base 2 of the bins' unnormalized sizes, (BLOCK, P); far below
            zero where there is no bin.
        slopes: unnormalized, (BLOCK, P), at the upper end of each bin.
        END: unnormalized slope at the interval's ends.
    """
    bins = tl.arange(0, widths.shape[1])[None, :]
    width = _sizes(widths, bins, BINS, BOUND, LEAST_WIDTH)
    height = _sizes(heights, bins, BINS, BOUND, LEAST_HEIGHT)
    point = tl.minimum(tl.maximum(value, -BOUND), BOUND)
    beyond = value - point  # zero but beyond the interval
    above = (point >= _sums(height) - BOUND) & (bins < BINS - 1)
    found = tl.sum(above.to(tl.int32), 1, keep_dims=True)
    below, here = bins < found, bins == found
    x0 = tl.sum(tl.where(below, width, 0.0), 1, keep_dims=True) - BOUND
    y0 = tl.sum(tl.where(below, height, 0.0), 1, keep_dims=True) - BOUND
    width = tl.sum(tl.where(here, width, 0.0), 1, keep_dims=True)
    height = tl.sum(tl.where(here, height, 0.0), 1, keep_dims=True)
    lower = tl.sum(tl.where(bins == found - 1, slopes, 0.0), 1, keep_dims=True)
    d0 = softplus(tl.where(found == 0, END, lower)) + LEAST_SLOPE
    d1 = softplus(tl.sum(tl.where(here, slopes, 0.0), 1, keep_dims=True)) + LEAST_SLOPE
    s = height / width
    curve = d0 + d1 - 2.0 * s
    rise = point - y0
    # The quadratic a t^2 + b t + c = 0 of the position t in the bin, c = -s rise.
    a = height * (s - d0) + rise * curve
    b = height * d0 - rise * curve
    root = tl.sqrt(tl.maximum(b * b + 4.0 * a * (rise * s), 0.0))
    t = 2.0 * (rise * s) / (b + root)
    log_det = tl.zeros_like(value)
    if LOG_DET:
        rest = t * (1.0 - t)
        below_line = s + curve * rest
        over = d1 * t * t + 2.0 * s * rest + d0 * (1.0 - t) * (1.0 - t)
        ratio = s / below_line
        # Beyond the interval the slope is one.
        log_det = tl.where(beyond == 0.0, -tl.log(over * ratio * ratio), 0.0)
    return x0 + t * width + beyond, log_det


@triton.jit
def _sizes(
    raw: tl.tensor,
    bins: tl.tensor,
    BINS: tl.constexpr,
    BOUND: tl.constexpr,
    LEAST: tl.constexpr,
) -> tl.tensor:
    """Sizes of the bins, zero where there is none."""
    fractions = tl.exp2(raw - tl.max(raw, 1, keep_dims=True))
    fractions = fractions / tl.sum(fractions, 1, keep_dims=True)
    sizes = 2.0 * BOUND * LEAST + (2.0 * BOUND * (1.0 - LEAST * BINS)) * fractions
    return tl.where(bins < BINS, sizes, 0.0)


@triton.jit
def _sums(sizes: tl.tensor) -> tl.tensor:
    """Of each bin and those before it, on tensor cores, where the sizes are already.

    They are good to a 4-millionth, which is enough to choose the bin by: to either side of a knot
    two splines agree in value and slope.
    """
    BINS: tl.constexpr = sizes.shape[1]
    ones = tl.arange(0, BINS)[:, None] <= tl.arange(0, BINS)[None, :]
    high, low = split(sizes)
    ones = ones.to(tl.float16)
    return tl.dot(high, ones, tl.dot(low, ones) * (1.0 / 2048.0))


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + e^x), to float32's relative accuracy also where it is small."""
    small = tl.exp(-tl.abs(x))
    one_more = 1.0 + small
    # log(1 + e) = e log(w) / (w - 1) with w = 1 + e as rounded (W. Kahan).
    rounded = one_more - 1.0
    exact = rounded == 0.0
    log = tl.where(exact, small, tl.log(one_more) * (small / tl.where(exact, 1.0, rounded)))
    return tl.maximum(x, 0.0) + log
