"""Prometheus' configuration, rules and alerts, checked by its own tools."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from sbi_dist.metrics import CATALOGUE
from tests.monitoring import (
    PROMETHEUS,
    RULES,
    RUNBOOK,
    exported,
    names,
    program,
    queries,
    regardless,
    rules,
    selectors,
)

# Of Ray's own metrics, and of Prometheus': what a test in tests/services finds there.
OTHERS = {
    "up", "ray_node_cpu_utilization", "ray_node_gpus_utilization", "ray_node_mem_total",
    "ray_node_mem_used",
}  # fmt: skip
ALERTS = [rule for rule in rules() if "alert" in rule]
RECORDED = {rule["record"] for rule in rules() if "record" in rule}
EXPRESSIONS = queries() | {
    f"{index} {rule.get('alert') or rule['record']}": rule["expr"]
    for index, rule in enumerate(rules())
}
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))


def run(name: str, *arguments: str | Path) -> str:
    command = [program(name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=PROMETHEUS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- by the tools ----


def test_the_configuration_is_valid() -> None:
    said = run("promtool", "check", "config", "prometheus.yml")
    assert f"{len(rules())} rules found" in said


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_are_to(path: Path) -> None:
    run("promtool", "test", "rules", path)


def test_who_is_told() -> None:
    run("amtool", "check-config", "alertmanager.yml")
    route = ["config", "routes", "test", "--config.file", "alertmanager.yml"]
    for severity in {rule["labels"]["severity"] for rule in ALERTS}:
        assert run("amtool", *route, f"severity={severity}").strip() == severity
    inhibiting = yaml.safe_load((PROMETHEUS / "alertmanager.yml").read_text())["inhibit_rules"]
    named = {text.split(" = ")[1] for rule in inhibiting for side in rule for text in rule[side]
             if " = " in text}  # fmt: skip
    assert named <= {rule["alert"] for rule in ALERTS}


# ---- the catalogue ----


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_expressions_use_only_what_there_is(where: str) -> None:
    expression = EXPRESSIONS[where]
    used = names(expression)
    assert used and used <= exported().keys() | RECORDED | OTHERS
    for name, labels in selectors(expression):
        if name in exported():
            metric = CATALOGUE[exported()[name]]
            assert labels <= {*metric.labels, *(["le"] if metric.boundaries else [])}
    for metric_name in used & exported().keys():
        bounds = {f"{bound:g}" for bound in CATALOGUE[exported()[metric_name]].boundaries}
        assert set(re.findall(r'\ble="([^"]+)"', expression)) <= bounds


def test_what_is_summed_by_is_a_label() -> None:
    for where, expression in EXPRESSIONS.items():
        known = {"le", "instance", "GpuIndex"}
        for name in names(expression) & exported().keys():
            known |= set(CATALOGUE[exported()[name]].labels)
        for name in names(expression) & RECORDED:
            known |= set(name.split(":")[0].split("_"))
        by = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression)
              for label in group.split(",")}  # fmt: skip
        assert by <= known, where


def test_every_metric_is_used() -> None:
    used = set().union(*map(names, EXPRESSIONS.values()))
    assert {exported()[name] for name in used & exported().keys()} == set(CATALOGUE)
    assert used >= RECORDED | OTHERS


def test_the_parts_of_an_expression_are_told() -> None:
    expression = (
        'sum by (a, b) (rate(x_total{c=~"(d|e){2}", f!="g"}[5m] offset 1h)) / on (h) y:z:rate1h'
        ' > bool 1e-3 and max(up{i="j"}) unless 0 * w'
    )
    assert names(expression) == {"x_total", "y:z:rate1h", "up", "w"}
    assert ("up", {"i"}) in selectors(expression)


def test_expressions_are_known_regardless_of_thresholds() -> None:
    expression = 'max by (a) (x{b!="c > d"} > 0.5) >= 3 * (y offset 1h) unless z != 1'
    assert regardless(expression) == (
        'max by (a) (x{b!="c > d"} > bool 0.5) >= bool 3 * (y ) or z != bool 1'
    )


# ---- alerts ----


@pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule["alert"])
def test_alerts_say_what_to_do(alert: dict) -> None:
    name, labels = alert["alert"], alert["labels"]
    assert re.fullmatch(r"Sbi(Serve|Simulate|Train|Infer|Scrape)[A-Z]\w+", name)
    assert labels.keys() == {"severity"} and labels["severity"] in ("page", "ticket", "info")
    notes = alert["annotations"]
    assert notes.keys() == {"summary", "description", "runbook_url"}
    assert "{{ $labels." in notes["summary"] + notes["description"]
    assert notes["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    section = sections()[name]
    assert section.startswith(f"{labels['severity'].capitalize()}. ")
    assert len(section) > 100


def test_the_runbook_is_about_alerts_that_there_are() -> None:
    assert set(sections()) == {rule["alert"] for rule in ALERTS}
    text = RUNBOOK.read_text()
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= {name.lower() for name in sections()}
    titles = {where.partition(": ")[2][:-2] for where in queries()}
    assert set(re.findall(r"\*(?!\*)([^*]+)\*", text)) - {"page", "ticket", "info"} <= titles | {
        "Nodes"
    }


def test_every_alert_is_seen_to_fire() -> None:
    fired = set()
    for path in TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for step in test["promql_expr_test"]:
                for sample in step.get("exp_samples") or ():
                    fired |= set(re.findall(r'alertname="(\w+)"', sample["labels"]))
    assert fired == {rule["alert"] for rule in ALERTS}


def sections() -> dict[str, str]:
    """The runbook's text by alert."""
    parts = re.split(r"^### (\w+)\n", RUNBOOK.read_text(), flags=re.M)
    return dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))


def test_rules_are_named_by_what_they_keep() -> None:
    assert RULES.is_dir() and len(RECORDED) > 10
    for rule in rules():
        if "record" in rule:
            kept = re.findall(r"by \(([^)]*)\)", rule["expr"])
            level = rule["record"].split(":")[0]
            assert {group.replace(", ", "_") for group in kept} == {level}, rule["record"]
