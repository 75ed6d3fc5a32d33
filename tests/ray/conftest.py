"""One local Ray for the whole session, and how these tests run the command line."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbi_dist import Problem
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.plan import Extent, plan_shards
from sbi_dist.simulation.rows import InProcess, simulate_shard
from sbi_dist.simulation.shard import Simulations, concatenate
from sbi_dist.store import LocalStore

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    from sbi_dist.session import connected

    with connected():
        yield


@pytest.fixture(scope="session")
def ray_address(ray_session: None) -> str:
    """Address of the session's Ray, for commands in processes of their own."""
    import ray

    return ray.get_runtime_context().gcs_address


class Nodes:
    """A Ray cluster of several nodes on this machine, each with raylet and object store.

    The process that makes it is not connected to it, and may be to another one.
    """

    _ARGUMENTS: dict[str, Any] = {
        "num_cpus": 1,
        "memory": 3_000_000_000,
        "object_store_memory": 80 * 1024**2,
    }

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # Nodes that are gone are found out about within a second or two.
        quick = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 5000,
            "health_check_failure_threshold": 3,
        }
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={**self._ARGUMENTS, "include_dashboard": False, "_system_config": quick},
        )
        # Else `ray.init()` of whoever else is on this machine would join it.
        Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)
        self.address: str = self._cluster.address
        self.others: list[Any] = []  # all but the head

    def add(self, **arguments: Any) -> Any:
        node = self._cluster.add_node(**{**self._ARGUMENTS, **arguments})
        self.others.append(node)
        return node

    def remove(self, node: Any) -> None:
        """As if its machine had been switched off."""
        self._cluster.remove_node(node, allow_graceful=False)
        self.others.remove(node)

    def drain(self, node: Any, deadline_s: float) -> None:
        """Tell Ray that a node will be taken away, as clouds do with cheap ones."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        accepted, reason = GcsClient(address=self.address).drain_node(
            node.node_id,
            DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "preempted",
            int((time.time() + deadline_s) * 1000),
        )
        assert accepted, reason

    def cpus(self) -> int:
        return 1 + len(self.others)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="session")
def cluster(ray_session: None) -> Iterator[Nodes]:
    """Three nodes with one CPU each, beside the session's own Ray.

    After that one, as Ray settles how processes authenticate when the first one is started.
    """
    nodes = Nodes()
    try:
        for _ in range(2):
            nodes.add()
        yield nodes
    finally:
        nodes.shutdown()


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def sbi_dist(
    ray_session: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Run]:
    """Run a command in an empty folder on the session's Ray; its exit code and what it says.

    In this process, as a process of its own takes five seconds of a core before it begins.
    """
    from sbi_dist.cli import run_command

    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        code = run_command(list(arguments))
        said = capfd.readouterr()
        return subprocess.CompletedProcess(["sbi-dist", *arguments], code, said.out, said.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def program(ray_address: str, tmp_path: Path) -> Run:
    """As ``sbi_dist``, in a process of its own: what a user starts."""

    def run(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments),
            cwd=tmp_path,
            env=environment(ray_address),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def command(*arguments: str) -> list[str]:
    """The command line as a process's arguments."""
    return [sys.executable, "-m", "sbi_dist", *arguments]


def environment(address: str) -> dict[str, str]:
    """This process's environment with the Ray to use."""
    return {**os.environ, "RAY_ADDRESS": address, "COLUMNS": "200"}


# A simulator slow enough to be killed in the middle, with rows that depend on the random stream.
SLOW = """
import time

import numpy as np
import torch

from sbi_dist import BoxUniform, Problem


def simulator(theta, rng):
    time.sleep(0.004)
    return theta + 0.1 * rng.standard_normal(2)


problem = Problem(
    BoxUniform([-1.0, 0.0], [1.0, 2.0]), simulator, parameter_names=["a", "b"], observed=[0.1, 1.0]
)
"""


# As above, and counts what it simulates: every process has a file with one byte a row. It waits at
# its first row until so many actors have got there. Another folder to count in is no other problem.
COUNTED = """
import os
import time

import numpy as np

from sbi_dist import BoxUniform, Problem

FOLDER, SECONDS, ACTORS, NUMBERS = {folder!r}, {seconds!r}, {actors!r}, {numbers!r}


def simulator(theta, rng):
    if "RAY_RAYLET_PID" in os.environ:  # not where the driver looks at the simulator's form
        with open(os.path.join(FOLDER, str(os.getpid())), "ab", 0) as file:
            file.write(b".")
        while len(os.listdir(FOLDER)) < ACTORS:
            time.sleep(0.01)
    time.sleep(SECONDS)
    if theta[0] > 0.95:
        raise ValueError(f"{{theta[0]:.4f}} is too large")
    return theta[0] + 0.1 * rng.standard_normal(NUMBERS)


problem = Problem(
    BoxUniform([-1.0, 0.0], [1.0, 2.0]), simulator, batched=False, version="counted {numbers}"
)
"""


def counted(folder: Path, seconds: float, actors: int = 0, numbers: int = 2) -> str:
    """The source of a problem that counts in a folder, see ``rows_by_process``."""
    folder.mkdir(exist_ok=True)
    return COUNTED.format(folder=str(folder), seconds=seconds, actors=actors, numbers=numbers)


def rows_by_process(folder: Path) -> dict[int, int]:
    """How many rows each process began to simulate."""
    return {int(path.name): path.stat().st_size for path in folder.iterdir()}


def living_actors(folder: Path) -> list[int]:
    """The simulator actors that have counted in a folder and are alive."""
    found = []
    for pid in rows_by_process(folder):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
            # Process ids are used again.
            if title.startswith(b"ray::SimulatorActor"):
                found.append(pid)
    return found


def marked(entry: str) -> list[int]:
    """Processes with an entry in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if entry.encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def titled(title: str) -> list[int]:
    """Descendants of this process, and what Ray started for it, whose title begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "cmdline").read_bytes().startswith(title.encode()) and ours(path):
                found.append(int(path.name))
    return found


def ours(process: Path) -> bool:
    """Whether this process is an ancestor of another, given as its folder in /proc."""
    while process.name not in ("0", "1"):
        if int(process.name) == os.getpid():
            return True
        parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        process = Path("/proc", parent)
    return False


def wait_until(met: Callable[[], Any], what: str, patience_s: float = 90) -> Any:
    """Wait for something that is bound to come; what it is then."""
    deadline = time.monotonic() + patience_s
    while not (found := met()):
        assert time.monotonic() < deadline, f"{what}: not within {patience_s:g} s"
        time.sleep(0.02)
    return found


def dataset_folder(place: Path) -> Path | None:
    """The folder of the only dataset of an experiment, once it is there."""
    folders = list(place.glob("runs/experiment/simulations/*"))
    return folders[0] if folders else None


def shard_times(place: Path) -> dict[str, int]:
    """When each stored shard was written."""
    folder = dataset_folder(place)
    found = folder.glob("shard-*") if folder else ()
    return {path.name: path.stat().st_mtime_ns for path in found}


def read_dataset(place: Path) -> Simulations:
    """All rows of the only dataset of an experiment."""
    folder = dataset_folder(place)
    assert folder is not None
    dataset = Dataset(LocalStore(folder))
    return dataset.read_all(sorted(dataset.indexes()))


def assert_same(one: Simulations, other: Simulations) -> None:
    """Equal in every column but the run times, which no two runs share."""
    assert np.array_equal(one.simulation_id, other.simulation_id)
    assert one.theta.tobytes() == other.theta.tobytes()
    assert one.x.tobytes() == other.x.tobytes()
    assert one.status == other.status
    assert one.error == other.error


def calm(problem: Problem, num_simulations: int, shard_size: int, seed: int = 0) -> Simulations:
    """What a dataset holds where nothing goes wrong: simulated here, without Ray."""
    extent = Extent(0, 0, shard_size, num_simulations)
    call = InProcess(problem.simulator)
    form = problem.form()
    shards = plan_shards([extent], num_simulations)
    return concatenate([simulate_shard(problem, form, shard, seed, call) for shard in shards])


def write_experiment(folder: Path, source: str = SLOW, **simulate: object) -> Path:
    """An experiment file with its problem beside it."""
    import yaml

    (folder / "problem.py").write_text(source)
    content = {
        "name": "experiment",
        "problem": "problem.py:problem",
        "simulate": {"num_simulations": 400, "shard_size": 20, **simulate},
        "train": {"transforms": 2, "hidden_features": 16, "max_epochs": 3, "workers": 0},
        # Trained for a moment, it would fail.
        "calibrate": {"enabled": False},
        "infer": {"num_samples": 500, "predictive_simulations": 20},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
