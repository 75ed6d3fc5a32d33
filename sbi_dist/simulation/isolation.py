"""Call a simulator in a child process that may hang or crash without taking this one with it.

The child is forked from a clean server process that has imported what a simulator needs, so that
replacing a dead one takes milliseconds.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import pickle
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from sbi_dist.simulation.rows import Outcome, in_process
from sbi_dist.simulator import SimulatorForm

__all__ = ["IsolatedCall"]


class IsolatedCall:
    """A :class:`~sbi_dist.simulation.rows.Call` with a time limit and a process of its own.

    Args:
        payload: the pickled simulator.
        timeout_s: longest that one call may take, in seconds; None for no limit.
    """

    def __init__(self, payload: bytes, timeout_s: float | None) -> None:
        self._payload, self._timeout_s = payload, timeout_s
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["sbi_dist.simulation.isolation"])
        self._child: Any = None
        self._pipe: Connection | None = None

    def _start(self) -> Connection:
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
        if not ours.poll(120) or ours.recv() != "ready":
            raise RuntimeError("the simulator could not be loaded in a child process")
        self._pipe = ours
        return ours

    def __call__(self, form: SimulatorForm, theta: np.ndarray, stream: Any) -> Outcome:
        pipe = self._start()
        started = time.perf_counter()
        try:
            pipe.send((form, theta, stream))
            if pipe.poll(self._timeout_s):
                return pipe.recv()
        except (EOFError, ConnectionError, BrokenPipeError):
            seconds = time.perf_counter() - started
            self._child.join(5)
            reason = _exit_reason(self._child.exitcode)
            self.close()
            return ("crashed", f"the simulator's process ended ({reason})"), seconds
        seconds = time.perf_counter() - started
        self.close()
        return ("timeout", f"took longer than timeout_s={self._timeout_s:g} s"), seconds

    def close(self) -> None:
        """Kill the child process, if there is one."""
        if self._child is not None and self._child.is_alive():
            self._child.kill()
            self._child.join(5)
        if self._pipe is not None:
            self._pipe.close()
        self._child = self._pipe = None


def _exit_reason(code: int | None) -> str:
    if code is None:
        return "unknown reason"
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"


def _serve(pipe: Connection, payload: bytes) -> None:
    # When the parent is killed, this process must not live on in a hung simulator.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    import torch

    torch.set_num_threads(1)
    run = in_process(pickle.loads(payload))
    pipe.send("ready")
    while True:
        try:
            form, theta, stream = pipe.recv()
        except EOFError:
            return
        pipe.send(run(form, theta, stream))
