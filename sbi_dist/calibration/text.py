"""A calibration's findings as text for a terminal."""

from __future__ import annotations

import textwrap
from typing import Any

__all__ = ["as_text", "failures_as_text"]

_WIDTH = 96


def as_text(found: dict[str, Any]) -> str:
    """A table of the tests, and below it what is wrong and what to try."""
    rows = [("test", "verdict", "effect", "bound", "p-value")]
    for test in found["tests"]:
        numbers = [test["effect"], test["threshold"], test["p_value"]]
        rows.append(
            (test["name"], test["verdict"], *("-" if n is None else f"{n:.3g}" for n in numbers))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            word.ljust(width) if column < 2 else word.rjust(width)
            for column, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines += failures_as_text(found.get("simulations"))
    for test in found["tests"]:
        # The summary has one of them.
        if test["verdict"] != "pass" and test["sentence"] not in found["summary"]:
            lines += ["", *textwrap.wrap(f"{test['name']}: {test['sentence']}", _WIDTH)]
    return "\n".join(
        [*lines, "", *textwrap.wrap(f"{found['verdict']}: {found['summary']}", _WIDTH)]
    )


def failures_as_text(simulations: dict[str, Any] | None) -> list[str]:
    """How many held-out simulations failed, and why; nothing where none did."""
    failures = (simulations or {}).get("failures")
    if simulations is None or not failures:
        return []
    failed = simulations["made"] - simulations["statuses"].get("ok", 0)
    often = "; ".join(f"{e['count']:,} x {e['status']} ({e['message']})" for e in failures)
    text = (
        f"Of {simulations['made']:,} held-out simulations {failed:,} failed and are in no test, "
        f"most often: {often}."
    )
    return ["", *textwrap.wrap(text, _WIDTH)]
