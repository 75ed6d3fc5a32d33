"""What drivers note beside a dataset's shards: records of what they stored, and that they live.

All of it can be derived again from the shards themselves, or is of no use once the driver is gone;
nothing here decides what a dataset contains. A driver writes segments of its log under
``records/`` and a sign of life under ``drivers/``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sbi_dist.simulation.shard import ShardRecord
from sbi_dist.store import ObjectStore

__all__ = ["DriverLog", "Noted", "drivers", "fetch", "forget", "read"]

_FOLDER, _DRIVERS = "records/", "drivers/"
_REQUESTS = 32
_FLUSH_RECORDS = 1000
_FLUSH_S = 10.0
# A driver that has not been heard of for so long is gone.
_ALIVE_S = 60.0

Key = TypeVar("Key")
Value = TypeVar("Value")


def fetch(keys: Iterable[Key], get: Callable[[Key], Value]) -> Iterator[tuple[Key, Value]]:
    """``get`` of every key, some at a time, in order and without holding all results."""
    keys = list(keys)
    if len(keys) < 2:
        yield from ((key, get(key)) for key in keys)
        return
    with ThreadPoolExecutor(min(_REQUESTS, len(keys)), thread_name_prefix="sbi-dist-get") as pool:
        for start in range(0, len(keys), 4 * _REQUESTS):
            block = keys[start : start + 4 * _REQUESTS]
            yield from zip(block, pool.map(get, block), strict=True)


@dataclasses.dataclass(frozen=True)
class Noted:
    """The log of all drivers: records by shard, seconds that each driver ran, its segments."""

    records: dict[int, ShardRecord]
    ran: dict[str, float]
    segments: list[str]

    @property
    def seconds(self) -> float:
        """Seconds that all drivers ran."""
        return sum(self.ran.values())


def read(store: ObjectStore) -> Noted:
    """The log; segments that can't be read count for nothing.

    What several segments tell counts once: of a driver that died while it joined segments, or
    when two joined the same ones, there are some twice.
    """
    records: dict[int, ShardRecord] = {}
    ran: dict[str, float] = {}
    segments = []
    for key, data in fetch(store.list(_FOLDER), lambda key: _get(store, key)):
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            content = json.loads(data)
            told = {entry[0]: ShardRecord(*entry) for entry in content["records"]}
            # Of one driver, each segment tells the time since it began.
            spent = content["seconds"].items()
            ran |= {driver: max(float(each), ran.get(driver, 0.0)) for driver, each in spent}
            records |= told
            segments.append(key)
    return Noted(records, ran, segments)


def _get(store: ObjectStore, key: str) -> bytes:
    try:
        return store.get(key)
    except KeyError:  # joined into another one since it was listed
        return b""


def forget(store: ObjectStore) -> None:
    """Remove the log, for instance since shards were removed that it tells of."""
    for key in list(store.list(_FOLDER)):
        store.delete(key)


def drivers(store: ObjectStore) -> list[dict[str, Any]]:
    """The signs of life of the drivers that are at work on a dataset."""
    found = []
    for key in store.list(_DRIVERS):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            sign = json.loads(_get(store, key))
            if time.time() - sign["updated"] < _ALIVE_S:
                found.append(sign)
    return found


class DriverLog:
    """One driver's log.

    Args:
        store: the dataset's folder.
        target: simulations that the dataset is to have, for the sign of life.
    """

    def __init__(self, store: ObjectStore, target: int | None) -> None:
        self._store, self._target = store, target
        self._name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        self._began = self._flushed = time.monotonic()
        self._pending: list[ShardRecord] = []
        self._segments = 0
        self._rows = 0

    def add(self, record: ShardRecord) -> None:
        """Note a shard that this driver stored."""
        self._pending.append(record)
        self._rows += record.rows
        if len(self._pending) >= _FLUSH_RECORDS:
            self.flush()

    def tick(self) -> None:
        """Write what is due; to be called often."""
        if time.monotonic() - self._flushed >= _FLUSH_S:
            self.flush()
            self._sign()

    def flush(self) -> None:
        """Write what was noted since the last time."""
        self._flushed = time.monotonic()
        ran = {self._name: round(self._flushed - self._began, 3)}
        self._put(f"{self._segments:06d}", ran, self._pending)
        # A segment that is not full is written again with what comes next.
        if len(self._pending) >= _FLUSH_RECORDS:
            self._segments += 1
            self._pending = []

    def _put(self, suffix: str, ran: dict[str, float], records: Iterable[ShardRecord]) -> None:
        content = {"seconds": ran, "records": [list(vars(record).values()) for record in records]}
        key = f"{_FOLDER}{self._name}-{suffix}.json"
        self._store.put(key, json.dumps(content).encode())

    def _sign(self) -> None:
        elapsed = time.monotonic() - self._began
        sign = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "updated": time.time(),
            "seconds": round(elapsed, 1),
            "simulations_per_s": round(self._rows / elapsed, 3),
            "target": self._target,
        }
        self._store.put(f"{_DRIVERS}{self._name}.json", json.dumps(sign).encode())

    def close(self) -> None:
        """Write the rest, join the segments into one, and take back the sign of life."""
        self.flush()
        self._store.delete(f"{_DRIVERS}{self._name}.json")
        noted = read(self._store)
        if len(noted.segments) > 1:
            records = [noted.records[index] for index in sorted(noted.records)]
            self._put("all", noted.ran, records)
            for key in noted.segments:
                self._store.delete(key)
