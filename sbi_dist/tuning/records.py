"""What is kept of a search's trials in the store.

``tune/<search>/trial-<id>.json`` is written once when a trial ends; ``<id>/validation.npy`` holds
the loss of single held-out simulations for a trial that was trained to its end, and
``<id>/checkpoints/`` is there while a trial runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from sbi_dist.store import ObjectStore

__all__ = [
    "FAILED",
    "FINISHED",
    "STOPPED",
    "TrialRecord",
    "keep_records",
    "read_losses",
    "read_records",
    "save_losses",
    "save_record",
    "tidy",
]

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
_LOSSES = "validation.npy"


@dataclasses.dataclass(frozen=True)
class TrialRecord:
    """How a trial ended.

    Attributes:
        trial: its id.
        settings: what differs from the train section.
        status: ``finished``; ``stopped``, for its loss; or ``failed``.
        reason: why it failed.
        again: whether it is worth another attempt, as the reason may lie outside its settings.
        loss: best validation loss in nats; None where there is none.
        epochs, seconds: how long it was trained.
        weights: trainable numbers of the estimator.
        held_out: simulations that the loss is the mean of.
        validation_loss: by epoch, from that before the first step on; None: not a finite number.
    """

    trial: str
    settings: dict[str, Any]
    status: str
    reason: str = ""
    again: bool = False
    loss: float | None = None
    epochs: int = 0
    seconds: float = 0.0
    weights: int = 0
    held_out: int = 0
    validation_loss: list[float | None] = dataclasses.field(default_factory=list)

    def best_until(self) -> list[float]:
        """The best validation loss of the epochs up to each one."""
        finite = [math.inf if loss is None else loss for loss in self.validation_loss]
        return [float(loss) for loss in np.minimum.accumulate(finite)] if finite else []


def save_record(search: ObjectStore, record: TrialRecord) -> bool:
    """Keep a record unless the trial has one; whether this call did."""
    text = json.dumps(dataclasses.asdict(record), indent=2)
    return search.put_if_absent(_key(record.trial), text.encode())


def read_records(search: ObjectStore, trials: Iterable[str]) -> dict[str, TrialRecord]:
    """The records of those of the trials that have ended, by the trials' ids."""
    there = set(search.list("trial-"))
    found = {}
    for trial in trials:
        if _key(trial) in there:
            # One of another version is as good as none.
            with contextlib.suppress(KeyError, TypeError, ValueError):
                found[trial] = TrialRecord(**json.loads(search.get(_key(trial))))
    return found


def keep_records(search: ObjectStore, trials: Iterable[str]) -> dict[str, TrialRecord]:
    """The records of trials that have ended for good; those of the others are removed."""
    chosen = list(trials)
    found = read_records(search, chosen)
    kept = {trial: record for trial, record in found.items() if not record.again}
    there = set(search.list("trial-"))
    for trial in chosen:
        if trial not in kept and _key(trial) in there:
            search.delete(_key(trial))
    return kept


def save_losses(search: ObjectStore, trial: str, losses: np.ndarray) -> None:
    """Keep the losses of single held-out simulations: float32 (n,), the same ones of all trials."""
    sink = io.BytesIO()
    np.save(sink, losses.astype(np.float32))
    search.put(f"{trial}/{_LOSSES}", sink.getvalue())


def read_losses(search: ObjectStore, trial: str) -> np.ndarray | None:
    """What :func:`save_losses` kept, or None."""
    try:
        content = search.get(f"{trial}/{_LOSSES}")
        return np.load(io.BytesIO(content), allow_pickle=False).astype(np.float64)
    except (KeyError, ValueError):
        return None


def tidy(search: ObjectStore, trials: Collection[str]) -> None:
    """Remove the checkpoints of trials that have ended."""
    # One listing for all of them; for a single one, of its own.
    prefix = f"{next(iter(trials))}/" if len(trials) == 1 else ""
    for key in list(search.list(prefix)):
        trial, _, rest = key.partition("/")
        if trial in trials and rest.startswith("checkpoints/"):
            search.delete(key)


def _key(trial: str) -> str:
    return f"trial-{trial}.json"
