"""The metrics of the simulate stage."""

from __future__ import annotations

import pytest

from sbi_dist import metrics
from sbi_dist.simulation import live
from sbi_dist.simulation.live import Live
from sbi_dist.simulation.shard import ShardRecord

LABELS = {"experiment": "e", "dataset": "d"}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What is exported: the last value of gauges, the sum of counters, by name and status."""
    values: dict[str, float] = {}
    set_gauge, add = metrics.set_gauge, metrics.add

    def setting(name: str, value: float, labels: dict[str, str]) -> None:
        set_gauge(name, value, labels)  # checks name and labels
        values[name.removeprefix("sbi_simulate_")] = value

    def adding(name: str, amount: float, labels: dict[str, str]) -> None:
        add(name, amount, labels)
        key = " ".join([name.removeprefix("sbi_simulate_"), labels.get("status", "")]).strip()
        values[key] = values.get(key, 0.0) + amount

    monkeypatch.setattr(metrics, "set_gauge", setting)
    monkeypatch.setattr(metrics, "add", adding)
    return values


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    return now


def record(index: int, ok: int, failed: int = 0) -> ShardRecord:
    statuses = {"ok": ok, **({"error": failed} if failed else {})}
    return ShardRecord(index, ok + failed, statuses, [], 0.5, "")


def test_shards_are_counted_and_rates_are_of_this_driver(
    told: dict[str, float], clock: list[float]
) -> None:
    stage = Live(LABELS, 1000)
    stage.tick(200, 2)  # 200 were there before
    assert told == {}
    clock[0] += 2.0
    stage.landed(record(0, 90, 10))
    stage.landed(record(1, 100))
    stage.tick(400, 2)
    assert told == {
        "simulations_total ok": 190.0,
        "simulations_total error": 10.0,
        "shards_total": 2.0,
        "busy_seconds_total": 1.0,
        "actors": 2.0,
        "simulations_per_second": 100.0,
        "seconds_left": 6.0,
    }
    stage.died()
    assert told["actor_deaths_total"] == 1.0


def test_gauges_are_set_again_though_nothing_lands(
    told: dict[str, float], clock: list[float]
) -> None:
    stage = Live(LABELS, None)
    clock[0] += 1.0
    stage.tick(0, 1)
    assert told == {}
    clock[0] += 5.0
    stage.tick(0, 1)
    # How long it takes is not known: neither the rate nor where it ends.
    assert told == {"actors": 1.0, "simulations_per_second": 0.0}
    told.clear()
    clock[0] += 4.0
    stage.tick(0, 1)
    assert told == {}
    clock[0] += 1.0
    stage.tick(0, 1)
    assert "actors" in told


def test_without_labels_nothing_is_told(told: dict[str, float], clock: list[float]) -> None:
    stage = Live(None, 100)
    clock[0] += 10.0
    stage.landed(record(0, 100))
    stage.died()
    stage.tick(100, 1)
    assert told == {}
