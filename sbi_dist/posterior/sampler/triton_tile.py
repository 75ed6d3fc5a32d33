"""What the fused kernels are made of: a tile of draws, its features, and products of matrices.

A tile is a tensor (BLOCK, P) in registers: so many draws, their features padded to a power of two.
No register can be indexed by a number that is only known later, so that a feature is read and
written by comparing the numbers of all.

Products are on tensor cores in float16 with float32 sums, each factor being the sum of two numbers
of float16: a = h + l / 2048, and a b = h h' + (h l' + l h') / 2048 without the last part, which is
float32's rounding (Markidis et al. 2018, arXiv:1803.04014; the factor 2048, which keeps l from
vanishing, is that of Ootomo & Yokota 2022, arXiv:2203.03341). That is three products at twice the
rate of TF32; other ways to float32's accuracy are three at the rate of TF32, or one without tensor
cores, at a fifteenth of the rate. What comes out of one product is in the very registers that the
next one takes its factor from, as in flash attention.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["column", "finish", "linear", "matrix", "place", "product", "split", "with_column"]


@triton.jit
def place(
    draws: tl.tensor,
    observations: tl.tensor,
    which: tl.tensor,
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,
    WHICH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What this program's tile is, of K draws for each of M observations.

    Args:
        which: observation of each draw, int32 (K,), if WHICH; M is 1 then.
        ONE: whether all the tile is of one observation; else it goes on with the next one's draws.

    Returns:
        number in the order of (M, K), of the draw, of the observation in the noise, of its
        conditions, int64 of (BLOCK,), the last two (1,) if ONE; and whether there is such a draw.
    """
    program = tl.program_id(0).to(tl.int64)
    if ONE:
        blocks = tl.cdiv(draws, BLOCK)
        draw = program % blocks * BLOCK + tl.arange(0, BLOCK)
        observation = program // blocks + tl.zeros((1,), tl.int64)
        there = draw < draws
        number = observation * draws + draw
        row = observation
    else:
        # One division of large numbers for the tile, the others are of small ones.
        start = program * BLOCK
        number = start + tl.arange(0, BLOCK)
        there = number < draws.to(tl.int64) * observations
        before = start // draws
        local = (start - before * draws).to(tl.int32) + tl.arange(0, BLOCK)
        local = tl.where(there, local, 0)
        draw = (local % draws).to(tl.int64)
        observation = before + local // draws
        row = observation
        if WHICH:
            row = tl.load(which + draw).to(tl.int64)
    return number, draw, observation, row, there


@triton.jit
def column(values: tl.tensor, number: tl.tensor) -> tl.tensor:
    """Column of a tile (BLOCK, P): (BLOCK, 1)."""
    columns = tl.arange(0, values.shape[1])[None, :]
    return tl.sum(tl.where(columns == number, values, 0.0), 1, keep_dims=True)


@triton.jit
def with_column(values: tl.tensor, number: tl.tensor, new: tl.tensor) -> tl.tensor:
    """The tile with another column, (BLOCK, 1)."""
    columns = tl.arange(0, values.shape[1])[None, :]
    return tl.where(columns == number, new, values)


@triton.jit
def linear(values: tl.tensor, weights: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """A v + b, not on tensor cores: A may be far from orthogonal, and is small.

    ``weights`` are A transposed, (P, P), and b, (P,).
    """
    PADDED: tl.constexpr = values.shape[1]
    columns = tl.arange(0, PADDED)[None, :]
    result = tl.zeros_like(values) + tl.load(weights + PADDED * PADDED + columns)
    for number in range(SIZE):
        row = tl.load(weights + number * PADDED + columns)
        result += column(values, number) * row
    return result


@triton.jit
def split(values: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """As two numbers of float16: h + l / 2048."""
    high = values.to(tl.float16)
    low = ((values - high.to(tl.float32)) * 2048.0).to(tl.float16)
    return high, low


@triton.jit
def matrix(
    weights: tl.tensor, apart: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """High part of a matrix (ROWS, COLUMNS) in memory, and its low part ``apart`` after it."""
    rows = tl.arange(0, ROWS)[:, None]
    at = weights + rows * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(at), tl.load(at + apart)


@triton.jit
def product(
    high: tl.tensor,
    low: tl.tensor,
    high_weights: tl.tensor,
    low_weights: tl.tensor,
    start: tl.tensor,
) -> tl.tensor:
    """start + x W, float32 (BLOCK, COLUMNS), of parts by :func:`split` and :func:`matrix`."""
    rest = tl.dot(low, high_weights, tl.dot(high, low_weights))
    return tl.dot(high, high_weights, start) + rest * (1.0 / 2048.0)


@triton.jit
def finish(
    values: tl.tensor,
    log_density: tl.tensor,
    given: tl.tensor,
    out: tl.tensor,
    log_q: tl.tensor,
    number: tl.tensor,
    there: tl.tensor,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    LOG_Q: tl.constexpr,
) -> None:
    """The conditional affine layer, and out to memory: u (N, SIZE) and its log density (N,).

    ``given`` has the affine layer's shift, factor and log density, (PADDED,) each.
    """
    columns = tl.arange(0, PADDED)[None, :]
    values = tl.load(given + columns) + values * tl.load(given + PADDED + columns)
    at = out + number[:, None] * SIZE + columns
    tl.store(at, values, mask=there[:, None] & (columns < SIZE))
    if LOG_Q:
        log_density += tl.sum(tl.load(given + 2 * PADDED + columns), 1, keep_dims=True)
        tl.store(log_q + number[:, None], log_density, mask=there[:, None])
