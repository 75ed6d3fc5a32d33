"""A catalog in NumPy's format: an array of observations, read by ranges of bytes."""

from __future__ import annotations

import io
import math

import numpy as np

from sbi_dist.catalog.file import CatalogFile
from sbi_dist.catalog.rows import Rows, identifiers
from sbi_dist.errors import InputError

__all__ = ["NpySource"]

_HEADER_BYTES = 64 * 1024


class NpySource:
    """Observations of an array of shape (B, *x_shape), (B, flat size), or one observation.

    Raises:
        InputError: an array of something else.
        ValueError: no such file.
    """

    on_disk = True

    def __init__(self, name: str, file: CatalogFile, x_shape: tuple[int, ...]) -> None:
        self.name, self.remote = name, file.remote
        self._file, self._x_shape = file, x_shape
        head = io.BytesIO(file.read(0, _HEADER_BYTES))
        version = np.lib.format.read_magic(head)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format {version} is for structured arrays")
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, self._by_columns, self._dtype = read[version[0]](head)
        self._offset = head.tell()
        if self._dtype.kind not in "fiu":
            raise InputError(f"dtype {self._dtype} is not numeric")
        if file.size < self._offset + math.prod(shape) * self._dtype.itemsize:
            raise ValueError(f"it ends before the last number of an array of shape {shape}")
        size, shape = math.prod(x_shape), shape or (1, 1)
        if size != 1 and shape in {x_shape, (size,)}:
            shape = (1, *shape)
        self._length, self._each = shape[0], shape[1:]
        fits = self._each in {x_shape, (size,)} or (size == 1 and self._each == ())
        if self._length and not fits:
            raise InputError(
                f"an observation there has shape {self._each}, the model takes {x_shape} "
                f"({size} numbers)"
            )

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> Rows:
        size, count = math.prod(self._x_shape), stop - start
        if self._by_columns and self._length > 1:
            # The first number of all rows, then the second of all, and so on.
            columns = [
                self._numbers(column * self._length + start, count) for column in range(size)
            ]
            values = np.stack(columns, axis=1)
        else:
            values = self._numbers(start * size, count * size).reshape(count, size)
        if self._by_columns:
            # Of each row too, the first length runs fastest.
            values = values.reshape(count, *self._each[::-1])
            values = values.transpose(0, *range(values.ndim - 1, 0, -1))
        ids = identifiers(None, start, count)
        return Rows.of_arrays(ids, values.reshape(count, size), self._x_shape)

    def _numbers(self, first: int, count: int) -> np.ndarray:
        """Numbers of the array in the order of the file."""
        each = self._dtype.itemsize
        data = self._file.read(self._offset + first * each, count * each)
        if len(data) != count * each:
            self._file.check()
            raise ValueError("it ends before its last number")
        return np.frombuffer(data, self._dtype)

    def check(self) -> None:
        self._file.check()
