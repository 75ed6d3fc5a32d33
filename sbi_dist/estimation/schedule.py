"""How large each step is, and when to stop: functions of the step and of the validation losses.

No clock enters here, so that a run that goes on from a checkpoint decides as one that was never
stopped.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sbi_dist.estimation.options import TrainOptions

__all__ = ["Schedule", "batch_size_for"]

_PEAK = {"average": 4e-3, "plateau": 5e-4, "cosine": 5e-4}
_LOWER = 0.3  # factor of the learning rate at a plateau
_WARM_UP_STEPS = 50
_LEVEL_STEPS = 5000  # steps before the rate falls as one over the root of their number
_REACH = 10.0  # the average is over about the last 1/11 of all steps
_LEAST_GAIN = 0.002  # nats; less is not worth more epochs
# Epochs, part of the epochs so far, and steps: with few simulations, several epochs go by before
# the first gain where x tells of theta by its square only (slcp, say).
_PATIENCE, _PATIENT_PART, _PATIENT_STEPS = 5, 0.25, 100


def batch_size_for(options: TrainOptions, training: int) -> int:
    """Simulations of a step, for a number of training simulations."""
    return min(options.batch_size or min(max(200, training // 200), 1000), training)


class Schedule:
    """Learning rate, weight of the average, and end of a training.

    Args:
        options: the stage's options.
        steps: steps of an epoch.
        loss: validation loss before the first step.

    Attributes:
        rate: learning rate of the last step.
        peak: the highest one from now on.
        finished: whether to stop.
    """

    def __init__(self, options: TrainOptions, steps: int, loss: float) -> None:
        self.options, self.steps = options, steps
        self.peak = options.learning_rate or _PEAK[options.schedule]
        self.rate, self.finished = 0.0, False
        self._taken, self._epochs, self._waited, self._lowered = 0, 0, 0, 0
        self._best = loss

    @property
    def may_end_early(self) -> bool:
        """Whether the validation losses decide when to stop."""
        return self.options.schedule != "cosine"

    def step(self) -> tuple[float, float]:
        """Learning rate of the next step, and part of its weights in the average."""
        factor = min(1.0, (self._taken + 1) / _WARM_UP_STEPS)
        if self.options.schedule == "cosine":
            part = self._taken / (self.options.max_epochs * self.steps)
            factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, part)))
        elif self.options.schedule == "average":
            factor /= math.sqrt(max(1.0, self._taken / _LEVEL_STEPS))
        self.rate = self.peak * factor
        self._taken += 1
        # The average reaches back over a fixed part of all steps so far. Its form and that of the
        # rate are Karras et al.'s (2024, arXiv:2312.02696).
        return self.rate, (1 + _REACH) / (self._taken + _REACH)

    def after_epoch(self, loss: float) -> bool:
        """Take note of a validation loss; whether to go back to the best weights."""
        self._epochs += 1
        back = False
        least = _LEAST_GAIN if self.options.schedule == "average" else 0.0
        if loss < self._best - least:
            self._best, self._waited = loss, 0
        else:
            self._waited += 1
        if self._waited >= self._patience():
            if self.options.schedule == "plateau":
                back = True
                self._waited = 0
                self._lowered += 1
                self.peak *= _LOWER
            self.finished = self.options.schedule == "average" or (
                self._lowered > self.options.decays
            )
        self.finished = self.finished or self._epochs >= self.options.max_epochs
        return back

    def _patience(self) -> float:
        if self.options.schedule == "cosine":
            return math.inf
        if self.options.patience is not None:
            return self.options.patience
        if self.options.schedule == "plateau":
            return float(np.clip(round(300 / self.steps), 3, 5))
        return max(_PATIENCE, _PATIENT_PART * self._epochs, math.ceil(_PATIENT_STEPS / self.steps))

    def lower(self) -> None:
        """Lower the learning rate after a loss that was no number, whose epoch does not count."""
        self.peak *= _LOWER
        self._waited = -1

    def most_steps_left(self) -> int:
        """Steps to the end at the latest."""
        return max(0, self.options.max_epochs * self.steps - self._taken)

    def state(self) -> dict[str, Any]:
        """All that the next decisions depend on."""
        names = ("peak", "rate", "finished", "_taken", "_epochs", "_waited", "_lowered", "_best")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a state."""
        for name, value in state.items():
            setattr(self, name, value)
