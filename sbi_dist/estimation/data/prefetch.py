"""Items that a thread makes while its caller uses the ones before."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["Prefetch", "Stopped"]

Item = TypeVar("Item")


class Stopped(Exception):
    """Raised in the thread: nobody wants its items any more."""


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _End:
    pass


class Prefetch(Generic[Item]):
    """Iterate over items of which two are alive at a time, the caller's and the next.

    Args:
        make: a generator of the items, run in the thread. Between steps of its work it calls its
            argument, which raises :class:`Stopped` once this was closed.

    The caller calls ``let_go`` when it uses an item no more; without it no third one is made. What
    ``make`` raises is raised by ``next``.
    """

    def __init__(self, make: Callable[[Callable[[], None]], Iterator[Item]]) -> None:
        self._items: queue.SimpleQueue[Item | _Failure | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(2)
        stop = threading.Event()
        thread = threading.Thread(
            target=_work,
            args=(make, self._items, self._room, stop),
            name="sbi-dist-prefetch",
            daemon=True,
        )
        # Also at the interpreter's exit, which must not find the thread at work.
        self._close = weakref.finalize(self, _end, stop, self._room, thread)
        thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        item = self._items.get()
        if isinstance(item, _End):
            self._items.put(item)
            raise StopIteration
        if isinstance(item, _Failure):
            self._items.put(item)
            raise item.error
        return item

    def let_go(self) -> None:
        """One item less is in use."""
        self._room.release()

    def close(self) -> None:
        """End the thread and wait for it; may be called again."""
        self._close()


def _work(
    make: Callable[[Callable[[], None]], Iterator[Item]],
    items: queue.SimpleQueue[Item | _Failure | _End],
    room: threading.Semaphore,
    stop: threading.Event,
) -> None:
    def look() -> None:
        if stop.is_set():
            raise Stopped

    try:
        made = make(look)
        while True:
            room.acquire()
            look()
            # Not kept in a variable, which would keep it alive here.
            items.put(next(made))
    except StopIteration:
        items.put(_End())
    except Stopped:
        items.put(_End())
    except BaseException as error:
        items.put(_Failure(error))


def _end(stop: threading.Event, room: threading.Semaphore, thread: threading.Thread) -> None:
    stop.set()
    room.release()
    if thread is not threading.current_thread():
        thread.join()
