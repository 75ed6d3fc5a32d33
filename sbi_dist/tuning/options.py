"""The options of the ``tune`` stage: what is searched, and at what cost."""

from __future__ import annotations

import dataclasses
from typing import Any

from sbi_dist.errors import InputError
from sbi_dist.options import Options, option
from sbi_dist.tuning.space import Choices, Range, parse_space

__all__ = ["TuneOptions"]

_SPACE: dict[str, Any] = {
    "estimator": ["nsf", "maf"],
    "transforms": {"low": 2, "high": 8},
    "hidden_features": {"low": 32, "high": 256, "log": True},
    "blocks": [1, 2, 3],
    "learning_rate": {"low": 5e-4, "high": 1e-2, "log": True},
}


@dataclasses.dataclass(frozen=True)
class TuneOptions(Options):
    """How many settings of the train section are tried, which, and for how long."""

    trials: int = option(
        20, "settings to try; the first are the train section's own", ge=1, le=100_000
    )
    space: dict[str, Any] = option(
        _SPACE,
        "fields of the train section, each with a list of values, or with low, high and perhaps "
        "log: true",
    )
    max_epochs: int | None = option(
        None, "stop a trial after so many epochs; default: train.max_epochs", ge=1
    )
    grace_epochs: int = option(10, "epochs before a trial may be stopped for its loss", ge=1)
    reduction: float = option(
        3.0,
        "at grace_epochs, and at each multiple by this factor, a trial goes on if it is among the "
        "best 1/reduction of those that have got there",
        gt=1,
        le=1000,
    )
    concurrent: int | None = option(
        None, "trials at a time; default: as many as the cluster holds", ge=1, outcome=False
    )
    cpus_per_trial: float = option(1.0, "CPUs of a trial", gt=0, outcome=False)
    gpus_per_trial: float | None = option(
        None,
        "GPUs of a trial, or a part of one; default: one where the cluster has any",
        ge=0,
        outcome=False,
    )
    seed: int = option(0, "seed of the choice of settings", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.space, dict):
            raise InputError(f"space is {self.space!r}; it must have fields of the train section")
        parse_space(self.space)

    def values(self) -> dict[str, Choices | Range]:
        """The space, parsed; fields in the order of their names."""
        return parse_space(self.space)
