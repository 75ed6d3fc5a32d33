"""What the steps of a compiled flow have in common."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sbi_dist.posterior.sampler.jobs import APART

__all__ = ["Run", "Step", "Tile", "Unknown", "padding", "with_bias"]


class Unknown(Exception):
    """A layer that no step is written for; says which."""


class Tile:
    """The values that a run works on, in place.

    Args:
        features, draws, observations: D, K and M.
        like: tells dtype and device.

    Attributes:
        count: N, the columns: K M of them, and some that nobody reads, see ``padding``.
        values: (D + 1, N), of which the last row is ones, so that a bias is one more
            column of the matrix before it.
        features: (D, N), the rows before it.
        log_det: (N,).
        apart: whether it is of one observation, and big enough for operations of its own.
    """

    def __init__(self, features: int, draws: int, observations: int, like: Tensor) -> None:
        self.draws, self.observations = draws, observations
        self._used = draws * observations
        self.count = self._used + padding(self._used)
        self.apart = observations == 1 and draws >= APART
        self._like, self._memory = like, dict[tuple, Tensor]()
        self.values = self.with_ones("values", features + 1, -1)
        self.values[:-1] = 0.0
        self.features = self.values[:-1]
        self.log_det = self.space("log_det", self.count)

    def space(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory that all steps of the tile share, so that the next one finds it in the cache.

        It is another one for another name or shape; what it holds is gone after a step.
        """
        if (name, shape) not in self._memory:
            self._memory[name, shape] = self._like.new_empty(shape, dtype=dtype)
        return self._memory[name, shape]

    def with_ones(self, name: str, rows: int, one: int) -> Tensor:
        """Such memory of (rows, N) whose row ``one`` is ones, and stays so."""
        memory = self.space(f"{name}, ones in {one}", rows, self.count)
        memory[one] = 1.0
        return memory

    def by_observation(self, memory: Tensor) -> Tensor:
        """(rows, N) as (rows, K, M), without what nobody reads."""
        return memory[:, : self._used].view(len(memory), self.draws, self.observations)


def padding(columns: int) -> int:
    """Columns to add, so that a draw is the same to the last bit whatever it is computed with.

    BLAS adds up in another order where there are few columns (MKL below 12); and torch computes
    the last elements of an array, where they fill no two registers, with other functions.
    """
    return -columns % 32


class Run(Protocol):
    """A step bound to the memory of a tile."""

    def given(self, conditions: Tensor) -> None:
        """Take the observations: its share of the program's conditions, (condition_rows, M)."""
        ...

    def inverse(self, with_log_det: bool) -> None:
        """From noise to u; adds log |d out / d in| to the tile's where it is asked for."""
        ...

    def forward(self) -> None:
        """From u to noise; adds log |d out / d in| to the tile's."""
        ...


class Step(Protocol):
    """A part of a flow.

    Attributes:
        condition_rows: numbers that it needs of each observation.
        products: multiplications in its matrix products for one draw.
        width: rows of the largest array that a tile needs for it.
    """

    condition_rows: int
    products: int
    width: int

    def to(self, like: Tensor) -> None: ...

    def conditions(self, context: Tensor) -> Tensor:
        """(condition_rows, B) of contexts (B, C)."""
        ...

    def bind(self, tile: Tile) -> Run: ...


def with_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """(rows, columns + 1): the bias as last column."""
    return torch.cat([weight.detach(), bias.detach()[:, None]], dim=1)
