"""Answers of the service, as JSON or as an Arrow stream, block by block as they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from sbi_dist.catalog.rows import ABOUT_X, ID, STATUSES, Rows
from sbi_dist.serving.question import Question

__all__ = ["ArrowAnswer", "Block", "JsonAnswer", "bytes_of", "columns_of", "slices"]


@dataclasses.dataclass(frozen=True)
class Block:
    """What came of some observations, in their order.

    Attributes:
        rows: with their final statuses.
        columns: float32, by name, of shape (B, ...); NaN where an observation has none.
    """

    rows: Rows
    columns: dict[str, np.ndarray]


def columns_of(question: Question, size: int) -> dict[str, tuple[int, ...]]:
    """The columns of an answer, beside the scores, and their shapes without the first length."""
    draws = question.num_samples
    if question.operation == "log_prob":
        return {"log_prob": (draws,)}
    if question.summarized is None:
        columns: dict[str, tuple[int, ...]] = {"draws": (draws, size)}
        return columns | ({"log_prob": (draws,)} if question.with_log_prob else {})
    levels = len(question.summarized.quantiles)
    return {
        "mean": (size,),
        "sd": (size,),
        "covariance": (size, size),
        "quantiles": (levels, size),
        "hdi": (2, size),
        "map": (size,),
    }


def bytes_of(question: Question, size: int) -> int:
    """Bytes of the columns of one observation."""
    return 4 * sum(int(np.prod(shape)) for shape in columns_of(question, size).values()) + 64


class JsonAnswer:
    """An answer as JSON; what is not finite is null.

    Args:
        about: the fields before the observations.
    """

    media_type = "application/json"

    def __init__(self, about: dict[str, Any], question: Question, size: int) -> None:
        self._about, self._names = about, list(columns_of(question, size))
        self._begun = False

    def start(self) -> bytes:
        return orjson.dumps(self._about)[:-1] + b',"observations":['

    def block(self, block: Block) -> bytes:
        rows = block.rows
        ids, statuses = rows.ids.to_pylist(), [STATUSES[each] for each in rows.status]
        scores = [block.columns[name] for name in ABOUT_X]
        values = [np.ascontiguousarray(block.columns[name]) for name in self._names]
        usable = set(rows.usable.tolist())
        observations = []
        for number, (identity, status) in enumerate(zip(ids, statuses, strict=True)):
            observation = {ID: identity, "status": status}
            for name, score in zip(ABOUT_X, scores, strict=True):
                observation[name] = float(score[number])
            for name, each in zip(self._names, values, strict=True):
                observation[name] = each[number] if number in usable else None
            observations.append(observation)
        text = orjson.dumps(observations, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        if self._begun and text:
            text = b"," + text
        self._begun = True
        return text

    def end(self) -> bytes:
        return b"]}"


class ArrowAnswer:
    """An answer as an Arrow stream of record batches."""

    media_type = "application/vnd.apache.arrow.stream"

    def __init__(self, about: dict[str, Any], question: Question, size: int) -> None:
        self._shapes = columns_of(question, size)
        fields = [pa.field(ID, pa.string()), pa.field("status", pa.string())]
        fields += [pa.field(name, pa.float32()) for name in ABOUT_X]
        fields += [
            pa.field(name, pa.fixed_shape_tensor(pa.float32(), shape))
            for name, shape in self._shapes.items()
        ]
        self._schema = pa.schema(
            fields, metadata={key: orjson.dumps(value) for key, value in about.items()}
        )
        self._sink = _Chunks()
        self._writer: pa.ipc.RecordBatchStreamWriter | None = None

    def start(self) -> bytes:
        self._writer = pa.ipc.new_stream(self._sink, self._schema)
        return self._sink.taken()

    def block(self, block: Block) -> bytes:
        rows = block.rows
        statuses = pa.array(np.array(STATUSES, dtype=object)[rows.status], pa.string())
        arrays = [rows.ids, statuses]
        arrays += [pa.array(block.columns[name], pa.float32()) for name in ABOUT_X]
        for name in self._shapes:
            values = np.ascontiguousarray(block.columns[name])
            tensors = pa.FixedSizeListArray.from_arrays(
                pa.array(values.reshape(-1)), int(np.prod(values.shape[1:]))
            )
            kind = self._schema.field(name).type
            arrays.append(pa.ExtensionArray.from_storage(kind, tensors))
        assert self._writer is not None
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        return self._sink.taken()

    def end(self) -> bytes:
        assert self._writer is not None
        self._writer.close()
        return self._sink.taken()


class _Chunks:
    """A file that gives away what was written since it was last asked."""

    closed = False

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def taken(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


def slices(count: int, each: int) -> Iterator[slice]:
    """Ranges of at most ``each`` that cover ``count``."""
    for start in range(0, count, each):
        yield slice(start, min(start + each, count))
