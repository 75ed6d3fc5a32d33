"""Answers of a service as one Parquet file, with the columns of a part of a catalog's results.

Written as they come, so that no more than a row group is held; there in full or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import sys
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbi_dist.catalog.rows import ID
from sbi_dist.errors import InputError, StageError
from sbi_dist.serving.client.answers import ABOUT_X, Answer

__all__ = ["STANDARD_OUTPUT", "AnswerFile"]

STANDARD_OUTPUT = "-"

_GROUP_BYTES = 16 * 1024**2
# What only importance weights tell; there are none of a service.
_WEIGHTS = ("effective_sample_size", "log_evidence")
_VALUES = ("draws", "log_prob", "mean", "sd", "covariance", "quantiles", "hdi", "map")


class AnswerFile:
    """A file to write answers to, as a context; where that ends in an error there is no file.

    Args:
        target: a path that ends in .parquet, whose file is replaced; or ``-``, standard output.
        notes: what the file's metadata says beside the counts of the statuses, as JSON by key.

    Attributes:
        statuses: how many observations have each so far.

    Raises:
        InputError: no file can be written there.
    """

    def __init__(self, target: str, notes: dict[str, Any]) -> None:
        self.statuses: Counter[str] = Counter()
        self._target, self._notes = target, notes
        self._held: list[pa.Table] = []
        self._writer: Any = None
        self._sink: Any = None
        self._path = self._temporary = Path()
        if target == STANDARD_OUTPUT:
            if sys.stdout.isatty():
                raise InputError(
                    "--output - is a Parquet file, which is nothing for a terminal; send it to "
                    "another program, or give a file"
                )
            return
        self._path = _place(target)
        self._temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.tmp")

    def __enter__(self) -> AnswerFile:
        try:
            if self._target == STANDARD_OUTPUT:
                self._sink = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
            else:
                self._sink = open(self._temporary, "xb")
        except OSError as error:
            raise InputError(
                f"--output {self._target} can't be written ({error.strerror}); give another file"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        done = False
        try:
            if error is None:
                self._finish()
                done = True
        finally:
            with contextlib.suppress(OSError):
                self._sink.close()
            if not done and self._target != STANDARD_OUTPUT:
                self._temporary.unlink(missing_ok=True)

    def write(self, answer: Answer) -> None:
        """Add observations.

        Raises:
            StageError: the medium fails.
        """
        self.statuses.update(answer.statuses)
        self._held.append(self._table(answer))
        if sum(table.nbytes for table in self._held) >= _GROUP_BYTES:
            self._flush()

    def _table(self, answer: Answer) -> pa.Table:
        missing = np.full(len(answer), np.nan, dtype=np.float32)
        columns: dict[str, pa.Array] = {
            ID: pa.array(answer.ids, pa.string()),
            "status": pa.array(answer.statuses, pa.string()),
        }
        columns |= dict.fromkeys(_WEIGHTS, pa.array(missing))
        for field in dataclasses.fields(answer):
            if field.name in ABOUT_X:
                columns[field.name] = pa.array(getattr(answer, field.name))
        for name in _VALUES:
            values = getattr(answer, name, None)
            if values is not None:
                columns[name] = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
        return pa.table(columns)

    def _flush(self) -> None:
        if not self._held:
            return
        table = pa.concat_tables(self._held).combine_chunks()
        self._held = []
        try:
            if self._writer is None:
                notes = {key: json.dumps(value) for key, value in self._notes.items()}
                table = table.replace_schema_metadata(notes)
                # As the parts of a catalog: draws hardly get smaller.
                self._writer = pq.ParquetWriter(
                    self._sink,
                    table.schema,
                    compression="none",
                    use_dictionary=["status"],
                    write_statistics=[ID, "status"],
                )
            self._writer.write_table(table)
        except OSError as error:
            raise self._failed(error) from error

    def _finish(self) -> None:
        self._flush()
        statuses = json.dumps(dict(sorted(self.statuses.items())))
        try:
            self._writer.add_key_value_metadata({"statuses": statuses})
            self._writer.close()
            self._sink.flush()
            if self._target == STANDARD_OUTPUT:
                return
            os.fsync(self._sink.fileno())
            self._sink.close()
            os.replace(self._temporary, self._path)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> StageError:
        return StageError(
            f"--output {self._target} can't be written ({error.strerror or error}); make room or "
            "give another file, and run the command again"
        )


def _place(target: str) -> Path:
    """Where the file is to be."""
    if "://" in target:
        raise InputError(
            f"--output is {target!r}; it must be a file here, or - for standard output; "
            "`sbi-dist infer` writes to a bucket"
        )
    if Path(target).suffix.lower() != ".parquet":
        raise InputError(
            f"--output is {target!r}; it must be a file whose name ends in .parquet, or - for "
            "standard output"
        )
    try:
        path = Path(target).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"--output {target}: {error}; give another file") from error
    if path.is_dir():
        raise InputError(f"--output {target} is a folder; give a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(
            f"--output {target}: {path.parent} is no folder that can be written to; make it, or "
            "give another one"
        )
    return path
