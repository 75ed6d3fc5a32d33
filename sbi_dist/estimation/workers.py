"""A worker's place among those that train together, and what they tell each other.

With one worker nothing is sent. With more, all of them call the same of these methods in the same
order, or wait for each other for ever; who ends a worker that failed ends the others too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

__all__ = ["ALONE", "Workers"]


@dataclasses.dataclass(frozen=True)
class Workers:
    """This worker's place, and its device.

    Attributes:
        rank: its number, from 0.
        count: how many there are; above 1, torch's default process group connects them.
        device: where it computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")

    def add(self, values: Tensor) -> None:
        """Replace a tensor on the device by its sum over all workers."""
        if self.count > 1:
            torch.distributed.all_reduce(values)

    def total(self, *values: float) -> list[float]:
        """Sums of the values over all workers, in float64."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.add(summed)
        return summed.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all workers, in order of rank. They must be picklable."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The value that the worker of rank 0 gave."""
        if self.count == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]


ALONE = Workers()
