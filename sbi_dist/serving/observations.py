"""Observations and parameters in a question, from JSON's values or an Arrow table.

An observation that can't be used keeps its place with a status, by the rules of catalogs
(``catalog/rows.py``). What can't be observations at all is refused.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sbi_dist.catalog.rows import ID, Rows, depth, identifiers, require_numbers, row_shape
from sbi_dist.errors import InputError
from sbi_dist.serving.refusal import Refusal

__all__ = ["as_batch", "rows_of_json", "rows_of_table", "theta_of_json", "theta_of_table"]

_UNUSABLE = (pa.ArrowException, InputError, TypeError, ValueError, OverflowError)


def as_batch(x: list[Any], x_shape: tuple[int, ...]) -> list[Any]:
    """One observation as a list of it, several as they are."""
    one = bool(x) and not isinstance(x[0], list)
    return [x] if one or (len(x_shape) > 1 and _lengths(x) == x_shape) else x


def _lengths(values: Any) -> tuple[int, ...]:
    """Of nested lists, by the first of each."""
    if not isinstance(values, list):
        return ()
    return (len(values), *(_lengths(values[0]) if values else ()))


def rows_of_json(x: list[Any], names: list[Any] | None, x_shape: tuple[int, ...]) -> Rows:
    """Rows of lists of numbers.

    Raises:
        Refusal: 422 these are no numbers, or the names are not as many.
    """
    if names is not None and len(names) != len(x):
        raise _invalid(f"observation_ids holds {len(names)} names; x holds {len(x)} observations")
    ids = identifiers(None, 0, len(x)) if names is None else pa.array(map(str, names), pa.string())
    size = math.prod(x_shape)
    values = _numbers(x)
    if values is not None and values.size == len(x) * size:
        return Rows.of_arrays(ids, values, x_shape)
    try:
        # Slower, for what is missing or of another length.
        column = pa.array(x, from_pandas=False)
        deep = depth(column.type)
        if not deep:
            raise InputError("it is no list of observations")
        require_numbers(column.type, "x")
        kind: pa.DataType = pa.float64()
        for _ in range(deep):
            kind = pa.list_(kind)
        return Rows.of_lists(ids, column.cast(kind, safe=False), x_shape)
    except _UNUSABLE as error:
        raise _invalid(
            f"x: {_line(error)}; it must be one observation or a list of them, each of {size} "
            "numbers"
        ) from None


def rows_of_table(table: pa.Table, x_shape: tuple[int, ...]) -> Rows:
    """Rows of a column ``x``, or of a column for each number of x.

    Raises:
        Refusal: 422 there are no such columns.
    """
    names = table.column_names
    if len(set(names)) < len(names):
        raise _invalid("the stream has several columns of the same name")
    try:
        ids = identifiers(_whole(table[ID]) if ID in names else None, 0, len(table))
        given = ["x"] if "x" in names else [name for name in names if name not in (ID, "theta")]
        for name in given:
            require_numbers(table.schema.field(name).type, name)
        columns = [_whole(table[name]) for name in given]
        size = math.prod(x_shape)
        if given == ["x"]:
            kind = columns[0].type
            shape = row_shape(kind)
            if isinstance(kind, pa.FixedShapeTensorType) and shape not in (x_shape, (size,)):
                raise InputError(f"its tensors have shape {shape}; the model takes {x_shape}")
            if size == 1 or depth(kind) or isinstance(kind, pa.FixedShapeTensorType):
                return Rows.of_column(ids, columns[0], x_shape)
        if len(columns) != size or any(depth(each.type) for each in columns):
            raise InputError(
                f"the stream has {len(columns)} column(s); give a column x of lists, or {size} "
                "columns of numbers"
            )
        return Rows.of_columns(ids, columns, x_shape)
    except _UNUSABLE as error:
        raise _invalid(f"x: {_line(error)}") from None


def theta_of_json(given: list[Any], observations: int, size: int) -> np.ndarray:
    """Parameters, float32 of shape (1, N, D) or (B, N, D).

    Raises:
        Refusal: 422 they have no such shape, or are not finite numbers.
    """
    theta = _numbers(given)
    if theta is None:
        raise _invalid("theta holds what is no number, or uneven lists")
    return _shaped(theta, observations, size)


def theta_of_table(table: pa.Table, size: int) -> np.ndarray:
    """As :func:`theta_of_json`, of a column ``theta`` of lists or tensors, nested or flat."""
    try:
        if table.column_names.count("theta") != 1:
            raise InputError("there is no such column, or more than one")
        column = _whole(table["theta"])
        require_numbers(column.type, "theta")
        lengths: list[int] = []
        if isinstance(column.type, pa.FixedShapeTensorType) and not column.null_count:
            values = column.to_numpy_ndarray()
            lengths += values.shape[1:]
        else:
            while depth(column.type):
                each = pc.unique(pc.list_value_length(column))
                if column.null_count or len(each) != 1:
                    raise InputError("its lists are missing or uneven")
                lengths.append(each[0].as_py())
                column = column.flatten()
            values = column.to_numpy(zero_copy_only=False)
        if len(lengths) not in (1, 2) or (len(lengths) == 2 and lengths[1] != size):
            raise InputError(f"its rows have shape {tuple(lengths)}")
        theta = values.reshape(len(table), -1, size)
    except _UNUSABLE as error:
        raise _invalid(
            f"theta: {_line(error)}; give a column of lists of numbers, of the same length for "
            f"each observation, a multiple of {size}, the number of parameters"
        ) from None
    return _shaped(theta, len(table), size)


def _numbers(values: list[Any]) -> np.ndarray | None:
    """Nested lists as an array; None where they are uneven or hold something else."""
    try:
        array = np.asarray(values)
    except ValueError:
        return None
    return array if array.dtype.kind in "fiu" else None


def _shaped(theta: np.ndarray, observations: int, size: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        theta = theta.astype(np.float32)
    if theta.ndim < 3:
        theta = np.atleast_2d(theta)[None]
    if (
        theta.ndim != 3
        or theta.shape[0] not in (1, observations)
        or theta.shape[1] == 0
        or theta.shape[2] != size
    ):
        raise _invalid(
            f"theta has shape {tuple(theta.shape)}; it must be (N, {size}) for all observations, "
            f"or ({observations}, N, {size})"
        )
    if not np.isfinite(theta).all():
        raise _invalid("theta holds numbers that are not finite")
    return theta


def _whole(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def _invalid(detail: str) -> Refusal:
    return Refusal(422, "Invalid request", detail)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
