"""Rows of simulations as one Parquet file, written and read at the speed of memory.

pyarrow spends some 130 ns on a row of 3 + 3 floats, nearly all of it on the repetition and
definition levels of list columns. A shard's columns are few, fixed and without nulls, so their
levels are known without looking at a value, and the values are the bytes of the arrays. Ids that
follow each other and durations that are all the same, as those of most shards, take next to
nothing. The file is an ordinary one for every Parquet reader: uncompressed, with page checksums,
and with pyarrow's own note of the Arrow types. It says in its metadata where or what the values
are, which is what ``decode`` goes by; files of the same columns by another writer are read through
pyarrow.

What the columns mean, the digest of the content and the store are not known here; the bytes of
pages and of the footer's structs are ``parquet_format.py``'s matter.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sbi_dist.simulation import parquet_format as fmt
from sbi_dist.simulation.parquet_format import Typed, i32, i64, list_of, struct

__all__ = ["Columns", "ShortTail", "decode", "encode", "read_layout", "read_note"]

_LAYOUT = "sbi_dist.layout"
_ARROW_SCHEMA = "ARROW:schema"
# A tool that rewrites a file may keep our note of the offsets, but puts its own name here.
_WRITER = "sbi_dist version 1.1.0"
_READ = (_WRITER, "sbi_dist version 1.0.0")  # that one wrote all values as they are in memory
_PAGE_BYTES = 64 << 20  # most values of a page; only a single row may take more
_FIELD_BYTES = (1 << 31) - (1 << 16)  # sizes in page headers are int32; leaves room for the levels
_ALIGN = 64
_DTYPES = {"theta": "<f4", "x": "<f4", "simulation_id": "<i8", "duration_s": "<f4"}
_LISTS = ("theta", "x")
_TEXTS = ["status", "error"]
_OK = fmt.byte_array(b"ok")
_TYPES = {
    "simulation_id": fmt.INT64,
    "theta": fmt.FLOAT,
    "x": fmt.FLOAT,
    "status": fmt.BYTE_ARRAY,
    "error": fmt.BYTE_ARRAY,
    "duration_s": fmt.FLOAT,
}


@dataclass(frozen=True)
class Columns:
    """The rows of a file; the arrays may be read-only views of its bytes.

    ``failed`` holds status and message of the rows whose status is not "ok".
    """

    simulation_id: np.ndarray
    theta: np.ndarray
    x: np.ndarray
    failed: dict[int, tuple[str, str]]
    duration_s: np.ndarray
    metadata: dict[str, str]


class ShortTail(Exception):
    """The footer begins before the given bytes.

    Args:
        needed: how many of the file's last bytes hold it; more than the file has if it is damaged.
    """

    def __init__(self, needed: int) -> None:
        super().__init__(f"the footer takes the last {needed} bytes")
        self.needed = needed


def encode(
    simulation_id: np.ndarray,
    theta: np.ndarray,
    x: np.ndarray,
    failed: Mapping[int, tuple[str, str]],
    duration_s: np.ndarray,
    metadata: Mapping[str, str],
) -> bytes:
    """The rows as a Parquet file.

    Args:
        simulation_id: int64 (N,).
        theta: float32 (N, *s), s not empty.
        x: float32 (N, *t), t not empty.
        failed: status and message by row; all other rows are "ok" and without a message.
        duration_s: float32 (N,).
        metadata: kept as metadata of the file and of its Arrow schema.

    Raises:
        ValueError: the arrays are not as above, or a row or message is too large for the format.
    """
    values = {
        "simulation_id": np.ascontiguousarray(simulation_id),
        "theta": np.ascontiguousarray(theta),
        "x": np.ascontiguousarray(x),
        "duration_s": np.ascontiguousarray(duration_s),
    }
    _check(values)
    rows = len(values["simulation_id"])
    failures = _Failures(failed, rows)
    file = _File()
    groups: list[Typed] = []
    places: list[dict[str, Any]] = []
    for start, stop in _row_groups(values, failures):
        place: dict[str, Any] = {"rows": stop - start}
        chunks = []
        for name in _TYPES:
            if name in values:
                chunk, place[name] = _write_values(file, name, values[name][start:stop])
            else:
                chunk = _write_texts(file, name, stop - start, *failures.between(name, start, stop))
            chunks.append(chunk)
        size = sum(chunk.size for chunk in chunks)
        groups.append(
            struct(
                {
                    1: list_of([chunk.entry for chunk in chunks]),
                    2: i64(size),
                    3: i64(stop - start),
                    6: i64(size),
                }
            )
        )
        places.append(place)
    layout = {
        "end": file.size,
        "failed": len(failures),
        "theta": theta.shape[1:],
        "x": x.shape[1:],
        "groups": places,
    }
    file.write(_footer(rows, groups, dict(metadata), layout))
    return file.content()


def _check(values: dict[str, np.ndarray]) -> None:
    rows = values["simulation_id"].shape[:1]
    for name, array in values.items():
        if array.dtype != np.dtype(_DTYPES[name]):
            raise ValueError(f"{name} is {array.dtype}, not {np.dtype(_DTYPES[name])}")
        if array.shape[:1] != rows or (array.ndim > 1) != (name in _LISTS):
            raise ValueError(f"{name} has shape {array.shape}, which fits no rows of simulations")
        if 0 in array.shape[1:]:
            raise ValueError(f"{name} has no values: its shape is {array.shape}")
        if _row_bytes(array) > _FIELD_BYTES:
            raise ValueError(f"a row of {name} takes more than 2 GiB")


def _row_bytes(array: np.ndarray) -> int:
    return array.itemsize * math.prod(array.shape[1:])


def _row_groups(values: dict[str, np.ndarray], failures: _Failures) -> Iterator[tuple[int, int]]:
    """First row and end of each row group: a column takes one page in each."""
    rows = len(values["simulation_id"])
    most = max(1, min(_PAGE_BYTES // _row_bytes(array) for array in values.values()))
    start = 0
    while start < rows:
        stop = failures.fitting(start, min(start + most, rows))
        yield start, stop
        start = stop


class _Texts:
    """The statuses or the messages of the failed rows; each distinct one is kept once."""

    def __init__(self, texts: list[str]) -> None:
        numbers: dict[str, int] = defaultdict(itertools.count().__next__)
        self._numbers = np.fromiter(map(numbers.__getitem__, texts), np.int64, len(texts))
        self.distinct = [fmt.byte_array(text.encode()) for text in numbers]
        self.sizes = np.array(list(map(len, self.distinct)), dtype=np.int64)[self._numbers]

    def between(self, first: int, end: int) -> tuple[list[bytes], np.ndarray]:
        """Distinct texts of some of the rows, and the index into these of each."""
        numbers = self._numbers[first:end]
        used = np.bincount(numbers) > 0
        return list(itertools.compress(self.distinct, used)), (np.cumsum(used) - 1)[numbers]


class _Failures:
    """The failed rows in order, and their texts."""

    def __init__(self, failed: Mapping[int, tuple[str, str]], rows: int) -> None:
        order = sorted(failed)
        if order and not 0 <= order[0] <= order[-1] < rows:
            raise ValueError(f"a failed row is not one of the {rows} rows")
        self._rows = np.array(order, dtype=np.int64)
        failures = [failed[row] for row in order]
        status, error = (_Texts([failure[i] for failure in failures]) for i in (0, 1))
        if _OK in status.distinct:
            raise ValueError('a failed row has the status "ok"')
        sizes = status.sizes + error.sizes
        if sizes.max(initial=0) > _FIELD_BYTES:
            raise ValueError("the message of a failed row takes more than 2 GiB")
        self._ends = np.concatenate([[0], np.cumsum(sizes)])
        self._texts = {"status": status, "error": error}

    def __len__(self) -> int:
        return len(self._rows)

    def fitting(self, start: int, stop: int) -> int:
        """The last end, up to ``stop``, of a row group from ``start`` whose texts fit a page."""
        first, end = np.searchsorted(self._rows, (start, stop))
        if self._ends[end] - self._ends[first] <= _PAGE_BYTES:
            return stop
        over = np.searchsorted(self._ends, self._ends[first] + _PAGE_BYTES, "right") - 1
        return max(int(self._rows[over]), start + 1)

    def between(
        self, name: str, start: int, stop: int
    ) -> tuple[np.ndarray, list[bytes], np.ndarray]:
        """The failed rows of a row group, counted from its start, and their texts."""
        first, end = np.searchsorted(self._rows, (start, stop))
        return self._rows[first:end] - start, *self._texts[name].between(first, end)


class _File:
    """The parts of the file so far; they are copied once, in the end."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: list[bytes | memoryview] = []
        self.write(b"PAR1")

    def write(self, part: bytes | memoryview) -> None:
        self.size += memoryview(part).nbytes
        self._parts.append(part)

    def content(self) -> bytes:
        return b"".join(self._parts)


class _Chunk(NamedTuple):
    """A column of a row group: what the footer says of it, and its bytes."""

    entry: Typed
    size: int


def _write_values(
    file: _File, name: str, values: np.ndarray
) -> tuple[_Chunk, int | tuple[int, int]]:
    """The chunk of an array without nulls, and what the layout says of its values.

    This is their offset and length, or one number that tells them all: the first of ids that
    follow each other, or the bits of each of durations that are the same.
    """
    rows = len(values)
    if name in _LISTS:
        levels = fmt.list_levels(rows, values[0].size)
    else:
        levels = fmt.sized(fmt.run(rows, 1))
    if name == "simulation_id" and _consecutive(values):
        first = int(values[0])
        body = fmt.consecutive(first, rows)
        return _write_chunk(file, name, rows, levels, fmt.DELTA_BINARY_PACKED, body), first
    if name == "duration_s" and (values.view("<u4") == values[:1].view("<u4")).all():
        one = values[:1].tobytes()
        body = fmt.one_index(rows)
        chunk = _write_chunk(file, name, rows, levels, fmt.RLE_DICTIONARY, body, [one])
        return chunk, int.from_bytes(one, "little")
    chunk = _write_chunk(file, name, values.size, levels, fmt.PLAIN, values.data)
    return chunk, (file.size - values.nbytes, values.nbytes)


def _consecutive(values: np.ndarray) -> bool:
    first, last = int(values[0]), int(values[-1])
    return last - first == len(values) - 1 and bool((values[1:] - values[:-1] == 1).all())


def _write_texts(
    file: _File, name: str, count: int, rows: np.ndarray, texts: list[bytes], chosen: np.ndarray
) -> _Chunk:
    """The chunk of status or error: a text in each of ``rows``, and "ok" or null in all others."""
    if name == "status":
        texts = [_OK, *texts]
        levels = fmt.run(count, 1)
        indices = np.zeros(count, dtype=np.int64)
        indices[rows] = chosen + 1
        body = fmt.indices(indices, len(texts))
    elif texts:
        present = np.zeros(count, dtype=bool)
        present[rows] = True
        levels = fmt.bits(present)
        body = fmt.indices(chosen, len(texts))
    else:
        levels = fmt.run(count, 0)
        body = b""
    encoding = fmt.RLE_DICTIONARY if texts else fmt.PLAIN
    return _write_chunk(file, name, count, fmt.sized(levels), encoding, body, texts)


def _write_chunk(
    file: _File,
    name: str,
    count: int,
    levels: bytes,
    encoding: int,
    values: bytes | memoryview,
    dictionary: list[bytes] | None = None,
) -> _Chunk:
    """One page of a column, and before it that of its dictionary."""
    first = fmt.dictionary_page(dictionary) if dictionary else b""
    page = fmt.data_page(count, encoding, levels, values)
    if isinstance(values, memoryview):
        # Aligned in the file, so that the views of decode() are aligned in memory.
        file.write(bytes(-(file.size + len(page) + len(levels)) % _ALIGN))
    start = file.size
    for part in (first, page, levels, values):
        file.write(part)
    size = file.size - start
    data = start + len(first)
    about = {5: i64(count), 6: i64(size), 7: i64(size), 9: i64(data)}
    if dictionary:
        about[11] = i64(start)
    return _Chunk(struct({2: i64(0), 3: struct(_column(name, encoding) | about)}), size)


@lru_cache(maxsize=16)
def _column(name: str, encoding: int) -> dict[int, Typed]:
    """What the footer says of a column in every row group."""
    encodings = {fmt.RLE, encoding}
    if encoding == fmt.RLE_DICTIONARY:
        encodings.add(fmt.PLAIN)  # the dictionary's own
    path = (name, "list", "element") if name in _LISTS else (name,)
    return {
        1: i32(_TYPES[name]),
        2: list_of([i32(each) for each in sorted(encodings)]),
        3: list_of([fmt.text(part) for part in path]),
        4: i32(fmt.UNCOMPRESSED),
    }


def _footer(
    rows: int, groups: list[Typed], metadata: dict[str, str], layout: dict[str, Any]
) -> bytes:
    arrow = _arrow_schema(tuple(layout["theta"]), tuple(layout["x"])).with_metadata(metadata)
    entries = {
        **metadata,
        _ARROW_SCHEMA: base64.b64encode(arrow.serialize()).decode(),
        _LAYOUT: json.dumps(layout),
    }
    content = struct(
        {
            1: i32(2),
            2: _schema(),
            3: i64(rows),
            4: list_of(groups),
            5: list_of([struct({1: fmt.text(key), 2: fmt.text(entries[key])}) for key in entries]),
            6: fmt.text(_WRITER),
        }
    )[1]
    return content + len(content).to_bytes(4, "little") + b"PAR1"


@lru_cache(maxsize=16)
def _arrow_schema(theta: tuple[int, ...], x: tuple[int, ...]) -> pa.Schema:
    return pa.schema(
        {
            "simulation_id": pa.int64(),
            "theta": pa.fixed_shape_tensor(pa.float32(), theta),
            "x": pa.fixed_shape_tensor(pa.float32(), x),
            "status": pa.string(),
            "error": pa.string(),
            "duration_s": pa.float32(),
        }
    )


@lru_cache(maxsize=1)
def _schema() -> Typed:
    """The columns as Parquet has them, nullable as pyarrow writes them."""
    nothing = struct({})
    elements = [struct({4: fmt.text("schema"), 5: i32(len(_TYPES))})]
    for name, kind in _TYPES.items():
        about = {3: i32(fmt.OPTIONAL), 4: fmt.text(name)}
        if name in _LISTS:
            as_list = {5: i32(1), 6: i32(3), 10: struct({3: nothing})}
            elements.append(struct(about | as_list))
            elements.append(struct({3: i32(fmt.REPEATED), 4: fmt.text("list"), 5: i32(1)}))
            about[4] = fmt.text("element")
        as_text = {6: i32(0), 10: struct({1: nothing})} if kind == fmt.BYTE_ARRAY else {}
        elements.append(struct({1: i32(kind)} | about | as_text))
    return list_of(elements)


def decode(data: bytes) -> Columns:
    """The rows of a Parquet file of these columns, by ``encode`` or by another writer.

    Tensors that arrive as plain lists have the shape (N, values of a row). The content of the
    pages that were written by ``encode`` is not checked, except for status and error.

    Raises:
        ValueError: it is not such a file; says why, in one line.
    """
    try:
        file = pq.ParquetFile(
            pa.BufferReader(data),
            read_dictionary=_TEXTS,
            page_checksum_verification=True,
        )
        entries = _entries(file.metadata)
        layout = entries.get(_LAYOUT)
        if layout is not None and file.metadata.created_by in _READ:
            columns = _by_layout(data, file, json.loads(layout))
        else:
            columns = _by_pyarrow(file)
        return Columns(**columns, metadata=_without_ours(entries))
    except Exception as error:  # pyarrow raises many kinds on foreign bytes
        if type(error) is ValueError:
            raise
        raise ValueError(f"it can't be read as Parquet ({type(error).__name__})") from error


def _by_layout(data: bytes, file: pq.ParquetFile, layout: dict[str, Any]) -> dict[str, Any]:
    end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    groups = layout["groups"]
    rows = sum(group["rows"] for group in groups)
    if layout["end"] != end or rows != file.metadata.num_rows:
        raise ValueError("its note of the layout is of another file")
    columns: dict[str, Any] = {}
    for name, dtype in _DTYPES.items():
        shape = layout[name] if name in _LISTS else []
        if (name in _LISTS) != bool(shape):
            raise ValueError(f"{name} has no shape")
        parts = [_values(data, end, name, (group["rows"], *shape), group[name]) for group in groups]
        none = np.empty((0, *shape), dtype=dtype)
        columns[name] = parts[0] if len(parts) == 1 else np.concatenate([none, *parts])
    columns["failed"] = _failed(file) if layout["failed"] else {}
    if len(columns["failed"]) != layout["failed"]:
        raise ValueError("its note of the layout is of another file")
    return columns


def _values(
    data: bytes, end: int, name: str, shape: tuple[int, ...], place: int | tuple[int, int]
) -> np.ndarray:
    """The values that the layout tells of, as ``_write_values`` has it."""
    if isinstance(place, int):
        if name == "simulation_id":
            return np.arange(place, place + shape[0], dtype=np.int64)
        if name != "duration_s":
            raise ValueError("its note of the layout does not fit the file")
        # An array of its own rather than a broadcast value: numpy may add these up differently.
        return np.full(shape, place, dtype="<u4").view("<f4")
    offset, length = place
    dtype, count = np.dtype(_DTYPES[name]), math.prod(shape)
    fits = min(shape) > 0 and offset >= 4 and offset + length <= end
    if not fits or length != count * dtype.itemsize:
        raise ValueError("its note of the layout does not fit the file")
    return np.frombuffer(data, dtype, count, offset).reshape(shape)


def _by_pyarrow(file: pq.ParquetFile) -> dict[str, Any]:
    missing = set(_TYPES) - set(file.schema_arrow.names)
    if missing:
        raise ValueError(f"it has no column {min(missing)}")
    columns: dict[str, Any] = {}
    for name, dtype in _DTYPES.items():
        column = _read(file, [name])[name].combine_chunks()
        shape: tuple[int, ...] = (len(column),)
        if name in _LISTS:
            shape, column = _flat(name, column)
        if column.null_count:
            raise ValueError(f"{name} has missing values")
        array = column.to_numpy(zero_copy_only=False)
        if array.dtype != np.dtype(dtype):
            raise ValueError(f"{name} holds {array.dtype}, not {np.dtype(dtype)}")
        columns[name] = array.reshape(shape)
    columns["failed"] = _failed(file)
    return columns


def _read(file: pq.ParquetFile, names: list[str]) -> pa.Table:
    table = file.read(names, use_threads=False)
    if len(table) != file.metadata.num_rows:
        raise ValueError(f"it has not the same number of rows in all columns: see {names[0]}")
    return table


def _flat(name: str, column: pa.Array) -> tuple[tuple[int, ...], pa.Array]:
    """Shape and values of a column of tensors or of lists of one length."""
    shape: list[int] | None = None
    if isinstance(column.type, pa.FixedShapeTensorType):
        shape = column.type.shape
        permutation = column.type.permutation or sorted(range(len(shape)))
        if list(permutation) != sorted(permutation):
            raise ValueError(f"{name} has permuted axes")
        column = column.storage
    if column.null_count:
        raise ValueError(f"{name} has missing values")
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(f"{name} has not the same number of values in each row")
    return (len(column), *(shape or lengths)), column.flatten()


def _failed(file: pq.ParquetFile) -> dict[int, tuple[str, str]]:
    table = _read(file, _TEXTS)
    table.validate(full=True)  # pyarrow takes indices from the file without a look at their range
    if table["status"].null_count:
        raise ValueError("status has missing values")
    failed: dict[int, tuple[str, str]] = {}
    start = 0
    for batch in table.to_batches():
        status, error = (batch[name].dictionary.cast(pa.string()).to_pylist() for name in _TEXTS)
        of_row = batch["status"].indices.to_numpy()
        rows = np.flatnonzero(np.array([text != "ok" for text in status], dtype=bool)[of_row])
        messages = batch["error"].indices.fill_null(len(error)).to_numpy()[rows]
        error.append("")
        texts = zip(
            map(status.__getitem__, of_row[rows].tolist()),
            map(error.__getitem__, messages.tolist()),
            strict=True,
        )
        failed.update(zip((rows + start).tolist(), texts, strict=True))
        start += len(batch)
    return failed


def read_note(tail: bytes) -> tuple[dict[str, str], int]:
    """Metadata and number of rows of a file, from its last bytes only.

    Raises:
        ShortTail: the footer begins before the given bytes.
        ValueError: they are not the end of a Parquet file; says why, in one line.
    """
    entries, file = _footer_of(tail)
    return _without_ours(entries), file.num_rows


def read_layout(tail: bytes) -> dict[str, Any] | None:
    """The note of where the values of a file are, from its last bytes only.

    It holds ``theta`` and ``x``, the shapes of a row of each, and ``groups``, a list of row groups
    with their ``rows`` and the offset and length in the file of the bytes of ``theta`` and ``x``.

    Returns:
        None for a file of another writer.

    Raises:
        ShortTail: the footer begins before the given bytes.
        ValueError: they are not the end of a Parquet file; says why, in one line.
    """
    entries, file = _footer_of(tail)
    try:
        note = entries.get(_LAYOUT)
        if note is None or file.created_by not in _READ:
            return None
        layout = json.loads(note)
        rows = sum(group["rows"] for group in layout["groups"])
    except Exception as error:  # the note may hold anything
        raise ValueError(f"its footer can't be read ({type(error).__name__})") from error
    if rows != file.num_rows:
        raise ValueError("its note of the layout is of another file")
    return layout


def _footer_of(tail: bytes) -> tuple[dict[str, str], pq.FileMetaData]:
    if len(tail) < 8 or tail[-4:] != b"PAR1":
        raise ValueError("it does not end as a Parquet file does")
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if needed > len(tail):
        raise ShortTail(needed)
    try:
        file = pq.read_metadata(pa.BufferReader(tail))
        return _entries(file), file
    except Exception as error:  # pyarrow raises many kinds on foreign bytes
        raise ValueError(f"its footer can't be read ({type(error).__name__})") from error


def _entries(file: pq.FileMetaData) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (file.metadata or {}).items()}


def _without_ours(entries: dict[str, str]) -> dict[str, str]:
    return {key: entries[key] for key in entries if key not in (_ARROW_SCHEMA, _LAYOUT)}
