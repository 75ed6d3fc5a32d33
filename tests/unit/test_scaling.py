"""How many replicas are wanted, by what waits. No Ray is started."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from ray.serve.config import AutoscalingContext

from sbi_dist.serving.deployment import replicas_wanted, scale

QUEUED = st.floats(0.0, 1e6)
TARGETS = st.floats(1e-3, 3600.0)
NUMBERS = st.integers(1, 500)
BOUNDS = st.tuples(NUMBERS, NUMBERS).map(lambda two: (min(two), max(two)))


def context(
    queued: dict[str, float], target_s: float, now: int, wanted: int, bounds: tuple[int, int]
) -> AutoscalingContext:
    """What Ray Serve tells when some replicas have reported what waits with them."""
    measured: dict[str, dict[Any, float]] = {}
    if queued:
        measured = {
            "queued_seconds": dict(queued),
            "target_seconds": dict.fromkeys(queued, target_s),
        }
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="posteriors",
        app_name=None,
        current_num_replicas=now,
        target_num_replicas=wanted,
        running_replicas=[],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        # Ray gives a function, which is only called when it is asked for.
        aggregated_metrics=lambda: measured,
        raw_metrics=None,
        capacity_adjusted_min_replicas=bounds[0],
        capacity_adjusted_max_replicas=bounds[1],
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=None,
    )


@given(QUEUED, TARGETS, NUMBERS, BOUNDS)
def test_as_many_as_finish_in_time_within_the_bounds(queued, target, running, bounds) -> None:
    least, most = bounds
    number = replicas_wanted(queued, target, running, least, most)
    assert least <= number <= most
    assert number == most or number >= queued / target
    # No more than that either, beside those that there are already.
    assert number <= max(least, running, math.ceil(queued / target))


@given(st.tuples(QUEUED, QUEUED), TARGETS, NUMBERS, BOUNDS)
def test_more_work_never_asks_for_fewer(queued, target, running, bounds) -> None:
    fewer, more = (replicas_wanted(each, target, running, *bounds) for each in sorted(queued))
    assert fewer <= more


@given(QUEUED, st.floats(0.51, 1.0), TARGETS, NUMBERS, BOUNDS)
def test_the_number_that_was_asked_for_stays(queued, part, target, running, bounds) -> None:
    number = replicas_wanted(queued, target, running, *bounds)
    assert replicas_wanted(queued, target, number, *bounds) == number
    # What was asked for on account of work stays until about half of that work is gone.
    if bounds[0] < number == math.ceil(queued / target):
        assert replicas_wanted(part * queued, target, number, *bounds) == number


@given(QUEUED, TARGETS, NUMBERS, BOUNDS)
def test_fewer_only_where_those_would_be_half_idle(queued, target, running, bounds) -> None:
    if replicas_wanted(queued, target, running, *bounds) < min(running, bounds[1]):
        assert queued <= 0.5 * target * (running - 1)


@given(NUMBERS, BOUNDS)
def test_nothing_waits(running, bounds) -> None:
    assert replicas_wanted(0.0, 0.5, running, *bounds) == bounds[0]


@given(st.lists(QUEUED, min_size=1, max_size=8), TARGETS, NUMBERS, NUMBERS, BOUNDS)
def test_what_all_replicas_say_is_added(queued, target, running, wanted, bounds) -> None:
    said = {f"replica {number}": each for number, each in enumerate(queued)}
    found, _ = scale(context(said, target, running, wanted, bounds))
    assert found == replicas_wanted(sum(queued), target, running, *bounds)


@given(NUMBERS, NUMBERS, BOUNDS)
def test_without_metrics_the_target_stays_within_the_bounds(now, wanted, bounds) -> None:
    """As at the start, and while the controller recovers."""
    found, _ = scale(context({}, 1.0, now, wanted, bounds))
    assert found == max(bounds[0], min(bounds[1], wanted))
    silent = context({}, 1.0, now, wanted, bounds)
    silent.aggregated_metrics = None
    assert scale(silent)[0] == found
