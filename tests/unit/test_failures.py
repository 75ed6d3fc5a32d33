"""Failed simulations: when there are too many of them, and what is said about them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sbi_dist.errors import StageError
from sbi_dist.simulation.failures import Failures, frequent_failures
from tests.unit.samples import some_record


def stops(counts: list[int], rows: int, allowed: float, expected: int | None) -> int | None:
    """The shard, of so many rows and failures each, after which it stops."""
    failures = Failures(allowed, expected)
    for index, failed in enumerate(counts):
        failures.add(some_record(index, rows, failed))
        try:
            failures.check()
        except StageError:
            return index
    return None


def lower_bound(failed: int, rows: int, z: float = 4.0) -> float:
    """Wilson's: the smallest rate that is not rejected at z standard deviations."""
    rates = np.linspace(0.0, failed / rows, 100_001)
    rejected = failed / rows - rates > z * np.sqrt(rates * (1 - rates) / rows)
    return float(rates[~rejected][0])


@given(st.integers(1, 5000), st.data())
@settings(deadline=None, max_examples=60)
def test_stops_at_the_lower_end_of_wilsons_interval(rows, data) -> None:
    failed = data.draw(st.integers(1, rows))
    bound = lower_bound(failed, rows)
    # A grid of 1e-5 of the observed rate
    for allowed, stopped in ((bound + 2e-5, False), (bound - 2e-5, True)):
        if 0 <= allowed <= 1:
            assert (stops([failed], rows, allowed, None) == 0) == stopped


@pytest.mark.parametrize(
    ("rows", "failed", "stopped"), [(1, 1, False), (2, 2, True), (20, 2, False)]
)
def test_few_simulations_stop_it_only_where_they_tell(rows, failed, stopped) -> None:
    """At a limit of 0.1, 1 of 1 is no proof: its bound is 1 / 17; that of 2 of 2 is 2 / 18."""
    assert (stops([failed], rows, 0.1, 1000) == 0) == stopped


def test_the_last_simulation_decides_by_the_fraction_alone() -> None:
    assert stops([1], 10, 0.1, 10) is None
    assert stops([2], 10, 0.1, 10) == 0
    assert stops([2], 10, 0.1, 11) is None  # there is one more to come
    assert stops([2], 10, 0.1, None) is None
    assert stops([0], 10, 0.0, 10) is None and stops([1], 10, 0.0, 10) == 0
    assert stops([10], 10, 1.0, 10) is None


def test_does_not_stop_too_early() -> None:
    """At a true rate equal to the limit, looked at after each of 400 shards."""
    rng = np.random.default_rng(0)
    limit, trials, looks, rows = 0.1, 600, 400, 10
    stopped = 0
    for _ in range(trials):
        counts = rng.binomial(rows, limit, looks)
        stopped += stops(counts.tolist(), rows, limit, None) is not None
    # One look is false with a probability of 3e-5 times what a skewed binomial adds to it (at 10
    # rows, 7 failures: 9e-6). Looks at 4,000 rows in steps are like some 2 log(400) = 12 looks at
    # independent ones: at most 1 in 1,000 or so.
    assert stopped <= 0.005 * trials


def test_does_not_stop_too_late() -> None:
    """At twice the limit, the bound is reached by the time it is 4 + 4 deviations away."""
    rng = np.random.default_rng(1)
    limit, rate = 0.1, 0.2
    needed = math.ceil((8 * math.sqrt(rate * (1 - rate)) / (rate - limit)) ** 2)
    for _ in range(200):
        counts = rng.binomial(10, rate, needed // 10 + 1).tolist()
        assert stops(counts, 10, limit, None) is not None
    # And where all fail, with the second shard at the latest.
    assert stops([10, 10], 10, limit, None) == 0


def test_its_promise_of_four_deviations_holds() -> None:
    """Of one look at many rows, as often as a normal distribution is beyond 4 sd or less."""
    rows, limit = 10_000, 0.1
    least = next(
        failed for failed in range(1000, 1300) if stops([failed], rows, limit, None) is not None
    )
    assert stats.norm.sf(4.5) < stats.binom.sf(least - 1, rows, limit) < 2 * stats.norm.sf(4)


# ---- what is said -------------------------------------------------------------------------------


def test_failures_of_all_shards_are_merged() -> None:
    records = [
        some_record(0, 100, 3, "A"),
        some_record(1, 100, 2, "B"),
        some_record(2, 100, 4, "B"),
        some_record(3, 100, 1, "C"),
        some_record(4, 100, 1, "D"),
        some_record(5, 100),
    ]
    found = frequent_failures(iter(records))
    assert [(entry["message"], entry["count"]) for entry in found] == [("B", 6), ("A", 3), ("C", 1)]
    # The example is the first one.
    assert found[0]["simulation_id"] == 100
    assert [entry["message"] for entry in frequent_failures(records, most=1)] == ["B"]
    assert frequent_failures([]) == []
    # The records are left as they were.
    assert [entry["count"] for record in records for entry in record.errors] == [3, 2, 4, 1, 1]


def test_the_sentence_names_counts_messages_and_a_theta() -> None:
    failures = Failures(0.1, 3000)
    failures.add(some_record(0, 1000, 900, "ValueError: no"))
    failures.add(some_record(1, 1000, 500, "KeyError: 'k'"))
    assert (failures.rows, failures.failed) == (2000, 1400)
    with pytest.raises(StageError) as caught:
        failures.check()
    assert str(caught.value) == (
        "1,400 of 2,000 simulations failed, more than simulate.max_failure_fraction=0.1 allows. "
        "Most frequent: 900 x error (ValueError: no), for one with theta = [0.5, 1e-07]; 500 x "
        "error (KeyError: 'k'), for one with theta = [0.5, 1e-07]. Mend the simulator or the "
        "prior, or raise simulate.max_failure_fraction; the finished shards are kept"
    )


def test_nothing_is_said_without_failures() -> None:
    failures = Failures(0.0, None)
    failures.check()
    failures.add(some_record(0, 1000))
    failures.check()
