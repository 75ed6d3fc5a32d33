"""The client for programs on asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from sbi_dist.errors import InputError
from sbi_dist.serving.client import question as ask
from sbi_dist.serving.client.answers import Answer, Densities, Samples, Summaries
from sbi_dist.serving.client.exchange import PROMOTED, Exchange
from sbi_dist.serving.client.http import as_again, timeouts
from sbi_dist.serving.client.job import Job
from sbi_dist.serving.client.steps import Again, Found, Head, Pause, Receive, Send, Steps

__all__ = ["AsyncClient"]


class AsyncClient:
    """:class:`Client` for asyncio, with several requests of a large batch under way at once.

    Args:
        in_flight: how many. So many answers, of some 16 MB at most unless one observation's are
            more, may be in memory.
        url, token, token_file, timeout_s, retries, model, transport: as of :class:`Client`, whose
            methods these are.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        token_file: str | Path | None = None,
        timeout_s: float = 60.0,
        retries: int = 8,
        model: str = PROMOTED,
        transport: httpx.AsyncBaseTransport | None = None,
        in_flight: int = 4,
    ) -> None:
        if in_flight < 1:
            raise InputError(f"in_flight is {in_flight!r}; it must be at least 1")
        self._exchange = Exchange(url, token, token_file, timeout_s, retries)
        self.model_name, self._in_flight = model, in_flight
        self._http = httpx.AsyncClient(transport=transport)

    def __repr__(self) -> str:
        return f"AsyncClient({self._exchange.url!r}, model={self.model_name!r})"

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    # ---- models ----

    async def models(self) -> list[dict[str, Any]]:
        """See :meth:`Client.models`."""
        return await self._one(self._exchange.models())

    async def model(self, name: str | None = None) -> dict[str, Any]:
        """See :meth:`Client.model`."""
        return await self._one(self._exchange.model(name or self.model_name))

    # ---- posteriors ----

    async def sample(
        self,
        x: Any,
        num_samples: int = 1000,
        seed: int = 0,
        with_log_prob: bool = False,
        model: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> Samples:
        """See :meth:`Client.sample`."""
        every = self.sample_stream(x, num_samples, seed, with_log_prob, model, ids)
        return Samples.concatenate([each async for each in every])

    def sample_stream(
        self,
        x: Any,
        num_samples: int = 1000,
        seed: int = 0,
        with_log_prob: bool = False,
        model: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> AsyncGenerator[Samples]:
        """See :meth:`Client.sample_stream`; close it (``aclose``) where it is left early."""
        return self._ask(ask.samples(num_samples, seed, with_log_prob), x, model, ids)

    async def summary(
        self,
        x: Any,
        num_samples: int = 1000,
        seed: int = 0,
        quantiles: Sequence[float] | None = None,
        hdi: float | None = None,
        model: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> Summaries:
        """See :meth:`Client.summary`."""
        every = self.summary_stream(x, num_samples, seed, quantiles, hdi, model, ids)
        return Summaries.concatenate([each async for each in every])

    def summary_stream(
        self,
        x: Any,
        num_samples: int = 1000,
        seed: int = 0,
        quantiles: Sequence[float] | None = None,
        hdi: float | None = None,
        model: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> AsyncGenerator[Summaries]:
        """See :meth:`Client.summary_stream`."""
        return self._ask(ask.summaries(num_samples, seed, quantiles, hdi), x, model, ids)

    async def log_prob(
        self, theta: Any, x: Any, model: str | None = None, ids: Sequence[str] | None = None
    ) -> Densities:
        """See :meth:`Client.log_prob`."""
        every = self._ask(ask.densities(theta), x, model, ids)
        return Densities.concatenate([each async for each in every])

    # ---- steps ----

    async def _ask(
        self, question: ask.Question, x: Any, model: str | None, ids: Sequence[str] | None
    ) -> AsyncGenerator[Any]:
        found = await self._one(self._exchange.job(question, model or self.model_name, x, ids))
        job, asked = found
        pieces = job.pieces()
        if len(job) == 1:
            every = self._take(self._exchange.answers(job, asked, next(pieces)))
        else:
            every = self._at_once(job, asked)
        async with contextlib.aclosing(every) as answers:
            async for answer in answers:
                yield answer

    async def _at_once(self, job: Job, model: str) -> AsyncGenerator[Answer]:
        """The answers to all pieces in order, of which several are asked at once."""
        pieces = job.pieces()
        waiting: deque[tuple[asyncio.Task[None], asyncio.Queue[Answer | None]]] = deque()

        def begin() -> None:
            piece = next(pieces, None)
            if piece is not None:
                queue: asyncio.Queue[Answer | None] = asyncio.Queue()
                steps = self._exchange.answers(job, model, piece)
                waiting.append((asyncio.create_task(self._fill(steps, queue)), queue))

        try:
            for _ in range(self._in_flight):
                begin()
            while waiting:
                task, queue = waiting[0]
                while (answer := await queue.get()) is not None:
                    yield answer
                await task
                waiting.popleft()
                begin()
        finally:
            tasks = [task for task, _ in waiting]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fill(self, steps: Steps, queue: asyncio.Queue[Answer | None]) -> None:
        try:
            async with contextlib.aclosing(self._take(steps)) as answers:
                async for answer in answers:
                    queue.put_nowait(answer)
        finally:
            queue.put_nowait(None)

    async def _one(self, steps: Steps) -> Any:
        (value,) = [each async for each in self._take(steps)]
        return value

    async def _take(self, steps: Steps) -> AsyncGenerator[Any]:
        """Take the steps of a conversation; what it finds."""
        answer: httpx.Response | None = None
        chunks: AsyncIterator[bytes] | None = None
        came: Any = None
        failed: Again | None = None
        try:
            while True:
                try:
                    step = steps.send(came) if failed is None else steps.throw(failed)
                except StopIteration:
                    return
                came = failed = None
                if isinstance(step, Found):
                    yield step.value
                    continue
                try:
                    if isinstance(step, Receive):
                        assert chunks is not None
                        async with asyncio.timeout(step.timeout_s):
                            while not (came := await anext(chunks, None)):
                                if came is None:
                                    came = b""
                                    break
                        continue
                    if answer is not None:
                        await answer.aclose()
                    if isinstance(step, Pause):
                        await asyncio.sleep(step.seconds)
                    if isinstance(step, Send):
                        async with asyncio.timeout(step.timeout_s):
                            answer = await self._http.send(self._request(step), stream=True)
                        chunks = answer.aiter_bytes()
                        came = Head(answer.status_code, answer.headers)
                except httpx.HTTPError as error:
                    failed = as_again(error)
                except TimeoutError:
                    failed = Again("no answer in time")
        finally:
            steps.close()
            if answer is not None:
                await answer.aclose()

    def _request(self, step: Send) -> httpx.Request:
        return self._http.build_request(
            step.method,
            step.url,
            headers=step.headers,
            params=step.params,
            content=step.content,
            timeout=timeouts(step),
        )
