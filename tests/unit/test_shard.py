"""A shard's bytes: how they are written, and that damage to them is noticed."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.simulation.parquet import ShortTail
from sbi_dist.simulation.shard import (
    STATUSES,
    DamagedShard,
    Simulations,
    concatenate,
    decode_shard,
    encode_shard,
    record_of_tail,
)
from tests.unit.samples import about, simulations

few = settings(deadline=None, max_examples=50)


def columns(rows: Simulations) -> tuple[Any, ...]:
    """All of the rows, comparable also where they are NaN."""
    arrays = (rows.simulation_id, rows.theta, rows.x, rows.duration_s)
    return (*((each.dtype.str, each.shape, each.tobytes()) for each in arrays), rows.failed)


def content(decoded: tuple[Simulations, Any]) -> tuple[Any, ...]:
    """All that a reader gets."""
    rows, record = decoded
    return (*columns(rows), rows.status, rows.error, record)


@st.composite
def some_simulations(draw: st.DrawFn) -> Simulations:
    count = draw(st.integers(1, 20))
    rows = simulations(count, draw(st.sampled_from([(), (2,), (2, 3)])), draw(st.integers(0, 99)))
    failures = st.tuples(st.sampled_from(STATUSES[1:]), st.text("aZ é⏱𝄞\n", max_size=9))
    rows.failed = draw(st.dictionaries(st.integers(0, count - 1), failures))
    return rows


# ---- what is written is what is read ------------------------------------------------------------


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
    assert record.failures == len(before.failed)


@given(some_simulations())
@few
def test_the_record_in_the_tail_is_that_of_the_rows(rows) -> None:
    data, record = encode_shard(rows, about(2, rows.x.shape[1:]))
    after, of_all = decode_shard(data)
    assert content((after, of_all)) == content((rows, record))
    assert record_of_tail(data) == record
    footer = int.from_bytes(data[-8:-4], "little") + 8
    assert record_of_tail(data[-footer:]) == record
    with pytest.raises(ShortTail) as caught:
        record_of_tail(data[1 - footer :])
    assert caught.value.needed == footer
    assert record.failures == len(rows.failed)
    assert sum(entry["count"] for entry in record.errors) <= record.failures


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
@few
def test_parts_make_the_whole(sizes, seed) -> None:
    whole = simulations(sum(sizes), (2,), seed)
    parts, start = [], 0
    for size in sizes:
        stop = start + size
        failed = {row - start: whole.failed[row] for row in whole.failed if start <= row < stop}
        arrays = (getattr(whole, name)[start:stop] for name in ("simulation_id", "theta", "x"))
        parts.append(Simulations(*arrays, failed, whole.duration_s[start:stop]))
        start = stop
    assert columns(concatenate(parts)) == columns(whole)
    encoded = [encode_shard(each, about(0, (2,)))[0] for each in (whole, concatenate(parts))]
    assert encoded[0] == encoded[1]


def test_most_frequent_errors_come_first() -> None:
    rows = simulations(300, (3,))
    # E4 is 6 of 10
    rows.failed = {row: ("error", f"E{min(row % 10, 4)}") for row in range(300)}
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
        rows.failed = {1: ("error", "no"), 3: ("error", "yes")}
        if change is not None:
            change(rows)
        return encode_shard(rows, {**about(), **metadata})[1].digest

    def set_time(rows):
        rows.duration_s += 1

    def set_order(rows):
        rows.failed = dict(reversed(rows.failed.items()))

    def set_x(rows):
        rows.x[4, 1] = 1e-3

    def set_theta(rows):
        rows.theta[4, 1] += 1e-3

    def set_identity(rows):
        rows.simulation_id += 1

    def set_status(rows):
        rows.failed[1] = ("timeout", "no")

    def set_message(rows):
        rows.failed[1] = ("error", "yes")

    def set_row(rows):
        rows.failed = {1: ("error", "no"), 2: ("error", "yes")}

    def set_ok(rows):
        del rows.failed[3]

    assert digest() == digest() == digest(set_time) == digest(set_order)
    changes = set_x, set_theta, set_identity, set_status, set_message, set_row, set_ok
    others = [*(digest(change) for change in changes), digest(parameter_names=["a"])]
    assert len({digest(), *others}) == 1 + len(others)


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


@pytest.mark.parametrize("failed", [True, False], ids=["failures", "no failures"])
def test_no_flipped_byte_goes_unnoticed(failed) -> None:
    rows = simulations(4, (3,))
    if not failed:
        rows.failed = {}
    data, _ = encode_shard(rows, about())
    good = content(decode_shard(data))
    rng = np.random.default_rng(0)
    noticed = 0
    for position in np.sort(rng.permutation(len(data))[:1500]):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        try:
            assert content(decode_shard(bytes(damaged))) == good, f"byte {position}"
        except DamagedShard:
            noticed += 1
    # What may change is padding and what the footer says to other readers only.
    assert noticed > 750


@pytest.mark.parametrize("row", range(4))
def test_a_flipped_duration_is_noticed(row) -> None:
    """They are not part of the digest, so that the same content has one digest."""
    rows = simulations(4, (3,))
    data, _ = encode_shard(rows, about())
    place = data.index(rows.duration_s.tobytes()) + 4 * row
    for bit in (1 << 23, 1 << 31, 1 << 24):
        changed = bytearray(data)
        number = int.from_bytes(data[place : place + 4], "little") ^ bit
        changed[place : place + 4] = number.to_bytes(4, "little")
        with pytest.raises(DamagedShard, match="does not match its digest"):
            decode_shard(bytes(changed))


@pytest.mark.parametrize("change", ["empty", "cut", "half", "foreign", "other table", "other note"])
def test_what_is_no_shard(change) -> None:
    data, _ = encode_shard(simulations(4, (3,)), about())

    def rewritten(metadata: dict[str, str] | None) -> bytes:
        sink = io.BytesIO()
        pq.write_table(pq.read_table(io.BytesIO(data)).replace_schema_metadata(metadata), sink)
        return sink.getvalue()

    wrong = {
        "empty": b"",
        "cut": data[:-1],
        "half": data[: len(data) // 2],
        "foreign": b"PAR1" + b"x" * 100 + b"PAR1",
        "other table": rewritten(None),
        "other note": rewritten({"sbi_dist": "[1]"}),
    }[change]
    with pytest.raises(DamagedShard, match="it can't be read"):
        decode_shard(wrong)
    with pytest.raises((DamagedShard, ShortTail)):
        record_of_tail(wrong)


def test_a_record_of_other_rows_is_noticed() -> None:
    """Statuses, errors and seconds are not in the digest, and yet part of what is read."""
    data, record = encode_shard(simulations(4, (3,)), about())
    table = pq.read_table(io.BytesIO(data))
    note = json.loads(table.schema.metadata[b"sbi_dist"])

    def rewritten(**changes: Any) -> bytes:
        sink = io.BytesIO()
        metadata = {"sbi_dist": json.dumps({**note, **changes})}
        pq.write_table(table.replace_schema_metadata(metadata), sink)
        return sink.getvalue()

    assert decode_shard(rewritten())[1] == record  # written by another tool, and whole
    changes = ({"statuses": {"ok": 4}}, {"errors": []}, {"seconds": 1.0}, {"digest": "0" * 32})
    for change in changes:
        with pytest.raises(DamagedShard, match="does not match its digest"):
            decode_shard(rewritten(**change))
        # Which the tail alone can't tell.
        name, value = next(iter(change.items()))
        assert record_of_tail(rewritten(**change)) == dataclasses.replace(record, **{name: value})
