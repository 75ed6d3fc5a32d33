"""The training loop: minimize the mean of -log q(theta | x) over stored simulations.

Plain PyTorch, no Ray: the trainer calls :func:`fit_source` in each of its workers, tests and
notebooks call :func:`fit`. Every random choice is a function of (seed, epoch, step), and a
checkpoint holds all that the next step depends on, so that a run that goes on from one takes the
same steps as one that was never stopped. Where rows come from is ``data``'s matter, what a step
does is ``optimize``'s, how large it is and when to stop is ``schedule``'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sbi_dist.errors import StageError
from sbi_dist.estimation.checkpoint import Checkpoints, DamagedCheckpoint, decode, encode
from sbi_dist.estimation.data import ArraySource, Source, TrainingData, load_data, split
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.optimize import Optimization
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.schedule import Schedule, batch_size_for
from sbi_dist.estimation.signals import (
    CHECKPOINT,
    FINISH,
    LEAVE,
    NOTHING,
    TOGETHER,
    Leave,
    Signals,
    Silence,
)
from sbi_dist.estimation.snapshot import Snapshot
from sbi_dist.estimation.workers import ALONE, Workers

__all__ = ["Watch", "fit", "fit_source", "split"]

# A GPU runs ahead of the program; it is waited for only every so many steps.
_LOOK_EVERY = {"cpu": 1, "cuda": 32}
# So many steps without a finite gradient, of so many, mean that the weights themselves are bad.
_WINDOW, _BAD = 100, 20
_RECOVERIES = 4

# Told of each step: a function that gives the state of things, and the history so far.
Watch = Callable[[Callable[[], Snapshot], dict[str, Any]], None]


def fit(
    theta: np.ndarray,
    x: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
    options: TrainOptions,
    workers: Workers = ALONE,
    checkpoints: Checkpoints | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    start: DensityEstimator | None = None,
) -> tuple[DensityEstimator, dict[str, Any]]:
    """Train a density estimator on simulations in memory.

    Args:
        theta, x: the simulations, float32 of shapes (N, D) and (N, *x_shape), all finite.
        bounds: lower and upper bounds of the prior's support, each of shape (D,).

    The other arguments, the result and the errors are those of :func:`fit_source`.
    """
    return fit_source(
        ArraySource(theta, x), bounds, options, workers, checkpoints, report, start=start
    )


def fit_source(
    source: Source,
    bounds: tuple[np.ndarray, np.ndarray],
    options: TrainOptions,
    workers: Workers = ALONE,
    checkpoints: Checkpoints | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    watch: Watch | None = None,
    start: DensityEstimator | None = None,
    signals: Signals | None = None,
) -> tuple[DensityEstimator, dict[str, Any]]:
    """Train a density estimator.

    Args:
        source: the simulations.
        bounds: lower and upper bounds of the prior's support, each of shape (D,).
        options: the stage's options.
        workers: this worker's place; all workers get the same arguments otherwise.
        checkpoints: None trains without.
        report: called after each epoch with the history so far.
        watch: called after each step.
        start: an estimator of the same architecture, whose weights and standardization are taken
            up: one trained on the first of these simulations, say.
        signals: what others ask of the training while it runs.

    Returns:
        The estimator with the weights of the best validation loss, and the history: ``epoch``,
        ``training_loss``, ``validation_loss`` and ``learning_rate`` by epoch (losses in nats, of
        theta itself), ``best_epoch``, ``best_validation_loss``, ``seconds``, ``input_wait`` (by
        worker, in seconds), sizes, and ``notes`` on what went wrong.

    Raises:
        InputError: too few simulations, or settings that do not fit them.
        StageError: the loss stays without a finite value, or the memory is too small.
        Leave: a signal asked for it.
    """
    data = load_data(
        source,
        bounds,
        options,
        lambda training: batch_size_for(options, training),
        workers,
        None if start is None else start.standardization,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            estimator = DensityEstimator(options, data.standardization, source.x_shape)
        if start is None:
            estimator.flow.initialize(*data.sample())
        else:
            estimator.flow.load_state_dict(start.flow.state_dict())
        estimator.flow.to(workers.device)
        training = _Training(estimator, data, options, workers, signals or Silence())
        if checkpoints is not None:
            training.resume(checkpoints)
        training.run(checkpoints, report, watch)
    finally:
        data.close()
    estimator.flow.cpu().eval()
    return estimator, training.history


class _Training:
    """The state of a training, and its steps."""

    def __init__(
        self,
        estimator: DensityEstimator,
        data: TrainingData,
        options: TrainOptions,
        workers: Workers,
        signals: Signals,
    ) -> None:
        self.options, self.workers, self.data, self.signals = options, workers, data, signals
        self.flow = estimator.flow
        self.optimization = Optimization(self.flow, options, workers, data.batch_size)
        self.epoch, self.step = 1, 0  # of the next step
        self.seconds, self.restarts, self.window = 0.0, 0, 0
        self.best = self.optimization.weights.clone()
        loss = self._validate()
        self.schedule = Schedule(options, data.steps, loss)
        self.history: dict[str, Any] = {
            "epoch": [0],
            "training_loss": [None],
            "validation_loss": [loss],
            "learning_rate": [0.0],
            "best_epoch": 0,
            "best_validation_loss": loss,
            "seconds": 0.0,
            "training_simulations": data.training,
            "validation_simulations": data.validation,
            "batch_size": data.batch_size,
            "steps": data.steps,
            "data": data.describe(),
            "skipped_steps": 0,
            "input_wait": [],
            "notes": [],
        }
        if not math.isfinite(loss):
            raise StageError(
                f"train: the loss is {loss} before the first step; look at x for extreme values "
                "(train.x_scale)"
            )

    # ---- steps ----

    def run(
        self,
        checkpoints: Checkpoints | None,
        report: Callable[[dict[str, Any]], None] | None,
        watch: Watch | None,
    ) -> None:
        self._began, self._before = time.monotonic(), self.seconds
        self._steps_here, self._checkpoints = 0, 0
        self._saved_at, self._saved_epoch = self._began, self.epoch
        finishing = self.schedule.finished
        while not finishing:
            finishing = self._epoch(checkpoints, watch)
            if report is not None:
                report(self.history)
        self.optimization.go_back(self.best)
        if checkpoints is not None:
            checkpoints.flush()

    def _epoch(self, checkpoints: Checkpoints | None, watch: Watch | None) -> bool:
        """The rest of an epoch, and what follows from it; whether it was the last one."""
        optimization, schedule, look = self.optimization, self.schedule, self._look_every()
        finish, rank = False, self.workers.rank
        self.flow.train()
        for u, x in self.data.batches(self.epoch, self.step):
            if self.options.dropout:
                # Another mask in each step, and the same one when it is taken again.
                torch.manual_seed(hash((self.options.seed, self.epoch, self.step, rank)))
            looking = self.step % look == 0
            signal = self.signals.wanted() if looking and rank == 0 else NOTHING
            rate, averaging = schedule.step()
            optimization.step(u, x, rate, averaging, float(signal))
            self.step += 1
            self._steps_here += 1
            if looking and self.workers.count > 1:
                signal = int(optimization.signal)
            if signal == TOGETHER:
                signal = self.signals.together()
            finish = finish or signal == FINISH
            if self.step % _WINDOW == 0:
                self._look_for_bad_steps()
            if watch is not None:
                watch(self._now, self.history)
            if checkpoints is not None:
                self._save_if_due(checkpoints, signal)
        self._end_epoch()
        late = self.options.max_seconds is not None and self.seconds >= self.options.max_seconds
        if self.workers.count > 1:
            # The clocks of the workers differ: all do what the first one finds.
            finish, late = self.workers.from_first((finish, late))
        return bool(finish or late or self.schedule.finished)

    def _look_every(self) -> int:
        return _LOOK_EVERY.get(self.workers.device.type, 1)

    def _end_epoch(self) -> None:
        optimization, history = self.optimization, self.history
        self._look_for_bad_steps()
        skipped = int(optimization.skipped)
        steps = self.data.steps
        mean = float(optimization.loss) / max(steps - skipped, 1) - self.data.log_det
        rate = self.schedule.rate
        loss = self._validate()
        history["epoch"].append(self.epoch)
        history["training_loss"].append(mean if skipped < steps else None)
        history["validation_loss"].append(loss)
        history["learning_rate"].append(rate)
        history["skipped_steps"] += skipped
        self.seconds = self._before + time.monotonic() - self._began
        history["seconds"], history["input_wait"] = self.seconds, self._waited
        optimization.loss.zero_()
        optimization.skipped.zero_()
        self.window = 0
        if not math.isfinite(loss):
            self._recover(f"the validation loss became {loss}")
        elif loss < history["best_validation_loss"]:
            history["best_validation_loss"], history["best_epoch"] = loss, self.epoch
            self.best = optimization.weights.clone()
        if self.schedule.after_epoch(loss):
            optimization.go_back(self.best)
        self.epoch, self.step = self.epoch + 1, 0

    @torch.no_grad()
    def _validate(self) -> float:
        """Exact mean over the validation simulations, which the workers share."""
        self.flow.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.workers.device)
        with self.optimization.judged():
            for u, x in self.data.validation_batches():
                total -= self.flow(u, x).sum(dtype=torch.float64)
        # One more number of each worker rides along: the seconds it waited for rows.
        waited = [0.0] * self.workers.count
        waited[self.workers.rank] = self.data.input_wait_s
        summed, *self._waited = self.workers.total(float(total), *waited)
        return summed / self.data.validation - self.data.validation_log_det

    # ---- when something goes wrong ----

    def _look_for_bad_steps(self) -> None:
        skipped = int(self.optimization.skipped)
        if skipped - self.window >= min(_BAD, self.data.steps):
            self._recover("the loss or its gradient became infinite or not a number")
            skipped = int(self.optimization.skipped)
        self.window = skipped

    def _recover(self, what: str) -> None:
        """Go back to the best weights with a lower learning rate, a few times."""
        notes = self.history["notes"]
        if len(notes) >= _RECOVERIES:
            raise StageError(
                f"train: {what} in epoch {self.epoch} for the {_RECOVERIES + 1}th time, at a "
                f"learning rate of {self.schedule.rate:.1e}; lower train.learning_rate (now "
                f"{self.schedule.peak:g}), or look at x for extreme values (train.x_scale)"
            )
        self.optimization.go_back(self.best)
        self.schedule.lower()
        notes.append(
            f"epoch {self.epoch}: {what}; training went on from the best weights with a lower "
            "learning rate"
        )

    # ---- what is told, and kept ----

    def _now(self) -> Snapshot:
        history, optimization = self.history, self.optimization
        elapsed = max(time.monotonic() - self._began, 1e-9)
        rate = self._steps_here * self.data.batch_size / elapsed
        done = self.step - int(optimization.skipped)
        loss = float(optimization.loss) / done - self.data.log_det if done > 0 else None
        waited = [*self._waited]
        waited[self.workers.rank] = self.data.input_wait_s
        left = self.schedule.most_steps_left() * elapsed / max(self._steps_here, 1)
        if self.options.max_seconds is not None:
            left = min(left, max(0.0, self.options.max_seconds - self._before - elapsed))
        return Snapshot(
            epoch=self.epoch,
            step=self.step,
            steps=self.data.steps,
            max_epochs=self.options.max_epochs,
            training_loss=loss,
            validation_loss=history["validation_loss"][-1],
            best_validation_loss=history["best_validation_loss"],
            best_epoch=history["best_epoch"],
            learning_rate=self.schedule.rate,
            simulations_per_second=rate,
            seconds=self._before + elapsed,
            seconds_left=left,
            seconds_left_at_most=self.schedule.may_end_early,
            workers=self.workers.count,
            device=self.workers.device.type,
            data=self.data.mode,
            input_wait=[min(1.0, seconds / elapsed) for seconds in waited],
            input_wait_seconds=waited,
            skipped_steps=history["skipped_steps"] + int(optimization.skipped),
            checkpoints=self._checkpoints,
            restarts=self.restarts,
            note=history["notes"][-1] if history["notes"] else "",
        )

    def _save_if_due(self, checkpoints: Checkpoints, signal: int) -> None:
        asked = signal in (CHECKPOINT, LEAVE)
        # Only the first worker's clock counts, and only it writes.
        if self.workers.rank == 0 and (asked or self._due(checkpoints)):
            self.seconds = self._before + time.monotonic() - self._began
            checkpoints.save(self._steps_in_all(), encode(self.state()))
            self._saved_at, self._saved_epoch = time.monotonic(), self.epoch
            self._checkpoints += 1
        if asked and self.workers.rank == 0:
            checkpoints.flush()
        if signal == LEAVE:
            raise Leave

    def _due(self, checkpoints: Checkpoints) -> bool:
        epochs = checkpoints.every_epochs
        return time.monotonic() - self._saved_at >= checkpoints.every_s or (
            epochs is not None and self.epoch - self._saved_epoch >= epochs
        )

    def _steps_in_all(self) -> int:
        return (self.epoch - 1) * self.data.steps + self.step

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "optimization": self.optimization.state(),
            "schedule": self.schedule.state(),
            "best": self.best,
            "history": self.history,
            "position": [self.epoch, self.step, self.window],
            "seconds": self.seconds,
            "restarts": self.restarts,
        }

    def resume(self, checkpoints: Checkpoints) -> None:
        """Take up the newest checkpoint that is whole; the first worker chooses."""
        chosen: bytes | None = None
        if self.workers.rank == 0:
            for data in checkpoints.latest():
                try:
                    self._load(data)
                except (DamagedCheckpoint, KeyError, ValueError, RuntimeError):
                    continue  # cut short by a crash, or of an older version: the one before
                chosen = data
                break
        chosen = self.workers.from_first(chosen)
        if chosen is not None:
            self._load(chosen)
            self.restarts += 1

    def _load(self, data: bytes) -> None:
        state = decode(data, self.workers.device)
        self.optimization.load_state(state["optimization"])
        self.schedule.load_state(state["schedule"])
        self.best, self.history = state["best"], state["history"]
        self.epoch, self.step, self.window = state["position"]
        self.seconds, self.restarts = state["seconds"], state["restarts"]
