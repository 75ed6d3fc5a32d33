"""The options of the ``infer`` stage."""

from __future__ import annotations

import dataclasses

from sbi_dist.options import Options, option

__all__ = ["InferOptions"]


@dataclasses.dataclass(frozen=True)
class InferOptions(Options):
    """How many draws, from which seed, of which observations."""

    num_samples: int = option(10_000, "posterior draws of each observation", ge=1, le=10**9)
    seed: int = option(0, "seed of the draws; a draw depends on model, observation and seed", ge=0)
    observations: str | None = option(
        None,
        "file of observations (.parquet, .csv or .npy); default: the problem's observed data",
        outcome=False,
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
