"""The catalogue of metric names."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest

from sbi_dist.metrics import CATALOGUE, Metric, add, observe, set_gauge

LABELS = {"experiment": "e", "model": "m"}
# What Ray attaches to every series.
TAKEN = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "le", "quantile"}
NOT_BASE_UNITS = "ms milliseconds microseconds minutes hours mb gb kb megabytes percent".split()


@pytest.mark.parametrize("metric", CATALOGUE.values(), ids=lambda metric: metric.name)
def test_names_follow_the_conventions_of_prometheus(metric: Metric) -> None:
    assert re.fullmatch(r"sbi_[a-z]+(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not set(metric.name.split("_")) & set(NOT_BASE_UNITS)
    # Suffixes that the text format gives a meaning of their own.
    assert not metric.name.endswith(("_count", "_sum", "_bucket", "_created", "_info"))
    assert metric.description[0].isupper() and metric.description.endswith(".")
    assert all(re.fullmatch(r"[a-z][a-z_]*", label) for label in metric.labels)
    assert len(set(metric.labels)) == len(metric.labels) and not TAKEN & set(metric.labels)
    assert bool(metric.boundaries) == (metric.kind == "histogram")
    assert list(metric.boundaries) == sorted(set(metric.boundaries))
    # Ray takes no other ones.
    assert all(0 < bound < math.inf for bound in metric.boundaries)


def test_names_are_unique_also_without_the_suffix() -> None:
    """As Ray may export a counter under both names."""
    names = [metric.name for metric in CATALOGUE.values()]
    assert names == list(CATALOGUE) and len(names) > 5
    assert len({name.removesuffix("_total") for name in names}) == len(names)


def test_what_is_not_in_the_catalogue_is_refused() -> None:
    with pytest.raises(ValueError, match="'sbi_other' is no gauge of the catalogue"):
        set_gauge("sbi_other", 1.0, LABELS)
    with pytest.raises(ValueError, match="is no counter"):
        add("sbi_train_loss", 1.0, LABELS)
    with pytest.raises(ValueError, match="is no gauge"):
        set_gauge("sbi_train_restarts_total", 1.0, LABELS)
    with pytest.raises(ValueError, match="is no histogram"):
        observe("sbi_serve_draws_total", [1.0], LABELS)
    with pytest.raises(ValueError, match="is no counter"):
        add("sbi_serve_batch_draws", 1.0, LABELS)
    with pytest.raises(ValueError, match="sbi_serve_batch_draws has the labels experiment, model"):
        observe("sbi_serve_batch_draws", [1.0], {"experiment": "e"})
    for labels in ({}, {"experiment": "e"}, {**LABELS, "rank": "0"}):
        with pytest.raises(ValueError, match="sbi_train_loss has the labels experiment, model"):
            set_gauge("sbi_train_loss", 1.0, labels)
    for amount in (-1.0, math.nan):
        with pytest.raises(ValueError, match="never decreases"):
            add("sbi_train_restarts_total", amount, LABELS)


def test_outside_ray_nothing_is_exported_nor_ray_imported() -> None:
    program = (
        "import sys; from sbi_dist import metrics; labels = {'experiment': 'e', 'model': 'm'}; "
        "metrics.set_gauge('sbi_train_loss', 1.0, labels); "
        "metrics.add('sbi_train_restarts_total', 1.0, labels); "
        "metrics.observe('sbi_serve_batch_draws', [1.0], labels); "
        "assert not metrics.export._made and 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
