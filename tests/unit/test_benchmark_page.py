"""The benchmark's page, and what a model's report says of its agreement with reference draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sbi_dist import report
from sbi_dist.benchmark.cell import Cell
from sbi_dist.benchmark.page import render
from sbi_dist.benchmark.records import folder_of, read_best, read_records, write_record
from sbi_dist.benchmark.table import as_rows
from sbi_dist.report.content import AgreementFacts
from sbi_dist.store import LocalStore
from tests.unit.test_report import Page, is_png, make_content, normalised

FOUND = {
    Cell("two_moons", 1000, ()): {1: 0.7, 2: 0.6},
    Cell("slcp", 1000, ()): {1: 0.98, 2: 0.99},
    Cell("slcp", 500, ()): {1: 0.99, 2: 0.99},
}


def test_page_has_the_table_and_the_plot() -> None:
    files = render(as_rows(FOUND), {"bins": 8, "note": "<b>bold</b>"})
    assert is_png(files["c2st.png"])
    html = files["index.html"].decode()
    text = normalised(Page(html))
    # By problem and size; beside the published mean where there is one.
    rows = [
        ["slcp", "500", "0.990", "0.990", "0.990", "2"],
        ["slcp", "1,000", "0.985", "0.980", "0.990", "2", "0.975", "+0.010"],
        ["two_moons", "1,000", "0.650", "0.600", "0.700", "2", "0.725", "-0.075"],
    ]
    assert "".join(cell for row in rows for cell in row) in "".join(text.split())
    assert html.count('class="num truth"') == 1
    assert "data:image/png;base64," in html and "<b>" not in html and "://" not in html


@pytest.mark.parametrize("published", [None, 0.831])
def test_report_shows_the_agreement(published: float | None) -> None:
    agreement = AgreementFacts({1: 0.61, 3: 0.71}, 100_000, published)
    content = make_content(np.random.default_rng(1), count=0, agreement=agreement)
    text = " ".join(normalised(Page(report.render(content)["index.html"].decode())).split())
    assert "trained on 100,000 simulations, from reference draws at a rate of 0.660 (C2ST" in text
    assert "observation 1 3 C2ST 0.610 0.710" in text
    assert ("publish 0.831 for NPE" in text) == (published is not None)


def test_records_of_the_number_of_draws_that_has_most(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert read_best(store, "m1") is None
    for number in (2, 1):
        write_record(folder_of(store, "m1", 1000), "slcp", number, number / 10)
    write_record(folder_of(store, "m1", 500), "slcp", 7, 0.7)
    write_record(folder_of(store, "m12", 500), "slcp", 8, 0.8)
    write_record(folder_of(store, "m1", 1000), "slcp", 2, 0.9)  # the first one stays
    assert read_best(store, "m1") == ("slcp", {1: 0.1, 2: 0.2})
    assert read_records(folder_of(store, "m1", 500)) == {7: 0.7}
