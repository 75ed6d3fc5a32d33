"""Parts of a catalog's results as Parquet files, written and read.

A part tells in its metadata how many observations came to which status, so that its rows need not
be read to know that. The same rows give the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbi_dist.catalog.draw import Drawn
from sbi_dist.catalog.rows import ID, STATUSES
from sbi_dist.errors import InputError
from sbi_dist.store import ObjectStore

__all__ = ["Draws", "decode_counts", "encode", "read_counts", "read_draws"]

_COUNTS = "statuses"
# Where a part's footer is found in one read.
_TAIL_BYTES = 64 * 1024


def counts(drawn: Drawn) -> dict[str, int]:
    """How many rows have each status that occurs."""
    numbers = np.bincount(drawn.rows.status, minlength=len(STATUSES))
    return {name: int(count) for name, count in zip(STATUSES, numbers, strict=True) if count}


def encode(drawn: Drawn, metadata: dict[str, Any]) -> bytes:
    """A part; ``metadata`` is what its schema says beside the counts, as JSON by key."""
    columns: dict[str, pa.Array] = {
        ID: drawn.rows.ids,
        "status": pa.array(np.array(STATUSES, dtype=object)[drawn.rows.status], pa.string()),
    }
    for name, values in drawn.columns.items():
        if values.ndim == 1:
            columns[name] = pa.array(values, pa.float32())
        else:
            columns[name] = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    notes = {**metadata, _COUNTS: counts(drawn)}
    table = pa.table(columns).replace_schema_metadata(
        {key: json.dumps(value) for key, value in notes.items()}
    )
    sink = io.BytesIO()  # whose bytes are had without a copy
    # Draws are all different and hardly get smaller: neither dictionaries nor compression pay.
    pq.write_table(
        table, sink, compression="none", use_dictionary=["status"], write_statistics=[ID, "status"]
    )
    return sink.getvalue()


def read_counts(store: ObjectStore, key: str) -> dict[str, int]:
    """The counts of a stored part.

    Raises:
        KeyError: there is no such part.
        InputError: it is no part.
    """
    tail = store.get_tail(key, _TAIL_BYTES)
    try:
        return decode_counts(tail)
    except (pa.ArrowException, LookupError, OSError, ValueError):
        pass
    try:
        return decode_counts(store.get(key))  # a footer longer than that
    except (pa.ArrowException, LookupError, OSError, ValueError) as error:
        raise InputError(
            f"infer: {store.uri}/{key} is damaged ({error}); delete it and run the command again"
        ) from error


def decode_counts(tail: bytes) -> dict[str, int]:
    """The counts in the last bytes of a part."""
    return json.loads(pq.read_metadata(pa.BufferReader(tail)).metadata[_COUNTS.encode()])


@dataclasses.dataclass(frozen=True)
class Draws:
    """Results read back, of B observations.

    Attributes:
        ids, statuses: of each.
        columns: by name, float32 of shape (B, ...), see ``Drawn``.
    """

    ids: list[str]
    statuses: list[str]
    columns: dict[str, np.ndarray]

    @property
    def draws(self) -> np.ndarray:
        """(B, num_samples, D).

        Raises:
            KeyError: they were not kept.
        """
        return self.columns["draws"]

    @property
    def effective_sample_sizes(self) -> np.ndarray:
        """(B,); NaN where draws were not weighed."""
        return self.columns["effective_sample_size"]


def read_draws(
    target: ObjectStore, most: int | None = None, columns: Iterable[str] | None = None
) -> Draws:
    """The results of the first ``most`` observations (default: all) of a catalog's folder.

    Args:
        columns: those to read beside identifier and status; default: all.
    """
    names = None if columns is None else [ID, "status", *columns]
    tables: list[pa.Table] = []
    rows = 0
    for key in target.list("part-"):
        file = pq.ParquetFile(pa.BufferReader(target.get(key)))
        table = file.read(columns=names, use_threads=False)
        tables.append(table if most is None else table.slice(0, most - rows))
        rows += len(tables[-1])
        if most is not None and rows >= most:
            break
    table = pa.concat_tables(tables)
    found = {}
    for name in table.column_names:
        if name in (ID, "status"):
            continue
        column = table[name]
        if isinstance(column.type, pa.FixedShapeTensorType):
            found[name] = column.combine_chunks().to_numpy_ndarray()
        else:
            found[name] = column.to_numpy()
    return Draws(table[ID].to_pylist(), table["status"].to_pylist(), found)
