"""The queue: batches, turns, deadlines, and who is turned away."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from sbi_dist.serving.queue import DrawQueue, Piece
from sbi_dist.serving.refusal import Refusal

LONG = 60.0


class Work:
    """Computes after it was let; knows what was computed together."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.let = threading.Event()
        self.let.set()

    def __call__(self, key: Any, contents: list[Any]) -> list[Any]:
        self.batches.append(contents)
        assert self.let.wait(10)
        if key == "raises":
            raise ValueError("all")
        return [ValueError(each) if each == "bad" else (key, each) for each in contents]


def queueing(scenario: Callable[..., Any], **options: Any) -> None:
    async def run() -> None:
        work = Work()
        queue = DrawQueue(work, **{"max_wait_s": 2.0, "max_requests": 50, **options})
        queue.start()
        try:
            await scenario(queue, work)
            assert queue.queued == 0 and queue.requests == 0 and queue.alive
        finally:
            work.let.set()
            await queue.close()

    asyncio.run(asyncio.wait_for(run(), 20))


async def ask(
    queue: DrawQueue, content: Any, cost: float = 10, key: Any = "k", within: float = LONG
) -> Any:
    with queue.admitted(cost, time.monotonic() + within) as ticket:
        return await queue.computed(Piece(ticket, key, cost, content))


async def held(queue: DrawQueue, work: Work) -> asyncio.Task[Any]:
    """A piece that is being computed, so that those that follow wait."""
    work.let.clear()
    task = asyncio.create_task(ask(queue, "first", key="other"))
    while not work.batches:
        await asyncio.sleep(0.001)
    return task


def test_pieces_of_one_key_share_a_batch_up_to_its_cost() -> None:
    async def scenario(queue: DrawQueue, work: Work) -> None:
        first = await held(queue, work)
        tasks = [asyncio.create_task(ask(queue, i, 2000, i % 2)) for i in range(6)]
        await asyncio.sleep(0)
        work.let.set()
        assert await asyncio.gather(*tasks) == [(i % 2, i) for i in range(6)]
        await first
        assert work.batches[1:] == [[0, 2], [1, 3], [4], [5]]

    queueing(scenario, max_wait_s=100)


def test_a_large_request_takes_turns() -> None:
    async def scenario(queue: DrawQueue, work: Work) -> None:
        async def large() -> None:
            with queue.admitted(20 * 4096, time.monotonic() + LONG) as ticket:
                for number in range(20):
                    await queue.computed(Piece(ticket, "large", 4096, f"large {number}"))
                    assert ticket.remaining == (19 - number) * 4096

        task = asyncio.create_task(large())
        while len(work.batches) < 2:
            await asyncio.sleep(0)
        before = len(work.batches)
        await ask(queue, "small")
        assert len(work.batches) <= before + 3
        await task

    queueing(scenario, max_wait_s=100)


def test_urgent_goes_first_and_what_is_late_or_gone_is_not_computed(monkeypatch) -> None:
    monkeypatch.setattr("sbi_dist.serving.queue.BATCH_S", 0.5)

    async def scenario(queue: DrawQueue, work: Work) -> None:
        first = await held(queue, work)
        usual = asyncio.create_task(ask(queue, "usual", key=1))
        gone = asyncio.create_task(ask(queue, "gone", key=2))
        late = asyncio.create_task(ask(queue, "late", key=3, within=0.02))
        urgent = asyncio.create_task(ask(queue, "urgent", key=4, within=1.5))
        await asyncio.sleep(0.6)
        # With little time from the start: no way to the front.
        hurried = asyncio.create_task(ask(queue, "hurried", key=5, within=0.9))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        work.let.set()
        await asyncio.gather(first, usual, urgent, hurried)
        with pytest.raises(Refusal) as refused:
            await late
        assert refused.value.status == 504
        assert work.batches[1:] == [["urgent"], ["usual"], ["hurried"]]

    queueing(scenario)


def test_who_is_turned_away() -> None:
    async def scenario(queue: DrawQueue, work: Work) -> None:
        first = await held(queue, work)
        # Ten seconds of work each, and no more than four times that may lie before one like them.
        others = [asyncio.create_task(ask(queue, i, 1e6)) for i in range(4)]
        await asyncio.sleep(0)
        assert queue.requests == 5
        for within, cost in ((LONG, 1e6), (0.05, 10.0)):
            with pytest.raises(Refusal) as refused:
                await ask(queue, "no", cost, within=within)
            assert refused.value.status == 503 and (refused.value.retry_after or 0) >= 1
        queue.check()
        more = asyncio.create_task(ask(queue, 3, 10))
        await asyncio.sleep(0)
        for turned_away in (ask(queue, "no"), checked(queue)):
            with pytest.raises(Refusal, match="as many as") as refused:
                await turned_away
            assert refused.value.status == 503
        work.let.set()
        await asyncio.gather(first, more, *others)

    queueing(scenario, max_requests=6, max_wait_s=15)


def test_what_waits_is_known_without_looking_at_all() -> None:
    async def scenario(queue: DrawQueue, work: Work) -> None:
        queue.check()
        first = await held(queue, work)
        others = [asyncio.create_task(ask(queue, i, 4096.0)) for i in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="would wait"):
            queue.check()
        work.let.set()
        await asyncio.gather(first, *others)
        queue.check()

    queueing(scenario, max_wait_s=0.3)


async def checked(queue: DrawQueue) -> None:
    queue.check()


def test_failures_are_those_of_their_callers() -> None:
    async def scenario(queue: DrawQueue, work: Work) -> None:
        first = await held(queue, work)
        asked = [("a", "k"), ("bad", "k"), ("b", "k"), ("c", "raises")]
        tasks = [asyncio.create_task(ask(queue, one, key=key)) for one, key in asked]
        await asyncio.sleep(0)
        work.let.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert found[0] == ("k", "a") and found[2] == ("k", "b")
        assert isinstance(found[1], ValueError) and isinstance(found[3], ValueError)
        await first
        assert await ask(queue, "after") == ("k", "after")

    queueing(scenario)


def test_it_goes_on_where_the_metrics_fail() -> None:
    def fails(_: Any) -> None:
        raise RuntimeError("no metrics")

    async def scenario(queue: DrawQueue, work: Work) -> None:
        assert await ask(queue, 1) == ("k", 1)
        assert await ask(queue, 2) == ("k", 2)

    queueing(scenario, watch=fails)


def test_the_end_fails_what_is_computed_and_what_waits() -> None:
    async def run() -> None:
        work = Work()
        queue = DrawQueue(work, 2.0, 5)
        queue.start()
        first = await held(queue, work)
        second = asyncio.create_task(ask(queue, 2))
        await asyncio.sleep(0)
        closing = asyncio.create_task(queue.close())
        found = await asyncio.wait_for(asyncio.gather(first, second, return_exceptions=True), 5)
        work.let.set()
        await closing
        assert all(isinstance(each, asyncio.CancelledError) for each in found)
        assert queue.queued == 0

    asyncio.run(run())
