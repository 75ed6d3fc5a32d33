"""A Ray cluster of one node with its dashboard, that asks for a token; ended by process id."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import httpx

from cluster.local.ports import free_ports
from tests.ray.conftest import marked

__all__ = ["NotStarted", "RayHead"]

START_S = 90.0


class NotStarted(Exception):
    """The dashboard is not ready in time; the message is the end of what was said."""


class RayHead:
    """``ray start --head`` on free ports of this machine.

    Attributes:
        url: of the dashboard.
        address: where processes of the cluster connect to.
        token: that it asks for.
        environment: variables for a process that submits to it.
    """

    def __init__(self, cpus: int = 3) -> None:
        # Short, as Ray's sockets are in it, whose paths may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))
        self.token = uuid.uuid4().hex + uuid.uuid4().hex
        self._mark = f"SBI_DIST_TEST_HEAD={uuid.uuid4().hex}"
        ports = free_ports(7)
        self.url, self.address = f"http://127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("RAY_", "AWS_")) or key == "RAY_USAGE_STATS_ENABLED"
        }
        clean["OMP_NUM_THREADS"] = "1"
        self.environment = {**clean, "RAY_AUTH_TOKEN": self.token}
        name, value = self._mark.split("=")
        arguments = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
            f"--dashboard-port={ports[0]}", f"--port={ports[1]}",
            f"--dashboard-agent-listen-port={ports[2]}", f"--dashboard-agent-grpc-port={ports[3]}",
            f"--metrics-export-port={ports[4]}", f"--ray-client-server-port={ports[5]}",
            f"--runtime-env-agent-port={ports[6]}", "--min-worker-port=0", "--max-worker-port=0",
            f"--num-cpus={cpus}", "--object-store-memory=100000000", "--disable-usage-stats",
            f"--temp-dir={self.folder}/ray",
        ]  # fmt: skip
        self._log = self.folder / "head.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                arguments,
                env={
                    **self.environment,
                    name: value,
                    # As in an image: jobs find their interpreter there.
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                    "RAY_AUTH_MODE": "token",
                },
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait()
        except NotStarted:
            self.stop()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        headers = {"Authorization": f"Bearer {self.token}"}
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/api/jobs/", headers=headers).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise NotStarted(f"no dashboard within {START_S:g} s: {self._log.read_text()[-2000:]}")

    def stop(self) -> None:
        """End it at once, with all that it started. In order it would wait for 30 s."""
        deadline = time.monotonic() + 10
        while (left := marked(self._mark)) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
