"""The options of the ``simulate`` stage."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from sbi_dist.errors import InputError
from sbi_dist.options import Options, option
from sbi_dist.simulation.plan import SIMULATION

__all__ = ["SimulateOptions"]


@dataclasses.dataclass(frozen=True)
class SimulateOptions(Options):
    """How many simulations, from which seed, and by how many actors."""

    # What the simulations are for; part of their random streams, and no field.
    purpose: ClassVar[int] = SIMULATION

    num_simulations: int | None = option(
        2000,
        "simulations in the dataset (of each round); null for as many as max_seconds allows",
        ge=1,
        outcome=False,
    )
    max_seconds: float | None = option(
        None,
        "stop simulating after so many seconds, of all runs together, and go on with the shards "
        "that are finished",
        gt=0,
        outcome=False,
    )
    seed: int = option(0, "seed of all randomness in the dataset", ge=0)
    shard_size: int | None = option(
        None,
        "rows of a shard; default: a 64th of num_simulations, at most 65536 for a batch simulator, "
        "1024 for one of single rows, and some 8 MB",
        ge=1,
        le=10**7,
    )
    batch_size: int | None = option(
        None, "rows of one call of a batch simulator; default: a whole shard", ge=1
    )
    timeout_s: float | None = option(
        None,
        "longest that one call of the simulator may take, in seconds; then it is killed",
        gt=0,
        le=1e7,
    )
    max_failure_fraction: float = option(
        0.1, "stop when more than this fraction of simulations fails", ge=0, le=1, outcome=False
    )
    rounds: int = option(
        1,
        "rounds of simulation; each after the first draws from the prior truncated to the box "
        "that holds the posterior of the observed data",
        ge=1,
        le=10,
        outcome=False,
    )
    actors: int | None = option(
        None, "simulator actors; default: as many as the cluster has room for", ge=1, outcome=False
    )
    autoscale: bool = option(
        False,
        "ask for more actors than the cluster has room for, so that its autoscaler adds nodes; at "
        "most `actors`, or else one a simulation",
        outcome=False,
    )
    cpus_per_actor: float = option(1, "CPUs of an actor", ge=0, outcome=False)
    gpus_per_actor: float = option(0, "GPUs of an actor", ge=0, outcome=False)
    memory_per_actor_gb: float | None = option(
        None,
        "memory of an actor in GB: reserved in Ray, and a process that holds more is replaced; "
        "default: nothing reserved, replaced when it holds more than its CPUs' share of the node's",
        gt=0,
        outcome=False,
    )
    resources_per_actor: dict[str, float] | None = option(
        None, "custom Ray resources of an actor, such as {license: 1}", outcome=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_simulations is None and self.max_seconds is None:
            raise InputError(
                "num_simulations is null and max_seconds too; give a number of simulations, a time "
                "budget, or both"
            )
        for name, amount in (self.resources_per_actor or {}).items():
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise InputError(
                    f"resources_per_actor names {name!r}; use cpus_per_actor, gpus_per_actor or "
                    "memory_per_actor_gb"
                )
            if not amount > 0:
                raise InputError(
                    f"resources_per_actor[{name!r}] is {amount}; it must be greater than 0"
                )

    def resources(self) -> dict[str, float]:
        """What one actor takes, by Ray's names."""
        wanted = {"CPU": self.cpus_per_actor, "GPU": self.gpus_per_actor}
        if self.memory_per_actor_gb is not None:
            wanted["memory"] = self.memory_per_actor_gb * 1e9
        return {
            name: amount
            for name, amount in {**wanted, **(self.resources_per_actor or {})}.items()
            if amount
        }
