"""A real Prometheus on this machine, with the shipped rules, at the metrics port of a Ray node."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from tests.monitoring import PROMETHEUS, RULES, program

__all__ = ["Prometheus"]

START_S = 60.0


class Prometheus:
    """Scrapes and evaluates once a second, where the shipped configuration takes its time.

    It finds its targets as the shipped one does, in a file such as Ray's. Listens on the loopback.

    Args:
        targets: metrics ports, ``host:port``.
    """

    def __init__(self, targets: list[str]) -> None:
        command = program("prometheus")
        self._folder = Path(tempfile.mkdtemp(prefix="prometheus-"))
        (self._folder / "rules").mkdir()
        for path in RULES.glob("*.yml"):
            content = yaml.safe_load(path.read_text())
            for group in content["groups"]:
                group["interval"] = "1s"
            (self._folder / "rules" / path.name).write_text(yaml.safe_dump(content))
        configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        configuration["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
        del configuration["alerting"]
        (job,) = configuration["scrape_configs"]
        (discovery,) = job["file_sd_configs"]
        discovery["files"] = ["ray.json"]
        found = [{"labels": {"job": "ray"}, "targets": targets}]  # as Ray writes it
        (self._folder / "ray.json").write_text(json.dumps(found))
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    command,
                    f"--config.file={self._folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self._folder,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).close()
                return
            log = (self._folder / "log").read_text(errors="replace")
            assert self._process.poll() is None, log
            assert time.monotonic() < until, f"not ready after {START_S:.0f} s: {log}"
            time.sleep(0.1)

    def stop(self) -> None:
        """End the server and remove its data."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)
        shutil.rmtree(self._folder, ignore_errors=True)

    def get(self, path: str, **parameters: Any) -> Any:
        """What its API answers.

        Raises:
            AssertionError: it refuses, as an expression that it can't evaluate.
        """
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                content = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error
        assert content["status"] == "success", content
        return content["data"]

    def values(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of an expression's series now; those that are no number left out."""
        data = self.get("query", query=expression)
        assert data["resultType"] == "vector"
        found = [(each["metric"], float(each["value"][1])) for each in data["result"]]
        return [(labels, value) for labels, value in found if not math.isnan(value)]

    def ever(self, expression: str, experiment: str, since: float) -> bool:
        """Whether an expression has had a value since a time, in seconds of the epoch.

        Series of other experiments do not count.
        """
        data = self.get("query_range", query=expression, start=since, end=time.time(), step=1)
        found = [
            float(value)
            for each in data["result"]
            if each["metric"].get("experiment", experiment) == experiment
            for _, value in each["values"]
        ]
        return any(not math.isnan(value) for value in found)
