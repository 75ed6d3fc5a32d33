"""The picture of a posterior predictive check: simulated observations against the real one.

How observations divide into series and what counts as covered is decided in ``coverage``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from sbi_dist.report import style
from sbi_dist.report.arrays import FloatArray, as_float_array
from sbi_dist.report.coverage import PredictiveSeries, arrange, inside

# Outer and inner central intervals: 95 % and 50 %.
_OUTER, _INNER = (0.025, 0.975), (0.25, 0.75)
_MAX_RESIDUALS = 4000


def predictive_check(
    x_draws: Any,
    observed: Any,
    *,
    coordinate: Any = None,
    coordinate_label: str | None = None,
    series_names: Sequence[str] | None = None,
    value_label: str | None = None,
    log_scale: bool = False,
) -> Figure:
    """Compare an observation with simulations from the posterior's draws.

    An x of shape (T,) or (T, C) gives one panel a series, with 50 % and 95 % bands along the
    coordinate; a scalar or a vector of at most 12 values without coordinate gives an interval
    a component; anything else one summary panel of sorted residuals.

    Args:
        x_draws: posterior predictive simulations (S, *x_shape), torch or numpy.  Draws with
            values that are not finite are left out.
        observed: the observation (*x_shape); values that are not finite are not drawn.
        coordinate: (T,) positions along the first axis of x, for instance years.
        coordinate_label: name and unit of the coordinate.
        series_names: C names, or for components a name for each.
        value_label: name and unit of the values.
        log_scale: values on a logarithmic axis.

    Returns:
        The figure, belonging to no pyplot window.

    Raises:
        ValueError: shapes that do not agree; the message names the argument.
    """
    series = arrange(x_draws, observed, with_coordinate=coordinate is not None)
    with style.plot_style():
        if series.kind == "flattened":
            return _residuals(series, value_label)
        count = series.draws.shape[2 if series.kind == "components" else 1]
        names = _read_names(series_names, count)
        if series.kind == "components":
            return _components(series, names, value_label, log_scale)
        positions = _read_coordinate(coordinate, series.draws.shape[2])
        return _bands(series, positions, names, coordinate_label, value_label, log_scale)


def _read_names(names: Sequence[str] | None, count: int) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, str) or len(names) != count:
        raise ValueError(f"series_names is {names!r}; allowed: {count} names")
    return [style.plain_label(str(name)) for name in names]


def _read_coordinate(coordinate: Any, length: int) -> FloatArray:
    if coordinate is None:
        return np.arange(length, dtype=np.float64)
    positions = as_float_array(coordinate, "coordinate")
    if positions.shape != (length,) or not np.isfinite(positions).all():
        raise ValueError(
            f"coordinate has shape {positions.shape} and "
            f"{int((~np.isfinite(positions)).sum())} non-finite values; allowed: "
            f"({length},) finite numbers, one for each row of observed"
        )
    return positions


def _bands(
    series: PredictiveSeries,
    positions: FloatArray,
    names: list[str] | None,
    coordinate_label: str | None,
    value_label: str | None,
    log_scale: bool,
) -> Figure:
    count = series.draws.shape[1]
    columns = 1 if count == 1 else 2 if count <= 4 else 3
    rows = -(-count // columns)
    width = 7.2 if columns == 1 else 10.0
    figure = style.new_figure(width, 0.7 + (3.2 if columns == 1 else 2.9) * rows)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    order = np.argsort(positions, kind="stable")
    at = positions[order]
    covered = inside(series, 0.95)
    bounds = np.quantile(series.draws, [*_OUTER, *_INNER, 0.5], axis=0)[:, :, order]
    for index, axis in enumerate(grid.flat):
        if index >= count:
            axis.set_visible(False)
            continue
        low, high, inner_low, inner_high, median = bounds[:, index]
        seen = series.observed[index, order]
        if log_scale and np.nanmax(np.concatenate([high, seen])) > 0:
            axis.set_yscale("log", nonpositive="mask")
            floor = _smallest_positive(low, inner_low, median, seen)
            low, inner_low = np.maximum(low, floor), np.maximum(inner_low, floor)
            _log_ticks(axis.yaxis, float(np.nanmax([*high, *seen])) / floor)
        axis.fill_between(at, low, high, color=style.POSTERIOR, alpha=0.16, lw=0)
        axis.fill_between(at, inner_low, inner_high, color=style.POSTERIOR, alpha=0.32, lw=0)
        axis.plot(at, median, color=style.POSTERIOR, lw=1.3)
        axis.plot(
            at,
            seen,
            linestyle="none",
            marker="o",
            ms=5 if len(at) <= 60 else 3,
            mew=0.7 if len(at) <= 60 else 0,
            mec="white",
            color=style.TRUTH,
            zorder=3,
        )
        if np.array_equal(positions, np.round(positions)):
            axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        number, total = covered[index]
        name = names[index] if names else (f"Series {index + 1}" if count > 1 else "")
        axis.set_title(name, fontweight="bold")
        axis.set_title(
            f"{number} of {total} inside 95 %", loc="right", fontsize=9, color=style.FAINT
        )
        if index % columns == 0 and value_label:
            axis.set_ylabel(style.plain_label(value_label))
        if index + columns >= count:
            axis.set_xlabel(style.plain_label(coordinate_label or "Index"))
            axis.tick_params(labelbottom=True)
    _legend(figure, median=True)
    return figure


def _smallest_positive(*values: FloatArray) -> float:
    """Where a band that reaches zero is cut on a logarithmic axis."""
    pool = np.concatenate(values)
    pool = pool[np.isfinite(pool) & (pool > 0)]
    return 0.5 * float(pool.min()) if pool.size else 1e-3


def _log_ticks(axis: Axis, ratio: float) -> None:
    """Plain numbers at 1, 2, 5 where powers of ten alone would leave one or two labels."""
    if ratio < 1000:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _components(
    series: PredictiveSeries, names: list[str] | None, value_label: str | None, log_scale: bool
) -> Figure:
    """One row a component, each on its own axis, since components may differ in scale."""
    draws, seen = series.draws[:, 0], series.observed[0]
    count = draws.shape[1]
    figure = style.new_figure(7.2, 1.1 + 0.62 * count)
    grid = figure.subplots(count, 1, squeeze=False)
    bounds = np.quantile(draws, [*_OUTER, *_INNER, 0.5], axis=0)
    for index, axis in enumerate(grid[:, 0]):
        low, high, inner_low, inner_high, median = (float(b) for b in bounds[:, index])
        if log_scale and low > 0 and not seen[index] <= 0:
            axis.set_xscale("log")
            _log_ticks(axis.xaxis, max(high, float(seen[index])) / min(low, float(seen[index])))
        axis.plot([low, high], [0, 0], color=style.POSTERIOR, alpha=0.3, lw=5)
        axis.plot([inner_low, inner_high], [0, 0], color=style.POSTERIOR, alpha=0.65, lw=5)
        axis.plot([median], [0], marker="|", ms=11, mew=1.6, color=style.POSTERIOR)
        axis.plot([seen[index]], [0], marker="o", ms=7, mec="white", color=style.TRUTH, zorder=3)
        axis.set_ylim(-1, 1)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.margins(x=0.06)
        axis.tick_params(labelsize=8, length=2.5)
        default = "" if count == 1 else f"x[{index}]"
        axis.set_ylabel(names[index] if names else default, rotation=0, ha="right", va="center")
    if value_label:
        grid[-1, 0].set_xlabel(style.plain_label(value_label))
    _legend(figure, median=True)
    return figure


def _residuals(series: PredictiveSeries, value_label: str | None) -> Figure:
    """Sorted z-scores of the observation; under a good fit most lie between -2 and 2."""
    draws, seen = series.draws[:, 0], series.observed[0]
    spread = draws.std(axis=0, ddof=1)
    usable = np.isfinite(seen) & (spread > 0)
    if not usable.any():
        raise ValueError(
            "x_draws varies in none of the observed values; allowed: at least one component "
            "with different values among the draws"
        )
    scores = np.sort((seen[usable] - draws.mean(axis=0)[usable]) / spread[usable])
    rank = (np.arange(len(scores)) + 0.5) / len(scores)
    step = -(-len(scores) // _MAX_RESIDUALS)
    figure = style.new_figure(7.2, 3.6)
    axis: Axes = figure.subplots()
    axis.axhspan(-1.96, 1.96, color=style.POSTERIOR, alpha=0.14, lw=0)
    axis.axhspan(-0.674, 0.674, color=style.POSTERIOR, alpha=0.22, lw=0)
    axis.plot(
        rank[::step],
        scores[::step],
        linestyle="none",
        marker="o",
        ms=3,
        mew=0,
        color=style.TRUTH,
        zorder=3,
    )
    reach = max(3.0, 1.1 * float(np.abs(scores).max()))
    axis.set_ylim(-reach, reach)
    axis.set_xlim(-0.01, 1.01)
    axis.set_xlabel(f"Fraction of the {len(scores):,} observed values, sorted by residual")
    axis.set_ylabel("(observed - mean) / sd of draws")
    title = "Residuals of the observation"
    axis.set_title(f"{title}: {style.plain_label(value_label)}" if value_label else title)
    _legend(figure, median=False, normal=True)
    return figure


def _legend(figure: Figure, *, median: bool, normal: bool = False) -> None:
    of = " of a normal" if normal else ""
    handles: list[Any] = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker="o",
            mec="white",
            ms=6,
            color=style.TRUTH,
            label="Observed",
        ),
        Patch(color=style.POSTERIOR, alpha=0.48, lw=0, label=f"50 %{of}"),
        Patch(color=style.POSTERIOR, alpha=0.18, lw=0, label=f"95 %{of}"),
    ]
    if median:
        handles.insert(1, Line2D([], [], color=style.POSTERIOR, lw=1.5, label="Median"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
