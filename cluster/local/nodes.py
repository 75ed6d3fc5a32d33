"""The Ray nodes: a head that schedules nothing, and workers with CPUs of their own.

All are on this machine, each with its own raylet and object store, and know a token that keeps
others out.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

from cluster.local.ports import free_ports
from cluster.local.processes import Processes

__all__ = ["discovery", "start_nodes"]

_OBJECTS = 128 * 1024**2  # bytes of a node's object store: shards do not go through it


def start_nodes(
    processes: Processes, environment: dict[str, str], count: int, cpus: int
) -> tuple[dict[str, str], str]:
    """Start a head and ``count`` nodes with ``cpus`` CPUs each.

    Returns:
        The variables to use the cluster with, and the address of its dashboard.

    Raises:
        StageError: one does not start.
    """
    token = processes.folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment = {**environment, **access}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    common = [
        str(Path(sys.executable).parent / "ray"), "start", "--block",
        "--dashboard-agent-listen-port=0", "--disable-usage-stats",
        "--min-worker-port=0", "--max-worker-port=0",  # any free ones: the nodes share a machine
        f"--object-store-memory={_OBJECTS}", f"--memory={memory * 6 // 10 // count}",
    ]  # fmt: skip
    dashboard, client = free_ports(2)
    head = [
        "--head", "--port=0", "--num-cpus=0", "--num-gpus=0", "--dashboard-host=127.0.0.1",
        f"--temp-dir={processes.folder / 'head'}",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
    ]  # fmt: skip
    processes.start("head", common + head, environment)
    written = processes.folder / "head" / "ray_current_cluster"
    processes.wait_for("head", _says(written, ":"))
    address = written.read_text().strip()
    names = [f"node-{index}" for index in range(1, count + 1)]
    for index, name in enumerate(names):
        # A directory of its own, as nodes that begin at once would take the same names in one.
        options = [f"--address={address}", f"--num-cpus={cpus}"]
        options.append(f"--temp-dir={processes.folder / name}")
        if index:
            options.append("--num-gpus=0")  # else each would count all GPUs there are
        processes.start(name, common + options, environment)
    for name in names:
        processes.wait_for(name, _says(processes.folder / "log" / name, "runtime started"))
    url = f"http://127.0.0.1:{dashboard}"
    return {**access, "RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": url}, url


def discovery(processes: Processes) -> Path:
    """The file in which the head keeps the metrics ports of all nodes."""
    return processes.folder / "head" / "prom_metrics_service_discovery.json"


def _says(file: Path, text: str) -> Iterator[bool]:
    while True:
        yield file.exists() and text in file.read_text(errors="replace")
