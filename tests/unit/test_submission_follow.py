"""Following a job's log, from a server that breaks off as told. About 12 s."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web

from sbi_dist.errors import InputError
from sbi_dist.submission import command
from sbi_dist.submission.api import JobApi
from sbi_dist.submission.errors import NoSuchJob, Unreachable
from sbi_dist.submission.follow import Follower, News

LOG = "".join(f"line {number}: {'é' * (number % 7)}\n" for number in range(200))


class Server:
    """One job, whose log gets longer with each connection; each of them is broken off.

    Attributes:
        cuts: after how many characters each connection ends; after the last of them the job is
            over.
        status: HTTP status of a request for a connection; 101 is as it should be.
        state: of the job, instead of what the connections make of it.
    """

    def __init__(self, cuts: list[int]) -> None:
        self.cuts, self.status, self.state = cuts, 101, ""
        self.connections = 0
        self.answer = 200
        self._loop = asyncio.new_event_loop()
        app = web.Application()
        app.router.add_get("/api/jobs/one", self._job)
        app.router.add_get("/api/jobs/one/logs", self._logs)
        app.router.add_get("/api/jobs/one/logs/tail", self._tail)
        self._runner = web.AppRunner(app)
        self._loop.run_until_complete(self._runner.setup())
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    async def _job(self, _: web.Request) -> web.Response:
        if self.answer != 200:
            return web.Response(status=self.answer)
        over = self.connections >= len(self.cuts)
        status = self.state or ("SUCCEEDED" if over else "RUNNING")
        return web.json_response({"submission_id": "one", "status": status})

    async def _logs(self, _: web.Request) -> web.Response:
        return web.json_response({"logs": LOG})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        if self.status != 101:
            return web.Response(status=self.status)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        text = LOG[: self.cuts[min(self.connections, len(self.cuts) - 1)]]
        for start in range(0, len(text), 37):
            await socket.send_str(text[start : start + 37])
        self.connections += 1
        if self.connections % 2 and request.transport is not None:
            request.transport.abort()
        return socket

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server([100, 50, 700, 701, 1500])
    yield running
    running.stop()


def ended(follower: Follower) -> tuple[str, list[str], News]:
    """The log that was passed on, the notes, and the last news."""
    text, notes = "", []
    while True:
        news = follower.news.get(timeout=30)
        text += news.text
        notes += [news.note] if news.note else []
        if news.job is not None or news.error is not None:
            return text, notes, news


def test_no_character_is_lost_or_comes_twice(server: Server) -> None:
    text, notes, news = ended(Follower(JobApi(server.url), "one", 10))
    assert server.connections == 5
    assert text == LOG and notes == []
    assert news.job is not None and news.job.status == "SUCCEEDED"


def test_where_no_websocket_gets_through(server: Server) -> None:
    server.status, server.state = 403, "RUNNING"
    follower = Follower(JobApi(server.url), "one", 10)
    assert follower.news.get(timeout=10).text == LOG
    server.state = "STOPPED"
    text, _, news = ended(follower)
    assert text == "" and news.job is not None and news.job.status == "STOPPED"


@pytest.mark.parametrize(
    ("answer", "error"), [(503, Unreachable), (404, NoSuchJob), (401, InputError)]
)
def test_what_ends_it(
    server: Server, answer: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    server.answer = answer
    _, notes, news = ended(Follower(JobApi(server.url), "one", 1.5))
    assert isinstance(news.error, error)
    assert len(notes) == (answer == 503)


def test_what_is_asked_is_not_in_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("what?\nS\n"))
    assert command._ask() == "stop"
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("[s]top it, or [c]ontinue? ") == 2
    assert command._ask() == "detach"  # at the end of its input
