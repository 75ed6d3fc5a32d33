"""Rows of a source by number: usable rows over all shards, training rows by position."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TypeVar

import numpy as np

from sbi_dist.estimation.data.held_out import HeldOut
from sbi_dist.estimation.data.source import Source

__all__ = ["Pair", "Reader", "Rows"]

Pair = tuple[np.ndarray, np.ndarray]  # theta and x of the same rows
Item = TypeVar("Item")
Result = TypeVar("Result")

_LOOK_S = 0.2
_SHARDS = 4  # whole shards that are in memory at a time, at most


class Reader:
    """Reads several things at a time, where that is faster; to be closed."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._pool = futures.ThreadPoolExecutor(at_once, "sbi-dist-read") if at_once > 1 else None

    def read(
        self,
        get: Callable[[Item], Result],
        items: Iterable[Item],
        look: Callable[[], None] = lambda: None,
    ) -> Iterator[Result]:
        """``get`` of each item, in order; ``look`` is called again and again, and may raise."""
        if self._pool is None:
            for item in items:
                look()
                yield get(item)
            return
        items = iter(items)
        waiting: collections.deque[futures.Future[Result]] = collections.deque()
        while True:
            room = self._at_once - len(waiting)
            waiting.extend(self._pool.submit(get, item) for item in itertools.islice(items, room))
            if not waiting:
                return
            look()
            while not waiting[0].done():
                futures.wait([waiting[0]], _LOOK_S)
                look()
            yield waiting.popleft().result()

    def close(self) -> None:
        """Begin nothing more; what is on the way ends by itself."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


class Rows:
    """The rows of a source and which of them are held out.

    Usable rows of all shards have the numbers 0..count-1, in order; those that are not held out
    have the training positions 0..training-1.
    """

    def __init__(self, source: Source, held_out: HeldOut) -> None:
        self.source, self.held_out = source, held_out
        self._offsets = np.concatenate([[0], np.cumsum(source.counts, dtype=np.int64)])

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The shards of usable rows ``start`` to ``stop``, and which of their rows these are."""
        k = int(np.searchsorted(self._offsets, start, "right")) - 1
        while start < stop:
            first, end = int(self._offsets[k]), min(stop, int(self._offsets[k + 1]))
            if start < end:
                yield k, start - first, end - first
            start, k = max(start, end), k + 1

    def whole(self, start: int, stop: int, most: int) -> Iterator[tuple[int, Pair]]:
        """Usable rows ``start`` to ``stop``; their shards are read in full and checked.

        Yields the number of the first row of each part of up to ``most``, and theta and x.
        """
        reader = Reader(min(_SHARDS, self.source.at_once))
        try:
            for k, first, stop_here, (theta, x) in reader.read(
                self._shard, self._pieces(start, stop)
            ):
                for a in range(first, stop_here, most):
                    rows = slice(a, min(a + most, stop_here))
                    yield int(self._offsets[k]) + a, (theta[rows], x[rows])
        finally:
            reader.close()

    def _shard(self, piece: tuple[int, int, int]) -> tuple[int, int, int, Pair]:
        return *piece, self.source.read(piece[0])

    def usable(self, start: int, stop: int) -> Pair:
        """Usable rows ``start`` to ``stop``; no others are read where the shards allow it."""
        parts = [self.source.read_rows(*piece) for piece in self._pieces(start, stop)]
        if len(parts) == 1:
            return parts[0]
        parts = parts or [self.source.read_rows(0, 0, 0)]
        return np.concatenate([each[0] for each in parts]), np.concatenate([p[1] for p in parts])

    def training(self, start: int, stop: int) -> Pair:
        """The rows of training positions ``start`` to ``stop``, of which there is at least one."""
        first, end, held = self.held_out.between(start, stop)
        return _parted(self.usable(first, end), held - first)[0]

    def validation(self, start: int, stop: int) -> Pair:
        """The held-out rows among usable rows ``start`` to ``stop``."""
        return self.parted(start, self.usable(start, stop))[1]

    def parted(self, first: int, rows: Pair) -> tuple[Pair, Pair]:
        """Training rows and held-out rows of usable rows from ``first`` on."""
        return _parted(rows, self.held_out.rows(first, first + len(rows[0])) - first)


def _parted(rows: Pair, held: np.ndarray) -> tuple[Pair, Pair]:
    theta, x = rows
    if not len(held):
        return rows, (theta[:0], x[:0])
    # Faster than numpy.delete for a few rows of many.
    kept = np.ones(len(theta), dtype=bool)
    kept[held] = False
    index = np.flatnonzero(kept)
    return (theta.take(index, 0), x.take(index, 0)), (theta.take(held, 0), x.take(held, 0))
