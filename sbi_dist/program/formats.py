"""What programs read and write: parameters to bytes, and bytes to x.

Here are the formats by their names and endings. Which of them a program uses, and where the bytes
come from and go to, is in ``program.py``.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sbi_dist.errors import InputError
from sbi_dist.options import nearest

__all__ = [
    "Unreadable",
    "check_columns",
    "check_format",
    "did_you_mean",
    "encode",
    "format_of",
    "read_x",
    "result_of",
]

_FORMATS = ("csv", "npy", "json", "parquet")
_ENDINGS = {f".{kind}": kind for kind in _FORMATS} | dict.fromkeys((".txt", ".dat", ".tsv"), "csv")


class Unreadable(ValueError):
    """What is wrong with a result; goes on from the name of its file."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    near = nearest(word, known)
    return f" (did you mean {near!r}?)" if near else ""


# ---- the formats as arguments --------------------------------------------------------------------


def check_format(field: str, value: str | None) -> None:
    if value not in _FORMATS:
        raise InputError(
            f"program.{field} is {value!r}; allowed: {', '.join(_FORMATS)}"
            f"{did_you_mean(str(value), _FORMATS)}"
        )


def format_of(output: str | None) -> str:
    """The format of x by its file's ending, where it is not given."""
    if output is None:
        return "csv"
    kind = _ENDINGS.get(PurePosixPath(output).suffix.lower())
    if kind is None:
        raise InputError(
            f"program.output is {output!r}, whose ending tells no format; it must be one of "
            f"{', '.join(_ENDINGS)}, or output_format one of {', '.join(_FORMATS)}"
        )
    return kind


def check_columns(columns: Any, kind: str) -> tuple[str | int, ...] | None:
    if columns is None:
        return None
    if kind == "npy":
        raise InputError(
            f"program.columns is {columns!r}, but an npy file has no columns; leave it out"
        )
    given = (columns,) if isinstance(columns, (str, int)) else tuple(columns)
    if not given or not all(
        isinstance(column, str) or (kind != "json" and isinstance(column, int) and column >= 0)
        for column in given
    ):
        raise InputError(
            f"program.columns is {columns!r}; it must be a list of "
            + ("keys" if kind == "json" else "names of columns, or of numbers from 0")
        )
    return given


# ---- parameters to bytes -------------------------------------------------------------------------


def encode(kind: str, theta: np.ndarray, names: Sequence[str], seed: int) -> bytes:
    """The parameters (D,) or (N, D) in one of the formats, without loss."""
    table = np.atleast_2d(theta)
    if kind == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(table.tolist())  # by repr, which a float64 survives
        return text.getvalue().encode()
    if kind == "json":
        values = dict(zip(names, theta.T.tolist(), strict=True))
        return json.dumps({"theta": theta.tolist(), "parameters": values, "seed": seed}).encode()
    data = io.BytesIO()
    if kind == "npy":
        np.lib.format.write_array(data, np.ascontiguousarray(theta), allow_pickle=False)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(list(table.T), names=list(names)), data)
    return data.getvalue()


# ---- bytes to x ----------------------------------------------------------------------------------


def result_of(path: str) -> bytes:
    """What a program wrote into a file."""
    try:
        # A pipe or a device could be read for ever.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise Unreadable(" is not a regular file")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise Unreadable(" was not written by the program") from None
    except OSError as error:
        raise Unreadable(f" can't be read ({error.strerror})") from None


def read_x(
    kind: str, data: bytes, columns: Sequence[str | int] | None, rows: int | None
) -> np.ndarray:
    """x from a result; ``rows`` is N of a batch, None for a single parameter vector."""
    if not data.strip():
        raise Unreadable(" is empty")
    if kind == "npy":
        x = _from_npy(data)
    else:
        read = {"csv": _from_text, "json": _from_json, "parquet": _from_parquet}[kind]
        x = read(data, columns)
    if not x.size:
        raise Unreadable(f" holds no number (its shape is {x.shape})")
    if rows is not None:
        if x.shape[:1] != (rows,):
            raise Unreadable(
                f" has shape {x.shape}; a batch of {rows} parameter vectors must give {rows} rows"
            )
    elif kind in ("csv", "parquet"):
        if x.ndim == 2 and 1 in x.shape:
            return x.reshape(-1)
        if len(x) == 1:
            return x[0]
    return x


_MISSING = {"", "na", "n/a", "null", "none"}
_FORTRAN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[dD][+-]?\d+")


def _number(token: str) -> float | None:
    """The number that a token is, NaN for a missing one; None where it is neither."""
    try:
        # Python reads 1_000 as a number; no other program writes it.
        return float(token) if "_" not in token else None
    except ValueError:
        if _FORTRAN.fullmatch(token):
            return float(token.lower().replace("d", "e"))
        return math.nan if token.lower() in _MISSING else None


def _from_text(data: bytes, columns: Sequence[str | int] | None) -> np.ndarray:
    """Numbers of a table (rows, columns): float64."""
    lines: list[tuple[int, str]] = []
    comment = ""
    text = data.decode("utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#"):
            comment = comment if lines else line.lstrip().lstrip("#")
        elif line.strip():
            lines.append((number, line))
    if not lines:
        raise Unreadable(" holds no line of numbers")
    begin = lines[0][1] + "".join(line for _, line in lines[1:2])  # a header may be of one word
    separator = next((mark for mark in ",\t" if mark in begin), None)

    def split(line: str) -> list[str]:
        if separator is not None and '"' in line:
            tokens = next(csv.reader([line], delimiter=separator))
        else:
            tokens = line.split(separator)
        return [token.strip(' \t"') for token in tokens]

    header = split(lines[0][1])
    if names := {column for column in columns or () if isinstance(column, str)}:
        if names <= set(split(comment)):  # as numpy.savetxt writes it
            header = split(comment)
        else:
            del lines[0]
    elif any(header) and all(_number(token) is None for token in header if token):
        if len(lines) == 1:
            raise Unreadable(f" holds no number, but {' '.join(header)[:100]!r}")
        del lines[0]
        header = split(lines[0][1])  # for its length, which the text above may not have
    if not lines:
        raise Unreadable(" has a header and no line of numbers")
    picked = _places(columns, header)

    table = []
    for number, line in lines:
        tokens = split(line)
        if len(tokens) != len(header):
            raise Unreadable(f", line {number}: {len(tokens)} values, expected {len(header)}")
        values = [_number(tokens[place]) for place in picked]
        if None in values:
            wrong = tokens[picked[values.index(None)]][:40]
            raise Unreadable(f", line {number}: {wrong!r} is not a number")
        table.append(values)
    return np.array(table, dtype=np.float64)


def _places(columns: Sequence[str | int] | None, header: Sequence[str]) -> Sequence[int]:
    """Numbers of the columns that are taken."""
    if columns is None:
        return range(len(header))
    places = []
    for column in columns:
        if isinstance(column, str) and column not in header:
            has = ", ".join(header)[:200]
            raise Unreadable(
                f" has no column {column!r}{did_you_mean(column, header)}; it has {has}"
            )
        places.append(header.index(column) if isinstance(column, str) else column)
    if max(places) >= len(header):
        raise Unreadable(f" has {len(header)} columns, but columns are {tuple(columns)}")
    return places


def _from_npy(data: bytes) -> np.ndarray:
    try:
        x = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, TypeError, OSError, MemoryError) as error:
        raise Unreadable(f" is no valid npy file ({_first_line(error)})") from None
    if x.dtype.kind not in "fiub":
        raise Unreadable(f" has dtype {x.dtype}, expected real numbers")
    return x


def _from_json(data: bytes, columns: Sequence[str | int] | None) -> np.ndarray:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f" is no valid JSON ({_first_line(error)})") from None
    if columns is None:
        return _from_lists(content, "")
    parts = [_from_lists(_lookup(content, str(key)), f" at {key!r}") for key in columns]
    if len({part.shape for part in parts}) > 1:
        shapes = ", ".join(f"{key} {part.shape}" for key, part in zip(columns, parts, strict=True))
        raise Unreadable(f" has different shapes at the keys of columns: {shapes}")
    return np.stack(parts, axis=-1) if len(parts) > 1 else parts[0]


def _lookup(content: Any, key: str) -> Any:
    if isinstance(content, dict) and key in content:
        return content[key]
    for part in key.split("."):
        if isinstance(content, dict) and part in content:
            content = content[part]
        else:
            known = list(content) if isinstance(content, dict) else []
            has = f"; there are {', '.join(known)[:200]}" if known else ""
            raise Unreadable(f" has no key {key!r}{did_you_mean(part, known)}{has}")
    return content


def _from_lists(content: Any, where: str) -> np.ndarray:
    if isinstance(content, dict):
        keys = ", ".join(content)[:200]
        raise Unreadable(f" holds an object{where}; select of {keys} with columns=[...]")
    try:
        return np.array(content, dtype=np.float64)  # null becomes NaN
    except (ValueError, TypeError, OverflowError) as error:
        raise Unreadable(f" holds no array of numbers{where} ({_first_line(error)})") from None


def _from_parquet(data: bytes, columns: Sequence[str | int] | None) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(io.BytesIO(data)).read(use_threads=False)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise Unreadable(f" is no valid parquet file ({_first_line(error)})") from None
    parts = []
    for place in _places(columns, table.column_names):
        column = table.column(place)
        plain = pa.types.is_floating(column.type) or pa.types.is_integer(column.type)
        try:
            values = column.to_numpy() if plain else column.to_pylist()  # null becomes NaN
            parts.append(np.array(values, dtype=np.float64))
        except (ValueError, TypeError):
            raise Unreadable(
                f" has a column {table.column_names[place]!r} of type {column.type}, not of numbers"
            ) from None
    if len(parts) == 1 and parts[0].ndim > 1:
        return parts[0]
    if not parts or any(part.ndim > 1 for part in parts):
        raise Unreadable(" must have columns of numbers, or one column of lists")
    return np.stack(parts, axis=1)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
