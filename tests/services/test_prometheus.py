"""Every expression of rules and dashboards, evaluated by a Prometheus that scrapes Ray."""

from __future__ import annotations

import itertools
import math
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from sbi_dist.metrics import CATALOGUE
from tests.monitoring import exported, queries, regardless, rules
from tests.ray.conftest import command, environment, write_experiment
from tests.services.prometheus import Prometheus

# Values of labels that expressions ask for; others get one value.
VALUES = {
    "operation": ["sample", "summary"],
    "outcome": ["ok", "error", "timeout", "saturated", "refused", "unreachable"],
    "status": ["ok", "low_ess", "error"],
    "verdict": ["pass", "warn", "fail", "none"],
}
NO_GPU = "pipeline: GPU A"


def asked(experiment: str) -> dict[str, str]:
    """All expressions, those of alerts without their thresholds; panels are of an experiment."""
    of_panels = {
        where: expression.replace("$__rate_interval", "30s")
        .replace("$experiment", experiment)
        .replace("$model", ".*")
        for where, expression in queries().items()
        if where != NO_GPU
    }
    of_rules = {rule["record"]: rule["record"] for rule in rules() if "record" in rule}
    of_alerts = {rule["alert"]: regardless(rule["expr"]) for rule in rules() if "alert" in rule}
    return of_panels | of_rules | of_alerts


@pytest.fixture(scope="module")
def node() -> Iterator[str]:
    """The metrics port of a Ray of one node."""
    from sbi_dist.session import connected

    with connected():
        import ray

        (node,) = (node for node in ray.nodes() if node["Alive"])
        yield f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


@pytest.fixture(scope="module")
def prometheus(node: str) -> Iterator[Prometheus]:
    server = Prometheus([node])
    yield server
    server.stop()


def until(met: Callable[[], object], patience_s: float) -> None:
    """Wait until nothing is missing; else say what is."""
    deadline = time.monotonic() + patience_s
    while missing := met():
        assert time.monotonic() < deadline, f"after {patience_s:g} s there is nothing of {missing}"
        time.sleep(1.0)


def test_all_of_the_catalogue_gets_into_rules_and_panels(prometheus: Prometheus) -> None:
    import ray

    # A process sends its metrics every 10 s by default.
    @ray.remote(num_cpus=0, runtime_env={"env_vars": {"RAY_metrics_report_interval_ms": "1000"}})
    class Everything:
        def tell(self) -> None:
            from sbi_dist import metrics

            for metric in CATALOGUE.values():
                values = [VALUES.get(label, ["all"]) for label in metric.labels]
                for combined in itertools.product(*values):
                    labels = dict(zip(metric.labels, combined, strict=True))
                    if metric.kind == "gauge":
                        metrics.set_gauge(metric.name, 3.0, labels)
                    elif metric.kind == "counter":
                        metrics.add(metric.name, 2.0, labels)
                    else:
                        metrics.observe(metric.name, [metric.boundaries[3]], labels)

    process = Everything.remote()
    expressions = asked("all")

    def missing() -> list[str]:
        ray.get(process.tell.remote())
        return [name for name, text in expressions.items() if not prometheus.values(text)]

    until(missing, 60.0)
    # All of it arrived, once: no series has a label that the catalogue does not know of.
    own = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "instance", "job"}
    for name, metric_name in exported().items():
        metric = CATALOGUE[metric_name]
        series = [labels for labels, _ in prometheus.values(f'{name}{{job="ray"}}')]
        assert len(series) == math.prod(len(VALUES.get(label, [""])) for label in metric.labels) * (
            len(metric.boundaries) + 1 if name.endswith("_bucket") else 1
        )
        for labels in series:
            more = {label for label in labels if not label.startswith("otel_scope_")} - own
            assert more == {"__name__", *metric.labels, *(["le"] if "bucket" in name else [])}
    # The first increments count, though Prometheus sees no growth in them.
    total = 'sum(ray_sbi_serve_model_loads_total{outcome="refused"})'
    difference = f"(sum(experiment:sbi_serve_model_refused:increase15m) - {total}) == 0"
    until(lambda: [] if prometheus.values(difference) else [difference], 10.0)
    ray.kill(process)


def test_prometheus_evaluates_all_rules(prometheus: Prometheus) -> None:
    def unwell() -> list[str]:
        groups = prometheus.get("rules")["groups"]
        told = [rule for group in groups for rule in group["rules"]]
        assert len(told) == len(rules())
        assert not [rule for rule in told if rule["health"] == "err"], told
        return [rule["name"] for rule in told if rule["health"] != "ok"]

    until(unwell, 30.0)
    (target,) = prometheus.get("targets")["activeTargets"]
    assert target["health"] == "up" and target["labels"]["job"] == "ray"


# What tells of faults alone, which these runs have none of.
FAULTS = {
    "pipeline: Deaths of actors A", "pipeline: Deaths of actors B",
    "pipeline: Events of the training A", "pipeline: Events of the training B",
    "experiment:sbi_serve_model_refused:increase15m",
    "experiment_model:sbi_train_skipped_steps:increase15m",
    "experiment_model:sbi_train_restarts:increase1h",
    "experiment_dataset:sbi_simulate_actor_deaths:increase15m",
    "experiment_catalog:sbi_infer_actor_deaths:increase15m",
    "SbiSimulateActorsDying", "SbiTrainSkippedSteps", "SbiTrainRestarts", "SbiInferActorsDying",
    "SbiServeTurnsAway", "SbiServeModelRefused", "SbiServeStoreUnreachable",
    "SbiServeCalibrationFailed", "SbiServeErrorsFast", "SbiServeErrorsSlow",
}  # fmt: skip


def of_service(name: str) -> bool:
    """Whether an expression is about the service."""
    return name.startswith(("serve: ", "SbiServe")) or "sbi_serve" in name


# Slow enough for its metrics to be sent more than once.
FAILING = """
import time

from sbi_dist import BoxUniform, Problem


def simulator(theta, rng):
    time.sleep(0.004)
    if theta[0] > 0.98:
        raise ValueError("too large")
    return theta + 0.1 * rng.standard_normal(2)


problem = Problem(BoxUniform([0.0, 0.0], [1.0, 1.0]), simulator)
"""


@pytest.fixture(scope="module")
def ran(prometheus: Prometheus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Where simulate, train and infer have run, and when they began."""
    import numpy as np

    since, place = time.time(), tmp_path_factory.mktemp("place")
    experiment = write_experiment(place, FAILING, num_simulations=4000, shard_size=100)
    content = yaml.safe_load(experiment.read_text())
    content["train"] |= {"max_epochs": 1000, "max_seconds": 25, "patience": 1000}
    content["train"] |= {"checkpoint_every_s": 5}
    # One actor takes as long as two with twice as much.
    content["infer"] |= {"num_samples": 2000, "output": "summary", "actors": 1}
    experiment.write_text(yaml.safe_dump(content))
    x = np.random.default_rng(0).uniform(0.0, 1.0, (10_000, 2))
    x[::50] = np.nan
    np.save(place / "c.npy", x)
    for arguments in (["simulate"], ["train"], ["infer", "--observations", "c.npy"]):
        process = start(place, *arguments)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    return place, since


def start(place: Path, stage: str, *arguments: str) -> subprocess.Popen[str]:
    """A stage of the experiment in a folder, on the Ray of these tests."""
    import ray

    return subprocess.Popen(
        command(stage, "experiment.yaml", *arguments),
        cwd=place,
        env=environment(ray.get_runtime_context().gcs_address),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_stages_that_run_are_seen(prometheus: Prometheus, ran: tuple[Path, float]) -> None:
    """With Ray's own intervals: what is sent too rarely or too late is not there."""
    expected = {
        name: text
        for name, text in asked("experiment").items()
        if name not in FAULTS and not of_service(name)
    }
    until(lambda: unseen(prometheus, expected, ran[1]), 20.0)


def unseen(prometheus: Prometheus, expected: dict[str, str], since: float) -> list[str]:
    """Names of the expressions that have had no value."""
    return [
        name for name, text in expected.items() if not prometheus.ever(text, "experiment", since)
    ]


@pytest.mark.slow
def test_a_service_that_runs_is_seen(prometheus: Prometheus, ran: tuple[Path, float]) -> None:
    """All operations, and observations that are like no simulation or no numbers."""
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    since = time.time()
    process = start(ran[0], "serve", "--set", f"serve.port={port}")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1/models/", timeout=30) as client:

            def down() -> list[str]:
                assert process.poll() is None, process.communicate()[1]
                try:
                    return [] if client.get("promoted").status_code == 200 else ["the service"]
                except httpx.TransportError:
                    return ["the service"]

            until(down, 60.0)
            good, far, bad = [0.4, 0.6], [50.0, -50.0], [None, 0.5]
            bodies = {
                "sample": {"x": [good, far, bad], "num_samples": 1000},
                "summary": {"x": [good], "num_samples": 1000},
                "log_prob": {"x": [good], "theta": [[0.4, 0.6]]},
            }
            expected = {
                name: text
                for name, text in asked("experiment").items()
                if of_service(name) and name not in FAULTS
            }

            def missing() -> list[str]:
                for operation, body in bodies.items():
                    answer = client.post(f"promoted/{operation}", json=body)
                    assert answer.status_code == 200, answer.text
                refused = client.post("promoted/sample", json={"x": "none"})
                assert 400 <= refused.status_code < 500
                return unseen(prometheus, expected, since)

            until(missing, 90.0)
            total = 'sum by (outcome) (ray_sbi_serve_requests_total{experiment="experiment"})'
            outcomes = {labels["outcome"] for labels, _ in prometheus.values(total)}
            assert {"ok", "bad_request"} <= outcomes <= {"ok", "bad_request", "not_found"}
    finally:
        process.terminate()
        process.communicate(timeout=60)
