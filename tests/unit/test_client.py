"""Clients against a service that answers, and one that fails in every way."""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from sbi_dist.catalog.options import InferOptions
from sbi_dist.catalog.source import ArraySource, open_catalog
from sbi_dist.errors import InputError, StageError
from sbi_dist.serving import AsyncClient, Client
from sbi_dist.serving.client import RequestRefused, ServiceError
from sbi_dist.serving.client import job as division
from tests.unit import scripted_service as script
from tests.unit.scripted_service import Service, expected

X = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
N = 5


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service()
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def no_token(monkeypatch) -> None:
    monkeypatch.delenv("SBI_DIST_TOKEN", raising=False)


class Waiting:
    """An AsyncClient with the interface of a Client: a loop for every call."""

    def __init__(self, url: str, **arguments: Any) -> None:
        self._new = lambda: AsyncClient(url, **arguments)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            async with self._new() as client:
                found = getattr(client, name)(*args, **kwargs)
                if hasattr(found, "__aiter__"):
                    return [each async for each in found]
                return await found

        return lambda *args, **kwargs: asyncio.run(call(*args, **kwargs))


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request, service) -> Iterator[Callable[..., Any]]:
    """A client of the service."""
    made: list[Client] = []

    def new(**arguments: Any) -> Any:
        if request.param == "asyncio":
            return Waiting(service.url, **arguments)
        made.append(Client(service.url, **arguments))
        return made[-1]

    yield new
    for client in made:
        client.close()


def paths(service: Service) -> list[str]:
    return [asked.path.partition("?")[0] for asked in service.asked]


# ---- what is given back -------------------------------------------------------------------------


def test_sample(service, connect) -> None:
    found = connect().sample(X, N, seed=3, with_log_prob=True)
    assert (found.model, found.parameter_names) == ("model1", ["a", "b"])
    assert found.ids == [str(number) for number in range(7)] and found.statuses == ["ok"] * 7
    assert found.draws.dtype == np.float32 and found.draws.flags.writeable
    np.testing.assert_array_equal(found.draws, expected("model1", X, N, 3))
    np.testing.assert_array_equal(found.log_prob, script.log_prob(found.draws, X))
    np.testing.assert_array_equal(found.out_of_distribution, X[:, 0])
    np.testing.assert_array_equal(found.out_of_distribution_p, np.float32([0.5] * 7))
    assert connect().sample(X, N).log_prob is None
    assert isinstance(found.torch(), torch.Tensor) and found.torch().shape == (7, N, 2)


def test_summary(service, connect) -> None:
    found = connect().summary(X, 50, quantiles=[0.1, 0.5, 0.9], hdi=0.8)
    draws = expected("model1", X, 50)
    np.testing.assert_allclose(found.mean, draws.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.sd, draws.std(axis=1, ddof=1), rtol=1e-5)
    levels = np.quantile(draws, [0.1, 0.5, 0.9], axis=1).transpose(1, 0, 2)
    np.testing.assert_allclose(found.quantiles, levels, rtol=1e-4, atol=1e-6)
    assert found.covariance.shape == (7, 2, 2) and found.hdi.shape == (7, 2, 2)
    np.testing.assert_array_equal(found.map, draws[:, 0])
    assert (found.quantile_levels, found.hdi_mass) == ([0.1, 0.5, 0.9], 0.8)
    usual = connect().summary(X[0])
    assert usual.quantile_levels == InferOptions().quantiles and len(usual) == 1


def test_log_prob(service, connect) -> None:
    shared = np.array([[0, 1], [2, 3], [-200, 0]], dtype=np.float32)
    found = connect().log_prob(shared, X)
    own = np.broadcast_to(shared, (7, 3, 2)).copy()
    np.testing.assert_array_equal(found.log_prob, script.log_prob(own, X))
    assert np.isneginf(found.log_prob[:, 2]).all()
    own += np.arange(7, dtype=np.float32)[:, None, None]
    service.limits["max_observations"] = 2
    several = connect().log_prob(own, X)
    np.testing.assert_array_equal(several.log_prob, script.log_prob(own, X))
    assert len(service.asked) == 5


def test_models(service, connect) -> None:
    assert [each["model"] for each in connect().models()] == ["model1"]
    assert connect().model()["x_shape"] == [3] and connect().model("old")["model"] == "old"
    assert connect(model="old").sample(X, N).model == "old"
    assert connect(model="old").sample(X, N, model="older").model == "older"
    with pytest.raises(InputError, match="there is no model 'unknown model'"):
        connect().sample(X, N, model="unknown model")


def test_unusable_observations_have_no_posterior(service, connect) -> None:
    x = X.copy()
    x[2, 1], x[5, 0] = np.nan, np.inf
    found = connect().sample(x, N, with_log_prob=True)
    assert [number for number, each in enumerate(found.statuses) if each == "nonfinite"] == [2, 5]
    assert np.isnan(found.draws[[2, 5]]).all() and np.isnan(found.log_prob[[2, 5]]).all()
    np.testing.assert_array_equal(found.draws[found.ok], expected("model1", x, N)[found.ok])


def test_nothing_stands_in_for_a_posterior_that_failed(service, connect) -> None:
    """Also where the service left numbers there."""

    def fails(handler: Any, parts: list[bytes]) -> None:
        script.whole(handler, [part.replace(b"okok", b"failedok"[:4]) for part in parts])

    service.script.append(fails)
    # "okok" is the text of two statuses; their offsets stay, so it reads "fa" and "il".
    found = connect().sample(X[:2], N)
    assert found.statuses == ["fa", "il"] and np.isnan(found.draws).all()


def test_sources(service, connect) -> None:
    """A catalog keeps its identifiers and what it knows of its rows."""
    source = ArraySource.of("catalog", X, [f"star {number}" for number in range(7)])
    source._rows.status[1], source._rows.x[1] = 3, np.nan
    found = connect().sample(source, N)
    assert found.ids[6] == "star 6" and found.statuses[1] == "wrong_length"
    with pytest.raises(InputError, match="leave them out"):
        connect().sample(source, N, ids=["a"])


SHAPES = {
    "a list": X[0].tolist(),
    "lists": X.tolist(),
    "double": X.astype(np.float64),
    "a tensor": torch.from_numpy(X),
    "a tensor with gradient": torch.from_numpy(X).clone().requires_grad_(),
    "one": X[0],
    "a batch of one": X[:1],
}


@pytest.mark.parametrize("x", SHAPES.values(), ids=SHAPES.keys())
def test_observations_in_any_form(service, connect, x) -> None:
    array = np.atleast_2d(x.detach().numpy() if isinstance(x, torch.Tensor) else np.array(x))
    found = connect().sample(x, N, ids=[f"id{number}" for number in range(len(array))])
    assert found.ids[0] == "id0"
    np.testing.assert_array_equal(found.draws, expected("model1", array, N))


def test_integers_are_numbers(service, connect) -> None:
    x = torch.tensor([[1, 2, 3]])
    np.testing.assert_array_equal(connect().sample(x, N).draws, expected("model1", x.numpy(), N))


WRONG = {
    "another length": ({"x": X[:, :2]}, r"x has shape \(7, 2\); an observation has shape \(3,\)"),
    "text": ({"x": [["a", "b", "c"]]}, "x has dtype <U1"),
    "logical": ({"x": X > 0}, "x has dtype bool"),
    "complex": ({"x": X.astype(complex)}, "x has dtype complex128"),
    "a complex tensor": ({"x": torch.ones(3, dtype=torch.complex64)}, "dtype complex64"),
    "ragged": ({"x": [[1.0], [1.0, 2.0]]}, "x is no array"),
    "nothing": ({"x": X[:0]}, "x holds no observation"),
    "too few identifiers": ({"x": X, "ids": ["a"]}, r"ids are 1 for 7 observation\(s\)"),
    "one identifier twice": ({"x": X[:2], "ids": ["a", "a"]}, "the same identifier twice"),
    "no draws": ({"x": X, "num_samples": 0}, "num_samples is 0"),
    "half a draw": ({"x": X, "num_samples": 0.5}, "num_samples is 0.5"),
    "a seed below 0": ({"x": X, "seed": -1}, "seed is -1; it must be a whole number, at least 0"),
    "too many draws": ({"x": X, "num_samples": 10**7}, "the service takes at most 1,000,000"),
    "no model": ({"x": X, "model": "a/b?c"}, None),
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_asked(service, connect, arguments, sentence) -> None:
    if sentence is None:  # names of models are data, not paths
        assert connect().sample(**arguments).model == "a/b?c"
        return
    with pytest.raises(InputError, match=sentence):
        connect().sample(**arguments)
    assert not service.asked


def test_what_a_summary_or_a_density_cannot_be_of(service, connect) -> None:
    for arguments, sentence in (
        ({"quantiles": [0.5, 0.1]}, "quantiles is"),
        ({"quantiles": []}, "quantiles is"),
        ({"quantiles": [float("nan")]}, "quantiles is"),
        ({"hdi": 1.0}, "hdi is 1"),
        ({"num_samples": 1}, "num_samples is 1"),
    ):
        with pytest.raises(InputError, match=sentence):
            connect().summary(X, **arguments)
    for theta in (np.zeros((4, 3)), np.zeros((6, 4, 2)), 1.0, np.zeros((0, 2))):
        with pytest.raises(InputError, match="theta has shape"):
            connect().log_prob(theta, X)
    service.limits["max_body_mb"] = 0.001
    with pytest.raises(InputError, match=r"the service takes 0.001 MB"):
        connect().log_prob(np.zeros((1000, 2)), X)
    assert not service.asked


# ---- large batches ------------------------------------------------------------------------------

LIMITS = [
    ({"max_observations": 3}, 3),
    ({"max_total_draws": 2 * N + 1}, 4),
    ({"max_body_mb": 0.0003}, 3),
]


@pytest.mark.parametrize(("limits", "requests"), LIMITS)
def test_batches_are_divided_by_the_limits(service, connect, limits, requests) -> None:
    service.limits |= limits
    found = connect().sample(X, N)
    np.testing.assert_array_equal(found.draws, expected("model1", X, N))
    assert len(service.asked) == requests
    sizes = [len(asked.ids) for asked in service.asked]
    assert sum(sizes) == 7 and max(sizes) - min(sizes) <= 2
    assert found.ids == [str(number) for number in range(7)]


def test_large_answers_are_divided_too(service, connect, monkeypatch) -> None:
    monkeypatch.setattr(division, "_PIECE_DRAWS", 2 * N)
    assert len(connect().sample(X, N)) == 7 and len(service.asked) == 4
    service.asked.clear()
    monkeypatch.setattr(division, "_PIECE_BYTES", 4 * 3 * N)
    assert len(connect().sample(X, N)) == 7 and len(service.asked) == 7


def test_one_result_is_of_one_model(service, connect) -> None:
    """Another one is promoted after the first request of several."""
    service.limits["max_observations"] = 1
    service.script.append(script.promotes("model2"))
    found = connect().sample(X, N)
    np.testing.assert_array_equal(found.draws, expected("model1", X, N))
    assert set(paths(service)) == {"/v1/models/model1/sample"}


def test_what_is_promoted_is_asked_anew(service) -> None:
    """Though a client keeps what it knows of models."""
    with Client(service.url) as client:
        assert client.sample(X, N).model == "model1"
        service.promoted = "model2"
        assert client.sample(X, N).model == "model2" and service.described == 1
        service.limits["max_observations"] = 3
        service.promoted = "model3"
        assert client.sample(X, N).model == "model3"
        assert [len(asked.ids) for asked in service.asked] == [7, 7, 3, 3, 1]
        service.promoted = "model4"
        assert client.sample(X, N).model == "model4"


def test_a_stream_asks_only_for_what_is_wanted(service) -> None:
    service.limits["max_observations"] = 2
    with Client(service.url) as client:
        stream = client.sample_stream(X, N)
        first = next(stream)
        assert len(first) == 2 and len(service.asked) == 1
        np.testing.assert_array_equal(first.draws, expected("model1", X[:2], N))
        rest = list(stream)
    assert [each for part in rest for each in part.ids] == ["2", "3", "4", "5", "6"]


def test_a_stream_gives_what_there_is(service) -> None:
    """The first observations of a request, while the service works at the others."""
    service.script.append(script.stalls(5.0))
    began = time.monotonic()
    with Client(service.url) as client:
        stream = client.sample_stream(X, N)
        assert next(stream).ids == ["0", "1"]
        stream.close()
    assert time.monotonic() - began < 2


def test_several_requests_are_under_way_at_once(service) -> None:
    service.limits["max_observations"], service.work_s = 1, 0.1

    async def ask(in_flight: int) -> tuple[Any, int]:
        service.most_at_once = 0
        async with AsyncClient(service.url, in_flight=in_flight) as client:
            return await client.sample(X, N), service.most_at_once

    found, at_once = asyncio.run(ask(3))
    assert at_once == 3
    np.testing.assert_array_equal(found.draws, expected("model1", X, N))
    assert asyncio.run(ask(1))[1] == 1


def test_what_is_left_early_is_asked_no_more(service) -> None:
    service.limits["max_observations"] = 1
    slow = script.stalls(5.0)
    service.script += [None, slow, slow]

    async def ask() -> int:
        async with AsyncClient(service.url, in_flight=2) as client:
            stream = client.sample_stream(np.tile(X, (10, 1)), N)
            async for _ in stream:
                break
            await stream.aclose()
            assert len(asyncio.all_tasks()) == 1
            return len(service.asked)

    began = time.monotonic()
    assert asyncio.run(ask()) <= 3
    assert time.monotonic() - began < 2


def test_catalogs_that_change_meanwhile(service, tmp_path) -> None:
    path = tmp_path / "catalog.npy"
    np.save(path, X)
    service.limits["max_observations"] = 2
    with Client(service.url) as client:
        stream = client.sample_stream(open_catalog(str(path), (3,)), N)
        next(stream)
        np.save(path, X + 1)
        with pytest.raises(StageError, match="was changed or removed"):
            list(stream)


def test_a_client_may_be_used_by_threads(service) -> None:
    found: dict[int, Any] = {}
    with Client(service.url) as client:

        def ask(seed: int) -> None:
            found[seed] = client.sample(X, N, seed)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    for seed in range(8):
        np.testing.assert_array_equal(found[seed].draws, expected("model1", X, N, seed))


# ---- what passes --------------------------------------------------------------------------------

PASSING = {
    "busy": script.busy(None),
    "busy, and says when": script.busy(0),
    "too many requests": script.busy(None, 429),
    "no body in time": script.busy(None, 408),
    "a proxy without its service": script.says(502, "text/html", b"<html>Bad gateway</html>"),
    "a proxy whose service died": script.says(500, "text/plain", b"Internal Server Error"),
    "reset before the schema": script.breaks(-1, 10),
    "reset after the schema": script.breaks(0),
    "reset between batches": script.breaks(2),
    "reset in a batch": script.breaks(2, 40),
    "ended after the schema": script.breaks(0, clean=True),
    "ended between batches": script.breaks(2, clean=True),
    "ended in a prefix": script.breaks(2, 5, clean=True),
    "ended in a batch": script.breaks(2, 300, clean=True),
    "ended at once": script.breaks(-1, clean=True),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_what_passes_is_asked_again(service, connect, fault) -> None:
    service.script += [fault, fault]
    found = connect().sample(X, N)
    np.testing.assert_array_equal(found.draws, expected("model1", X, N))
    assert found.ids == [str(number) for number in range(7)] and found.model == "model1"
    assert len(service.asked) >= 2


def test_an_answer_that_lacks_nothing_but_its_end_is_whole(service, connect) -> None:
    service.script.append(script.breaks(4, 4))
    np.testing.assert_array_equal(connect().sample(X, N).draws, expected("model1", X, N))
    assert len(service.asked) == 1


def test_what_came_is_not_asked_again(service, connect) -> None:
    service.script += [script.breaks(1), script.breaks(2)]
    found = connect().sample(X, N)
    np.testing.assert_array_equal(found.draws, expected("model1", X, N))
    assert [asked.ids[0] for asked in service.asked] == ["0", "2", "6"]


def test_a_request_goes_on_with_its_model(service, connect) -> None:
    """Another one is promoted before the connection breaks."""
    service.script.append(script.promotes("model2", script.breaks(1)))
    found = connect().sample(X, N)
    np.testing.assert_array_equal(found.draws, expected("model1", X, N))
    assert paths(service) == ["/v1/models/promoted/sample", "/v1/models/model1/sample"]


def test_what_came_of_another_model_does_not_pass(service, connect) -> None:
    def answers_with_another(handler: Any, parts: list[bytes]) -> None:
        script.whole(handler, [part.replace(b"model1", b"model2") for part in parts])

    service.script += [script.breaks(1), answers_with_another]
    with pytest.raises(ServiceError, match="answered with model model2, not model1"):
        connect().sample(X, N)


def test_the_service_says_when_to_come_back(service, connect) -> None:
    service.script.append(script.busy(1))
    began = time.monotonic()
    assert len(connect().sample(X, N)) == 7
    assert 1 <= time.monotonic() - began < 3


def test_descriptions_are_asked_again_too(service, connect, monkeypatch) -> None:
    real, fails = script.Handler.do_GET, itertools.count()

    def sometimes(handler: Any) -> None:
        if next(fails) == 0:
            handler.problem(503, "Loading", "the model is being loaded")
        else:
            real(handler)

    monkeypatch.setattr(script.Handler, "do_GET", sometimes)
    assert connect().model()["model"] == "model1"


# ---- what does not pass -------------------------------------------------------------------------

STRANGE = {
    "a page": (script.says(200, "text/html", b"<html>hello</html>"), "text/html, not"),
    "JSON": (script.says(200, "application/json", b"{}"), "application/json, not"),
    "no Arrow": (script.says(200, script.ARROW, b"<html>hello</html>"), "does not begin like"),
    "zeros": (script.says(200, script.ARROW, b"\xff" * 4 + b"\x10\0\0\0" + b"\0" * 16), "read"),
    "an observation less": (script.leaves_out, r"1 observation\(s\) are missing"),
    "a redirection": (script.says(307, "text/plain", b""), "HTTP status 307"),
    "its own fault": (script.refuses(500, "Internal error", "it broke"), "it broke"),
    "too late": (script.refuses(504, "Too late", "past the deadline"), "past the deadline"),
}


@pytest.mark.parametrize(("fault", "sentence"), STRANGE.values(), ids=STRANGE.keys())
def test_what_can_not_be_used_is_not_asked_again(service, connect, fault, sentence) -> None:
    service.script.append(fault)
    with pytest.raises(ServiceError, match=sentence) as caught:
        connect().sample(X, N)
    assert isinstance(caught.value, StageError) and service.url in str(caught.value)
    assert len(service.asked) == 1


def test_bytes_after_the_end(service, connect) -> None:
    service.script.append(lambda handler, parts: script.whole(handler, [*parts, b"more"]))
    with pytest.raises(ServiceError, match="bytes follow the end"):
        connect().sample(X, N)


def test_answers_to_something_else(service, connect) -> None:
    """In another order, of another number of draws, or without a column."""

    def exchanged(handler: Any, parts: list[bytes]) -> None:
        script.whole(handler, [parts[0], parts[2], parts[1], *parts[3:]])

    service.script.append(exchanged)
    with pytest.raises(ServiceError, match="in another order"):
        connect().sample(X, N)
    for old, new in ((b'"shape":[5,2]', b'"shape":[2,5]'), (b"draws", b"drown")):
        service.script.append(
            lambda handler, parts, old=old, new=new: script.whole(
                handler, [part.replace(old, new) for part in parts]
            )
        )
        with pytest.raises(ServiceError, match="its answer can't be read"):
            connect().sample(X, N)


@pytest.mark.parametrize("status", [400, 404, 405, 413, 415, 422])
def test_refusals(service, connect, status) -> None:
    service.script.append(script.refuses(status, "Bad thing", "num_samples is 3"))
    with pytest.raises(RequestRefused, match="Bad thing: num_samples is 3") as caught:
        connect().sample(X, N)
    assert isinstance(caught.value, InputError)
    assert (caught.value.status, caught.value.request_id) == (status, "request-7")
    assert "request-7" in str(caught.value) and len(service.asked) == 1


def test_after_a_refusal_the_model_is_looked_at_again(service) -> None:
    with Client(service.url) as client:
        client.sample(X, N)
        service.limits["max_observations"] = 2
        service.script.append(script.refuses(413))
        with pytest.raises(RequestRefused):
            client.sample(X, N)
        assert len(client.sample(X, N)) == 7
    assert [len(asked.ids) for asked in service.asked] == [7, 7, 2, 2, 2, 1]


FOR_EVER = {
    "busy": (script.busy(None), "Saturated: try again later, 3 times in a row"),
    "ended": (script.breaks(0, clean=True), "the answer was broken off, 3 times in a row"),
    "reset": (script.breaks(0), "the connection failed .*, 3 times in a row"),
}


@pytest.mark.parametrize(("fault", "sentence"), FOR_EVER.values(), ids=FOR_EVER.keys())
def test_nothing_is_asked_for_ever(service, connect, fault, sentence) -> None:
    service.script += [fault] * 10
    with pytest.raises(ServiceError, match=sentence):
        connect(retries=2).sample(X, N)
    assert len(service.asked) == 3
    with pytest.raises(ServiceError):
        connect(retries=0).sample(X, N)
    assert len(service.asked) == 4


def test_a_busy_service_is_waited_for_as_long_as_there_is_time(service, connect) -> None:
    service.script += [script.busy(0)] * 5
    assert len(connect(retries=1).sample(X, N)) == 7
    service.script.append(script.busy(30))
    began = time.monotonic()
    with pytest.raises(ServiceError, match=r"within timeout_s, 2 s \(last: Saturated"):
        connect(timeout_s=2).sample(X, N)
    assert time.monotonic() - began < 1  # not until the end of a time that is too short


def test_slow_services(service, connect) -> None:
    service.work_s = 5.0
    began = time.monotonic()
    with pytest.raises(ServiceError, match=r"not done within timeout_s, 0.4 s"):
        connect(timeout_s=0.4).sample(X, N)
    assert time.monotonic() - began < 1.5
    assert 0 < float(service.asked[0].headers["X-Timeout-S"]) <= 0.4
    service.work_s = 0


def test_stalled_answers(service, connect) -> None:
    service.script.append(script.stalls(5.0))
    began = time.monotonic()
    with pytest.raises(ServiceError, match="not done within timeout_s"):
        connect(timeout_s=0.5).sample(X, N)
    assert time.monotonic() - began < 2


def test_the_callers_own_time_does_not_count(service) -> None:
    with Client(service.url, timeout_s=0.5) as client:
        stream = client.sample_stream(X, N)
        next(stream)
        time.sleep(0.7)
        assert sum(len(each) for each in stream) == 5


def test_no_service(connect, service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    for client in (Client(url, retries=2), Waiting(url, retries=2)):
        with pytest.raises(ServiceError, match=f"{url}: the connection failed .* 3 times"):
            client.sample(X, N)


# ---- addresses and tokens -----------------------------------------------------------------------

SECRET = "s3cret-t0ken"


def test_tokens(service, connect, tmp_path, monkeypatch) -> None:
    service.token = SECRET
    with pytest.raises(RequestRefused, match="give its token with token_file") as caught:
        connect().sample(X, N)
    assert caught.value.status == 401
    with pytest.raises(RequestRefused, match="the token that was given is none of the service's"):
        connect(token="another").sample(X, N)
    assert len(connect(token=SECRET).sample(X, N)) == 7
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    assert len(connect(token_file=file).sample(X, N)) == 7
    monkeypatch.setenv("SBI_DIST_TOKEN", SECRET)
    assert len(connect().sample(X, N)) == 7
    with pytest.raises(RequestRefused):
        connect(token="another").sample(X, N)


def test_tokens_are_never_shown(service, connect) -> None:
    def echoes(handler: Any, parts: list[bytes]) -> None:
        handler.problem(500, "Echo", f"you sent {handler.headers['Authorization']}")

    assert SECRET not in repr(Client(service.url, token=SECRET))
    assert SECRET not in repr(AsyncClient(service.url, token=SECRET))
    service.script.append(echoes)
    with pytest.raises(ServiceError, match="you sent Bearer") as caught:
        connect(token=SECRET).sample(X, N)
    assert SECRET not in str(caught.value)
    for wrong in (f"{SECRET}\nX: y", f"{SECRET} {SECRET}", f"{SECRET}ü"):
        with pytest.raises(InputError, match="token holds no token") as refused:
            Client(service.url, token=wrong)
        assert SECRET not in str(refused.value)


def test_files_without_a_token(tmp_path) -> None:
    with pytest.raises(InputError, match="can't be read"):
        Client("http://host", token_file=tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(InputError, match="holds no token"):
        Client("http://host", token_file=tmp_path / "empty")
    with pytest.raises(InputError, match="give one of them"):
        Client("http://host", token="a", token_file=tmp_path / "empty")


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "", "http://[::1"]
)
def test_addresses_that_are_none(url) -> None:
    with pytest.raises(InputError, match="it must be as in http://host:8000"):
        Client(url)


def test_passwords_in_addresses_are_not_shown() -> None:
    with pytest.raises(InputError, match="user or password") as caught:
        Client("http://user:secret@host")
    assert "secret" not in str(caught.value)


def test_services_under_a_path() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, json={"models": []})

    with Client("http://host/posteriors/", transport=httpx.MockTransport(answer)) as client:
        assert client.models() == []
    assert asked == ["http://host/posteriors/v1/models"]


@pytest.mark.parametrize(
    "arguments", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"retries": -1}]
)
def test_options_that_cannot_be(arguments) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        Client("http://host", **arguments)


def test_a_client_needs_neither_ray_nor_a_web_framework_nor_torch() -> None:
    code = (
        "import sys; from sbi_dist.serving import AsyncClient, Client; Client('http://host');"
        "print([name for name in ('ray', 'fastapi', 'starlette', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
