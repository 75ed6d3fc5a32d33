"""The kernel of spline coupling flows: a tile of draws through all layers, see ``coupling.py``.

Everything that a draw is on its way stays in registers; only weights, which the L2 cache holds,
and the observation's conditions are read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sbi_dist.posterior.sampler.triton_noise import begin
from sbi_dist.posterior.sampler.triton_spline import spline_inverse
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

__all__ = ["coupling_kernel"]

# Activations are divided by 256 (and weights multiplied), so that float16 holds them up to here.
_LARGEST = tl.constexpr(65504.0 * 256)


@triton.jit(do_not_specialize=["draws", "observations", "first", "apart", "by_draw", "by_row"])
def coupling_kernel(
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
    MOVED: tl.constexpr,
    BINS: tl.constexpr,
    PADDED_BINS: tl.constexpr,
    BOUND: tl.constexpr,
    LEAST_WIDTH: tl.constexpr,
    LEAST_HEIGHT: tl.constexpr,
    LEAST_SLOPE: tl.constexpr,
    END: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,
    WHICH: tl.constexpr,
    GIVEN: tl.constexpr,
    LOG_Q: tl.constexpr,
) -> None:
    """See ``triton_launch.py`` for the arguments, ``triton_pack.py`` for the weights.

    ``table`` has the number of features that each layer transforms, which come last.
    """
    LINEAR: tl.constexpr = PADDED * PADDED + PADDED
    SQUARE: tl.constexpr = HIDDEN * HIDDEN
    FINAL: tl.constexpr = HIDDEN * PADDED_BINS
    SINGLES: tl.constexpr = LINEAR + (PADDED + 2 * BLOCKS) * HIDDEN + 3 * MOVED * PADDED_BINS
    HALVES: tl.constexpr = 4 * BLOCKS * SQUARE + 6 * MOVED * FINAL
    STRIDE: tl.constexpr = 3 * PADDED + LAYERS * (1 + BLOCKS) * HIDDEN

    number, draw, observation, row, there = place(draws, observations, which, BLOCK, ONE, WHICH)
    values, log_density = begin(
        noise, keys, row, draw, first, observation, apart, by_draw, by_row, there,
        SIZE, PADDED, GIVEN, LOG_Q,
    )  # fmt: skip
    given = conditions + row[:, None] * STRIDE
    bins = tl.arange(0, PADDED_BINS)[None, :]
    for layer in range(LAYERS):
        values = linear(values, singles, SIZE)
        at = given + 3 * PADDED + layer * ((1 + BLOCKS) * HIDDEN)
        fixed = SIZE - tl.load(table + layer)
        hidden = _hidden(values, at, singles + LINEAR, halves, fixed, PADDED, HIDDEN, BLOCKS, BLOCK)
        hidden = tl.minimum(tl.maximum(hidden, -_LARGEST), _LARGEST)
        high, low = split(hidden * (1.0 / 256.0))
        biases = singles + LINEAR + (PADDED + 2 * BLOCKS) * HIDDEN + bins
        weights = halves + 4 * BLOCKS * SQUARE
        for feature in range(fixed, SIZE):
            widths = _parameters(high, low, weights, biases, HIDDEN, PADDED_BINS)
            heights = _parameters(
                high, low, weights + 2 * FINAL, biases + PADDED_BINS, HIDDEN, PADDED_BINS
            )
            slopes = _parameters(
                high, low, weights + 4 * FINAL, biases + 2 * PADDED_BINS, HIDDEN, PADDED_BINS
            )
            moved, log_det = spline_inverse(
                column(values, feature), widths, heights, slopes,
                BINS, BOUND, LEAST_WIDTH, LEAST_HEIGHT, LEAST_SLOPE, END, LOG_Q,
            )  # fmt: skip
            values = with_column(values, feature, moved)
            log_density -= log_det
            biases += 3 * PADDED_BINS
            weights += 6 * FINAL
        singles += SINGLES
        halves += HALVES
    values = linear(values, singles, SIZE)
    finish(values, log_density, given, out, log_q, number, there, SIZE, PADDED, LOG_Q)


@triton.jit
def _hidden(
    values: tl.tensor,
    given: tl.tensor,
    singles: tl.tensor,
    halves: tl.tensor,
    fixed: tl.tensor,
    PADDED: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """What the residual network makes of the features that stay, (BLOCK, HIDDEN).

    ``given`` has what the observation adds to the first layer, and the gate of each block.
    """
    SQUARE: tl.constexpr = HIDDEN * HIDDEN
    units = tl.arange(0, HIDDEN)[None, :]
    nothing = tl.zeros((BLOCK, HIDDEN), tl.float32)
    hidden = nothing + tl.load(given + units)
    for feature in range(fixed):
        hidden += column(values, feature) * tl.load(singles + feature * HIDDEN + units)
    biases = singles + PADDED * HIDDEN + units
    for block in range(BLOCKS):
        high_weights, low_weights = matrix(halves, SQUARE, HIDDEN, HIDDEN)
        high, low = _rectified(hidden)
        bias = nothing + tl.load(biases)
        between = product(high, low, high_weights, low_weights, bias)
        high_weights, low_weights = matrix(halves + 2 * SQUARE, SQUARE, HIDDEN, HIDDEN)
        high, low = _rectified(between)
        bias = nothing + tl.load(biases + HIDDEN)
        added = product(high, low, high_weights, low_weights, bias)
        hidden += added * tl.load(given + (1 + block) * HIDDEN + units)
        halves += 4 * SQUARE
        biases += 2 * HIDDEN
    return hidden


@triton.jit
def _rectified(values: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    return split(tl.minimum(tl.maximum(values, 0.0), _LARGEST) * (1.0 / 256.0))


@triton.jit
def _parameters(
    high: tl.tensor,
    low: tl.tensor,
    weights: tl.tensor,
    biases: tl.tensor,
    HIDDEN: tl.constexpr,
    BINS: tl.constexpr,
) -> tl.tensor:
    """One kind of a spline's parameters, (BLOCK, BINS), of the hidden units."""
    high_weights, low_weights = matrix(weights, HIDDEN * BINS, HIDDEN, BINS)
    start = tl.zeros((high.shape[0], BINS), tl.float32) + tl.load(biases)
    return product(high, low, high_weights, low_weights, start)
