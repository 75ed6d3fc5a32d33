"""Arrow streams that arrive in pieces, and the patience of a client with a service."""

from __future__ import annotations

import email.utils
import itertools
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.serving.client.patience import Patience, ServiceError, retry_after
from sbi_dist.serving.client.steps import Again
from sbi_dist.serving.client.stream import ArrowStream, NotArrow

DRAWS = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
TABLE = pa.table(
    {
        "observation_id": pa.array(["0", "1", None, "three", "4"]),
        "draws": pa.FixedShapeTensorArray.from_numpy_ndarray(DRAWS),
    }
).replace_schema_metadata({"model": json.dumps("model1")})


def stream(compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, TABLE.schema, options=options) as writer:
        writer.write_table(TABLE, max_chunksize=2)
    return sink.getvalue().to_pybytes()


WHOLE = stream()


def decoded(pieces: list[bytes]) -> tuple[ArrowStream, list[Any]]:
    arrow = ArrowStream()
    return arrow, [batch for piece in pieces for batch in arrow.feed(piece)]


@given(st.lists(st.integers(0, len(WHOLE)), max_size=20))
def test_streams_arrive_in_pieces_of_any_size(places: list[int]) -> None:
    cuts = [0, *sorted(places), len(WHOLE)]
    arrow, batches = decoded([WHOLE[start:stop] for start, stop in itertools.pairwise(cuts)])
    arrow.end()
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert pa.Table.from_batches(batches).equals(TABLE)
    assert arrow.schema.metadata == TABLE.schema.metadata


def test_byte_by_byte_and_compressed() -> None:
    for data in (WHOLE, stream("lz4"), stream("zstd")):
        arrow, batches = decoded([data[place : place + 1] for place in range(len(data))])
        arrow.end()
        assert pa.Table.from_batches(batches).equals(TABLE)


@given(st.integers(0, len(WHOLE) - 1))
def test_streams_without_their_end_are_noticed(length: int) -> None:
    arrow, batches = decoded([WHOLE[:length]])
    assert sum(len(batch) for batch in batches) <= 5
    with pytest.raises(Again, match="broken off"):
        arrow.end()


@settings(max_examples=300)
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_a_changed_byte_is_no_crash(place: int, change: int) -> None:
    """It may be in a number, which nothing can tell; else it is one of two errors."""
    data = bytearray(WHOLE)
    data[place] ^= change
    try:
        arrow, _ = decoded([bytes(data)])
        arrow.end()
    except (NotArrow, Again):
        pass


@given(st.binary(min_size=8, max_size=200))
def test_anything_else_is_no_stream(data: bytes) -> None:
    arrow = ArrowStream()
    try:
        batches = list(arrow.feed(data))
        assert not batches
        arrow.end()
        assert data == b"\xff" * 4 + b"\0" * 4
    except (NotArrow, Again):
        pass


def test_lengths_below_zero() -> None:
    begin = (0xFFFFFFFF).to_bytes(4, "little")
    with pytest.raises(NotArrow):
        decoded([begin + (-8).to_bytes(4, "little", signed=True)])


# ---- patience -----------------------------------------------------------------------------------


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def patience(timeout_s: float, retries: int, part: float = 1.0) -> tuple[Patience, Clock]:
    """With waits at this part of what they may be."""
    clock = Clock()
    return Patience(
        "http://host", timeout_s, retries, clock, lambda low, high: low + part * (high - low)
    ), clock


def test_waits_grow_and_are_bounded() -> None:
    waiting, _ = patience(1000, 9)
    waits = [waiting.pause(Again("no")) for _ in range(9)]
    assert waits[:3] == pytest.approx([0.1, 0.2, 0.4]) and waits[-2:] == [5.0, 5.0]
    with pytest.raises(ServiceError, match="http://host: no, 10 times in a row"):
        waiting.pause(Again("no"))
    waiting.progress()
    assert waiting.pause(Again("no")) == pytest.approx(0.1)


def test_waits_are_spread() -> None:
    assert patience(1000, 9, 0.0)[0].pause(Again("no")) == 0
    waits = [patience(1000, 9, part)[0].pause(Again("no", 8.0)) for part in (0.0, 1.0)]
    assert waits == [8.0, 10.0]  # never before the time that the service said
    assert patience(1000, 9)[0].pause(Again("no", 0.0)) == pytest.approx(0.1)


def test_time_runs_out() -> None:
    waiting, clock = patience(10, 9)
    clock.now += 9.5
    assert waiting.left() == pytest.approx(0.5)
    waiting.excuse(2.0)
    assert waiting.left() == pytest.approx(2.5)
    with pytest.raises(ServiceError, match=r"10 s \(last: busy\).* \(request r1\)") as caught:
        waiting.pause(Again("busy", 3.0, "r1"))
    assert caught.value.request_id == "r1"
    clock.now += 3
    with pytest.raises(ServiceError, match="not done within timeout_s, 10 s"):
        waiting.left()


def test_what_services_say_of_the_time() -> None:
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": "-7"}) == 0
    for none in ("", "soon", "nan", "inf", "Fri, 99 Jan 2026 00:00:00 GMT"):
        assert retry_after({"retry-after": none}) is None
    assert retry_after({}) is None
    date = email.utils.formatdate(usegmt=True)
    assert retry_after({"retry-after": date}) == pytest.approx(0, abs=2)
