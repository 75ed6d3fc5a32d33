"""A rank's rows read from the store again in every epoch, as they do not fit its memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import torch

from sbi_dist.estimation.data.order import Order, Share
from sbi_dist.estimation.data.prefetch import Prefetch
from sbi_dist.estimation.data.resident import (
    VALIDATION_ROWS,
    Batch,
    steps_at_once,
    validation_batches,
)
from sbi_dist.estimation.data.rows import Reader, Rows
from sbi_dist.estimation.standardize import Standardization, as_tensor, chunk_rows

__all__ = ["Streamed"]

Placed = tuple[np.ndarray, np.ndarray, np.ndarray]  # theta, x, and the place of each row in a group

_READ_BYTES = 16_000_000  # of usable rows among which held-out ones are looked for


class Streamed:
    """Batches of rows that a thread reads and standardizes, a group of steps ahead.

    At most two groups are in memory, the one in use and the next one.

    Args:
        rows: where they are.
        order, share: which rows make a batch, and which of them are read here.
        stretch: the usable rows of the share and those held out between them.
        standardization: what makes u and x of them.
        validation: u and x of the held-out rows; None where these are streamed too.
        device: where batches go.
    """

    def __init__(
        self,
        rows: Rows,
        order: Order,
        share: Share,
        stretch: range,
        standardization: Standardization,
        validation: Batch | None,
        device: torch.device,
    ) -> None:
        self._rows, self._order, self._share, self._stretch = rows, order, share, stretch
        self._standardization, self._validation, self._device = standardization, validation, device
        self._theta_size, self._x_shape = rows.source.theta_size, rows.source.x_shape
        self._floats = self._theta_size + math.prod(self._x_shape)
        self._open: weakref.WeakSet[Prefetch[Batch]] = weakref.WeakSet()

    # ---- training rows --------------------------------------------------------------------------

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """u (n, D) and x (n, *x_shape) of the batches of an epoch from the ``first`` one on."""
        at_once = steps_at_once(self._share.size, 4 * self._floats)

        def groups(look: Callable[[], None]) -> Iterator[Batch]:
            reader = Reader(self._rows.source.at_once)
            try:
                for group in range(first // self._order.group_steps, self._order.groups):
                    skipped = max(0, first - group * self._order.group_steps)
                    yield self._group(epoch, group, skipped, reader, look)
            finally:
                reader.close()

        prefetch = self._prefetch(groups)
        try:
            in_use = 0
            for u, x in prefetch:
                in_use += 1
                for steps in zip(u.split(at_once), x.split(at_once), strict=True):
                    for batch in zip(*(each.to(self._device) for each in steps), strict=True):
                        yield batch
                        if in_use == 2:
                            # Only now has the caller let go of the last batch of the group before.
                            prefetch.let_go()
                            in_use = 1
        finally:
            prefetch.close()

    def _group(
        self, epoch: int, group: int, skipped: int, reader: Reader, look: Callable[[], None]
    ) -> Batch:
        """u (steps, n, D) and x (steps, n, *x_shape) of a group without its first steps."""
        steps, size = self._order.steps_of(group) - skipped, self._share.size
        u = torch.empty(steps * size, self._theta_size)
        x = torch.empty(steps * size, *self._x_shape)
        pieces = reader.read(self._read, self._pieces(epoch, group, skipped), look)
        for theta_here, x_here, places in _collected(pieces, chunk_rows(self._floats)):
            here = torch.from_numpy(places)
            u.index_copy_(0, here, self._standardization.u_alone(as_tensor(theta_here)))
            x.index_copy_(0, here, self._standardization.x(as_tensor(x_here)))
        return u.view(steps, size, *u.shape[1:]), x.view(steps, size, *x.shape[1:])

    def _pieces(
        self, epoch: int, group: int, skipped: int
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Training positions to read, from and to, and the place in the group of each row.

        A row without a place, as its step is skipped or it is left out of this epoch, has -1.
        """
        order, share, most = self._order, self._share, chunk_rows(self._floats)
        column = 0
        for lane in share.lanes:
            runs = order.runs(epoch, group, lane)
            ends = np.cumsum(runs[:, 1] - runs[:, 0])
            chosen = order.chosen(epoch, group, lane, int(ends[-1]))[skipped:]
            steps, width = chosen.shape
            places = np.full(int(ends[-1]), -1, dtype=np.int64)
            rows = np.arange(steps, dtype=np.int64)[:, None] * share.size
            places[chosen] = rows + np.arange(column, column + width)
            column += width
            taken = 0
            for start, stop in runs.tolist():
                for a in range(start, stop, most):
                    b = min(a + most, stop)
                    yield a, b, places[taken : taken + b - a]
                    taken += b - a

    def _read(self, piece: tuple[int, int, np.ndarray]) -> Placed:
        start, stop, places = piece
        theta, x = self._rows.training(start, stop)
        if places.min() < 0:
            used = np.flatnonzero(places >= 0)
            theta, x, places = theta.take(used, 0), x.take(used, 0), places.take(used)
        return theta, x, places

    # ---- held-out rows --------------------------------------------------------------------------

    def validation_batches(self) -> Iterator[Batch]:
        """u and x of the held-out rows, some at a time."""
        if self._validation is not None:
            yield from validation_batches(self._validation, self._device)
            return
        held_out = self._rows.held_out
        fraction = held_out.validation / held_out.count
        step = min(int(VALIDATION_ROWS / fraction), _READ_BYTES // (4 * self._floats))

        def chunks(look: Callable[[], None]) -> Iterator[Batch]:
            reader = Reader(self._rows.source.at_once)
            starts = range(self._stretch.start, self._stretch.stop, max(1, step))
            parts = ((a, min(a + max(1, step), self._stretch.stop)) for a in starts)
            try:
                for theta, x in reader.read(lambda part: self._rows.validation(*part), parts, look):
                    if len(theta):
                        here = self._standardization
                        yield here.u_alone(as_tensor(theta)), here.x(as_tensor(x))
            finally:
                reader.close()

        prefetch = self._prefetch(chunks)
        try:
            for u, x in prefetch:
                yield u.to(self._device), x.to(self._device)
                prefetch.let_go()
        finally:
            prefetch.close()

    # ---- threads --------------------------------------------------------------------------------

    def _prefetch(self, make: Callable[[Callable[[], None]], Iterator[Batch]]) -> Prefetch[Batch]:
        prefetch = Prefetch(make)
        self._open.add(prefetch)
        return prefetch

    def close(self) -> None:
        """End the threads of iterators that were left."""
        for prefetch in list(self._open):
            prefetch.close()


def _collected(pieces: Iterator[Placed], rows: int) -> Iterator[Placed]:
    """The pieces, joined until they have so many rows: each operation on rows has its price."""
    waiting: list[Placed] = []
    count = 0
    for piece in pieces:
        waiting.append(piece)
        count += len(piece[2])
        if count >= rows:
            yield _joined(waiting)
            waiting, count = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(pieces: list[Placed]) -> Placed:
    if len(pieces) == 1:
        return pieces[0]
    theta, x, places = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    return theta, x, places
