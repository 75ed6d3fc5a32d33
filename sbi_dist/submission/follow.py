"""A job's log as it is written, across whatever happens to the connection.

Ray gives a log from its beginning each time; what was passed on before is skipped by its length, so
that no line is lost and none comes twice. A thread listens; its findings come through a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
import time

import aiohttp

from sbi_dist.errors import InputError, StageError
from sbi_dist.submission.api import Job, JobApi
from sbi_dist.submission.errors import NoSuchJob, Unreachable

__all__ = ["Follower", "News"]

_STATUS_EVERY_S = 1.0
# A connection over which nothing comes, not even an answer to this, is dead.
_HEARTBEAT_S = 10.0


@dataclasses.dataclass(frozen=True)
class News:
    """One thing that a follower found.

    Attributes:
        text: a piece of the log.
        note: something to tell the user.
        job: the job, when it is over; the last news.
        error: why it can't be followed any more; the last news.
    """

    text: str = ""
    note: str = ""
    job: Job | None = None
    error: Exception | None = None


class Follower:
    """Follows a job until it is over.

    Args:
        api: the cluster.
        job_id: the job.
        patience_s: how long the cluster may be out of reach before it is given up.
    """

    def __init__(self, api: JobApi, job_id: str, patience_s: float) -> None:
        self.news: queue.Queue[News] = queue.Queue()
        self._api, self._id, self._patience_s = api, job_id, patience_s
        self._seen = 0
        threading.Thread(target=self._run, daemon=True, name="follow").start()

    def _run(self) -> None:
        try:
            job = asyncio.run(self._follow())
        except Exception as error:  # told to the main thread, which ends by it
            self.news.put(News(error=error))
        else:
            self.news.put(News(job=job))

    async def _follow(self) -> Job:
        """Pass on the log until the job is over; the job."""
        listening = asyncio.create_task(self._listen())
        try:
            job = await self._over()
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening
        await self._rest()
        return job

    async def _over(self) -> Job:
        away_since: float | None = None
        while True:
            try:
                job = await asyncio.to_thread(self._api.get, self._id)
            except Unreachable as error:
                now = time.monotonic()
                if away_since is None:
                    away_since = now
                    self.news.put(
                        News(
                            note=f"{error}; the job goes on, trying again for up to "
                            f"{self._patience_s:.0f} s"
                        )
                    )
                if now - away_since > self._patience_s:
                    raise
            else:
                if away_since is not None:
                    self.news.put(News(note="the cluster answers again"))
                    away_since = None
                if job.over:
                    return job
            await asyncio.sleep(_STATUS_EVERY_S)

    async def _listen(self) -> None:
        """Pass on the log for as long as nobody cancels it."""
        wait = 0.5
        while True:
            before = self._seen
            try:
                await self._listen_once()
            except aiohttp.WSServerHandshakeError:
                # Also proxies that pass no WebSockets on: as a whole then, and seldom.
                with contextlib.suppress(StageError, InputError):
                    self._pass_on(await asyncio.to_thread(self._api.logs, self._id), 0)
                wait = max(wait, 5.0)
            except (aiohttp.ClientError, OSError):
                pass
            wait = 0.5 if self._seen > before else min(2 * wait, 10.0)
            await asyncio.sleep(wait)

    async def _listen_once(self) -> None:
        """Pass on what one connection gives until it ends."""
        timeout = aiohttp.ClientTimeout(total=None, connect=10.0, sock_connect=10.0)
        received = 0
        async with (
            aiohttp.ClientSession(
                headers=self._api.headers, timeout=timeout, trust_env=True
            ) as session,
            session.ws_connect(
                self._api.tail_url(self._id), heartbeat=_HEARTBEAT_S, max_msg_size=0
            ) as socket,
        ):
            async for message in socket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    self._pass_on(message.data, received)
                    received += len(message.data)

    def _pass_on(self, text: str, start: int) -> None:
        """Pass on what is new of a piece that begins after ``start`` characters of the log."""
        new = text[max(self._seen - start, 0) :]
        if new:
            self._seen += len(new)
            self.news.put(News(text=new))

    async def _rest(self) -> None:
        """Pass on what the job wrote last. Its machine may be gone, and the log with it."""
        for _ in range(3):
            try:
                self._pass_on(await asyncio.to_thread(self._api.logs, self._id), 0)
                return
            except (StageError, InputError, NoSuchJob):
                await asyncio.sleep(1.0)
        self.news.put(News(note="the end of the log can't be had any more"))
