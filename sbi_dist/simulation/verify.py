"""Prove that a dataset is what its seed says: check every shard, and simulate some rows again."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from sbi_dist.errors import StageError
from sbi_dist.problem import Problem
from sbi_dist.progress import Progress
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.plan import Shard, plan_shards
from sbi_dist.simulation.prepare import ship
from sbi_dist.simulation.rows import InProcess, simulate_shard
from sbi_dist.simulation.shard import DamagedShard, Simulations, decode_shard
from sbi_dist.simulator import SimulatorForm
from sbi_dist.store import ObjectStore

__all__ = ["verify"]

_SHARDS_PER_TASK = 16
_NAMED = 5


def verify(
    problem: Problem,
    options: SimulateOptions,
    store: ObjectStore,
    num_rows: int = 100,
    show_progress: bool = True,
) -> str:
    """Read every shard of a dataset and simulate a sample of its rows again, on Ray.

    Checked are the checksums, the shards' sizes and ``simulation_id`` against the plan, and of
    ``num_rows`` rows or more theta and x, bit for bit, and status. Rows that ran out of time or
    ended their process are not simulated again. The sample is the same whenever it is drawn from
    the same shards.

    Returns a sentence about what was checked.

    Raises:
        StageError: something differs; names the shards and rows.
    """
    dataset = Dataset(store)
    planned = {shard.index: shard for shard in _planned(dataset)}
    shards = [planned[index] for index in sorted(dataset.indexes() & planned.keys())]
    blocks = [
        shards[start : start + _SHARDS_PER_TASK]
        for start in range(0, len(shards), _SHARDS_PER_TASK)
    ]
    rows, damaged = 0, []
    with Progress("verify", len(shards), "shards", enabled=show_progress) as progress:
        done = 0
        for block, (count, found) in _on_ray(_check, [(store, block) for block in blocks]):
            rows += count
            damaged += found
            done += len(block[1])
            progress.update(done)
    if damaged:
        raise StageError(
            f"verify: {len(damaged)} of {len(shards)} shards in {store.uri} are damaged: "
            f"{'; '.join(damaged[:_NAMED])}; run `sbi-dist simulate` with --repair to simulate "
            "them again"
        )
    compared, different = _simulate_again(problem, options, store, shards, num_rows)
    if different:
        raise StageError(
            f"verify: {len(different):,} of {compared:,} rows come out differently when simulated "
            f"again: {', '.join(different[:_NAMED])} in {store.uri}; does the simulator take "
            "random numbers, time or files from elsewhere? (It should take a parameter rng, or use "
            "numpy's, torch's or Python's global generator.) Mend it, and simulate with another "
            "simulate.seed"
        )
    missing = len(planned) - len(shards)
    return (
        f"verified {len(shards):,} shards with {rows:,} simulations: all checksums are right, and "
        f"{compared:,} rows that were simulated again are equal bit for bit"
        + (f"; {missing:,} planned shards are not there yet" if missing else "")
    )


def _planned(dataset: Dataset) -> Iterator[Shard]:
    extents = dataset.extents()
    shards = plan_shards(extents, None)
    if extents[-1].stop is not None:
        return shards
    # Of a plan without end, as far as there are shards.
    last = max(dataset.indexes(), default=-1)
    return itertools.takewhile(lambda shard: shard.index <= last, shards)


def _on_ray(
    function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """``function`` of all arguments, some tasks at a time; arguments and result as they end."""
    import ray

    remote = ray.remote(num_cpus=1)(function)
    most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    left = iter(arguments)
    running: dict[Any, tuple[Any, ...]] = {}
    try:
        while True:
            for each in itertools.islice(left, most - len(running)):
                running[remote.remote(*each)] = each
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1)
            for task in ready:
                yield running.pop(task), ray.get(task)
    finally:
        for task in running:
            ray.cancel(task)


def _check(store: ObjectStore, shards: list[Shard]) -> tuple[int, list[str]]:
    """Rows of the shards, and what is wrong with which of them."""
    rows, damaged = 0, []
    for shard in shards:
        try:
            simulations, record = decode_shard(store.get(shard.key))
        except DamagedShard as error:
            damaged.append(f"{shard.key} ({error})")
            continue
        except KeyError:
            damaged.append(f"{shard.key} (it is gone)")
            continue
        expected = shard.start + np.arange(shard.size)
        if record.index != shard.index or not np.array_equal(simulations.simulation_id, expected):
            damaged.append(f"{shard.key} (it holds the rows of another shard)")
        rows += len(simulations)
    return rows, damaged


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Ranges of rows of one shard to be simulated again."""

    shard: Shard
    ranges: tuple[tuple[int, int], ...]


def _simulate_again(
    problem: Problem,
    options: SimulateOptions,
    store: ObjectStore,
    shards: list[Shard],
    num_rows: int,
) -> tuple[int, list[str]]:
    """How many rows were compared, and which of them differ."""
    import ray

    form = problem.form()
    total = sum(shard.size for shard in shards)
    rng = np.random.default_rng(total)
    chosen = np.sort(rng.choice(total, min(num_rows, total), replace=False))
    starts = np.cumsum([0, *(shard.size for shard in shards)])
    by_shard: dict[int, list[int]] = {}
    for row in chosen.tolist():
        number = int(np.searchsorted(starts, row, side="right")) - 1
        by_shard.setdefault(number, []).append(row - int(starts[number]))
    samples = []
    for number, rows in by_shard.items():
        shard = shards[number]
        # A row of a batch comes out the same only with its batch.
        step = (options.batch_size or shard.size) if form.batched else 1
        first = sorted({row - row % step for row in rows})
        ranges = tuple((row, min(row + step, shard.size)) for row in first)
        samples.append(_Sample(shard, ranges))
    packed = ray.put(ship(problem, "problem", problem))
    compared, different = 0, []
    tasks = [(packed, form, options, store, sample) for sample in samples]
    for _, (count, found) in _on_ray(_compare, tasks):
        compared += count
        different += found
    return compared, different


def _compare(
    problem: bytes,
    form: SimulatorForm,
    options: SimulateOptions,
    store: ObjectStore,
    sample: _Sample,
) -> tuple[int, list[str]]:
    shard = sample.shard
    stored, _ = decode_shard(store.get(shard.key))
    loaded: Problem = pickle.loads(problem)
    call = InProcess(loaded.simulator)
    compared, different = 0, []
    for start, stop in sample.ranges:
        statuses = {stored.failed[row][0] for row in range(start, stop) if row in stored.failed}
        if statuses & {"timeout", "crashed"}:
            continue
        again = simulate_shard(
            loaded, form, shard, options.seed, call, options.batch_size, start, stop
        )
        compared += stop - start
        different += [
            f"simulation_id {shard.start + row}"
            for row in range(start, stop)
            if not _equal(stored, row, again, row - start)
        ]
    return compared, different


def _equal(one: Simulations, row: int, other: Simulations, other_row: int) -> bool:
    return (
        one.theta[row].tobytes() == other.theta[other_row].tobytes()
        and one.x[row].tobytes() == other.x[other_row].tobytes()
        and one.failed.get(row, ("",))[0] == other.failed.get(other_row, ("",))[0]
    )
