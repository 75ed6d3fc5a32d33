"""What Prometheus and Grafana are given: the rules and panels of ``cluster/``, and their parts."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from sbi_dist.metrics import CATALOGUE

__all__ = [
    "DASHBOARDS", "GRAFANA", "PROMETHEUS", "RULES", "RUNBOOK", "dashboards", "exported", "names",
    "panels", "program", "queries", "regardless", "rules", "selectors",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
PROMETHEUS, GRAFANA = ROOT / "cluster/prometheus", ROOT / "cluster/grafana"
RULES, DASHBOARDS = PROMETHEUS / "rules", GRAFANA / "dashboards"
RUNBOOK = ROOT / "docs/runbook.md"

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
# Anything in braces, brackets, or behind one of the words is no name of a metric.
_ELSEWHERE = re.compile(
    r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"
)
_NAME = re.compile(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\w|:|\s*\()")
_WORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring"}
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}")


def rules() -> list[dict[str, Any]]:
    """All recording rules and alerts."""
    return [
        rule
        for path in sorted(RULES.glob("*.yml"))
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]


def dashboards() -> dict[str, dict[str, Any]]:
    """The dashboards by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Its panels, without the headings of its rows."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries() -> dict[str, str]:
    """The expressions of all panels, by dashboard, panel and letter."""
    return {
        f"{name}: {panel['title']} {target['refId']}": target["expr"]
        for name, dashboard in dashboards().items()
        for panel in panels(dashboard)
        for target in panel["targets"]
    }


def names(expression: str) -> set[str]:
    """The names of the metrics in an expression."""
    bare = _ELSEWHERE.sub(" ", _STRING.sub("", expression))
    return set(_NAME.findall(bare)) - _WORDS


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """Metrics of an expression with the labels that they are chosen by."""
    return [
        (name, set(re.findall(r"(\w+)\s*[=!]", _STRING.sub("", labels))))
        for name, labels in _SELECTOR.findall(expression)
    ]


def regardless(expression: str) -> str:
    """An alert's expression that has a value wherever there is one to compare, high or low.

    Comparisons give 0 or 1, both sides of ``unless`` count, and the past is now.
    """
    parts = re.split(r'("(?:[^"\\\\]|\\\\.)*"|\{[^}]*\})', expression)
    for index in range(0, len(parts), 2):
        text = re.sub(r"\boffset \w+", "", parts[index]).replace("unless", "or")
        parts[index] = re.sub(r"([<>]=?|[=!]=)", r"\1 bool", text)
    return "".join(parts)


def exported() -> dict[str, str]:
    """The series that the catalogue's metrics are scraped as, but for sums: name -> metric."""
    found = {}
    for metric in CATALOGUE.values():
        # Ray makes sums up from the buckets' middles.
        suffixes = ("_bucket", "_count") if metric.kind == "histogram" else ("",)
        found |= {f"ray_{metric.name}{suffix}": metric.name for suffix in suffixes}
    return found


def program(name: str) -> str:
    """The path of a program of Debian's prometheus packages."""
    found = shutil.which(name)
    return found if found is not None else _missing(name)


def _missing(name: str) -> NoReturn:
    reason = f"{name} is not installed (Debian: prometheus, prometheus-alertmanager)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
