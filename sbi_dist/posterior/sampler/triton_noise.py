"""The noise of ``noise.py`` in a kernel: the same words, and the same numbers to rounding."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["begin", "normal_noise"]


@triton.jit
def normal_noise(
    keys: tl.tensor,
    row: tl.tensor,
    draw: tl.tensor,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
) -> tl.tensor:
    """Standard normal noise (BLOCK, PADDED) of the streams ``keys[row]``, zero from SIZE on.

    Args:
        keys: int64 (M, 2).
        row: (BLOCK,) or (1,).
        draw: number of the draw in its stream, int64 (BLOCK,).
    """
    low, high = (draw & 0xFFFFFFFF).to(tl.uint32), (draw >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    key, other_key = zero + _word(keys + 2 * row), zero + _word(keys + 2 * row + 1)
    columns = tl.arange(0, PADDED)[None, :]
    noise = tl.zeros((draw.shape[0], PADDED), tl.float32)
    for block in range((SIZE + 3) // 4):
        counter = (zero.to(tl.int32) + block).to(tl.uint32)
        first, second, third, fourth = tl.philox_impl(low, high, counter, zero, key, other_key)
        for pair in tl.static_range(2):
            if pair == 0:
                radius, angle = _uniform(first), _uniform(second)
            else:
                radius, angle = _uniform(third), _uniform(fourth)
            radius = tl.sqrt(-2.0 * tl.log(radius))[:, None]
            angle = (angle * 6.283185307179586)[:, None]
            number = 4 * block + 2 * pair
            noise = tl.where(columns == number, radius * tl.cos(angle), noise)
            noise = tl.where(columns == number + 1, radius * tl.sin(angle), noise)
    return tl.where(columns < SIZE, noise, 0.0)


@triton.jit
def _word(address: tl.tensor) -> tl.tensor:
    return tl.load(address).to(tl.uint32)


@triton.jit
def _uniform(word: tl.tensor) -> tl.tensor:
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32


@triton.jit
def _noise_of(
    noise: tl.tensor,
    offset: tl.tensor,
    apart: tl.tensor,
    there: tl.tensor,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
) -> tl.tensor:
    """Noise (BLOCK, PADDED) that is in memory, its components ``apart`` from each other."""
    columns = tl.arange(0, PADDED)[None, :]
    at = noise + offset[:, None] + columns.to(tl.int64) * apart
    return tl.load(at, mask=there[:, None] & (columns < SIZE), other=0.0)


@triton.jit
def begin(
    noise: tl.tensor,
    keys: tl.tensor,
    row: tl.tensor,
    draw: tl.tensor,
    first: tl.tensor,
    observation: tl.tensor,
    apart: tl.tensor,
    by_draw: tl.tensor,
    by_row: tl.tensor,
    there: tl.tensor,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    GIVEN: tl.constexpr,
    LOG_Q: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The tile's noise (BLOCK, PADDED), and its log density (BLOCK, 1) or, without LOG_Q, zero.

    The noise is read if it is GIVEN: number (i, k, m) is ``i apart + k by_draw + m by_row`` after
    its first.
    """
    if GIVEN:
        offset = draw * by_draw + observation * by_row
        values = _noise_of(noise, offset, apart, there, SIZE, PADDED)
    else:
        values = normal_noise(keys, row, draw + first, SIZE, PADDED)
    if LOG_Q:
        log_density = -0.5 * tl.sum(values * values, 1, keep_dims=True) - SIZE * 0.9189385332046727
    else:
        log_density = tl.zeros((values.shape[0], 1), tl.float32)
    return values, log_density
