"""Our Parquet files: every reader's, bit by bit, and nothing but ValueError for other bytes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sbi_dist.simulation import parquet
from sbi_dist.simulation.parquet import Columns, ShortTail, decode, encode, read_layout, read_note
from sbi_dist.simulation.ranges import places_of

few = settings(deadline=None, max_examples=30)
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
texts = st.text("aZ é⏱𝄞\0\n", max_size=8)


def columns(
    rows: int,
    theta: tuple[int, ...] = (3,),
    x: tuple[int, ...] = (3,),
    failed: dict[int, tuple[str, str]] | None = None,
    metadata: dict[str, str] | None = None,
) -> Columns:
    rng = np.random.default_rng(rows)

    def floats(*shape: int) -> np.ndarray:
        # All bit patterns, so NaNs of any payload, infinities and subnormals among them.
        return rng.integers(0, 1 << 32, shape, dtype=np.uint32).view(np.float32)

    return Columns(
        simulation_id=rng.integers(-(1 << 62), 1 << 62, rows),
        theta=floats(rows, *theta),
        x=floats(rows, *x),
        failed=failed or {},
        duration_s=floats(rows),
        metadata=metadata or {},
    )


def of_a_batch(data: Columns, first: int, seconds: float) -> Columns:
    """With ids that follow each other and one duration, as a batch simulator's shard has them."""
    rows = len(data.theta)
    # Not arange(first, first + rows): the end may be no int64.
    ids = first + np.arange(rows, dtype=np.int64)
    return replace(data, simulation_id=ids, duration_s=np.full(rows, seconds, dtype=np.float32))


@st.composite
def some_columns(draw: st.DrawFn) -> Columns:
    rows = draw(st.integers(0, 50))
    status = texts.filter(lambda text: text != "ok")
    failed = st.dictionaries(st.integers(0, max(rows - 1, 0)), st.tuples(status, texts))
    data = columns(
        rows,
        draw(shapes),
        draw(shapes),
        draw(failed) if rows else {},
        draw(st.dictionaries(st.sampled_from(["sbi_dist", "é", "other"]), texts)),
    )
    batch = of_a_batch(data, draw(st.integers(-(1 << 63), (1 << 63) - 50)), 0.5)
    if draw(st.booleans()):
        data = replace(data, simulation_id=batch.simulation_id)
    return replace(data, duration_s=batch.duration_s) if draw(st.booleans()) else data


def encoded(data: Columns) -> bytes:
    return encode(**vars(data))


def table_of(data: Columns) -> pa.Table:
    """The same rows as pyarrow makes a table of them."""
    ok = ("ok", None)
    rows = range(len(data.theta))
    arrays = {
        "simulation_id": pa.array(data.simulation_id, pa.int64()),
        "theta": tensors(data.theta),
        "x": tensors(data.x),
        "status": pa.array([data.failed.get(row, ok)[0] for row in rows], pa.string()),
        "error": pa.array([data.failed.get(row, ok)[1] for row in rows], pa.string()),
        "duration_s": pa.array(data.duration_s, pa.float32()),
    }
    return pa.table(arrays).replace_schema_metadata(data.metadata)


def tensors(array: np.ndarray) -> pa.Array:
    kind = pa.fixed_shape_tensor(pa.float32(), array.shape[1:])
    flat = pa.FixedSizeListArray.from_arrays(array.ravel(), int(np.prod(array.shape[1:])))
    return pa.ExtensionArray.from_storage(kind, flat)


def written(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def layout_of(content: bytes) -> dict[str, Any]:
    return json.loads(pq.read_metadata(io.BytesIO(content)).metadata[b"sbi_dist.layout"])


def assert_same(left: Columns, right: Columns) -> None:
    for name in ("simulation_id", "theta", "x", "duration_s"):
        assert same(getattr(left, name), getattr(right, name)), name
    assert left.failed == right.failed
    assert left.metadata == right.metadata


def assert_reads(content: bytes, data: Columns) -> pa.Table:
    """pyarrow reads the file as the table that it would have written itself."""
    expected = table_of(data)
    table = pq.read_table(io.BytesIO(content), page_checksum_verification=True)
    assert table.schema.equals(expected.schema)
    kept = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert kept == data.metadata
    table.validate(full=True)
    for name in ("status", "error"):
        assert table[name].to_pylist() == expected[name].to_pylist()
    for name in ("simulation_id", "duration_s"):
        assert same(table[name].to_numpy(), getattr(data, name))
    for name in ("theta", "x"):
        flat = table[name].combine_chunks().storage.flatten()
        assert flat.null_count == 0
        assert same(flat.to_numpy(), getattr(data, name).ravel())
    return table


@few
@given(some_columns())
@example(columns(1))
@example(columns(0))
def test_what_is_encoded_is_read_by_pyarrow_and_by_decode(data: Columns) -> None:
    content = encoded(data)
    assert_reads(content, data)
    assert_same(decode(content), data)


@few
@given(
    some_columns(),
    st.sampled_from(["none", "snappy"]),
    st.booleans(),
    st.sampled_from(["1.0", "2.0"]),
    st.integers(1, 60),
)
def test_what_pyarrow_writes_is_decoded(
    data: Columns, compression: str, dictionary: bool, version: str, group: int
) -> None:
    assume(len(data.theta))
    content = written(
        table_of(data),
        compression=compression,
        use_dictionary=dictionary,
        data_page_version=version,
        row_group_size=group,
    )
    assert_same(decode(content), data)


@pytest.mark.parametrize("failing", ["none", "some", "all", "all alike"])
def test_many_rows(failing: str) -> None:
    rows = 70_000
    failed = {
        "none": {},
        "some": {row: ("timeout", f"après {row % 7} s ⏱") for row in range(3, rows, 11)},
        "all": {row: ("error", f"ValueError: {row}") for row in range(rows)},
        "all alike": dict.fromkeys(range(rows), ("error", "")),
    }[failing]
    data = columns(rows, (2,), (1,), failed)
    content = encoded(data)
    assert_reads(content, data)
    assert_same(decode(content), data)


def test_texts_take_nothing_where_all_rows_are_ok() -> None:
    data = columns(70_000, (1,), (1,))
    values = sum(
        array.nbytes for array in (data.simulation_id, data.theta, data.x, data.duration_s)
    )
    assert len(encoded(data)) < values + 5_000


def encoding_of(content: bytes, name: str) -> set[str]:
    file = pq.read_metadata(io.BytesIO(content))
    groups = range(file.num_row_groups)
    index = file.schema.to_arrow_schema().names.index(name)
    return {e for group in groups for e in file.row_group(group).column(index).encodings} - {"RLE"}


@pytest.mark.parametrize("rows", [1, 2, 127, 128, 129, 130, 257, 70_000])
def test_a_shard_of_a_batch_simulator_takes_only_its_parameters_and_data(rows: int) -> None:
    first = 3 << 40
    data = of_a_batch(columns(rows, (1,), (1,), metadata={"sbi_dist": "{}"}), first, 1.5e-5)
    content = encoded(data)
    assert_reads(content, data)
    found = decode(content)
    assert_same(found, data)
    assert found.simulation_id.dtype == np.int64 and found.duration_s.dtype == np.float32
    # A dataset compares the two, so they must be the same to the last bit.
    assert found.duration_s.sum(dtype=np.float64) == data.duration_s.sum(dtype=np.float64)
    group = layout_of(content)["groups"][0]
    assert group["simulation_id"] == first and isinstance(group["duration_s"], int)
    assert len(content) < data.theta.nbytes + data.x.nbytes + 5 * rows / 128 + 3_000


@pytest.mark.parametrize("first", [-(1 << 63), -200, -1, 0, (1 << 63) - 300])
def test_ids_that_follow_each_other(first: int) -> None:
    data = of_a_batch(columns(300, (1,), (1,)), first, 0)
    content = encoded(data)
    assert encoding_of(content, "simulation_id") == {"DELTA_BINARY_PACKED"}
    assert_reads(content, data)
    assert_same(decode(content), data)


@pytest.mark.parametrize(
    "ids",
    [
        [5, 4, 3],
        [5, 7, 9],
        [5, 7, 6, 8],
        [5, 6, 7, 7],
        [(1 << 63) - 1, -(1 << 63)],  # the difference is 1, but for an overflow
    ],
)
def test_ids_that_do_not_follow_each_other(ids: list[int]) -> None:
    data = replace(columns(len(ids)), simulation_id=np.array(ids))
    content = encoded(data)
    assert encoding_of(content, "simulation_id") == {"PLAIN"}
    assert_reads(content, data)
    assert_same(decode(content), data)


@pytest.mark.parametrize("bits", [0, 0x80000000, 0x3F800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF])
def test_durations_that_are_the_same_to_the_last_bit(bits: int) -> None:
    alike = np.full(9, bits, dtype=np.uint32)
    for last, encoding in ((bits, {"PLAIN", "RLE_DICTIONARY"}), (bits ^ 1 << 31, {"PLAIN"})):
        alike[-1] = last
        data = replace(columns(9), duration_s=alike.view(np.float32))
        content = encoded(data)
        assert encoding_of(content, "duration_s") == encoding
        assert_reads(content, data)
        assert_same(decode(content), data)


def test_each_row_group_chooses_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_PAGE_BYTES", 300)
    data = of_a_batch(columns(100, (3,), (2, 2), {7: ("error", "seven")}), 50, 0.5)
    data.simulation_id[60:] += 1
    data.duration_s[30] = 0.25
    content = encoded(data)
    groups = layout_of(content)["groups"]
    assert len({type(group["simulation_id"]) for group in groups}) == 2
    assert len({type(group["duration_s"]) for group in groups}) == 2
    assert_reads(content, data)
    assert_same(decode(content), data)


def test_files_of_the_version_before_are_read_by_their_note() -> None:
    data = columns(40, failed={3: ("error", "a message")})
    content = encoded(data).replace(b"sbi_dist version 1.1.0", b"sbi_dist version 1.0.0")
    found = decode(content)
    assert_same(found, data)
    assert not found.x.flags.owndata and not found.simulation_id.flags.owndata


@pytest.mark.parametrize("length", [1, 2, 7, 8, 31, 33, 63, 64, 65, 1000])
@pytest.mark.parametrize("rows", [1, 7, 8, 33])
def test_levels_of_rows_of_any_length(rows: int, length: int) -> None:
    data = columns(rows, (length,), (2, length))
    assert_reads(encoded(data), data)


@pytest.mark.parametrize("page_bytes", [1, 300, 700])
def test_several_row_groups(monkeypatch: pytest.MonkeyPatch, page_bytes: int) -> None:
    monkeypatch.setattr(parquet, "_PAGE_BYTES", page_bytes)
    data = columns(100, (3,), (2, 2), {row: ("error", "m" * row) for row in range(20, 90, 3)})
    content = encoded(data)
    file = pq.ParquetFile(io.BytesIO(content))
    assert file.num_row_groups > 2
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        sizes = [about.column(i).total_compressed_size for i in range(about.num_columns)]
        assert about.num_rows == 1 or max(sizes) < page_bytes + 200
        assert about.total_byte_size == sum(sizes)
    assert_reads(content, data)
    assert_same(decode(content), data)


def test_a_rewritten_file_is_not_read_by_the_note_that_it_kept() -> None:
    data = columns(50, failed={4: ("error", "four")}, metadata={"sbi_dist": "{}"})
    content = encoded(data)
    table = pq.read_table(io.BytesIO(content))
    assert_same(decode(written(table)), data)
    kept = {**data.metadata, "sbi_dist.layout": json.dumps(layout_of(content))}
    rewritten = written(table.replace_schema_metadata(kept))
    assert layout_of(rewritten)
    assert_same(decode(rewritten), data)


def test_views_are_of_the_given_bytes_and_aligned() -> None:
    content = encoded(columns(100, (3,), (5,)))
    for name in ("simulation_id", "theta", "x", "duration_s"):
        array = getattr(decode(content), name)
        assert array.flags.aligned and not array.flags.owndata and not array.flags.writeable


def test_arrays_that_are_not_contiguous() -> None:
    data = columns(20, (4,), (3, 2))
    content = encode(
        data.simulation_id[::2], data.theta[::2], data.x[::2], {}, data.duration_s[::2], {}
    )
    assert same(decode(content).x, np.ascontiguousarray(data.x[::2]))


def test_readers_of_parts_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_PAGE_BYTES", 4000)
    data = columns(2000, (3,), (2, 2), {5: ("error", "five"), 1999: ("timeout", "last")})
    path = tmp_path / "shard.parquet"
    path.write_bytes(encoded(data))
    expected = table_of(data)

    alone = pq.read_table(path, columns=["x"])
    assert alone.column_names == ["x"]
    assert same(alone["x"].combine_chunks().to_numpy_ndarray(), data.x)

    batches = list(pq.ParquetFile(path).iter_batches(batch_size=333))
    assert [len(batch) for batch in batches[:6]] == [333] * 6
    ids = np.concatenate([batch["simulation_id"].to_numpy() for batch in batches])
    assert same(ids, data.simulation_id)

    failed = pyarrow.dataset.dataset(path).to_table(
        columns=["simulation_id", "error"], filter=pyarrow.dataset.field("status") != "ok"
    )
    assert failed["error"].to_pylist() == ["five", "last"]
    assert failed["simulation_id"].to_pylist() == data.simulation_id[[5, 1999]].tolist()
    assert pyarrow.dataset.dataset(path).to_table().schema.equals(expected.schema)


def test_pandas_reads_it(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    data = columns(30, (2,), (3,), {4: ("error", "four")})
    path = tmp_path / "shard.parquet"
    path.write_bytes(encoded(data))
    frame = pandas.read_parquet(path)
    assert frame["status"].tolist() == ["ok"] * 4 + ["error"] + ["ok"] * 25
    assert frame["error"][4] == "four" and frame["error"].isna().sum() == 29
    assert same(np.stack(list(frame["x"])), data.x)


@pytest.mark.parametrize("name", ["simulation_id", "theta", "x", "duration_s"])
def test_a_flipped_value_fails_the_page_checksum(name: str) -> None:
    content = bytearray(encoded(columns(40)))
    offset, length = layout_of(bytes(content))["groups"][0][name]
    content[offset + length - 3] ^= 4
    pq.read_table(io.BytesIO(content))
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(io.BytesIO(content), page_checksum_verification=True)


def test_a_flipped_text_fails_the_page_checksum() -> None:
    content = encoded(columns(40, failed={3: ("error", "a message")}))
    flipped = content.replace(b"a message", b"e message")
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(io.BytesIO(flipped), page_checksum_verification=True)
    with pytest.raises(ValueError, match="can't be read"):
        decode(flipped)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"theta": np.zeros((4, 3))}, "theta is float64, not float32"),
        ({"simulation_id": np.zeros(4, dtype=np.int32)}, "simulation_id is int32"),
        ({"x": np.zeros((3, 3), dtype=np.float32)}, "x has shape"),
        ({"x": np.zeros(4, dtype=np.float32)}, "x has shape"),
        ({"duration_s": np.zeros((4, 1), dtype=np.float32)}, "duration_s has shape"),
        ({"x": np.zeros((4, 0), dtype=np.float32)}, "x has no values"),
        ({"failed": {4: ("error", "")}}, "not one of the 4 rows"),
        ({"failed": {-1: ("error", "")}}, "not one of the 4 rows"),
        ({"failed": {1: ("ok", "")}}, 'has the status "ok"'),
        ({"failed": {1: ("error", "\udc80")}}, "surrogates"),
    ],
)
def test_encode_refuses(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        encode(**{**vars(columns(4)), **change})


def test_a_row_too_large_for_a_page_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_FIELD_BYTES", 100)
    with pytest.raises(ValueError, match="a row of x takes more"):
        encode(**vars(columns(4, x=(26,))))
    with pytest.raises(ValueError, match="the message of a failed row"):
        encode(**vars(columns(4, failed={1: ("error", "m" * 100)})))


@pytest.mark.parametrize("kind", ["fixed", "list", "large"])
def test_plain_lists_by_another_tool(kind: str) -> None:
    data = columns(9, (2,), (2, 3), {2: ("error", "two")})
    table = table_of(data)
    for name, length in (("theta", 2), ("x", 6)):
        types = {
            "fixed": pa.list_(pa.float32(), length),
            "list": pa.list_(pa.float32()),
            "large": pa.large_list(pa.float32()),
        }
        lists = table[name].combine_chunks().storage.cast(types[kind])
        table = table.set_column(table.column_names.index(name), name, lists)
    back = decode(written(table, store_schema=kind != "list"))
    assert same(back.theta, data.theta)
    assert same(back.x, data.x.reshape(9, 6))
    assert back.failed == data.failed


@pytest.mark.parametrize("status", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_of_other_types(status: pa.DataType) -> None:
    data = columns(9, failed={2: ("error", "two")})
    table = table_of(data)
    for name in ("status", "error"):
        column = table[name].cast(status)
        table = table.set_column(table.column_names.index(name), name, column)
    assert_same(decode(written(table, row_group_size=4)), data)


@pytest.mark.parametrize(
    ("name", "column", "reason"),
    [
        ("theta", None, "no column theta"),
        ("x", pa.array([[1.0], [1.0, 2.0]], pa.list_(pa.float32())), "the same number"),
        ("x", pa.array([[], []], pa.list_(pa.float32())), "the same number"),
        ("x", pa.array([[1.0], None], pa.list_(pa.float32())), "missing values"),
        ("x", pa.array([[1.0], [None]], pa.list_(pa.float32())), "missing values"),
        ("x", pa.array([[1.0], [2.0]], pa.list_(pa.float64())), "x holds float64"),
        ("x", pa.array([1.0, 2.0], pa.float32()), "can't be read"),
        ("simulation_id", pa.array([1, None], pa.int64()), "simulation_id has missing values"),
        ("simulation_id", pa.array([1, 2], pa.int32()), "simulation_id holds int32"),
        ("status", pa.array(["ok", None]), "status has missing values"),
        ("status", pa.array([1, 2]), "can't be read"),
    ],
)
def test_other_columns_are_refused(name: str, column: pa.Array, reason: str) -> None:
    table = table_of(columns(2))
    index = table.column_names.index(name)
    table = table.remove_column(index)
    if column is not None:
        table = table.add_column(index, name, column)
    with pytest.raises(ValueError, match=reason) as caught:
        decode(written(table))
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


def test_permuted_axes_are_refused() -> None:
    table = table_of(columns(2, x=(2, 3)))
    kind = pa.fixed_shape_tensor(pa.float32(), (2, 3), permutation=[1, 0])
    column = pa.ExtensionArray.from_storage(kind, table["x"].combine_chunks().storage)
    table = table.set_column(2, "x", column)
    with pytest.raises(ValueError, match="x has permuted axes"):
        decode(written(table))


@few
@given(some_columns(), st.integers(0, 5000))
def test_the_note_is_in_the_last_bytes(data: Columns, extra: int) -> None:
    content = encoded(data)
    with pytest.raises(ShortTail) as caught:
        read_note(content[-8:])
    needed = caught.value.needed
    with pytest.raises(ShortTail):
        read_note(content[1 - needed :])
    for tail in (content[-needed:], content[-needed - extra :]):
        assert read_note(tail) == (data.metadata, len(data.theta))


@few
@given(some_columns(), st.data())
def test_some_rows_are_read_by_the_layout(data: Columns, draw: st.DataObject) -> None:
    content = encoded(data)
    layout = read_layout(content)
    assert layout is not None
    places = places_of(layout)
    rows = len(data.theta)
    start, stop = sorted(draw.draw(st.integers(0, rows)) for _ in range(2))
    asked: list[int] = []

    def get(offset: int, length: int) -> bytes:
        asked.append(length)
        return content[offset : offset + length]

    theta, x = places.read(get, start, stop)
    assert theta.tobytes() == data.theta[start:stop].tobytes()
    assert x.tobytes() == data.x[start:stop].tobytes()
    assert theta.shape[1:] == data.theta.shape[1:] and x.shape[1:] == data.x.shape[1:]
    assert sum(asked) == theta.nbytes + x.nbytes
    for wrong in ((0, rows + 1), (-1, 0), (1, 0)):
        with pytest.raises(ValueError, match=f"it has {rows} rows"):
            places.read(get, *wrong)


def test_some_rows_of_several_row_groups(monkeypatch) -> None:
    monkeypatch.setattr(parquet, "_PAGE_BYTES", 24)
    data = columns(7, (3,), (2,))
    content = encoded(data)
    places = places_of(read_layout(content))
    assert places.groups.shape == (3, 5)  # two rows each
    for start in range(8):
        for stop in range(start, 8):
            theta, x = places.read(lambda a, n: content[a : a + n], start, stop)
            assert theta.tobytes() == data.theta[start:stop].tobytes()
            assert x.tobytes() == data.x[start:stop].tobytes()
    with pytest.raises(ValueError, match="it ends before its last row"):
        places.read(lambda a, n: content[a : a + n][:-1], 0, 3)


def test_a_rewritten_file_has_no_layout() -> None:
    assert read_layout(written(pq.read_table(io.BytesIO(OURS[0])))) is None


@pytest.mark.parametrize("column", ["theta", "x"])
@pytest.mark.parametrize("wrong", [[3, 40], [4, 41], [1 << 70, 40], [4], None, "ab", ["a", 40]])
def test_a_damaged_layout(column: str, wrong: Any) -> None:
    layout = read_layout(OURS[0])
    layout["groups"][0][column] = wrong
    with pytest.raises(ValueError, match="its note of the layout does not fit the file"):
        places_of(layout)


def test_the_note_of_a_file_by_pyarrow() -> None:
    data = columns(7, metadata={"sbi_dist": "{}"})
    assert read_note(written(table_of(data))) == (data.metadata, 7)
    bare = written(table_of(data).replace_schema_metadata(None), store_schema=False)
    assert read_note(bare) == ({}, 7)


@pytest.mark.parametrize(
    "tail", [b"", b"PAR1", b"\0" * 100, b"\0\0\0\0PAR1", b"\xff" * 90 + b"\x50\0\0\0PAR1"]
)
def test_no_note_in_other_bytes(tail: bytes) -> None:
    with pytest.raises(ValueError, match=r"does not end as|can't be read"):
        read_note(tail)


OURS = [
    encoded(columns(5, (2,), (3,), metadata={"sbi_dist": "{}"})),
    encoded(columns(40, (2,), (3,), {row: ("error", f"m{row % 5}") for row in range(0, 40, 3)})),
    encoded(of_a_batch(columns(200, (2,), (1,), {9: ("error", "nine")}), 1 << 40, 0.5)),
]
FILES = [
    *OURS,
    *(content.replace(b"sbi_dist.layout", b"another__layout") for content in OURS),
    written(pq.read_table(io.BytesIO(OURS[1])), compression="none"),
]


def decode_or_refuse(content: bytes) -> None:
    refused: list[Exception] = []
    try:
        found = decode(content)
        rows = len(found.simulation_id)
        assert found.theta.shape[:1] == found.x.shape[:1] == found.duration_s.shape == (rows,)
        assert found.theta.ndim > 1 and found.x.ndim > 1
        assert all(0 <= row < rows for row in found.failed)
    except ValueError as error:
        refused.append(error)
    try:
        read_note(content)
    except (ShortTail, ValueError) as error:
        refused.append(error)
    try:
        layout = read_layout(content)
        if layout is not None:
            places_of(layout).read(lambda a, n: content[a : a + n], 0, 1)
    except (ShortTail, ValueError) as error:
        refused.append(error)
    assert {type(reason) for reason in refused} <= {ValueError, ShortTail}
    assert not any("\n" in str(reason) for reason in refused)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), min_size=1, max_size=4),
    st.booleans(),
)
def test_flipped_bytes_are_refused_or_read(
    content: bytes, flips: list[tuple[int, int]], from_end: bool
) -> None:
    damaged = bytearray(content)
    for place, bits in flips:
        place %= len(damaged)
        damaged[~place if from_end else place] ^= bits
    decode_or_refuse(bytes(damaged))


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(FILES), st.integers(0, 4000), st.integers(1, 4000))
def test_cut_files_are_refused(content: bytes, start: int, length: int) -> None:
    start %= len(content)
    cut = content[:start] + content[start + length :]
    decode_or_refuse(cut)
    with pytest.raises(ValueError, match=r"."):
        decode(content[:start])


@few
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(content: bytes) -> None:
    for data in (content, b"PAR1" + content + len(content).to_bytes(4, "little") + b"PAR1"):
        with pytest.raises(ValueError, match=r"."):
            decode(data)


@pytest.mark.parametrize(
    "change",
    [
        {"end": 4},
        {"failed": 1},
        {"failed": None},
        {"theta": []},
        {"theta": [-2]},
        {"theta": "2"},
        {"x": [3.0]},
        {"groups": []},
        {"groups": [{"rows": 5}]},
        {"groups": [None]},
        {"simulation_id": [1 << 70, 40]},
        {"simulation_id": [-8, 40]},
        {"simulation_id": [64.0, 40]},
        {"simulation_id": [64, 48]},
        {"x": 5},
        {"simulation_id": 1 << 63},
        {"simulation_id": "5"},
        {"simulation_id": None},
        {"simulation_id": 5.0},
        {"duration_s": -1},
        {"duration_s": 1 << 32},
    ],
)
def test_a_wrong_note_of_the_layout_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    dumps = json.dumps

    def changed(layout: dict[str, Any]) -> str:
        if {"simulation_id", "duration_s"} & set(change):
            return dumps({**layout, "groups": [{**layout["groups"][0], **change}]})
        return dumps({**layout, **change})

    monkeypatch.setattr(parquet.json, "dumps", changed)
    content = encoded(columns(5, (2,), (3,)))
    pq.read_table(io.BytesIO(content))
    with pytest.raises(ValueError, match=r"."):
        decode(content)
