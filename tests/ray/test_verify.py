"""Proof that a dataset is what its seed says, and what it says of one that is not."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from sbi_dist import BoxUniform, Problem, StageError
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.driver import simulate
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.shard import decode_shard, encode_shard
from sbi_dist.simulation.verify import verify
from sbi_dist.store import LocalStore

pytestmark = pytest.mark.usefixtures("ray_session")

OPTIONS = SimulateOptions(num_simulations=90, shard_size=20, batch_size=6, actors=1)


def row(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if theta[0] > 0.9:
        raise ValueError("too large")
    return theta + rng.standard_normal(2)


def batch(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return theta + rng.standard_normal(theta.shape)


def problem(simulator: object) -> Problem:
    return Problem(BoxUniform([-1.0, 0.0], [1.0, 2.0]), simulator)


@pytest.mark.parametrize("simulator", [row, batch])
def test_what_was_simulated_is_proved(tmp_path: Path, simulator: object) -> None:
    store = LocalStore(tmp_path)
    simulate(problem(simulator), OPTIONS, store, show_progress=False)
    sentence = verify(problem(simulator), OPTIONS, store, 90, show_progress=False)
    assert "verified 5 shards with 90 simulations" in sentence
    assert "90 rows that were simulated again are equal bit for bit" in sentence


def test_one_changed_number_is_found(tmp_path: Path) -> None:
    """Even where the checksum is made to fit."""
    store = LocalStore(tmp_path)
    simulate(problem(batch), OPTIONS, store, show_progress=False)
    key = "shard-000002.parquet"
    rows, _ = decode_shard(store.get(key))
    x = rows.x.copy()
    changed = int(np.flatnonzero(rows.ok)[3])
    x[changed, 1] = np.nextafter(x[changed, 1], np.float32(9))
    about = {**Dataset(store).manifest(), "shard": 2}
    data, _ = encode_shard(dataclasses.replace(rows, x=x), about)
    store.put(key, data)
    with pytest.raises(StageError, match=rf"1 of 90 rows .* simulation_id {40 + changed} in"):
        verify(problem(batch), OPTIONS, store, 90, show_progress=False)


def test_random_numbers_from_elsewhere_are_found(tmp_path: Path) -> None:
    count = itertools.count()

    def simulator(theta: np.ndarray) -> np.ndarray:
        return theta + next(count)

    store = LocalStore(tmp_path)
    options = SimulateOptions(num_simulations=40, shard_size=10, actors=1)
    simulate(problem(simulator), options, store, show_progress=False)
    with pytest.raises(StageError, match="does the simulator take random numbers, time or files"):
        verify(problem(simulator), options, store, 10, show_progress=False)


def test_damage_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    simulate(problem(row), OPTIONS, store, show_progress=False)
    path = tmp_path / "shard-000003.parquet"
    data = bytearray(path.read_bytes())
    data[data.find(decode_shard(bytes(data))[0].theta[5].tobytes())] ^= 1
    path.write_bytes(bytes(data))
    (tmp_path / "shard-000001.parquet").rename(tmp_path / "shard-000004.parquet")
    with pytest.raises(
        StageError,
        match=r"2 of 4 shards in .* are damaged: shard-000003.parquet \(.*\); shard-000004.parquet "
        r"\(it holds the rows of another shard\).*--repair",
    ):
        verify(problem(row), OPTIONS, store, 10, show_progress=False)
