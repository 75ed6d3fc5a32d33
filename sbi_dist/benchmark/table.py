"""What a run of the benchmark came to, as text and as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sbi_dist.benchmark.cell import Cell
from sbi_dist.benchmark.published import NPE

__all__ = ["as_rows", "as_sentence", "as_text"]


def as_rows(found: Mapping[Cell, Mapping[int, float]]) -> list[dict[str, Any]]:
    """One for each cell, JSON-ready; ``difference`` is to the published NPE, less is better."""
    rows = []
    for cell, values in found.items():
        mean = float(np.mean(list(values.values())))
        published = NPE[cell.task].get(cell.size)
        rows.append(
            {
                "task": cell.task,
                "num_simulations": cell.size,
                "c2st": mean,
                "published_npe": published,
                "difference": None if published is None else mean - published,
                "observations": {str(number): values[number] for number in sorted(values)},
            }
        )
    return rows


def as_text(rows: list[dict[str, Any]]) -> str:
    """The table: mean, least and largest C2ST of each cell, beside the published mean."""
    lines = [
        f"{'task':<25}{'simulations':>12}{'C2ST':>8}{'least':>8}{'largest':>9}{'NPE':>8}"
        f"{'difference':>12}"
    ]
    for row in sorted(rows, key=lambda row: (row["task"], row["num_simulations"])):
        values = list(row["observations"].values())
        published, difference = row["published_npe"], row["difference"]
        beside = (
            f"{'':>8}{'':>12}" if published is None else f"{published:>8.3f}{difference:>+12.3f}"
        )
        lines.append(
            f"{row['task']:<25}{row['num_simulations']:>12,}{row['c2st']:>8.3f}{min(values):>8.3f}"
            f"{max(values):>9.3f}{beside}"
        )
    lines.append(as_sentence(rows))
    return "\n".join(line.rstrip() for line in lines)


def as_sentence(rows: list[dict[str, Any]]) -> str:
    """What the numbers of the table are."""
    counts = {len(row["observations"]) for row in rows}
    return (
        f"C2ST: mean over {' or '.join(map(str, sorted(counts)))} observations, 0.5 is as good as "
        "can be. NPE: as published by Lueckmann et al. 2021, ten observations."
    )
