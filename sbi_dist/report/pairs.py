"""The pair plot: every marginal and every pair of parameters, drawn by ``corner``.

Here: reading what users pass, choosing the plotted window, and the prior underlay.  The panels
themselves are corner's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import corner
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sbi_dist.report import style
from sbi_dist.report.arrays import FloatArray, as_draws, as_float_array, thin
from sbi_dist.report.ticks import Ticks, axis_name, fit_ticks

MAX_PLOTTED = 50_000
CONTOUR_LEVELS = (0.5, 0.95)
# Below this many draws contours are noise; the draws themselves are shown.
_MIN_FOR_CONTOURS = 300
# How much wider than the posterior the window may grow to show the prior.
_MAX_WIDENING = 2.0
# Between panels, in parts of a panel.
_GAP = 0.06
# From a bottom axis to its name, and the most that tick labels of a left one should take; inches.
_NAME_BELOW, _TICK_ROOM = 0.27, 0.6
_NAME_WIDTH = 15  # letters in a line of a parameter's name
_OURS = {
    "fig": "figsize",
    "labels": "labels",
    "range": "limits",
    "truths": "points",
    "reverse": "corner.corner itself",
    "weights": "resampled draws",
}


def pairplot(
    samples: Any,
    points: Any = None,
    limits: Any = None,
    labels: Sequence[str] | None = None,
    figsize: tuple[float, float] | None = None,
    prior_samples: Any = None,
    bounds: Any = None,
    **corner_options: Any,
) -> tuple[Figure, np.ndarray]:
    """Plot the one- and two-dimensional marginals of posterior draws.

    Contours enclose 50 % and 95 % of the draws.  More than 50 000 draws are thinned evenly.

    Args:
        samples: posterior draws (N, D), torch or numpy, N at least ``max(10, D + 1)``.
        points: true parameters, (D,) or (P, D), torch or numpy, marked in every panel.
        limits: ``[low, high]`` for each parameter, or one pair for all.  By default the range
            of the draws and the points, widened towards the prior up to twice that.
        labels: D names; default ``theta[0]`` and so on.
        figsize: width and height in inches.
        prior_samples: prior draws (M, D), drawn grey beneath the posterior; in
            the panels of two parameters, the region that holds 95 % of them.
        bounds: the prior's support, ``[low, high]`` for each parameter, which may be infinite.
            Histograms end there, and so do panels without ``limits`` or points beyond.
        **corner_options: passed to ``corner.corner``, over this function's own choices.

    Returns:
        The figure and its D x D array of axes (the upper triangle is blank).  The figure belongs
        to no pyplot window: show it by making it a notebook cell's value, or ``savefig`` it.

    Raises:
        ValueError: an argument of the wrong shape or with values that cannot be plotted; the
            message names the argument, its value and what is allowed.
    """
    options = _checked_options(corner_options)
    draws = thin(as_draws(samples, "samples"), MAX_PLOTTED)
    dimension = draws.shape[1]
    marks = _read_points(points, dimension)
    prior = None
    if prior_samples is not None:
        prior = thin(as_draws(prior_samples, "prior_samples"), MAX_PLOTTED)
        if prior.shape[1] != dimension:
            raise ValueError(
                f"prior_samples has {prior.shape[1]} parameters; allowed: {dimension}, "
                "as samples has"
            )
    names = _read_labels(labels, dimension)
    support = _read_bounds(bounds, dimension)
    if limits is None:
        window = _window(draws, marks, prior, support)
        window, bins = _aligned(window, _bins(draws, window), support)
    else:
        window = _read_limits(limits, dimension)
        bins = _bins(draws, window)
    for j, (low, high) in enumerate(window):
        if not np.any((draws[:, j] >= low) & (draws[:, j] <= high)):
            field = "bounds" if limits is None else "limits"
            raise ValueError(
                f"{field}[{j}] is [{low:g}, {high:g}] and holds none of the samples, which span "
                f"[{draws[:, j].min():g}, {draws[:, j].max():g}]; allowed: a range with samples"
            )

    with style.plot_style():
        if figsize is None:
            side = min(1.0 + (1.75 if dimension <= 4 else 1.45) * dimension, 18.0)
            figsize = (4.6, 3.2) if dimension == 1 else (side, side)
        figure = style.new_figure(*figsize, constrained=False)
        arguments = _corner_arguments(draws, window, bins, names)
        # corner writes into the dictionaries it is given; the user's stay as they were.
        arguments |= {k: dict(v) if isinstance(v, dict) else v for k, v in options.items()}
        corner.corner(draws, fig=figure, **arguments)
        axes = np.array(figure.axes, dtype=object).reshape(dimension, dimension)
        if prior is not None:
            _underlay_prior(axes, prior, window, support)
        if marks is not None:
            _mark_points(axes, marks)
        most = options.get("max_n_ticks", arguments["max_n_ticks"])
        _finish(figure, axes, names, most, "labelpad" in options)
        if prior is not None or marks is not None:
            _legend(figure, dimension, prior is not None, marks is not None)
    return figure, axes


def _checked_options(options: dict[str, Any]) -> dict[str, Any]:
    known = set(inspect.signature(corner.corner).parameters)
    known |= set(inspect.signature(corner.hist2d).parameters)
    known -= {"data", "x", "y", "ax", "kwargs", "hist2d_kwargs"}
    for name, value in options.items():
        if name in _OURS:
            raise ValueError(f"option {name}={value!r} is not allowed; use {_OURS[name]}")
        # corner ignores names it does not know, which would hide a spelling mistake.
        if name not in known:
            raise ValueError(
                f"option {name}={value!r} is unknown; allowed: options of corner.corner: "
                + ", ".join(sorted(known - set(_OURS)))
            )
    return options


def _read_points(points: Any, dimension: int) -> FloatArray | None:
    if points is None:
        return None
    marks = np.atleast_2d(as_float_array(points, "points"))
    if marks.ndim != 2 or marks.shape[1] != dimension:
        raise ValueError(
            f"points has shape {np.shape(points)}; allowed: ({dimension},) or (P, {dimension})"
        )
    if not np.isfinite(marks).all():
        raise ValueError(f"points is {marks.tolist()}; allowed: finite numbers")
    return marks


def _read_labels(labels: Sequence[str] | None, dimension: int) -> list[str]:
    if labels is None:
        return [f"theta[{j}]" for j in range(dimension)]
    if isinstance(labels, str) or len(labels) != dimension:
        raise ValueError(
            f"labels is {labels!r}; allowed: a list of {dimension} names, one a parameter"
        )
    return [style.plain_label(str(label)) for label in labels]


def _read_limits(limits: Any, dimension: int) -> FloatArray:
    pairs = as_float_array(limits, "limits")
    if pairs.shape == (2,):
        pairs = np.tile(pairs, (dimension, 1))
    elif pairs.shape == (1, 2):
        pairs = np.repeat(pairs, dimension, axis=0)
    if pairs.shape != (dimension, 2):
        raise ValueError(
            f"limits has shape {pairs.shape}; allowed: ({dimension}, 2), [low, high] a "
            "parameter, or one pair for all"
        )
    for j, (low, high) in enumerate(pairs):
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise ValueError(
                f"limits[{j}] is [{low:g}, {high:g}]; allowed: finite numbers with low < high"
            )
    return pairs


def _read_bounds(bounds: Any, dimension: int) -> FloatArray:
    if bounds is None:
        return np.tile([-np.inf, np.inf], (dimension, 1))
    pairs = as_float_array(bounds, "bounds")
    if pairs.shape != (dimension, 2) or not (pairs[:, 0] < pairs[:, 1]).all():
        raise ValueError(
            f"bounds is {pairs.tolist()}; allowed: ({dimension}, 2), [low, high] a parameter "
            "with low < high"
        )
    return pairs


def _window(
    draws: FloatArray, marks: FloatArray | None, prior: FloatArray | None, support: FloatArray
) -> FloatArray:
    """Plotted range (D, 2): the posterior's bulk, grown to the points and towards the prior."""
    low, high = np.quantile(draws, [0.001, 0.999], axis=0)
    width = high - low
    flat = width <= 1e-12 * np.maximum(np.abs(low), np.abs(high))
    width = np.where(flat, np.where(low == 0, 1.0, 0.1 * np.abs(low)), width)
    low, high = low - 0.08 * width, high + 0.08 * width
    if prior is not None:
        room = (_MAX_WIDENING - 1.0) / 2.0 * width
        margin = 0.02 * (prior.max(axis=0) - prior.min(axis=0))
        low = np.minimum(low, np.maximum(prior.min(axis=0) - margin, low - room))
        high = np.maximum(high, np.minimum(prior.max(axis=0) + margin, high + room))
    low, high = np.maximum(low, support[:, 0]), np.minimum(high, support[:, 1])
    if marks is not None:
        low = np.minimum(low, marks.min(axis=0) - 0.08 * width)
        high = np.maximum(high, marks.max(axis=0) + 0.08 * width)
    return np.stack([low, high], axis=1)


def _bins(draws: FloatArray, window: FloatArray) -> list[int]:
    """Bins per parameter so that the posterior's bulk is resolved however wide the window is."""
    across = 22 if draws.shape[0] >= 2000 else 14
    bulk = np.subtract(*np.quantile(draws, [0.999, 0.001], axis=0))
    span = window[:, 1] - window[:, 0]
    ratio = np.where(bulk > 0, span / np.where(bulk > 0, bulk, 1.0), 1.0)
    return [int(n) for n in np.clip(np.round(across * ratio), 12, 80)]


def _aligned(
    window: FloatArray, bins: list[int], support: FloatArray
) -> tuple[FloatArray, list[int]]:
    """Window and bins with an edge of a bin at each bound that lies within the window."""
    window, bins = window.copy(), list(bins)
    for j, count in enumerate(bins):
        inner = np.clip(window[j], *support[j])
        outside = np.abs(window[j] - inner)
        if outside.any():
            bins[j] = max(1, round(count * (inner[1] - inner[0]) / (window[j, 1] - window[j, 0])))
            width = (inner[1] - inner[0]) / bins[j]
            beyond = np.ceil(outside / width)
            window[j] = inner + [-1, 1] * beyond * width
            bins[j] += int(beyond.sum())
    return window, bins


def _corner_arguments(
    draws: FloatArray, window: FloatArray, bins: list[int], names: list[str]
) -> dict[str, Any]:
    many = draws.shape[0] >= _MIN_FOR_CONTOURS
    dimension = draws.shape[1]
    return {
        "bins": bins,
        "range": [tuple(pair) for pair in window],
        "labels": names,
        "color": style.POSTERIOR,
        "levels": CONTOUR_LEVELS,
        "smooth": 1.2 if many else None,
        "plot_datapoints": not many,
        "plot_density": False,
        "plot_contours": many,
        "fill_contours": many,
        "no_fill_contours": True,  # corner's white base would cover the prior
        "max_n_ticks": 5 if dimension <= 3 else 4 if dimension <= 5 else 3,
        "use_math_text": True,
        "quiet": True,
        "contour_kwargs": {"linewidths": 0.9},
        "contourf_kwargs": {"antialiased": True},
        "data_kwargs": {"alpha": 0.5, "ms": 2.5},
        "hist_kwargs": {"density": True, "histtype": "stepfilled", "alpha": 0.55, "lw": 0},
        "label_kwargs": {"fontsize": 10 if dimension <= 6 else 9},
    }


def _underlay_prior(
    axes: np.ndarray, prior: FloatArray, window: FloatArray, support: FloatArray
) -> None:
    """Draw the prior beneath what corner drew, in the window chosen for the posterior."""
    count, dimension = prior.shape
    # Beyond the bounds: else the least dense 5 % of a flat prior were holes somewhere within.
    whole = _window(prior, None, None, _read_bounds(None, dimension))
    for j in range(dimension):
        axis: Axes = axes[j, j]
        low, high = np.clip(window[j], *support[j])
        bins = np.linspace(low, high, 25)
        # Scaled by all prior draws, not by those in the window, so that heights compare.
        weights = np.full(count, 1.0 / (count * (bins[1] - bins[0])))
        heights, _ = np.histogram(prior[:, j], bins=bins, weights=weights)
        axis.stairs(heights, bins, color=style.PRIOR, lw=1.2, zorder=0.5)
        axis.set_ylim(0.0, max(axis.get_ylim()[1], 1.15 * float(heights.max())))
        for k in range(j):
            _shade_prior(axes[j, k], prior[:, [k, j]], whole[[k, j]])


def _shade_prior(axis: Axes, prior: FloatArray, whole: FloatArray) -> None:
    """Shade where 95 % of the prior lies.

    The region is found over the prior's whole range and only then cropped to the panel: draws
    within a narrow panel are few and would give noise.  An inner contour is left out for the
    same reason: that of a flat prior is noise.
    """
    # hist2d sets limits and scale; the latter resets locators and formatters.
    lines = (axis.xaxis, axis.yaxis)
    ticks = [(line, line.get_major_locator(), line.get_major_formatter()) for line in lines]
    limits = axis.get_xlim(), axis.get_ylim()
    corner.hist2d(
        prior[:, 0],
        prior[:, 1],
        ax=axis,
        bins=int(np.clip(np.sqrt(len(prior)) / 1.4, 12, 70)),
        smooth=1.5,
        range=[tuple(pair) for pair in whole],
        levels=[0.95],
        color=style.PRIOR,
        plot_datapoints=False,
        plot_density=False,
        fill_contours=True,
        no_fill_contours=True,
        quiet=True,
        contour_kwargs={"linewidths": 0.6, "zorder": 0.4, "alpha": 0.6},
        contourf_kwargs={
            "zorder": 0.3,
            "antialiased": True,
            "colors": [(0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.055)],
        },
    )
    axis.set_xlim(limits[0])
    axis.set_ylim(limits[1])
    for line, locator, formatter in ticks:
        line.set_major_locator(locator)
        line.set_major_formatter(formatter)


def _mark_points(axes: np.ndarray, marks: FloatArray) -> None:
    for j in range(len(axes)):
        for value in marks[:, j]:
            axes[j, j].axvline(value, color=style.TRUTH, lw=1.5, zorder=3)
        for k in range(j):
            axes[j, k].plot(
                marks[:, k],
                marks[:, j],
                linestyle="none",
                marker="o",
                ms=4.5,
                mec="white",
                mew=0.7,
                color=style.TRUTH,
                zorder=4,
            )


def _finish(figure: Figure, axes: np.ndarray, names: list[str], most: int, placed: bool) -> None:
    """Margins in inches, ticks and frames, and names where the user has not ``placed`` them."""
    dimension = len(axes)
    size = 9 if dimension <= 4 else 8
    width, height = figure.get_size_inches()
    top = 0.4 if dimension == 1 else 0.15  # of one panel: for the legend

    def margins(room: float, lines: int) -> tuple[float, float, float]:
        """Left, bottom, and the length of a panel's shorter side."""
        across, line = dimension + _GAP * (dimension - 1), 0.17
        left = 0.15 if dimension == 1 else min(room + line * lines + 0.08, 0.3 * width)
        bottom = min(_NAME_BELOW + line * lines + 0.08, 0.35 * height)
        return left, bottom, min(width - left - 0.15, height - bottom - top) / across

    windows = [axes[j, j].get_xlim() for j in range(dimension)]
    linear = all(axis.get_xscale() == axis.get_yscale() == "linear" for axis in axes.flat)
    ticks = [Ticks([], [], "", 0.45)] * dimension
    if linear and most > 0:
        lines = max(axis_name(name, "", _NAME_WIDTH).count("\n") for name in names)
        length = margins(_TICK_ROOM, lines + 2)[2]  # at least
        ticks = [fit_ticks(low, high, length, size, most) for low, high in windows]
    labels = [
        axis_name(name, tick.factor, _NAME_WIDTH) for name, tick in zip(names, ticks, strict=True)
    ]
    room = max(tick.width for tick in ticks) + 0.16
    left, bottom, panel = margins(room, 1 + max(label.count("\n") for label in labels))
    figure.subplots_adjust(
        left=left / width,
        bottom=bottom / height,
        right=1 - 0.15 / width,
        top=1 - top / height,
        wspace=_GAP,
        hspace=_GAP,
    )
    for j in range(dimension):
        for k in range(j + 1):
            axis: Axes = axes[j, k]
            axis.tick_params(labelsize=size, length=2.5, labelrotation=0)
            if linear and most > 0:
                _set_ticks(axis.xaxis, ticks[k], j == dimension - 1)
                if j != k:
                    _set_ticks(axis.yaxis, ticks[j], k == 0)
            if j != k:
                axis.spines[["top", "right"]].set_visible(True)
        axes[j, j].spines["left"].set_visible(False)
        axes[-1, j].set_xlabel(labels[j])
        if j > 0:
            axes[j, 0].set_ylabel(labels[j])
        if not placed:
            axes[-1, j].xaxis.set_label_coords(0.5, -_NAME_BELOW / panel)
            axes[j, 0].yaxis.set_label_coords(-room / panel, 0.5)


def _set_ticks(line: Axis, ticks: Ticks, labelled: bool) -> None:
    line.set_ticks(ticks.positions, ticks.labels if labelled else [""] * len(ticks.labels))


def _legend(figure: Figure, dimension: int, with_prior: bool, with_points: bool) -> None:
    """In the empty upper triangle, or above the one panel."""
    handles: list[Any] = [Patch(color=style.POSTERIOR, alpha=0.6, lw=0, label="Posterior")]
    if with_prior:
        handles.append(Patch(fc="#f1f1f1", ec=style.PRIOR, lw=1.2, label="Prior"))
    if with_points:
        true = "True value"
        handles.append(Line2D([], [], color=style.TRUTH, marker="o", ms=5, mec="white", label=true))
    if dimension == 1:
        figure.legend(handles=handles, loc="upper center", ncols=3, fontsize=9)
        return
    figure.legend(
        handles=handles,
        loc="upper right",
        fontsize=min(8 + dimension / 2, 12),
        bbox_to_anchor=(0.985, 0.985),
    )
