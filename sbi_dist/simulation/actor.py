"""What a simulator actor does: simulate a shard and put it into the store.

A plain class; the driver makes a Ray actor of it. Rows go from here to the store, and only a
small record goes back to the driver.
"""

from __future__ import annotations

import os
import pickle
from typing import Any

from sbi_dist.problem import Problem
from sbi_dist.simulation.dataset import DamagedShard, ShardRecord, decode_shard, encode_shard
from sbi_dist.simulation.isolation import IsolatedCall
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.plan import Shard
from sbi_dist.simulation.rows import Call, in_process, simulate_shard
from sbi_dist.simulator import SimulatorForm
from sbi_dist.store import open_store

__all__ = ["SimulatorActor"]


class SimulatorActor:
    """Simulates shards of one dataset.

    Args:
        problem: pickled problem.
        simulator: pickled simulator, for child processes.
        form: the simulator's form, found by the driver.
        store_uri: the dataset's folder.
        about: what every shard's metadata says.
        options: options of the stage.
    """

    def __init__(
        self,
        problem: bytes,
        simulator: bytes,
        form: SimulatorForm,
        store_uri: str,
        about: dict[str, Any],
        options: SimulateOptions,
    ) -> None:
        import torch

        # One simulation must not use the cores of the actors beside it.
        torch.set_num_threads(max(1, int(options.cpus_per_actor)))
        self._problem: Problem = pickle.loads(problem)
        self._form, self._about, self._options = form, about, options
        self._store = open_store(store_uri)
        self._isolated = IsolatedCall(simulator, options.timeout_s)
        self._plain = in_process(self._problem.simulator)

    def pid(self) -> int:
        """Process id, to find the actor from outside."""
        return os.getpid()

    def simulate(self, shard: Shard, isolate: bool) -> ShardRecord:
        """Simulate a shard and store it; the record of the stored one where it is there already.

        ``isolate`` runs the simulator in a child process, for shards whose simulator has taken
        its actor with it.
        """
        if self._store.exists(shard.key):
            return self._stored(shard)
        run: Call = self._isolated if isolate or self._options.timeout_s else self._plain
        simulations = simulate_shard(
            self._problem, self._form, shard, self._options.seed, run, self._options.batch_size
        )
        data, record = encode_shard(simulations, {**self._about, "shard": shard.index})
        if not self._store.put_if_absent(shard.key, data):
            return self._stored(shard)
        return record

    def _stored(self, shard: Shard) -> ShardRecord:
        try:
            return decode_shard(self._store.get(shard.key))[1]
        except DamagedShard as error:
            raise RuntimeError(f"{self._store.uri}/{shard.key} is damaged: {error}") from error
