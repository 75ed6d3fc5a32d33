"""sbi_dist: simulation-based inference from an experiment file to posteriors, on Ray."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "BoxUniform": "sbi_dist.priors",
    "Product": "sbi_dist.priors",
    "Truncated": "sbi_dist.priors",
    "InputError": "sbi_dist.errors",
    "StageError": "sbi_dist.errors",
    "ObservationAxis": "sbi_dist.problem",
    "Problem": "sbi_dist.problem",
    "Program": "sbi_dist.program",
    "NPE": "sbi_dist.npe",
    "SNPE": "sbi_dist.npe",
    "simulate_for_sbi": "sbi_dist.npe",
    "process_prior": "sbi_dist.npe",
    "process_simulator": "sbi_dist.npe",
    "check_sbi_inputs": "sbi_dist.npe",
    "Posterior": "sbi_dist.posterior",
    "pairplot": "sbi_dist.report",
}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when first used: a worker that only simulates must not wait for matplotlib.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sbi_dist' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
