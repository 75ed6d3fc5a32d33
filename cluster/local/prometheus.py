"""Prometheus with the shipped rules, at the metrics ports of the Ray nodes."""

from __future__ import annotations

import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import yaml

from cluster.local.nodes import discovery
from cluster.local.ports import free_ports
from cluster.local.processes import Processes

__all__ = ["start_prometheus"]

SHIPPED = Path(__file__).parents[1] / "prometheus"


def start_prometheus(processes: Processes, environment: dict[str, str]) -> str | None:
    """Start it on the loopback; its address, or None where it is not installed.

    Raises:
        StageError: it does not start.
    """
    program = shutil.which("prometheus")
    if program is None:
        return None
    folder = processes.folder / "prometheus"
    folder.mkdir()
    content = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    content["rule_files"] = [str(SHIPPED / "rules" / "*.yml")]
    del content["alerting"]
    (job,) = content["scrape_configs"]
    (files,) = job["file_sd_configs"]
    files["files"] = [str(discovery(processes))]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(content))
    (port,) = free_ports(1)
    command = [
        program, f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    processes.start("prometheus", command, environment)
    url = f"http://127.0.0.1:{port}"
    processes.wait_for("prometheus", _answers(f"{url}/-/ready"))
    return url


def _answers(url: str) -> Iterator[bool]:
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            yield True
        except OSError:
            yield False
