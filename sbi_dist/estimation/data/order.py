"""The order in which training rows are visited: which of them make each global batch.

It is a function of (number of training rows, batch size, bytes of a row, shuffle_mb, seed) alone.
A batch is made of lanes: lane l gives some rows of each batch, all from its own stretch of the
training rows. A rank owns whole lanes, so that it reads its own stretch alone, and whatever the
number of ranks, they make the same batches together. Within a lane, blocks of neighbours are
permuted, the sequence is cut into groups of so many steps that the groups of all lanes fit
``shuffle_mb``, and the rows of each group are permuted. Any (epoch, step) is found without those
before it. Where the rows are and what they hold is not known here.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sbi_dist.errors import InputError
from sbi_dist.estimation.data.streams import stream

__all__ = ["Order", "Share"]

_MOST_LANES = 256
_LANE_ROWS = 8  # least rows of a batch from a lane, where there are two lanes or more
_BLOCKS = 2  # blocks that meet in a group of a lane, at least
_BLOCK_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class Share:
    """A rank's part of all lanes.

    Attributes:
        lanes: the lanes it owns.
        size: rows that they give to each batch.
        start, stop: the training positions of their rows.
    """

    lanes: range
    size: int
    start: int
    stop: int


class Order:
    """The batches of every epoch, as positions of training rows.

    Args:
        rows: number of training rows.
        batch_size: rows of a global batch, at most ``rows``.
        row_bytes: bytes of a row in memory.
        shuffle_mb: what is shuffled at once, in MB (1e6 bytes), of all lanes together.
        seed: of all choices, a non-negative integer.

    Attributes:
        steps: batches of an epoch; up to ``batch_size - 1`` random rows are left out of each.
        lanes: number of lanes.
        columns: int64 (lanes + 1,): lane l gives rows columns[l] to columns[l + 1] of each batch.
        places: int64 (lanes + 1,): it owns training positions places[l] to places[l + 1].
        groups, group_steps: an epoch's groups, and the steps of each but perhaps the last.
        block: most rows that stay neighbours until a group is permuted.

    Raises:
        InputError: the batch is larger than the number of training rows.
    """

    def __init__(
        self, rows: int, batch_size: int, row_bytes: int, shuffle_mb: float, seed: int
    ) -> None:
        if not 1 <= batch_size <= rows:
            raise InputError(
                f"train.batch_size is {batch_size}; there are {rows} training simulations, give "
                f"1 to {rows}"
            )
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.steps = rows // batch_size
        most = max(1, min(_MOST_LANES, batch_size // _LANE_ROWS))
        self.lanes = 1 << (most.bit_length() - 1)
        # In Python's integers: products of rows and columns may be too large for int64.
        columns = [lane * batch_size // self.lanes for lane in range(self.lanes + 1)]
        self.columns = np.array(columns, dtype=np.int64)
        self.places = np.array([rows * c // batch_size for c in columns], dtype=np.int64)
        fitting = max(1, int(shuffle_mb * 1e6 / (batch_size * row_bytes)))
        # Groups of about one size: a last one of few steps would be shuffled less than others.
        self.groups = -(-self.steps // fitting)
        self.group_steps = -(-self.steps // self.groups)
        self.groups = -(-self.steps // self.group_steps)
        rows_of_lane = self.group_steps * batch_size // self.lanes
        self.block = min(max(1, rows_of_lane // _BLOCKS), _BLOCK_ROWS)

    def share(self, rank: int, count: int) -> Share:
        """The share of one rank of so many.

        Raises:
            InputError: there are more ranks than lanes.
        """
        if count > self.lanes:
            raise InputError(
                f"train.workers is {count}, more than the {self.lanes} shares that a batch of "
                f"{self.batch_size} is made of; give {self.lanes} at most, or a larger "
                "train.batch_size"
            )
        first, end = rank * self.lanes // count, (rank + 1) * self.lanes // count
        size = int(self.columns[end] - self.columns[first])
        return Share(range(first, end), size, int(self.places[first]), int(self.places[end]))

    def steps_of(self, group: int) -> int:
        """Number of steps of a group."""
        return min(self.group_steps, self.steps - group * self.group_steps)

    def runs(self, epoch: int, group: int, lane: int) -> np.ndarray:
        """Training positions of a lane's rows of a group: int64 (K, 2), starts and ends of runs.

        The rows of all runs, one after the other, are what :meth:`chosen` counts. The last group
        takes all that is left, some rows more than its steps do.
        """
        start, stop = int(self.places[lane]), int(self.places[lane + 1])
        if self.groups == 1:  # all rows are permuted below
            return np.array([[start, stop]], dtype=np.int64)
        count = -(-(stop - start) // self.block)
        starts = start + self.block * self._generator(epoch, lane).permutation(count)
        stops = np.minimum(starts + self.block, stop)
        ends = np.cumsum(stops - starts)
        taken = self.group_steps * int(self.columns[lane + 1] - self.columns[lane])
        first = group * taken
        last = stop - start if group == self.groups - 1 else first + taken
        a, b = np.searchsorted(ends, (first, last - 1), "right")
        runs = np.stack([starts[a : b + 1], stops[a : b + 1]], axis=1)
        runs[-1, 1] -= ends[b] - last
        runs[0, 0] += first - (ends[a] - (stops[a] - starts[a]))
        return runs

    def chosen(self, epoch: int, group: int, lane: int, rows: int) -> np.ndarray:
        """Which of the ``rows`` rows of :meth:`runs` each step takes: int64 (steps, c)."""
        size = int(self.columns[lane + 1] - self.columns[lane])
        steps = self.steps_of(group)
        order = self._generator(epoch, lane, 1 + group).permutation(rows)
        return order[: steps * size].reshape(steps, size)

    def positions(self, epoch: int, group: int, lanes: range) -> np.ndarray:
        """Training positions of some lanes' rows of the batches of a group: int64 (steps, size)."""
        parts = []
        for lane in lanes:
            runs = self.runs(epoch, group, lane)
            lengths = runs[:, 1] - runs[:, 0]
            ends = np.cumsum(lengths)
            chosen = self.chosen(epoch, group, lane, int(ends[-1]))
            # What is to be added to the number of a row in the runs to make it its position.
            offsets = runs[:, 1] - ends
            run = np.searchsorted(ends, chosen, "right") if len(runs) > 1 else 0
            parts.append(chosen + offsets[run])
        return np.concatenate(parts, axis=1)

    def _generator(self, epoch: int, lane: int, group: int = 0) -> np.random.Generator:
        # Streams of one key that never meet: each may take 2**64 steps of the first word. That of
        # the rows that are held out has zeros in the other words.
        return stream(self.seed, (0, group, lane, 1 + epoch))
