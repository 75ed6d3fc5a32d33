"""C2ST against the number of simulations, a panel for each problem."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sbi_dist.benchmark.published import NPE
from sbi_dist.report import style

__all__ = ["c2st_panels"]

_COLUMNS = 3


def c2st_panels(rows: list[dict[str, Any]]) -> Figure:
    """Plot mean, least and largest C2ST over the observations, and the published NPE's mean.

    Args:
        rows: as of ``table.as_rows``, at least one.

    Returns:
        The figure, belonging to no pyplot window.
    """
    tasks = sorted({row["task"] for row in rows})
    lines = math.ceil(len(tasks) / _COLUMNS)
    columns = min(_COLUMNS, len(tasks))
    with style.plot_style():
        figure = style.new_figure(2.6 * columns + 0.6, 2.1 * lines + 0.7)
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, task in zip(grid.flat, tasks, strict=False):
            own = sorted(
                (row for row in rows if row["task"] == task), key=lambda row: row["num_simulations"]
            )
            size = np.array([row["num_simulations"] for row in own])
            each = [list(row["observations"].values()) for row in own]
            mean = np.array([row["c2st"] for row in own])
            spread = np.array([[m - min(v), max(v) - m] for m, v in zip(mean, each, strict=True)])
            axes.errorbar(
                size, mean, spread.T, fmt="o-", color=style.POSTERIOR, capsize=2, lw=1.2, ms=4,
                label="sbi_dist, mean and range",
            )  # fmt: skip
            theirs = NPE[task]
            axes.plot(
                list(theirs), list(theirs.values()), "s--", color=style.FAINT, lw=1.0, ms=3.5,
                label="NPE, Lueckmann et al. 2021",
            )  # fmt: skip
            axes.axhline(0.5, color=style.FAINT, lw=0.6)
            axes.set(xscale="log", ylim=(0.48, 1.02))
            axes.set_title(task, fontsize=9)
        for axes in grid.flat[len(tasks) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("C2ST")
        for axes in grid[-1]:
            axes.set_xlabel("simulations")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8)
    return figure
