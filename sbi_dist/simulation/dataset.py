"""Simulations as Parquet shards: their schema, writing, checked reading, and the manifest.

A shard explains itself to any Parquet reader (names, units, shapes, problem and versions are in
its schema metadata) and carries a digest of its own content, so that a damaged one is told from a
good one without any other file. Which shards there are is read from the store's listing; the
manifest ``dataset.json`` is written once and holds what all shards share.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import platform
from collections import Counter
from importlib import metadata
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbi_dist.errors import InputError
from sbi_dist.simulation.plan import Shard
from sbi_dist.store import ObjectStore

__all__ = [
    "STATUSES",
    "DamagedShard",
    "Dataset",
    "ShardRecord",
    "Simulations",
    "decode_shard",
    "encode_shard",
    "versions",
]

STATUSES = ("ok", "nonfinite", "error", "timeout", "crashed")
_METADATA = b"sbi_dist"


class DamagedShard(Exception):
    """A shard whose bytes are not what was written."""


@dataclasses.dataclass
class Simulations:
    """Rows in memory: theta (N, D) and x (N, *x_shape) float32, status and error of each row."""

    simulation_id: np.ndarray
    theta: np.ndarray
    x: np.ndarray
    status: list[str]
    error: list[str | None]
    duration_s: np.ndarray

    def __len__(self) -> int:
        return len(self.theta)

    @property
    def ok(self) -> np.ndarray:
        """Which rows may be trained on, bool of shape (N,)."""
        return np.array([status == "ok" for status in self.status], dtype=bool)


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """What the driver knows about a stored shard; its rows stay in the store."""

    index: int
    rows: int
    statuses: dict[str, int]
    errors: list[dict[str, Any]]
    seconds: float
    digest: str


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
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(about, sort_keys=True).encode())
    for array in (simulations.simulation_id, simulations.theta, simulations.x):
        digest.update(np.ascontiguousarray(array).data)
    digest.update(json.dumps([simulations.status, simulations.error]).encode())
    return digest.hexdigest()


def encode_shard(simulations: Simulations, about: dict[str, Any]) -> tuple[bytes, ShardRecord]:
    """The shard as Parquet, and its record.

    ``about`` goes into the schema metadata (names, units, shapes, fingerprint, versions, index).
    """
    note = {**about, "digest": _digest(simulations, about), **_summary(simulations)}
    theta = np.ascontiguousarray(simulations.theta)
    x = np.ascontiguousarray(simulations.x)
    table = pa.table(
        {
            "simulation_id": pa.array(simulations.simulation_id, pa.int64()),
            "theta": _tensor_column(theta),
            "x": _tensor_column(x if x.ndim > 1 else x[:, None]),
            "status": pa.array(simulations.status, pa.string()),
            "error": pa.array(simulations.error, pa.string()),
            "duration_s": pa.array(simulations.duration_s, pa.float32()),
        }
    ).replace_schema_metadata({_METADATA: json.dumps(note)})
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="none",  # random floats do not compress
        use_dictionary=["status", "error"],
        write_page_checksum=True,  # for the durations, which the digest leaves out
    )
    return sink.getvalue(), _record(note, len(simulations))


def _tensor_column(array: np.ndarray) -> pa.ExtensionArray:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(array)


def _frequent_errors(simulations: Simulations, most: int = 3) -> list[dict[str, Any]]:
    """The most frequent failures, each with a theta that shows it."""
    seen: dict[str, dict[str, Any]] = {}
    for row, status in enumerate(simulations.status):
        if status == "ok":
            continue
        message = simulations.error[row] or status
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
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        note = json.loads(table.schema.metadata[_METADATA])
        simulations = Simulations(
            simulation_id=table["simulation_id"].to_numpy(),
            theta=table["theta"].combine_chunks().to_numpy_ndarray(),
            x=table["x"].combine_chunks().to_numpy_ndarray(),
            status=table["status"].to_pylist(),
            error=table["error"].to_pylist(),
            duration_s=table["duration_s"].to_numpy(),
        )
        if note["x_shape"] == []:
            simulations.x = simulations.x[:, 0]
        about = {
            key: value
            for key, value in note.items()
            if key not in ("digest", "statuses", "errors", "seconds")
        }
        damaged = _digest(simulations, about) != note["digest"]
    except Exception as error:  # pyarrow raises many kinds on foreign bytes
        raise DamagedShard(f"it can't be read ({type(error).__name__})") from error
    if damaged:
        raise DamagedShard("its content does not match its digest")
    # What the digest does not cover is made of the rows again.
    return simulations, _record({**note, **_summary(simulations)}, len(simulations))


def _summary(simulations: Simulations) -> dict[str, Any]:
    return {
        "statuses": dict(Counter(simulations.status)),
        "errors": _frequent_errors(simulations),
        "seconds": float(simulations.duration_s.sum()),
    }


def _record(note: dict[str, Any], rows: int) -> ShardRecord:
    return ShardRecord(
        note["shard"], rows, note["statuses"], note["errors"], note["seconds"], note["digest"]
    )


class Dataset:
    """The simulations of one problem, seed and shard size in a store's folder.

    Args:
        store: the dataset's own folder.
    """

    MANIFEST = "dataset.json"

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def manifest(self) -> dict[str, Any]:
        """What all shards share; empty where the dataset was not begun."""
        try:
            return json.loads(self.store.get(self.MANIFEST))
        except KeyError:
            return {}
        except ValueError:
            raise InputError(
                f"{self.store.uri}/{self.MANIFEST} is damaged; delete it, and run `sbi-dist "
                "simulate` to write it again"
            ) from None

    def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest unless there is one; the manifest that is in force."""
        text = json.dumps(manifest, indent=2, sort_keys=True).encode()
        self.store.put_if_absent(self.MANIFEST, text)
        return self.manifest()

    def stored(self) -> dict[int, ShardRecord]:
        """The record of every stored shard by index, from the footers.

        Raises:
            InputError: a shard can't be read; names it.
        """
        records = {}
        for key in self.store.list("shard-"):
            data = self.store.get(key)
            try:
                file = pq.ParquetFile(io.BytesIO(data))
                note = json.loads(file.schema_arrow.metadata[_METADATA])
                record = _record(note, file.metadata.num_rows)
            except Exception as error:
                raise self._damage(key, f"it can't be read ({type(error).__name__})") from error
            records[record.index] = record
        return records

    def damaged(self) -> list[str]:
        """Keys of the shards whose content is not what was written."""
        found = []
        for key in self.store.list("shard-"):
            try:
                decode_shard(self.store.get(key))
            except DamagedShard:
                found.append(key)
        return found

    def read(self, shard: Shard | int) -> Simulations:
        """One shard's rows.

        Raises:
            InputError: the shard is missing or damaged; names it and the next step.
        """
        index = shard if isinstance(shard, int) else shard.index
        key = f"shard-{index:06d}.parquet"
        try:
            return decode_shard(self.store.get(key))[0]
        except KeyError:
            raise InputError(
                f"{self.store.uri}/{key} is missing; run `sbi-dist simulate` again"
            ) from None
        except DamagedShard as error:
            raise self._damage(key, str(error)) from error

    def _damage(self, key: str, reason: str) -> InputError:
        return InputError(
            f"{self.store.uri}/{key} is damaged: {reason}; run `sbi-dist simulate` with --repair "
            "to simulate it again"
        )

    def read_all(self, indexes: list[int]) -> Simulations:
        """The rows of several shards, in order."""
        parts = [self.read(index) for index in indexes]
        return Simulations(
            simulation_id=np.concatenate([part.simulation_id for part in parts]),
            theta=np.concatenate([part.theta for part in parts]),
            x=np.concatenate([part.x for part in parts]),
            status=[status for part in parts for status in part.status],
            error=[error for part in parts for error in part.error],
            duration_s=np.concatenate([part.duration_s for part in parts]),
        )
