"""``sbi-dist serve`` with its replicas, its store and its users failing, under a steady load."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from sbi_dist.estimation.bundle import BUNDLE, WEIGHTS, save_bundle
from sbi_dist.posterior import Posterior
from sbi_dist.posterior.posterior import PROMOTED
from sbi_dist.priors import BoxUniform, prior_to_data
from sbi_dist.store import LocalStore, ObjectStore, S3Store
from tests.services.s3_server import S3Server
from tests.services.served import BUSY, Load, Served, X, until
from tests.unit.test_untrusted_bundle import made

REFRESH_S = 0.5
FOLLOWS_S = 10.0 * BUSY  # within this a promoted model is the one that answers
NOTICED_S = 0.1 * BUSY  # within this the proxy has seen that a replica's connections are closed
MODELS = ("one", "two")
MB = 1_000_000


@contextlib.contextmanager
def admin(server: S3Server) -> Iterator[None]:
    """The server's rights in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield


class Experiment:
    """The experiment ``gaussian`` on the S3 server, as a pipeline leaves it."""

    def __init__(self, server: S3Server) -> None:
        base = S3Store(server.bucket, f"serving-{uuid.uuid4().hex[:8]}", patience_s=60.0)
        self.uri, self.store = base.uri, base.child("gaussian")
        self.models: dict[str, Posterior] = {}
        for seed, name in enumerate(MODELS, 1):
            self.add(name, seed)
        self.promote("one")

    def folder(self, name: str) -> ObjectStore:
        return self.store.child(f"models/{name}")

    def add(self, name: str, seed: int) -> None:
        prior = prior_to_data(BoxUniform([-2.0] * 2, [2.0] * 2))
        about = {"prior": prior, "parameter_names": ["a", "b"], "model": name}
        save_bundle(self.folder(name), made(seed=seed), about)
        self.models[name] = Posterior.from_store(self.folder(name))

    def promote(self, name: str) -> None:
        self.store.put(PROMOTED, json.dumps({"model": name}).encode())

    def damage(self, name: str, weights: bytes, checksum: bool) -> None:
        """A model with other weights; with their own checksum, or that of the right ones."""
        import hashlib

        about = json.loads(self.folder("one").get(BUNDLE))
        if checksum:
            about["weights_sha256"] = hashlib.sha256(weights).hexdigest()
        self.folder(name).put(WEIGHTS, weights)
        self.folder(name).put(BUNDLE, json.dumps(about).encode())


@pytest.fixture(scope="module")
def experiment(s3_server: S3Server) -> Iterator[Experiment]:
    with admin(s3_server):
        yield Experiment(s3_server)


class Running:
    """One service for all tests; another one after a test that ended it."""

    def __init__(self, server: S3Server, experiment: Experiment) -> None:
        self._server, self._experiment = server, experiment
        self._service: Served | None = None

    def get(self) -> Served:
        if self._service is not None and self._service.process.poll() is not None:
            self.remove()
        if self._service is None:
            self._service = Served(
                self._experiment.uri,
                self._server.environment,
                store_patience_s=2,
                serve__min_replicas=2,
                serve__cpus_per_replica=0.5,
                serve__refresh_s=REFRESH_S,
                serve__max_wait_s=0.5,
                serve__drain_s=20,
            )
        return self._service

    def remove(self) -> None:
        if self._service is not None:
            self._service.remove()
            self._service = None


@pytest.fixture(scope="module")
def running(s3_server: S3Server, experiment: Experiment) -> Iterator[Running]:
    one = Running(s3_server, experiment)
    yield one
    one.remove()


@pytest.fixture
def service(running: Running, experiment: Experiment) -> Served:
    """The service with two replicas and the model ``one`` promoted."""
    experiment.promote("one")
    served = running.get()
    until(lambda: len(served.replicas()) == 2, 120.0, "there are two replicas")
    until(lambda: promoted(served) == {"one"}, FOLLOWS_S, "both replicas serve the model `one`")
    return served


def promoted(service: Served, tries: int = 6) -> set[str]:
    """What the replicas take for the promoted model; each connection gets to either."""
    return {httpx.get(f"{service.url}/v1/models").json()["promoted"] for _ in range(tries)}


def reasons(service: Served, name: str) -> set[str | None]:
    """Why a model is refused, by all replicas."""
    found = set()
    for _ in range(6):
        listed = httpx.get(f"{service.url}/v1/models").json()["models"]
        found |= {each["refused"] for each in listed if each["model"] == name} or {None}
    return found


def test_a_replica_is_killed(service: Served, experiment: Experiment) -> None:
    with Load(service.url, experiment.models, threads=4) as load:
        load.answered()
        victim, other = service.replicas()
        os.kill(victim.pid, signal.SIGKILL)
        until(lambda: not victim.alive, 30.0, "its connections are closed")
        gone = time.monotonic()
        load.answered(100)
        until(lambda: len(service.replicas()) == 2, 120.0, "there are two replicas again")
        until(lambda: promoted(service) == {"one"}, 60.0, "all of them answer")
        load.answered(100)
    # Nothing but what it had in hand: of each thread at most the one request.
    assert len(load.failures) <= 4, load.failures
    for failure in load.failures:
        assert failure.began < gone + NOTICED_S, failure
        assert "WRONG" not in (failure.problem or ""), failure
    assert other in service.replicas() and victim not in service.replicas()


def test_the_store_is_away(service: Served, experiment: Experiment, s3_server: S3Server) -> None:
    experiment.add("late", 7)
    url = f"{service.url}/v1/models/late/sample"
    question = {"x": X, "num_samples": 10, "seed": 3}
    with Load(service.url, experiment.models) as load:
        load.answered()
        s3_server.kill()
        try:
            answer = httpx.post(url, json=question, timeout=30)
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["title"] == "Store unavailable"
            time.sleep(6 * REFRESH_S)
            load.answered(100)
        finally:
            s3_server.restart()
        until(lambda: httpx.post(url, json=question).status_code == 200, 90.0, "it is served")
        load.answered()
    assert not load.failures
    assert set(load.models_since(0.0)) == {"one"}
    with Load(service.url, {"late": experiment.models["late"]}, 1, "late") as load:
        load.answered(10)
    assert not load.failures and set(load.models_since(0.0)) == {"late"}


def test_another_model_is_promoted_and_damaged_ones_are_not(
    service: Served, experiment: Experiment
) -> None:
    whole = experiment.folder("one").get(WEIGHTS)
    experiment.damage("truncated", whole[: len(whole) // 2], checksum=False)
    experiment.damage("nonsense", b"\x10" + bytes(range(256)) * 8, checksum=True)

    def switched(load: Load, name: str) -> None:
        """Both replicas follow: for a second all answers are of the model."""
        experiment.promote(name)
        since = time.monotonic()
        until(lambda: promoted(service) == {name}, FOLLOWS_S, f"{name} is promoted")
        now = time.monotonic()
        load.answered(50)
        assert set(load.models_since(now)) == {name}
        assert now - since < FOLLOWS_S

    with Load(service.url, experiment.models) as load:
        load.answered()
        switched(load, "two")
        for name, word in (("truncated", "checksum"), ("nonsense", "")):
            experiment.promote(name)

            def refused(name: str = name) -> bool:
                return None not in reasons(service, name)

            until(refused, FOLLOWS_S, f"{name} is refused by both replicas")
            assert all(word in (reason or "") for reason in reasons(service, name))
            assert promoted(service) == {"two"}
            now = time.monotonic()
            load.answered(50)
            assert set(load.models_since(now)) == {"two"}
            answer = httpx.get(f"{service.url}/v1/models/{name}")
            assert answer.status_code == 409 and experiment.uri not in answer.text
        switched(load, "one")
    assert not load.failures
    told = "\n".join(service.logs().values())
    assert "model truncated is not fit to be served" in told


def flood(service: Served, threads: int, seconds: float) -> list[tuple[httpx.Response, float]]:
    """Answers to as many requests at once as threads, one after the other, and what each took."""
    end = time.monotonic() + seconds
    found: list[tuple[httpx.Response, float]] = []

    def ask(number: int) -> None:
        with httpx.Client(timeout=60) as client:
            while time.monotonic() < end:
                began = time.monotonic()
                body = {"x": X, "num_samples": 20_000, "seed": number}
                answer = client.post(f"{service.url}/v1/models/promoted/summary", json=body)
                found.append((answer, time.monotonic() - began))
                if answer.status_code == 503:
                    time.sleep(0.1)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(ask, range(threads)))
    return found


def test_too_many_ask(service: Served) -> None:
    memory: list[int] = []
    for _ in range(3):
        found = flood(service, threads=40, seconds=2.5)
        taken = [seconds for answer, seconds in found if answer.status_code == 200]
        refused = [answer for answer, _ in found if answer.status_code == 503]
        assert len(taken) + len(refused) == len(found), {a.status_code for a, _ in found}
        assert taken and refused
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert {answer.json()["title"] for answer in refused} == {"Saturated"}
        # Half a second is the wait from which on requests are turned away; some for the work.
        assert max(taken) < BUSY * 5.0, sorted(taken)[-5:]
        memory.append(sum(each.memory() for each in service.replicas()))
    assert memory[2] - memory[0] < 60 * MB, memory
    began = time.monotonic()
    httpx.post(f"{service.url}/v1/models/promoted/sample", json={"x": X}).raise_for_status()
    assert time.monotonic() - began < BUSY * 2.0


TOKEN = {"Authorization": "Bearer secretDoNotShow"}


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Served]:
    """A second service on this machine, for a token, whose only model is ``guarded``."""
    store = LocalStore(tmp_path / "gaussian")
    prior = prior_to_data(BoxUniform([-2.0] * 2, [2.0] * 2))
    about = {"prior": prior, "parameter_names": ["a", "b"], "model": "guarded"}
    save_bundle(store.child("models/guarded"), made(), about)
    store.put(PROMOTED, json.dumps({"model": "guarded"}).encode())
    tokens = tmp_path / "tokens"
    tokens.write_text("secretDoNotShow\n")
    served = Served(str(tmp_path), {}, serve__cpus_per_replica=0.25, serve__tokens_file=tokens)
    yield served
    served.remove()


def test_a_replica_is_gone_and_another_service_does_not_answer(
    service: Served, guarded: Served
) -> None:
    (victim,) = guarded.replicas()
    os.kill(victim.pid, signal.SIGKILL)
    found: collections.Counter[tuple[bool, int, str | None]] = collections.Counter()
    without = (False, 401, None)

    def ask(with_token: bool) -> None:
        headers = TOKEN if with_token else {}
        # Until there is a replica again, some get no answer.
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.get(f"{guarded.url}/v1/models", headers=headers, timeout=3)
            promoted = answer.json().get("promoted") if answer.status_code < 500 else None
            found[with_token, answer.status_code, promoted] += 1

    def again() -> bool:
        """Ask; whether a replica has answered for a while."""
        ask(False)
        ask(True)
        new = [each for each in guarded.replicas() if each != victim]
        return bool(new) and min(found[without], found[True, 200, "guarded"]) > 10

    until(again, 180.0, "another replica answers, each by its rules")
    unexpected = [key for key in found if key[1] < 500 and key != without and key[2] != "guarded"]
    assert not unexpected, found
    assert httpx.get(f"{service.url}/v1/models").json()["promoted"] == "one"
