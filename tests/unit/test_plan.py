"""The plan: which shards there are, whatever is appended to a dataset, and their default size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.simulation.plan import Extent, Shard, plan_shards, shard_size_for

few = settings(deadline=None, max_examples=50)
sizes = st.integers(1, 200)


def check_contiguous(shards: Iterable[Shard]) -> int:
    """Indexes and rows without gaps; the number of rows."""
    start = 0
    for number, shard in enumerate(shards):
        assert shard.index == number and shard.start == start and shard.size >= 1
        start += shard.size
    return start


def appended(first: tuple[int, int], appends: list[tuple[int, int]]) -> list[Extent]:
    """Extents of a dataset begun with (rows, shard size) and appended to by (more rows, size)."""
    rows, size = first
    extents = [Extent(0, 0, size, rows)]
    for more, size in appends:
        stop = extents[-1].stop
        assert stop is not None
        extents.append(extents[-1].after(size, stop + more))
    return extents


appends = st.lists(st.tuples(st.integers(1, 2000), sizes), max_size=5)
begun = st.tuples(st.integers(1, 2000), sizes)


@given(st.integers(1, 10_000), st.integers(1, 500))
@few
def test_plan_covers_exactly(count, size) -> None:
    shards = list(plan_shards([Extent(0, 0, size, count)], count))
    assert check_contiguous(shards) == count
    assert all(shard.size == size for shard in shards[:-1]) and shards[-1].size <= size
    assert len({shard.key for shard in shards}) == len(shards)
    # The order of the keys is the order of the rows.
    assert sorted(shard.key for shard in shards) == [shard.key for shard in shards]


@given(begun, appends)
@few
def test_appending_keeps_all_earlier_shards(first, more) -> None:
    extents = appended(first, more)
    stops = [extent.stop for extent in extents]
    for number, stop in enumerate(stops, 1):
        earlier = list(plan_shards(extents[:number], None))
        assert check_contiguous(earlier) == stop
        assert list(plan_shards(extents, stop)) == earlier
    everything = list(plan_shards(extents, None))
    assert check_contiguous(everything) == stops[-1]
    assert len({shard.key for shard in everything}) == len(everything)


@given(begun, appends, st.integers(1, 12_000))
@few
def test_the_first_rows_are_in_the_first_shards(first, more, count) -> None:
    extents = appended(first, more)
    total = extents[-1].stop
    shards = list(plan_shards(extents, count))
    assert shards == list(plan_shards(extents, None))[: len(shards)]
    rows = check_contiguous(shards)
    # All of the rows asked for that are planned, and more only in the last shard.
    assert rows >= min(count, total) and rows - shards[-1].size < count


@given(begun, appends, sizes)
@few
def test_a_plan_without_end_goes_on_behind_all_others(first, more, size) -> None:
    extents = appended(first, more)
    endless = [*extents, extents[-1].after(size, None)]
    before = list(plan_shards(extents, None))
    shards = list(itertools.islice(plan_shards(endless, None), len(before) + 20))
    assert shards[: len(before)] == before and len(shards) == len(before) + 20
    check_contiguous(shards)
    assert {shard.size for shard in shards[len(before) :]} == {size}
    # Of so many rows, it has an end.
    count = extents[-1].stop + 3 * size
    assert check_contiguous(plan_shards(endless, count)) == count


# ---- the default size ---------------------------------------------------------------------------


@given(st.integers(1, 10**8), st.booleans(), st.integers(1, 10**7))
@few
def test_default_shard_size(count, batched, floats) -> None:
    size = shard_size_for(count, batched, floats)
    assert 1 <= size <= count
    # A row is its floats of 4 bytes, an id, a duration and a status; 8 MiB of them at most.
    assert size == 1 or size * (4 * floats + 24) <= 8 * 1024**2
    assert size <= (65_536 if batched else 1_024)
    shards = math.ceil(count / size)
    if shards > 64:
        # More shards than 64 only where one more row would be too large a shard.
        limit = 65_536 if batched else 1_024
        assert size == limit or (size + 1) * (4 * floats + 24) > 8 * 1024**2
    assert count < 64 or shards >= 32


@pytest.mark.parametrize(("batched", "rows"), [(True, 4096), (False, 64)])
def test_shards_of_a_plan_without_end_are_a_sixteenth_of_the_largest(batched, rows) -> None:
    assert shard_size_for(None, batched, 6) == rows
    assert shard_size_for(None, batched, 10**7) == 1
    # 8 MiB, and a sixteenth of it, of rows of 1 MiB less their other columns
    assert shard_size_for(10**9, batched, 2**18 - 6) == 8
    assert shard_size_for(None, batched, 2**14 - 6) == 8


# ---- random streams -----------------------------------------------------------------------------


def test_streams_differ_by_seed_purpose_shard_and_use() -> None:
    states = {
        tuple(stream.generate_state(4))
        for seed in range(3)
        for purpose in range(3)
        for index in range(3)
        for stream in Shard(index, 0, 1).streams(seed, purpose)
    }
    assert len(states) == 3 * 3 * 3 * 3


def test_streams_do_not_depend_on_the_place_or_size_of_a_shard() -> None:
    """A shard of another plan, with other shards before it, has the same random numbers."""
    one, other = Shard(4, 0, 10).streams(7), Shard(4, 400, 3).streams(7)
    for first, second in zip(one, other, strict=True):
        assert first.generate_state(4).tolist() == second.generate_state(4).tolist()
