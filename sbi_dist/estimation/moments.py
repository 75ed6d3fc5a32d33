"""Mean and sum of squared deviations of many rows, from those of parts of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import Tensor

__all__ = ["Moments"]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of rows of some shape, in float64.

    Attributes:
        count: number of rows.
        mean: their mean.
        squares: sum of squared deviations from it.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Those of values (n, *shape), float64, n >= 1."""
        mean = values.mean(0)
        return cls(len(values), mean, (values - mean).square_().sum(0))

    @classmethod
    def total(cls, parts: Iterable[Moments]) -> Moments:
        """Those of all rows of the parts, at least one, added up in order."""
        parts = iter(parts)
        total = next(parts)
        for part in parts:
            total += part
        return total

    def __add__(self, other: Moments) -> Moments:
        """Those of the rows of both (Chan, Golub & LeVeque 1979): nothing large is subtracted."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = apart.square() * (self.count * (other.count / count))
        return Moments(count, mean, self.squares + other.squares + between)

    def sd(self, correction: int = 0) -> Tensor:
        """Standard deviation, with ``count - correction`` in place of the number of rows."""
        return (self.squares / (self.count - correction)).sqrt()
