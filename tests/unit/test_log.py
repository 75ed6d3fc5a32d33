"""What drivers note: no record is lost or counted twice, whoever dies when."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.simulation import log
from sbi_dist.simulation.log import DriverLog, Noted, drivers, fetch, forget, read
from sbi_dist.store import LocalStore
from tests.unit.samples import some_record


class Clock:
    """The module's clocks, set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __getattr__(self, name: str) -> Any:
        return (lambda: self.now) if name in ("time", "monotonic") else getattr(time, name)


class Died(Exception):
    """Of a driver, at some operation on the store."""


class Mortal:
    """A store whose client dies at its ``life``-th change of an object."""

    def __init__(self, store: LocalStore, life: int) -> None:
        self.store, self.life = store, life

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.store, name)
        if name not in ("put", "delete"):
            return method

        def mortal(*arguments: Any) -> Any:
            self.life -= 1
            if self.life < 0:
                raise Died
            return method(*arguments)

        return mortal


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(log, "time", clock)
    return clock


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def test_an_empty_log(store) -> None:
    assert read(store) == Noted({}, {}, []) and read(store).seconds == 0.0
    assert drivers(store) == []
    forget(store)


def test_segments_come_with_time_and_with_number(store, clock, monkeypatch) -> None:
    monkeypatch.setattr(log, "_FLUSH_RECORDS", 5)
    driver = DriverLog(store, 100)
    for index in range(4):
        driver.add(some_record(index))
        driver.tick()
    assert read(store).segments == []  # not yet due
    driver.add(some_record(4))
    assert sorted(read(store).records) == [0, 1, 2, 3, 4]
    driver.add(some_record(5))
    clock.now += 9.9
    driver.tick()
    assert 5 not in read(store).records
    clock.now += 0.1
    driver.tick()
    noted = read(store)
    assert noted.records == {index: some_record(index) for index in range(6)}
    assert len(noted.segments) == 2 and noted.seconds == pytest.approx(10.0)


def test_a_driver_that_stores_little_writes_few_objects(store, clock) -> None:
    """Hours of a slow simulator must not leave thousands of segments behind."""
    driver = DriverLog(store, None)
    for index in range(50):
        driver.add(some_record(index))
        clock.now += 10.0
        driver.tick()
    noted = read(store)
    assert len(noted.segments) == 1 and len(noted.records) == 50
    assert noted.seconds == pytest.approx(500.0)


def test_closing_joins_all_segments_into_one(store, clock) -> None:
    first, second = DriverLog(store, 100), DriverLog(store, 100)
    for index, driver in enumerate((first, second, first)):
        driver.add(some_record(index))
        clock.now += 10.0
        driver.tick()
    assert len(drivers(store)) == 2
    first.close()
    second.close()
    noted = read(store)
    assert sorted(noted.records) == [0, 1, 2] and len(noted.segments) == 1
    assert noted.seconds == pytest.approx(60.0)  # 30 s of each
    assert drivers(store) == []
    # Another run counts on.
    third = DriverLog(store, 100)
    clock.now += 5.0
    third.close()
    assert read(store).seconds == pytest.approx(65.0)
    assert list(store.list("records/")) == read(store).segments


@given(st.integers(0, 14), st.integers(0, 14), st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_a_death_at_any_moment_loses_and_doubles_nothing(tmp_path_factory, first, second, full):
    store = LocalStore(tmp_path_factory.mktemp("log"))
    clock = Clock()
    told: dict[int, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "time", clock)
        patch.setattr(log, "_FLUSH_RECORDS", full)
        began = clock.now
        seconds = 0.0
        for life in (first, second, 10**6):
            driver = DriverLog(Mortal(store, life), None)
            began, ticked = clock.now, clock.now
            try:
                for index in range(3):
                    driver.add(some_record(len(told) + index))
                    clock.now += 10.0
                    driver.tick()
                    ticked = clock.now
                driver.close()
            except Died:
                pass
            known = read(store)
            # What it noted in time is there, once, and no record of another one is gone.
            assert known.records.keys() >= told.keys()
            assert all(record == some_record(index) for index, record in known.records.items())
            told = known.records
            # The time up to its last sign at least, and not more than it ran.
            assert seconds + (ticked - began) - 1e-6 <= known.seconds
            assert known.seconds <= seconds + (clock.now - began) + 1e-6
            seconds = known.seconds
        assert len(known.segments) == 1


def test_drivers_that_join_at_once_double_nothing(store, clock) -> None:
    """Both read the same segments before either has written its own."""
    for index in range(3):
        driver = DriverLog(store, None)
        driver.add(some_record(index))
        clock.now += 10.0
        driver.flush()  # and dies
    one, other = DriverLog(store, None), DriverLog(store, None)
    together = threading.Barrier(2)
    genuine = log.read

    def slow(store: Any) -> Noted:
        noted = genuine(store)
        together.wait(10)
        return noted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "read", slow)
        threads = [threading.Thread(target=each.close) for each in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    noted = read(store)
    assert noted.seconds == pytest.approx(30.0) and sorted(noted.records) == [0, 1, 2]


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"3",
        b"[]",
        b"{}",
        b'{"seconds": 3.0, "records": []}',
        b'{"seconds": {"a": "x"}, "records": []}',
        b'{"seconds": {"a": 7.0}, "records": [[1, 2]]}',
        b'{"seconds": {"a": 7.0}, "records": [3]}',
        b'{"seconds": {"a": 7.0}, "records": {"1": 2}}',
    ],
)
def test_segments_that_are_garbage_count_for_nothing(store, clock, garbage) -> None:
    store.put("records/19700101T000000-0-000000.json", garbage)
    store.put("records/99991231T000000-0-000000.json", garbage)
    driver = DriverLog(store, None)
    driver.add(some_record(3))
    clock.now += 2.0
    driver.close()
    noted = read(store)
    assert noted.records == {3: some_record(3)} and noted.seconds == pytest.approx(2.0)
    assert len(noted.segments) == 1
    forget(store)
    assert list(store.list()) == []


def test_a_segment_that_is_joined_while_it_is_read_counts_for_nothing(store) -> None:
    driver = DriverLog(store, None)
    driver.add(some_record(3))
    driver.flush()
    genuine = LocalStore.list
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LocalStore,
            "list",
            lambda self, prefix="": iter([*genuine(self, prefix), "records/gone.json"]),
        )
        assert sorted(read(store).records) == [3]


# ---- signs of life ------------------------------------------------------------------------------


def test_signs_of_life_expire(store, clock) -> None:
    driver = DriverLog(store, 100)
    driver.add(some_record(0, rows=30))
    clock.now += 10.0
    driver.tick()
    (sign,) = drivers(store)
    assert sign["target"] == 100 and sign["simulations_per_s"] == pytest.approx(3.0)
    assert sign["seconds"] == pytest.approx(10.0) and sign["pid"] > 0
    clock.now += 59.0
    assert len(drivers(store)) == 1
    clock.now += 1.5
    assert drivers(store) == []
    driver.tick()  # it was only slow
    assert len(drivers(store)) == 1
    driver.close()
    assert drivers(store) == [] and list(store.list("drivers/")) == []


@pytest.mark.parametrize("garbage", [b"", b"{}", b"[]", b"3", b'{"updated": "x"}'])
def test_signs_that_are_garbage_are_nobodys(store, garbage) -> None:
    store.put("drivers/a.json", garbage)
    store.put("drivers/b.json", json.dumps({"updated": time.time()}).encode())
    assert len(drivers(store)) == 1


# ---- requests -----------------------------------------------------------------------------------


def test_fetch_is_in_order_and_some_at_a_time() -> None:
    running = most = 0
    lock = threading.Lock()

    def get(key: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.0005)
        with lock:
            running -= 1
        return 2 * key

    keys = list(range(300))
    assert list(fetch(iter(keys), get)) == [(key, 2 * key) for key in keys]
    assert 1 < most <= log._REQUESTS
    assert list(fetch([], get)) == [] and list(fetch([7], get)) == [(7, 14)]


def test_a_failed_request_is_raised() -> None:
    def get(key: int) -> int:
        if key == 77:
            raise KeyError(key)
        return key

    with pytest.raises(KeyError, match="77"):
        list(fetch(range(200), get))
