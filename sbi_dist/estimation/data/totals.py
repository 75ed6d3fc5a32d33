"""What a rank's rows contribute to the standardization, lane by lane.

A lane belongs to one rank whatever the number of ranks, and its rows are added up in pieces of
fixed sizes, however they arrive. So the lanes' contributions, added up in order, are the same
numbers to the last bit for any number of ranks, read from memory or from the store.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator

import numpy as np

from sbi_dist.estimation.data.held_out import HeldOut
from sbi_dist.estimation.data.order import Order
from sbi_dist.estimation.data.rows import Pair
from sbi_dist.estimation.standardize import Standardization, Sums, as_tensor

__all__ = ["Totals", "lane_edges"]


def lane_edges(order: Order, held_out: HeldOut) -> list[int]:
    """Usable rows at which the lanes' stretches begin, and the end of the last one.

    A stretch has a lane's training rows and the held-out rows between them and the next lane's.
    """
    starts = [held_out.between(place, place + 1)[0] for place in order.places[1:-1].tolist()]
    return [0, *starts, held_out.count]


class Totals:
    """Adds up the rows of some lanes, which are given in order.

    Args:
        standardization: whose scale and bijection are used.
        training, validation: number of rows of each lane of either kind.
        piece: rows to be added up at a time.
    """

    def __init__(
        self,
        standardization: Standardization,
        training: list[int],
        validation: list[int],
        piece: int,
    ) -> None:
        self._standardization = standardization
        self._training, self._validation = _Cut(training, piece), _Cut(validation, piece)
        self.sums: list[Sums | None] = [None] * len(training)
        self.validation_log_dets = [0.0] * len(validation)

    def add(self, training: Pair, validation_theta: np.ndarray) -> None:
        """Take the next rows of both kinds."""
        for lane, (theta, x) in self._training.add(*training):
            part, so_far = self._standardization.sums([(theta, x)]), self.sums[lane]
            self.sums[lane] = part if so_far is None else so_far + part
        bijection = self._standardization.bijection
        for lane, (theta,) in self._validation.add(validation_theta):
            log_det = bijection.log_det(bijection.unconstrain(as_tensor(theta)))
            self.validation_log_dets[lane] += float(log_det.sum())


class _Cut:
    """Arrays that arrive in any parts, given back in pieces of fixed sizes."""

    def __init__(self, counts: Iterable[int], piece: int) -> None:
        self._wanted = (
            (lane, min(piece, count - start))
            for lane, count in enumerate(counts)
            for start in range(0, count, piece)
        )
        self._next = next(self._wanted, None)
        self._parts: collections.deque[tuple[np.ndarray, ...]] = collections.deque()
        self._length = 0

    def add(self, *arrays: np.ndarray) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        """Pieces that are complete with these rows, and the lane of each."""
        if len(arrays[0]):
            self._parts.append(arrays)
            self._length += len(arrays[0])
        while self._next is not None and self._length >= self._next[1]:
            lane, size = self._next
            yield lane, self._take(size)
            self._next = next(self._wanted, None)

    def _take(self, size: int) -> tuple[np.ndarray, ...]:
        self._length -= size
        taken = []
        while size:
            part = self._parts.popleft()
            taken.append(tuple(array[:size] for array in part))
            if len(part[0]) > size:
                self._parts.appendleft(tuple(array[size:] for array in part))
            size -= len(taken[-1][0])
        if len(taken) == 1:
            return taken[0]
        return tuple(np.concatenate(arrays) for arrays in zip(*taken, strict=True))
