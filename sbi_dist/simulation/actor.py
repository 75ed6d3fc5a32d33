"""What a simulator actor does: simulate shards, or ranges of their rows, and store the shards.

A plain class; the driver makes Ray actors of it. The rows of a shard go from here to the store,
and only a small record goes back to the driver. Rows that several actors simulated for one shard
travel between them through Ray, never through the driver.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pickle
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from sbi_dist.problem import Problem
from sbi_dist.program import Program
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.isolation import IsolatedCall, resident_bytes
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.plan import Shard
from sbi_dist.simulation.rows import Call, InProcess, never, simulate_shard
from sbi_dist.simulation.shard import ShardRecord, Simulations, concatenate, encode_shard
from sbi_dist.simulator import SimulatorForm
from sbi_dist.store import ObjectStore

__all__ = ["Answer", "Piece", "SimulatorActor"]

# An actor whose simulator leaks is replaced when it holds this part of its share of the memory.
_FAIR_PART = 0.8


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of a shard: what an actor is given to simulate."""

    shard: Shard
    start: int
    stop: int
    isolate: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is all of its shard."""
        return self.start == 0 and self.stop == self.shard.size

    def __len__(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the driver is told of a piece.

    Attributes:
        stored: shards that are in the store since the last answer: record, and whether another
            driver stored it.
        reached: row of the piece's shard up to which rows were simulated and kept for the piece.
        seconds: time that the call took.
        held_bytes: memory that the actor holds.
        too_large: whether it should be replaced for that.
    """

    stored: list[tuple[ShardRecord, bool]]
    reached: int
    seconds: float
    held_bytes: int
    too_large: bool


class SimulatorActor:
    """Simulates pieces of one dataset.

    Args:
        problem: pickled problem.
        simulator: pickled simulator, for child processes.
        form: the simulator's form, found by the driver.
        store: the dataset's folder.
        about: what every shard's metadata says.
        options: options of the stage.
    """

    def __init__(
        self,
        problem: bytes,
        simulator: bytes,
        form: SimulatorForm,
        store: ObjectStore,
        about: dict[str, Any],
        options: SimulateOptions,
    ) -> None:
        import torch

        # One simulation must not use the cores of the actors beside it.
        torch.set_num_threads(max(1, int(options.cpus_per_actor)))
        self._problem: Problem = pickle.loads(problem)
        self._form, self._about, self._options = form, about, options
        self._store = store
        self._memory_bytes = _memory_bytes(options)
        self._isolated = IsolatedCall(simulator, options.timeout_s, self._memory_bytes)
        self._plain = InProcess(self._problem.simulator)
        # A program has a process of its own anyway, and minds its time itself.
        self._apart = isinstance(self._problem.simulator, Program)
        if isinstance(self._problem.simulator, Program):
            run = self._problem.simulator.run
            self._plain = InProcess(functools.partial(run, timeout_s=options.timeout_s))
        # A shard is written while the next one is simulated.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sbi-dist-put")
        self._writing: Future[tuple[ShardRecord, bool]] | None = None
        # What became of the last piece, for the driver that cut it short.
        self._last: tuple[Piece, Answer, Simulations | None] | None = None

    def ready(self) -> tuple[int, str]:
        """Process id and node, once the problem is loaded."""
        import ray

        # Ray ends a worker by SIGTERM, which it makes a SystemExit in whatever runs: a row would
        # be taken for one that the simulator ended, and stored.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def simulate(self, piece: Piece) -> tuple[Answer, Simulations | None]:
        """Simulate a piece.

        A whole shard is put into the store, and told of in the answer to the next call or to
        :meth:`flush`. The rows of a part of one are returned. Both end early when Ray cancels the
        call, whose answer is then had from :meth:`surrender`.
        """
        began = time.perf_counter()
        self._last = None
        shard, rows = piece.shard, None
        if piece.whole and self._store.exists(shard.key):
            # By another driver, or by an actor that died before it could say so.
            stored = [*self._landed(), (self._record(shard), True)]
            answer = self._answer(stored, shard.size, began)
        else:
            rows = self._simulate(piece, self._cancelled())
            reached = piece.start + len(rows)
            stored = self._landed()
            if piece.whole and reached == piece.stop:
                self._writing = self._writer.submit(self._put, shard, rows)
                rows = None
            answer = self._answer(stored, reached, began)
        self._last = piece, answer, rows
        return answer, rows

    def surrender(self, piece: Piece) -> tuple[Answer, Simulations | None]:
        """What the last call of :meth:`simulate` would have answered, had it not been cancelled."""
        if self._last is not None and self._last[0] == piece:
            return self._last[1:]
        return self._answer([], piece.start, time.perf_counter()), None

    def flush(self) -> Answer:
        """Wait for what is being written."""
        began = time.perf_counter()
        return self._answer(self._landed(), 0, began)

    def assemble(self, shard: Shard, *parts: Simulations) -> Answer:
        """Store a shard whose rows come in parts, in order."""
        began = time.perf_counter()
        return self._answer([self._put(shard, concatenate(parts))], 0, began)

    def _simulate(self, piece: Piece, interrupted: Callable[[], bool]) -> Simulations:
        isolate = not self._apart and (piece.isolate or self._options.timeout_s is not None)
        call: Call = self._isolated if isolate else self._plain
        return simulate_shard(
            self._problem,
            self._form,
            piece.shard,
            self._options.seed,
            call,
            self._options.batch_size,
            piece.start,
            piece.stop,
            interrupted,
            self._options.purpose,
        )

    def _cancelled(self) -> Callable[[], bool]:
        import ray

        try:
            return ray.get_runtime_context().is_canceled
        except Exception:  # not in an actor
            return never

    def _put(self, shard: Shard, rows: Simulations) -> tuple[ShardRecord, bool]:
        data, record = encode_shard(rows, {**self._about, "shard": shard.index})
        if self._store.put_if_absent(shard.key, data, sync=False):
            return record, False
        return self._record(shard), True

    def _landed(self) -> list[tuple[ShardRecord, bool]]:
        """The shard that was being written, once it is in the store."""
        if self._writing is None:
            return []
        writing, self._writing = self._writing, None
        return [writing.result()]

    def _answer(self, stored: list[tuple[ShardRecord, bool]], reached: int, began: float) -> Answer:
        held = resident_bytes()
        too_large = held > self._memory_bytes
        return Answer(stored, reached, time.perf_counter() - began, held, too_large)

    def _record(self, shard: Shard) -> ShardRecord:
        return Dataset(self._store).record(shard.index)


def _memory_bytes(options: SimulateOptions) -> int:
    """Most memory that an actor may hold: what was asked for, or its CPUs' share of the node's."""
    if options.memory_per_actor_gb is not None:
        return int(options.memory_per_actor_gb * 1e9)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Of a container, the limit of its control group.
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            total = min(total, int(file.read()))
    return int(
        _FAIR_PART * total * min(1.0, max(1.0, options.cpus_per_actor) / (os.cpu_count() or 1))
    )
