"""How a training stands at one moment, as its workers tell it and as it is read again."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

__all__ = ["METRICS", "NOW", "Snapshot"]

METRICS = "metrics.json"  # the history of a training, in its model's folder
NOW = "now"  # the snapshot's place beside the history


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The state of a training, of plain numbers and text.

    Attributes:
        epoch: the epoch's number, from 1.
        step, steps: steps of this epoch that were taken, and of an epoch in all.
        max_epochs: the largest number of epochs.
        training_loss: mean of the epoch so far, in nats; None before the first.
        validation_loss: of the last epoch that ended, in nats.
        best_validation_loss, best_epoch: the lowest one, and its epoch.
        learning_rate: of the last step.
        simulations_per_second: by all workers together.
        seconds: of training so far, all attempts together.
        seconds_left: None where it is not known.
        seconds_left_at_most: whether the training may well end earlier than that.
        workers, device: how many train, and what each computes on.
        data: where their simulations are: ``memory``, ``device`` or ``streamed``.
        input_wait: by rank, the fraction of the time that the worker waited for simulations.
        input_wait_seconds: by rank, that time itself since the worker was started.
        skipped_steps: steps left out as their loss or gradient was not finite.
        checkpoints: how many this process wrote.
        restarts: how often the training went on after its workers were lost.
        note: what else the user should know.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 0
    max_epochs: int = 0
    training_loss: float | None = None
    validation_loss: float | None = None
    best_validation_loss: float | None = None
    best_epoch: int = 0
    learning_rate: float = 0.0
    simulations_per_second: float = 0.0
    seconds: float = 0.0
    seconds_left: float | None = None
    seconds_left_at_most: bool = False
    workers: int = 1
    device: str = ""
    data: str = ""
    input_wait: list[float] = dataclasses.field(default_factory=list)
    input_wait_seconds: list[float] = dataclasses.field(default_factory=list)
    skipped_steps: int = 0
    checkpoints: int = 0
    restarts: int = 0
    note: str = ""

    @property
    def steps_in_all(self) -> int:
        """Steps since the training began."""
        return max(0, self.epoch - 1) * self.steps + self.step

    @staticmethod
    def read(content: Any) -> Snapshot | None:
        """The snapshot in the content of ``metrics.json``; None where there is nothing to tell.

        Whatever another version wrote there: what is missing or of another kind is left at its
        default. Where there is no snapshot, what the history says is taken.
        """
        if not isinstance(content, dict):
            return None
        told = content.get(NOW)
        if not isinstance(told, dict):
            if not isinstance(content.get("epoch"), list) or not content["epoch"]:
                return None
            told = _of_history(content)
        values = {field.name: _read(field, told.get(field.name)) for field in _FIELDS}
        return Snapshot(**{name: value for name, value in values.items() if value is not None})


_FIELDS = dataclasses.fields(Snapshot)


def _read(field: dataclasses.Field[Any], value: Any) -> Any:
    """The value, or None where it is not of the field's kind."""
    kind = str(field.type)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind.startswith("float"):
        return _as_float(value) if number else None
    if kind.startswith("list"):
        rows = value if isinstance(value, list) else []
        return [math.nan if not isinstance(row, (int, float)) else _as_float(row) for row in rows]
    if kind == "int":
        return int(value) if number and math.isfinite(_as_float(value)) else None
    return value if isinstance(value, {"str": str, "bool": bool}[kind]) else None


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON's integers have no limit
        return math.inf if value > 0 else -math.inf


def _of_history(history: dict[str, Any]) -> dict[str, Any]:
    """What a history without a snapshot says: that of a training that ended, say."""

    def last(name: str) -> Any:
        values = history.get(name)
        return values[-1] if isinstance(values, list) and values else None

    known: dict[str, Any] = {
        **{name: history.get(name) for name in ("best_epoch", "best_validation_loss", "seconds")},
        **{name: last(name) for name in ("epoch", "training_loss", "validation_loss")},
        "learning_rate": last("learning_rate"),
        "skipped_steps": history.get("skipped_steps"),
    }
    seconds, epochs = known["seconds"], known["epoch"]
    size: Any = history.get("training_simulations")
    if all(isinstance(value, (int, float)) for value in (seconds, epochs, size)) and seconds > 0:
        known["simulations_per_second"] = _as_float(size) * _as_float(epochs) / _as_float(seconds)
    return known
