"""The service, asked by tritonclient over a socket, and by bodies as KServe's client sends them."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.http.aio import InferenceServerClient as AsyncClient
from tritonclient.utils import InferenceServerException

from sbi_dist.estimation.bundle import OUT_OF_DISTRIBUTION, save_bundle
from sbi_dist.estimation.data import ArraySource, examples
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.out_of_distribution import OutOfDistribution
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.posterior import Posterior
from sbi_dist.posterior.posterior import PROMOTED
from sbi_dist.priors import BoxUniform, prior_to_data
from sbi_dist.serving.app import make_app
from sbi_dist.serving.open_inference import answers
from sbi_dist.serving.open_inference.protocol import HEAD_LENGTH
from sbi_dist.serving.options import ServeOptions
from sbi_dist.serving.service import Service
from sbi_dist.store import LocalStore

X_SHAPE = (2, 3)
X = np.random.default_rng(1).normal(size=(5, *X_SHAPE)).astype(np.float32)
USUAL = ("draws", "status", "out_of_distribution", "out_of_distribution_p")


def save_model(store: LocalStore, name: str) -> None:
    """An untrained model with all that a bundle has."""
    rng = np.random.default_rng(0)
    theta = rng.uniform(-2, 2, (500, 2)).astype(np.float32)
    x = rng.normal(size=(500, *X_SHAPE)).astype(np.float32)
    options = TrainOptions(transforms=2, hidden_features=16, blocks=1, bins=6)
    bounds = np.full(2, -2.0), np.full(2, 2.0)
    standardization = Standardization.fit(theta, x, *bounds, options.x_scale)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        estimator = DensityEstimator(options, standardization, X_SHAPE).eval()
    some = map(torch.from_numpy, examples(ArraySource(theta, x), 0.2, 0))
    about = {
        "prior": prior_to_data(BoxUniform([-2.0, -2.0], [2.0, 2.0])),
        "parameter_names": ["mass", "age"],
        OUT_OF_DISTRIBUTION: OutOfDistribution.fit(estimator, *some).to_data(),
    }
    save_bundle(store.child(f"models/{name}"), estimator, about)


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """A server on a free port, as HOST:PORT."""
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> LocalStore:
    store = LocalStore(tmp_path_factory.mktemp("experiment"))
    save_model(store, "m1")
    store.put(PROMOTED, b'{"model": "m1"}')
    store.child("models/broken").put("bundle.json", b"{}")
    return store


@pytest.fixture(scope="module")
def posterior(store) -> Posterior:
    return Posterior.load(store.uri)


@pytest.fixture(scope="module")
def address(store) -> Iterator[str]:
    options = ServeOptions(max_observations=100, max_draws=5000, max_body_mb=1)
    with running(make_app(Service(store, "test", options))) as address:
        yield address


@pytest.fixture
def client(address) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(address) as client:
        yield client


def observations(x: np.ndarray = X, binary: bool = True) -> list[InferInput]:
    return [InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x, binary_data=binary)]


# ---- what is told -------------------------------------------------------------------------------


def test_health(client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("promoted") and client.is_model_ready("m1", "1")
    assert not client.is_model_ready("m1", "2")
    assert not client.is_model_ready("m2")
    assert not client.is_model_ready("broken")


def test_metadata(client):
    server = answers.ServerMetadata.model_validate(client.get_server_metadata(), strict=True)
    assert server.name == "sbi_dist" and "binary_tensor_data" in server.extensions
    metadata = client.get_model_metadata("promoted")
    answers.ModelMetadata.model_validate(metadata, strict=True)
    assert metadata == client.get_model_metadata("m1", "1") and metadata["name"] == "m1"
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2, 3]}]
    assert metadata["outputs"][0] == {"name": "draws", "datatype": "FP32", "shape": [-1, -1, 2]}
    assert metadata["properties"]["parameter_names"] == "mass,age"
    config = client.get_model_config("m1", "1")
    answers.ModelConfig.model_validate(config, strict=True)
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 2, 3]}]


def test_index(client, address):
    assert not client.is_model_ready("broken")
    index = {each["name"]: each for each in client.get_model_repository_index()}
    assert index["m1"] == {"name": "m1", "version": "1", "state": "READY", "reason": ""}
    assert index["broken"]["state"] == "UNAVAILABLE" and index["broken"]["reason"]
    url = f"http://{address}/v2/repository/index"
    assert [each["name"] for each in httpx.post(url, json={"ready": True}).json()] == ["m1"]
    for body in (b"[", b"[]", b'{"ready": 1}'):
        assert httpx.post(url, content=body).status_code == 400


# ---- draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_draws_are_the_posteriors(client, posterior, binary, packed):
    outputs = [InferRequestedOutput(name, binary) for name in (*USUAL, "log_prob")]
    result = client.infer(
        "promoted",
        observations(binary=binary),
        outputs=outputs,
        request_id="mine",
        parameters={"num_samples": 50, "seed": 3},
        request_compression_algorithm=packed,
        response_compression_algorithm=packed,
    )
    answers.InferResponse.model_validate(result.get_response(), strict=True)
    assert result.get_response()["id"] == "mine" and result.get_response()["model_name"] == "m1"
    draws, log_prob = posterior.draws(torch.from_numpy(X), 50, 3, with_log_prob=True)
    assert log_prob is not None
    np.testing.assert_allclose(result.as_numpy("draws"), draws, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.as_numpy("log_prob"), log_prob, rtol=1e-4, atol=1e-4)
    scores = posterior.out_of_distribution(torch.from_numpy(X))
    for name, expected in zip(USUAL[2:], scores, strict=True):
        np.testing.assert_allclose(result.as_numpy(name), expected, rtol=1e-4)
    assert result.as_numpy("status").tolist() == [b"ok" if binary else "ok"] * len(X)


def test_one_that_names_nothing_gets_the_usual_outputs(client, posterior):
    result = client.infer("m1", observations(), "1")
    assert [each["name"] for each in result.get_response()["outputs"]] == list(USUAL)
    draws, _ = posterior.draws(torch.from_numpy(X), 1000, 0)
    np.testing.assert_allclose(result.as_numpy("draws"), draws, rtol=1e-5, atol=1e-5)


def test_a_bad_observation_keeps_its_place(client, posterior):
    x = X.copy()
    x[1, 0, 0], x[3, 1, 2] = np.nan, np.inf
    for binary in (True, False):
        result = client.infer("m1", observations(x, binary), parameters={"num_samples": 20})
        status = [b"ok", b"nonfinite", b"ok", b"nonfinite", b"ok"]
        assert result.as_numpy("status").tolist() == status
        draws, _ = posterior.draws(torch.from_numpy(X), 20, 0)
        np.testing.assert_allclose(result.as_numpy("draws")[::2], draws[::2], rtol=1e-5, atol=1e-5)
        assert np.isnan(result.as_numpy("draws")[1::2]).all()


def test_many_at_once(client, posterior):
    asked = [
        client.async_infer("m1", observations(X + shift), parameters={"num_samples": 10})
        for shift in np.arange(8, dtype=np.float32)
    ]
    for shift, each in enumerate(asked):
        draws, _ = posterior.draws(torch.from_numpy(X + np.float32(shift)), 10, 0)
        found = each.get_result().as_numpy("draws")
        np.testing.assert_allclose(found, draws, rtol=1e-5, atol=1e-5)


def test_the_asynchronous_client(address, posterior):
    async def ask() -> Any:
        async with AsyncClient(address) as client:
            assert await client.is_server_ready() and await client.is_model_ready("m1")
            plain = await client.infer("m1", observations())
            packed = await client.infer("m1", observations(), response_compression_algorithm="gzip")
            return plain.as_numpy("draws"), packed.as_numpy("draws")

    plain, packed = asyncio.run(ask())
    np.testing.assert_array_equal(plain, packed)
    draws, _ = posterior.draws(torch.from_numpy(X), 1000, 0)
    np.testing.assert_allclose(plain, draws, rtol=1e-5, atol=1e-5)


def test_as_kserves_client_asks(address):
    tensor = {"name": "x", "shape": [1, 2, 3], "datatype": "FP32", "data": X[0].ravel().tolist()}
    body = {"id": "1", "model_name": "m1", "inputs": [tensor], "parameters": {"num_samples": 3}}
    answer = httpx.post(f"http://{address}/v2/models/m1/infer", json=body)
    # httpx says that it takes any coding; packing what it did not ask for takes time.
    assert "content-encoding" not in answer.headers and answer.headers["x-sbi-model"] == "m1"
    outputs = {each["name"]: each for each in answer.json()["outputs"]}
    assert outputs["draws"]["shape"] == [1, 3, 2] and len(outputs["draws"]["data"]) == 6
    assert outputs["status"]["data"] == ["ok"]
    for name in ("live", "ready"):
        assert httpx.get(f"http://{address}/v2/health/{name}").json() == {name: True}
    ready = httpx.get(f"http://{address}/v2/models/promoted/ready").json()
    assert ready == {"name": "m1", "ready": True}


# ---- refusals -----------------------------------------------------------------------------------


def test_what_is_refused_says_why(client):
    for status, message, model, x, parameters in [
        ("404", "no model 'm2'", "m2", X, {}),
        ("400", r"shape is \[5, 6\]; .* \[observations, 2, 3\]", "m1", X.reshape(5, 6), {}),
        ("400", "did you mean 'num_samples'", "m1", X, {"num_sampels": 10}),
        ("413", "num_samples is 5,001", "m1", X, {"num_samples": 5001}),
        ("413", "101 observations", "m1", np.zeros((101, *X_SHAPE), np.float32), {}),
    ]:
        with pytest.raises(InferenceServerException, match=message) as caught:
            client.infer(model, observations(x), parameters=parameters)
        assert caught.value.status() == status
    with pytest.raises(InferenceServerException, match="no version '2'"):
        client.infer("m1", observations(), "2")
    shared = InferInput("x", [5, 2, 3], "FP32").set_shared_memory("region", 120)
    with pytest.raises(InferenceServerException, match="shared memory is not supported"):
        client.infer("m1", [shared])


def test_the_time_that_a_client_has(client):
    with pytest.raises(InferenceServerException) as caught:
        client.infer("m1", observations(), timeout=1)
    assert caught.value.status() == "504"


def test_errors_are_the_protocols_and_problem_documents(address):
    url = f"http://{address}/v2/models/m1/infer"
    bomb = gzip.compress(bytes(50_000_000))
    for status, content, headers in [
        (400, b"{", {}),
        (413, bytes(1_000_001), {}),
        (413, bomb, {"Content-Encoding": "gzip"}),
        (415, b"{}", {"Content-Encoding": "br"}),
    ]:
        answer = httpx.post(url, content=content, headers=headers)
        problem = answer.json()
        assert answer.status_code == problem["status"] == status
        assert problem["error"] == problem["detail"] and problem["title"] and problem["type"]
        # KServe's client reads the error of exactly this type.
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"]


def test_no_route_is_in_the_documentation_without_its_answers(address):
    documented = httpx.get(f"http://{address}/openapi.json").json()["paths"]
    for path, operations in documented.items():
        if not path.startswith("/v2"):
            continue
        for operation in operations.values():
            statuses = set(operation["responses"]) - {"422"}
            expected = {"200"} if path == "/v2/health/live" else {"200", "401", "503"}
            if path == "/v2/health/ready":
                expected = {"200", "503"}
            if path == "/v2":
                expected = {"200", "401"}
            assert expected <= statuses
    infer = documented["/v2/models/{model}/versions/{version}/infer"]["post"]
    wanted = {"200", "400", "401", "404", "408", "409", "413", "415", "503", "504"}
    assert wanted <= set(infer["responses"])


def test_tokens(store, tmp_path: Path):
    tokens = tmp_path / "tokens"
    tokens.write_text("a-token-that-is-long-enough-0123456789\n")
    tokens.chmod(0o600)
    service = Service(store, "test", ServeOptions(tokens_file=str(tokens)))
    with running(make_app(service)) as address, InferenceServerClient(address) as client:
        assert client.is_server_live() and client.is_server_ready()
        with pytest.raises(InferenceServerException, match="no valid token") as caught:
            client.infer("m1", observations())
        assert caught.value.status() == "401"
        bearer = {"Authorization": f"Bearer {tokens.read_text().strip()}"}
        result = client.infer("m1", observations(), headers=bearer)
        assert result.as_numpy("draws").shape == (5, 1000, 2)


def test_nothing_is_drawn_for_one_who_is_gone(store):
    service = Service(store, "test", ServeOptions())
    with running(make_app(service)) as address, InferenceServerClient(address) as client:
        body, length = client.generate_request_body(
            observations(np.repeat(X, 8, axis=0)), parameters={"num_samples": 1_000_000}
        )
        url, headers = f"http://{address}/v2/models/m1/infer", {HEAD_LENGTH: str(length)}
        # Forty million draws, of which none is waited for.
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, content=body, headers=headers, timeout=0.5)
        end = time.monotonic() + 5
        while service.queue.requests or service.memory.used:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert client.infer("m1", observations()).as_numpy("draws").shape == (5, 1000, 2)
