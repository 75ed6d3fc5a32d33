"""The options of the ``calibrate`` stage."""

from __future__ import annotations

import dataclasses

from sbi_dist.options import Options, option, resources

__all__ = ["CalibrateOptions"]

_DEFAULT, _LEAST = 2000, 100


@dataclasses.dataclass(frozen=True)
class CalibrateOptions(Options):
    """How many held-out simulations, and how many posterior draws of each."""

    enabled: bool = option(True, "whether `run` calibrates the model that it trained")
    num_simulations: int | None = option(
        None,
        "held-out simulations; they are made for this alone, from random streams of their own; "
        "default: 2,000, and where `run` makes them a quarter of those to train on if these are "
        "fewer, but at least 100",
        ge=100,
        le=10**7,
    )
    num_draws: int = option(1000, "posterior draws for each held-out simulation", ge=99, le=100_000)
    seed: int = option(
        0,
        "seed of the held-out simulations, the draws and the tests",
        ge=0,
        le=2**63 - 1 - 10**7,  # a simulation's draws have the seed plus its number
    )
    actors: int | None = option(
        None,
        "actors that draw; default: as many as the cluster has room for",
        ge=1,
        outcome=False,
    )
    cpus_per_actor: float = option(1, "CPUs of an actor, and its threads", ge=0, outcome=False)
    gpus_per_actor: float = option(0, "GPUs of an actor", ge=0, outcome=False)

    def count(self, trained_on: int | None = None) -> int:
        """Held-out simulations; with ``trained_on`` as many as are in proportion to these."""
        if self.num_simulations is not None:
            return self.num_simulations
        return _DEFAULT if trained_on is None else max(_LEAST, min(_DEFAULT, trained_on // 4))

    def resources(self) -> dict[str, float]:
        """What one actor takes, by Ray's names."""
        return resources(self.cpus_per_actor, self.gpus_per_actor)
