"""Simulations in memory, and as the Parquet file of one shard that explains itself.

A shard's schema metadata holds names, units, shapes, problem and versions, and a checksum of its
content, so that a damaged one is told from a good one without any other file. The bytes of the
file are ``parquet.py``'s matter; which shards a dataset has is that of ``dataset.py``.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
import xxhash

from sbi_dist.simulation import parquet

__all__ = [
    "STATUSES",
    "DamagedShard",
    "ShardRecord",
    "Simulations",
    "concatenate",
    "decode_shard",
    "encode_shard",
    "record_of_tail",
    "versions",
]

STATUSES = ("ok", "nonfinite", "error", "timeout", "crashed")
_NOTE = "sbi_dist"
# What the note says about the rows themselves; the rest of it is the same in all shards.
_OWN = ("digest", "statuses", "errors", "seconds")


class DamagedShard(Exception):
    """A shard whose bytes are not what was written."""


@dataclasses.dataclass
class Simulations:
    """Rows in memory.

    Attributes:
        simulation_id: int64 of shape (N,).
        theta: float32 of shape (N, D).
        x: float32 of shape (N, *x_shape); NaN where a simulation gave none.
        failed: (status, message) of the rows that did not give data, by row.
        duration_s: float32 of shape (N,).
    """

    simulation_id: np.ndarray
    theta: np.ndarray
    x: np.ndarray
    failed: dict[int, tuple[str, str]]
    duration_s: np.ndarray

    def __len__(self) -> int:
        return len(self.theta)

    @property
    def ok(self) -> np.ndarray:
        """Which rows may be trained on, bool of shape (N,)."""
        mask = np.ones(len(self), dtype=bool)
        mask[list(self.failed)] = False
        return mask

    @property
    def status(self) -> list[str]:
        """Status of every row."""
        return [self.failed[row][0] if row in self.failed else "ok" for row in range(len(self))]

    @property
    def error(self) -> list[str | None]:
        """Message of every row, None where it is ok."""
        return [self.failed[row][1] if row in self.failed else None for row in range(len(self))]


def concatenate(parts: Sequence[Simulations]) -> Simulations:
    """The rows of all parts, in order."""
    failed: dict[int, tuple[str, str]] = {}
    start = 0
    for part in parts:
        failed |= {start + row: failure for row, failure in part.failed.items()}
        start += len(part)
    return Simulations(
        simulation_id=np.concatenate([part.simulation_id for part in parts]),
        theta=np.concatenate([part.theta for part in parts]),
        x=np.concatenate([part.x for part in parts]),
        failed=failed,
        duration_s=np.concatenate([part.duration_s for part in parts]),
    )


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """What the driver knows about a stored shard; its rows stay in the store.

    Attributes:
        index: number of the shard.
        rows: its number of rows.
        statuses: number of rows of each status.
        errors: the most frequent failures: message, status, count, one theta and simulation_id.
        seconds: sum of the rows' run times.
        digest: checksum of the content, 32 hex digits.
    """

    index: int
    rows: int
    statuses: dict[str, int]
    errors: list[dict[str, Any]]
    seconds: float
    digest: str

    @property
    def failures(self) -> int:
        """Rows that did not give data."""
        return self.rows - self.statuses.get("ok", 0)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("sbi_dist", "numpy", "torch", "nflows", "pyarrow", "ray")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _digest(simulations: Simulations, about: dict[str, Any]) -> str:
    """Of the content but not of its timing; guards against damage, not against forgery."""
    digest = xxhash.xxh3_128(json.dumps(about, sort_keys=True).encode())
    for array in (simulations.simulation_id, simulations.theta, simulations.x):
        digest.update(np.ascontiguousarray(array).data)
    digest.update(json.dumps(sorted(simulations.failed.items())).encode())
    return digest.hexdigest()


def encode_shard(simulations: Simulations, about: dict[str, Any]) -> tuple[bytes, ShardRecord]:
    """The shard as Parquet, and its record.

    ``about`` goes into the schema metadata (names, units, shapes, fingerprint, versions, and
    ``shard``, its index).
    """
    note = {**about, **_own(simulations, about)}
    x = np.ascontiguousarray(simulations.x)
    data = parquet.encode(
        simulations.simulation_id,
        np.ascontiguousarray(simulations.theta),
        x if x.ndim > 1 else x[:, None],
        simulations.failed,
        simulations.duration_s,
        {_NOTE: json.dumps(note)},
    )
    return data, _record(note, len(simulations))


def _own(simulations: Simulations, about: dict[str, Any]) -> dict[str, Any]:
    # The digest is not of the durations, but their sum is noted.
    seconds = float(simulations.duration_s.sum(dtype=np.float64))
    errors = _frequent_errors(simulations)
    values = (_digest(simulations, about), _statuses(simulations), errors, seconds)
    return dict(zip(_OWN, values, strict=True))


def _statuses(simulations: Simulations) -> dict[str, int]:
    counts = Counter(status for status, _ in simulations.failed.values())
    usable = len(simulations) - len(simulations.failed)
    if usable:
        counts["ok"] = usable
    return {status: counts[status] for status in STATUSES if counts[status]}


def _frequent_errors(simulations: Simulations, most: int = 3) -> list[dict[str, Any]]:
    """The most frequent failures, each with a theta that shows it."""
    seen: dict[str, dict[str, Any]] = {}
    for row, (status, message) in sorted(simulations.failed.items()):
        entry = seen.setdefault(
            message,
            {
                "status": status,
                "message": message,
                "count": 0,
                "theta": simulations.theta[row].tolist(),
                "simulation_id": int(simulations.simulation_id[row]),
            },
        )
        entry["count"] += 1
    return sorted(seen.values(), key=lambda entry: -entry["count"])[:most]


def decode_shard(data: bytes) -> tuple[Simulations, ShardRecord]:
    """The shard's rows and record, checked against its digest.

    Raises:
        DamagedShard: the bytes are not a shard, or not the one that was written.
    """
    try:
        columns = parquet.decode(data)
        note = json.loads(columns.metadata[_NOTE])
        simulations = Simulations(
            simulation_id=columns.simulation_id,
            theta=columns.theta,
            x=columns.x[:, 0] if note["x_shape"] == [] else columns.x,
            failed=columns.failed,
            duration_s=columns.duration_s,
        )
        about = {key: value for key, value in note.items() if key not in _OWN}
        damaged = _own(simulations, about) != {key: note[key] for key in _OWN}
        record = _record(note, len(simulations))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedShard(f"it can't be read ({type(error).__name__})") from error
    if damaged:
        raise DamagedShard("its content does not match its digest")
    return simulations, record


def record_of_tail(tail: bytes) -> ShardRecord:
    """The record of a shard from the last bytes of its file.

    Raises:
        parquet.ShortTail: more bytes are needed.
        DamagedShard: the bytes are not the end of a shard.
    """
    try:
        metadata, rows = parquet.read_note(tail)
        return _record(json.loads(metadata[_NOTE]), rows)
    except parquet.ShortTail:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedShard(f"it can't be read ({type(error).__name__})") from error


def _record(note: dict[str, Any], rows: int) -> ShardRecord:
    return ShardRecord(
        note["shard"], rows, note["statuses"], note["errors"], note["seconds"], note["digest"]
    )
