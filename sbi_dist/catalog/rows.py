"""Rows of a catalog: identifiers, observations, and what is the matter with each.

Columns of Arrow arrays become rows without a loop over them. A row that can't be an observation
keeps its place, with a status that says why.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from sbi_dist.errors import InputError

__all__ = [
    "ABOUT_X",
    "FAILED",
    "ID",
    "LOW_ESS",
    "OK",
    "STATUSES",
    "WRONG_LENGTH",
    "Rows",
    "depth",
    "identifiers",
    "require_numbers",
    "row_shape",
]

ID = "observation_id"
# What is told of an observation, whatever becomes of its draws.
ABOUT_X = ("out_of_distribution", "out_of_distribution_p")

# Those of a row as it is read, and what may come of one that is ok.
STATUSES = ("ok", "nonfinite", "null", "wrong_length", "failed", "low_ess")
OK, NONFINITE, NULL, WRONG_LENGTH, FAILED, LOW_ESS = range(len(STATUSES))
_FEW = 64  # rows that are numbered over and over, as a service's requests are


@dataclasses.dataclass(frozen=True)
class Rows:
    """N rows of a catalog.

    Attributes:
        ids: identifier of each, an Arrow array of strings.
        x: float32 of shape (N, *x_shape); NaN where the status is not ok.
        status: uint8 of shape (N,), indexes into ``STATUSES``.
    """

    ids: pa.Array
    x: np.ndarray
    status: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    @property
    def usable(self) -> np.ndarray:
        """Indexes of the observations that may have a posterior."""
        return np.flatnonzero(self.status == OK)

    @classmethod
    def of_arrays(
        cls,
        ids: pa.Array,
        values: np.ndarray,
        x_shape: tuple[int, ...],
        null: np.ndarray | None = None,
        misfit: np.ndarray | None = None,
    ) -> Rows:
        """Rows of values (N, ...), each as many numbers as x_shape has, with what is known of each.

        Args:
            null: whether a number is missing, or all are; (N,).
            misfit: whether the row has another length; (N,).
        """
        with np.errstate(over="ignore"):  # what float32 can't hold is infinite, and so not usable
            x = np.ascontiguousarray(values.reshape(len(values), *x_shape), dtype=np.float32)
        finite = np.isfinite(x.reshape(len(x), math.prod(x_shape))).all(axis=1)
        status = np.where(finite, OK, NONFINITE).astype(np.uint8)
        if null is not None:
            status[null] = NULL
        if misfit is not None:
            status[misfit] = WRONG_LENGTH
        if (status != OK).any():
            x = x if x.base is None and x.flags.writeable else x.copy()
            x[status != OK] = np.nan
        return cls(ids, x, status)

    @classmethod
    def of_lists(cls, ids: pa.Array, column: pa.Array, x_shape: tuple[int, ...]) -> Rows:
        """Rows of (nested) lists of numbers, with x's shape or flat."""
        size, deep = math.prod(x_shape), depth(column.type)
        if deep not in (1, len(x_shape)):
            null, values = _nulls(column), np.full((len(column), size), np.nan, np.float32)
            return cls.of_arrays(ids, values, x_shape, null, ~null)
        values, null, misfit = _gathered(column, (size,) if deep == 1 else x_shape)
        return cls.of_arrays(ids, values, x_shape, null, misfit)

    @classmethod
    def of_columns(
        cls, ids: pa.Array, columns: Sequence[pa.Array], x_shape: tuple[int, ...]
    ) -> Rows:
        """Rows of a column of numbers for each number of x."""
        numbers = [_numbers(column) for column in columns]
        values = np.stack([each for each, _ in numbers], axis=1)
        null = np.any([each for _, each in numbers], axis=0)
        return cls.of_arrays(ids, values, x_shape, null)

    @classmethod
    def of_column(cls, ids: pa.Array, column: pa.Array, x_shape: tuple[int, ...]) -> Rows:
        """Rows of one column: of tensors of ``row_shape``, of (nested) lists, or of numbers."""
        kind = column.type
        if not isinstance(kind, pa.FixedShapeTensorType):
            if not depth(kind):
                return cls.of_columns(ids, [column], x_shape)
            return cls.of_lists(ids, column, x_shape)
        rows = cls.of_lists(ids, column.storage, (math.prod(x_shape),))
        x = rows.x.reshape(len(rows), *kind.shape)
        x = x.transpose(0, *(1 + axis for axis in _axes(kind)))
        return cls(ids, np.ascontiguousarray(x).reshape(-1, *x_shape), rows.status)

    @classmethod
    def concatenate(cls, parts: Sequence[Rows]) -> Rows:
        """Rows one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            pa.concat_arrays([part.ids for part in parts]),
            np.concatenate([part.x for part in parts]),
            np.concatenate([part.status for part in parts]),
        )


def identifiers(column: pa.Array | None, start: int, count: int) -> pa.Array:
    """A column of identifiers as text, or the rows' numbers."""
    if column is None:
        if start == 0 and count <= _FEW:
            return _numbered(count)
        return pa.array(np.arange(start, start + count)).cast(pa.string())
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.cast(pa.string())
    except pa.ArrowException:
        values = column.to_pylist()
        return pa.array([None if value is None else str(value) for value in values], pa.string())


@functools.lru_cache(maxsize=_FEW + 1)
def _numbered(count: int) -> pa.Array:
    return pa.array(map(str, range(count)), pa.string())


# ---- types --------------------------------------------------------------------------------------


def depth(kind: pa.DataType) -> int:
    """How many lists deep the numbers of a column are."""
    return 1 + depth(kind.value_type) if _is_list(kind) else 0


def row_shape(kind: pa.DataType) -> tuple[int, ...] | None:
    """Shape of every row of a column, where its type tells."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return tuple(kind.shape[axis] for axis in _axes(kind))
    if not depth(kind):
        return (1,)
    lengths = []
    while depth(kind):
        if not pa.types.is_fixed_size_list(kind):
            return None
        lengths.append(kind.list_size)
        kind = kind.value_type
    return tuple(lengths)


def _axes(kind: pa.FixedShapeTensorType) -> list[int]:
    """The stored axes of a tensor in the order that it means."""
    return list(range(len(kind.shape)) if kind.permutation is None else kind.permutation)


def require_numbers(kind: pa.DataType, name: str) -> None:
    """Check the type of a column.

    Raises:
        InputError: it holds no numbers.
    """
    inner = kind.storage_type if isinstance(kind, pa.FixedShapeTensorType) else kind
    while _is_list(inner):
        inner = inner.value_type
    if not (pa.types.is_floating(inner) or pa.types.is_integer(inner) or pa.types.is_null(inner)):
        raise InputError(f"column {name!r} is of type {kind}, not numeric")


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


# ---- values -------------------------------------------------------------------------------------


def _numbers(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Values (N,), NaN where null, and whether each is null."""
    null = _nulls(column)
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan), null
    return column.to_numpy(zero_copy_only=False), null


def _nulls(column: pa.Array) -> np.ndarray:
    if not column.null_count:
        return np.zeros(len(column), dtype=bool)
    return column.is_null().to_numpy(zero_copy_only=False)


def _gathered(
    column: pa.Array, lengths: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values (N, prod(lengths)) of lists nested as deep as ``lengths``, NaN where they are not.

    Also whether a row is null or has null inside, and whether it or a list in it has another
    length; bool of shape (N,).
    """
    if not lengths:
        values, null = _numbers(column)
        return values[:, None], null, np.zeros(len(column), dtype=bool)
    each = lengths[0]
    starts, counts = _extents(column)
    null = _nulls(column)
    misfit = ~null & (counts != each)
    rows = np.flatnonzero(~(null | misfit))
    first = starts[rows]
    if len(rows) and first[-1] - first[0] == (len(rows) - 1) * each and _even(first, each):
        inner = column.values.slice(first[0], len(rows) * each)
    else:
        inner = column.values.take(pa.array((first[:, None] + np.arange(each)).ravel()))
    values, inner_null, inner_misfit = _gathered(inner, lengths[1:])
    values = values.reshape(len(rows), math.prod(lengths))
    if len(rows) < len(column):
        sparse = np.full((len(column), values.shape[1]), np.nan, dtype=np.float32)
        with np.errstate(over="ignore"):
            sparse[rows] = values
        values = sparse
    null[rows] |= inner_null.reshape(len(rows), each).any(axis=1)
    misfit[rows] |= inner_misfit.reshape(len(rows), each).any(axis=1)
    return values, null, misfit


def _even(first: np.ndarray, each: int) -> bool:
    return bool((np.diff(first) == each).all())


def _extents(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Where each list begins in the column's values, and how many it has; int64."""
    if pa.types.is_fixed_size_list(column.type):
        size = column.type.list_size
        return (column.offset + np.arange(len(column))) * size, np.full(len(column), size)
    offsets = column.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    return offsets[:-1], np.diff(offsets)
