"""Checkpoints of a training: bytes that prove themselves whole, and where they go.

A checkpoint is what ``torch.save`` makes of plain tensors, numbers and strings, behind a checksum;
it is read without running code from it. What is in one is the training's matter (``loop.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from sbi_dist.estimation.options import TrainOptions
from sbi_dist.store import ObjectStore

__all__ = ["Checkpoints", "DamagedCheckpoint", "decode", "encode", "stored_checkpoints"]

_MAGIC = b"sbi_dist checkpoint 1\n"
_DIGEST = hashlib.sha256().digest_size


class DamagedCheckpoint(Exception):
    """Bytes that are no checkpoint, or not all of one."""


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where a training's checkpoints go and come from.

    Attributes:
        save: keeps a checkpoint of a step; may return before it is stored.
        latest: the stored checkpoints, the newest first.
        every_s: seconds between checkpoints.
        every_epochs: epochs between checkpoints; None goes by the seconds alone.
        flush: returns when all that was saved is stored.
    """

    save: Callable[[int, bytes], None]
    latest: Callable[[], Iterable[bytes]]
    every_s: float
    every_epochs: int | None = None
    flush: Callable[[], None] = lambda: None


def encode(state: dict[str, Any]) -> bytes:
    """A state of tensors, numbers, strings, lists and dictionaries as bytes."""
    sink = io.BytesIO()
    torch.save(state, sink)
    content = sink.getvalue()
    return _MAGIC + hashlib.sha256(content).digest() + content


def decode(data: bytes, device: torch.device) -> dict[str, Any]:
    """The state, its tensors on ``device``.

    Raises:
        DamagedCheckpoint: the bytes are not what was written, or hold more than plain data.
    """
    start = len(_MAGIC) + _DIGEST
    content = data[start:]
    if (
        data[: len(_MAGIC)] != _MAGIC
        or hashlib.sha256(content).digest() != data[len(_MAGIC) : start]
    ):
        raise DamagedCheckpoint("it is cut short or changed")
    try:
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise DamagedCheckpoint("it holds more than plain data") from error


@contextlib.contextmanager
def stored_checkpoints(model: ObjectStore, options: TrainOptions) -> Iterator[Checkpoints]:
    """Checkpoints in a model's folder, written while the training goes on, one at a time."""
    writer = ThreadPoolExecutor(max_workers=1)
    pending: list[Future[None]] = []

    def keys() -> list[str]:
        return sorted(model.list("checkpoints/"), reverse=True)

    def latest() -> Iterator[bytes]:
        for key in keys():
            with contextlib.suppress(KeyError):  # removed since it was listed
                yield model.get(key)

    def write(step: int, data: bytes) -> None:
        model.put(f"checkpoints/step-{step:012d}.pt", data)
        for key in keys()[options.checkpoints_kept :]:
            model.delete(key)

    def flush() -> None:
        while pending:
            pending.pop().result()

    def save(step: int, data: bytes) -> None:
        flush()
        pending.append(writer.submit(write, step, data))

    try:
        yield Checkpoints(
            save,
            latest,
            options.checkpoint_every_s,
            options.checkpoint_every_epochs,
            flush,
        )
    finally:
        writer.shutdown(wait=True, cancel_futures=True)
