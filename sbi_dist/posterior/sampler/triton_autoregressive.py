"""The kernel of masked affine autoregressive flows: all layers at once, see ``autoregressive.py``.

The hidden units are in the order of their degrees, and a layer's sums over the units before it grow
as these become known. As soon as a feature is known, the units that waited for it are computed, in
windows of 16, and what they add to all sums of the next layer is one product with K = 16. So each
weight is used about once for all features together, as is each unit: with D = 10 features and 64
units, a layer costs 12 windows' products and exponentials in place of the 36 of D - 1 passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sbi_dist.posterior.sampler.triton_noise import begin
from sbi_dist.posterior.sampler.triton_spline import softplus
from sbi_dist.posterior.sampler.triton_tile import (
    column,
    finish,
    linear,
    matrix,
    place,
    product,
    split,
    with_column,
)

__all__ = ["autoregressive_kernel"]

# Tuples are added here, as Triton knows no starred expressions.


@triton.jit(do_not_specialize=["draws", "observations", "first", "apart", "by_draw", "by_row"])
def autoregressive_kernel(
    noise: tl.tensor,
    keys: tl.tensor,
    which: tl.tensor,
    conditions: tl.tensor,
    singles: tl.tensor,
    halves: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    log_q: tl.tensor,
    draws: tl.tensor,
    observations: tl.tensor,
    first: tl.tensor,
    apart: tl.tensor,
    by_draw: tl.tensor,
    by_row: tl.tensor,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    ENDS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,
    WHICH: tl.constexpr,
    GIVEN: tl.constexpr,
    LOG_Q: tl.constexpr,
) -> None:
    """See ``triton_launch.py`` for the arguments, ``triton_pack.py`` for the weights.

    ``table`` has, for each feature, the first unit that waits for the one before it and the first
    that does not, and the windows that these are in.
    """
    LINEAR: tl.constexpr = PADDED * PADDED + PADDED
    SQUARE: tl.constexpr = HIDDEN * HIDDEN
    FINAL: tl.constexpr = HIDDEN * ENDS
    SINGLES: tl.constexpr = LINEAR + (PADDED + BLOCKS) * HIDDEN + ENDS
    HALVES: tl.constexpr = 2 * BLOCKS * SQUARE + 2 * FINAL
    STRIDE: tl.constexpr = 3 * PADDED + LAYERS * HIDDEN

    number, draw, observation, row, there = place(draws, observations, which, BLOCK, ONE, WHICH)
    values, log_density = begin(
        noise, keys, row, draw, first, observation, apart, by_draw, by_row, there,
        SIZE, PADDED, GIVEN, LOG_Q,
    )  # fmt: skip
    given = conditions + row[:, None] * STRIDE
    units = tl.arange(0, HIDDEN)[None, :]
    nothing = tl.zeros((BLOCK, HIDDEN), tl.float32)
    for layer in range(LAYERS):
        values = linear(values, singles, SIZE)
        initial = singles + LINEAR + units
        biases = initial + PADDED * HIDDEN
        sums = (nothing + tl.load(given + 3 * PADDED + layer * HIDDEN + units),)
        for block in tl.static_range(BLOCKS):
            sums = sums + (nothing + tl.load(biases + block * HIDDEN),)  # type: ignore[assignment]  # noqa: RUF005
        ends = singles + LINEAR + (PADDED + BLOCKS) * HIDDEN + tl.arange(0, ENDS)[None, :]
        parameters = tl.zeros((BLOCK, ENDS), tl.float32) + tl.load(ends)
        for feature in range(SIZE):
            start, stop = tl.load(table + 4 * feature), tl.load(table + 4 * feature + 1)
            low_window = tl.load(table + 4 * feature + 2)
            high_window = tl.load(table + 4 * feature + 3)
            for block in tl.static_range(BLOCKS):
                later = sums[block + 1]
                for window in range(low_window, high_window):
                    # First of all, as it takes longest.
                    weights = halves + 2 * block * SQUARE + window * 16 * HIDDEN
                    high_weights, low_weights = matrix(weights, SQUARE, 16, HIDDEN)
                    high, low = _activations(sums[block], window, start, stop)
                    later = product(high, low, high_weights, low_weights, later)
                sums = sums[: block + 1] + (later,) + sums[block + 2 :]  # noqa: RUF005
            for window in range(low_window, high_window):
                weights = halves + 2 * BLOCKS * SQUARE + window * 16 * ENDS
                high_weights, low_weights = matrix(weights, FINAL, 16, ENDS)
                high, low = _activations(sums[BLOCKS], window, start, stop)
                parameters = product(high, low, high_weights, low_weights, parameters)
            scale = softplus(column(parameters, feature)) + EPS
            shift = column(parameters, PADDED + feature)
            value = (column(values, feature) - shift) / scale
            values = with_column(values, feature, value)
            lowest = sums[0] + value * tl.load(initial + feature * HIDDEN)
            sums = (lowest,) + sums[1:]  # noqa: RUF005
            if LOG_Q:
                log_density += tl.log(scale)
        singles += SINGLES
        halves += HALVES
    values = linear(values, singles, SIZE)
    finish(values, log_density, given, out, log_q, number, there, SIZE, PADDED, LOG_Q)


@triton.jit
def _activations(
    sums: tl.tensor, window: tl.tensor, start: tl.tensor, stop: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Of the units ``start`` to ``stop`` that are in a window, (BLOCK, 16), zero for others."""
    WINDOWS: tl.constexpr = sums.shape[1] // 16
    windows = tl.arange(0, WINDOWS)[None, :, None]
    parts = tl.reshape(sums, (sums.shape[0], WINDOWS, 16))
    chosen = tl.sum(tl.where(windows == window, parts, 0.0), 1)
    unit = 16 * window + tl.arange(0, 16)[None, :]
    known = (unit >= start) & (unit < stop)
    return split(tl.where(known, tl.sigmoid(chosen), 0.0))
