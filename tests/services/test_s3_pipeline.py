"""The whole pipeline on a real S3 server that dies, or behind a network that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sbi_dist.cli import run_command
from sbi_dist.problem import load_problem
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.shard import Simulations
from sbi_dist.store import ObjectStore, S3Store
from tests.ray.conftest import calm as undisturbed
from tests.services.proxy import Proxy
from tests.services.s3_server import S3Server

# Slow enough to be disturbed in the middle, with rows that depend on the random stream.
PROBLEM = """
import time

from sbi_dist import BoxUniform, Problem


def simulator(theta, rng):
    time.sleep(0.004)
    return theta + 0.1 * rng.standard_normal(2)


problem = Problem(
    BoxUniform([-1.0, 0.0], [1.0, 2.0]), simulator, parameter_names=["a", "b"], observed=[0.1, 1.0]
)
"""
EXPERIMENT: dict[str, Any] = {
    "name": "experiment",
    "problem": "problem.py:problem",
    "simulate": {"num_simulations": 1500, "shard_size": 20},
    "train": {"transforms": 2, "hidden_features": 16, "max_epochs": 3, "workers": 0},
    "calibrate": {"enabled": False},  # trained for a moment, it would fail
    "infer": {"num_samples": 500, "predictive_simulations": 20},
}
SHARDS = 75


def write(folder: Path, problem: str = PROBLEM) -> None:
    """The experiment's files."""
    (folder / "problem.py").write_text(problem)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """``sbi-dist`` with a Ray of its own, in a folder with the experiment."""
    write(folder)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_ADDRESS"))}
    return subprocess.Popen(
        [sys.executable, "-m", "sbi_dist", *arguments],
        cwd=folder,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str, str]:
    """Exit code and what it said."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


@pytest.fixture
def here(
    become: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """``sbi-dist`` in this process, as an identity of the server's; see ``ended``."""
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.chdir(tmp_path)
    write(tmp_path)

    def run(
        *arguments: str, identity: str = "admin", endpoint: str | None = None
    ) -> tuple[int, str, str]:
        become(identity, endpoint)
        capfd.readouterr()
        code = run_command(list(arguments))
        return code, *capfd.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def columns(store: ObjectStore) -> Simulations:
    """The rows of the experiment's only dataset."""
    (identity,) = store.folders("experiment/simulations/")
    dataset = Dataset(store.child(f"experiment/simulations/{identity}"))
    assert dataset.indexes() == set(range(SHARDS))
    return dataset.read_all(range(SHARDS))


def same(one: Simulations, other: Simulations) -> bool:
    return (
        np.array_equal(one.simulation_id, other.simulation_id)
        and one.theta.tobytes() == other.theta.tobytes()
        and one.x.tobytes() == other.x.tobytes()
        and one.failed == other.failed
    )


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Simulations:
    """What is simulated where nothing goes wrong: in this process, without waiting."""
    folder = tmp_path_factory.mktemp("calm")
    write(folder, PROBLEM.replace("time.sleep(0.004)", "pass"))
    problem = load_problem("problem.py:problem", folder)
    return undisturbed(problem, EXPERIMENT["simulate"]["num_simulations"], 20)


def shards_stored(store: S3Store) -> int:
    return sum(key.rpartition("/")[2].startswith("shard-") for key in store.list("experiment/"))


def wait_for_shards(store: S3Store, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        if shards_stored(store) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"no {count} shards within 120 s")


def test_server_killed_in_the_middle(
    tmp_path: Path, s3_server: S3Server, store: S3Store, calm: Simulations, here: Any
) -> None:
    run = command(tmp_path, "run", "experiment.yaml", "--store", store.uri, **s3_server.environment)
    try:
        wait_for_shards(store, 5, run)
        s3_server.kill()
        time.sleep(3.0)
        assert run.poll() is None, "it was to wait for the server"
    finally:
        s3_server.restart()
    assert shards_stored(store) < SHARDS, "the kill was to come in the middle"
    code, out, err = ended(run)
    assert code == 0, err
    assert f"report:          {store.uri}/experiment/report/index.html" in out
    assert same(columns(store), calm)
    assert not (tmp_path / "runs").exists(), "all was to be in the store"
    secret = s3_server.environment["AWS_SECRET_ACCESS_KEY"]
    assert secret not in out + err

    # Everything is there: a second run has nothing to do, and any machine can ask.
    code, out, err = here("status", "experiment.yaml", "--store", store.uri)
    status = yaml.safe_load(out)
    assert (code, status["simulations"], status["trained"]) == (0, 1500, True), err
    code, out, err = here("verify", "experiment.yaml", "--store", store.uri)
    assert code == 0 and "verified 75 shards with 1,500 simulations" in out, err


def test_network_that_fails(
    tmp_path: Path, s3_server: S3Server, store: S3Store, proxy: Proxy, calm: Simulations
) -> None:
    proxy.latency_s, proxy.reset_probability = 0.005, 0.02
    proxy.cut_probability, proxy.cut_after = 0.1, 700
    environment = {**s3_server.environment, "AWS_ENDPOINT_URL_S3": proxy.endpoint}
    run = command(tmp_path, "run", "experiment.yaml", "--store", store.uri, **environment)
    code, _, err = ended(run)
    assert code == 0, err
    assert proxy.faults > 10, "the network was to fail"
    assert same(columns(store), calm)


@pytest.mark.parametrize(
    ("identity", "bucket", "sentence"),
    [
        ("wrong secret", None, "AWS_SECRET_ACCESS_KEY"),
        ("unknown", None, "AWS_ACCESS_KEY_ID"),
        ("admin", "no-such-bucket-here", "there is no bucket"),
        ("reader", None, "s3:PutObject"),
    ],
)
def test_what_can_not_be_used_is_told_in_one_sentence(
    here: Any, s3_server: S3Server, identity: str, bucket: str | None, sentence: str
) -> None:
    uri = f"s3://{bucket or s3_server.bucket}/refused"
    code, out, err = here("simulate", "experiment.yaml", "--store", uri, identity=identity)
    last = err.strip().splitlines()[-1]
    assert code == 2, err
    assert last.startswith("sbi-dist: ") and sentence in last
    assert "Traceback" not in err
    assert s3_server.environment_of(identity)["AWS_SECRET_ACCESS_KEY"] not in out + err


def test_no_server_is_told_within_seconds(here: Any) -> None:
    started = time.monotonic()
    code, _, err = here(
        "status", "experiment.yaml", "--store", "s3://bucket/c", endpoint="http://127.0.0.1:9"
    )
    assert code == 2 and "AWS_ENDPOINT_URL_S3" in err and "127.0.0.1:9" in err
    assert time.monotonic() - started < 60
