"""The report: plots, posterior tables and one self-contained HTML page.

Plain data in (numbers, strings, arrays), figures or bytes out.  Only ``gather`` and ``recovery``
know of stores and models; they are not imported here.

matplotlib is imported when a plot is first asked for, not when this package is imported, so
that commands which draw nothing do not pay for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sbi_dist.report.content import (
    DatasetFacts,
    FailureFacts,
    ModelFacts,
    ObservationFacts,
    PredictiveAxes,
    RecoveryFacts,
    ReportContent,
)
from sbi_dist.report.coverage import predictive_coverage
from sbi_dist.report.page import render
from sbi_dist.report.table import format_table, posterior_table

if TYPE_CHECKING:
    from sbi_dist.report.plots import (
        pairplot,
        predictive_check,
        recovery_panels,
        simulation_outcomes,
        training_curve,
    )

_PLOTS = frozenset(
    {"pairplot", "predictive_check", "recovery_panels", "simulation_outcomes", "training_curve"}
)

__all__ = [
    "DatasetFacts",
    "FailureFacts",
    "ModelFacts",
    "ObservationFacts",
    "PredictiveAxes",
    "RecoveryFacts",
    "ReportContent",
    "format_table",
    "pairplot",
    "posterior_table",
    "predictive_check",
    "predictive_coverage",
    "recovery_panels",
    "render",
    "simulation_outcomes",
    "training_curve",
]


def __getattr__(name: str) -> Any:
    if name in _PLOTS:
        return getattr(importlib.import_module("sbi_dist.report.plots"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
