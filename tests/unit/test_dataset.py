"""Shards: which there are, how they are written, and that damage to one is noticed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.errors import InputError
from sbi_dist.simulation.dataset import (
    DamagedShard,
    Dataset,
    Simulations,
    decode_shard,
    encode_shard,
    versions,
)
from sbi_dist.simulation.plan import Shard, plan_shards, shard_size_for
from sbi_dist.store import LocalStore

few = settings(deadline=None, max_examples=50)


def simulations(rows: int, x_shape: tuple[int, ...], seed: int = 0, start: int = 0) -> Simulations:
    rng = np.random.default_rng(seed)
    status = rng.choice(["ok", "error", "nonfinite"], rows).tolist()
    x = rng.standard_normal((rows, *x_shape), dtype=np.float32)
    x[np.array(status) != "ok"] = np.nan
    return Simulations(
        simulation_id=start + np.arange(rows, dtype=np.int64),
        theta=rng.standard_normal((rows, 2), dtype=np.float32),
        x=x,
        status=status,
        error=[None if each == "ok" else f"{each}\N{HORIZONTAL ELLIPSIS}" for each in status],
        duration_s=rng.random(rows, dtype=np.float32),
    )


def about(shard: int = 0, x_shape: tuple[int, ...] = (3,)) -> dict[str, Any]:
    return {
        "shard": shard,
        "x_shape": list(x_shape),
        "parameter_names": ["a", "b"],
        "parameter_units": ["1/s", ""],
        "versions": versions(),
    }


def content(decoded: tuple[Simulations, Any]) -> tuple[Any, ...]:
    """All that a reader gets, comparable also where it is NaN."""
    rows, record = decoded
    arrays = (rows.simulation_id, rows.theta, rows.x, rows.duration_s)
    columns = [(array.dtype.str, array.shape, array.tobytes()) for array in arrays]
    return (*columns, rows.status, rows.error, record)


# ---- the plan -----------------------------------------------------------------------------------


def check_contiguous(shards: list[Shard]) -> int:
    """Indexes and rows without gaps; the number of rows."""
    assert [shard.index for shard in shards] == list(range(len(shards)))
    start = 0
    for shard in shards:
        assert shard.start == start and shard.size >= 1
        start += shard.size
    return start


@given(st.integers(1, 10_000), st.integers(1, 500))
@few
def test_plan_covers_exactly(count, size) -> None:
    shards = plan_shards(count, size, {})
    assert check_contiguous(shards) == count
    assert all(shard.size == size for shard in shards[:-1]) and shards[-1].size <= size
    assert len({shard.key for shard in shards}) == len(shards)
    # The order of the keys is the order of the rows.
    assert sorted(shard.key for shard in shards) == [shard.key for shard in shards]


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=5), st.integers(1, 200), st.data())
@few
def test_appending_keeps_what_is_stored(counts, size, data) -> None:
    stored: dict[int, Shard] = {}
    for count in counts:
        shards = plan_shards(count, size, {index: shard.size for index, shard in stored.items()})
        for shard in shards:
            assert stored.get(shard.index, shard) == shard
        rows = check_contiguous(shards)
        # Beyond what was asked for only by the rows of a stored shard.
        assert rows == count or (rows > count and shards[-1].index in stored)
        assert rows - shards[-1].size < count
        # A run that is stopped leaves the first shards, and any of the others.
        finished = data.draw(st.integers(0, len(shards)))
        stored |= {shard.index: shard for shard in shards[:finished]}


@given(st.integers(1, 10**7))
@few
def test_default_shard_size(count) -> None:
    size = shard_size_for(count)
    assert 1 <= size <= 4096
    shards = -(-count // size)
    assert shards <= 64 or size == 4096
    assert count < 64 or shards >= 32


def test_streams_differ_by_seed_purpose_shard_and_use() -> None:
    states = {
        tuple(stream.generate_state(4))
        for seed in range(3)
        for purpose in range(3)
        for index in range(3)
        for stream in Shard(index, 0, 1).streams(seed, purpose)
    }
    assert len(states) == 3 * 3 * 3 * 3


# ---- a shard ------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_shape", [(), (1,), (3,), (2, 4), (1, 1), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("rows", [1, 7])
def test_round_trip(x_shape, rows) -> None:
    before = simulations(rows, x_shape)
    data, record = encode_shard(before, about(5, x_shape))
    after, again = decode_shard(data)
    assert content((after, again)) == content((before, record))
    assert len(after) == rows and after.x.shape == (rows, *x_shape)
    np.testing.assert_array_equal(after.ok, [status == "ok" for status in before.status])
    assert record.index == 5 and record.rows == sum(record.statuses.values()) == rows
    assert record.seconds == pytest.approx(float(before.duration_s.sum()))


def test_most_frequent_errors_come_first() -> None:
    rows = simulations(300, (3,))
    rows.status = ["error"] * 300
    rows.error = [f"E{min(number % 10, 4)}" for number in range(300)]  # E4 is 6 of 10
    _, record = encode_shard(rows, about())
    assert [(entry["message"], entry["count"]) for entry in record.errors] == [
        ("E4", 180),
        ("E0", 30),
        ("E1", 30),
    ]
    first = record.errors[0]
    assert first["simulation_id"] == 4 and first["theta"] == rows.theta[4].tolist()


def test_digest_is_of_the_content_but_not_of_its_timing() -> None:
    def digest(change: Any = None, **metadata: Any) -> str:
        rows = simulations(5, (3,))
        if change is not None:
            change(rows)
        return encode_shard(rows, {**about(), **metadata})[1].digest

    def set_x(rows):
        rows.x[3, 1] += 1e-3

    def set_status(rows):
        rows.status[0] = "timeout"

    def set_time(rows):
        rows.duration_s += 1

    assert digest() == digest() == digest(set_time)
    assert len({digest(), digest(set_x), digest(set_status), digest(parameter_names=["a"])}) == 4


def test_any_parquet_reader_is_told_what_the_numbers_are() -> None:
    data, record = encode_shard(simulations(4, (2, 4)), about(3, (2, 4)))
    table = pq.read_table(io.BytesIO(data))
    assert table.column_names == "simulation_id theta x status error duration_s".split()
    assert table.schema.field("x").type.shape == [2, 4]
    note = json.loads(pq.read_schema(io.BytesIO(data)).metadata[b"sbi_dist"])
    expected = {**about(3, (2, 4)), "digest": record.digest, "statuses": record.statuses}
    assert {key: note[key] for key in expected} == expected
    assert {"python", "numpy", "torch", "pyarrow"} <= set(note["versions"])


# ---- damage -------------------------------------------------------------------------------------


def test_no_flipped_byte_goes_unnoticed() -> None:
    data, record = encode_shard(simulations(4, (3,)), about())
    good = content(decode_shard(data))
    rng = np.random.default_rng(0)
    noticed = 0
    for position in np.sort(rng.choice(len(data), 500, replace=False)):
        damaged = bytearray(data)
        damaged[position] ^= int(rng.integers(1, 256))
        try:
            assert content(decode_shard(bytes(damaged))) == good, f"byte {position}"
        except DamagedShard:
            noticed += 1
    # What may change is encoding, statistics and padding in the footer.
    assert noticed > 250
    assert record == decode_shard(data)[1]


@pytest.mark.parametrize("change", ["empty", "cut", "half", "foreign", "other table"])
def test_what_is_no_shard(change) -> None:
    data, _ = encode_shard(simulations(4, (3,)), about())
    table = pq.read_table(io.BytesIO(data)).replace_schema_metadata(None)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    wrong = {
        "empty": b"",
        "cut": data[:-1],
        "half": data[: len(data) // 2],
        "foreign": b"PAR1" + b"x" * 100 + b"PAR1",
        "other table": sink.getvalue(),
    }
    with pytest.raises(DamagedShard, match="it can't be read"):
        decode_shard(wrong[change])


# ---- the dataset --------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    store = LocalStore(tmp_path)
    for index, start, rows in ((0, 0, 4), (1, 4, 3), (3, 11, 2)):
        data, _ = encode_shard(simulations(rows, (3,), index, start), about(index))
        store.put(Shard(index, start, rows).key, data)
    return Dataset(store)


def test_manifest_is_written_once(dataset) -> None:
    assert dataset.manifest() == {}
    assert dataset.create({"seed": 1}) == {"seed": 1}
    assert dataset.create({"seed": 2}) == {"seed": 1} == dataset.manifest()


def test_stored_records_are_those_of_the_rows(dataset) -> None:
    records = dataset.stored()
    assert sorted(records) == [0, 1, 3]
    for index, record in records.items():
        data = dataset.store.get(Shard(index, 0, 1).key)
        assert decode_shard(data)[1] == record


def test_read_all(dataset) -> None:
    rows = dataset.read_all([3, 0])
    assert rows.simulation_id.tolist() == [11, 12, 0, 1, 2, 3]
    assert rows.theta.shape == (6, 2) and rows.x.shape == (6, 3) and len(rows.ok) == 6
    np.testing.assert_array_equal(rows.theta[2:], dataset.read(0).theta)
    assert rows.status[2:] == dataset.read(Shard(0, 0, 4)).status


def test_missing_and_damaged_shards_are_named(dataset) -> None:
    with pytest.raises(InputError, match=r"shard-000002\.parquet is missing; run `sbi-dist sim"):
        dataset.read(2)
    assert dataset.damaged() == []
    data = bytearray(dataset.store.get("shard-000001.parquet"))
    data[100] ^= 1
    dataset.store.put("shard-000001.parquet", bytes(data))
    assert dataset.damaged() == ["shard-000001.parquet"]
    with pytest.raises(InputError, match=r"shard-000001\.parquet is damaged: .* with --repair"):
        dataset.read_all([0, 1])
    dataset.store.put("shard-000003.parquet", b"")
    with pytest.raises(InputError, match=r"shard-000003\.parquet is damaged"):
        dataset.stored()
