"""TensorBoard's files of a training, in the store.

Each call of ``put`` writes the points since the last one to a further file and never touches an
earlier one: TensorBoard keeps the file it reads open, so that it would not see a replaced one grow,
and it goes on to a newer file as soon as there is one. All files of the folder are one run to it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbi_dist.store import ObjectStore

__all__ = ["FOLDER", "EventFiles"]

FOLDER = "tensorboard"


class EventFiles:
    """Scalars by step, and a table of hyperparameters.

    Args:
        model: the model's folder; files go to ``tensorboard/`` in it.
        first_step: points that earlier files of the folder have at this step and behind it, from
            an attempt that was lost, are hidden by TensorBoard.
        hyperparameters: shown as text.
    """

    def __init__(
        self, model: ObjectStore, first_step: int, hyperparameters: Mapping[str, Any]
    ) -> None:
        self._model, self._first_step = model, first_step
        self._hyperparameters = hyperparameters
        self._points: list[tuple[int, float, dict[str, float]]] = []
        # TensorBoard reads files in the order of their names.
        self._name = f"events.out.tfevents.{time.time():017.6f}.sbi_dist"
        self._written = 0

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Take note of values after a step, but for those that are None."""
        known = {name: value for name, value in values.items() if value is not None}
        if known:
            self._points.append((step, time.time(), known))

    def put(self) -> None:
        """Write what is new to the store, where there is any.

        Raises:
            InputError, StageError: it could not be written; the next call tries again.
            ImportError: tensorboardX is not installed.
        """
        count = len(self._points)
        if not count:
            return
        key = f"{FOLDER}/{self._name}.{self._written:06d}"
        # The same key again after a failure, as the file may be there nonetheless.
        self._model.put(key, self._file(self._points[:count]))
        del self._points[:count]
        self._written += 1

    def _file(self, points: list[tuple[int, float, dict[str, float]]]) -> bytes:
        from tensorboardX import SummaryWriter

        first = self._written == 0
        with tempfile.TemporaryDirectory(prefix="sbi-dist-events-") as folder:
            writer = SummaryWriter(folder, purge_step=self._first_step if first else None)
            if first and self._hyperparameters:
                text = _table(self._hyperparameters)
                writer.add_text("hyperparameters", text, self._first_step)
            for step, when, values in points:
                for name, value in values.items():
                    writer.add_scalar(name, value, step, when)
            writer.close()
            (path,) = Path(folder).iterdir()
            return path.read_bytes()


def _table(values: Mapping[str, Any]) -> str:
    """In Markdown, which TensorBoard renders."""
    rows = [f"| {name} | {value} |" for name, value in values.items()]
    return "\n".join(["| option | value |", "| --- | --- |", *rows])
