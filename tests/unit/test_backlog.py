"""The work that is left: every shard is taken once, whatever the drivers do to their order."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sbi_dist.simulation import backlog as module
from sbi_dist.simulation.actor import Piece
from sbi_dist.simulation.backlog import Backlog
from sbi_dist.simulation.plan import Extent, plan_shards


class AnyOrder(RuleBasedStateMachine):
    """Takes, returns, jumps and drops in any order; ``held`` are the pieces taken and not done."""

    def __init__(self) -> None:
        super().__init__()
        # Blocks that end in the midst of it.
        self.block, module._BLOCK = module._BLOCK, 7
        self.shards = list(plan_shards([Extent(0, 0, 4, 98)], None))
        self.stored = {2, 3, 11}
        self.backlog = Backlog(self.shards, frozenset(self.stored))
        self.held: list[Piece] = []
        self.returned: list[Piece] = []
        self.done: Counter[tuple[int, int]] = Counter()  # by shard and row
        self.taken: set[int] = set()
        self.dropped: dict[int, set[int]] = {}  # rows of pieces that had come back
        self.unseen: set[int] = set()  # dropped before they were taken

    def teardown(self) -> None:
        while (piece := self.backlog.take()) is not None:
            self.finish(piece)
        for piece in self.held:
            self.finish(piece)
        assert len(self.backlog) == 0 == self.backlog.rows(10**6)
        module._BLOCK = self.block
        for shard in self.shards:
            # Pieces that were being simulated when their shard was dropped are finished.
            never = shard.index in self.stored | self.unseen
            dropped = self.dropped.get(shard.index, set())
            for row in range(shard.size):
                expected = 0 if never or row in dropped else 1
                assert self.done[shard.index, row] == expected, (shard, row)

    def finish(self, piece: Piece) -> None:
        self.done.update((piece.shard.index, row) for row in range(piece.start, piece.stop))

    @rule()
    def take(self) -> None:
        piece = self.backlog.take()
        if self.returned:  # those first, in order
            assert piece == self.returned.pop(0)
        elif piece is not None:
            assert piece.whole
        if piece is not None:
            self.taken.add(piece.shard.index)
            self.held.append(piece)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back_in_parts(self, data) -> None:
        piece = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        cuts = sorted(data.draw(st.sets(st.integers(piece.start, piece.stop))))
        edges = [piece.start, *cuts, piece.stop]
        parts = [Piece(piece.shard, a, b) for a, b in itertools.pairwise(edges) if a < b]
        self.backlog.give_back(parts)
        self.returned = parts + self.returned

    @precondition(lambda self: self.held)
    @rule()
    def simulate(self) -> None:
        self.finish(self.held.pop())

    @rule()
    def jump(self) -> None:
        self.backlog.jump()

    @rule(indexes=st.sets(st.integers(0, 24), max_size=5))
    def others_stored(self, indexes) -> None:
        self.unseen |= indexes - self.taken
        for piece in self.returned:
            if piece.shard.index in indexes:
                rows = range(piece.start, piece.stop)
                self.dropped.setdefault(piece.shard.index, set()).update(rows)
        self.returned = [each for each in self.returned if each.shard.index not in indexes]
        self.backlog.drop(indexes)

    @invariant()
    def counts_what_is_left(self) -> None:
        everything = sum(shard.size for shard in self.shards)
        returned = sum(map(len, self.returned))
        assert self.backlog.rows(3) <= 3
        assert returned <= self.backlog.rows(10**6) <= everything
        assert len(self.returned) <= len(self.backlog)
        assert (len(self.backlog) > 0) == (self.backlog.rows(1) > 0)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


def test_drivers_that_jump_away_from_each_other_take_other_shards() -> None:
    shards = list(plan_shards([Extent(0, 0, 1, 10_000)], None))
    first, second = Backlog(shards, ()), Backlog(shards, ())
    first.jump(), second.jump()
    taken = [{backlog.take().shard.index for _ in range(50)} for backlog in (first, second)]
    # Two runs of 50 among 10,000 places overlap with a probability of 1%; three tries of it fail
    # once in a million.
    tries = 1
    while taken[0] & taken[1] and tries < 3:
        first.jump(), second.jump()
        taken = [{backlog.take().shard.index for _ in range(50)} for backlog in (first, second)]
        tries += 1
    assert not taken[0] & taken[1]


def test_a_plan_without_end_is_looked_at_in_blocks(monkeypatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 10)
    looked = 0

    def endless():
        nonlocal looked
        for shard in plan_shards([Extent(0, 0, 5, None)], None):
            looked += 1
            yield shard

    backlog = Backlog(endless(), {1, 2})
    assert len(backlog) == 10 and backlog.rows(23) == 23 and backlog.rows(10**9) == 50
    assert looked == 12
    backlog.jump()
    taken = [backlog.take().shard.index for _ in range(35)]
    assert len(set(taken)) == 35 and not {1, 2} & set(taken)
    # Every block in full before the next one.
    assert set(taken[:10]) == set(range(12)) - {1, 2} and looked == 42


def test_a_stored_plan_leaves_nothing() -> None:
    shards = list(plan_shards([Extent(0, 0, 5, 20)], None))
    backlog = Backlog(shards, range(4))
    backlog.jump()
    assert len(backlog) == 0 and backlog.take() is None and backlog.rows(5) == 0
    backlog = Backlog(shards, ())
    backlog.drop({0, 1, 2})
    assert backlog.take() == Piece(shards[3], 0, 5) and backlog.take() is None


@pytest.mark.parametrize(("start", "stop", "whole"), [(0, 5, True), (0, 4, False), (1, 5, False)])
def test_pieces(start, stop, whole) -> None:
    piece = Piece(next(plan_shards([Extent(0, 0, 5, 20)], None)), start, stop)
    assert len(piece) == stop - start and piece.whole == whole
