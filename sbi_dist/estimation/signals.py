"""What others ask of a training while it runs: a checkpoint, an end after the epoch, or to leave.

Here are the requests, and how workers hear of them: from objects in the model's folder, and from
whoever knows that a machine is about to be taken away. What follows from one is the loop's matter.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from sbi_dist.store import ObjectStore

__all__ = [
    "CHECKPOINT",
    "FINISH",
    "LEAVE",
    "NOTHING",
    "PAUSE",
    "STOP",
    "TOGETHER",
    "Asked",
    "Leave",
    "Signals",
    "Silence",
]

STOP, PAUSE = "stop", "pause"
_POLL_S, _POLL_BUCKET_S = 0.5, 1.0  # where each look is a file's, or a request to a bucket
_LOOK_TOGETHER_S = 2.0  # takes all workers some 10 ms

NOTHING, CHECKPOINT, FINISH, LEAVE, TOGETHER = range(5)


class Signals(Protocol):
    """What others ask of a training while it runs."""

    def wanted(self) -> int:
        """Asked of the first worker before each step: one of

        NOTHING; CHECKPOINT, save one and go on; FINISH, end after this epoch; LEAVE, save one and
        stop; TOGETHER, call ``together`` on all workers.
        """
        ...

    def together(self) -> int:
        """NOTHING or CHECKPOINT, the same on all workers."""
        ...


class Silence:
    """Nobody asks for anything."""

    def wanted(self) -> int:
        return NOTHING

    def together(self) -> int:
        return NOTHING


class Leave(Exception):
    """The training was asked to stop; it goes on from its last checkpoint."""


class Asked:
    """What others ask of a training, read from the store in a thread of its own.

    Args:
        model: folder in which an object ``pause`` asks for a checkpoint and the end of the job.
        stop: folder in which an object ``stop`` asks for the end of the training after its epoch.
        first: whether this is the worker of rank 0, which alone looks.
        going: called on all workers together: whether a machine of theirs is about to be taken
            away; None where nobody tells of that.
    """

    def __init__(
        self,
        model: ObjectStore,
        stop: ObjectStore | None,
        first: bool,
        going: Callable[[], bool] | None,
    ) -> None:
        self._model, self._stop, self._first, self._going = model, stop, first, going
        self._wanted, self._looked, self._told = NOTHING, time.monotonic(), False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Asked:
        if self._first:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        if self._first:
            self._thread.join(5.0)

    def _poll(self) -> None:
        every_s = _POLL_BUCKET_S if self._model.uri.startswith("s3://") else _POLL_S
        while not self._over.wait(every_s):
            with contextlib.suppress(Exception):  # the store is away; it is asked again
                if self._model.exists(PAUSE):
                    self._wanted = LEAVE
                elif self._stop is not None and self._stop.exists(STOP):
                    self._wanted = FINISH

    def wanted(self) -> int:
        if self._wanted == NOTHING and self._going is not None:
            now = time.monotonic()
            if now - self._looked >= _LOOK_TOGETHER_S:
                self._looked = now
                return TOGETHER
        return self._wanted

    def together(self) -> int:
        """CHECKPOINT once, when a node of the job is about to be taken away."""
        if self._going is None or not self._going() or self._told:
            return NOTHING
        self._told = True
        return CHECKPOINT
