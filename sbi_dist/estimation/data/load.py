"""From a source to the data of a training: who reads what, once, and where it is kept.

Each rank reads the shards of its own stretch of rows. If these fit its memory they stay there.
All ranks choose scale and bijection by the same sample of rows, and add up the means and sd of
all rows in the same order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from sbi_dist.errors import InputError, StageError
from sbi_dist.estimation.data.held_out import HeldOut
from sbi_dist.estimation.data.memory import available_bytes
from sbi_dist.estimation.data.order import Order
from sbi_dist.estimation.data.resident import Batch, Resident
from sbi_dist.estimation.data.rows import Pair, Reader, Rows
from sbi_dist.estimation.data.source import Source
from sbi_dist.estimation.data.streamed import Streamed
from sbi_dist.estimation.data.totals import Totals, lane_edges
from sbi_dist.estimation.data.training_data import Part, TrainingData
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.standardize import (
    Standardization,
    Sums,
    as_tensor,
    chunk_rows,
    sample_runs,
)

__all__ = ["Ranks", "load_data"]

T = TypeVar("T")

_GROUP_PART, _VALIDATION_PART = 3, 4  # of the budget: what a group, and held-out rows, may take
_UNKNOWN_BYTES = 4e9  # where the system does not tell how much memory is free


class Ranks(Protocol):
    """This process's place among those that train together."""

    @property
    def rank(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on every rank."""
        ...


def load_data(
    source: Source,
    bounds: tuple[np.ndarray, np.ndarray],
    options: TrainOptions,
    batch_size_for: Callable[[int], int],
    workers: Ranks,
    start: Standardization | None = None,
) -> TrainingData:
    """This rank's part of the data of a training; all ranks call it together.

    Args:
        source: the simulations, the same for all ranks.
        bounds: lower and upper bounds of the prior's support, each of shape (D,).
        options: ``validation_fraction``, ``seed``, ``shuffle_mb``, ``memory_gb``, ``x_scale``.
        batch_size_for: the global batch size for a number of training rows.
        workers: this rank's place.
        start: a standardization to use in place of one that is fitted.

    Raises:
        InputError: too few simulations, more ranks than shares of a batch, a shard that is
            missing or damaged, or too little memory to stream; on all ranks where it is on one.
    """
    return _Loading(source, bounds, options, batch_size_for, workers).load(start)


class _Loading:
    def __init__(
        self,
        source: Source,
        bounds: tuple[np.ndarray, np.ndarray],
        options: TrainOptions,
        batch_size_for: Callable[[int], int],
        workers: Ranks,
    ) -> None:
        self.source, self.bounds, self.options, self.workers = source, bounds, options, workers
        count = int(source.counts.sum())
        self.held_out = HeldOut(count, options.validation_fraction, options.seed)
        self.rows = Rows(source, self.held_out)
        self.floats = source.theta_size + math.prod(source.x_shape)
        self.row_bytes = 4 * self.floats
        training = self.held_out.training
        self.order = Order(
            training, batch_size_for(training), self.row_bytes, options.shuffle_mb, options.seed
        )
        self.share = self.order.share(workers.rank, workers.count)
        edges = lane_edges(self.order, self.held_out)
        self.edges = edges[self.share.lanes.start : self.share.lanes.stop + 1]
        self.stretch = range(self.edges[0], self.edges[-1])
        self.runs = sample_runs(training, self.row_bytes)
        self.budget = self._budget()
        self.resident = len(self.stretch) * self.row_bytes <= self.budget
        held = len(self.stretch) - (self.share.stop - self.share.start)
        keeps = held * self.row_bytes <= self.budget / _VALIDATION_PART
        self.keeps_validation = self.resident or keeps
        # Rows that stay in memory: theta and x until these are made u and x, in place.
        self.training = self._empty(len(self.stretch) - held) if self.resident else None
        self.validation = self._empty(held) if self.keeps_validation else None

    def _budget(self) -> float:
        if self.options.memory_gb is not None:
            return self.options.memory_gb * 1e9
        return (available_bytes() or 2 * _UNKNOWN_BYTES) / 2 / self.workers.count

    def _empty(self, rows: int) -> Pair:
        theta = np.empty((rows, self.source.theta_size), dtype=np.float32)
        return theta, np.empty((rows, *self.source.x_shape), dtype=np.float32)

    def load(self, start: Standardization | None) -> TrainingData:
        """All of it, with two exchanges among the ranks."""
        sample: Pair | None = None
        parts = self._gathered(lambda: self._first_reading(start is None))
        if start is None:
            sample = _joined([part for part in parts if part is not None])
            low, high = self.bounds
            start = chosen = Standardization.of_sample(*sample, low, high, self.options.x_scale)
        else:
            chosen = None
        scale: Standardization = start
        lanes = [lane for part in self._gathered(lambda: self._totals(scale)) for lane in part]
        total: Sums = functools.reduce(lambda a, b: a + b, (sums for sums, _ in lanes))
        standardization = start if chosen is None else chosen.completed(total)
        training, validation = self.held_out.training, self.held_out.validation
        mode, part = self._part(standardization)
        return TrainingData(
            training=training,
            validation=validation,
            batch_size=self.order.batch_size,
            steps=self.order.steps,
            standardization=standardization,
            log_det=standardization.mean_log_det(total.log_det, training),
            validation_log_det=standardization.mean_log_det(
                math.fsum(log_det for _, log_det in lanes), validation
            ),
            mode=mode,
            description=self._description(mode),
            part=part,
            sample=_Sample(self.rows, self.runs, standardization, sample),
        )

    def _gathered(self, part: Callable[[], T]) -> list[T]:
        """What ``part`` gives on each rank; its error, on whichever it is, is raised on all."""
        try:
            mine: tuple[T | None, Exception | None] = part(), None
        except (InputError, StageError) as error:
            mine = None, error
        found = self.workers.gather(mine)
        for _, failure in found:
            if failure is not None:
                raise failure
        return [each for each, _ in found]

    # ---- reading --------------------------------------------------------------------------------

    def _first_reading(self, sampled: bool) -> Pair | None:
        """This rank's rows of the sample; fills the memory if all rows stay there."""
        if self.training is None:
            self._check_group()
        else:
            self._read_all(None)
        return self._of_sample() if sampled else None

    def _check_group(self) -> None:
        group = self.order.group_steps * self.share.size * self.row_bytes
        if group <= self.budget / _GROUP_PART:
            return
        given = self.options.memory_gb is not None
        free = (
            f"train.memory_gb is {self.options.memory_gb:g}"
            if given
            else (
                f"train.memory_gb is not set, and half of what is free is {self.budget / 1e9:.3g} "
                "for this worker"
            )
        )
        shuffled = f"{group / 1e6:,.3g} MB that are shuffled at once in it"
        remedy = "lower train.shuffle_mb"
        if self.order.group_steps == 1:
            shuffled, remedy = f"{group / 1e6:,.3g} MB of a batch", "lower train.batch_size"
        else:
            most = self.options.shuffle_mb * self.budget / _GROUP_PART / group
            remedy += f" (it is {self.options.shuffle_mb:g}) to {most:.2g}"
        raise InputError(
            f"{free}, a third of which does not hold the {shuffled}; raise train.memory_gb to "
            f"{math.ceil(group * _GROUP_PART / 1e6) / 1e3:g} or {remedy}"
        )

    def _read_all(self, totals: Totals | None) -> None:
        """Read the whole stretch, keep what is kept, and add up the rest."""
        kept = [0, 0]
        for first, rows in self.rows.whole(*self._ends(), chunk_rows(self.floats)):
            parts = self.rows.parted(first, rows)
            for number, memory in enumerate((self.training, self.validation)):
                if memory is not None:
                    here = slice(kept[number], kept[number] + len(parts[number][0]))
                    for into, values in zip(memory, parts[number], strict=True):
                        into[here] = values
                    kept[number] = here.stop
            if totals is not None:
                totals.add(parts[0], parts[1][0])

    def _ends(self) -> tuple[int, int]:
        return self.stretch.start, self.stretch.stop

    def _of_sample(self) -> Pair:
        share = self.share
        runs = np.clip(self.runs, share.start, share.stop)
        mine = [(a, b) for a, b in runs.tolist() if a < b]
        if self.training is not None:
            theta, x = self.training
            slices = [slice(a - share.start, b - share.start) for a, b in mine]
            parts = [(theta[here], x[here]) for here in slices]
            return _joined([self._empty(0), *parts])
        return _joined([self._empty(0), *_read_runs(self.rows, mine)])

    def _totals(self, scale: Standardization) -> list[tuple[Sums, float]]:
        places = self.order.places[self.share.lanes.start : self.share.lanes.stop + 1]
        training = np.diff(places)
        totals = Totals(
            scale,
            training.tolist(),
            (np.diff(self.edges) - training).tolist(),
            chunk_rows(self.floats),
        )
        if self.training is not None and self.validation is not None:
            totals.add(self.training, self.validation[0])
        else:
            self._read_all(totals)
        sums = [each for each in totals.sums if each is not None]
        return list(zip(sums, totals.validation_log_dets, strict=True))

    # ---- where rows stay ------------------------------------------------------------------------

    def _part(self, standardization: Standardization) -> tuple[str, Part]:
        device = self.workers.device
        validation = None
        if self.validation is not None:
            validation = self._standardized(self.validation, standardization)
        if self.training is None or validation is None:
            return "streamed", Streamed(
                self.rows, self.order, self.share, self.stretch, standardization, validation, device
            )
        mode, training = "memory", self._standardized(self.training, standardization)
        self.training = self.validation = None
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if len(self.stretch) * self.row_bytes <= free / 2:
                mode = "device"
                training, validation = (
                    (u.to(device), x.to(device)) for u, x in (training, validation)
                )
        return mode, Resident(self.order, self.share, training, validation, device)

    def _standardized(self, rows: Pair, standardization: Standardization) -> Batch:
        """u and x in the memory of theta and x."""
        theta, x = (torch.from_numpy(array) for array in rows)
        size = chunk_rows(self.floats)
        for start in range(0, len(theta), size):
            here = slice(start, start + size)
            theta[here] = standardization.u_alone(theta[here])
            x[here] = standardization.x(x[here])
        return theta, x

    def _description(self, mode: str) -> str:
        here = self.share.stop - self.share.start
        rows = f"{here:,} of {self.held_out.training:,} training simulations"
        size = f"{len(self.stretch) * self.row_bytes / 1e6:,.4g} MB with those held out"
        if mode == "device":
            return f"{rows} are in the memory of {self.workers.device} ({size})"
        allowed = f"{self.budget / 1e6:,.4g} MB"
        if mode == "memory":
            return f"{rows} are in memory ({size}; up to {allowed} are allowed)"
        group = self.order.group_steps * self.share.size * self.row_bytes
        return (
            f"{rows} are streamed from the store ({size}; {allowed} are allowed), shuffled "
            f"{group / 1e6:,.3g} MB at a time"
        )


class _Sample:
    """u and x of the sample. Its rows are kept until they are asked for once, then read again."""

    def __init__(
        self, rows: Rows, runs: np.ndarray, standardization: Standardization, sample: Pair | None
    ) -> None:
        self._rows, self._runs, self._standardization = rows, runs, standardization
        self._kept = sample

    def __call__(self) -> Batch:
        sample, self._kept = self._kept, None
        theta, x = sample or _joined(_read_runs(self._rows, self._runs.tolist()))
        size = chunk_rows(theta.shape[1] + max(1, x[:1].size))
        u, out = torch.empty(theta.shape), torch.empty(x.shape)
        for start in range(0, len(theta), size):
            here = slice(start, start + size)
            u[here] = self._standardization.u_alone(as_tensor(theta[here]))
            out[here] = self._standardization.x(as_tensor(x[here]))
        return u, out


def _read_runs(rows: Rows, runs: list[tuple[int, int]]) -> list[Pair]:
    """The training rows of some runs of positions."""
    reader = Reader(rows.source.at_once)
    try:
        return list(reader.read(lambda run: rows.training(*run), runs))
    finally:
        reader.close()


def _joined(parts: list[Pair]) -> Pair:
    return np.concatenate([theta for theta, _ in parts]), np.concatenate([x for _, x in parts])
