"""All plots by name, and those about how a run went: simulations, training, recovery of truths.

The pair plot lives in ``pairs`` and the posterior predictive check in ``predictive``; both are
importable from here.  Importing this module imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sbi_dist.report import style
from sbi_dist.report.arrays import FloatArray, as_float_array
from sbi_dist.report.content import RecoveryFacts
from sbi_dist.report.coverage import predictive_coverage, recovered
from sbi_dist.report.pairs import pairplot
from sbi_dist.report.predictive import predictive_check
from sbi_dist.report.ticks import axis_name, fit_ticks

__all__ = [
    "pairplot",
    "predictive_check",
    "predictive_coverage",
    "recovery_panels",
    "simulation_outcomes",
    "training_curve",
]

STATUSES = ("ok", "nonfinite", "error", "timeout", "crashed")
# Below this the clock, not the simulator, is measured.
_INSTANT = 1e-4


def training_curve(history: Mapping[str, Any]) -> Figure:
    """Plot training and validation loss by epoch, and the learning rate where it changes.

    Args:
        history: ``epoch``, ``training_loss``, ``validation_loss`` and ``learning_rate``, lists of
            equal length, and ``best_epoch``, an int.  Losses are in nats: the mean of
            -log q(theta | x).  Losses that are not finite leave gaps.

    Returns:
        The figure, belonging to no pyplot window.

    Raises:
        ValueError: a missing list, lists of different lengths, or no epochs.
    """
    columns = _read_history(history)
    epoch, rate = columns["epoch"], columns["learning_rate"]
    changing = np.ptp(rate) > 1e-12 * float(np.max(np.abs(rate))) and bool((rate > 0).all())
    with style.plot_style():
        figure = style.new_figure(7.2, 4.6 if changing else 3.6)
        ratios = [3.2, 1.0] if changing else [1.0]
        grid = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)
        axis: Axes = grid[0, 0]
        marker = "o" if len(epoch) < 3 else None
        for key, color, label in (
            ("training_loss", style.PRIOR, "Training"),
            ("validation_loss", style.POSTERIOR, "Validation"),
        ):
            axis.plot(epoch, columns[key], color=color, marker=marker, ms=5, label=label)
        axis.set_ylabel("Loss: mean -log q(θ | x), nats")
        best = np.flatnonzero(epoch == history["best_epoch"])
        if best.size and np.isfinite(columns["validation_loss"][best[0]]):
            x, y = epoch[best[0]], columns["validation_loss"][best[0]]
            axis.plot(
                [x],
                [y],
                linestyle="none",
                marker="o",
                ms=7,
                mec="white",
                color=style.TRUTH,
                zorder=4,
                label=f"Best: epoch {int(x)}, {y:.3f}",
            )
        axis.legend(loc="upper right")
        if changing:
            lower: Axes = grid[1, 0]
            lower.plot(epoch, rate, color=style.FAINT, drawstyle="steps-post")
            lower.set_yscale("log")
            rates = np.unique(rate)
            rates = rates if len(rates) <= 3 else rates[[0, -1]]
            lower.set_yticks(rates, [f"{value:.3g}" for value in rates])
            lower.minorticks_off()
            lower.set_ylabel("Learning rate")
        grid[-1, 0].set_xlabel("Epoch")
        grid[-1, 0].xaxis.set_major_locator(MaxNLocator(8, integer=True))
        figure.align_ylabels()
    return figure


def _read_history(history: Mapping[str, Any]) -> dict[str, FloatArray]:
    keys = ("epoch", "training_loss", "validation_loss", "learning_rate")
    missing = [key for key in (*keys, "best_epoch") if key not in history]
    if missing:
        raise ValueError(
            f"history has the keys {sorted(history)} and lacks {missing}; allowed: "
            f"{', '.join(keys)} and best_epoch"
        )
    columns = {key: as_float_array(history[key], f"history[{key!r}]") for key in keys}
    shapes = {key: column.shape for key, column in columns.items()}
    length = len(columns["epoch"]) if columns["epoch"].ndim == 1 else 0
    if length == 0 or any(shape != (length,) for shape in shapes.values()):
        raise ValueError(
            f"history has lists of shapes {shapes}; allowed: lists of equal length, at least 1"
        )
    return columns


def simulation_outcomes(status_counts: Mapping[str, int], durations: Any) -> Figure:
    """Plot how many simulations ended in each status, and how long they took.

    The counts are left out when every simulation is ok, and the histogram when there are no
    durations; one of the two is always drawn.

    Args:
        status_counts: simulations by status (ok, nonfinite, error, timeout, crashed).
        durations: (N,) seconds a simulation, of all simulations or the first N; values that are
            not finite are left out.

    Returns:
        The figure, belonging to no pyplot window.

    Raises:
        ValueError: no simulations at all, or negative counts or durations.
    """
    counts = {str(key): int(value) for key, value in status_counts.items()}
    for key, value in counts.items():
        if value < 0:
            raise ValueError(f"status_counts[{key!r}] is {value}; allowed: 0 or more")
    seconds = as_float_array(durations, "durations").ravel()
    seconds = seconds[np.isfinite(seconds)]
    if seconds.size and seconds.min() < 0:
        raise ValueError(f"durations holds {seconds.min():g}; allowed: 0 or more seconds")
    if not sum(counts.values()) and not seconds.size:
        raise ValueError(
            f"status_counts is {counts} and durations is empty; allowed: at least one simulation"
        )
    total, known = sum(counts.values()), np.size(durations)
    failed = total - counts.get("ok", 0)
    with_counts = failed > 0 or not seconds.size
    with style.plot_style():
        panels = int(with_counts) + int(bool(seconds.size))
        figure = style.new_figure(7.2 if panels == 1 else 10.0, 3.0)
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        if with_counts:
            _count_bars(axes.pop(0), counts)
        if seconds.size:
            _duration_histogram(axes.pop(0), seconds, known if known < total else None)
    return figure


def _count_bars(axis: Axes, counts: dict[str, int]) -> None:
    shown = [s for s in STATUSES if s in counts] + [s for s in counts if s not in STATUSES]
    total = sum(counts.values())
    values = [counts[status] for status in shown]
    colors = [style.POSTERIOR if status == "ok" else style.TRUTH for status in shown]
    bars = axis.barh(range(len(shown)), values, color=colors, alpha=0.8, height=0.62)
    texts = [f"{value:,}  ({_percent(value, total)})" for value in values]
    axis.bar_label(bars, texts, padding=4, fontsize=9, color=style.INK)
    axis.set_yticks(range(len(shown)), shown)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.4 * max(values))
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.set_title("Simulations by status")


def _percent(value: int, total: int) -> str:
    share = 100.0 * value / total if total else 0.0
    if 0 < share < 0.1:
        return "< 0.1 %"
    # Not "100 %" while some failed.
    return "> 99.9 %" if 99.9 < share < 100 else f"{share:.3g} %"


def _duration_histogram(axis: Axes, seconds: FloatArray, first: int | None) -> None:
    middle = float(np.median(seconds))
    factor, unit = (1.0, "s") if middle >= 1 else (1e3, "ms") if middle >= 1e-3 else (1e6, "µs")
    values = seconds * factor
    positive = values[values > 0]
    spread = positive.max() / positive.min() if positive.size else 1.0
    bins: Any = 30
    if middle > _INSTANT and spread > 100:
        bins = np.geomspace(positive.min(), positive.max(), 31)
        axis.set_xscale("log")
        values = positive
    elif np.ptp(values) == 0:
        bins = 1
    axis.hist(values, bins=bins, color=style.POSTERIOR, alpha=0.6)
    axis.axvline(middle * factor, color=style.INK, lw=1.0, linestyle=(0, (4, 3)))
    axis.set_title(f"Time a simulation: median {middle * factor:.3g} {unit}")
    whose = "Duration" if first is None else f"Run times of the first {first:,} simulations"
    axis.set_xlabel(f"{whose} ({unit})")
    axis.set_ylabel("Simulations")


def recovery_panels(recovery: RecoveryFacts, labels: Sequence[str]) -> Figure:
    """Plot posterior medians and 90 % intervals against true values, one panel a parameter.

    Args:
        recovery: posteriors of simulations with known parameters.
        labels: D names, with units where there are any.

    Returns:
        The figure, belonging to no pyplot window.
    """
    dimension = recovery.truth.shape[1]
    columns = dimension if dimension <= 4 else 3 if dimension in (5, 6, 9) else 4
    rows = -(-dimension // columns)
    width = {1: 4.6, 2: 8.0}.get(columns, 10.0)
    side = width / columns
    counts, _ = recovered(recovery)
    with style.plot_style():
        figure = style.new_figure(width, rows * (side + 0.15) + 0.5)
        grid = figure.subplots(rows, columns, squeeze=False)
        for index, axis in enumerate(grid.flat):
            if index >= dimension:
                axis.set_visible(False)
                continue
            name = style.plain_label(str(labels[index]))
            _recovery_panel(axis, recovery, index, name, side)
            if index % columns == 0:
                axis.set_ylabel("Posterior")
            if index + columns >= dimension:
                axis.set_xlabel("True value")
            axis.text(
                0.97,
                0.03,
                f"{counts[index]:,} of {len(recovery.truth):,} inside 90 %",
                transform=axis.transAxes,
                ha="right",
                va="bottom",
                fontsize=8.5,
                color=style.INK,
                bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1.5},
                zorder=5,
            )
        figure.align_ylabels()
        figure.legend(handles=_recovery_handles(), loc="outside lower center", ncols=3)
    return figure


def _recovery_panel(
    axis: Axes, recovery: RecoveryFacts, index: int, name: str, side: float
) -> None:
    truth, median = recovery.truth[:, index], recovery.median[:, index]
    low, high = recovery.low[:, index], recovery.high[:, index]
    missed = (truth < low) | (truth > high)
    for which, color in ((~missed, style.POSTERIOR), (missed, style.TRUTH)):
        axis.vlines(truth[which], low[which], high[which], color=color, alpha=0.3, lw=1.2)
        axis.plot(truth[which], median[which], linestyle="none", marker="o", ms=2.6, color=color)
    ends = np.array([min(truth.min(), low.min()), max(truth.max(), high.max())])
    ends += np.array([-0.04, 0.04]) * (ends[1] - ends[0])
    axis.axline((ends[0], ends[0]), (ends[1], ends[1]), color=style.INK, lw=1, dashes=(4, 3))
    axis.set_xlim(*ends)
    axis.set_ylim(*ends)
    axis.set_box_aspect(1)
    # About what the labels and gaps leave of the panel's width.
    ticks = fit_ticks(ends[0], ends[1], side - 0.8, 9, 4)
    for line in (axis.xaxis, axis.yaxis):
        line.set_ticks(ticks.positions, ticks.labels)
    axis.set_title(axis_name(name, ticks.factor, int(9.5 * side)), fontweight="bold")


def _recovery_handles() -> list[Any]:
    inside, outside = (
        Line2D([], [], color=color, lw=1.2, marker="o", ms=3.5, label=label)
        for color, label in (
            (style.POSTERIOR, "Median and 90 % interval"),
            (style.TRUTH, "90 % interval misses the true value"),
        )
    )
    line = Line2D([], [], color=style.INK, lw=1, dashes=(4, 3), label="Median = true value")
    return [inside, outside, line]
