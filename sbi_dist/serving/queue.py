"""Work of many requests, computed in batches of bounded cost by one thread.

A request hands in pieces, a few at a time, so that a large one takes turns with the others rather
than its place before them. What a piece is and how pieces are computed is not known here.

- Pieces that may share a call (equal ``key``) form a batch, in the order in which they came.
- A piece whose deadline has come near while it waited goes first, where it can still be met; one
  that came with little time has no place before the others for that.
- A piece whose deadline is past, or whose caller is gone, is dropped before anything is computed.
- A request is turned away at once where it would wait for too long. The wait is what the others
  have before it when all take turns: a small request does not wait for the whole of a large one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sbi_dist.serving.refusal import Refusal

__all__ = ["Batch", "DrawQueue", "Piece", "Ticket"]

_log = logging.getLogger("sbi_dist.serving")

# A batch takes about so long: short, so that small requests need not wait for long ones; and long
# beside what it takes to begin one.
BATCH_S = 0.03
_RATE_WEIGHT = 0.1  # of the newest batch
# So many times as long as a request takes itself, it may wait, if that is longer than others may.
_PATIENCE = 4.0


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request that was let in.

    Attributes:
        remaining: cost of what is not done yet.
        deadline: when it must be done, by ``time.monotonic``.
    """

    remaining: float
    deadline: float


@dataclasses.dataclass(eq=False)
class Piece:
    """A part of a request's work.

    Attributes:
        key: pieces of equal key may be computed in one call.
        cost: about as many draws as take the same time.
        content: what is to be computed.
    """

    ticket: Ticket
    key: Hashable
    cost: float
    content: Any
    done: asyncio.Future[Any] = dataclasses.field(init=False)
    came: float = dataclasses.field(init=False)


@dataclasses.dataclass(frozen=True)
class Batch:
    """What was computed in one call, for the metrics.

    Attributes:
        waited: seconds that each piece had waited for it.
        seconds: that it took.
    """

    key: Hashable
    cost: float
    waited: list[float]
    seconds: float


class DrawQueue:
    """Pieces of work and the thread that computes them.

    Args:
        compute: results of the contents of pieces with one key, an exception in place of a result
            where one piece alone is at fault; called in a thread of the queue's own.
        max_wait_s: expected wait from which on requests are turned away; a large one may wait for
            longer, in proportion to the time that it takes itself.
        max_requests: requests at once.
        rate: cost a second that is expected at first.
        watch: told of every batch.
    """

    def __init__(
        self,
        compute: Callable[[Hashable, list[Any]], Sequence[Any]],
        max_wait_s: float,
        max_requests: int,
        rate: float = 100_000.0,
        watch: Callable[[Batch], None] | None = None,
    ) -> None:
        self._compute, self._watch = compute, watch
        self._max_wait_s, self._max_requests = max_wait_s, max_requests
        self.rate = rate
        self._tickets: set[Ticket] = set()
        self._least_wait: float | None = None  # of the smallest request; None: not known
        self._waiting: list[Piece] = []
        self._computing: list[Piece] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sbi-dist-serve")
        self._came = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to compute; in the loop that pieces will come from."""
        self._runner = asyncio.create_task(self._run())

    async def close(self) -> None:
        """End; what waits fails."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        for piece in (*self._computing, *self._waiting):
            piece.done.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether work that comes will be computed."""
        return self._runner is not None and not self._runner.done()

    @property
    def requests(self) -> int:
        """Requests that were let in and are not done."""
        return len(self._tickets)

    @property
    def queued(self) -> float:
        """Cost of all that was let in and is not done."""
        return sum(ticket.remaining for ticket in self._tickets)

    @property
    def batch_cost(self) -> float:
        """Cost of a batch, and of a large request's pieces."""
        return max(4096.0, self.rate * BATCH_S)

    def wait_s(self, cost: float) -> float:
        """How long a request of this cost is expected to wait for the others."""
        turn = cost + self.batch_cost
        return sum(min(ticket.remaining, turn) for ticket in self._tickets) / self.rate

    def check(self) -> None:
        """Turn a request away of which nothing is known yet; in next to no time.

        Raises:
            Refusal: 503, even the smallest would be too much.
        """
        if self._least_wait is None:
            self._least_wait = self.wait_s(0.0)
        self._check(self._least_wait, 0.0)

    @contextlib.contextmanager
    def admitted(self, cost: float, deadline: float) -> Iterator[Ticket]:
        """Let a request in for the time of a ``with`` block.

        Raises:
            Refusal: 503, there is too much to do.
        """
        wait, now = self.wait_s(cost), time.monotonic()
        self._check(wait, cost)
        if self._tickets and now + wait + min(cost, self.batch_cost) / self.rate > deadline:
            raise Refusal(
                503,
                "Saturated",
                f"the request would wait for about {wait:.1f} s, and its time is up in "
                f"{max(0.0, deadline - now):.1f} s; try again later, or give it more time",
                retry_after=max(1.0, wait),
            )
        ticket = Ticket(cost, deadline)
        self._tickets.add(ticket)
        self._least_wait = None
        try:
            yield ticket
        finally:
            self._tickets.discard(ticket)
            self._least_wait = None

    def _check(self, wait: float, cost: float) -> None:
        if len(self._tickets) >= self._max_requests:
            raise Refusal(
                503,
                "Saturated",
                f"{len(self._tickets):,} requests are being answered, which is as many as a "
                "replica takes; try again later",
                retry_after=max(1.0, wait),
            )
        most = max(self._max_wait_s, _PATIENCE * cost / self.rate)
        if self._tickets and wait > most:
            raise Refusal(
                503,
                "Saturated",
                f"the request would wait for about {wait:.1f} s, and {most:.3g} s is "
                "the most; try again later",
                retry_after=max(1.0, wait - most),
            )

    async def computed(self, piece: Piece) -> Any:
        """Wait for a piece's result.

        Raises:
            Refusal: 504, its deadline was past before its turn came.
        """
        piece.done = asyncio.get_running_loop().create_future()
        piece.came = time.monotonic()
        self._waiting.append(piece)
        self._came.set()
        return await piece.done

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._waiting:
                self._came.clear()
                await self._came.wait()
            batch = self._computing = self._next()
            if not batch:
                continue
            began = time.monotonic()
            contents = [piece.content for piece in batch]
            try:
                results = await loop.run_in_executor(
                    self._thread, self._compute, batch[0].key, contents
                )
                if len(results) != len(batch):
                    raise RuntimeError(f"{len(results)} results of {len(batch)} pieces")
            except Exception as error:
                results = [error] * len(batch)
            seconds = time.monotonic() - began
            cost = sum(piece.cost for piece in batch)
            self._learn(cost, seconds)
            self._least_wait = None
            for piece, result in zip(batch, results, strict=True):
                piece.ticket.remaining = max(0.0, piece.ticket.remaining - piece.cost)
                if piece.done.done():
                    continue
                if isinstance(result, BaseException):
                    piece.done.set_exception(result)
                else:
                    piece.done.set_result(result)
            if self._watch is not None:
                waited = [began - piece.came for piece in batch]
                try:
                    self._watch(Batch(batch[0].key, cost, waited, seconds))
                except Exception:  # the work goes on without its metrics
                    _log.exception("a batch could not be counted")

    def _learn(self, cost: float, seconds: float) -> None:
        if seconds > 0 and cost > 0:
            # Small batches are slow by what it takes to begin one: that is the rate then.
            weight = _RATE_WEIGHT * min(1.0, seconds / BATCH_S)
            self.rate += weight * (cost / seconds - self.rate)

    def _next(self) -> list[Piece]:
        """The pieces of the next batch, taken off those that wait."""
        now, lead = time.monotonic(), None
        waiting: list[Piece] = []
        for piece in self._waiting:
            if piece.done.done():  # the caller is gone
                continue
            if now > piece.ticket.deadline:
                piece.done.set_exception(past_deadline())
                continue
            waiting.append(piece)
            # Urgent: would be too late after one more batch.
            if lead is None or (self._urgent(piece, now) and not self._urgent(lead, now)):
                lead = piece
        if lead is None:
            self._waiting = []
            return []
        batch, left, cost = [lead], [], lead.cost
        for piece in waiting:
            if piece is lead:
                continue
            if piece.key == lead.key and cost + piece.cost <= self.batch_cost:
                batch.append(piece)
                cost += piece.cost
            else:
                left.append(piece)
        self._waiting = left
        return batch

    def _urgent(self, piece: Piece, now: float) -> bool:
        enough = 2 * BATCH_S + piece.cost / self.rate
        return piece.ticket.deadline - now < enough <= piece.ticket.deadline - piece.came


def past_deadline() -> Refusal:
    """What a request is told whose time is up."""
    return Refusal(
        504,
        "Deadline exceeded",
        "the request's time was up before its answer was computed; give it more time with the "
        "header X-Timeout-S, or ask for less",
    )
