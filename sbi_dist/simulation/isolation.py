"""Call a simulator in a child process that may hang or crash without taking this one with it.

The child is forked from a clean server process that has imported what a simulator needs, so that
replacing a dead one takes milliseconds. :func:`forked` runs one function in a fork of this
process, for the driver, which has not started Ray yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

from sbi_dist.simulation.rows import Failure, InProcess, Keep
from sbi_dist.simulator import SimulatorForm

__all__ = ["Crashed", "IsolatedCall", "TimedOut", "forked", "resident_bytes"]

# How often the memory of a running child is looked at.
_LOOK_EVERY_S = 0.1
_START_S = 120.0

Result = TypeVar("Result")


class Crashed(Exception):
    """A child process that ended without a result; says how."""


class TimedOut(Exception):
    """A child process that took too long."""


def resident_bytes(pid: int | str = "self") -> int:
    """Memory that a process holds, in bytes; 0 where it is gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0


class IsolatedCall:
    """A :class:`~sbi_dist.simulation.rows.Call` in a process of its own, with limits.

    Args:
        payload: the pickled simulator.
        timeout_s: longest that one call may take, in seconds; None for no limit.
        memory_bytes: most memory that the process may hold; None for no limit.
    """

    def __init__(
        self, payload: bytes, timeout_s: float | None, memory_bytes: int | None = None
    ) -> None:
        self._payload, self._timeout_s, self._memory_bytes = payload, timeout_s, memory_bytes
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["sbi_dist.simulation.isolation", "ray.cloudpickle"])
        self._child: Any = None
        self._pipe: Connection | None = None
        self._looked = 0.0

    def batch(
        self, form: SimulatorForm, theta: np.ndarray, stream: np.random.SeedSequence
    ) -> tuple[np.ndarray | Failure, float]:
        fresh = self._pipe is None
        pipe = self._started()
        started = time.perf_counter()
        value = self._receive(lambda: pipe.send(("batch", form, theta, stream)), started)
        if isinstance(value, _Grown) and not fresh:
            return self.batch(form, theta, stream)
        if isinstance(value, tuple) and len(value) == 3:
            return value[1], value[2]
        return self._failure(value), time.perf_counter() - started

    def rows(self, form: SimulatorForm, theta: np.ndarray, keys: np.ndarray, keep: Keep) -> None:
        row = 0
        while row < len(theta):
            fresh = self._pipe is None
            pipe = self._started()
            began = row
            started = time.perf_counter()
            send: Callable[[], None] | None = _sender(pipe, ("rows", form, theta[row:], keys[row:]))
            while row < len(theta):
                value = self._receive(send, started)
                send = None
                if isinstance(value, tuple) and len(value) == 3:
                    going = keep(row, value[1], value[2])
                elif isinstance(value, _Grown) and not (fresh and row == began):
                    break  # once more, in a process that holds nothing yet
                else:
                    going = keep(row, self._failure(value), time.perf_counter() - started)
                row += 1
                started = time.perf_counter()
                if self._grown() is not None:
                    self.close()  # between two rows; neither is to blame
                if not going:
                    # It works on rows that nobody wants any more.
                    self.close()
                    return
                if self._pipe is None:
                    break

    def _started(self) -> Connection:
        if self._pipe is not None and self._child.is_alive():
            return self._pipe
        self.close()
        ours, theirs = self._context.Pipe()
        self._child = self._context.Process(
            target=_serve, args=(theirs, self._payload), daemon=True
        )
        self._child.start()
        theirs.close()
        # Loading the simulator is not the simulation's time.
        try:
            if not ours.poll(_START_S) or ours.recv() != "ready":
                raise RuntimeError("the simulator could not be loaded in a child process")
        except EOFError:
            raise RuntimeError("the simulator's process ended while it was loaded") from None
        self._pipe = ours
        return ours

    def _receive(self, send: Callable[[], None] | None, started: float) -> Any:
        """The child's next answer, or what became of the child."""
        pipe = self._pipe
        assert pipe is not None
        limit = float("inf") if self._timeout_s is None else started + self._timeout_s
        try:
            if send is not None:
                send()
            while True:
                wait = min(limit - time.perf_counter(), _LOOK_EVERY_S)
                if pipe.poll(max(wait, 0.0)):
                    return pipe.recv()
                if time.perf_counter() >= limit:
                    self.close()
                    return TimedOut(f"took longer than timeout_s={self._timeout_s:g} s")
                grown = self._grown()
                if grown is not None:
                    self.close()
                    return grown
        except (EOFError, OSError):  # also in the middle of an answer
            self._child.join(5)
            reason = _exit_reason(self._child.exitcode)
            self.close()
            return Crashed(f"the simulator's process ended ({reason})")

    def _grown(self) -> _Grown | None:
        """Whether the child holds too much memory; looks every now and then."""
        now = time.perf_counter()
        if self._memory_bytes is None or now - self._looked < _LOOK_EVERY_S or self._pipe is None:
            return None
        self._looked = now
        held = resident_bytes(self._child.pid)
        if held <= self._memory_bytes:
            return None
        return _Grown(
            f"the simulator's process held {held / 1e9:.3g} GB, more than "
            f"{self._memory_bytes / 1e9:.3g} GB (simulate.memory_per_actor_gb)"
        )

    @staticmethod
    def _failure(what: Exception) -> Failure:
        return "timeout" if isinstance(what, TimedOut) else "crashed", str(what)

    def close(self) -> None:
        """Kill the child process, if there is one."""
        if self._child is not None and self._child.is_alive():
            self._child.kill()
            self._child.join(5)
        if self._pipe is not None:
            self._pipe.close()
        self._child = self._pipe = None


class _Grown(Crashed):
    """The child was ended since it held too much memory."""


def _sender(pipe: Connection, message: Any) -> Callable[[], None]:
    return lambda: pipe.send(message)


def _exit_reason(code: int | None) -> str:
    if code is None:
        return "unknown reason"
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"


def _die_with_parent() -> None:
    # When the parent is killed, this process must not live on in a hung simulator.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _serve(pipe: Connection, payload: bytes) -> None:
    # The parent of this process is the fork server, which ends with the process that started it,
    # but not while one of its forks holds this end of their pipe.
    server: Any = forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None
    _die_with_parent()
    import torch

    torch.set_num_threads(1)
    call = InProcess(pickle.loads(payload))
    # A row is told of as soon as it is done: the next one may end this process.
    call.block = 1

    def answer(row: int, outcome: Any, seconds: float) -> bool:
        pipe.send((row, outcome, seconds))
        return True

    pipe.send("ready")
    while True:
        try:
            kind, form, theta, streams = pipe.recv()
        except EOFError:
            return
        if kind == "rows":
            call.rows(form, theta, streams, answer)
        else:
            answer(0, *call.batch(form, theta, streams))


def forked(function: Callable[[], Result], limit_s: float | None = None) -> Result:
    """What a function returns, or raises, in a fork of this process.

    For a process with one thread: a fork has no other threads, but may have the locks they held.

    Raises:
        Crashed: the fork ended without a result.
        TimedOut: it took longer than ``limit_s``.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, function), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(limit_s):
            raise TimedOut(f"took longer than {limit_s:g} s")
        raised, value = ours.recv()
    except EOFError:
        child.join(5)
        raise Crashed(f"the process ended ({_exit_reason(child.exitcode)})") from None
    finally:
        if child.is_alive():
            child.kill()
        child.join(5)
        ours.close()
    if raised:
        raise value
    return value


def _answer(pipe: Connection, function: Callable[[], Any]) -> None:
    _die_with_parent()
    # The parent's handlers are not for this process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        answer = (False, function())
    except Exception as error:
        answer = (True, error)
    with contextlib.suppress(BrokenPipeError):
        pipe.send(answer)
        pipe.close()
    # Without the parent's clean-up at exit.
    os._exit(0)
