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
from sbi_dist.experiment import load_experiment
from sbi_dist.pipeline import Pipeline
from sbi_dist.problem import load_problem
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.driver import repair, simulate
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.shard import Simulations
from sbi_dist.store import LocalStore
from tests.ray.conftest import (
    Run,
    assert_same,
    calm,
    command,
    counted,
    environment,
    living_actors,
    marked,
    read_dataset,
    rows_by_process,
    shard_times,
    wait_until,
    write_experiment,
)

pytestmark = pytest.mark.usefixtures("ray_session")


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
    assert_same(one, two)
    assert_same(one, calm(noisy_problem(), 100, 7))
    assert len(one) == 100
    other = run(
        noisy_problem(), tmp_path / "other", num_simulations=100, shard_size=7, seed=1, actors=1
    )
    assert not np.array_equal(one.theta, other.theta)


def test_append_keeps_the_stored_shards(tmp_path: Path) -> None:
    first = run(noisy_problem(), tmp_path, num_simulations=50, shard_size=20, actors=1)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    more = run(noisy_problem(), tmp_path, num_simulations=90, shard_size=20, actors=1)
    assert len(more) == 90 and np.array_equal(more.simulation_id, np.arange(90))
    assert np.array_equal(more.theta[:50], first.theta)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in times} == times


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_driver_is_made_up_for(
    tmp_path: Path, ray_address: str, sbi_dist: Run, number: signal.Signals
) -> None:
    counts = tmp_path / "counts"
    write_experiment(tmp_path, counted(counts, 0.004))
    process = subprocess.Popen(
        command("simulate", "experiment.yaml"),
        cwd=tmp_path,
        env=environment(ray_address),
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(shard_times(tmp_path)) >= 3 or process.poll() is not None, "shards")
    process.send_signal(number)
    began = time.monotonic()
    code = process.wait(timeout=30)
    assert code == (143 if number == signal.SIGTERM else -9)
    assert time.monotonic() - began < 3
    wait_until(lambda: not living_actors(counts), "the actors are gone", 10)
    stored = shard_times(tmp_path)
    assert 3 <= len(stored) < 20, "the kill was to come in the middle"

    again = sbi_dist("simulate", "experiment.yaml")
    assert again.returncode == 0, again.stderr
    after = shard_times(tmp_path)
    assert {name: after[name] for name in stored} == stored, "a stored shard was simulated again"
    problem = load_problem("problem.py:problem", tmp_path)
    assert_same(read_dataset(tmp_path), calm(problem, 400, 20))


def test_stopped_driver_takes_its_own_ray_with_it(tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    write_experiment(tmp_path, counted(counts, 0.02))
    own = {**environment(""), "SBI_DIST_TEST": str(tmp_path)}
    process = subprocess.Popen(
        command("simulate", "experiment.yaml"), cwd=tmp_path, env=own, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: shard_times(tmp_path) or process.poll() is not None, "shards")
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(timeout=30) == 143
    # Of 3 s, Ray takes two to end its own processes, and more where others use the cores.
    assert time.monotonic() - began < 6
    wait_until(lambda: not marked(f"SBI_DIST_TEST={tmp_path}"), "nothing of it is left", 10)


# By SIGTERM Ray ends actors whose driver or node is gone.
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_actor_is_made_up_for(tmp_path: Path, number: signal.Signals) -> None:
    mark = tmp_path / "killed"
    parent = os.getpid()

    def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # Dies of the signal once, in the middle of the run, in whichever actor gets there.
        if os.getpid() != parent:
            if theta[0] > 0.9 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), number)
            time.sleep(0.001)
        return theta + rng.standard_normal(2)

    problem = noisy_problem(simulator, batched=False)
    killed = run(problem, tmp_path / "run", num_simulations=300, shard_size=10, actors=2)
    assert mark.exists()
    assert_same(killed, calm(problem, 300, 10))


@pytest.mark.parametrize("kill", [False, True])
def test_last_shard_is_shared(tmp_path: Path, kill: bool) -> None:
    problem = noisy_problem(_Paired(tmp_path, kill), batched=False)
    shared = run(problem, tmp_path / "run", num_simulations=200, shard_size=200, actors=2)
    assert_same(shared, calm(problem, 200, 200))
    rows = rows_by_process(tmp_path / "counts")
    if kill:
        assert (tmp_path / "killed").exists()
        assert 200 < sum(rows.values()) < 400, "half a shard was to be repeated at most"
    else:
        assert len(rows) == 2 and all(60 <= count <= 140 for count in rows.values()), rows
        assert sum(rows.values()) == 200


class _Paired:
    """A simulator of slow rows, that begins when it was loaded in two actors."""

    def __init__(self, folder: Path, kill: bool) -> None:
        self.folder, self.kill, self.parent = folder, kill, os.getpid()
        (folder / "counts").mkdir()
        (folder / "loaded").mkdir()

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        (self.folder / "loaded" / str(os.getpid())).touch()

    def __call__(self, theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if os.getpid() != self.parent:
            with open(self.folder / "counts" / str(os.getpid()), "ab", 0) as file:
                file.write(b".")
                own = file.tell()
            while len(list((self.folder / "loaded").iterdir())) < 2:
                time.sleep(0.01)
            time.sleep(0.02)
            mark = self.folder / "killed"
            rows = rows_by_process(self.folder / "counts")
            if self.kill and len(rows) == 2 and min(rows.values()) > 20 and not mark.exists():
                mark.write_text(f"{own}")
                os.kill(os.getpid(), signal.SIGKILL)
        return theta + rng.standard_normal(2)


def test_two_drivers_share_the_work(tmp_path: Path, ray_address: str) -> None:
    counts = tmp_path / "counts"
    write_experiment(
        tmp_path, counted(counts, 0.005, actors=2), num_simulations=600, shard_size=10, actors=1
    )
    drivers = [
        subprocess.Popen(
            command("simulate", "experiment.yaml"),
            cwd=tmp_path,
            env=environment(ray_address),
            stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    assert [driver.wait(timeout=200) for driver in drivers] == [0, 0]
    problem = load_problem("problem.py:problem", tmp_path)
    assert_same(read_dataset(tmp_path), calm(problem, 600, 10))
    rows = rows_by_process(counts)
    assert sum(rows.values()) < 1.25 * 600, rows
    assert len(rows) == 2 and min(rows.values()) > 60, rows


def test_budget_of_time_is_kept(tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    path = write_experiment(tmp_path, counted(counts, 0.003), actors=1)

    def simulated(number: int | None, seconds: float) -> tuple[int, float]:
        sets = {
            "store": tmp_path / "runs",
            "simulate.num_simulations": number or "null",
            "simulate.max_seconds": seconds,
        }
        overrides = [f"{key}={value}" for key, value in sets.items()]
        pipeline = Pipeline(*load_experiment(str(path), overrides))
        began = time.monotonic()
        this = pipeline.simulate()
        took = time.monotonic() - began
        records = pipeline.rounds.records(this)
        assert records is not None, "training would not begin"
        # The driver itself knows, too, that the time is up.
        options = pipeline.experiment.simulate
        again = simulate(pipeline.problem, options, this.store, show_progress=False)
        assert [record.index for record in again] == [record.index for record in records]
        return sum(record.rows for record in records), took

    first, took = simulated(None, 8)
    assert first > 0 and took < 8 + 4
    stored, begun = shard_times(tmp_path), sum(rows_by_process(counts).values())
    again, took = simulated(None, 8)
    assert again == first and shard_times(tmp_path) == stored
    assert sum(rows_by_process(counts).values()) == begun, "the time was up"

    # A larger budget goes on, also for a number of simulations.
    more, took = simulated(10**6, 12)
    assert more >= first and took < 4 + 4
    most, _ = simulated(more + 200, 600)
    assert most >= more + 200
    kept = shard_times(tmp_path)
    assert {name: kept[name] for name in stored} == stored
    # Fewer than there are: complete, and nothing to do.
    fewer, _ = simulated(first, 14)
    assert first <= fewer <= more and shard_times(tmp_path) == kept
    simulations = read_dataset(tmp_path)
    expected = calm(load_problem("problem.py:problem", tmp_path), most, 20)
    both = simulations.simulation_id < most
    assert simulations.x[both].tobytes() == expected.x[simulations.simulation_id[both]].tobytes()


# A hundredth of the rows each, of theta uniform in [0, 1]: kind, status, part of the message.
FAULTS = [
    ("raise", "error", "ValueError: no solution at 0.0"),
    ("nan", "nonfinite", "NaN or infinite"),
    ("infinity", "nonfinite", "NaN or infinite"),
    ("shape", "error", "x has shape (3,), expected (2,)"),
    ("exit", "crashed", "exit code 7"),
    ("segfault", "crashed", "SIGSEGV"),
    ("hang", "timeout", "timeout_s=3"),
    ("memory", "crashed", "simulate.memory_per_actor_gb"),
]


def faulty(kinds: int) -> Problem:
    """A problem with the first so many faults."""
    parent = os.getpid()

    def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        number = int(theta[0] * 100)
        fault = FAULTS[number][0] if number < kinds and os.getpid() != parent else ""
        if fault == "raise":
            raise ValueError(f"no solution at {theta[0]:.4f}")
        if fault == "exit":
            os._exit(7)
        if fault == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "hang":
            time.sleep(600)
        if fault == "memory":
            held = np.ones(300 * 10**6, dtype=np.uint8)
            time.sleep(0.5)
            del held
        bad = {"nan": [np.nan, 0], "infinity": [0, -np.inf], "shape": [0, 0, 0]}
        return np.array(bad[fault]) if fault in bad else theta + rng.standard_normal(2)

    return Problem(BoxUniform([0.0], [1.0]), simulator, batched=False)


@pytest.mark.parametrize("limited", [True, False])
def test_each_fault_costs_its_own_rows(tmp_path: Path, limited: bool) -> None:
    # Without a time limit rows are simulated in the actors, until the first one is ended by a row.
    problem = faulty(len(FAULTS) if limited else len(FAULTS) - 2)
    kinds = FAULTS if limited else FAULTS[:-2]
    options = {"timeout_s": 3, "memory_per_actor_gb": 0.5} if limited else {}
    found = run(problem, tmp_path, num_simulations=1000, shard_size=50, **options)
    expected = calm(problem, 1000, 50)
    assert found.theta.tobytes() == expected.theta.tobytes()
    number = (found.theta[:, 0].astype(np.float64) * 100).astype(int)
    status = [kinds[each][1] if each < len(kinds) else "ok" for each in number]
    assert found.status == status
    assert set(number[number < len(kinds)]) == set(range(len(kinds))), "the seed was to give all"
    for row, each in enumerate(number):
        if each < len(kinds):
            assert kinds[each][2] in (found.error[row] or ""), found.error[row]
    assert found.ok.sum() > 850
    assert found.x[found.ok].tobytes() == expected.x[found.ok].tobytes()

    records = Dataset(LocalStore(tmp_path)).stored().records
    for kind in ("ok", "nonfinite", "error", "timeout", "crashed"):
        assert sum(each.statuses.get(kind, 0) for each in records.values()) == status.count(kind)
    for record in records.values():
        for entry in record.errors:
            assert entry["theta"] == found.theta[entry["simulation_id"]].tolist()
            assert entry["message"] == found.error[entry["simulation_id"]]


def test_leaking_simulator_has_its_actor_replaced(tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    counts.mkdir()
    parent = os.getpid()

    def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if os.getpid() != parent:
            with open(counts / str(os.getpid()), "ab", 0) as file:
                file.write(b".")
            leak = vars(np).setdefault("_leak_of_a_test", [])
            leak.append(np.ones(10**7, dtype=np.uint8))
        return theta + rng.standard_normal(2)

    problem = noisy_problem(simulator, batched=False)
    found = run(
        problem,
        tmp_path / "run",
        num_simulations=120,
        shard_size=10,
        actors=1,
        memory_per_actor_gb=0.8,
    )
    assert_same(found, calm(problem, 120, 10))
    rows = rows_by_process(counts)
    # Besides what it leaks, an actor may finish the calls that it was given.
    assert sum(rows.values()) == 120 and max(rows.values()) <= 80 + 2 * 10, rows


def test_too_many_failures_stop_the_run(tmp_path: Path) -> None:
    parent = os.getpid()

    def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if theta[0] > 0 and os.getpid() != parent:
            raise RuntimeError("no solution")
        return theta + rng.standard_normal(2)

    with pytest.raises(StageError, match=r"max_failure_fraction=0.1.*no solution.*theta = \[0"):
        run(noisy_problem(simulator, batched=False), tmp_path, num_simulations=2000, shard_size=50)
    assert 0 < Dataset(LocalStore(tmp_path)).stored().rows < 2000


def test_flipped_byte_is_named_and_repaired(tmp_path: Path) -> None:
    options = {"num_simulations": 60, "shard_size": 20, "actors": 1}
    good = run(noisy_problem(), tmp_path, **options)
    path = tmp_path / "shard-000001.parquet"
    data = bytearray(path.read_bytes())
    position = data.find(good.x[20].tobytes())
    assert position > 0
    data[position] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"shard-000001.parquet is damaged.*--repair"):
        Dataset(LocalStore(tmp_path)).read_all([0, 1, 2])
    assert repair(LocalStore(tmp_path)) == ["shard-000001.parquet"]
    assert_same(run(noisy_problem(), tmp_path, **options), good)


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
