"""The posterior table: its numbers, and their rounding for a terminal or a page.

Numbers are rounded to the posterior's uncertainty (two digits of the standard deviation), since
more digits than that say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sbi_dist.report.arrays import as_draws, as_float_array

QUANTILES = {"q05": 0.05, "q50": 0.50, "q95": 0.95}
_NUMBERS = ("mean", "sd", "q05", "q50", "q95", "truth")
HEADINGS = {
    "parameter": "parameter",
    "unit": "unit",
    "mean": "mean",
    "sd": "sd",
    "q05": "5 %",
    "q50": "50 %",
    "q95": "95 %",
    "truth": "truth",
}


def posterior_table(
    draws: Any,
    parameter_names: Sequence[str],
    units: Sequence[str | None] | None = None,
    truth: Any = None,
) -> list[dict[str, Any]]:
    """Summarise posterior draws, one row a parameter, unrounded.

    Args:
        draws: posterior draws (N, D), torch or numpy.
        parameter_names: D names.
        units: D units, each may be None.
        truth: true parameters (D,), where known.

    Returns:
        Rows with the keys ``parameter``, ``unit``, ``mean``, ``sd`` (N - 1 in the denominator),
        ``q05``, ``q50``, ``q95`` and ``truth`` (None where unknown).

    Raises:
        ValueError: draws that are not (N, D) finite numbers, or lengths that do not agree.
    """
    values = as_draws(draws, "draws")
    dimension = values.shape[1]
    if isinstance(parameter_names, str) or len(parameter_names) != dimension:
        raise ValueError(
            f"parameter_names is {parameter_names!r}; allowed: {dimension} names, one for each "
            "column of draws"
        )
    if units is not None and (isinstance(units, str) or len(units) != dimension):
        raise ValueError(f"units is {units!r}; allowed: None or {dimension} units")
    known: list[float | None] = [None] * dimension
    if truth is not None:
        true = as_float_array(truth, "truth")
        if true.shape != (dimension,):
            raise ValueError(f"truth has shape {true.shape}; allowed: ({dimension},)")
        known = [float(value) if math.isfinite(value) else None for value in true]
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return [
        {
            "parameter": str(name),
            "unit": units[j] if units is not None else None,
            "mean": float(values[:, j].mean()),
            "sd": float(values[:, j].std(ddof=1)),
            **{key: float(q) for key, q in zip(QUANTILES, quantiles[:, j], strict=True)},
            "truth": known[j],
        }
        for j, name in enumerate(parameter_names)
    ]


def format_number(value: float | None, uncertainty: float) -> str:
    """``value`` rounded to two significant digits of ``uncertainty``; empty for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    if not (math.isfinite(uncertainty) and uncertainty > 0):
        return f"{value:.4g}"
    decimals = 1 - math.floor(math.log10(uncertainty))
    rounded = round(value, decimals)
    size = abs(rounded) if rounded else uncertainty
    if decimals > 6 or size >= 1e7:
        digits = max(0, decimals + math.floor(math.log10(size)))
        return f"{rounded:.{digits}e}"
    return f"{rounded + 0.0:.{max(decimals, 0)}f}"  # + 0.0 turns -0.0 into 0.0


def format_row(row: Mapping[str, Any]) -> dict[str, str]:
    """One row of :func:`posterior_table` as text, with the same keys."""
    text = {key: format_number(row[key], row["sd"]) for key in _NUMBERS}
    return {"parameter": row["parameter"], "unit": row["unit"] or "", **text}


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of :func:`posterior_table` as aligned plain text for a terminal.

    The columns ``unit`` and ``truth`` are left out where no row has one.
    """
    text = [format_row(row) for row in rows]
    columns = [
        key for key in HEADINGS if key not in ("unit", "truth") or any(row[key] for row in text)
    ]
    cells = [{key: HEADINGS[key] for key in columns}, *text]
    widths = {key: max(len(row[key]) for row in cells) for key in columns}
    lines = []
    for row in cells:
        parts = [
            row[key].rjust(widths[key]) if key in _NUMBERS else row[key].ljust(widths[key])
            for key in columns
        ]
        lines.append("  ".join(parts).rstrip())
    rule = "  ".join("-" * widths[key] for key in columns)
    return "\n".join([lines[0], rule, *lines[1:]])
