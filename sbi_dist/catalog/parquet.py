"""A catalog in Parquet's format, streamed from its row groups."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbi_dist.catalog.file import CatalogFile, Readable
from sbi_dist.catalog.rows import ID, Rows, identifiers, require_numbers, row_shape
from sbi_dist.errors import InputError

__all__ = ["ParquetSource"]

# A row group may be as large as the file: it is decoded in batches, from pages of a buffer.
_BATCH_BYTES, _BATCH_ROWS = 8 * 1024**2, 16_384
_BUFFER_BYTES = 4 * 1024**2


class ParquetSource:
    """Observations of a column ``x``, or of columns of numbers.

    Ranges that follow each other are read in one pass; one that lies before the last one costs
    decoding its row group from the start.

    Raises:
        InputError: no column can hold an observation of this shape.
        pyarrow.ArrowException: no such file.
    """

    on_disk = True

    def __init__(self, name: str, file: CatalogFile, x_shape: tuple[int, ...]) -> None:
        self.name, self.remote = name, file.remote
        self._file, self._x_shape = file, x_shape
        self._open()
        about, schema = self._parquet.metadata, self._parquet.schema_arrow
        groups = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])
        self._has_ids, self._has_x = ID in schema.names, "x" in schema.names
        names = ["x"] if self._has_x else [each for each in schema.names if each != ID]
        if not names:
            raise InputError("there is no column with numbers")
        for each in names:
            require_numbers(schema.field(each).type, each)
        self._columns = names
        shape = row_shape(schema.field("x").type) if self._has_x else (len(names),)
        if shape is not None and not self._fits(shape):
            raise self.misfit(shape)

    def _open(self) -> None:
        self._parquet = pq.ParquetFile(
            Readable(self._file), buffer_size=_BUFFER_BYTES, pre_buffer=False
        )
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: Any = None
        self._at = 0  # row number of the first row of the batch

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parquet": None, "_batches": None, "_batch": None}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def check(self) -> None:
        self._file.check()

    # ---- shapes ----

    def _fits(self, shape: tuple[int, ...]) -> bool:
        return shape in {self._x_shape, (math.prod(self._x_shape),)}

    def misfit(self, shape: tuple[int, ...] | None = None) -> InputError:
        """The sentence for a file of observations of another shape; by default the first row's."""
        if shape is None:
            shape = _lengths(next(self._parquet.iter_batches(1, columns=["x"]))["x"][0].as_py())
        return InputError(
            f"an observation there has shape {shape}, the model takes {self._x_shape} "
            f"({math.prod(self._x_shape)} numbers)"
        )

    # ---- rows ----

    def read(self, start: int, stop: int) -> Rows:
        try:
            if self._parquet is None:  # in another process than before
                self._open()
            return self._read(start, stop)
        except (pa.ArrowException, OSError, StopIteration):
            self._batch = None
            self._file.check()  # what is no Parquet file any more was changed
            raise

    def _read(self, start: int, stop: int) -> Rows:
        group = self._group(start)
        ahead = self._at < self._starts[group]  # in a row group that is not begun
        if (
            self._batch is None
            or start < self._at
            or (ahead and self._at + len(self._batch) <= start)
        ):
            self._seek(group)
        parts = []
        while start < stop:
            while self._at + len(self._batch) <= start:
                self._at += len(self._batch)
                self._batch = next(self._batches)
            first, last = start - self._at, min(stop - self._at, len(self._batch))
            parts.append(self._rows(self._batch.slice(first, last - first), start))
            start = self._at + last
        return Rows.concatenate(parts)

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, "right")) - 1

    def _seek(self, group: int) -> None:
        row_bytes = 8 * math.prod(self._x_shape) + 32
        self._batches = self._parquet.iter_batches(
            max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes)),
            row_groups=range(group, len(self._starts) - 1),
            columns=[*self._columns, *([ID] if self._has_ids else [])],
            use_threads=False,
        )
        self._at, self._batch = int(self._starts[group]), next(self._batches)

    def _rows(self, batch: pa.RecordBatch, first: int) -> Rows:
        ids = identifiers(batch[ID] if self._has_ids else None, first, len(batch))
        if not self._has_x:
            return Rows.of_columns(ids, [batch[name] for name in self._columns], self._x_shape)
        return Rows.of_column(ids, batch["x"], self._x_shape)


def _lengths(value: Any) -> tuple[int, ...]:
    """Shape of nested lists, by the first of each."""
    if not isinstance(value, list):
        return ()
    return (len(value), *(_lengths(value[0]) if value else ()))
