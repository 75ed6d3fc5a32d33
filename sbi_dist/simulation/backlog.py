"""The work that is left: shards in order, and pieces that came back from dead or busy actors."""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Collection, Iterable, Iterator

from sbi_dist.simulation.actor import Piece
from sbi_dist.simulation.plan import Shard

__all__ = ["Backlog"]

# Shards that are looked at ahead, of a plan that may be without end.
_BLOCK = 100_000


class Backlog:
    """Pieces to be simulated.

    Args:
        shards: the planned shards in order.
        stored: indexes of those that are stored already.
    """

    def __init__(self, shards: Iterable[Shard], stored: Collection[int]) -> None:
        self._stored = set(stored)
        self._shards: Iterator[Shard] = (each for each in shards if each.index not in self._stored)
        self._block: collections.deque[Shard] = collections.deque()
        self._block_rows = 0
        self._returned: collections.deque[Piece] = collections.deque()

    def _fill(self) -> None:
        if not self._block:
            self._take_block(itertools.islice(self._shards, _BLOCK))

    def _take_block(self, shards: Iterable[Shard]) -> None:
        self._block = collections.deque(shards)
        self._block_rows = sum(shard.size for shard in self._block)

    def __len__(self) -> int:
        """Pieces that are left, of a plan without end at least so many."""
        self._fill()
        return len(self._block) + len(self._returned)

    def rows(self, most: int) -> int:
        """Rows that are left, up to ``most``; of a plan without end at least so many."""
        self._fill()
        return min(self._block_rows + sum(len(piece) for piece in self._returned), most)

    def take(self) -> Piece | None:
        """The next piece: one that came back, or else the next shard."""
        if self._returned:
            return self._returned.popleft()
        self._fill()
        if not self._block:
            return None
        shard = self._block.popleft()
        self._block_rows -= shard.size
        return Piece(shard, 0, shard.size)

    def give_back(self, pieces: Iterable[Piece]) -> None:
        """Pieces to be simulated before all others."""
        self._returned.extendleft(reversed(list(pieces)))

    def jump(self) -> None:
        """Go on at another place: another driver is at work at this one.

        Drivers that jump away from each other share the work without a word between them.
        """
        self._fill()
        if self._block:
            self._block.rotate(-random.randrange(len(self._block)))

    def drop(self, stored: Collection[int]) -> None:
        """Leave out shards that another driver stored."""
        self._stored.update(stored)
        self._take_block([each for each in self._block if each.index not in self._stored])
        self._returned = collections.deque(
            piece for piece in self._returned if piece.shard.index not in stored
        )
