"""The simulate stage against bare loops, the best possible schedule, and sbi.

Times are from the first call of the simulator to the last shard in the store (a directory below
TMPDIR); the start of the actors, which an sbi worker pool needs as well, is printed apart.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbi_dist import BoxUniform, Problem
from sbi_dist.session import connected
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.driver import simulate
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.plan import Shard
from sbi_dist.simulation.rows import InProcess, simulate_shard
from sbi_dist.simulator import SimulatorForm
from sbi_dist.store import LocalStore

__all__ = ["run"]

PRIOR = BoxUniform([-2.0, -2.0, -2.0], [2.0, 2.0, 2.0])
CORES = 2


def run() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    overhead = _overhead()
    with connected():
        rows = [_speed_up(), *_heavy_tails(), *_vectorized()]
        rows += [*overhead, *_memory(), _tiny_shards()]
    print("\nSimulation")
    print(f"{'':58}{'measured':>14}{'compared with':>32}{'ratio':>8}")
    for what, measured, compared, ratio in rows:
        print(f"{what:58}{measured:>14}{compared:>32}{ratio:>8}")


# ---- a run, timed -------------------------------------------------------------------------------


class _Timed:
    """A simulator that leaves a note of when it was first called in each process, and its memory.

    Called with a folder in its place, so that it knows where to leave them.
    """

    def __init__(self, simulator: Callable[..., Any], folder: str) -> None:
        self._simulator, self._folder = simulator, folder
        self._begun = False

    def __call__(self, theta: Any, rng: Any) -> Any:
        if not self._begun:
            self._begun = True
            Path(self._folder, f"{os.getpid()}.start").write_text(repr(time.time()))
        return self._simulator(theta, rng)


def _memory_note(folder: str) -> None:
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    Path(folder, f"{os.getpid()}.peak").write_text(peak.split()[1])


def _timed(simulator: Callable[..., Any], batched: bool, **options: Any) -> dict[str, Any]:
    """Simulate into a new directory: seconds of work, of the start before it, and durations."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as notes:
        problem = Problem(PRIOR, simulator, batched=batched)
        problem.form()
        problem.simulator = _Timed(simulator, notes)
        store = LocalStore(Path(folder))
        began = time.time()
        cpu = time.process_time()
        records = simulate(problem, SimulateOptions(**options), store, show_progress=False)
        ended = time.time()
        first = min(float(note.read_text()) for note in Path(notes).glob("*.start"))
        driver_cpu = time.process_time() - cpu
        durations = np.zeros(0)
        if sum(record.rows for record in records) <= 100_000:
            durations = Dataset(store).read_all([record.index for record in records]).duration_s
        size = sum(each.stat().st_size for each in Path(folder).glob("shard-*"))
        return {
            "work_s": ended - first,
            "start_s": first - began,
            "durations": durations,
            "driver_cpu_s": driver_cpu,
            "shards": len(records),
            "bytes": size,
        }


# ---- (a) two cores ------------------------------------------------------------------------------


def _ten_ms(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """About 10 ms of computing."""
    total = 0.0
    for number in range(130_000):
        total += number * 1e-9
    return theta + 0.1 * rng.standard_normal(3) + 0.0 * total


def _bare_rows(count: int) -> float:
    rng = np.random.default_rng(0)
    theta = rng.uniform(-2, 2, (count, 3))
    started = time.perf_counter()
    for row in theta:
        _ten_ms(row, rng)
    return time.perf_counter() - started


def _speed_up() -> tuple[str, str, str, str]:
    count = 8000
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        pool.map(_bare_rows, [1] * CORES)
        bare = max(pool.map(_bare_rows, [count // CORES] * CORES, chunksize=1))
    ours = _timed(_ten_ms, False, num_simulations=count, actors=CORES)["work_s"]
    return (
        f"a  {count:,} rows of {1e3 * bare * CORES / count:.0f} ms, {CORES} actors",
        f"{ours:.1f} s",
        f"{bare:.1f} s, {CORES} bare loops",
        f"{bare / ours:.2f}",
    )


# ---- (b) heavy tails ----------------------------------------------------------------------------


def _log_normal(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Takes 10 ms in the mean, log-normal with sigma 1.5."""
    time.sleep(0.01 * np.exp(1.5 * rng.standard_normal() - 1.5**2 / 2))
    return theta


def _heavy_tails() -> list[tuple[str, str, str, str]]:
    rows = []
    for actors, shard_size, count in ((CORES, None, 4000), (8, None, 16_000), (8, 4000, 16_000)):
        result = _timed(
            _log_normal,
            False,
            num_simulations=count,
            actors=actors,
            shard_size=shard_size,
            cpus_per_actor=CORES / actors,
        )
        best = _best_schedule(result["durations"], actors)
        shards = "64 shards" if shard_size is None else "4 shards"
        rows.append(
            (
                f"b  {count:,} rows of log-normal times, {shards}, {actors} actors",
                f"{result['work_s']:.1f} s",
                f"{best:.1f} s, longest first",
                f"{best / result['work_s']:.2f}",
            )
        )
    return rows


def _best_schedule(durations: np.ndarray, workers: int) -> float:
    """Longest first, each to whoever is free first: at most 4/3 of the optimum, mostly equal."""
    loads = np.zeros(workers)
    for seconds in np.sort(durations)[::-1]:
        loads[np.argmin(loads)] += seconds
    return float(loads.max())


# ---- (c) a vectorized simulator, and sbi --------------------------------------------------------


def _gaussian(theta: torch.Tensor, rng: Any) -> torch.Tensor:
    return theta + 1.0 + 0.1 * torch.randn(theta.shape)


_BATCH = 65_536


def _bare_batches(count: int) -> float:
    """Draw from the prior and simulate, and keep nothing."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    for _ in range(count):
        _gaussian(PRIOR.sample((_BATCH,)), None)
    return time.perf_counter() - started


def _vectorized() -> list[tuple[str, str, str, str]]:
    count = 20_000_000
    ours = _timed(_gaussian, True, num_simulations=count, actors=CORES)
    rows = []
    theirs = None
    script = Path(__file__).with_name("simulation_sbi.py")
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, str(script), str(count), str(CORES)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=900,
        )
    if result.returncode == 0:
        theirs = json.loads(result.stdout.strip().splitlines()[-1])
    rate = count / ours["work_s"]
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        pool.map(_bare_batches, [1] * CORES)
        seconds = pool.map(_bare_batches, [count // CORES // _BATCH] * CORES, chunksize=1)
    bare = _BATCH * (count // CORES // _BATCH) * CORES / max(seconds)
    rows.append(
        (
            f"c  {count:,} rows of 3 + 3 floats, vectorized, stored",
            f"{rate / 1e6:.1f} M/s",
            f"{bare / 1e6:.1f} M/s, {CORES} bare loops",
            f"{rate / bare:.2f}",
        )
    )
    for kind in ("in memory", "stored", "batches of 1,000"):
        peer = None if theirs is None else theirs[kind]
        rows.append(
            (
                f"c  {count:,} rows of 3 + 3 floats, vectorized, stored",
                f"{rate / 1e6:.1f} M/s",
                "sbi is not installed" if peer is None else f"{peer / 1e6:.1f} M/s, sbi, {kind}",
                "" if peer is None else f"{rate / peer:.1f}",
            )
        )
    rows.append(
        (
            "   the same with the start of the actors",
            f"{count / (ours['work_s'] + ours['start_s']) / 1e6:.1f} M/s",
            f"start {ours['start_s']:.1f} s",
            "",
        )
    )
    return rows


# ---- (d) one row at a time ----------------------------------------------------------------------


def _with_rng(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return theta + 0.1 * rng.standard_normal(3)


def _with_numpy(theta: np.ndarray) -> np.ndarray:
    return theta + 0.1 * np.random.standard_normal(3)


def _with_torch(theta: torch.Tensor) -> torch.Tensor:
    return theta + 0.1 * torch.randn(3)


def _overhead() -> list[tuple[str, str, str, str]]:
    rows = []
    count = 8192
    for name, simulator, takes_rng, library in (
        ("rng", _with_rng, True, "numpy"),
        ("numpy's global generator", _with_numpy, False, "numpy"),
        ("torch's global generator", _with_torch, False, "torch"),
    ):
        form = SimulatorForm(False, library, takes_rng, (3,))
        problem = Problem(PRIOR, simulator, batched=False)
        theta: Any = np.random.default_rng(0).uniform(-2, 2, (count, 3))
        theta = torch.from_numpy(theta) if library == "torch" else theta
        keywords = {"rng": np.random.default_rng(0)} if takes_rng else {}
        bare = _best(functools.partial(_loop, simulator, theta, keywords)) / count
        whole = functools.partial(
            simulate_shard, problem, form, Shard(0, 0, count), 0, InProcess(simulator)
        )
        ours = _best(whole) / count
        rows.append(
            (
                f"d  a row of a simulator with {name}",
                f"{1e6 * (ours - bare):.1f} us more",
                f"{1e6 * bare:.1f} us, bare loop",
                f"{ours / bare:.1f}",
            )
        )
    return rows


def _loop(simulator: Callable[..., Any], theta: Any, keywords: dict[str, Any]) -> np.ndarray:
    x = np.empty(theta.shape, dtype=np.float32)
    for row in range(len(theta)):
        x[row] = simulator(theta[row], **keywords)
    return x


def _best(function: Callable[[], Any], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


# ---- (e) memory ---------------------------------------------------------------------------------


def _thirteen(folder: str, theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal((len(theta), 10), dtype=np.float32)
    _memory_note(folder)
    return x


def _memory() -> list[tuple[str, str, str, str]]:
    peaks = {}
    for count in (100_000, 10_000_000):
        with tempfile.TemporaryDirectory() as notes:
            result = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.simulation", "memory", str(count), notes],
                capture_output=True,
                text=True,
                timeout=600,
                check=True,
            )
            driver = int(result.stdout.strip().splitlines()[-1])
            actor = max(int(note.read_text()) for note in Path(notes).glob("*.peak"))
        peaks[count] = (driver / 1024, actor / 1024)
    few, many = peaks.values()
    return [
        (
            f"e  most memory of {who}, 10,000,000 rows of 13 floats",
            f"{many[which]:.0f} MB",
            f"{few[which]:.0f} MB, 100,000 rows",
            f"{many[which] / few[which]:.2f}",
        )
        for which, who in enumerate(("the driver", "an actor"))
    ]


def _memory_run(count: int, notes: str) -> None:
    import ray

    # In a Ray of its own: the peaks of processes that did other things tell nothing.
    problem = Problem(PRIOR, functools.partial(_thirteen, notes), batched=True)
    with tempfile.TemporaryDirectory() as folder, connected():
        assert ray.is_initialized()
        options = SimulateOptions(num_simulations=count, shard_size=65_536 // 8, actors=CORES)
        simulate(problem, options, LocalStore(Path(folder)), show_progress=False)
        for note in Path(notes).glob(f"{os.getpid()}.peak"):
            note.unlink()  # finding the form
        status = Path("/proc/self/status").read_text()
        print(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


# ---- (f) many shards ----------------------------------------------------------------------------


def _tiny_shards() -> tuple[str, str, str, str]:
    count = 20_000
    result = _timed(_with_rng_batch, True, num_simulations=count, shard_size=1, actors=CORES)
    return (
        f"f  {count:,} shards of 1 row",
        f"{1e3 * result['work_s'] / count:.2f} ms each",
        f"driver's CPU {1e3 * result['driver_cpu_s'] / count:.2f} ms each",
        "",
    )


def _with_rng_batch(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return theta + 0.1 * rng.standard_normal(theta.shape)


if __name__ == "__main__":
    assert sys.argv[1] == "memory"
    _memory_run(int(sys.argv[2]), sys.argv[3])
