"""A rank's rows in memory, or on its device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sbi_dist.estimation.data.order import Order, Share

__all__ = ["VALIDATION_ROWS", "Batch", "Resident", "steps_at_once", "validation_batches"]

Batch = tuple[Tensor, Tensor]  # u and x of the same rows

VALIDATION_ROWS = 4096
_AT_ONCE_ROWS, _AT_ONCE_BYTES = 16384, 16_000_000


def steps_at_once(size: int, row_bytes: int) -> int:
    """Steps whose rows are gathered, or sent to a device, by one operation."""
    return max(1, min(_AT_ONCE_ROWS // size, _AT_ONCE_BYTES // (size * row_bytes)))


class Resident:
    """Batches of rows in memory.

    Args:
        order, share: which rows make a batch, and which of them are here.
        training, validation: u and x of the rows of the share, in order, and of the held-out
            ones between them; on the host or on the device.
        device: where batches go.
    """

    def __init__(
        self, order: Order, share: Share, training: Batch, validation: Batch, device: torch.device
    ) -> None:
        self._order, self._share, self._device = order, share, device
        self._training, self._validation = training, validation

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """u (n, D) and x (n, *x_shape) of the batches of an epoch from the ``first`` one on."""
        order, share = self._order, self._share
        u, x = self._training
        at_once = steps_at_once(share.size, 4 * (u[:1].numel() + x[:1].numel()))
        for group in range(first // order.group_steps, order.groups):
            positions = order.positions(epoch, group, share.lanes)
            positions -= share.start
            index = torch.from_numpy(positions)[max(0, first - group * order.group_steps) :]
            for steps in index.split(at_once):
                rows = steps.reshape(-1).to(u.device)
                here = [
                    each.index_select(0, rows).view(len(steps), share.size, *each.shape[1:])
                    for each in (u, x)
                ]
                yield from zip(*(each.to(self._device).unbind(0) for each in here), strict=True)

    def validation_batches(self) -> Iterator[Batch]:
        """u and x of the held-out rows, some at a time."""
        return validation_batches(self._validation, self._device)

    def close(self) -> None:
        """Nothing is open."""


def validation_batches(rows: Batch, device: torch.device) -> Iterator[Batch]:
    """Rows in memory, some at a time, on a device."""
    u, x = rows
    row_bytes = 4 * (u[:1].numel() + x[:1].numel())
    size = max(1, min(VALIDATION_ROWS, _AT_ONCE_BYTES // max(1, row_bytes)))
    for start in range(0, len(u), size):
        yield u[start : start + size].to(device), x[start : start + size].to(device)
