"""The launcher's node types under Ray's own autoscaler, whose machines are processes here."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
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

FILE = Path(__file__).parents[2] / "cluster/ray/cluster.yaml"
# Prints the types of the nodes that live; what is asked for comes first, where there is a demand.
_LOOK = """
import json, sys, ray
from ray.autoscaler.sdk import request_resources
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
if sys.argv[2:]:
    request_resources(bundles=json.loads(sys.argv[2]))
print(json.dumps([sorted(n["Resources"]) for n in ray.nodes() if n["Alive"]]))
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

    def nodes(self, *demand: str) -> Counter[str]:
        """The machines that live, by type; with a demand, after it was made."""
        done = subprocess.run(
            [sys.executable, "-c", _LOOK, self.address, *demand],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            return Counter()
        kinds = {"node:__internal_head__": "head", "simulator": "simulator", "trainer": "trainer"}
        nodes = json.loads(done.stdout.splitlines()[0])
        return Counter(kinds[name] for has in nodes for name in has if name in kinds)

    def until(self, expected: dict[str, int], *demand: str) -> None:
        deadline = time.monotonic() + 60
        while (found := self.nodes(*demand)) != Counter(expected):
            assert self._head.poll() is None, "the head has ended"
            assert time.monotonic() < deadline, f"{found} instead of {expected}"
            time.sleep(0.5)

    def end(self) -> list[int]:
        """End everything that this started, by its mark."""
        deadline = time.monotonic() + 15
        # More than once: what is killed may just have started another one.
        while (left := self._ours()) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._head.wait(0.2)
        self._log.close()
        shutil.rmtree(self._temporary, ignore_errors=True)
        return self._ours()

    def _ours(self) -> list[int]:
        found = []
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in place.read_bytes().split(b"\0"):
                    found.append(int(place.parent.name))
        return found


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    started = Cluster(tmp_path)
    try:
        yield started
    finally:
        left = started.end()
    assert not left


@pytest.mark.timeout(240)
def test_simulations_bring_simulators_and_only_a_gpu_brings_a_trainer(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.until({"head": 1, "simulator": 1})
    # Two actors that do not fit on one machine.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sbi_dist", "simulate", "gaussian"),
            *("--address", cluster.address, "--store", str(tmp_path / "runs")),
            *("--set", "simulate.num_simulations=400", "--set", "simulate.shard_size=50"),
            *("--set", "simulate.autoscale=true", "--set", "simulate.actors=2"),
            *("--set", "simulate.cpus_per_actor=9"),
        ],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("runs/gaussian/simulations/*/shard-*.parquet"))) == 8
    cluster.until({"head": 1, "simulator": 2})
    cluster.until({"head": 1, "simulator": 2, "trainer": 1}, '[{"GPU": 1}]')
