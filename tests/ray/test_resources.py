"""Where actors run: what they ask the cluster for, and a cluster that grows for them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.ray.conftest import (
    Nodes,
    command,
    counted,
    environment,
    living_actors,
    marked,
    rows_by_process,
    shard_times,
    wait_until,
    write_experiment,
)


def simulate(place: Path, address: str, *sets: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(
            "simulate", "experiment.yaml", *(part for each in sets for part in ("--set", each))
        ),
        cwd=place,
        env=environment(address),
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_actors_are_where_their_resources_are(tmp_path: Path, cluster: Nodes) -> None:
    counts = tmp_path / "counts"
    write_experiment(tmp_path, counted(counts, 0.005))
    node = cluster.add(num_cpus=4, resources={"license": 1})
    try:
        result = simulate(tmp_path, cluster.address, "simulate.resources_per_actor={license: 1}")
    finally:
        cluster.remove(node)
    assert result.returncode == 0, result.stderr
    assert len(shard_times(tmp_path)) == 20
    assert len(rows_by_process(counts)) == 1, "one licence, one actor"
    assert list(rows_by_process(counts).values()) == [400]

    # The node is gone, and with it the licence.
    other = tmp_path / "other"
    other.mkdir()
    write_experiment(other, counted(counts, 0.005))
    result = simulate(other, cluster.address, "simulate.resources_per_actor={license: 1}")
    assert result.returncode == 2
    assert "an actor of the simulate stage asks for 1 x 1 = 1 licenses" in result.stderr
    assert "the Ray cluster has 0" in result.stderr


def test_actors_share_the_memory(tmp_path: Path, cluster: Nodes) -> None:
    # 3 GB a node: room for one actor by its memory, where CPUs would do for ten.
    counts = tmp_path / "counts"
    write_experiment(tmp_path, counted(counts, 0.005))
    result = simulate(
        tmp_path,
        cluster.address,
        "simulate.memory_per_actor_gb=2",
        "simulate.cpus_per_actor=0.1",
    )
    assert result.returncode == 0, result.stderr
    assert len(shard_times(tmp_path)) == 20
    assert len(rows_by_process(counts)) <= cluster.cpus()
    result = simulate(
        tmp_path, cluster.address, "simulate.num_simulations=500", "simulate.memory_per_actor_gb=4"
    )
    assert result.returncode == 2
    assert "(1 CPU, 4e+09 memory)" in result.stderr
    assert "have room for 0 of these" in result.stderr


# One row of two is held back for as long as a file is there.
HELD = """
import os
import time

from sbi_dist import BoxUniform, Problem

FOLDER, HOLD = {folder!r}, {hold!r}


def simulator(theta, rng):
    if "RAY_RAYLET_PID" in os.environ:
        with open(os.path.join(FOLDER, str(os.getpid())), "ab", 0) as file:
            file.write(b".")
        while len(os.listdir(FOLDER)) < 2:
            time.sleep(0.01)
        while os.path.exists(HOLD) and str(os.getpid()) == min(os.listdir(FOLDER)):
            time.sleep(0.01)
    return theta + rng.standard_normal(2)


problem = Problem(BoxUniform([-1.0, 0.0], [1.0, 2.0]), simulator, batched=False)
"""


def test_autoscaler_adds_nodes_and_idle_actors_end(tmp_path: Path, ray_session: None) -> None:
    counts, hold = tmp_path / "counts", tmp_path / "hold"
    counts.mkdir()
    hold.touch()
    source = HELD.format(folder=str(counts), hold=str(hold))
    write_experiment(tmp_path, source, num_simulations=2, shard_size=1, autoscale=True)
    with autoscaling_cluster(tmp_path) as address, open(tmp_path / "log", "wb") as log:
        driver = subprocess.Popen(
            command("simulate", "experiment.yaml"),
            cwd=tmp_path,
            env=environment(address),
            stderr=log,
        )
        try:
            # The head has no CPU: both actors are on nodes that were added for them.
            wait_until(
                lambda: len(living_actors(counts)) == 2 or driver.poll() is not None, "two actors"
            )
            wait_until(
                lambda: len(living_actors(counts)) == 1 or driver.poll() is not None, "one ends"
            )
            assert driver.poll() is None, (tmp_path / "log").read_text()
            hold.unlink()
            assert driver.wait(timeout=60) == 0, (tmp_path / "log").read_text()
        finally:
            driver.kill()
            driver.wait()
        wait_until(lambda: not living_actors(counts), "the other one ends", 10)
    assert sorted(rows_by_process(counts).values()) == [1, 1]
    assert len(shard_times(tmp_path)) == 2


@contextlib.contextmanager
def autoscaling_cluster(folder: Path) -> Iterator[str]:
    """A cluster of a head without CPUs, whose autoscaler starts up to two nodes with one CPU.

    Not with ``ray.cluster_utils.AutoscalingCluster``, which would stop every Ray on this machine.
    """
    import ray

    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
    host = ray.util.get_node_ip_address()
    size = 80 * 1024**2
    lists = (
        "cluster_synced_files rsync_exclude rsync_filter initialization_commands setup_commands "
        "head_setup_commands worker_setup_commands head_start_ray_commands "
        "worker_start_ray_commands"
    )
    worker = {"CPU": 1, "object_store_memory": size}
    config = {
        "cluster_name": "test",
        "max_workers": 2,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"{host}:{port}",
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "auth": {"ssh_user": "nobody"},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists.split()},
    }
    path = folder / "autoscaler.yaml"
    path.write_text(yaml.safe_dump(config))
    mark = f"SBI_DIST_CLUSTER={folder}"
    own = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "SBI_DIST_CLUSTER": str(folder),
    }
    # A short path, as sockets need; another one than Ray's own, so that nobody else joins it.
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    process = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
            f"--port={port}", "--num-cpus=0", f"--object-store-memory={size}",
            "--include-dashboard=false", f"--autoscaling-config={path}",
            f"--temp-dir={temporary}",
        ],
        env={**os.environ, **own},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def answers() -> bool:
        assert process.poll() is None, "ray start ended"
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=1).close()
            return True
        return False

    try:
        wait_until(answers, "a head")
        yield f"{host}:{port}"
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        # Nodes that the autoscaler started live on.
        for pid in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=10)
        shutil.rmtree(temporary, ignore_errors=True)
