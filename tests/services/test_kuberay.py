"""The overlays for one machine, run without Kubernetes: every pod is a host of its own.

Pods, commands and what follows a loss are those of KubeRay's operator; the network policies hold;
Ray's autoscaler runs in each head and asks a small stand-in for Kubernetes' API server. In place of
the image there is the environment of the tests. About 270 s.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml

from sbi_dist import Posterior
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.store import ObjectStore, S3Store
from tests.manifests.rendered import K8S, Resource, render
from tests.ray.conftest import SLOW
from tests.services.kuberay.api import Api
from tests.services.kuberay.network import inside
from tests.services.kuberay.pod import Pod
from tests.services.kuberay.ray import Cluster, Job, Service, wait_for
from tests.services.kuberay.site import Site
from tests.services.outcome import posterior_draws, run_alone

PROGRAMS = ("ip", "nft", "nsenter", "redis-server", "setpriv", "sysctl", "unshare", "wget")
KEYS = {"AWS_ACCESS_KEY_ID": "sbi", "AWS_SECRET_ACCESS_KEY": "secretDoNotShow0001"}
SECRETS = {"sbi-dist-redis": {"password": "redisDoNotShow0001"}, "sbi-dist-store": KEYS}
NAME = "decay"
EXPERIMENT: dict[str, Any] = {
    "name": NAME,
    "problem": "problem.py:problem",
    "store": "s3://sbi-dist/runs",
    "simulate": {"num_simulations": 1500, "shard_size": 20},
    "train": {"transforms": 2, "hidden_features": 16, "max_epochs": 3},
    "calibrate": {"enabled": False},  # trained for a moment, it would fail
    "infer": {"num_samples": 500, "predictive_simulations": 20},
    # As in the base.
    "serve": {"host": "0.0.0.0", "models_memory_mb": 256, "request_memory_mb": 512},
}
# Most of it is the first fixture's: two clusters, and a job that twice loses what it runs on.
pytestmark = pytest.mark.timeout(900)
SHARDS = 75
X = [[0.1, 1.0], [0.3, 0.2]]


def overlay(folder: Path, name: str) -> list[Resource]:
    """An overlay with an experiment and a problem of one's own, as base/experiment.yaml says."""
    folder = folder / name
    folder.mkdir()
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    (folder / "problem.py").write_text(SLOW)
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "sbi-dist",
        "resources": [os.path.relpath(K8S / "overlays/local" / name, folder.resolve())],
        "configMapGenerator": [
            {
                "name": "sbi-dist-experiment",
                "behavior": "merge",
                "files": ["experiment.yaml", "problem.py"],
            }
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return list(yaml.safe_load_all(render(folder)))


def bystander(site: Site, name: str, namespace: str, labels: dict[str, str]) -> Pod:
    """A pod of others, that does nothing by itself."""
    container = {"command": ["sleep", "infinity"]}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    return site.start(name, template, namespace)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    missing = [each for each in (*PROGRAMS, "weed") if shutil.which(each, path=path) is None]
    problem = f"{', '.join(missing)} not installed" if missing else ""
    if os.geteuid() != 0:
        problem = "network namespaces are made as root"
    if problem:
        if os.environ.get("CI") == "true":
            pytest.fail(problem)
        pytest.skip(problem)
    folder = tmp_path_factory.mktemp("overlays")
    running = Site([*overlay(folder, "jobs"), *overlay(folder, "service")], SECRETS)
    server = None
    try:
        host = bystander(running, "kube-apiserver", "kube-system", {})
        server = Api(host, folder, running.clusters, running.described)
        running.use(server)
        running.start_sets()
        yield running
    finally:
        if server is not None:
            server.stop()
        running.remove()
        assert not running.folder.exists()


@pytest.fixture(scope="module")
def operator(site: Site) -> Pod:
    labels = {"app.kubernetes.io/name": "kuberay-operator"}
    return bystander(site, "kuberay-operator", "kuberay-system", labels)


@pytest.fixture(scope="module")
def client(site: Site) -> Pod:
    return bystander(site, "client", "sbi-dist", {"sbi-dist.io/client": "true"})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    """The same experiment, run on this machine alone."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    (folder / "problem.py").write_text(SLOW)
    return run_alone(folder, NAME)


@pytest.fixture(scope="module")
def stored(site: Site) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Call a function where the store of the pods can be reached, with its keys."""
    pod, _ = site.pods["store-0"]
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {**KEYS, "AWS_REGION": "us-east-1"}.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://{pod.address}:8333")
        yield lambda function: inside(pod.pid, function)


def shards(store: ObjectStore) -> int:
    return sum("/shard-" in key for key in store.list("simulations/"))


def simulated(store: ObjectStore) -> tuple[str, bytes, bytes]:
    """The dataset's name, which is its fingerprint, and its columns."""
    (name,) = store.folders("simulations/")
    rows = Dataset(store.child(f"simulations/{name}")).read_all(range(SHARDS))
    return name, rows.theta.tobytes(), rows.x.tobytes()


@pytest.fixture(scope="module")
def job(site: Site, operator: Pod, stored: Callable[[Callable[[], Any]], Any]) -> Iterator[Job]:
    """The job of all stages, after a worker's network and later the head were lost."""
    running = Job(site, site.find("RayJob", "sbi-dist-run"), operator)
    cluster = running.cluster
    store = S3Store("sbi-dist", f"runs/{NAME}")

    def simulating(count: int) -> bool:
        assert not running.finished()
        return stored(lambda: shards(store)) >= count

    try:
        wait_for(cluster.all_ready, 120, "all pods are ready")

        def counted() -> bool:
            said = cluster.head.execute(["ray", "status"]).stdout
            return "1 headgroup" in said and "1 simulator" in said

        # The autoscaler's first report comes some seconds after the nodes.
        wait_for(counted, 60, "the autoscaler counts a head and a simulator")
        running.submit()
        wait_for(lambda: simulating(4), 60, "the first shards")
        (lost,) = cluster.workers("simulator")
        site.network.cut(lost.address)
        wait_for(lambda: simulating(SHARDS), 180, "all shards")
        head = cluster.head
        head.kill()
        wait_for(running.finished, 180, "the job's success")
        assert {head.name, lost.name} <= cluster.ended.keys()
        yield running
    finally:
        for each in running.submitters:
            print("submitter:", each.said()[-4000:])
        describe(site, cluster)
        cluster.delete()


def describe(site: Site, cluster: Cluster) -> None:
    """Print, for where a test fails, what all pods said and which connections were refused."""
    for name, text in cluster.ended.items():
        print(f"{name} (ended): {text[-1500:]}")
    for name, (pod, _) in site.pods.items():
        print(f"{name} at {pod.address}, {pod.codes()}: {pod.said()[-1500:]}")
    print("autoscaler:", cluster.head.said(1)[-5000:])
    print("refused:", site.denied())


def test_job_ends_as_on_one_machine(
    job: Job, stored: Callable[[Callable[[], Any]], Any], plain: ObjectStore
) -> None:
    # The submitter saw the head go, and its successor found a head that knew of no job.
    assert [each.code for each in job.submitters] == [1, 0]
    store = S3Store("sbi-dist", f"runs/{NAME}")
    assert stored(lambda: simulated(store)) == simulated(plain)
    assert np.array_equal(stored(lambda: posterior_draws(store)), posterior_draws(plain))


def test_job_is_listed(job: Job) -> None:
    address = ["--address", "http://127.0.0.1:8265"]
    listed = job.cluster.head.execute(["sbi-dist", "jobs", "list", *address])
    assert re.search(rf"^{job.id} +succeeded +0 ", listed.stdout, re.M), listed


@pytest.fixture(scope="module")
def service(site: Site, operator: Pod, job: Job) -> Iterator[Service]:
    """The service, of the model that the job made."""
    running = Service(site, site.find("RayService", "sbi-dist"), operator)
    try:
        wait_for(running.reconcile, 150, "the service runs")
        yield running
    finally:
        describe(site, running.cluster)
        running.cluster.delete()


def asked(client: Pod, address: str) -> np.ndarray:
    """Draws of the posteriors of ``X``, (B, N, D) float32, as the service gives them."""

    def ask() -> np.ndarray:
        body = {"x": X, "num_samples": 40, "seed": 3}
        url = f"http://{address}:8000/v1/models/promoted/sample"
        answer = httpx.post(url, json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return np.array([each["draws"] for each in answer.json()["observations"]], np.float32)

    return inside(client.pid, ask)


def test_service_answers_as_the_model_does_though_its_head_is_lost(
    service: Service, client: Pod, stored: Callable[[Callable[[], Any]], Any]
) -> None:
    cluster = service.cluster
    (server,) = cluster.workers("server")
    store = S3Store("sbi-dist", f"runs/{NAME}")
    posterior = stored(lambda: Posterior.from_store(store))
    expected = posterior.draws(torch.tensor(X), 40, 3)[0].numpy()
    assert np.array_equal(asked(client, server.address), expected)
    head = cluster.head
    head.kill()
    # Nobody replaces the head yet.
    for _ in range(6):
        assert np.array_equal(asked(client, server.address), expected)
        time.sleep(1)

    def back() -> bool:
        assert np.array_equal(asked(client, server.address), expected)
        return service.reconcile()

    wait_for(back, 120, "the service's head is back")
    assert head.name in cluster.ended and cluster.workers("server") == [server]
    for _ in range(5):
        assert np.array_equal(asked(client, server.address), expected)
        time.sleep(1)
    said = cluster.head.execute(["ray", "status"]).stdout
    assert "1 headgroup" in said and "1 server" in said, said


def test_policies(site: Site, service: Service, operator: Pod, client: Pod) -> None:
    head, (server,) = service.cluster.head, service.cluster.workers("server")
    redis, store = site.pods["redis-0"][0], site.pods["store-0"][0]
    stranger = bystander(site, "stranger", "default", {})

    def reaches(source: Pod, target: Pod, port: int) -> bool:
        def connect() -> bool:
            try:
                with socket.create_connection((target.address, port), timeout=0.5):
                    return True
            except TimeoutError:
                return False

        return inside(source.pid, connect)

    open_ = [
        (operator, head, 8265),
        (client, server, 8000),
        (server, head, 6379),
        (server, store, 8333),
        (head, server, 52365),
        (head, redis, 6379),
        (head, store, 8333),
    ]
    closed = [
        (operator, server, 52365),
        (client, head, 8265),
        (client, head, 6379),
        (client, server, 6380),
        (client, redis, 6379),
        (client, store, 8333),
        (server, redis, 6379),
        (server, head, 8265),
        (redis, head, 6379),
        (stranger, server, 8000),
        (stranger, head, 8265),
        (stranger, redis, 6379),
    ]
    assert [each for each in open_ if not reaches(*each)] == []
    assert [each for each in closed if reaches(*each)] == []
