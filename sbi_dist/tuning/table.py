"""What came of a search: its table, what it is worth, and the settings for the experiment file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import yaml

from sbi_dist.estimation.options import TrainOptions
from sbi_dist.tuning.records import TrialRecord
from sbi_dist.tuning.search import Search

__all__ = [
    "HEADINGS",
    "Row",
    "best_yaml",
    "cells",
    "make_rows",
    "optimism",
    "override_lines",
    "settings_text",
    "table_text",
    "verdict",
]

HEADINGS = (
    "rank",
    "trial",
    "loss",
    "difference",
    "epochs",
    "seconds",
    "weights",
    "status",
    "settings",
)
_WORDS = ("trial", "status", "settings")


@dataclasses.dataclass(frozen=True)
class Row:
    """One trial in the table.

    Attributes:
        record: how it ended.
        rank: 1 for the least loss; None where there is none.
        difference: of its loss to that of the train section's own settings, in nats.
        error: standard error of the difference, where both were trained to their end.
    """

    record: TrialRecord
    rank: int | None
    difference: float | None
    error: float | None


def make_rows(
    search: Search,
    records: dict[str, TrialRecord],
    losses: Callable[[str], np.ndarray | None],
) -> list[Row]:
    """The trials by loss, those without one at the end.

    The standard error is that of the mean of paired differences: all estimators are judged on the
    same held-out simulations, so that what is hard about a simulation cancels.

    Args:
        search: the search.
        records: of its trials, by id.
        losses: of single held-out simulations, by a trial's id.
    """
    own = search.trials[0].id
    base, reference = records.get(own), losses(own)
    ordered = sorted(
        records.values(),
        key=lambda each: (math.inf if each.loss is None else each.loss, each.trial),
    )
    rows = []
    for place, record in enumerate(ordered, start=1):
        difference = error = None
        if record.loss is not None and base is not None and base.loss is not None:
            if record.trial != own:
                difference = record.loss - base.loss
            mine = losses(record.trial)
            if difference is not None and mine is not None and reference is not None:
                spread = float(np.std(mine - reference, ddof=1))
                error = spread / math.sqrt(max(record.held_out, len(mine)))
        rows.append(Row(record, None if record.loss is None else place, difference, error))
    return rows


def optimism(rows: list[Row]) -> float | None:
    """How much too good the least loss looks for being the least, in nats; None: not known.

    A validation loss, relative to that of the train section's own settings, has an error of
    standard error s that is a mean over many simulations and so about normal. Where one of K
    trials is selected by these losses, however they depend on each other, the expected error of
    the selected one is at most s sqrt(2 ln K), with its own s (Russo & Zou 2016, arXiv:1511.05219,
    with at most ln K nats of information in the selection).
    """
    error, count = rows[0].error, sum(row.rank is not None for row in rows)
    return None if error is None else error * math.sqrt(2 * math.log(count))


def verdict(rows: list[Row]) -> str:
    """What the search found and what it is worth, in two or three sentences."""
    winner = rows[0]
    judged = sum(row.rank is not None for row in rows)
    if not winner.record.settings:
        return (
            f"The settings of the train section have the least validation loss of {judged} trials."
        )
    found = f"The least validation loss of {judged} trials is {winner.record.loss:.4f} nats"
    if winner.difference is not None:
        found += f", {_signed(winner)} from that of the train section"
    found += ". It is too good by its selection"
    extent = optimism(rows)
    if extent is not None:
        found += f", by {extent:.2g} nats at most on average"
    return (
        found + ". For a loss to rely on, train both settings with another train.seed, which holds "
        "out other simulations."
    )


def settings_text(settings: dict[str, Any]) -> str:
    """What differs from the train section: ``blocks=3, estimator=maf``."""
    if not settings:
        return "as in the train section"
    return ", ".join(f"{name}={_plain(value)}" for name, value in sorted(settings.items()))


def cells(row: Row) -> dict[str, str]:
    """A row as text, by the columns of ``HEADINGS``."""
    record = row.record
    return {
        "rank": "" if row.rank is None else str(row.rank),
        "trial": record.trial,
        "loss": "" if record.loss is None else f"{record.loss:.4f}",
        "difference": "" if row.difference is None else _signed(row),
        "epochs": str(record.epochs),
        "seconds": f"{record.seconds:.1f}",
        "weights": f"{record.weights:,}" if record.weights else "",
        "status": record.status,
        "settings": settings_text(record.settings),
    }


def _signed(row: Row) -> str:
    error = "" if row.error is None else f" ± {row.error:.4f}"
    return f"{row.difference:+.4f}{error}"


def table_text(rows: list[Row]) -> str:
    """The table as aligned plain text, and why trials failed."""
    lines = [dict(zip(HEADINGS, HEADINGS, strict=True)), *(cells(row) for row in rows)]
    widths = {key: max(len(line[key]) for line in lines) for key in HEADINGS}
    text = [
        "  ".join(
            line[key].ljust(widths[key]) if key in _WORDS else line[key].rjust(widths[key])
            for key in HEADINGS
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * widths[key] for key in HEADINGS))
    failed = [row.record for row in rows if row.record.reason]
    return "\n".join(text + [f"{record.trial} failed: {record.reason}" for record in failed])


def best_yaml(search: Search, rows: list[Row]) -> str:
    """The train section with the settings of the least loss, to be put into the file for its own.

    It has what the train section sets otherwise than by default, and all that was searched.
    """
    settings = rows[0].record.settings
    chosen = dataclasses.asdict(dataclasses.replace(search.train, **settings))
    default = dataclasses.asdict(TrainOptions())
    shown = {
        name: value for name, value in chosen.items() if value != default[name] or name in settings
    }
    return yaml.safe_dump({"train": shown}, sort_keys=False)


def override_lines(rows: list[Row]) -> list[str]:
    """The settings of the least loss as arguments of the command line."""
    return [
        f"--set train.{name}={_plain(value)}"
        for name, value in sorted(rows[0].record.settings.items())
    ]


def _plain(value: Any) -> str:
    """A value as YAML has it."""
    return yaml.safe_dump(value).splitlines()[0]
