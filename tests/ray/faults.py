"""A training that is disturbed at random: the same job as a calm one, in a process to be killed.

Run as a program it is the driver of the job; the tests import what they need to disturb it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sbi_dist.estimation.bundle import BUNDLE, WEIGHTS
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.trainer import train
from sbi_dist.session import connected
from sbi_dist.simulation.shard import ShardRecord, Simulations, encode_shard
from sbi_dist.store import ObjectStore, open_store

__all__ = ["OPTIONS", "Disturbed", "fit_in", "store_dataset", "weights_of"]

ROOT = Path(__file__).resolve().parents[2]
SHARDS, ROWS = 6, 200

# Long enough to be disturbed; checkpoints come at whatever step the clock says.
OPTIONS: dict[str, Any] = {
    "transforms": 2,
    "hidden_features": 16,
    "batch_size": 32,
    "schedule": "cosine",
    "dropout": 0.1,
    "max_epochs": 60,
    "workers": 2,
    "cpus_per_worker": 0.5,
    "checkpoint_every_s": 0.3,
}


def store_dataset(store: ObjectStore) -> list[ShardRecord]:
    """Write the shards of a small linear-Gaussian problem, some rows of it failed."""
    rng = np.random.default_rng(0)
    records = []
    for shard in range(SHARDS):
        theta = rng.standard_normal((ROWS, 2), dtype=np.float32)
        x = theta + np.float32(0.3) * rng.standard_normal((ROWS, 2), dtype=np.float32)
        failed = {3: ("error", "it failed")}
        x[3] = np.nan
        ids = np.arange(shard * ROWS, (shard + 1) * ROWS, dtype=np.int64)
        simulations = Simulations(ids, theta, x, failed, np.zeros(ROWS, dtype=np.float32))
        data, record = encode_shard(simulations, {"shard": shard, "x_shape": [2]})
        store.put_if_absent(f"shard-{shard:06d}.parquet", data)
        records.append(record)
    return records


def fit_in(root: ObjectStore, **changes: Any) -> dict[str, Any]:
    """Train on the dataset of a store, in its folder ``model``; the content of the bundle."""
    dataset = root.child("dataset")
    unbounded = np.full(2, -np.inf), np.full(2, np.inf)
    options = TrainOptions(**{**OPTIONS, **changes})
    about = {"prior": {"kind": "opaque"}, "model": "disturbed"}
    records = store_dataset(dataset)
    return train(dataset, records, unbounded, root.child("model"), options, about, False)


def weights_of(root: ObjectStore) -> bytes:
    """The weights of the model that :func:`fit_in` left."""
    return root.get(f"model/{WEIGHTS}")


class Disturbed:
    """A driver of :func:`fit_in` in its own process, and on its own Ray without an address."""

    def __init__(
        self, root: ObjectStore, address: str | None, seed: int, **changes: object
    ) -> None:
        self.root, self._address, self._random = root, address, random.Random(seed)
        self._changes = json.dumps(changes)
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray.faults", self.root.uri, self._changes],
            cwd=ROOT,
            env={
                **os.environ,
                "RAY_ADDRESS": self._address or "",
                "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_progress(self, patience_s: float = 120) -> None:
        """Until a new checkpoint is there, and a random moment longer."""
        seen = self._newest()
        self._wait(lambda: self._newest() > seen, "a new checkpoint", patience_s)
        time.sleep(self._random.uniform(0.0, 0.5))

    def _newest(self) -> str:
        with contextlib.suppress(Exception):  # the store may be what is disturbed
            return max(self.root.list("model/checkpoints/"), default="")
        return ""

    def _wait(self, met: Callable[[], object], what: str, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while not met():
            if self.process.poll() is not None:
                raise AssertionError(f"ended before {what}: {self.process.communicate()[1]}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} within {patience_s:g} s")
            time.sleep(0.05)

    def workers(self) -> list[int]:
        """Processes that train, on the Ray that this driver uses or started."""
        starter = self.process.pid if self._address is None else os.getpid()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            pid = int(path.name)
            # A worker is a child of a raylet, and that of who started Ray.
            if _trains(pid) and _parent(_parent(pid)) == starter:
                found.append(pid)
        return found

    def kill_workers(self, count: int | None = None) -> None:
        """End some, or all, as a machine that goes away does."""
        there = self.workers()
        assert there, "there are no workers"
        for pid in self._random.sample(there, count or len(there)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._wait(lambda: not any(map(_trains, there)), "the end of the others", 60)

    def kill(self) -> None:
        """End the driver itself; its workers end when Ray notices."""
        there = self.workers()
        self.process.kill()
        self.process.wait()
        assert not self.root.exists(f"model/{BUNDLE}")
        deadline = time.monotonic() + 60
        while any(map(_trains, there)):
            assert time.monotonic() < deadline, "workers outlived their driver"
            time.sleep(0.1)
        self._start()

    def stop(self) -> None:
        """Ask the driver to end, as Ray, Kubernetes and Ctrl-C do: it saves a checkpoint first."""
        before = self._newest()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=30) == 143
        assert self._newest() > before
        assert not self.root.exists(f"model/{BUNDLE}")
        self._start()

    def finish(self, patience_s: float = 200) -> None:
        """Wait for the end."""
        _, said = self.process.communicate(timeout=patience_s)
        assert self.process.returncode == 0, said


def _trains(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        # Behind the command's name, which may hold anything but this bracket.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(uri: str, changes: str) -> int:
    """As the command line does it: SIGTERM ends the process in order."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with connected():
            fit_in(open_store(uri), **json.loads(changes))
    except KeyboardInterrupt:
        return 143
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
