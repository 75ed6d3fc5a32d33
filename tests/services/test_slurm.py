"""The batch script on a real Slurm with two nodes: ends, goes on after both kinds of stop.

About 120 s.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.local.ports import free_ports
from sbi_dist.catalog.table import read_draws
from sbi_dist.store import LocalStore
from tests.ray.conftest import (
    ROOT,
    SLOW,
    assert_same,
    command,
    dataset_folder,
    marked,
    read_dataset,
    shard_times,
    wait_until,
    write_experiment,
)
from tests.services.slurm import NotStarted, Slurm

SCRIPT = str(ROOT / "cluster/slurm/run.sbatch")
SMALL = ["--cpus-per-task=1", "--mem-per-cpu=1500M", "--time=20"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    try:
        running = Slurm()
    except NotStarted as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))
    yield running
    running.stop()


class Job:
    """A job of the script, whose processes are told by a variable in their environment."""

    def __init__(self, slurm: Slurm, folder: Path, *options: str, **variables: str) -> None:
        self.slurm, self.folder = slurm, folder
        self._mark = f"SBI_DIST_TEST_JOB={uuid.uuid4().hex}"
        name, value = self._mark.split("=")
        chosen = {
            name: value,
            "PATH": f"{Path(sys.executable).parent}:{slurm.environment['PATH']}",
            "OMP_NUM_THREADS": "1",
            "SBI_TMPDIR": str(slurm.folder),
            **variables,
        }
        self.id = slurm.submit(folder, chosen, [*SMALL, *options])

    def state(self) -> str:
        return self.slurm.job(self.id)["JobState"]

    def processes(self) -> list[int]:
        return marked(self._mark)

    def driver(self) -> list[str] | None:
        """The arguments of its sbi-dist, once that runs on the cluster."""
        for pid in self.processes():
            arguments = _read(pid, "cmdline")
            if "--address" in arguments and "bin/sbi-dist" in arguments[1]:
                return arguments
        return None

    def log(self) -> str:
        return (self.folder / f"sbi-dist-{self.id}.log").read_text()

    def wait(self, *states: str) -> None:
        """Wait until it is in one of these states, and has left nothing on its nodes."""
        wait_until(lambda: self.state() in states, f"job {self.id} to be {states}", 180)
        wait_until(lambda: not self.processes(), "its processes to end", 30)
        left = {
            str(each): [str(file) for file in each.rglob("*")]
            for each in self.slurm.folder.glob("sbi.*")
        }
        assert not left, f"{left}\n{self.log()}"

    def release(self) -> None:
        """Start it soon: Slurm waits for two minutes before it starts a job again."""
        # A node takes a job for the killed one that starts in the second in which that was killed.
        time.sleep(3)

        def starts() -> bool:
            # More than once, as Slurm may set the time after the state.
            self.slurm.run("scontrol", "update", f"JobId={self.id}", "StartTime=now")
            time.sleep(0.2)
            return self.state() == "RUNNING"

        wait_until(starts, f"job {self.id} to start again", 60)


def _read(pid: int, name: str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def test_goes_on_after_preemption(slurm: Slurm, tmp_path: Path) -> None:
    laptop, there = tmp_path / "laptop", tmp_path / "slurm"
    for folder in (laptop, there):
        folder.mkdir()
        write_experiment(folder, SLOW.replace("0.004", "0.04"))
    job = Job(slurm, there, SCRIPT, "experiment.yaml")

    wait_until(lambda: job.driver() is not None, "sbi-dist to begin")
    stranger = _stranger(job, tmp_path)
    try:
        wait_until(lambda: len(shard_times(there)) >= 3, "the first shards")
        _assert_token_is_hidden(job)
        said = tmp_path / "stranger.log"
        wait_until(lambda: "InvalidAuthToken" in said.read_text(), "a stranger to be refused")
    finally:
        stranger.kill()  # it would try again
        stranger.wait(30)
    first = shard_times(there)
    assert len(first) < 20
    # As Slurm does for a job of higher priority.
    slurm.run("scontrol", "requeue", job.id)
    reference = subprocess.Popen(
        command("run", "experiment.yaml"),
        cwd=laptop,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    job.wait("PENDING")
    assert reference.wait(120) == 0, reference.communicate()

    job.release()
    job.wait("COMPLETED", "FAILED")
    assert slurm.job(job.id)["ExitCode"] == "0:0", job.log()
    last = shard_times(there)
    assert first.items() <= last.items() and len(last) == 20
    found, expected = dataset_folder(there), dataset_folder(laptop)
    assert found is not None and expected is not None and found.name == expected.name
    assert_same(read_dataset(there), read_dataset(laptop))
    (one,), (other,) = (
        list(place.glob("runs/experiment/posteriors/observed-*")) for place in (there, laptop)
    )
    assert one.name == other.name
    drawn, wanted = (read_draws(LocalStore(each)).draws for each in (one, other))
    assert (drawn == wanted).all()


def _stranger(job: Job, folder: Path) -> subprocess.Popen[bytes]:
    """Another user's process, which uses the cluster with a token of its own."""
    arguments = job.driver()
    assert arguments is not None
    address = arguments[arguments.index("--address") + 1]
    with open(folder / "stranger.log", "wb") as log:
        return subprocess.Popen(
            command("simulate", "gaussian", "--address", address),
            cwd=folder,
            env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
            stdout=log,
            stderr=log,
        )


def _assert_token_is_hidden(job: Job) -> None:
    """Everything runs with one token, which is on no command line; files are the user's alone."""
    tokens, lines = set(), ""
    for pid in job.processes():
        lines += " ".join(_read(pid, "cmdline"))
        for entry in _read(pid, "environ"):
            if entry.startswith("RAY_AUTH_TOKEN="):
                tokens.add(entry.partition("=")[2])
    (token,) = tokens
    assert len(token) == 64 and token not in lines
    directories = list(job.slurm.folder.glob("sbi.*"))
    assert len(directories) == 2
    assert all(each.stat().st_mode & 0o077 == 0 for each in directories)


def test_exit_code_and_resources_are_passed_on(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(
        slurm, tmp_path, "--nodes=1", "--gres=gpu:1", SCRIPT, "gaussian", "--set",
        "simulate.gpus_per_actor=2", STAGE="simulate",
    )  # fmt: skip
    job.wait("FAILED", "COMPLETED")
    assert slurm.job(job.id)["ExitCode"] == "2:0", job.log()
    assert "2 GPUs, and the Ray cluster has 1" in job.log()


# What a simulator leaves running, and what goes on writing after Ray.
STRAY = """
import subprocess
late = 'while :; do mkdir -p "$TMPDIR/late"; : > "$TMPDIR/late/$$"; sleep 0.005; done'
subprocess.Popen(["sh", "-c", late], start_new_session=True, stderr=subprocess.DEVNULL)
"""


def test_goes_back_to_the_queue_before_its_time_limit(slurm: Slurm, tmp_path: Path) -> None:
    write_experiment(tmp_path, SLOW.replace("0.004", "0.1") + STRAY)
    (port,) = free_ports(1)
    job = Job(
        slurm, tmp_path, "--nodes=1", SCRIPT, "experiment.yaml", STAGE="simulate",
        SBI_METRICS_PORT=str(port),
    )  # fmt: skip
    # While Ray starts, long before there is a stage.
    wait_until(lambda: list(slurm.folder.glob("sbi.*/log")), "Ray to begin")
    slurm.run("scancel", "--signal=TERM", "--batch", job.id)
    job.wait("PENDING", "FAILED")
    assert slurm.job(job.id)["Restarts"] == "1", job.log()
    assert job.log().count("goes back to the queue") == 1 and not shard_times(tmp_path)

    job.release()
    wait_until(lambda: shard_times(tmp_path), "the first shard")
    _wait_for_metrics(port)
    # As Slurm does then, to the script alone.
    slurm.run("scancel", "--signal=TERM", "--batch", job.id)
    job.wait("PENDING")
    assert slurm.job(job.id)["Restarts"] == "2"
    log = job.log()
    assert "job is RUNNING" in log and "stopped; what is finished is kept" in log
    assert log.count("goes back to the queue") == 2


def _wait_for_metrics(port: int) -> None:
    """Wait until Prometheus would get sbi_dist's metrics at this port of the node."""

    def there() -> bool:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/metrics")
        except httpx.TransportError:
            return False
        return "ray_sbi_simulate_simulations_total" in answer.text

    wait_until(there, "metrics of the simulations", 30)
