"""A dataset in a store: its plan, which shards it has, snapshots, and what is said of damage."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.errors import InputError
from sbi_dist.simulation import log
from sbi_dist.simulation.dataset import Dataset, Stored
from sbi_dist.simulation.plan import Extent, Shard, plan_shards
from sbi_dist.simulation.shard import decode_shard, encode_shard
from sbi_dist.store import LocalStore
from tests.unit.samples import about, put_shard, simulations, some_record


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three shards of a plan of 11 rows and 3 more, in shards of 4; of 14 rows, 9 are there."""
    dataset = Dataset(LocalStore(tmp_path))
    dataset.create({"seed": 1}, Extent(0, 0, 4, 11))
    dataset.extend(14, 2)
    for shard in (Shard(0, 0, 4), Shard(2, 8, 3), Shard(3, 11, 2)):
        put_shard(dataset.store, shard)
    return dataset


class InMemory:
    """What a dataset needs of a store, without the files."""

    uri = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def get(self, key: str) -> bytes:
        return self.objects[key]

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self.objects.setdefault(key, data) is data


# ---- the plan -----------------------------------------------------------------------------------


def test_manifest_is_written_once(tmp_path: Path) -> None:
    dataset = Dataset(LocalStore(tmp_path))
    assert dataset.manifest() == {} and dataset.extents() == []
    extent = Extent(0, 0, 4, 10)
    manifest, began = dataset.create({"seed": 1}, extent)
    assert began and manifest["seed"] == 1 and dataset.extents() == [extent]
    assert dataset.create({"seed": 2}, Extent(0, 0, 5, 20)) == (manifest, False)
    assert dataset.manifest() == manifest and dataset.extents() == [extent]


counts = st.one_of(st.none(), st.integers(1, 3000))


@given(st.lists(st.tuples(counts, st.integers(1, 99)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_appending_keeps_every_shard_that_was_planned(calls) -> None:
    dataset = Dataset(InMemory())
    (first, size), *_ = calls
    dataset.create({}, Extent(0, 0, size, first))
    earlier: list[Shard] = []
    most: int | None = 0
    for count, size in calls:
        extents = dataset.extend(count, size)
        assert extents == dataset.extents() == dataset.extend(count, size)
        most = None if most is None or count is None else max(most, count)
        # The plan has an end where the largest wish has one; it is never cut.
        assert extents[-1].stop == most
        shards = list(itertools.islice(plan_shards(extents, most), 2000))
        assert shards[: len(earlier)] == earlier
        start = 0
        for number, shard in enumerate(shards):
            assert shard.index == number and shard.start == start
            start += shard.size
        assert most is None or start == most or len(shards) == 2000
        earlier = shards


@given(
    st.tuples(counts, st.integers(1, 99)), st.tuples(counts, st.integers(1, 99)), st.integers(0, 6)
)
@settings(deadline=None, max_examples=60)
def test_drivers_that_append_at_once_end_with_one_plan(one, other, moment) -> None:
    """The other driver appends in full before any one operation of the first one on the store."""
    store = InMemory()
    Dataset(store).create({}, Extent(0, 0, 7, 50))
    seen: dict[str, list[Extent]] = {}

    class Interrupted(InMemory):
        operations = 0

        def __init__(self) -> None:
            self.objects = store.objects

        def look(self) -> None:
            if Interrupted.operations == moment:
                seen["other"] = Dataset(store).extend(*other)
            Interrupted.operations += 1

        def get(self, key: str) -> bytes:
            self.look()
            return super().get(key)

        def put_if_absent(self, key: str, data: bytes) -> bool:
            self.look()
            return super().put_if_absent(key, data)

    mine = Dataset(Interrupted()).extend(*one)
    final = Dataset(store).extents()
    assert mine == final[: len(mine)]
    if "other" in seen:
        assert seen["other"] == final[: len(seen["other"])]
        wishes = [50, one[0], other[0]]
        assert final[-1].stop == (None if None in wishes else max(wishes))


def test_drivers_that_race_in_earnest_end_with_one_plan(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    Dataset(store).create({}, Extent(0, 0, 7, 50))
    together = threading.Barrier(8)
    plans: list[Any] = [None] * 8

    def append(number: int) -> None:
        together.wait(10)
        plans[number] = Dataset(store).extend(60 + 10 * number, 1 + number)

    threads = [threading.Thread(target=append, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    final = Dataset(store).extents()
    assert final[-1].stop == 130
    assert all(plan == final[: len(plan)] for plan in plans)
    assert [plan[-1].stop >= 60 + 10 * number for number, plan in enumerate(plans)] == [True] * 8


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b'{"extent": {"first": 0}}', b'{"seed": 1}'])
def test_a_damaged_manifest_is_named(dataset, text) -> None:
    dataset.store.put("dataset.json", text)
    with pytest.raises(InputError, match=r"/dataset\.json is damaged; delete it, and run `sbi-d"):
        dataset.extents()
    with pytest.raises(InputError, match=r"/dataset\.json is damaged"):
        dataset.complete(4)


@pytest.mark.parametrize("text", [b"", b'{"first": 3, "start": 11', b'{"first": 3}', b"[1, 2]"])
def test_a_damaged_extent_is_named(dataset, text) -> None:
    dataset.store.put("extent-000000000011.json", text)
    for call in (dataset.extents, lambda: dataset.extend(99, 1), lambda: dataset.complete(14)):
        with pytest.raises(InputError, match=r"/extent-000000000011\.json is damaged; delete it"):
            call()


# ---- which shards there are ---------------------------------------------------------------------


def test_stored_records_are_those_of_the_rows(dataset) -> None:
    dataset.store.put("shard-000001.parquet.bak", b"x")  # no shard of ours
    stored = dataset.stored()
    assert sorted(stored.records) == [0, 2, 3] == sorted(dataset.indexes())
    assert stored.rows == 9 and stored.seconds == 0.0
    for index, record in stored.records.items():
        data = dataset.store.get(Shard(index, 0, 1).key)
        assert decode_shard(data)[1] == record == dataset.record(index)


def test_what_the_log_tells_is_not_read_again(dataset) -> None:
    records = dataset.stored().records
    driver = log.DriverLog(dataset.store, 14)
    for record in (records[0], records[2], some_record(17)):  # one that was deleted since
        driver.add(record)
    driver.close()
    read = []
    dataset.record = lambda index: read.append(index) or records[index]
    stored = dataset.stored()
    assert read == [3] and stored.records == records and stored.rows == 9
    log.forget(dataset.store)
    assert dataset.stored() == Stored(records, 0.0)


def test_records_with_very_long_messages_are_read_in_two_steps(dataset) -> None:
    rows = simulations(3, (3,), 1, 4)
    rows.failed = {row: ("error", f"{row}" * 20_000) for row in range(3)}
    data, record = encode_shard(rows, about(1))
    dataset.store.put(Shard(1, 4, 3).key, data)
    assert dataset.record(1) == record
    assert [len(entry["message"]) for entry in record.errors] == [20_000] * 3
    assert dataset.stored().records[1] == record
    # The beginning of the footer is gone, and so is its end.
    for damaged in (data[-20_000:], data[:-1]):
        dataset.store.put(Shard(1, 4, 3).key, damaged)
        with pytest.raises(InputError, match=r"shard-000001\.parquet is damaged: .* --repair"):
            dataset.record(1)


def test_a_dataset_is_complete_once_all_shards_of_its_rows_are_there(dataset) -> None:
    assert Dataset(dataset.store.child("none")).complete(1) is None
    records = dataset.stored().records
    assert dataset.complete(1) == dataset.complete(4) == [records[0]]
    assert dataset.complete(5) is None  # its second shard is missing
    put_shard(dataset.store, Shard(1, 4, 4))
    assert [record.index for record in dataset.complete(5)] == [0, 1]
    assert [record.index for record in dataset.complete(13)] == [0, 1, 2, 3]
    assert dataset.complete(14) is None
    put_shard(dataset.store, Shard(4, 13, 1))
    assert [record.index for record in dataset.complete(14)] == [0, 1, 2, 3, 4]
    assert dataset.complete(15) is None  # more than was planned


def test_a_plan_without_end_may_be_complete(tmp_path: Path) -> None:
    dataset = Dataset(LocalStore(tmp_path))
    dataset.create({}, Extent(0, 0, 4, None))
    assert dataset.complete(1) is None
    put_shard(dataset.store, Shard(0, 0, 4))
    assert len(dataset.complete(4)) == 1 and dataset.complete(5) is None


# ---- snapshots ----------------------------------------------------------------------------------


def test_a_snapshot_is_a_list_of_shards_with_their_content(dataset) -> None:
    records = dataset.stored().records
    chosen = [records[0], records[3]]
    name = dataset.snapshot(chosen)
    assert dataset.snapshot(chosen) == name
    assert dataset.snapshot_records(name) == chosen
    others = {dataset.snapshot([records[0]]), dataset.snapshot([records[3], records[0]])}
    assert len({name, *others}) == 3
    # Shards that come later change nothing.
    put_shard(dataset.store, Shard(1, 4, 4))
    assert dataset.snapshot_records(name) == chosen
    note = json.loads(dataset.store.get(f"snapshots/{name}.json"))
    assert note["simulations"] == 6


def test_a_snapshot_names_what_became_of_its_shards(dataset) -> None:
    with pytest.raises(InputError, match=r"snapshots/0123\.json is missing; run `sbi-dist sim"):
        dataset.snapshot_records("0123")
    records = dataset.stored().records
    name = dataset.snapshot(list(records.values()))
    rows = simulations(4, (3,), seed=99)
    dataset.store.put("shard-000000.parquet", encode_shard(rows, about(0))[0])
    with pytest.raises(InputError, match=r"shard-000000\.parquet is damaged: it is not the one of"):
        dataset.snapshot_records(name)
    dataset.store.delete("shard-000000.parquet")
    with pytest.raises(InputError, match=r"shard-000000\.parquet is missing"):
        dataset.snapshot_records(name)
    dataset.store.put(f"snapshots/{name}.json", b"")
    with pytest.raises(InputError, match=rf"snapshots/{name}\.json is damaged"):
        dataset.snapshot_records(name)


def test_the_end_of_the_time_is_noted_once(dataset) -> None:
    records = list(dataset.stored().records.values())
    assert dataset.ended(14, 60.0) is None
    dataset.end(14, 60.0, dataset.snapshot(records))
    put_shard(dataset.store, Shard(1, 4, 4))
    dataset.end(14, 60.0, dataset.snapshot(list(dataset.stored().records.values())))
    assert dataset.ended(14, 60.0) == records
    # Of another wish or budget it is not the end.
    assert dataset.ended(15, 60.0) is dataset.ended(14, 60.5) is dataset.ended(None, 60.0) is None
    dataset.end(None, 60.0, dataset.snapshot(records[:1]))
    assert dataset.ended(None, 60.0) == records[:1] and dataset.ended(14, 60.0) == records


# ---- reading ------------------------------------------------------------------------------------


def test_read_all(dataset) -> None:
    rows = dataset.read_all([3, 0])
    assert rows.simulation_id.tolist() == [11, 12, 0, 1, 2, 3]
    assert rows.theta.shape == (6, 2) and rows.x.shape == (6, 3) and len(rows.ok) == 6
    np.testing.assert_array_equal(rows.theta[2:], dataset.read(0).theta)
    assert rows.status[2:] == dataset.read(Shard(0, 0, 4)).status


def test_missing_and_damaged_shards_are_named(dataset) -> None:
    with pytest.raises(InputError, match=r"shard-000001\.parquet is missing; run `sbi-dist sim"):
        dataset.read(1)
    with pytest.raises(InputError, match=r"shard-000001\.parquet is missing; run `sbi-dist sim"):
        dataset.record(1)
    assert dataset.damaged() == []
    data = bytearray(dataset.store.get("shard-000002.parquet"))
    data[200] ^= 1
    dataset.store.put("shard-000002.parquet", bytes(data))
    assert dataset.damaged() == ["shard-000002.parquet"]
    with pytest.raises(InputError, match=r"shard-000002\.parquet is damaged: .* with --repair"):
        dataset.read_all([0, 2])
    dataset.store.put("shard-000003.parquet", b"")
    with pytest.raises(InputError, match=r"shard-000003\.parquet is damaged"):
        dataset.stored()
