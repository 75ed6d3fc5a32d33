"""Some training rows and some held-out rows, from all over a dataset, in bounded memory."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from sbi_dist.estimation.data.held_out import HeldOut
from sbi_dist.estimation.data.rows import Pair, Reader, Rows
from sbi_dist.estimation.data.source import Source

__all__ = ["examples"]

_TRAINING_ROWS, _TRAINING_BYTES = 1000, 16_000_000
_HELD_OUT_ROWS, _HELD_OUT_BYTES = 10_000, 64_000_000
_LEAST_ROWS = 100
# Rows that are read at a time, and rows among which those held out are looked for.
_RUN_ROWS, _RUN_BYTES, _READ_ROWS = 256, 4_000_000, 200_000


def examples(source: Source, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x of up to 1,000 training rows, and of up to 10,000 that are held out from training.

    Both are float32 (N, *x_shape) with at least one row each, of up to 16 MB and 64 MB or 100
    rows, and the same for all callers. Up to 200,000 rows are read for them.

    Args:
        source: the simulations.
        fraction, seed: those of the training: ``validation_fraction`` and ``seed``.

    Raises:
        InputError: too few simulations, or a shard that is missing or damaged.
    """
    count, row_bytes = int(source.counts.sum()), 4 * max(1, math.prod(source.x_shape))
    held_out = HeldOut(count, fraction, seed)
    most = [
        min(there, max(_LEAST_ROWS, min(rows, size // row_bytes)))
        for there, rows, size in (
            (held_out.training, _TRAINING_ROWS, _TRAINING_BYTES),
            (held_out.validation, _HELD_OUT_ROWS, _HELD_OUT_BYTES),
        )
    ]
    wanted = math.ceil(count * max(most[0] / held_out.training, most[1] / held_out.validation))
    size = min(count, wanted, _READ_ROWS)
    runs = math.ceil(size / max(1, min(_RUN_ROWS, _RUN_BYTES // row_bytes)))
    each, training_each = math.ceil(size / runs), math.ceil(most[0] / runs)
    starts = [number * count // runs for number in range(runs + 1)]
    pieces = [(a, min(a + each, b)) for a, b in pairwise(starts)]
    rows = Rows(source, held_out)

    def read(piece: tuple[int, int]) -> tuple[Pair, Pair]:
        return rows.parted(piece[0], rows.usable(*piece))

    training, validation = [], []
    reader = Reader(source.at_once)
    try:
        for (_, x), (_, x_held_out) in reader.read(read, pieces):
            # Copies, so that the rest of what was read is not kept.
            training.append(x[:training_each].copy())
            validation.append(x_held_out.copy())
    finally:
        reader.close()
    if not any(map(len, validation)):  # so few are held out that none was among these
        first = int(held_out.rows(0, min(count, math.ceil(1 / fraction)))[0])
        validation = [rows.usable(first, first + 1)[1]]
    return np.concatenate(training)[: most[0]], np.concatenate(validation)[: most[1]]
