"""What the training loop uses: batches of standardized rows, wherever these are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from sbi_dist.estimation.data.resident import Batch
from sbi_dist.estimation.standardize import Standardization

__all__ = ["Part", "TrainingData"]


class Part(Protocol):
    """A rank's rows, in memory or streamed."""

    def batches(self, epoch: int, first: int) -> Iterator[Batch]: ...
    def validation_batches(self) -> Iterator[Batch]: ...
    def close(self) -> None: ...


class TrainingData:
    """This rank's part of the data of a training.

    Attributes:
        training, validation: number of rows of either kind, over all ranks.
        batch_size: rows of a global batch.
        steps: batches of an epoch.
        standardization: between the simulations and u and x.
        log_det, validation_log_det: mean log |du / dtheta| over all ranks' training rows, and
            over all held-out rows.
        mode: ``device``, ``memory`` or ``streamed``: where this rank's rows are.
        input_wait_s: seconds that ``batches`` made its caller wait so far.
    """

    def __init__(
        self,
        *,
        training: int,
        validation: int,
        batch_size: int,
        steps: int,
        standardization: Standardization,
        log_det: float,
        validation_log_det: float,
        mode: str,
        description: str,
        part: Part,
        sample: Callable[[], Batch],
    ) -> None:
        self.training, self.validation = training, validation
        self.batch_size, self.steps = batch_size, steps
        self.standardization = standardization
        self.log_det, self.validation_log_det = log_det, validation_log_det
        self.mode, self._description = mode, description
        self.input_wait_s = 0.0
        self._part, self._sample = part, sample

    def describe(self) -> str:
        """A sentence on where this rank's rows are, for the log."""
        return self._description

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This rank's rows of the global batches of an epoch, from the ``first`` one on.

        What the batches of all ranks hold together is a function of (dataset, seed, batch size,
        shuffle_mb, epoch) alone. Each is u (n, D) and x (n, *x_shape), float32 on the device.

        Raises:
            InputError: a shard is missing or damaged.
        """
        batches = self._part.batches(epoch, first)
        try:
            while True:
                began = time.perf_counter()
                batch = next(batches, None)
                self.input_wait_s += time.perf_counter() - began
                if batch is None:
                    return
                yield batch
                del batch  # so that not this generator keeps it while the next one is made
        finally:
            batches.close()  # type: ignore[attr-defined]

    def validation_batches(self) -> Iterator[Batch]:
        """This rank's held-out rows, in order: u and x, up to 4,096 rows at a time.

        Raises:
            InputError: a shard is missing or damaged.
        """
        return self._part.validation_batches()

    def sample(self) -> Batch:
        """u and x of up to 100,000 training rows, on the host; the same on every rank."""
        return self._sample()

    def close(self) -> None:
        """End what was begun to read; no batch is asked for after this."""
        self._part.close()
