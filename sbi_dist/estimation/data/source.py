"""Where simulations come from: arrays in memory, or the shards of a dataset.

A source gives the usable rows (status ok) of each shard, all of them or a few. Which rows are for
training, and who reads which, is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:  # a machine that trains on arrays may lack what reads shards
    from sbi_dist.simulation.dataset import Dataset
    from sbi_dist.simulation.ranges import Places
    from sbi_dist.simulation.shard import ShardRecord

__all__ = ["ArraySource", "ShardSource", "Source"]

# Requests to a store at a time: a bucket answers late, but many at once.
_REQUESTS = 16


class Source(Protocol):
    """Simulations in shards. Both ways to read may be called by several threads at a time.

    Attributes:
        theta_size: D.
        x_shape: shape of one x.
        counts: int64 (K,): usable rows of each shard.
        at_once: how many reads at a time are faster than one after the other.
    """

    @property
    def theta_size(self) -> int: ...
    @property
    def x_shape(self) -> tuple[int, ...]: ...
    @property
    def counts(self) -> np.ndarray: ...
    @property
    def at_once(self) -> int: ...

    def read(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """theta (N, D) and x (N, *x_shape), float32, of all usable rows of the k-th shard.

        Raises:
            InputError: the shard is missing, or its content is not what was written.
        """
        ...

    def read_rows(self, k: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """theta and x of usable rows ``start`` to ``stop`` of the k-th shard.

        Raises:
            InputError: the shard is missing, or ends before them.
        """
        ...


class ArraySource:
    """Simulations in memory, as one shard.

    Args:
        theta, x: of shapes (N, D) and (N, *x_shape), all finite.
    """

    at_once = 1

    def __init__(self, theta: np.ndarray, x: np.ndarray) -> None:
        self._theta, self._x = (np.asarray(array, dtype=np.float32) for array in (theta, x))
        self.theta_size = int(self._theta.shape[1])
        self.x_shape = tuple(self._x.shape[1:])
        self.counts = np.array([len(self._theta)], dtype=np.int64)

    def read(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self._theta, self._x

    def read_rows(self, k: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self._theta[start:stop], self._x[start:stop]


class ShardSource:
    """The usable rows of stored shards.

    Args:
        dataset: what they belong to.
        records: of the shards, in order.

    Raises:
        InputError: the first shard is missing or damaged.
    """

    def __init__(self, dataset: Dataset, records: Sequence[ShardRecord]) -> None:
        self._dataset, self._records = dataset, list(records)
        usable = [record.rows - record.failures for record in self._records]
        self.counts = np.array(usable, dtype=np.int64)
        self.at_once = _REQUESTS if "://" in dataset.store.uri else 1
        # Of each shard that was looked into: where its values are (None: by another writer), and
        # which rows failed, in order.
        self._places: dict[int, Places | None] = {}
        self._failed: dict[int, np.ndarray] = {}
        self._last: tuple[int, tuple[np.ndarray, np.ndarray]] | None = None
        self.theta_size, self.x_shape = self._shapes()

    def _shapes(self) -> tuple[int, tuple[int, ...]]:
        if not self._records:
            return 0, ()
        # The rows tell a scalar x from one of shape (1,).
        theta, x = self.read(0)
        return int(theta.shape[1]), tuple(x.shape[1:])

    def read(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        simulations = self._dataset.read(self._records[k])
        theta, x = simulations.theta, simulations.x
        if simulations.failed:
            self._failed[k] = failed = np.array(sorted(simulations.failed), dtype=np.int32)
            theta, x = np.delete(theta, failed, axis=0), np.delete(x, failed, axis=0)
        return theta, x

    def read_rows(self, k: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        if k not in self._places:
            self._places[k] = self._dataset.places(self._records[k].index)
        places = self._places[k]
        if places is None:
            theta, x = self._whole(k)
            return theta[start:stop], x[start:stop]
        if start >= stop:
            return np.empty((0, self.theta_size), np.float32), np.empty((0, *self.x_shape), "<f4")
        if self._records[k].failures and k not in self._failed:
            self.read(k)  # once: its statuses are needed, and these may be anywhere in it
        failed = self._failed.get(k)
        first, last = start, stop
        if failed is not None:
            # Failed rows below a usable one: those that have no more usable rows below them.
            usable_below = failed - np.arange(len(failed))
            first += int(np.searchsorted(usable_below, start, "right"))
            last += int(np.searchsorted(usable_below, stop - 1, "right"))
        theta, x = self._dataset.read_rows(self._records[k].index, places, first, last)
        if failed is not None:
            inside = failed[np.searchsorted(failed, first) : np.searchsorted(failed, last)] - first
            theta, x = np.delete(theta, inside, axis=0), np.delete(x, inside, axis=0)
        return theta, x.reshape(-1, *self.x_shape)

    def _whole(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        last = self._last
        if last is None or last[0] != k:
            self._last = last = (k, self.read(k))
        return last[1]
