"""Batches for training from stored simulations: from memory, and streamed where they do not fit.

``python -m tests.benchmarks.streaming [rows ...]``; rows of 3 + 10 floats below TMPDIR. Each row
of the table is a process of its own. ``batches`` is with nothing computed from them; ``of a CPU``
counts the time that the process had a core, which other work on the machine does not lengthen;
``trained`` is with the optimizer's steps of the default network, on one thread, for some seconds
from the first step on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from sbi_dist.estimation.data import ShardSource, TrainingData, load_data
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.optimize import Optimization
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.workers import Workers
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.plan import Extent, plan_shards
from sbi_dist.simulation.shard import ShardRecord, Simulations, encode_shard
from sbi_dist.store import LocalStore

__all__ = ["run"]

SHARD_ROWS = 65_536
BATCH_SIZE = 1000
MEMORY_GB = 0.256
TRAIN_S = 40.0


def run(counts: tuple[int, ...] = (1_000_000,)) -> None:
    """Print the table."""
    print("\nStored simulations of 3 + 10 floats, from memory and streamed")
    print(
        f"{'':34}{'loaded in':>12}{'batches':>14}{'of a CPU':>14}{'first after':>14}{'memory':>12}"
        f"{'trained':>14}{'waited':>8}"
    )
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            _write(Dataset(LocalStore(Path(folder))), count)
            for mode, memory_gb in (("memory", 1e6), ("streamed", MEMORY_GB)):
                if mode == "streamed" and count * 52e-9 <= memory_gb:
                    memory_gb = 0.75 * count * 52e-9
                result = _measured(folder, mode, memory_gb, count)
                print(
                    f"{count:12,} rows, {mode:15}"
                    f"{result['load_s']:10.1f} s{result['rows_per_s'] / 1e6:10.2f} M/s"
                    f"{result['rows_per_cpu_s'] / 1e6:10.2f} M/s"
                    f"{1e3 * result['first_s']:11.0f} ms{result['growth_mb']:9.0f} MB"
                    f"{result['trained_per_s'] / 1e3:10.1f} k/s{result['waited']:8.1%}"
                )


def _write(dataset: Dataset, count: int) -> None:
    """Shards as simulate writes them, without the time of a simulator."""
    rng = np.random.default_rng(0)
    for shard in plan_shards([Extent(0, 0, SHARD_ROWS, count)], None):
        rows = Simulations(
            simulation_id=np.arange(shard.start, shard.start + shard.size),
            theta=rng.uniform(-2, 2, (shard.size, 3)).astype(np.float32),
            x=rng.standard_normal((shard.size, 10), dtype=np.float32),
            failed={},
            duration_s=np.zeros(shard.size, dtype=np.float32),
        )
        data, _ = encode_shard(rows, {"shard": shard.index, "x_shape": [10]})
        dataset.store.put_if_absent(shard.key, data, sync=False)


def _measured(folder: str, mode: str, memory_gb: float, count: int) -> dict[str, float]:
    result = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.streaming", "one", folder, mode, str(memory_gb)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    if result.returncode != 0:
        raise RuntimeError(f"{count} rows, {mode}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def _one(folder: str, mode: str, memory_gb: float) -> None:
    import torch

    torch.set_num_threads(1)
    dataset = Dataset(LocalStore(Path(folder)))
    records = [record for _, record in sorted(dataset.stored().records.items())]
    bounds = np.full(3, -2.0), np.full(3, 2.0)
    # What the libraries take once, however few the rows.
    _load(dataset, records[:1], bounds, 1e6).close()
    with _Peak() as peak:
        started = time.perf_counter()
        data = _load(dataset, records, bounds, memory_gb)
        loaded = time.perf_counter()
        assert data.mode == mode, data.describe()
        rows, first, cpu = 0, 0.0, time.process_time()
        for u, _ in data.batches(1):
            first = first or time.perf_counter() - loaded
            rows += len(u)
        ended, cpu = time.perf_counter(), time.process_time() - cpu
        trained, waited = _trained(data)
        data.close()
    print(
        json.dumps(
            {
                "load_s": loaded - started,
                "first_s": first,
                "rows_per_s": rows / (ended - loaded),
                "rows_per_cpu_s": rows / cpu,
                "growth_mb": peak.growth / 1e6,
                "trained_per_s": trained,
                "waited": waited,
            }
        )
    )


def _trained(data: TrainingData) -> tuple[float, float]:
    """Rows a second that are trained on, and the part of the time that was waited for them."""
    options = TrainOptions()
    flow = DensityEstimator(options, data.standardization, (10,)).flow
    optimization = Optimization(flow, options, Workers(), data.batch_size)
    began, waited, rows = 0.0, 0.0, 0
    for u, x in data.batches(2):
        if rows == 0:
            began, waited = time.perf_counter(), data.input_wait_s
        optimization.step(u, x, 1e-3, 0.1)
        rows += len(u)
        elapsed = time.perf_counter() - began
        if elapsed > TRAIN_S:
            break
    return rows / elapsed, (data.input_wait_s - waited) / elapsed


def _load(
    dataset: Dataset,
    records: list[ShardRecord],
    bounds: tuple[np.ndarray, np.ndarray],
    memory_gb: float,
) -> TrainingData:
    options = TrainOptions(memory_gb=memory_gb, shuffle_mb=min(64.0, 250 * memory_gb))
    source = ShardSource(dataset, records)
    return load_data(source, bounds, options, lambda rows: min(rows, BATCH_SIZE), Workers())


class _Peak:
    """How much the memory of this process grows while a block runs, looked at every 5 ms."""

    growth = 0

    def __enter__(self) -> _Peak:
        self._before, self._done = _resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.growth = max(self.growth, _resident_bytes() - self._before)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        _one(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        run(tuple(int(each) for each in sys.argv[1:]) or (1_000_000,))
