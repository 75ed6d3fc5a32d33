"""Learning rates, the weight of the average, and when training stops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.schedule import Schedule, batch_size_for


def epoch(schedule: Schedule, loss: float) -> bool:
    for _ in range(schedule.steps):
        schedule.step()
    return schedule.after_epoch(loss)


def made(steps: int = 10, loss: float = 1.0, **changes: Any) -> Schedule:
    return Schedule(TrainOptions(**changes), steps, loss)


def test_the_average_is_over_a_fixed_part_of_all_steps() -> None:
    """Of weights 1, 2, ..., t the average with parts 11 / (t + 10) is about 11 t / 12."""
    schedule, average = made(), 0.0
    for number in range(1, 5001):
        _, part = schedule.step()
        assert 0 < part <= 1
        average += part * (number - average)
        if number == 1:
            assert part == 1  # nothing is left of the weights before the first step
    # The weight of step s in the average at t falls as (s / t)^10: its mean is 11 / 12.
    assert average / 5000 == pytest.approx(11 / 12, rel=1e-2)


def test_rates_rise_to_the_peak_and_fall_slowly() -> None:
    schedule = made()
    rates = [schedule.step()[0] for _ in range(20_001)]
    assert (np.diff(rates[:50]) > 0).all() and rates[0] == pytest.approx(4e-3 / 50)
    assert set(rates[49:5001]) == {4e-3}
    assert (np.diff(rates[5000:]) < 0).all() and rates[20_000] == pytest.approx(4e-3 / 2)
    assert made(learning_rate=1e-4).peak == 1e-4
    assert made(schedule="plateau").peak == 5e-4


def test_patience_grows_with_the_training() -> None:
    schedule = made(loss=math.inf)
    for number in range(100):
        assert not epoch(schedule, -float(number)) and not schedule.finished
    epochs = 100
    while not schedule.finished:
        assert not epoch(schedule, 0.0)
        epochs += 1
    # The epochs without a better loss are a quarter of all.
    assert epochs == 134
    # Gains too small to matter are none, until they add up.
    for gain, ends in ((1e-4, True), (1e-3, False)):
        slow = made(patience=4, loss=0.0)
        for number in range(1, 13):
            epoch(slow, -gain * number)
        assert slow.finished == ends
    early = made(patience=2)
    epoch(early, 2.0)
    assert not early.finished
    epoch(early, 2.0)
    assert early.finished


def test_few_steps_in_an_epoch_are_given_time() -> None:
    schedule, epochs = made(steps=5), 0
    while not schedule.finished:
        epoch(schedule, 2.0)
        epochs += 1
    assert epochs * 5 == 100


def test_a_plateau_lowers_the_rate_and_goes_back() -> None:
    schedule = made(schedule="plateau", patience=2, decays=2, learning_rate=0.1)
    told = [(epoch(schedule, 2.0), schedule.peak, schedule.finished) for _ in range(6)]
    assert [back for back, _, _ in told] == [False, True] * 3
    assert [peak for _, peak, _ in told[1::2]] == pytest.approx([0.03, 0.009, 0.0027])
    assert [finished for _, _, finished in told] == [False] * 5 + [True]


def test_cosine_falls_to_zero_and_ends_with_the_epochs() -> None:
    schedule = made(schedule="cosine", max_epochs=20, patience=1)
    rates = []
    for number in range(20):
        assert schedule.most_steps_left() == 10 * (20 - number) and not schedule.finished
        epoch(schedule, 2.0)
        rates.append(schedule.rate)
    assert schedule.finished and schedule.most_steps_left() == 0
    assert (np.diff(rates[5:]) < 0).all() and rates[-1] < 1e-2 * 5e-4


@given(
    st.sampled_from(["average", "plateau", "cosine"]),
    st.lists(st.floats(-2, 2), min_size=2, max_size=40),
    st.integers(0, 39),
)
@settings(deadline=None, max_examples=50)
def test_a_state_continues(kind: str, losses: list[float], cut: int) -> None:
    straight, broken = (made(3, schedule=kind, patience=2, max_epochs=30) for _ in range(2))
    for number, loss in enumerate(losses):
        if number == cut:
            fresh = made(3, schedule=kind, patience=2, max_epochs=30)
            fresh.load_state(broken.state())
            broken = fresh
        assert [straight.step() for _ in range(3)] == [broken.step() for _ in range(3)]
        assert straight.after_epoch(loss) == broken.after_epoch(loss)
        assert straight.state() == broken.state()


def test_lowering_after_a_bad_loss() -> None:
    schedule = made(learning_rate=0.1)
    schedule.lower()
    assert schedule.peak == pytest.approx(0.03)


@given(st.integers(10, 10**8))
@settings(deadline=None, max_examples=50)
def test_batch_sizes(training: int) -> None:
    assert 1 <= batch_size_for(TrainOptions(), training) <= training
    assert batch_size_for(TrainOptions(batch_size=7), training) == 7
