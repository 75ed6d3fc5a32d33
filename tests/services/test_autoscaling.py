"""The launcher's node types under Ray's own autoscaler, whose machines are processes here."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.autoscaler._private.util import prepare_config

from cluster.local.ports import free_ports
from tests.ray.conftest import marked

FILE = Path(__file__).parents[2] / "cluster/ray/cluster.yaml"
# Enough for a machine that does other things, too; nothing here is about speed.
START_S = 300.0 if os.environ.get("CI") else 120.0
# Prints what the nodes that live have, and how many demands by placement groups there are.
_LOOK = """
import json, sys
from ray.autoscaler.v2.sdk import get_cluster_status
status = get_cluster_status(sys.argv[1])
nodes = [sorted(node.total_resources()) for node in status.active_nodes + status.idle_nodes]
print(json.dumps([nodes, len(status.resource_demands.placement_group_demand)]))
"""
_REQUIRE = """
import json, sys
from sbi_dist.session import connect, require
connect(sys.argv[1])
require(json.loads(sys.argv[2]), 1, "this test", float(sys.argv[3]))
"""
# As an autoscaler does that tells which nodes it may add.
_REPORT = """
import sys
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import ClusterConfig
config = ClusterConfig()
for name, cpus, most in [("small", 2, 3), ("many", 1, -1)][: int(sys.argv[2])]:
    group = config.node_group_configs.add(name=name, max_count=most)
    group.resources.update({"CPU": cpus, "memory": 8_000_000_000})
GcsClient(sys.argv[1]).report_cluster_config(config.SerializeToString())
"""


def _for_this_machine(address: str) -> dict[str, Any]:
    """The launcher's configuration with Ray's provider of pretended machines."""
    config = prepare_config(yaml.safe_load(FILE.read_text()))
    types = config["available_node_types"]
    for name, node in types.items():
        node["node_config"] = {}
        # So that a node can be told by what it has.
        node["resources"] |= {name: 1, "object_store_memory": 80 * 1024**2}
        node.pop("docker", None)
    types["ray.head.default"] = types.pop("head")
    # A machine that can't be had: Ray does not start with so small a memory for objects.
    types["absent"] = {
        **types["simulator"],
        "resources": {"CPU": 0, "absent": 1, "object_store_memory": 1},
        "min_workers": 0,
        "max_workers": 1,
    }
    for key in ("docker", "file_mounts", "auth"):
        config[key] = {}
    config["head_node_type"] = "ray.head.default"
    config["provider"] = {
        # By its class: Ray's packages lack the defaults that the type's own name goes with.
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "gcs_address": address,
    }
    return config


class Cluster:
    """A head with an autoscaler, and the machines that it brings."""

    def __init__(self, folder: Path) -> None:
        # Ray's pretended machines, and drivers, take this address of the machine for its own.
        self.address = f"{get_node_ip_address()}:{free_ports(1)[0]}"
        self._mark = f"SBI_DIST_TEST={secrets.token_hex(8)}"
        # Ray's sockets need a short path.
        self._temporary = tempfile.mkdtemp(prefix="scale-", dir="/tmp")
        config = folder / "autoscaling.yaml"
        config.write_text(json.dumps(_for_this_machine(self.address)))
        name, _, value = self._mark.partition("=")
        self.environment = {
            **{key: text for key, text in os.environ.items() if not key.startswith("RAY_")},
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
        }
        command = [
            *("ray", "start", "--head", "--block", f"--port={self.address.partition(':')[2]}"),
            *("--num-cpus=0", "--include-dashboard=false"),
            # Any free ones: Ray's default is a range that has the ports above in it.
            *("--min-worker-port=0", "--max-worker-port=0"),
            *(f"--temp-dir={self._temporary}", f"--autoscaling-config={config}"),
            *("--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_ports(1)[0]}"),
            *("--object-store-memory=80000000", "--disable-usage-stats"),
        ]
        command[0] = str(Path(sys.executable).with_name("ray"))
        self._log = (folder / "head.log").open("w")
        self._head = subprocess.Popen(
            command,
            env={
                **self.environment,
                name: value,
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_FAKE_CLUSTER": "1",
                # What `ray up` sets.
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            },
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def python(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, self.address, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=START_S,
        )

    def look(self) -> tuple[Counter[str], int]:
        """The machines that live, by type, and the demands; none where the head does not answer."""
        try:
            done = subprocess.run(
                [sys.executable, "-c", _LOOK, self.address],
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=30,
            )
        except subprocess.TimeoutExpired:
            return Counter(), -1
        if done.returncode:
            return Counter(), -1
        kinds = {"node:__internal_head__": "head", "simulator": "simulator", "trainer": "trainer"}
        nodes, demands = json.loads(done.stdout.splitlines()[-1])
        return Counter(kinds[name] for has in nodes for name in has if name in kinds), demands

    def until(self, **expected: int) -> None:
        """Wait for these machines, with no demand left."""
        deadline = time.monotonic() + START_S
        while not self._answers() or (found := self.look()) != (Counter(expected), 0):
            assert self._head.poll() is None, f"the head has ended: {self._said()}"
            assert time.monotonic() < deadline, f"not {expected}, but {found}: {self._said()}"
            time.sleep(0.5)

    def _answers(self) -> bool:
        host, _, port = self.address.partition(":")
        with contextlib.suppress(OSError):
            socket.create_connection((host, int(port)), timeout=1).close()
            return True
        return False

    def _said(self) -> str:
        return Path(self._log.name).read_text()[-2000:]

    def end(self) -> list[int]:
        """End everything that this started, by its mark."""
        deadline = time.monotonic() + 15
        # More than once: what is killed may just have started another one.
        while (left := marked(self._mark)) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._head.wait(0.2)
        self._log.close()
        shutil.rmtree(self._temporary, ignore_errors=True)
        return marked(self._mark)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield started
    finally:
        left = started.end()
    assert not left


def _command(stage: str, store: Path, address: str | None, *sets: str) -> list[str]:
    return [
        *(sys.executable, "-m", "sbi_dist", stage, "gaussian", "--store", str(store)),
        *(("--address", address) if address else ()),
        *(part for each in sets for part in ("--set", each)),
    ]


@pytest.fixture(scope="module")
def store(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulations to train on, made without the cluster."""
    folder = tmp_path_factory.mktemp("store")
    command = _command("simulate", folder, None, "simulate.num_simulations=400")
    subprocess.run(command, env=cluster.environment, check=True, timeout=START_S)
    return folder


@pytest.mark.timeout(900)
def test_stages_bring_the_machines_that_they_need(
    cluster: Cluster, store: Path, tmp_path: Path
) -> None:
    def run(stage: str, folder: Path, *sets: str) -> str:
        done = subprocess.run(
            _command(stage, folder, cluster.address, *sets),
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=START_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr

    cluster.until(head=1)
    said = run("train", store, "simulate.num_simulations=400", "train.max_epochs=3")
    assert "train.workers: the nodes started within" in said
    assert len(list(store.glob("gaussian/models/*/bundle.json"))) == 1
    cluster.until(head=1, simulator=1)
    # Two actors that do not fit on one machine.
    run(
        *("simulate", tmp_path, "simulate.num_simulations=400", "simulate.shard_size=50"),
        *("simulate.autoscale=true", "simulate.actors=2", "simulate.cpus_per_actor=9"),
    )
    assert len(list(tmp_path.glob("gaussian/simulations/*/shard-*.parquet"))) == 8
    cluster.until(head=1, simulator=2)
    done = cluster.python(_REQUIRE, '{"CPU": 1, "GPU": 1}', "300")
    assert done.returncode == 0, done.stderr
    cluster.until(head=1, simulator=2, trainer=1)


@pytest.mark.timeout(600)
def test_machines_that_can_not_be_had_are_told(
    cluster: Cluster, store: Path, tmp_path: Path
) -> None:
    # No machine has nine GPUs.
    done = subprocess.run(
        _command(
            *("train", store, cluster.address, "simulate.num_simulations=400"),
            *("train.max_epochs=4", "train.gpus_per_worker=9"),
        ),
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "train.workers asks for 1 x 9 = 9 GPUs, and the Ray cluster has " in done.stderr
    assert "its autoscaler has no nodes to add that these would fit on; ask for" in done.stderr

    # Nor has one so many CPUs; that more machines may be asked for changes nothing.
    done = subprocess.run(
        _command(
            *("simulate", tmp_path, cluster.address, "simulate.autoscale=true"),
            "simulate.cpus_per_actor=64",
        ),
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "an actor of the simulate stage asks for 1 x 64 = 64 CPUs, and the Ray" in done.stderr
    assert "its autoscaler has no nodes to add that these would fit on; ask for" in done.stderr

    # There is a type for this one, whose machines do not start.
    done = cluster.python(_REQUIRE, '{"absent": 1}', "10")
    assert "StageError: this test: the nodes for 1 x (1 absent) did not start" in done.stderr
    assert "absent could not be had: " in done.stderr
    assert cluster.look()[1] == 0


@pytest.mark.timeout(600)
def test_an_interrupt_ends_the_waiting(cluster: Cluster, tmp_path: Path) -> None:
    waiting = subprocess.Popen(
        _command(
            *("simulate", tmp_path, cluster.address, "simulate.cpus_per_actor=0"),
            "simulate.resources_per_actor={absent: 1}",
        ),
        env=cluster.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert waiting.stderr is not None
        told: list[str] = []
        for line in waiting.stderr:
            told.append(line)
            if "waiting for nodes with room for 1 x " in line:
                break
        assert cluster.look()[1] == 1, told
        waiting.send_signal(signal.SIGINT)
        said = waiting.communicate(timeout=60)[1]
        assert waiting.returncode == 130, said
    finally:
        waiting.kill()
        waiting.wait()
    cluster_demands = cluster.look()[1]
    assert cluster_demands == 0


@pytest.mark.timeout(600)
def test_what_an_autoscaler_tells_of_its_nodes_is_told(cluster: Cluster) -> None:
    cluster.python(_REPORT, "1")
    try:
        done = cluster.python(_REQUIRE, '{"CPU": 64}', "300")
        assert "its autoscaler may add up to 3 small (2 CPU, 8 GB of memory)" in done.stderr
        cluster.python(_REPORT, "2")
        done = cluster.python(_REQUIRE, '{"CPU": 64}', "300")
        assert "(2 CPU, 8 GB of memory); any number of many (1 CPU, 8 GB" in done.stderr
    finally:
        cluster.python(_REPORT, "0")
