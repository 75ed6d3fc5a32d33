"""Where the values of some rows of a stored shard are, so that they are read without the rest.

The footer of a shard that this library wrote says where theta and x of each row group are in the
file (``parquet.py``). What is read in this way is checked for its length alone; the digest is of
the whole content (``shard.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Places", "places_of"]

_COLUMNS = ("theta", "x")


@dataclasses.dataclass(frozen=True, slots=True)
class Places:
    """Where theta and x are in a file; small, as one is kept of each shard.

    Attributes:
        shapes: of theta and x of one row, as stored: a scalar x has shape (1,).
        groups: int64 (3, G + 1): number of the first row of each row group, and where the bytes
            of its theta and of its x begin; then the number of all rows.
    """

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    groups: np.ndarray

    def read(
        self, get: Callable[[int, int], bytes], start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``start`` to ``stop``: float32 of shapes (N, *theta's) and (N, *x's), read-only.

        Args:
            get: the bytes of the file from an offset on, and how many.

        Raises:
            ValueError: there are no such rows, or the file ends before them.
        """
        rows = int(self.groups[0, -1])
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"it has {rows} rows, not rows {start} to {stop}")
        return self._values(get, 0, start, stop), self._values(get, 1, start, stop)

    def _values(
        self, get: Callable[[int, int], bytes], column: int, start: int, stop: int
    ) -> np.ndarray:
        starts, offsets, shape = self.groups[0], self.groups[1 + column], self.shapes[column]
        row_bytes = 4 * math.prod(shape)
        parts = []
        group = int(np.searchsorted(starts, start, "right")) - 1
        while start < stop:
            first, end = int(starts[group]), min(stop, int(starts[group + 1]))
            length = (end - start) * row_bytes
            data = get(int(offsets[group]) + (start - first) * row_bytes, length)
            if len(data) != length:
                raise ValueError("it ends before its last row")
            parts.append(np.frombuffer(data, "<f4").reshape(-1, *shape))
            start, group = end, group + 1
        if not parts:
            return np.empty((0, *shape), dtype=np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def places_of(layout: dict[str, Any]) -> Places:
    """The places that the footer's note of the layout tells of.

    Raises:
        ValueError: the note is damaged.
    """
    try:
        theta, x = (tuple(int(size) for size in layout[name]) for name in _COLUMNS)
        table = np.zeros((3, len(layout["groups"]) + 1), dtype=np.int64)
        for number, group in enumerate(layout["groups"]):
            table[0, number + 1] = table[0, number] + group["rows"]
            for column, shape in enumerate((theta, x)):
                offset, length = group[_COLUMNS[column]]
                fits = offset >= 4 and length > 0 and offset + length <= layout["end"]
                if not fits or min(shape) < 1 or length != 4 * math.prod(shape) * group["rows"]:
                    raise ValueError
                table[1 + column, number] = offset
        return Places(_shared((theta, x)), table)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        raise ValueError("its note of the layout does not fit the file") from None


@functools.lru_cache(maxsize=16)
def _shared(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The same object for the shapes of all shards."""
    return shapes
