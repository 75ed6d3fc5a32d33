"""The compact table of a calibration: one row a held-out simulation, whatever its draws took.

Blocks of it merge in any order, and it is what ``ranks.parquet`` holds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

__all__ = ["STATUSES", "Ranks", "from_arrow", "merge", "to_arrow"]

# Why a row has no ranks, in the order of what is looked at first.
STATUSES = ("ok", "failed", "theta", "draws", "log_q")
_VECTORS = ("theta", "reference", "mean", "sd", "averaged", "rank", "beyond", "theta_beyond")
_METADATA = b"sbi_dist.calibration"


@dataclasses.dataclass(frozen=True, eq=False)
class Ranks:
    """R held-out simulations of D parameters, with N draws each.

    Where a row has no ranks its numbers are NaN or -1, and ``status`` says why.

    Attributes:
        row: (R,) int64 identifiers, ascending and unique.
        status: (R,) uint8, index into ``STATUSES``: draws were not made, or theta, the draws or
            the log densities are not finite.
        theta: (R, D).
        reference: (R, D) a regression's guess of theta from x; NaN where none was given.
        mean, sd: (R, D) of the draws.
        averaged: (R, D) one draw of each row: i.i.d. draws of the data-averaged posterior.
        rank: (R, D) int32: draws below theta, ties broken at random.
        beyond: (R, D) int32: draws that lie beyond 5 sd of the others, theta included.
        theta_beyond: (R, D) bool: theta lies beyond 5 sd of the draws.
        hpd_rank: (R,) int32: draws of a higher density than theta; -1 without densities.
        tarp_rank: (R,) int32: draws nearer than theta to a random point.
        tarp_data_rank: (R,) int32: draws nearer than theta to ``reference``; -1 without it.
        ood: (R,) out-of-distribution p-values; NaN where none were given.
        draws: N.
        seed: of ties, random points and the choice of ``averaged``.
    """

    row: np.ndarray
    status: np.ndarray
    theta: np.ndarray
    reference: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    averaged: np.ndarray
    rank: np.ndarray
    beyond: np.ndarray
    theta_beyond: np.ndarray
    hpd_rank: np.ndarray
    tarp_rank: np.ndarray
    tarp_data_rank: np.ndarray
    ood: np.ndarray
    draws: int
    seed: int

    def __len__(self) -> int:
        return len(self.row)

    @property
    def ok(self) -> np.ndarray:
        """(R,) bool: rows that have ranks."""
        return self.status == 0

    def usable(self) -> Ranks:
        """The rows that have ranks."""
        return self if self.ok.all() else self._select(self.ok)

    def _select(self, index: np.ndarray) -> Ranks:
        some: dict[str, Any] = {name: getattr(self, name)[index] for name in _arrays()}
        return dataclasses.replace(self, **some)


def _arrays() -> list[str]:
    return [each.name for each in dataclasses.fields(Ranks) if each.name not in ("draws", "seed")]


def merge(parts: Sequence[Ranks]) -> Ranks:
    """One table of all, sorted by row.

    Raises:
        ValueError: there is none; or they differ in number of draws or parameters, or in seed; or
            two have the same row.
    """
    if not parts:
        raise ValueError("there is no table to merge")
    alike = {(each.draws, each.seed, each.theta.shape[1]) for each in parts}
    if len(alike) > 1:
        raise ValueError(f"tables of different (draws, seed, parameters): {sorted(alike)}")
    together: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in _arrays()
    }
    whole = dataclasses.replace(parts[0], **together)
    order = np.argsort(whole.row, kind="stable")
    if (np.diff(whole.row[order]) == 0).any():
        raise ValueError("a row is in more than one table")
    return whole._select(order)


def to_arrow(ranks: Ranks, names: Sequence[str]) -> pa.Table:
    """A column for each attribute, with lists of D for those of each parameter."""
    columns = {}
    for name in _arrays():
        array = getattr(ranks, name)
        if name in _VECTORS:
            flat = pa.array(np.ascontiguousarray(array).ravel())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
        else:
            columns[name] = pa.array(array)
    about = {
        "draws": ranks.draws,
        "seed": ranks.seed,
        "parameters": list(names),
        "statuses": list(STATUSES),
    }
    return pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(about).encode()})


def from_arrow(table: pa.Table) -> tuple[Ranks, list[str]]:
    """What :func:`to_arrow` was given: the ranks and the parameters' names."""
    about = json.loads(table.schema.metadata[_METADATA])
    names = about["parameters"]
    arrays = {}
    for name in _arrays():
        column = table[name].combine_chunks()
        if name in _VECTORS:
            arrays[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, len(names))
        else:
            arrays[name] = column.to_numpy(zero_copy_only=False)
    return Ranks(**arrays, draws=about["draws"], seed=about["seed"]), names
