"""The simulate stage on real Ray actors: what is killed is made up for, and nothing changes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from sbi_dist import BoxUniform, InputError, Problem, StageError
from sbi_dist.simulation.dataset import Dataset, Simulations
from sbi_dist.simulation.driver import repair, simulate
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.store import LocalStore
from tests.ray.conftest import command, environment, write_experiment

pytestmark = pytest.mark.usefixtures("ray_session")


def same(one: Simulations, other: Simulations) -> bool:
    """Equal in every column but the run times, which no two runs share."""
    return (
        np.array_equal(one.simulation_id, other.simulation_id)
        and one.theta.tobytes() == other.theta.tobytes()
        and one.x.tobytes() == other.x.tobytes()
        and one.status == other.status
        and one.error == other.error
    )


def run(problem: Problem, folder: Path, **options: object) -> Simulations:
    store = LocalStore(folder)
    records = simulate(problem, SimulateOptions(**options), store, show_progress=False)  # type: ignore[arg-type]
    return Dataset(store).read_all([record.index for record in records])


def noisy(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return theta + rng.standard_normal(2)


def noisy_problem(simulator: object = noisy, **fields: object) -> Problem:
    return Problem(BoxUniform([-1.0, 0.0], [1.0, 2.0]), simulator, **fields)  # type: ignore[arg-type]


def test_number_of_actors_does_not_matter(tmp_path: Path) -> None:
    one = run(noisy_problem(), tmp_path / "one", num_simulations=100, shard_size=7, actors=1)
    two = run(noisy_problem(), tmp_path / "two", num_simulations=100, shard_size=7, actors=2)
    assert same(one, two)
    assert len(one) == 100
    other = run(noisy_problem(), tmp_path / "other", num_simulations=100, shard_size=7, seed=1)
    assert not np.array_equal(one.theta, other.theta)


def test_append_keeps_the_stored_shards(tmp_path: Path) -> None:
    first = run(noisy_problem(), tmp_path, num_simulations=50, shard_size=20)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    more = run(noisy_problem(), tmp_path, num_simulations=90, shard_size=20)
    assert len(more) == 90 and np.array_equal(more.simulation_id, np.arange(90))
    assert np.array_equal(more.theta[:50], first.theta)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in times} == times


def _rows_stored(folder: Path) -> int:
    return sum(record.rows for record in Dataset(LocalStore(folder)).stored().values())


def _dataset_folder(tmp_path: Path) -> Path | None:
    folders = list(tmp_path.glob("runs/experiment/simulations/*"))
    return folders[0] if folders else None


def _wait_for_shards(tmp_path: Path, count: int, process: subprocess.Popen[bytes]) -> Path:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        folder = _dataset_folder(tmp_path)
        if folder and len(list(folder.glob("shard-*"))) >= count:
            return folder
        assert process.poll() is None, "the command ended before it was to be killed"
        time.sleep(0.02)
    raise AssertionError("no shards within 90 s")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_driver_is_made_up_for(
    tmp_path: Path, ray_address: str, number: signal.Signals
) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for folder in (calm, killed):
        folder.mkdir()
        write_experiment(folder)
    arguments = {"env": environment(ray_address), "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(  # type: ignore[call-overload]
        command("simulate", "experiment.yaml"), cwd=killed, **arguments
    )
    folder = _wait_for_shards(killed, 3, process)
    process.send_signal(number)
    code = process.wait(timeout=30)
    assert code == (143 if number == signal.SIGTERM else -9)
    stored = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert 3 <= len(stored) < 20, "the kill was to come in the middle"

    for place in (killed, calm):
        subprocess.run(
            command("simulate", "experiment.yaml"), cwd=place, check=True, timeout=200, **arguments
        )
    after = {name: (folder / name).stat().st_mtime_ns for name in stored}
    assert after == stored, "a stored shard was simulated again"
    calm_folder = _dataset_folder(calm)
    assert calm_folder is not None and calm_folder.name == folder.name
    indexes = list(range(20))
    assert same(
        Dataset(LocalStore(folder)).read_all(indexes),
        Dataset(LocalStore(calm_folder)).read_all(indexes),
    )


def test_killed_actor_is_made_up_for(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    mark = tmp_path / "killed"

    def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # Dies of kill -9 once, in the middle of the run, in whichever actor gets there.
        (pids / str(os.getpid())).touch()
        if theta[0] > 0.9 and not mark.exists() and len(list(pids.iterdir())) > 1:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001)
        return theta + rng.standard_normal(2)

    def calm(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return theta + rng.standard_normal(2)

    (pids / str(os.getpid())).touch()
    problem = noisy_problem(simulator, batched=False)
    # The form is found here, where the simulator must not kill.
    mark.touch()
    problem.form()
    mark.unlink()
    options = {"num_simulations": 300, "shard_size": 10, "actors": 2}
    killed = run(problem, tmp_path / "killed-run", **options)
    assert mark.exists()
    expected = run(noisy_problem(calm, batched=False), tmp_path / "calm-run", **options)
    assert same(killed, expected)


def test_each_fault_costs_its_own_rows(tmp_path: Path) -> None:
    parent = os.getpid()

    def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        kind = theta[0] if os.getpid() != parent else 0.0
        if kind > 0.95:
            raise ValueError("first parameter too large")
        if kind > 0.90:
            return np.full(2, np.nan)
        if kind > 0.87:
            return np.zeros(3)
        if kind > 0.84:
            os._exit(7)
        if kind > 0.826:
            time.sleep(60)
        return theta + rng.standard_normal(2)

    problem = noisy_problem(simulator, batched=False)
    simulations = run(
        problem,
        tmp_path,
        num_simulations=200,
        shard_size=50,
        timeout_s=5,
        max_failure_fraction=0.5,
    )
    first = simulations.theta[:, 0].astype(np.float64)
    expected = np.select(
        [first > 0.95, first > 0.90, first > 0.87, first > 0.84, first > 0.826],
        ["error", "nonfinite", "error", "crashed", "timeout"],
        "ok",
    )
    assert simulations.status == expected.tolist()
    assert len(set(simulations.status)) == 5, "the seed was to give every kind of fault"
    messages = {error for error in simulations.error if error}
    assert any("first parameter too large" in message for message in messages)
    assert any("expected (2,)" in message for message in messages)
    assert any("exit code 7" in message for message in messages)
    assert any("timeout_s=5" in message for message in messages)


def test_crash_without_time_limit_is_isolated(tmp_path: Path) -> None:
    parent = os.getpid()

    def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if theta[0] > 0.97 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGSEGV)
        return theta + rng.standard_normal(2)

    simulations = run(
        noisy_problem(simulator, batched=False), tmp_path, num_simulations=80, shard_size=40
    )
    crashed = simulations.theta[:, 0] > np.float32(0.97)
    assert crashed.any()
    assert [status == "crashed" for status in simulations.status] == crashed.tolist()
    assert "SIGSEGV" in (simulations.error[int(np.argmax(crashed))] or "")


def test_too_many_failures_stop_the_run(tmp_path: Path) -> None:
    parent = os.getpid()

    def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if theta[0] > 0 and os.getpid() != parent:
            raise RuntimeError("no solution")
        return theta + rng.standard_normal(2)

    with pytest.raises(StageError, match=r"max_failure_fraction=0.1.*no solution.*theta = \[0"):
        run(noisy_problem(simulator, batched=False), tmp_path, num_simulations=2000, shard_size=50)
    assert 0 < _rows_stored(tmp_path) < 2000


def test_flipped_byte_is_named_and_repaired(tmp_path: Path) -> None:
    good = run(noisy_problem(), tmp_path, num_simulations=60, shard_size=20)
    path = tmp_path / "shard-000001.parquet"
    data = bytearray(path.read_bytes())
    position = data.find(good.x[20].tobytes())
    assert position > 0
    data[position] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"shard-000001.parquet is damaged.*--repair"):
        Dataset(LocalStore(tmp_path)).read_all([0, 1, 2])
    assert repair(LocalStore(tmp_path)) == ["shard-000001.parquet"]
    assert same(run(noisy_problem(), tmp_path, num_simulations=60, shard_size=20), good)


def test_more_than_the_cluster_has(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"simulate.actors asks for 5000 x 1 = 5000 CPUs"):
        run(noisy_problem(), tmp_path, num_simulations=60, actors=5000)
    with pytest.raises(InputError, match="GPUs"):
        run(noisy_problem(), tmp_path, num_simulations=60, gpus_per_actor=64)


def test_simulator_that_can_not_travel(tmp_path: Path) -> None:
    import threading

    lock = threading.Lock()

    def simulator(theta: np.ndarray) -> np.ndarray:
        with lock:
            return theta

    with pytest.raises(InputError, match="problem can't be sent to the workers"):
        run(noisy_problem(simulator), tmp_path, num_simulations=60)
