"""The calibration's part of the report page."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from sbi_dist import report
from sbi_dist.calibration.reduce import reduce_block
from sbi_dist.calibration.reference import Scale
from sbi_dist.calibration.text import as_text
from sbi_dist.calibration.verdict import curves, judge
from sbi_dist.report.calibration import calibration_panels
from sbi_dist.report.content import CalibrationFacts, FailureFacts
from tests.unit.test_report import Page, is_png, make_content, normalised

NAMES = ["rate", "<b>bold</b> & co"]


def calibrated(sd: float, size: int = 2, with_density: bool = True) -> dict:
    """Of a Gaussian posterior whose sd is so many times the right one."""
    rng = np.random.default_rng(0)
    told = 3 * rng.normal(size=(1000, size))
    off, noise = rng.normal(size=(1000, size)), sd * rng.normal(size=(1000, 200, size))
    densities = (-(noise**2).sum(-1), -(off**2).sum(-1)) if with_density else ()
    theta, draws = told + off, told[:, None] + noise
    ranks = reduce_block(np.arange(1000), theta, draws, *densities, scale=Scale.of(theta))
    names = [f"p{number}" for number in range(size)] if size != 2 else NAMES
    found = {**judge(ranks, names), "curves": curves(ranks, names)}
    return json.loads(json.dumps(found))


def facts(found: dict) -> CalibrationFacts:
    return CalibrationFacts(
        found["verdict"], found["summary"], found["held_out"], found["draws"], found["tests"],
        found["curves"], "2026-01-01",
    )  # fmt: skip


@pytest.mark.parametrize(("sd", "verdict"), [(1.0, "pass"), (0.7, "fail")])
def test_page_shows_the_calibration(sd, verdict) -> None:
    found = calibrated(sd)
    assert found["verdict"] == verdict
    content = make_content(np.random.default_rng(1), count=0, calibration=facts(found))
    files = report.render(content)
    assert is_png(files["calibration.png"])
    html = files["index.html"].decode()
    text = normalised(Page(html))
    assert f"Calibration {verdict.capitalize()}. " in text
    assert " ".join(found["summary"].split()) in text
    assert "1,000 simulations made for this alone, with 200 posterior draws each" in text
    assert "<b>bold" not in html
    (part, *_) = next(t for t in found["tests"] if t["name"] == "shrinkage")["parameters"]
    row = [f"{part[name]:.3f}" for name in ("shrinkage", "z_mean", "z_rms")]
    assert "".join([part["name"], row[0], *row[1:]]) in "".join(text.split())
    if verdict == "fail":  # what is wrong comes first
        assert found["tests"][0]["verdict"] == "pass"
        assert html.rindex("<td>fail</td>") < html.index("<td>pass</td>")


def test_page_says_what_it_found_at_the_observed_data_and_what_failed() -> None:
    found = calibrated(1.0)
    sentence = "The posterior of the observed data (l-C2ST): told <apart>."
    local = {**found["tests"][1], "name": "local", "sentence": sentence}
    failures = [FailureFacts("ValueError: <too> large", 12, [0.5, 2.0])]
    given = dataclasses.replace(
        facts({**found, "tests": [*found["tests"], local]}), failures=failures
    )
    files = report.render(make_content(np.random.default_rng(1), count=0, calibration=given))
    html = files["index.html"].decode()
    section = html.partition("<h2>Calibration</h2>")[2].partition("<table")[0]
    assert "<p>The posterior of the observed data (l-C2ST): told &lt;apart&gt;.</p>" in section
    text = normalised(Page(html))
    assert "in no test; most often ValueError: <too> large (12 times, for one with " in text


def test_page_without_a_calibration() -> None:
    files = report.render(make_content(np.random.default_rng(1), count=0))
    assert "calibration.png" not in files and b"<h2>Calibration" not in files["index.html"]


@pytest.mark.parametrize(("size", "with_density"), [(1, True), (2, False), (9, True)])
def test_panels(size, with_density) -> None:
    figure = calibration_panels(calibrated(1.0, size, with_density)["curves"])
    axes = figure.axes
    assert len(axes) == 3 - (not with_density)
    ranks = axes[0].get_lines()[1:]  # the first one is zero
    assert len(ranks) == size
    for axis in axes:
        low, high = axis.get_ylim()
        for line in axis.get_lines()[1:]:
            x, y = line.get_data()
            assert x[0] == y[0] == y[-1] == 0 and x[-1] == 1
            assert low < np.min(y) and np.max(y) < high


def test_text_of_a_calibration() -> None:
    good, bad = calibrated(1.0), calibrated(0.7)
    lines = as_text(good).splitlines()
    assert lines[0].split() == ["test", "verdict", "effect", "bound", "p-value"]
    assert [line.split()[:2] for line in lines[1 : 1 + len(good["tests"])]] == [
        [test["name"], "pass"] for test in good["tests"]
    ]
    assert lines[-1].startswith("pass: ") or "pass: " in as_text(good)
    words = " ".join(as_text(bad).split())
    failing = [test["name"] for test in bad["tests"] if test["verdict"] == "fail"]
    assert failing and all(f"{name} fail" in words for name in failing)
    assert "over-confident" in words
    assert words.endswith(" ".join(bad["summary"].split()))
    assert max(map(len, as_text(bad).splitlines())) < 110


def test_facts_are_those_of_the_verdict() -> None:
    names = {field.name for field in dataclasses.fields(CalibrationFacts)}
    assert names - {"created", "failures"} <= calibrated(1.0).keys()
