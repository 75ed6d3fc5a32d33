"""The simulate stage while actors, drivers and whole nodes are killed at random moments.

On a cluster of several real raylets, whose drivers are processes of their own: kills are real.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sbi_dist.problem import load_problem
from sbi_dist.simulation.shard import Simulations
from tests.ray.conftest import (
    Nodes,
    assert_same,
    calm,
    command,
    counted,
    environment,
    living_actors,
    read_dataset,
    rows_by_process,
    shard_times,
    wait_until,
    write_experiment,
)

SHARDS, ROWS = 200, 10
# What an actor has in hand: a shard that it simulates, one that waits, one that it writes.
IN_FLIGHT = 3


class Driver:
    """``sbi-dist simulate`` in a folder, on a cluster."""

    def __init__(self, place: Path, address: str) -> None:
        self._place, self._address = place, address
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self._place / "driver.log", "ab") as log:
            self.process = subprocess.Popen(
                command("simulate", "experiment.yaml"),
                cwd=self._place,
                env=environment(self._address),
                stderr=log,
            )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self, patience_s: float = 120) -> None:
        """Wait for it to come to its end."""
        assert self.process is not None
        code = self.process.wait(patience_s)
        assert code == 0, (self._place / "driver.log").read_text()

    @property
    def over(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None


@contextlib.contextmanager
def driving(place: Path, address: str) -> Iterator[Driver]:
    driver = Driver(place, address)
    driver.start()
    try:
        yield driver
    finally:
        driver.kill()


class Watch:
    """Sees that no shard changes once it is stored."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.times: dict[str, int] = {}

    def stored(self) -> int:
        now = shard_times(self._place)
        assert {name: now.get(name) for name in self.times} == self.times, "a shard was rewritten"
        self.times = now
        return len(now)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Simulations:
    folder = tmp_path_factory.mktemp("calm")
    write_experiment(folder, counted(folder / "counts", 0))
    return calm(load_problem("problem.py:problem", folder), SHARDS * ROWS, ROWS)


@pytest.mark.parametrize("seed", range(5))
def test_chaos_changes_nothing(
    tmp_path: Path, cluster: Nodes, expected: Simulations, seed: int
) -> None:
    chance = random.Random(seed)
    counts = tmp_path / "counts"
    write_experiment(
        tmp_path, counted(counts, 0.003), num_simulations=SHARDS * ROWS, shard_size=ROWS
    )
    lost_shards = 0

    with driving(tmp_path, cluster.address) as driver:

        def kill_actor() -> None:
            nonlocal lost_shards
            wait_until(lambda: driver.over or living_actors(counts), "an actor")
            actors = living_actors(counts)
            if actors:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(actors), signal.SIGKILL)
                lost_shards += IN_FLIGHT

        def kill_driver() -> None:
            nonlocal lost_shards
            driver.kill()
            lost_shards += IN_FLIGHT * cluster.cpus()
            driver.start()

        def remove_node() -> None:
            nonlocal lost_shards
            node = chance.choice(cluster.others)
            if seed == 4:
                cluster.drain(node, deadline_s=5)
                time.sleep(chance.random())
            cluster.remove(node)
            lost_shards += IN_FLIGHT

        faults: list[Callable[[], None]] = [kill_actor, kill_driver, remove_node]
        chance.shuffle(faults)
        moments = sorted(chance.sample(range(5, SHARDS - 40), len(faults)))
        watch = Watch(tmp_path)
        for moment, fault in zip(moments, faults, strict=True):
            wait_until(lambda at=moment: watch.stored() >= at or driver.over, "shards", 120)
            fault()
        cluster.add()
        wait_until(lambda: watch.stored() == SHARDS or driver.over, "shards", 120)
        driver.end()
        assert watch.stored() == SHARDS

    assert_same(read_dataset(tmp_path), expected)
    repeated = sum(rows_by_process(counts).values()) - SHARDS * ROWS
    assert 0 <= repeated <= lost_shards * ROWS
    wait_until(lambda: not living_actors(counts), "the actors are gone", 10)


def test_parts_of_a_shard_that_are_lost_with_their_node(tmp_path: Path, cluster: Nodes) -> None:
    # Rows so large that Ray keeps them on the node where they were simulated.
    counts = tmp_path / "counts"
    write_experiment(
        tmp_path,
        counted(counts, 0.02, numbers=5000),
        num_simulations=150,
        shard_size=150,
    )
    with driving(tmp_path, cluster.address) as driver:
        wait_until(lambda: driver.over or sum(rows_by_process(counts).values()) > 100, "rows", 120)
        assert not driver.over and len(rows_by_process(counts)) > 1
        cluster.remove(cluster.others[0])
        cluster.remove(cluster.others[0])
        driver.end()
    for _ in range(2):
        cluster.add()
    assert_same(
        read_dataset(tmp_path), calm(load_problem("problem.py:problem", tmp_path), 150, 150)
    )
