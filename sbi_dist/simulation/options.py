"""The options of the ``simulate`` stage."""

from __future__ import annotations

import dataclasses

from sbi_dist.options import Options, option

__all__ = ["SimulateOptions"]


@dataclasses.dataclass(frozen=True)
class SimulateOptions(Options):
    """How many simulations, from which seed, and by how many actors."""

    num_simulations: int = option(
        2000, "simulations in the dataset (of each round)", ge=1, outcome=False
    )
    seed: int = option(0, "seed of all randomness in the dataset", ge=0)
    shard_size: int | None = option(
        None, "rows of a shard; default: a 64th of num_simulations, at most 4096", ge=1, le=10**7
    )
    batch_size: int | None = option(
        None, "rows of one call of a batch simulator; default: a whole shard", ge=1
    )
    timeout_s: float | None = option(
        None, "longest that one call of the simulator may take, in seconds; then it is killed", gt=0
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
        None, "simulator actors; default: as many as the cluster has CPUs for", ge=1, outcome=False
    )
    cpus_per_actor: float = option(1, "CPUs of an actor", gt=0, outcome=False)
    gpus_per_actor: float = option(0, "GPUs of an actor", ge=0, outcome=False)
