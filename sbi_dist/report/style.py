"""The look shared by every picture: colours, type sizes and how a figure becomes PNG bytes.

No data is plotted here.  Figures are made with matplotlib's object-oriented interface, so the
user's backend and rcParams stay as they were.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser

POSTERIOR = "#2a6099"
PRIOR = "#9b9b9b"
TRUTH = "#d1580b"
INK = "#333333"
FAINT = "#777777"

RC: Any = {  # Any: matplotlib types the keys as literals
    "axes.axisbelow": True,
    "axes.edgecolor": "#8a8a8a",
    "axes.facecolor": "white",
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titlecolor": INK,
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "font.family": "sans-serif",
    "font.size": 10,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "text.color": INK,
    "text.usetex": False,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 9,
    "xtick.major.width": 0.7,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 9,
    "ytick.major.width": 0.7,
}


@contextmanager
def plot_style() -> Iterator[None]:
    """The package's rcParams for the length of a ``with`` block (the backend is untouched)."""
    with matplotlib.rc_context(RC):
        yield


@contextmanager
def page_style() -> Iterator[None]:
    """As :func:`plot_style`, on matplotlib's defaults, so a page looks the same everywhere."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def new_figure(width: float, height: float, *, constrained: bool = True) -> Figure:
    """A figure in inches that belongs to no window and to no pyplot state."""
    figure = Figure(figsize=(width, height), layout="constrained" if constrained else None)
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure, dpi: int = 140) -> bytes:
    """PNG bytes of a figure, cropped to what is drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()


def shown_size(png: bytes, dpi: int = 140) -> tuple[int, int]:
    """Width and height in CSS pixels at which type has the same size in every picture."""
    width, height = struct.unpack(">II", png[16:24])  # the IHDR chunk
    return round(width / dpi * 90), round(height / dpi * 90)


def plain_label(text: str) -> str:
    """A label that can be drawn: mathtext where it parses, otherwise its dollars escaped.

    A name such as ``cost $\\foo$`` would raise only when the figure is drawn, far from its cause.
    """
    if text.count("$") < 2:
        return text
    try:
        MathTextParser("path").parse(text)
    except ValueError:
        return text.replace("$", r"\$")
    return text
