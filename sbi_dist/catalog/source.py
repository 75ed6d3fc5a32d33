"""Catalogs: sources of observations that are read by ranges of rows.

A file is never held as a whole, but for a CSV file, which has no places to read from. What can't
be an observation keeps its row and gets a status; only a file in which no row can be one is
refused.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv

from sbi_dist.catalog.file import CatalogFile, open_file
from sbi_dist.catalog.npy import NpySource
from sbi_dist.catalog.parquet import ParquetSource
from sbi_dist.catalog.rows import ID, OK, WRONG_LENGTH, Rows, identifiers, require_numbers
from sbi_dist.errors import InputError

__all__ = ["ArraySource", "Source", "open_catalog"]

# What is looked at before anything is drawn, and at once while nothing usable was found.
_LOOK_ROWS, _LOOK_BYTES = 8192, 32 * 1024**2
_MISSING = ["", "NA", "N/A", "n/a", "#N/A", "NULL", "null", "None"]


class Source(Protocol):
    """B observations of one shape; travels to other processes by pickle.

    Attributes:
        name: names the catalog's results in the store; changes with its content.
        remote: whether every machine can read it.
        on_disk: whether every process of this machine can, or more than that.
    """

    name: str
    remote: bool
    on_disk: bool

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop - 1``."""
        ...

    def check(self) -> None:
        """Be sure that all that was read is of the content that ``name`` stands for.

        Raises:
            StageError: the catalog was changed.
        """
        ...


class ArraySource:
    """Observations in memory.

    Args:
        name, rows: as of every source.
    """

    remote = on_disk = False

    def __init__(self, name: str, rows: Rows) -> None:
        self.name, self._rows = name, rows

    @classmethod
    def of(cls, name: str, x: np.ndarray, ids: list[str] | None = None) -> ArraySource:
        """Observations x (B, *x_shape), with identifiers or with their numbers."""
        given = None if ids is None else pa.array(ids, pa.string())
        return cls(name, Rows.of_arrays(identifiers(given, 0, len(x)), x, x.shape[1:]))

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Rows:
        rows = self._rows
        # A copy, as a slice of an Arrow array travels with all of it.
        ids = rows.ids.take(pa.array(np.arange(start, stop)))
        return Rows(ids, rows.x[start:stop], rows.status[start:stop])

    def check(self) -> None:
        """Nothing changes here."""


def open_catalog(path: str, x_shape: tuple[int, ...], patience_s: float = 600.0) -> Source:
    """Observations from a .parquet, .csv or .npy file, or such an object at ``s3://bucket/path``.

    - npy: an array of shape (B, *x_shape), (B, flat size), or one observation.
    - csv: a header; one row an observation, one numeric column for each number of x in order; a
      column ``observation_id`` is taken as identifier. It is held in memory.
    - parquet: a column ``x`` of (nested) lists or fixed-shape tensors, or numeric columns as in
      csv; ``observation_id`` as there.

    Args:
        path: where it is.
        x_shape: of one observation.
        patience_s: how long a read waits for a server that does not answer.

    Raises:
        InputError: no such file, another format, the wrong shape, or no usable observation.
    """
    ending = Path(path).suffix.lower()
    file = open_file(path, patience_s)
    if ending not in (".parquet", ".csv", ".npy"):
        raise InputError(
            f"--observations {path}: the name must end in .parquet, .csv or .npy, not "
            f"{ending or 'without an ending'}"
        )
    try:
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem)[:60] or "catalog"
        name = f"{stem}-{file.digest()}"
        source: Source
        if ending == ".npy":
            source = NpySource(name, file, x_shape)
        elif ending == ".parquet":
            source = ParquetSource(name, file, x_shape)
        else:
            source = _from_csv(name, file, x_shape)
        _look(source, x_shape)
        return source
    except InputError as error:
        raise InputError(f"--observations {path}: {error}") from None
    except (pa.ArrowException, LookupError, ValueError, TypeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"--observations {path}: no valid {ending} file ({reason})") from error


def _from_csv(name: str, file: CatalogFile, x_shape: tuple[int, ...]) -> ArraySource:
    # An identifier is text, also where it looks like a number: 007 is not 7. NaN is a number that
    # is none, not a missing one.
    options = pa.csv.ConvertOptions(column_types={ID: pa.string()}, null_values=_MISSING)
    # In this thread: one that reads ahead may end the process by a crash when it exits.
    serial = pa.csv.ReadOptions(use_threads=False)
    reader = pa.BufferReader(file.read(0, file.size))
    table = pa.csv.read_csv(reader, serial, convert_options=options).combine_chunks()
    names = [column for column in table.column_names if column != ID]
    if not names:
        raise InputError("there is no column with numbers")
    for column in names:
        require_numbers(table[column].type, column)
    size = math.prod(x_shape)
    if not len(table):
        raise InputError("the file holds no observation")
    if len(names) != size:
        raise InputError(
            f"an observation there has shape ({len(names)},), the model takes {x_shape} "
            f"({size} numbers)"
        )
    columns = [_whole(table[column]) for column in names]
    given = _whole(table[ID]) if ID in table.column_names else None
    ids = identifiers(given, 0, len(table))
    return ArraySource(name, Rows.of_columns(ids, columns, x_shape))


def _whole(column: Any) -> pa.Array:
    whole = column.combine_chunks()
    return whole if isinstance(whole, pa.Array) else pa.concat_arrays(whole.chunks)


def _look(source: Source, x_shape: tuple[int, ...]) -> None:
    """Look at the first rows, and on until one is usable.

    Raises:
        InputError: none is, or the first identifiers are no identifiers.
    """
    if not len(source):
        raise InputError("the file holds no observation")
    at_once = max(1, min(_LOOK_ROWS, _LOOK_BYTES // (4 * max(1, math.prod(x_shape)))))
    misfits = 0
    for start in range(0, len(source), at_once):
        rows = source.read(start, min(start + at_once, len(source)))
        if start == 0:
            _check_ids(rows.ids)
        if (rows.status == OK).any():
            return
        misfits += int((rows.status == WRONG_LENGTH).sum())
    if misfits == len(source) and isinstance(source, ParquetSource):
        raise source.misfit()
    wrong = f", or the wrong length ({misfits:,} of them)" if misfits else ""
    raise InputError(
        f"none of its {len(source)} observation(s) is usable; every one holds NaN, null or "
        f"infinite values{wrong}"
    )


def _check_ids(ids: pa.Array) -> None:
    if ids.null_count:
        row = int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
        raise InputError(f"{ID} is null in row {row}")
    if len(ids.unique()) != len(ids):
        raise InputError(f"{ID} has the same value twice")
