"""A dataset in the store: its manifest, its plan, which shards it has, and reading them.

``dataset.json`` holds what all shards share and is written once, as is every ``extent-*.json``,
which says how many shards an append planned. Which shards there are is read from the listing of
the ``shard-*`` objects. Drivers note the records of what they stored in a log (``log.py``), so
that nobody has to open a hundred thousand files to count them; the log may be lost, since every
shard holds its own record. A snapshot is a fixed list of shards with their checksums, for what is
trained on them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from sbi_dist.errors import InputError
from sbi_dist.simulation import log
from sbi_dist.simulation.parquet import ShortTail, read_layout
from sbi_dist.simulation.plan import Extent, Shard, plan_shards
from sbi_dist.simulation.ranges import Places, places_of
from sbi_dist.simulation.shard import (
    DamagedShard,
    ShardRecord,
    Simulations,
    concatenate,
    decode_shard,
    record_of_tail,
)
from sbi_dist.store import ObjectStore

__all__ = ["Dataset", "Stored"]

T = TypeVar("T")

_SHARD = re.compile(r"shard-(\d{6,})\.parquet")
# Holds the footer of a shard, but for one with very long messages of failures.
_TAIL = 16 * 1024


@dataclasses.dataclass(frozen=True)
class Stored:
    """What there is of a dataset: the record of each shard, and the drivers' time in seconds."""

    records: dict[int, ShardRecord]
    seconds: float

    @property
    def rows(self) -> int:
        """Simulations stored."""
        return sum(record.rows for record in self.records.values())


class Dataset:
    """The simulations of one problem and seed in a store's folder.

    Args:
        store: the dataset's own folder.
    """

    MANIFEST = "dataset.json"

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    # ---- manifest and plan ----

    def manifest(self) -> dict[str, Any]:
        """What all shards share; empty where the dataset was not begun."""
        content = self._json(self.MANIFEST)
        if content is None:
            return {}
        if not isinstance(content, dict) or "extent" not in content:
            raise self._damaged_document(self.MANIFEST)
        return content

    def _json(self, key: str) -> Any:
        try:
            return json.loads(self.store.get(key))
        except KeyError:
            return None
        except ValueError:
            raise self._damaged_document(key) from None

    def _damaged_document(self, key: str) -> InputError:
        return InputError(
            f"{self.store.uri}/{key} is damaged; delete it, and run `sbi-dist simulate` with the "
            "settings of before to write it again"
        )

    def _extent(self, key: str, content: Any) -> Extent:
        try:
            return Extent(**content)
        except TypeError:
            raise self._damaged_document(key) from None

    def _write_once(self, key: str, content: Any) -> Any:
        """Write a document unless there is one; the one that is in force."""
        self.store.put_if_absent(key, json.dumps(content, indent=2, sort_keys=True).encode())
        return self._json(key)

    def create(self, manifest: dict[str, Any], extent: Extent) -> tuple[dict[str, Any], bool]:
        """Begin the dataset unless it is there; its manifest, and whether this call began it."""
        content = {**manifest, "extent": dataclasses.asdict(extent)}
        text = json.dumps(content, indent=2, sort_keys=True).encode()
        began = self.store.put_if_absent(self.MANIFEST, text)
        return self.manifest(), began

    def extents(self) -> list[Extent]:
        """What was planned so far, in order."""
        manifest = self.manifest()
        if not manifest:
            return []
        extents = [self._extent(self.MANIFEST, manifest.get("extent"))]
        while (stop := extents[-1].stop) is not None:
            following = self._json(_extent_key(stop))
            if following is None:
                break
            extents.append(self._extent(_extent_key(stop), following))
        return extents

    def extend(self, num_simulations: int | None, shard_size: int) -> list[Extent]:
        """Plan for so many simulations in all (None: without end) and return the extents."""
        extents = self.extents()
        while (stop := extents[-1].stop) is not None:
            if num_simulations is not None and stop >= num_simulations:
                break
            wanted = extents[-1].after(shard_size, num_simulations)
            # Of two drivers that append at once, one writes and both read.
            key = _extent_key(stop)
            extents.append(self._extent(key, self._write_once(key, dataclasses.asdict(wanted))))
        return extents

    # ---- which shards there are ----

    def indexes(self) -> set[int]:
        """Indexes of the stored shards, from the listing."""
        found = (_SHARD.fullmatch(key) for key in self.store.list("shard-"))
        return {int(match[1]) for match in found if match}

    def stored(self) -> Stored:
        """The records of the stored shards: from the log, else from the end of their files.

        Raises:
            InputError: a shard can't be read; names it.
        """
        indexes = self.indexes()
        noted = log.read(self.store)
        records = {index: noted.records[index] for index in indexes & noted.records.keys()}
        records |= log.fetch(sorted(indexes - records.keys()), self.record)
        return Stored(records, noted.seconds)

    def remove_cut(self) -> list[str]:
        """Remove shards that no log tells of and whose end is missing; their keys.

        The machine of the store lost its power soon after they were written.
        """
        noted = log.read(self.store).records
        removed = []

        def cut(index: int) -> bool:
            try:
                self._read_record(index)
            except DamagedShard:
                return True
            except KeyError:
                pass
            return False

        for index, is_cut in log.fetch(sorted(self.indexes() - noted.keys()), cut):
            if is_cut:
                removed.append(Shard(index, 0, 0).key)
                self.store.delete(removed[-1])
        return removed

    def record(self, index: int) -> ShardRecord:
        """The record of one stored shard, from the end of its file.

        Raises:
            InputError: the shard is missing or can't be read; names it.
        """
        key = Shard(index, 0, 0).key
        try:
            return self._read_record(index)
        except KeyError:
            raise self._missing(key) from None
        except DamagedShard as error:
            raise self._damage(key, str(error)) from error

    def _read_record(self, index: int) -> ShardRecord:
        return self._of_tail(Shard(index, 0, 0).key, record_of_tail)

    def _of_tail(self, key: str, get: Callable[[bytes], T]) -> T:
        try:
            return get(self.store.get_tail(key, _TAIL))
        except ShortTail as short:
            try:
                return get(self.store.get_tail(key, short.needed))
            except ShortTail:
                raise DamagedShard("its footer is cut") from None

    def agreeing(self, planned: Iterable[Shard], stored: Stored) -> list[ShardRecord]:
        """The records of the planned shards that are stored, in order.

        Raises:
            InputError: a shard has another size than the plan says.
        """
        found = [(shard, stored.records.get(shard.index)) for shard in planned]
        for shard, record in found:
            if record is not None and record.rows != shard.size:
                raise InputError(
                    f"{self.store.uri}/{shard.key} holds {record.rows:,} simulations, and "
                    f"{self.MANIFEST} plans {shard.size:,}: it was written anew with another "
                    "simulate.shard_size or simulate.num_simulations; delete it and run with those "
                    "of before, or delete the folder"
                )
        return [record for _, record in found if record is not None]

    def complete(self, num_simulations: int) -> list[ShardRecord] | None:
        """The records of the shards that hold so many simulations; None while one is missing."""
        extents = self.extents()
        if not extents or (extents[-1].stop or num_simulations) < num_simulations:
            return None
        planned = list(plan_shards(extents, num_simulations))
        # The listing first: most questions are asked of a dataset that is far from complete.
        if not {shard.index for shard in planned} <= self.indexes():
            return None
        return self.agreeing(planned, self.stored())

    # ---- snapshots ----

    def snapshot(self, records: Sequence[ShardRecord]) -> str:
        """Write down a list of shards with their checksums; its name."""
        shards = [[record.index, record.rows, record.digest] for record in records]
        name = hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:12]
        content = {"simulations": sum(record.rows for record in records), "shards": shards}
        self.store.put_if_absent(f"snapshots/{name}.json", json.dumps(content).encode())
        return name

    def snapshot_records(self, name: str) -> list[ShardRecord]:
        """The records of a snapshot's shards.

        Raises:
            InputError: the snapshot or one of its shards is missing or not the one noted.
        """
        content = self._json(f"snapshots/{name}.json")
        if content is None:
            raise self._missing(f"snapshots/{name}.json")
        records = self.stored().records
        for index, _, digest in content["shards"]:
            key = Shard(index, 0, 0).key
            if index not in records:
                raise self._missing(key)
            if records[index].digest != digest:
                raise self._damage(key, "it is not the one of the snapshot")
        return [records[index] for index, _, _ in content["shards"]]

    def end(self, num_simulations: int | None, max_seconds: float, snapshot: str) -> None:
        """Note that the time for so many simulations is up, and what there was by then."""
        self._write_once(_end_key(num_simulations, max_seconds), {"snapshot": snapshot})

    def ended(self, num_simulations: int | None, max_seconds: float) -> list[ShardRecord] | None:
        """What there was when the time was up; None where it is not."""
        content = self._json(_end_key(num_simulations, max_seconds))
        return None if content is None else self.snapshot_records(content["snapshot"])

    # ---- reading ----

    def damaged(self) -> list[str]:
        """Keys of the shards whose content is not what was written."""
        found = []
        for key in self.store.list("shard-"):
            try:
                decode_shard(self.store.get(key))
            except DamagedShard:
                found.append(key)
        return found

    def read(self, shard: Shard | ShardRecord | int) -> Simulations:
        """One shard's rows.

        Raises:
            InputError: the shard is missing or damaged, or not the one of the record; names it
                and the next step.
        """
        index = shard if isinstance(shard, int) else shard.index
        key = Shard(index, 0, 0).key
        try:
            simulations, found = decode_shard(self.store.get(key))
        except KeyError:
            raise self._missing(key) from None
        except DamagedShard as error:
            raise self._damage(key, str(error)) from error
        if isinstance(shard, ShardRecord) and shard.digest != found.digest:
            raise self._damage(key, "it is not the one that was listed")
        return simulations

    def places(self, index: int) -> Places | None:
        """Where theta and x are in a shard; None in one of another writer, to be read whole.

        Raises:
            InputError: the shard is missing or can't be read; names it and the next step.
        """
        key = Shard(index, 0, 0).key
        try:
            layout = self._of_tail(key, read_layout)
            return None if layout is None else places_of(layout)
        except KeyError:
            raise self._missing(key) from None
        except (DamagedShard, ValueError) as error:
            raise self._damage(key, str(error)) from error

    def read_rows(
        self, index: int, places: Places, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """theta and x of some rows of a shard, of whatever status; only these are read.

        Their content is not checked, as the digest is of the whole shard.

        Args:
            places: what :meth:`places` gave for this shard.

        Raises:
            InputError: the shard is missing or ends before them; names it and the next step.
        """
        key = Shard(index, 0, 0).key
        try:
            return places.read(functools.partial(self.store.get_range, key), start, stop)
        except KeyError:
            raise self._missing(key) from None
        except ValueError as error:
            raise self._damage(key, str(error)) from error

    def read_all(self, indexes: Iterable[int]) -> Simulations:
        """The rows of several shards, in order; a few requests at a time."""
        parts = log.fetch(indexes, self.read)
        return concatenate([part for _, part in parts])

    def _missing(self, key: str) -> InputError:
        return InputError(f"{self.store.uri}/{key} is missing; run `sbi-dist simulate` again")

    def _damage(self, key: str, reason: str) -> InputError:
        return InputError(
            f"{self.store.uri}/{key} is damaged: {reason}; run `sbi-dist simulate` with --repair "
            "to simulate it again"
        )


def _end_key(num_simulations: int | None, max_seconds: float) -> str:
    return f"ended-{num_simulations or 'any'}-{max_seconds:g}s.json"


def _extent_key(start: int) -> str:
    return f"extent-{start:012d}.json"
