"""How work on B observations x K draws each is cut into jobs and tiles, and spread over threads.

A job is what a thread takes: some observations, whose conditions are computed once, and a range of
their draws. It goes through the flow in tiles, whose memory stays in a core's cache. Both have
about the same number of draws whether there is one observation or a million, so that time and
memory of a draw are the same.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch

__all__ = ["APART", "MOST_DRAWS", "Job", "in_threads", "jobs", "tile_shape", "tiles"]

MOST_DRAWS = 32_768  # of a job
# Draws of an observation from which on its tiles are its own. They have operations of their own,
# which round differently, so that the choice must not depend on the other observations.
APART = 512
# Observations that share a tile are its last dimension: loops over fewer are too short.
_FEW = 16
T = TypeVar("T")


class Job(NamedTuple):
    """Observations, and which of their draws: ranges of the whole."""

    rows: slice
    draws: slice


def jobs(
    observations: int, draws: int, most_rows: int, most_draws: int = MOST_DRAWS
) -> Iterator[Job]:
    """Cut all of it into jobs, of at most ``most_rows`` observations and so many draws in all.

    Where one would do, or a few, these are a multiple of four: threads then end together.
    """
    most_rows = max(1, min(most_rows, most_draws // max(1, draws)))
    rows, each = observations, draws
    if observations * draws > most_draws // 2 or observations > most_rows:
        rows = _shared(observations, most_rows)
        if observations < 4:
            # Not so short that they, or the last of them, would no longer be drawn apart.
            longest = -(-draws // max(1, draws // (2 * APART)))
            each = max(_shared(draws, most_draws), longest)
    each = min(max(1, each), most_draws)
    for start in range(0, observations, max(1, rows)):
        for first in range(0, draws, each):
            yield Job(
                slice(start, min(start + rows, observations)),
                slice(first, min(first + each, draws)),
            )


def _shared(total: int, most: int) -> int:
    """Size of parts of at most ``most`` whose number is about a multiple of four."""
    number = max(1, -(-total // most))
    return max(1, -(-total // (number + -number % 4)))


def tile_shape(observations: int, draws: int, columns: int) -> tuple[int, int]:
    """Draws and observations of a tile of about so many columns in all."""
    if draws >= APART:
        observations = 1
    else:
        observations = min(observations, max(_FEW, columns // draws))
    return _even(draws, min(draws, max(1, columns // observations))), observations


def _even(total: int, most: int) -> int:
    """The least size with which parts of ``total`` are as few as with ``most``."""
    return -(-total // -(-total // most))


def tiles(observations: int, draws: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of draws and of observations that cover all of a job."""
    each, rows = tile_shape(observations, draws, columns)
    rows = _even(observations, rows)
    for start in range(0, observations, rows):
        for first in range(0, draws, each):
            yield (
                slice(first, min(first + each, draws)),
                slice(start, min(start + rows, observations)),
            )


def in_threads(work: Callable[[T], None], items: Iterable[T], threads: int) -> None:
    """Do the work on every item. Each thread takes the next one when it is done with one.

    torch's own threads would divide each of many small operations; these divide the draws. When one
    fails, or this call is interrupted, none begins another item.
    """
    if threads <= 1:
        with _one_thread_each():
            for item in items:
                work(item)
        return
    queue, lock, stop = iter(items), threading.Lock(), threading.Event()

    def drain() -> None:
        torch.set_num_threads(1)  # BLAS takes the number of the thread that it is called from
        while not stop.is_set():
            with lock:
                item = next(queue, None)
            if item is None:
                return
            try:
                work(item)
            except BaseException:
                stop.set()
                raise

    with _one_thread_each(), ThreadPoolExecutor(threads, "sbi-dist-draw") as pool:
        try:
            for future in [pool.submit(drain) for _ in range(threads)]:
                future.result()
        finally:
            stop.set()


_using = 0
_threads_before = 1
_counting = threading.Lock()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """torch's own threads off, until the last of several users at once is done."""
    global _using, _threads_before
    with _counting:
        if _using == 0:
            _threads_before = torch.get_num_threads()
        torch.set_num_threads(1)  # also where another thread did: BLAS has a number for each
        _using += 1
    try:
        yield
    finally:
        with _counting:
            _using -= 1
            if _using == 0:
                torch.set_num_threads(_threads_before)
