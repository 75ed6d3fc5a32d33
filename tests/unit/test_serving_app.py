"""The application in process, on a real posterior: what comes in, what goes out, what is kept."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch

from sbi_dist import Posterior
from sbi_dist.estimation.bundle import save_bundle
from sbi_dist.posterior.posterior import PROMOTED
from sbi_dist.priors import BoxUniform, prior_to_data
from sbi_dist.serving.app import make_app
from sbi_dist.serving.options import ServeOptions
from sbi_dist.serving.question import ARROW
from sbi_dist.serving.service import Service
from sbi_dist.store import LocalStore
from tests.unit.test_untrusted_bundle import made

SAMPLE = "/v1/models/promoted/sample"
X = np.random.default_rng(0).normal(0, 0.5, (40, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("experiment")
    prior = prior_to_data(BoxUniform([-2.0] * 2, [2.0] * 2))
    about = {"prior": prior, "parameter_names": ["a", "b"], "model": "one"}
    save_bundle(LocalStore(root / "models/one"), made(seed=1), about)
    LocalStore(root).put(PROMOTED, json.dumps({"model": "one"}).encode())
    return root


def serve(root: Path, scenario: Callable[..., Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        service = Service(LocalStore(root), "test", ServeOptions(**options))
        app = make_app(service)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                await scenario(client, service, app)
            assert service.memory.used == 0
            assert service.queue.requests == 0 and service.queue.queued == 0

    asyncio.run(asyncio.wait_for(run(), 60))


def as_arrow(x: np.ndarray) -> bytes:
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as to:
        to.write_table(table)
    return sink.getvalue()


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert found["status"] == status and found["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return found


def test_draws_are_those_of_the_posterior_to_the_last_bit(root) -> None:
    posterior = Posterior.load(str(root))

    async def scenario(client, service, app) -> None:
        async def ask(some: np.ndarray, count: int, seed: int, arrow: bool) -> None:
            if arrow:
                answer = await client.post(
                    f"{SAMPLE}?num_samples={count}&seed={seed}",
                    content=as_arrow(some),
                    headers={"content-type": ARROW, "accept": ARROW},
                )
                table = pa.ipc.open_stream(answer.content).read_all()
                draws = table["draws"].combine_chunks().to_numpy_ndarray()
            else:
                body = {"x": some.tolist(), "num_samples": count, "seed": seed}
                answer = await client.post(SAMPLE, json=body)
                each = answer.json()["observations"]
                draws = np.array([one["draws"] for one in each], np.float32)
            expected = posterior.draws(torch.from_numpy(some), count, seed)[0].numpy()
            assert np.array_equal(draws, expected)

        bad = client.post(SAMPLE, json={"x": [[1, None, 2], [1, 2]], "num_samples": 7})
        asked = [
            ask(X[: 1 + 13 * (i % 3)], (7, 300, 600)[i % 3], i, bool(i % 2)) for i in range(12)
        ]
        await asyncio.gather(*asked, bad, ask(X[:1], 20_000, 3, True))

    serve(root, scenario, max_wait_s=60)


def test_what_is_refused(root) -> None:
    async def scenario(client, service, app) -> None:
        async def body(parts: int):
            for _ in range(parts):
                yield b" " * 50_000

        bomb = gzip.compress(b" " * 50_000_000)
        good = {"x": [[1, 1, 1]], "num_samples": 3}
        problem(await client.post(SAMPLE, content=b" " * 300_000), 413)
        problem(await client.post(SAMPLE, content=body(6)), 413)
        problem(await client.post(SAMPLE, content=bomb, headers={"content-encoding": "gzip"}), 413)
        problem(await client.post(SAMPLE, content=b"", headers={"content-length": "9" * 5000}), 413)
        problem(
            await client.post(SAMPLE, content=b"a", headers={"content-type": "text/plain"}), 415
        )
        problem(await client.post(SAMPLE, content=b"{"), 400)
        problem(await client.post("/v1/models/nope/sample", json=good), 404)
        problem(await client.get("/nope"), 404)
        problem(await client.get(SAMPLE), 405)
        for given in ("0", "-1", "nan", "abc"):
            problem(await client.post(SAMPLE, json=good, headers={"x-timeout-s": given}), 400)
        named = await client.post(SAMPLE, json=good, headers={"x-request-id": "my.id-1"})
        assert named.status_code == 200 and named.headers["x-request-id"] == "my.id-1"
        unfit = await client.post(SAMPLE, json=good, headers={"x-request-id": "a b"})
        assert unfit.headers["x-request-id"] != "a b"

        async def stalled():
            yield b"{"
            await asyncio.sleep(30)

        problem(await client.post(SAMPLE, content=stalled(), headers={"x-timeout-s": "0.1"}), 408)

    serve(root, scenario, max_body_mb=0.2)


def test_memory_of_a_body_in_parts_of_one_byte(root) -> None:
    async def scenario(client, service, app) -> None:
        async def bytewise():
            for byte in json.dumps({"x": [1, 1, 1], "num_samples": 2}).encode():
                yield bytes([byte])

        assert (await client.post(SAMPLE, content=bytewise())).status_code == 200

    serve(root, scenario)


def test_densities_and_summaries(root) -> None:
    async def scenario(client, service, app) -> None:
        body = {"x": X[:2].tolist(), "theta": [[0, 0], [9, 9]]}
        answer = await client.post("/v1/models/one/log_prob", json=body)
        for each in answer.json()["observations"]:
            assert each["log_prob"][0] is not None and each["log_prob"][1] is None
        body = {"x": X[:2].tolist(), "num_samples": 500, "quantiles": [0.5]}
        answer = await client.post("/v1/models/one/summary", json=body)
        draws = Posterior.load(str(root)).draws(torch.from_numpy(X[:2]), 500, 0)[0].numpy()
        for each, of in zip(answer.json()["observations"], draws, strict=True):
            np.testing.assert_allclose(each["mean"], of.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(each["quantiles"][0], np.median(of, 0), rtol=1e-5)

    serve(root, scenario)


def test_one_observation_that_can_not_be_drawn_for_fails_alone(root) -> None:
    async def scenario(client, service, app) -> None:
        model = await service.model("one", 1e18)
        draws = model.posterior.draws

        def fails(x, *given_):
            if (x[:, 0] == 1.5).any():
                raise RuntimeError("secret")
            return draws(x, *given_)

        object.__setattr__(model.posterior, "draws", fails)
        body = {"x": [[1, 1, 1], [1.5, 1, 1], [2, 1, 1]], "num_samples": 3}
        answer = await client.post(SAMPLE, json=body)
        found = answer.json()["observations"]
        assert [each["status"] for each in found] == ["ok", "failed", "ok"]
        assert found[1]["draws"] is None and "secret" not in answer.text

    serve(root, scenario)


def test_tokens(root, tmp_path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# ours\none\ntwo\n")

    async def scenario(client, service, app) -> None:
        async def status(token: str | None) -> int:
            headers = {} if token is None else {"authorization": f"Bearer {token}"}
            answer = await client.get("/v1/models", headers=headers)
            if answer.status_code == 401:
                assert answer.headers["www-authenticate"] == "Bearer"
            return answer.status_code

        asked = [None, "one", "two", "# ours", "", "on"]
        assert [await status(each) for each in asked] == [401, 200, 200, 401, 401, 401]
        path.write_text("three\n")
        assert [await status(each) for each in ("one", "three")] == [401, 200]
        path.write_text("four\n" * 300_000)  # too large: what was read last holds
        assert [await status(each) for each in ("three", "four")] == [200, 401]
        path.unlink()
        assert await status("three") == 200
        assert (await client.get("/")).headers["content-security-policy"].startswith("default-src")

    serve(root, scenario, tokens_file=str(path))


@pytest.mark.parametrize("whole", [False, True])
def test_a_caller_that_goes(root, whole) -> None:
    """In the midst of its body, and while its answer is computed."""

    async def scenario(client, service, app) -> None:
        body = json.dumps({"x": X.tolist(), "num_samples": 20_000}).encode()
        part = body if whole else body[:20]
        messages = [{"type": "http.request", "body": part, "more_body": not whole}]
        sent = []

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop(0)
            await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": SAMPLE, "raw_path": SAMPLE.encode(),
            "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": "",
        }  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 20)
        assert all(each.get("status", 499) in (200, 499) for each in sent)
        await asyncio.sleep(0.05)

    serve(root, scenario)


def test_a_reader_that_takes_nothing_is_given_up(root, monkeypatch) -> None:
    monkeypatch.setattr("sbi_dist.serving.gate._STALLED_S", 0.2)
    body = json.dumps({"x": X.tolist(), "num_samples": 20_000}).encode()

    async def scenario(_: Any, service: Service, app: Any) -> None:
        begun = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not begun.is_set():
                begun.set()
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": SAMPLE, "raw_path": SAMPLE.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "server": ("t", 80), "client": ("c", 1),
            "headers": [(b"content-type", b"application/json"), (b"x-timeout-s", b"3")],
        }  # fmt: skip
        with pytest.raises(TimeoutError):
            await app(scope, receive, send)
        assert service.queue.requests == 0

    serve(root, scenario)


def test_who_is_turned_away_waits_for_room_and_is_not_read(root, monkeypatch) -> None:
    monkeypatch.setattr("sbi_dist.serving.gate._HOLD_S", 0.2)
    question = {"x": X[:1].tolist(), "num_samples": 10}

    async def scenario(client, service, app) -> None:
        deadline = asyncio.get_running_loop().time() + 600
        with contextlib.ExitStack() as others:
            for _ in range(2):  # as many as there may be
                others.enter_context(service.queue.admitted(1e6, deadline))
            cut = await client.post(SAMPLE, content=b"{", headers={"x-request-id": "cut"})
            problem(cut, 503)  # where it is read, it is malformed
            assert int(cut.headers["retry-after"]) >= 1
            asked = [asyncio.create_task(client.post(SAMPLE, json=question)) for _ in range(3)]
            # Two are held; the third is answered while they are.
            first, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            assert len(first) == 1
            problem(first.pop().result(), 503)
        answers = [await each for each in asked]
        assert sorted(each.status_code for each in answers) == [200, 200, 503]
        problem(await client.post(SAMPLE, content=b"{"), 400)

    serve(root, scenario, max_wait_s=0.1, max_requests=2)


def test_an_answer_whose_time_is_up_in_its_midst_breaks_off(root, caplog) -> None:
    x = np.repeat(X, 50, axis=0).tolist()

    async def scenario(client, service, app) -> None:
        for seconds in (0.5, 1, 2, 4):  # on a busy machine it takes a while to begin
            headers = {"x-timeout-s": str(seconds), "x-request-id": "late"}
            body = {"x": x, "num_samples": 100_000}
            try:
                answer = await client.post(SAMPLE, json=body, headers=headers)
            except RuntimeError:
                break
            problem(answer, 504)
        else:
            raise AssertionError("no answer began")
        told = [record.getMessage() for record in caplog.records if "late" in record.getMessage()]
        assert len(told) == 1 and told[0].startswith("request late broke off: the request's time")
        assert service._requests["sample", "error"] == 0
        assert service._requests["sample", "timeout"] >= 1

    serve(root, scenario)


def test_who_is_turned_away_does_not_wait_beyond_its_time(root, monkeypatch) -> None:
    monkeypatch.setattr("sbi_dist.serving.gate._HOLD_S", 600.0)

    async def scenario(client, service, app) -> None:
        deadline = asyncio.get_running_loop().time() + 600
        with contextlib.ExitStack() as others:
            for _ in range(2):
                others.enter_context(service.queue.admitted(1e6, deadline))
            question = {"x": X[:1].tolist(), "num_samples": 10}
            problem(await client.post(SAMPLE, json=question, headers={"x-timeout-s": "0.1"}), 503)

    serve(root, scenario, max_requests=2)
