"""One worker's training: minimize the mean of -log q(theta | x) over stored simulations.

Plain PyTorch, no Ray: the trainer calls :func:`fit` in each of its workers, tests and notebooks
call it directly. Every random choice is a function of (seed, epoch), so that a run which resumes
from a checkpoint takes the same steps as one that was never stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sbi_dist.errors import InputError, StageError
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.standardize import Standardization

__all__ = ["Checkpoints", "Workers", "defaults_for", "fit", "split"]

_LOWER = 0.3  # factor of the learning rate at a plateau
_WARM_UP_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Workers:
    """This worker's place among those that train together, and its device."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")

    def total(self, *values: float) -> list[float]:
        """Sums of the values over all workers."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return summed.tolist()


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints go and come from: bytes in, bytes out."""

    save: Callable[[int, bytes], None]
    latest: Callable[[], list[bytes]]
    every_s: float


def defaults_for(options: TrainOptions, training: int) -> tuple[int, int]:
    """Batch size and patience (epochs) for a number of training simulations."""
    batch = options.batch_size or min(max(200, training // 100), 1000)
    batch = min(batch, training)
    steps = max(1, training // batch)
    patience = options.patience or int(np.clip(round(300 / steps), 3, 5))
    return batch, patience


def split(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indexes of the training and of the validation simulations.

    One random row of each 1 / fraction is held out. More rows behind these change nothing for
    them, so that what a model was trained on is not what its successor is validated on.

    Raises:
        InputError: too few simulations for both.
    """
    edges = np.floor(np.arange(int(count * fraction) + 2) / fraction)
    picks = np.random.Generator(np.random.Philox(key=seed)).random(len(edges) - 1)
    held_out = np.floor(edges[:-1] + picks * np.diff(edges)).astype(int)
    if held_out[0] >= count:  # fewer rows than one is to be held out of
        held_out[0] = int(picks[0] * count)
    held_out = held_out[held_out < count]
    if count < 20 or len(held_out) < 1 or count - len(held_out) < 10:
        raise InputError(
            f"train: {count} usable simulations are too few; at least 20 are needed (raise "
            "simulate.num_simulations)"
        )
    return np.setdiff1d(np.arange(count), held_out, assume_unique=True), held_out


def fit(
    theta: np.ndarray,
    x: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
    options: TrainOptions,
    workers: Workers = Workers(),
    checkpoints: Checkpoints | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    start: DensityEstimator | None = None,
    until: Callable[[], bool] | None = None,
) -> tuple[DensityEstimator, dict[str, Any]]:
    """Train a density estimator on simulations.

    Args:
        theta, x: the simulations, float32 of shapes (N, D) and (N, *x_shape), all finite.
        bounds: lower and upper bounds of the prior's support, each of shape (D,).
        options: the stage's options.
        workers: this worker's place; all workers get the same arguments otherwise.
        checkpoints: None trains without.
        report: called after each epoch with the history so far.
        start: an estimator of the same architecture, whose weights and standardization are taken
            up: one trained on the first of these simulations, say.
        until: asked after each epoch whether to stop; None trains to the end.

    Returns:
        The estimator with the weights of the best validation loss, and the history: ``epoch``,
        ``training_loss``, ``validation_loss`` and ``learning_rate`` by epoch (losses in nats, of
        theta itself), ``best_epoch``, ``best_validation_loss``, ``seconds``, sizes.

    Raises:
        InputError: too few simulations.
        StageError: the loss is not a finite number.
    """
    training, held_out = split(len(theta), options.validation_fraction, options.seed)
    standardization = (
        Standardization.fit(theta[training], x[training], *bounds, options.x_scale)
        if start is None
        else start.standardization
    )
    u, log_det = standardization.u(torch.from_numpy(theta))
    x_in = standardization.x(torch.from_numpy(x))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        estimator = DensityEstimator(options, standardization, x.shape[1:])
    rows = torch.from_numpy(training)
    if start is None:
        estimator.flow.initialize(u[rows[:100_000]], x_in[rows[:100_000]])
    else:
        estimator.flow.load_state_dict(start.flow.state_dict())
    data = _Data(
        u[rows].to(workers.device),
        x_in[rows].to(workers.device),
        u[held_out].to(workers.device),
        x_in[held_out].to(workers.device),
        float(log_det[rows].mean()),
        float(log_det[held_out].mean()),
    )
    estimator.flow.to(workers.device)
    state = _Training(estimator, data, options, workers, until)
    if checkpoints is not None:
        state.resume(checkpoints.latest())
    state.run(checkpoints, report)
    estimator.flow.load_state_dict(state.best)
    estimator.flow.cpu().eval()
    return estimator, state.history


@dataclasses.dataclass(frozen=True)
class _Data:
    u: Tensor
    x: Tensor
    validation_u: Tensor
    validation_x: Tensor
    log_det: float  # mean log |du/dtheta|: makes a loss in u one in theta
    validation_log_det: float


class _Training:
    """The state of an optimization, and its steps."""

    def __init__(
        self,
        estimator: DensityEstimator,
        data: _Data,
        options: TrainOptions,
        workers: Workers,
        until: Callable[[], bool] | None = None,
    ) -> None:
        self.options, self.workers, self.data, self.until = options, workers, data, until
        self.batch, self.patience = defaults_for(options, len(data.u))
        if self.batch < workers.count:
            raise InputError(
                f"train.workers is {workers.count}, more than the batch size {self.batch}"
            )
        self.flow = estimator.flow
        self.model: nn.Module = self.flow
        if workers.count > 1:
            self.model = nn.parallel.DistributedDataParallel(self.flow)
        self.optimizer = torch.optim.AdamW(
            self.flow.parameters(),
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.factor, self.waited, self.lowered, self.step = 1.0, 0, 0, 0
        self.finished = False
        self.seconds = 0.0
        self.best = copy.deepcopy(self.flow.state_dict())
        loss = self._validation_loss()
        self.history: dict[str, Any] = {
            "epoch": [0],
            "training_loss": [None],
            "validation_loss": [loss],
            "learning_rate": [0.0],
            "best_epoch": 0,
            "best_validation_loss": loss,
            "seconds": 0.0,
            "training_simulations": len(data.u),
            "validation_simulations": len(data.validation_u),
            "batch_size": self.batch,
        }

    # ---- steps ----

    def run(
        self, checkpoints: Checkpoints | None, report: Callable[[dict[str, Any]], None] | None
    ) -> None:
        saved = time.monotonic()
        while not self.finished:
            started = time.monotonic()
            self._epoch()
            now = time.monotonic()
            self.seconds += now - started
            self.history["seconds"] = self.seconds
            self._decide()
            due = checkpoints is not None and now - saved >= checkpoints.every_s
            if checkpoints is not None and due and self.workers.rank == 0 and not self.finished:
                checkpoints.save(self.history["epoch"][-1], self.state())
                saved = time.monotonic()
            if report is not None:
                report(self.history)

    def _epoch(self) -> None:
        epoch = self.history["epoch"][-1] + 1
        count, workers = len(self.data.u), self.workers
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator).to(workers.device)
        # Each worker takes the same number of rows of every global batch, so that the mean of
        # the workers' gradients is the batch's gradient.
        share = self.batch // workers.count
        self.model.train()
        torch.manual_seed(self.options.seed * 1_000_003 + epoch)  # dropout
        total = torch.zeros((), device=workers.device)
        steps = count // self.batch
        for number in range(steps):
            start = number * self.batch + workers.rank * share
            rows = order[start : start + share]
            self._set_rate()
            loss = -self.model(self.data.u[rows], self.data.x[rows]).mean()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.flow.parameters(), self.options.clip_norm)
            self.optimizer.step()
            self.step += 1
            total += loss.detach()
        mean_loss = workers.total(float(total))[0] / (steps * workers.count)
        if not np.isfinite(mean_loss):
            raise StageError(
                f"train: the loss became {mean_loss} in epoch {epoch} at learning rate "
                f"{self.options.learning_rate * self.factor:g}; lower train.learning_rate, or look "
                "at x for extreme values (train.x_scale)"
            )
        history = self.history
        history["epoch"].append(epoch)
        history["training_loss"].append(mean_loss - self.data.log_det)
        history["validation_loss"].append(self._validation_loss())
        history["learning_rate"].append(self.options.learning_rate * self.factor)

    def _set_rate(self) -> None:
        if self.options.schedule == "cosine":
            steps = self.options.max_epochs * max(1, len(self.data.u) // self.batch)
            self.factor = 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / steps)))
        warm = min(1.0, (self.step + 1) / _WARM_UP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * self.factor * warm

    def _decide(self) -> None:
        """Keep the best weights; at a plateau go back to them with a lower rate, or stop."""
        history = self.history
        loss = history["validation_loss"][-1]
        if loss < history["best_validation_loss"]:
            history["best_validation_loss"] = loss
            history["best_epoch"] = history["epoch"][-1]
            self.best = copy.deepcopy(self.flow.state_dict())
            self.waited = 0
        else:
            self.waited += 1
        if self.waited >= self.patience and self.options.schedule == "plateau":
            self.waited = 0
            self.lowered += 1
            self.factor *= _LOWER
            self.flow.load_state_dict(self.best)
            self.optimizer.state.clear()
        limit = self.options.max_seconds
        late = False
        if limit is not None or self.until is not None:
            # The clocks of the workers differ: all do what the first one finds.
            if self.workers.rank == 0:
                late = limit is not None and self.seconds >= limit
                late = late or (self.until is not None and self.until())
            late = self.workers.total(float(late))[0] > 0
        self.finished = bool(
            self.lowered > self.options.decays
            or history["epoch"][-1] >= self.options.max_epochs
            or late
        )

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Exact mean over the validation simulations, which the workers share."""
        self.model.eval()
        count, workers = len(self.data.validation_u), self.workers
        total = 0.0
        mine = range(workers.rank * 4096, count, workers.count * 4096)
        for start in mine:
            rows = slice(start, start + 4096)
            log_q = self.flow(self.data.validation_u[rows], self.data.validation_x[rows])
            total -= float(log_q.double().sum())
        return workers.total(total)[0] / count - self.data.validation_log_det

    # ---- checkpoints ----

    def state(self) -> bytes:
        """Everything that the next epoch depends on."""
        sink = io.BytesIO()
        torch.save(
            {
                "flow": self.flow.state_dict(),
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
                "history": self.history,
                "counters": [self.factor, self.waited, self.lowered, self.step, self.seconds],
            },
            sink,
        )
        return sink.getvalue()

    def resume(self, candidates: list[bytes]) -> None:
        """Take up the first candidate that can be read."""
        for data in candidates:
            try:
                state = torch.load(
                    io.BytesIO(data), map_location=self.workers.device, weights_only=True
                )
                self.flow.load_state_dict(state["flow"])
                self.optimizer.load_state_dict(state["optimizer"])
            except Exception:  # a checkpoint cut short by a crash; the one before is tried
                continue
            self.best, self.history = state["best"], state["history"]
            self.factor, self.waited, self.lowered, self.step, self.seconds = state["counters"]
            return
