"""What a client gives back: arrays of the observations of a request, and how they are decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from sbi_dist.catalog.rows import ID, OK, STATUSES, Rows

if TYPE_CHECKING:
    import torch

__all__ = ["ABOUT_X", "Answer", "Densities", "Samples", "Summaries", "decode"]

Kind = TypeVar("Kind", bound="Answer")

# Columns that tell of the observation, whatever became of its posterior.
ABOUT_X = ("out_of_distribution", "out_of_distribution_p")


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What is known of B observations.

    Attributes:
        model: id of the model that all of it is from.
        parameter_names: D names.
        ids: identifier of each observation.
        statuses: ``ok``; or why there is no posterior: ``nonfinite``, ``null``, ``wrong_length``,
            ``failed``. All else of such an observation is NaN.
        out_of_distribution: how far the observation is from those of the training, float32 (B,);
            NaN where the model can't tell.
        out_of_distribution_p: part of the training's observations that are as far, float32 (B,).
    """

    model: str
    parameter_names: list[str]
    ids: list[str]
    statuses: list[str]
    out_of_distribution: np.ndarray
    out_of_distribution_p: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ok(self) -> np.ndarray:
        """Whether each has a posterior, bool of shape (B,)."""
        return np.array([status == STATUSES[OK] for status in self.statuses], dtype=bool)

    @classmethod
    def concatenate(cls: type[Kind], parts: Sequence[Kind]) -> Kind:
        """Observations one after the other, of one model."""
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            values = [getattr(part, field.name) for part in parts]
            if isinstance(values[0], np.ndarray) and field.name not in _SHARED:
                fields[field.name] = values[0] if len(values) == 1 else np.concatenate(values)
            elif field.name in ("ids", "statuses"):
                fields[field.name] = [each for value in values for each in value]
            else:
                fields[field.name] = values[0]
        return cls(**fields)


@dataclasses.dataclass(frozen=True, eq=False)
class Samples(Answer):
    """Posterior draws of B observations.

    Attributes:
        draws: float32 of shape (B, num_samples, D).
        log_prob: density of each draw, float32 of shape (B, num_samples); None where not asked.
    """

    draws: np.ndarray
    log_prob: np.ndarray | None

    def torch(self) -> torch.Tensor:
        """The draws as a tensor, without a copy."""
        import torch

        return torch.from_numpy(self.draws)


@dataclasses.dataclass(frozen=True, eq=False)
class Summaries(Answer):
    """Summaries of the posteriors of B observations, float32.

    Attributes:
        mean, sd, map: (B, D).
        covariance: (B, D, D).
        quantiles: (B, Q, D), at ``quantile_levels``.
        hdi: (B, 2, D), ends of the shortest interval with ``hdi_mass`` of the draws.
    """

    quantile_levels: list[float]
    hdi_mass: float
    mean: np.ndarray
    sd: np.ndarray
    covariance: np.ndarray
    quantiles: np.ndarray
    hdi: np.ndarray
    map: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Densities(Answer):
    """Posterior densities of B observations at given parameters.

    Attributes:
        log_prob: float32 of shape (B, N); -inf outside the prior's support.
    """

    log_prob: np.ndarray


# The same for all observations.
_SHARED = ("quantile_levels",)


def decode(
    batch: pa.RecordBatch, rows: Rows, shapes: dict[str, tuple[int, ...]]
) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
    """Identifiers, statuses and columns by name of a record batch.

    Args:
        batch: as it came.
        rows: what was asked, of which the batch answers the first ones. What was found unusable
            here keeps the status from here.
        shapes: of one observation's values in each column that is wanted.

    Raises:
        ValueError: it is not the answer to that.
        KeyError: a column is missing.
    """
    count = len(batch)
    if count > len(rows):
        raise ValueError(f"{count} observations where {len(rows)} were asked for")
    ids = rows.ids.slice(0, count)
    if not batch[ID].cast(pa.string()).equals(ids):
        raise ValueError("other observations than were asked for, or in another order")
    names = np.array(STATUSES, dtype=object)
    given = batch["status"].to_numpy(zero_copy_only=False).astype(object)
    mine = rows.status[:count]
    statuses = np.where(mine == OK, given, names[mine])
    columns = {name: _values(batch[name], shape) for name, shape in shapes.items()}
    empty = statuses != names[OK]
    if empty.any():
        for name in shapes.keys() - set(ABOUT_X):
            columns[name][empty] = np.nan
    return ids.to_pylist(), statuses.tolist(), columns


def _values(column: pa.Array, shape: tuple[int, ...]) -> np.ndarray:
    """A column as float32 of shape (B, *shape), writable; NaN where null."""
    size = 1
    if shape:
        kind = column.type
        if (
            not isinstance(kind, pa.FixedShapeTensorType)
            or tuple(kind.shape) != shape
            or list(kind.permutation or range(len(shape))) != list(range(len(shape)))
        ):
            raise ValueError(f"a column of type {kind} where tensors of shape {shape} belong")
        size = kind.storage_type.list_size
        storage = column.storage
        inner = storage.values.slice(storage.offset * size, len(column) * size)
    else:
        inner = column
    if not (pa.types.is_floating(inner.type) or pa.types.is_null(inner.type)):
        raise ValueError(f"a column of {inner.type} where numbers belong")
    if pa.types.is_null(inner.type):
        inner = inner.cast(pa.float32())
    values = np.array(inner.to_numpy(zero_copy_only=False), dtype=np.float32)
    values = values.reshape(len(column), *shape)
    if column.null_count:
        values[column.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return values
