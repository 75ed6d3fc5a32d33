"""``sbi-dist serve`` in a process of its own, and a steady load whose every answer is checked."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from sbi_dist.posterior import Posterior

__all__ = ["BUSY", "Load", "Process", "Served", "free_port", "until", "using"]

ROOT = Path(__file__).resolve().parents[2]
START_S = 180.0
# How much longer answers may take where other tests run beside, on the same two cores.
BUSY = 5.0 if "PYTEST_XDIST_WORKER" in os.environ or os.environ.get("CI") == "true" else 1.0
X = [[0.3, -0.2, 0.1], [-0.5, 0.4, 0.0], [1.0, 0.9, -0.8]]
NUM_SAMPLES = 40


def until(condition: Callable[[], Any], patience_s: float, what: str) -> Any:
    """Wait until something is true; what it is then."""
    end = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {patience_s:g} s: {what}"
        time.sleep(0.1)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclasses.dataclass(frozen=True)
class Process:
    """One process, not another one that got its number later."""

    pid: int
    began: int
    title: str

    @property
    def alive(self) -> bool:
        found = _stat(self.pid)
        return found is not None and found[1] == self.began and found[2] != "Z"

    def memory(self) -> int:
        """Bytes of it that are in memory."""
        fields = Path(f"/proc/{self.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        """Seconds that it has computed."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> tuple[int, int, str] | None:
    """Parent, time of start and state."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), int(fields[19]), fields[0]


def _below(root: int) -> list[Process]:
    """A process's children, and theirs."""
    children: dict[int, list[tuple[int, int]]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (found := _stat(int(entry))) is not None:
            children.setdefault(found[0], []).append((int(entry), found[1]))
    found_below, ahead = [], [root]
    while ahead:
        for pid, began in children.get(ahead.pop(), []):
            ahead.append(pid)
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                found_below.append(Process(pid, began, title))
    return found_below


def using(folder: Path) -> list[Process]:
    """Processes that were given a folder, in their environment or arguments."""
    name, found = os.fsencode(folder), []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or (stat := _stat(int(entry))) is None or stat[2] == "Z":
            continue
        with contextlib.suppress(OSError):
            about = Path("/proc", entry)
            title = (about / "cmdline").read_bytes().replace(b"\0", b" ")
            if name in title or name in (about / "environ").read_bytes():
                found.append(Process(int(entry), stat[1], title.decode()))
    return found


class Served:
    """The service, started and waited for.

    Args:
        store: URI that holds the experiment ``gaussian``.
        settings: fields to override, by their paths.
        environment: of the process, beside this one's.
    """

    def __init__(self, store: str, environment: dict[str, str], **settings: Any) -> None:
        # Short, as sockets of Ray lie in it.
        self.folder = Path(tempfile.mkdtemp(prefix="sv", dir="/tmp"))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = ["gaussian", "--store", store, "--port", str(self.port)]
        for name, value in settings.items():
            arguments += ["--set", f"{name.replace('__', '.')}={value}"]
        kept = {name: os.environ[name] for name in os.environ if name != "RAY_ADDRESS"}
        self._out = open(self.folder / "out", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sbi_dist", "serve", *arguments],
            env={**kept, **environment, "TMPDIR": str(self.folder)},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._out,
        )
        try:
            until(self._ready, START_S, "the service is ready")
        except BaseException:
            self.remove()
            raise

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.said()
        # It may answer before the command itself waits for its end.
        return "Ctrl-C" in self.said()

    def said(self) -> str:
        """All that the command printed."""
        return (self.folder / "out").read_text()

    def processes(self) -> list[Process]:
        """All that run for it, without itself."""
        return _below(self.process.pid)

    def left(self) -> list[Process]:
        """All that run for it, also those whose parents are gone."""
        return [each for each in using(self.folder) if each.pid != self.process.pid]

    def replicas(self) -> list[Process]:
        return [each for each in self.processes() if each.title.startswith("ray::ServeReplica")]

    def logs(self) -> dict[str, str]:
        """What Ray and the replicas wrote."""
        return {
            str(path.relative_to(self.folder)): path.read_text(errors="replace")
            for path in (self.folder / "ray").rglob("logs/**/*")
            if path.is_file() and not path.is_symlink()
        }

    def end(self, number: int, patience_s: float = 40.0) -> tuple[int, float, list[Process]]:
        """Signal it: its exit code, seconds that it took, and the processes that there were."""
        were, began = self.processes(), time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(patience_s), time.monotonic() - began, were

    def remove(self) -> None:
        """End it by any means, and remove its files."""
        if self.process.poll() is None:
            were = self.processes()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            for each in were:
                if each.alive:
                    with contextlib.suppress(OSError):
                        os.kill(each.pid, signal.SIGKILL)
        self._out.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request of the load: when, and what came of it."""

    began: float
    ended: float
    model: str | None
    problem: str | None


class Load:
    """Threads that ask one question after the other, without a second try.

    Args:
        models: of the models that may answer, by their ids.
        name: the model that is asked for.
        headers: sent with every request, as they are when it begins.
    """

    def __init__(
        self,
        url: str,
        models: dict[str, Posterior],
        threads: int = 3,
        name: str = "promoted",
        headers: dict[str, str] | None = None,
    ) -> None:
        self._url, self._headers = f"{url}/v1/models/{name}/sample", headers
        self.expected: dict[tuple[str, int], np.ndarray] = {
            (model, seed): posterior.draws(torch.tensor(X), NUM_SAMPLES, seed)[0].numpy()
            for model, posterior in models.items()
            for seed in range(4)
        }
        for (model, seed), draws in self.expected.items():
            # (N, B, D) of the library is (B, N, D) of the service.
            if draws.shape[0] == NUM_SAMPLES:
                self.expected[model, seed] = draws.transpose(1, 0, 2)
        self.asked: list[Asked] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(threads)]

    @property
    def failures(self) -> list[Asked]:
        return [each for each in self.asked if each.problem is not None]

    def models_since(self, moment: float) -> list[str | None]:
        """The models that answered requests that began after a moment."""
        return [each.model for each in self.asked if each.began > moment and not each.problem]

    def answered(self, count: int = 30, patience_s: float = 90.0) -> None:
        """Wait until so many more were answered."""
        now = time.monotonic()
        until(lambda: len(self.models_since(now)) >= count, patience_s, f"{count} answers")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        with httpx.Client(timeout=30) as client:
            for turn in itertools.count(number):
                if self._over.is_set():
                    return
                seed, began, model = turn % 4, time.monotonic(), None
                body = {"x": X, "num_samples": NUM_SAMPLES, "seed": seed}
                try:
                    answer = client.post(self._url, json=body, headers=self._headers)
                    model = answer.headers.get("x-sbi-model")
                    problem = self._wrong(answer, seed)
                except httpx.HTTPError as error:
                    problem = f"{type(error).__name__}: {error}"
                self.asked.append(Asked(began, time.monotonic(), model, problem))
                self._over.wait(0.02)

    def _wrong(self, answer: httpx.Response, seed: int) -> str | None:
        if answer.status_code != 200:
            return f"{answer.status_code}: {answer.text[:300]}"
        content = answer.json()
        expected = self.expected[content["model"], seed]
        draws = np.array([each["draws"] for each in content["observations"]], np.float32)
        same = draws.shape == expected.shape and np.array_equal(
            draws.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)
        )
        return None if same else "WRONG: the draws are not the model's"
