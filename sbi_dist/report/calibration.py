"""The picture of a calibration: how far ranks and coverage are from those of an exact posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbi_dist.report import style

__all__ = ["calibration_panels"]

# More lines than this are not told apart.
_NAMED = 6
_CYCLE = ("#2a6099", "#d1580b", "#3a8a4d", "#8b5fa8", "#b0892b", "#5f6b76")


def calibration_panels(curves: Mapping[str, Any]) -> Figure:
    """Plot deviations of distribution functions with their simultaneous band.

    Args:
        curves: as ``sbi_dist.calibration.verdict.curves`` gives them: ``levels``, ``low`` and
            ``high`` (K,), and shares (K,) of each parameter in ``sbc``, of ``coverage``, ``tarp``
            and ``tarp_data``; None where there is none.

    Returns:
        The figure, belonging to no pyplot window.
    """
    panels: list[tuple[str, str, dict[str, Any]]] = [
        ("Ranks of the true parameters", "Rank among the draws", dict(curves["sbc"])),
        (
            "Regions of highest density",
            "Credibility",
            {"coverage": curves["coverage"]},
        ),
        (
            "Balls (TARP)",
            "Credibility",
            {"around random points": curves["tarp"], "around guesses": curves["tarp_data"]},
        ),
    ]
    shown = [
        (title, label, {name: line for name, line in lines.items() if line is not None})
        for title, label, lines in panels
    ]
    shown = [panel for panel in shown if panel[2]]
    levels = np.asarray(curves["levels"])
    low, high = (np.asarray(curves[name]) - levels for name in ("low", "high"))
    deviations = [np.asarray(line) - levels for *_, lines in shown for line in lines.values()]
    most = max(float(np.abs(each).max()) for each in (low, high, *deviations))
    with style.plot_style():
        figure = style.new_figure(10.0, 3.4)
        axes = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        for axis, (title, label, lines) in zip(axes, shown, strict=True):
            _panel(axis, levels, low, high, lines)
            axis.set_title(title)
            axis.set_xlabel(label)
            axis.set_ylim(-1.15 * most, 1.15 * most)
        axes[0].set_ylabel("Empirical minus nominal")
    return figure


def _panel(
    axis: Axes, levels: np.ndarray, low: np.ndarray, high: np.ndarray, lines: dict[str, Any]
) -> None:
    ends = np.concatenate([[0.0], levels, [1.0]])
    axis.fill_between(ends, np.pad(low, 1), np.pad(high, 1), color="#e4e4e4", lw=0)
    axis.axhline(0, color=style.INK, lw=0.8, dashes=(4, 3))
    few = len(lines) <= _NAMED
    for index, (name, line) in enumerate(lines.items()):
        axis.plot(
            ends,
            np.pad(np.asarray(line) - levels, 1),
            color=_CYCLE[index % len(_CYCLE)] if few else style.POSTERIOR,
            alpha=1.0 if few else 0.5,
            lw=1.4,
            label=style.plain_label(str(name)) if few else None,
        )
    axis.set_xlim(0, 1)
    # None at the ends of two panels that would touch.
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    if few and len(lines) > 1:
        # Below, as lines may be anywhere within.
        columns = 3 if len(lines) in (3, 5, 6) else 2
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns)
