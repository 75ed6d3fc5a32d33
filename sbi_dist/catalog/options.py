"""The options of the ``infer`` stage."""

from __future__ import annotations

import dataclasses
import itertools

from sbi_dist.errors import InputError
from sbi_dist.options import Options, option, resources

__all__ = ["InferOptions"]


@dataclasses.dataclass(frozen=True)
class InferOptions(Options):
    """How many draws, from which seed, of which observations, and what is kept of them."""

    num_samples: int = option(10_000, "posterior draws of each observation", ge=1, le=10**9)
    seed: int = option(0, "seed of the draws; a draw depends on model, observation and seed", ge=0)
    observations: str | None = option(
        None,
        "file or s3:// object of observations (.parquet, .csv or .npy); default: the problem's "
        "observed data",
        outcome=False,
    )
    output: str = option(
        "samples",
        "what is kept: the draws (samples), mean, sd, covariance, quantiles, highest-density "
        "interval and the draw of highest density (summary), or both; of the problem's observed "
        "data the draws are always kept",
        choices=("samples", "summary", "both"),
    )
    quantiles: list[float] = option(
        [0.025, 0.05, 0.16, 0.5, 0.84, 0.95, 0.975], "levels of the quantiles in a summary"
    )
    hdi: float = option(
        0.9, "part of the draws in the highest-density interval of a summary", gt=0, lt=1
    )
    predictive_simulations: int = option(
        400,
        "simulations from posterior draws, for the posterior predictive check of the observed data",
        ge=0,
        le=10**6,
    )
    proposals: int | None = option(
        None,
        "weigh so many draws by the problem's log_likelihood and resample num_samples of them; "
        "default: no weights",
        ge=1000,
        le=10**8,
    )
    actors: int | None = option(
        None,
        "actors that draw for a catalog; default: as many as the cluster has room for",
        ge=1,
        outcome=False,
    )
    cpus_per_actor: float = option(1, "CPUs of an actor, and its threads", ge=0, outcome=False)
    gpus_per_actor: float = option(0, "GPUs of an actor", ge=0, outcome=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = self.quantiles
        rising = all(low < high for low, high in itertools.pairwise(levels))
        if not levels or not rising or levels[0] < 0 or levels[-1] > 1:
            raise InputError(
                f"quantiles is {levels}; it must be levels from 0 to 1, each above the one before"
            )
        if self.summarizes and self.num_samples < 2:
            raise InputError(
                f"num_samples is {self.num_samples}; a summary (output: {self.output}) takes at "
                "least 2"
            )

    @property
    def summarizes(self) -> bool:
        """Whether summaries are kept."""
        return self.output != "samples"

    @property
    def keeps_draws(self) -> bool:
        """Whether the draws are kept."""
        return self.output != "summary"

    def resources(self) -> dict[str, float]:
        """What one actor takes, by Ray's names."""
        return resources(self.cpus_per_actor, self.gpus_per_actor)
