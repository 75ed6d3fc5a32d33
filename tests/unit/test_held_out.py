"""Held-out simulations: their random streams, and reading them by ranges."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from sbi_dist.calibration.held_out import HeldOut, HeldOutOptions
from sbi_dist.problems.gaussian import problem
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.plan import Shard
from sbi_dist.simulation.rows import InProcess, simulate_shard
from sbi_dist.simulation.shard import Simulations, encode_shard
from sbi_dist.store import LocalStore
from tests.unit.samples import about

SIZES = (3, 1, 5, 4)


def test_streams_of_their_own() -> None:
    options = SimulateOptions(seed=3, batch_size=7)
    held_out = HeldOutOptions(**dataclasses.asdict(options))
    assert held_out.outcome() == options.outcome()
    assert held_out.purpose != options.purpose
    form, call = problem.form(), InProcess(problem.simulator)
    theta = [
        simulate_shard(problem, form, Shard(0, 0, 50), 3, call, purpose=each.purpose).theta
        for each in (options, held_out, held_out)
    ]
    assert np.array_equal(theta[1], theta[2]) and not np.isin(theta[0], theta[1]).any()


@pytest.mark.parametrize("division", [(13,), (1,) * 13, (3, 1, 5, 4), (2, 6, 5), (4, 9)])
def test_read_by_ranges(tmp_path: Path, division: tuple[int, ...]) -> None:
    whole = rows()
    store, records, start = LocalStore(tmp_path), [], 0
    for index, size in enumerate(SIZES):
        data, record = encode_shard(part(whole, start, start + size), about(index))
        store.put(Shard(index, start, size).key, data)
        records.append(record)
        start += size
    held_out = HeldOut("name", store, records)
    assert len(held_out) == 13
    ends = np.cumsum((0, *division)).tolist()
    for begin, end in itertools.pairwise(ends):
        found, expected = held_out.read(begin, end), part(whole, begin, end)
        assert np.array_equal(found.simulation_id, expected.simulation_id)
        assert np.array_equal(found.theta, expected.theta) and found.failed == expected.failed
        assert np.array_equal(found.x, expected.x, equal_nan=True)
    assert len(Dataset(store).indexes()) == len(SIZES)


def rows() -> Simulations:
    rng = np.random.default_rng(0)
    theta, x = (rng.normal(size=(13, size)).astype(np.float32) for size in (2, 3))
    failed = {row: ("error", f"row {row}") for row in (0, 3, 4, 12)}
    x[list(failed)] = np.nan
    return Simulations(np.arange(13), theta, x, failed, np.zeros(13, np.float32))


def part(whole: Simulations, start: int, stop: int) -> Simulations:
    some = slice(start, stop)
    failed = {row - start: why for row, why in whole.failed.items() if start <= row < stop}
    return Simulations(
        whole.simulation_id[some], whole.theta[some], whole.x[some], failed, whole.duration_s[some]
    )
