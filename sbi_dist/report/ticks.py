"""Ticks of a panel whose labels keep clear of each other and stay within the panel's length.

In a grid of panels, neighbours' labels then never touch. What matplotlib would write beside the
axis (``1e-5``) goes into the axis's name.
"""

from __future__ import annotations

import itertools
import textwrap
from typing import NamedTuple

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator, ScalarFormatter

_CLEARANCE_PT = 5.0


class Ticks(NamedTuple):
    """Where ticks are and what they say.

    Attributes:
        positions: of the ticks.
        labels: one a tick.
        factor: what the labels are to be multiplied by (or added to) as text; often empty.
        width: of the widest label in inches.
    """

    positions: list[float]
    labels: list[str]
    factor: str
    width: float


def fit_ticks(low: float, high: float, length: float, size: float, most: int) -> Ticks:
    """As many ticks, at most ``most``, as have room side by side on an axis.

    Args:
        low, high: the axis's range.
        length: of the axis in inches.
        size: of the type in points.
        most: number of ticks at most, at least 1.
    """
    formatter = ScalarFormatter()
    formatter.set_powerlimits((-3, 4))
    formatter.create_dummy_axis()
    assert formatter.axis is not None
    formatter.axis.set_view_interval(low, high)
    font = FontProperties(size=size)
    points = 72.0 * length
    best = Ticks([], [], "", 0.0)
    # Ticks without room at the ends are left out, so that more are tried than there may be.
    for number in range(most + 2, 0, -1):
        locator = MaxNLocator(number, steps=[1, 2, 2.5, 4, 5, 10])
        values = [float(v) for v in locator.tick_values(low, high) if low <= v <= high]
        shown = []
        for value, label in zip(values, formatter.format_ticks(values), strict=True):
            width, height, _ = text_to_path.get_text_width_height_descent(label, font, False)
            center, half = points * (value - low) / (high - low), max(width, height) / 2
            if half <= center <= points - half:
                shown.append((value, label, center, half, width))
        formatter.set_useMathText(True)
        factor = formatter.get_offset()
        formatter.set_useMathText(False)
        ticks = Ticks(
            [value for value, *_ in shown],
            [label for _, label, *_ in shown],
            factor,
            float(max((width for *_, width in shown), default=0.0)) / 72.0,
        )
        apart = all(
            right[2] - left[2] >= left[3] + right[3] + _CLEARANCE_PT
            for left, right in itertools.pairwise(shown)
        )
        if apart and len(best.positions) < len(shown) <= most:
            best = ticks
    return best


def axis_name(name: str, factor: str, width: int) -> str:
    """A name and the factor of its ticks on lines of about ``width`` letters.

    Lines are broken at spaces and underscores; a name in mathtext is left in one.
    """
    lines = [name]
    if len(name) > width and "$" not in name:
        wrapped = textwrap.wrap(name.replace("_", "_\u200b "), width + 2)
        lines = [line.replace("_\u200b ", "_").replace("\u200b", "") for line in wrapped]
    if factor and len(lines[-1]) + 6 <= width:
        lines[-1] += f" ({factor})"
    elif factor:
        lines.append(f"({factor})")
    return "\n".join(lines)
