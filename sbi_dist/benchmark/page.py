"""The benchmark's page: table and plot as one HTML file, and the plot as a picture."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from sbi_dist.benchmark.plot import c2st_panels
from sbi_dist.benchmark.table import as_sentence
from sbi_dist.report import style
from sbi_dist.report.page import embedded, template
from sbi_dist.report.wording import flattened

__all__ = ["render"]


def render(rows: list[dict[str, Any]], settings: Mapping[str, Any]) -> dict[str, bytes]:
    """Render the page.

    Args:
        rows: as of ``table.as_rows``, at least one.
        settings: of the training, nested.

    Returns:
        File name to bytes: ``index.html``, which needs no other file, and ``c2st.png``.
    """
    with style.page_style():
        png = style.to_png(c2st_panels(rows))
    html = template("benchmark.html.j2").render(
        created=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M UTC}",
        summary=as_sentence(rows),
        rows=[
            _as_text(row)
            for row in sorted(rows, key=lambda row: (row["task"], row["num_simulations"]))
        ],
        picture=embedded(png, "C2ST against the number of simulations, a panel for each problem"),
        settings=flattened(settings),
    )
    return {"index.html": html.encode(), "c2st.png": png}


def _as_text(row: dict[str, Any]) -> dict[str, Any]:
    values, difference = row["observations"].values(), row["difference"]
    return {
        "task": row["task"],
        "simulations": f"{row['num_simulations']:,}",
        "mean": f"{row['c2st']:.3f}",
        "least": f"{min(values):.3f}",
        "largest": f"{max(values):.3f}",
        "observations": len(values),
        "published": "" if difference is None else f"{row['published_npe']:.3f}",
        "difference": "" if difference is None else f"{difference:+.3f}",
        "above": difference is not None and difference > 0,
    }
