"""Which rows are held out, and the order of the others: the same for any number of ranks."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sbi_dist.errors import InputError
from sbi_dist.estimation.data.held_out import HeldOut, split
from sbi_dist.estimation.data.order import Order
from sbi_dist.estimation.data.streams import stream

some = settings(deadline=None, max_examples=60)
fractions = st.floats(0.01, 0.9)


# ---- held-out rows ------------------------------------------------------------------------------


def all_at_once(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition: one random row of each stratum, from one stream."""
    edges = np.floor(np.arange(int(count * fraction) + 2) / fraction)
    picks = np.random.Generator(np.random.Philox(key=seed)).random(len(edges) - 1)
    held_out = np.floor(edges[:-1] + picks * np.diff(edges)).astype(int)
    if held_out[0] >= count:
        held_out[0] = int(picks[0] * count)
    held_out = held_out[held_out < count]
    return np.setdiff1d(np.arange(count), held_out, assume_unique=True), held_out


def usable(count: int, fraction: float, seed: int) -> bool:
    training, held_out = all_at_once(count, fraction, seed)
    return count >= 20 and len(held_out) >= 1 and len(training) >= 10


@some
@given(st.integers(1, 3000), fractions, st.integers(0, 2**70), st.data())
@example(20, 0.04, 0, None)
def test_held_out_rows_of_a_range(count, fraction, seed, data) -> None:
    if not usable(count, fraction, seed):
        with pytest.raises(InputError, match=f"{count} usable simulations are too few"):
            split(count, fraction, seed)
        return
    training, rows = all_at_once(count, fraction, seed)
    found = split(count, fraction, seed)
    np.testing.assert_array_equal(found[0], training)
    np.testing.assert_array_equal(found[1], rows)
    held_out = HeldOut(count, fraction, seed)
    assert (held_out.training, held_out.validation) == (len(training), len(rows))
    cuts = [0, count // 3, count // 2, count]
    if data is not None:
        cuts = sorted(data.draw(st.lists(st.integers(0, count), min_size=1, max_size=6)))
    for start, stop in itertools.pairwise(cuts):
        inside = rows[(rows >= start) & (rows < stop)]
        np.testing.assert_array_equal(held_out.rows(start, stop), inside)
    for row in cuts:
        assert held_out.before(row) == np.sum(rows < row)
    for start in {0, len(training) // 3, len(training) - 1}:
        for stop in {start + 1, (start + len(training) + 1) // 2, len(training)}:
            first, end, between = held_out.between(start, stop)
            assert (first, end) == (training[start], training[stop - 1] + 1)
            np.testing.assert_array_equal(between, rows[(rows > first) & (rows < end)])


def test_held_out_rows_of_very_many() -> None:
    count = 10**13
    held_out = HeldOut(count, 0.1, 5)
    assert held_out.validation == pytest.approx(count / 10, abs=1)
    first, end, between = held_out.between(7 * 10**12, 7 * 10**12 + 1000)
    assert end - first == 1000 + len(between) and 100 < len(between) < 125
    assert first - held_out.before(first) == 7 * 10**12
    np.testing.assert_array_equal(held_out.rows(first, end), between)


def test_streams_begin_anywhere() -> None:
    for key, counter in ((0, (0, 0, 0, 0)), (2**100 + 7, (5, 1, 2**63, 2**64 - 1))):
        numpys = np.random.Generator(
            np.random.Philox(key=key, counter=np.array(counter, np.uint64))
        )
        np.testing.assert_array_equal(stream(key, counter).random(9), numpys.random(9))
        # Whatever was drawn before, of whatever type.
        stream(key, counter).integers(0, 9, 3, dtype=np.uint32)
        expected = np.random.Generator(
            np.random.Philox(key=key, counter=np.array(counter, np.uint64))
        ).permutation(50)
        np.testing.assert_array_equal(stream(key, counter).permutation(50), expected)


# ---- batches ------------------------------------------------------------------------------------


@st.composite
def orders(draw: st.DrawFn) -> Order:
    rows = draw(st.integers(10, 3000))
    batch_size = draw(st.integers(1, rows))
    row_bytes = draw(st.sampled_from([4, 52, 4000]))
    groups = draw(st.integers(1, 12))  # about so many
    shuffle_mb = rows * row_bytes / groups / 1e6
    return Order(rows, batch_size, row_bytes, shuffle_mb, draw(st.integers(0, 2**64)))


def epoch_of(order: Order, epoch: int, rank: int = 0, count: int = 1) -> np.ndarray:
    lanes = order.share(rank, count).lanes
    return np.concatenate([order.positions(epoch, g, lanes) for g in range(order.groups)])


@some
@given(orders(), st.integers(0, 10**6))
def test_an_epoch_takes_rows_once(order, epoch) -> None:
    batches = epoch_of(order, epoch)
    assert batches.shape == (order.rows // order.batch_size, order.batch_size)
    assert len(np.unique(batches)) == batches.size
    assert batches.min() >= 0 and batches.max() < order.rows
    # The lanes' stretches tile all rows, and each gives its own rows alone.
    assert order.places[0] == 0 and order.places[-1] == order.rows
    assert order.columns[-1] == order.batch_size
    for lane in range(order.lanes):
        own = batches[:, order.columns[lane] : order.columns[lane + 1]]
        assert order.places[lane] <= own.min() and own.max() < order.places[lane + 1]


@some
@given(orders(), st.integers(0, 1000), st.integers(1, 300))
def test_all_ranks_make_the_same_batches(order, epoch, count) -> None:
    if count > order.lanes:
        with pytest.raises(InputError, match=rf"train\.workers is {count}, more than the "):
            order.share(0, count)
        return
    whole = epoch_of(order, epoch)
    shares = [order.share(rank, count) for rank in range(count)]
    np.testing.assert_array_equal(
        np.concatenate([epoch_of(order, epoch, rank, count) for rank in range(count)], axis=1),
        whole,
    )
    assert [share.start for share in shares[1:]] == [share.stop for share in shares[:-1]]
    assert shares[0].start == 0 and shares[-1].stop == order.rows
    assert sum(share.size for share in shares) == order.batch_size


@some
@given(orders(), st.integers(0, 1000))
def test_groups_fit_and_their_runs_are_blocks(order, epoch) -> None:
    assert sum(order.steps_of(group) for group in range(order.groups)) == order.steps
    assert all(order.steps_of(group) >= 1 for group in range(order.groups))
    for lane in (0, order.lanes - 1):
        runs = [order.runs(epoch, group, lane) for group in range(order.groups)]
        width = int(order.columns[lane + 1] - order.columns[lane])
        rows = [np.concatenate([np.arange(*run) for run in each]) for each in runs]
        for group, here in enumerate(rows):
            least = order.steps_of(group) * width
            assert least <= len(here) <= least + (width if group == order.groups - 1 else 0)
        everything = np.sort(np.concatenate(rows))
        np.testing.assert_array_equal(
            everything, np.arange(order.places[lane], order.places[lane + 1])
        )
        if order.groups > 1:
            assert max(stop - start for each in runs for start, stop in each) <= order.block


def test_group_sizes() -> None:
    # 64 MB hold 1,230 batches of 1,000 rows of 52 bytes; 9,000 steps make 8 groups of 1,125.
    order = Order(9_000_500, 1000, 52, 64.0, 0)
    assert (order.steps, order.lanes, order.groups, order.group_steps) == (9000, 64, 8, 1125)
    assert order.group_steps * order.batch_size * 52 <= 64e6
    assert order.block == 8192
    # A batch that is larger than shuffle_mb is a group by itself.
    order = Order(1000, 100, 10**6, 1.0, 0)
    assert (order.groups, order.group_steps) == (10, 1)
    assert Order(5000, 2**20 // 256, 4, 64.0, 0).lanes == 256
    assert [Order(5000, size, 4, 64.0, 0).lanes for size in (1, 15, 16, 200)] == [1, 1, 2, 16]


def test_too_large_a_batch() -> None:
    with pytest.raises(InputError, match="batch_size is 11; there are 10 training simulations"):
        Order(10, 11, 4, 64.0, 0)
    with pytest.raises(InputError, match=r"train\.workers is 32, more than the 16 shares that a"):
        Order(1000, 200, 4, 64.0, 0).share(0, 32)


def test_each_row_meets_each_other() -> None:
    """One group: in a lane, all orders are equally likely."""
    order = Order(30, 3, 4, 64.0, 1)
    assert order.groups == 1 and order.lanes == 1
    epochs = 2000
    place = np.stack([np.argsort(epoch_of(order, epoch).ravel()) for epoch in range(epochs)])
    # Place of a row in the epoch: uniform on 0..29. Of 900 counts of mean 133 and sd 11.5, none
    # is 5.5 sd away (probability 900 * 4e-8); each row's mean place is 14.5 with an sd of 0.137.
    counts = np.stack([np.bincount(place[:, row], minlength=30) for row in range(30)])
    assert np.abs(counts - epochs / 30).max() < 5.5 * math.sqrt(epochs / 30)
    assert np.abs(place.mean(0) - 14.5).max() < 5.5 * 0.137


def test_epochs_seeds_lanes_and_groups_differ() -> None:
    def relative(seed: int, epoch: int, group: int, lane: int) -> tuple[int, ...]:
        order = Order(6400, 64, 4, 6400 * 4 / 5 / 1e6, seed)
        assert order.groups == 5 and order.lanes == 8
        return tuple(order.chosen(epoch, group, lane, 160).ravel().tolist())

    cases = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 1)]
    assert len({relative(*case) for case in cases}) == len(cases)


def test_a_small_epoch_is_cheap() -> None:
    order = Order(1800, 200, 20, 64.0, 0)
    lanes = order.share(0, 1).lanes
    spent = []
    for epoch in range(50):
        before = time.thread_time()
        order.positions(epoch, 0, lanes)
        spent.append(time.thread_time() - before)
    # 0.3 ms on a machine of 2024; the least of 50, as others may be at work on it.
    assert min(spent) < 2e-3
