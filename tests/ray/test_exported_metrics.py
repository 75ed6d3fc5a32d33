"""Metrics that processes of a Ray cluster set are there to be scraped from the node they run on."""

from __future__ import annotations

import math
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

# A process sends its metrics every 10 s by default; once a second is the least that Ray allows.
OFTEN = {"env_vars": {"RAY_metrics_report_interval_ms": "1000"}}
PATIENCE_S = 30.0


class Scrape:
    """The metrics of this project at a node's metrics port."""

    def __init__(self, node: dict[str, Any]) -> None:
        port = node["MetricsExportPort"]
        assert port > 0, "the node exports no metrics; the packages of ray[default] are missing"
        self._url = f"http://{node['NodeManagerAddress']}:{port}/metrics"

    def __call__(self) -> dict[tuple[str, str, str], float]:
        """Values by name, experiment and rank."""
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(self._url, timeout=10) as answer:
            text = answer.read().decode()
        self.kinds = {}
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                # Others that use this Ray have models of other names.
                if sample.name.startswith("ray_sbi_") and sample.labels.get("model") == "m":
                    self.kinds[sample.name] = family.type
                    labels = sample.labels
                    key = (sample.name, labels["experiment"], labels.get("rank", ""))
                    assert key not in found
                    found[key] = sample.value
        return found

    def until(self, expected: dict[tuple[str, str, str], float], experiment: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = {key: value for key, value in self().items() if key[1] == experiment}
            if found == expected:
                return
            assert time.monotonic() < deadline, f"{found} is exported, not {expected}"
            time.sleep(0.1)


@pytest.fixture
def scrape(ray_session: None) -> Scrape:
    import ray

    (node,) = (node for node in ray.nodes() if node["Alive"])
    return Scrape(node)


def test_metrics_set_in_an_actor_are_scraped(scrape: Scrape, tmp_path: Path) -> None:
    import ray

    class Worker:
        """As the first worker of a training."""

        def __init__(self, folder: Path) -> None:
            from sbi_dist.estimation.live import Live
            from sbi_dist.store import LocalStore

            labels = {"experiment": "scraped", "model": "m"}
            self.live = Live(LocalStore(folder), labels, every_s=0.0)

        def step(self, number: int, loss: float, **more: Any) -> None:
            from sbi_dist.estimation.live import Snapshot

            now = Snapshot(epoch=1, step=number, steps=100, training_loss=loss, **more)
            self.live(lambda: now, {"batch_size": 50})

        def close(self) -> str:
            return self.live.close({})

    def exported(steps: int, loss: float, waits: list[float]) -> dict[tuple[str, str, str], float]:
        gauges = {
            "loss": loss,
            "epoch": 1.0,
            "learning_rate": 0.0,
            "simulations_per_second": 0.0,
            "simulations_total": 50.0 * steps,
        }
        by_rank = {
            ("ray_sbi_train_input_wait_seconds_total", "scraped", str(rank)): wait
            for rank, wait in enumerate(waits)
        }
        return by_rank | {
            (f"ray_sbi_train_{name}", "scraped", ""): value for name, value in gauges.items()
        }

    worker = ray.remote(Worker).options(num_cpus=0, runtime_env=OFTEN).remote(tmp_path)
    ray.get(worker.step.remote(1, 2.5, input_wait_seconds=[0.5, 0.25]))
    # Each series once: a counter is not there under a second name as well.
    scrape.until(exported(1, 2.5, [0.5, 0.25]), "scraped")
    assert scrape.kinds["ray_sbi_train_loss"] == "gauge"
    assert scrape.kinds["ray_sbi_train_simulations_total"] == "counter"
    for number in range(2, 5):
        ray.get(worker.step.remote(number, 2.0 - 0.1 * number, input_wait_seconds=[1.5, 0.25]))
    scrape.until(exported(4, 1.6, [1.5, 0.25]), "scraped")
    assert ray.get(worker.close.remote()) == ""
    ray.kill(worker)


def test_what_is_not_finite_is_not_exported(scrape: Scrape) -> None:
    """As the catalogue says: a gauge of it would look like a value to an alert."""
    import ray

    @ray.remote(num_cpus=0, runtime_env=OFTEN)
    class Worker:
        def set(self) -> None:
            from sbi_dist import metrics

            labels = {"experiment": "infinite", "model": "m"}
            metrics.set_gauge("sbi_train_loss", math.nan, labels)
            metrics.set_gauge("sbi_train_validation_loss", math.inf, labels)
            metrics.set_gauge("sbi_train_epoch", 1.0, labels)

    worker = Worker.remote()
    ray.get(worker.set.remote())
    scrape.until({("ray_sbi_train_epoch", "infinite", ""): 1.0}, "infinite")
    ray.kill(worker)
