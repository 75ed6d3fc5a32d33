"""``sbi-dist serve`` with slow readers, new tokens, floods, more replicas; its logs and its end."""

from __future__ import annotations

import collections
import hashlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pyarrow as pa
import pytest
import torch

from sbi_dist.serving.gate import _STALLED_S
from sbi_dist.serving.question import ARROW
from tests.services.s3_server import ADMIN, S3Server
from tests.services.served import BUSY, ROOT, Load, Served, X, free_port, until, using
from tests.services.test_serving import Experiment, admin

MB = 1_000_000
MEMORY_MB = 32  # serve.request_memory_mb
MAX_WAIT_S = 0.5
DRAIN_S = 30
TOKENS = ("firstSecretDoNotShow", "secondSecretDoNotShow", "thirdSecretDoNotShow")
# Connections enough to meet each of two replicas, but for one time in a thousand.
TRIES = 12
# Seconds of work for a replica, in one answer that is small.
LONG: dict[str, Any] = {"x": X * 3, "num_samples": 1_000_000, "quantiles": [0.5]}


@pytest.fixture(scope="module")
def experiment(s3_server: S3Server) -> Iterator[Experiment]:
    with admin(s3_server):
        yield Experiment(s3_server)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    file.write_text(f"{TOKENS[0]}\n")
    return file


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def service(s3_server: S3Server, experiment: Experiment, tokens: Path) -> Iterator[Served]:
    """The service with two replicas, for tokens; the last test ends it."""
    served = Served(
        experiment.uri,
        s3_server.environment,
        serve__min_replicas=2,
        serve__cpus_per_replica=0.5,
        serve__max_wait_s=MAX_WAIT_S,
        serve__request_memory_mb=MEMORY_MB,
        serve__drain_s=DRAIN_S,
        serve__tokens_file=tokens,
    )
    yield served
    served.remove()


class Crowd:
    """Threads that ask for many draws, one request after the other, and check every answer.

    Attributes:
        answers: how many came to what: ``ok``, ``turned away``, or else what was wrong.
    """

    NUM_SAMPLES = 150_000

    def __init__(
        self, service: Served, experiment: Experiment, threads: int, headers: dict[str, str]
    ) -> None:
        self.answers: collections.Counter[str] = collections.Counter()
        self._url, self._headers = f"{service.url}/v1/models/promoted/sample", headers
        posterior = experiment.models["one"]
        self._expected = [
            digest(posterior.draws(torch.tensor(X[:1]), self.NUM_SAMPLES, seed)[0].numpy())
            for seed in range(3)
        ]
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(threads)]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        with httpx.Client(timeout=60, headers={**self._headers, "Accept": ARROW}) as client:
            for turn in itertools.count(number):
                if self._over.is_set():
                    return
                seed = turn % len(self._expected)
                body = {"x": X[:1], "num_samples": self.NUM_SAMPLES, "seed": seed}
                try:
                    outcome = self._outcome(client.post(self._url, json=body), seed)
                except httpx.HTTPError as error:
                    outcome = f"{type(error).__name__}: {error}"
                self.answers[outcome] += 1
                if outcome != "ok":
                    self._over.wait(0.05)

    def _outcome(self, answer: httpx.Response, seed: int) -> str:
        if answer.status_code == 503 and int(answer.headers.get("retry-after", 0)) >= 1:
            return "turned away" if answer.json()["title"] == "Saturated" else answer.text
        if answer.status_code != 200:
            return f"{answer.status_code}: {answer.text[:300]}"
        table = pa.ipc.open_stream(answer.content).read_all()
        draws = table["draws"].combine_chunks().to_numpy_ndarray()
        return "ok" if digest(draws) == self._expected[seed] else "WRONG draws"


def digest(draws: np.ndarray) -> bytes:
    return hashlib.sha256(draws.tobytes()).digest()


def sampled(function: Callable[[], int], over: threading.Event) -> list[int]:
    """What a function returns, ten times a second."""
    found = [function()]
    while not over.wait(0.1):
        found.append(function())
    return found


def test_slow_readers(service: Served, experiment: Experiment) -> None:
    """One takes its time and gets all, one takes nothing and is given up; others do not wait."""
    url, rows, count = f"{service.url}/v1/models/promoted/sample", 420, 10_000
    x = np.random.default_rng(0).normal(0, 0.5, (rows, 3)).astype(np.float32)
    question = {"x": x.tolist(), "num_samples": count, "seed": 5}
    some = {**question, "x": question["x"][:40]}
    for _ in range(4):  # what a first large answer takes for good
        httpx.post(url, json=some, headers=bearer(TOKENS[0]), timeout=60).raise_for_status()
    before = sum(each.memory() for each in service.replicas())

    def memory() -> int:
        return sum(each.memory() for each in service.replicas())

    slow = {**bearer(TOKENS[0]), "X-Timeout-S": "300"}
    never = {**bearer(TOKENS[0]), "X-Timeout-S": "1", "X-Request-ID": "takes-nothing"}
    over, content = threading.Event(), bytearray()
    load = Load(service.url, experiment.models, 2, headers=bearer(TOKENS[0]))
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.Client(timeout=120) as client,
        load,
        client.stream("POST", url, json=question, headers=never) as stalled,
        client.stream("POST", url, json=question, headers=slow) as answer,
    ):
        assert stalled.status_code == answer.status_code == 200
        memories = pool.submit(sampled, memory, over)
        for number, part in enumerate(answer.iter_raw(MB)):
            content += part
            # Time enough to make all of it, were it not for its reader; then a steady pace.
            time.sleep(5.0 if number == 0 else 0.05)
        until(
            lambda: "takes-nothing broke off" in "\n".join(service.logs().values()),
            60.0 + _STALLED_S,
            "the reader that takes nothing is given up",
        )
        over.set()
    assert len(content) > 3 * MEMORY_MB * MB
    # As much again for the pieces that are being made and sent, and what the allocator keeps.
    assert max(memories.result()) - before < 2 * MEMORY_MB * MB
    assert not load.failures
    seconds = sorted(each.ended - each.began for each in load.asked)
    assert len(seconds) > 100
    assert seconds[int(0.99 * len(seconds))] < BUSY * MAX_WAIT_S, seconds[-5:]
    found = orjson.loads(content)["observations"]
    expected = experiment.models["one"].draws(torch.from_numpy(x), count, 5)[0].numpy()
    assert len(found) == rows
    for one, draws in zip(found, expected, strict=True):
        assert one["status"] == "ok"
        assert np.array_equal(np.array(one["draws"], np.float32), draws)


def test_floods(service: Served, experiment: Experiment) -> None:
    def memory() -> int:
        return sum(each.memory() for each in service.replicas())

    after: list[int] = []
    for _ in range(5):
        with Crowd(service, experiment, 48, bearer(TOKENS[0])) as crowd:
            time.sleep(2.0)
        assert set(crowd.answers) == {"ok", "turned away"}, crowd.answers
        after.append(memory())
        began = time.monotonic()
        url = f"{service.url}/v1/models/promoted/sample"
        httpx.post(url, json={"x": X}, headers=bearer(TOKENS[0])).raise_for_status()
        assert time.monotonic() - began < BUSY * MAX_WAIT_S
    # Requests may hold so much together, and the allocator may keep it.
    assert after[4] - after[1] < MEMORY_MB * MB, after


def statuses(service: Served, headers: dict[str, str]) -> set[int]:
    """What new connections are answered."""
    url = f"{service.url}/v1/models"
    return {httpx.get(url, headers=headers, timeout=30).status_code for _ in range(TRIES)}


def test_tokens_are_rotated(service: Served, experiment: Experiment, tokens: Path) -> None:
    first, second, third = TOKENS
    using = bearer(first)

    def followed() -> None:
        """The file is looked at with each request: what comes after a change follows it."""
        load.answered(30, patience_s=60.0)

    def nobody_else() -> None:
        wrong = ("Bearer", "Bearer another", "Basic Og==")
        for headers in ({}, *({"Authorization": each} for each in wrong)):
            assert statuses(service, headers) == {401}
        body = {"x": X, "num_samples": 1}
        for path in ("/v1/models/promoted/sample", "/v2/models/promoted/infer"):
            assert httpx.post(f"{service.url}{path}", json=body).status_code == 401

    with Load(service.url, experiment.models, headers=using) as load:
        followed()
        assert statuses(service, bearer(second)) == {401}
        tokens.write_text(f"{first}\n{second}\n")
        assert statuses(service, bearer(second)) == {200}
        using |= bearer(second)
        followed()
        replaced = tokens.with_suffix(".new")
        replaced.write_text(f"# the former one is gone\n{second}\n")
        replaced.replace(tokens)
        assert statuses(service, bearer(first)) == {401}
        nobody_else()
        for damage in (
            lambda: tokens.write_text(""),
            lambda: tokens.write_text("# none\n"),
            lambda: tokens.write_bytes(b"\xff\xfe\n"),
            tokens.unlink,
            tokens.mkdir,
        ):
            damage()
            nobody_else()
            followed()
        tokens.rmdir()
        tokens.write_text(f"{third}\n{second}\n")
        assert statuses(service, bearer(third)) == {200}
        using |= bearer(third)
        followed()
        tokens.write_text(f"{third}\n")
        assert statuses(service, bearer(second)) == {401}
        followed()
    assert not load.failures


def breaks_off(service: Served, headers: dict[str, str]) -> bool:
    """Whether an answer ends in its midst: it has begun when its request's time is up."""
    x = np.random.default_rng(1).normal(0, 0.5, (2000, 3)).astype(np.float32)
    question = {"x": x.tolist(), "num_samples": 10_000}
    for seconds in (1, 2, 4, 8):  # on a busy machine it takes a while to begin
        given = {**headers, "X-Timeout-S": str(seconds)}
        try:
            url = f"{service.url}/v1/models/promoted/sample"
            with httpx.stream("POST", url, json=question, headers=given, timeout=60) as answer:
                for _ in answer.iter_raw():
                    pass
        except httpx.RemoteProtocolError:
            return True
        assert answer.status_code == 504, answer.status_code
    return False


def test_logs(service: Served) -> None:
    """After all that the tests before did; a request's identifier leads to what went wrong."""
    url = f"{service.url}/v1/models/promoted/summary"
    for headers in (bearer(TOKENS[0]), bearer("wrongSecretDoNotShow")):
        assert httpx.post(url, json={"x": X}, headers=headers).status_code == 401
    assert breaks_off(service, {**bearer(TOKENS[2]), "X-Request-ID": "too-short-a-time"})

    def told() -> bool:
        return "request too-short-a-time broke off" in "\n".join(service.logs().values())

    until(told, 30.0, "the log says that it broke off")
    logs = service.logs()
    assert any("ServeReplica" in text or "replica" in name for name, text in logs.items())
    for secret in (*TOKENS, "wrongSecretDoNotShow", ADMIN[1], "DoNotShow"):
        assert [name for name, text in logs.items() if secret in text] == []
        assert secret not in service.said()
    assert "Traceback" not in service.said()
    assert all(line.startswith("serve: ") for line in service.said().splitlines())


def ends(service: Served, number: int, code: int, headers: dict[str, str]) -> None:
    """A signal ends it: what is being answered is answered, and nothing of it stays."""
    url = f"{service.url}/v1/models/promoted/summary"

    def ask() -> httpx.Response:
        return httpx.post(url, json=LONG, headers=headers, timeout=120)

    expected = ask().raise_for_status().json()
    with ThreadPoolExecutor(1) as pool:
        before = sum(each.cpu_s() for each in service.replicas())
        asked = pool.submit(ask)
        until(
            lambda: sum(each.cpu_s() for each in service.replicas()) > before + 0.2,
            30.0,
            "it is being computed",
        )
        assert not asked.done()
        found, seconds, were = service.end(number, patience_s=120.0)
        assert asked.result().raise_for_status().json() == expected
    assert found == code, service.said()
    # Its time for what is in hand, for the load balancer and for all else.
    assert seconds < DRAIN_S + 15.0
    until(lambda: not [each for each in were if each.alive], 10.0, "all its processes are gone")
    assert service.left() == []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", service.port))
    said = service.said()
    assert "Traceback" not in said and "DoNotShow" not in said
    assert said.splitlines()[-1].startswith("sbi-dist: stopped"), said


def test_ctrl_c(service: Served) -> None:
    ends(service, signal.SIGINT, 130, bearer(TOKENS[2]))


def test_another_replica_is_started_and_sigterm(
    s3_server: S3Server, experiment: Experiment
) -> None:
    served = Served(
        experiment.uri,
        s3_server.environment,
        serve__min_replicas=1,
        serve__max_replicas=2,
        serve__cpus_per_replica=0.5,
        serve__target_wait_s=0.05,
        serve__max_wait_s=60,
        serve__drain_s=DRAIN_S,
    )
    try:
        (first,) = served.replicas()
        starting = first.cpu_s()
        with Crowd(served, experiment, 4, {}) as crowd:
            two = until(lambda: len(each := served.replicas()) == 2 and each, 120.0, "two replicas")
            (second,) = [each for each in two if each != first]
            until(lambda: second.cpu_s() > 2 * starting, 120.0, "it works, after it has started")
        assert set(crowd.answers) == {"ok"}, crowd.answers
        ends(served, signal.SIGTERM, 143, {})
    finally:
        served.remove()


def test_cpus_that_are_not_there(s3_server: S3Server, experiment: Experiment) -> None:
    """Told once Ray says what there is, rather than waited for."""
    cpus = 64 * (os.cpu_count() or 1)
    # Short, as sockets of Ray lie in it.
    with tempfile.TemporaryDirectory(prefix="sv", dir="/tmp") as folder:
        given = [
            f"serve.cpus_per_replica={cpus}",
            "serve.min_replicas=2",
            f"serve.port={free_port()}",
        ]
        ended = subprocess.run(
            [sys.executable, "-m", "sbi_dist", "serve", "gaussian", "--store", experiment.uri]
            + [each for one in given for each in ("--set", one)],
            env={**os.environ, **s3_server.environment, "TMPDIR": folder},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 2 and ended.stdout == "", ended
        words = f"sbi-dist: serve.min_replicas asks for 2 x {cpus} = {2 * cpus} CPUs, and the Ray "
        assert ended.stderr.startswith(words) and ended.stderr.count("\n") == 1, ended.stderr
        until(lambda: not using(Path(folder)), 10.0, "nothing of it goes on running")
