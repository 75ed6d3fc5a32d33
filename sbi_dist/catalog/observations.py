"""Catalogs: files of observations, read and checked row by row without stopping at a bad one."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from sbi_dist.errors import InputError
from sbi_dist.store import open_store

__all__ = ["Catalog", "read_catalog"]

_ID = "observation_id"


@dataclasses.dataclass(frozen=True)
class Catalog:
    """Observations of one shape.

    Attributes:
        name: names the catalog's results in the store; changes with its content.
        ids: identifier of each observation, as strings.
        x: float32 of shape (B, *x_shape).
        status: ``ok`` or ``nonfinite`` for each.
    """

    name: str
    ids: list[str]
    x: np.ndarray
    status: list[str]

    @property
    def usable(self) -> np.ndarray:
        """Indexes of the observations that have a posterior."""
        return np.flatnonzero([status == "ok" for status in self.status])


def make_catalog(name: str, ids: list[str], x: np.ndarray) -> Catalog:
    """A catalog of observations x (B, *x_shape), with the status of each."""
    finite = np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    return Catalog(name, ids, x, ["ok" if good else "nonfinite" for good in finite])


def read_catalog(path: str, x_shape: tuple[int, ...]) -> Catalog:
    """Observations from a .parquet, .csv or .npy file, or such an object at ``s3://bucket/path``.

    - npy: an array of shape (B, *x_shape), (B, flat size), or one observation.
    - csv: a header; one row an observation, one numeric column for each number of x in order; a
      column ``observation_id`` is taken as identifier.
    - parquet: a column ``x`` of (nested) lists or fixed-shape tensors, or numeric columns as in
      csv; ``observation_id`` as there.

    Raises:
        InputError: no such file, another format, the wrong shape, or no usable observation.
    """
    file = Path(path).expanduser()
    data = _read_object(path) if path.startswith("s3://") else _read_file(path)
    readers = {".npy": _from_npy, ".csv": _from_csv, ".parquet": _from_parquet}
    if file.suffix.lower() not in readers:
        raise InputError(
            f"--observations {path}: the name must end in .parquet, .csv or .npy, not "
            f"{file.suffix or 'without an ending'}"
        )
    try:
        ids, values = readers[file.suffix.lower()](data)
    except InputError as error:
        raise InputError(f"--observations {path}: {error}") from None
    except (pa.ArrowException, LookupError, ValueError, TypeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"--observations {path}: no valid {file.suffix} file ({reason})"
        ) from error
    x = _shaped(values, x_shape, path, may_be_one=file.suffix.lower() == ".npy")
    if ids is None:
        ids = [str(number) for number in range(len(x))]
    if len(set(ids)) != len(ids):
        raise InputError(f"--observations {path}: {_ID} has the same value twice")
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", file.stem)[:60] or "catalog"
    name = f"{stem}-{hashlib.sha256(data).hexdigest()[:8]}"
    catalog = make_catalog(name, ids, x)
    if not len(catalog.usable):
        raise InputError(
            f"--observations {path}: none of its {len(x)} observation(s) is usable; every one "
            "holds NaN, null or infinite values"
        )
    return catalog


def _read_file(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InputError(
            f"--observations {path}: the file can't be read ({error.strerror})"
        ) from error


def _read_object(uri: str) -> bytes:
    folder, _, name = uri.rpartition("/")
    try:
        # Nothing is lost yet when a command gives up at its start, so it does not wait for long.
        return open_store(folder, patience_s=60.0).get(name)
    except KeyError:
        raise InputError(
            f"--observations {uri}: there is no such object; give one that exists"
        ) from None
    except ValueError as error:  # also a name that is empty
        raise InputError(f"--observations {uri}: {error}") from None


def _shaped(
    values: np.ndarray, x_shape: tuple[int, ...], path: str, may_be_one: bool
) -> np.ndarray:
    """Observations (B, *x_shape) of values of that shape or flat, or of one where that may be."""
    if not len(values):
        raise InputError(f"--observations {path}: the file holds no observation")
    size, each = math.prod(x_shape), values.shape[1:]
    if may_be_one and values.shape in {x_shape, (size,)} and size != 1:
        values = values[None]
    elif each not in {x_shape, (size,)} and not (size == 1 and each == ()):
        raise InputError(
            f"--observations {path}: an observation there has shape {each}, the model takes "
            f"{x_shape} ({size} numbers)"
        )
    with np.errstate(over="ignore"):  # what float32 can't hold is infinite, and so not usable
        return np.ascontiguousarray(values.reshape(len(values), *x_shape), dtype=np.float32)


def _from_npy(data: bytes) -> tuple[list[str] | None, np.ndarray]:
    array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    if array.dtype.kind not in "fiu":
        raise InputError(f"dtype {array.dtype} is not numeric")
    return None, array if array.ndim else array.reshape(1, 1)


def _from_csv(data: bytes) -> tuple[list[str] | None, np.ndarray]:
    # An identifier is text, also where it looks like a number: 007 is not 7.
    options = pa.csv.ConvertOptions(column_types={_ID: pa.string()})
    # In this thread: one that reads ahead may end the process by a crash when it exits.
    serial = pa.csv.ReadOptions(use_threads=False)
    reader = pa.BufferReader(data)
    return _from_columns(pa.csv.read_csv(reader, serial, convert_options=options))


def _from_parquet(data: bytes) -> tuple[list[str] | None, np.ndarray]:
    table = pq.ParquetFile(io.BytesIO(data)).read(use_threads=False)
    if "x" not in table.column_names:
        return _from_columns(table)
    column = table["x"].combine_chunks()
    if isinstance(column, pa.FixedShapeTensorArray):
        if column.null_count:
            raise InputError("column x has nulls; give NaN in a missing observation")
        return _ids(table), column.to_numpy_ndarray()
    if isinstance(column, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        return _ids(table), _from_lists(column)
    return _ids(table), _numbers(column, "x")[:, None]


def _from_lists(column: pa.Array) -> np.ndarray:
    """Rows of equal length; a null row, or null numbers, become NaN."""
    rows = column.to_pylist()
    lengths = {len(row) for row in rows if row is not None}
    if len(lengths) > 1:
        raise InputError(f"the rows of column x have different lengths ({sorted(lengths)[:5]})")
    if rows and not lengths:
        raise InputError("column x holds nothing but nulls")
    shape = np.shape(next((row for row in rows if row is not None), ()))
    filled = [np.full(shape, np.nan) if row is None else row for row in rows]
    return np.array(filled, dtype=np.float64)


def _from_columns(table: pa.Table) -> tuple[list[str] | None, np.ndarray]:
    columns = [
        _numbers(column.combine_chunks(), name)
        for name, column in zip(table.column_names, table.columns, strict=True)
        if name != _ID
    ]
    if not columns:
        raise InputError("there is no column with numbers")
    return _ids(table), np.stack(columns, axis=1)


def _numbers(column: pa.Array, name: str) -> np.ndarray:
    kind = column.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise InputError(f"column {name!r} is of type {kind}, not numeric")
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)


def _ids(table: pa.Table) -> list[str] | None:
    if _ID not in table.column_names:
        return None
    ids = table[_ID].to_pylist()
    if None in ids:
        raise InputError(f"{_ID} is null in row {ids.index(None)}")
    return [str(value) for value in ids]
