"""``python -m cluster.local`` from up to down, with a pipeline on it that loses a node.

About 50 s.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.local.processes import Processes
from sbi_dist.errors import InputError
from sbi_dist.store import open_store
from tests.monitoring import program
from tests.ray.conftest import ROOT, SLOW, command, marked, wait_until, write_experiment
from tests.services.outcome import dataset_name, posterior_draws, run_alone

SHORT = "/tmp"  # as Ray's sockets need a short path


def local(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.local", *arguments, "--folder", str(folder)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "AWS_PROFILE": "none"},
        capture_output=True,
        text=True,
        timeout=180,
    )


def exports(text: str) -> dict[str, str]:
    """The variables of lines for a shell; nothing else may be there."""
    first, *lines = text.splitlines()
    assert first.startswith("unset AWS_PROFILE ")
    words = [shlex.split(line) for line in lines]
    assert all(first == "export" and len(rest) == 1 for first, *rest in words)
    return dict(word.split("=", 1) for _, word in words)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    program("prometheus")
    parent = Path(tempfile.mkdtemp(prefix="local-", dir=SHORT))
    yield parent / "c"
    local(parent / "c", "down")
    shutil.rmtree(parent)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> dict[str, str]:
    """The variables of a cluster of two nodes with a CPU each."""
    result = local(folder, "up", "--nodes", "2", "--cpus", "1")
    assert result.returncode == 0, result.stderr
    assert "is up after" in result.stderr
    return exports(result.stdout)


def test_up_again_says_so(folder: Path, cluster: dict[str, str]) -> None:
    again = local(folder, "up")
    assert again.returncode == 0 and "is up already" in again.stderr
    assert exports(again.stdout) == cluster
    assert local(folder, "status").returncode == 0
    for path in (folder, folder / "token", folder / "cluster.json"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_pipeline_on_s3_goes_on_without_a_node(
    folder: Path, cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_experiment(tmp_path, SLOW.replace("0.004", "0.03"))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    where = "s3://sbi/tests"
    job = subprocess.Popen(
        command("run", "experiment.yaml", "--store", where, "--address", cluster["RAY_ADDRESS"]),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stored = open_store(f"{where}/experiment")

        def shards() -> list[str]:
            return [key for key in stored.list("simulations/") if "/shard-" in key]

        wait_until(lambda: len(shards()) >= 4, "the first shards")
        states = local(folder, "status").stderr.splitlines()
        (raylet,) = _raylets(next(each for each in states if each.startswith("node-2")).split()[-1])
        os.kill(raylet, signal.SIGKILL)
        out, err = job.communicate(timeout=150)
    finally:
        job.kill()
        job.wait(30)
    assert job.returncode == 0, err
    assert len(shards()) == 20 and "posterior draws: s3://sbi/tests/experiment/posteriors/" in out
    alone = run_alone(tmp_path)
    assert dataset_name(stored) == dataset_name(alone)
    assert np.array_equal(posterior_draws(stored), posterior_draws(alone))
    status = local(folder, "status")
    assert status.returncode == 1 and "node-2      has ended" in status.stderr
    told = local(folder, "up")
    assert told.returncode == 1 and "not running: node-2" in told.stderr
    url = next(line for line in status.stderr.splitlines() if line.startswith("prometheus  http"))
    wait_until(lambda: _simulated(url.split()[1]), "metrics in Prometheus", 30)


def _raylets(pid: str) -> list[int]:
    """The raylets below the process of a node."""
    found = subprocess.run(
        ["ps", "--ppid", pid, "-o", "pid=,comm="], capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in found.stdout.splitlines()]
    return [int(each[0]) for each in lines if each[1] == "raylet"]


def _simulated(url: str) -> bool:
    """Whether Prometheus has seen how many simulations there were, be it a while ago."""
    query = urllib.parse.urlencode(
        {"query": "max_over_time(ray_sbi_simulate_simulations_total[10m])"}
    )
    with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=10) as answer:
        return any(float(each["value"][1]) > 0 for each in json.load(answer)["data"]["result"])


def test_down_leaves_nothing(folder: Path, cluster: dict[str, str]) -> None:
    mark = f"SBI_LOCAL_CLUSTER={json.loads((folder / 'cluster.json').read_text())['mark']}"
    assert len(marked(mark)) > 5
    began = time.monotonic()
    result = local(folder, "down")
    assert result.returncode == 0 and "is down" in result.stderr, result.stderr
    assert "killed" not in result.stderr and time.monotonic() - began < 30
    assert not marked(mark) and not folder.exists()
    assert local(folder, "status").returncode == 1
    again = local(folder, "down")
    assert again.returncode == 0 and "is not up" in again.stderr


def test_what_can_not_be_is_one_sentence(tmp_path: Path) -> None:
    long = local(Path("/tmp") / ("a" * 60), "up")
    assert long.returncode == 2 and "at most 40" in long.stderr
    with tempfile.TemporaryDirectory(prefix="full-", dir=SHORT) as full:
        (Path(full) / "other").touch()
        result = local(Path(full), "up")
        assert result.returncode == 2 and "is not empty" in result.stderr


@pytest.fixture
def prepared() -> Iterator[Path]:
    """A folder as a cluster leaves it that has begun, without processes."""
    with tempfile.TemporaryDirectory(prefix="own-", dir=SHORT) as parent:
        place = Path(parent) / "c"
        processes = Processes(place)
        processes.begin()
        processes.publish({"AWS_REGION": "here; there"}, {"store": "s3://sbi"})
        yield place


def test_nothing_is_read_from_a_folder_of_others(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exports(local(prepared, "up").stdout) == {"AWS_REGION": "here; there"}
    prepared.chmod(0o755)
    for word in ("up", "status", "down"):
        result = local(prepared, word)
        assert result.returncode == 2 and result.stdout == "", result.stderr
        assert "is no directory of yours alone; give one" in result.stderr
    prepared.chmod(0o700)
    link = prepared.with_name("link")
    link.symlink_to(prepared)
    with pytest.raises(InputError, match="is no directory of yours alone"):
        Processes(link).exist()
    assert Processes(prepared).exist() and not Processes(prepared / "none").exist()
    monkeypatch.setattr(os, "getuid", lambda: prepared.stat().st_uid + 1)
    with pytest.raises(InputError, match="is no directory of yours alone"):
        Processes(prepared).exist()


@pytest.mark.parametrize("change", ["cut off", "keys", "names"])
def test_a_damaged_file_is_one_sentence(prepared: Path, change: str) -> None:
    file = prepared / "cluster.json"
    text = file.read_text()
    if change == "cut off":
        text = text[:40]
    elif change == "keys":
        text = "{}"
    else:
        text = text.replace("AWS_REGION", "A; touch /tmp/x; B")
    file.write_text(text)
    for word in ("up", "status", "down"):
        result = local(prepared, word)
        assert result.returncode == 2 and result.stdout == ""
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert f"{file} is damaged" in result.stderr and f"remove {prepared}" in result.stderr
