"""Metrics that processes of a Ray cluster set are there to be scraped from the node they run on."""

from __future__ import annotations

import math
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.ray.conftest import wait_until

# A process sends its metrics every 10 s by default; once a second is the least that Ray allows.
OFTEN = {"env_vars": {"RAY_metrics_report_interval_ms": "1000"}}
PATIENCE_S = 30.0


class Scrape:
    """The metrics of this project at a node's metrics port."""

    def __init__(self, node: dict[str, Any]) -> None:
        port = node["MetricsExportPort"]
        assert port > 0, "the node exports no metrics; the packages of ray[default] are missing"
        self._url = f"http://{node['NodeManagerAddress']}:{port}/metrics"

    def families(self) -> list[Any]:
        """All that the port has."""
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(self._url, timeout=10) as answer:
            return list(text_string_to_metric_families(answer.read().decode()))

    def __call__(self) -> dict[tuple[str, str, str], float]:
        """Values by name, experiment and rank."""
        self.kinds = {}
        found = {}
        for family in self.families():
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


def samples(scrape: Scrape, metric: str, experiment: str) -> dict[tuple[str, str], float]:
    """Samples of one metric by suffix and one label more: ``le`` or status."""
    found = {}
    for family in scrape.families():
        if family.name.removesuffix("_total") == f"ray_{metric}".removesuffix("_total"):
            for sample in family.samples:
                if sample.labels["experiment"] == experiment:
                    more = sample.labels.get("le") or sample.labels.get("status") or ""
                    found[sample.name.removeprefix(f"ray_{metric}"), more] = sample.value
    return found


def test_histograms_have_exact_counts_and_sums_made_up_from_them(scrape: Scrape) -> None:
    """Why no panel shows a mean: a value counts as the middle of its bucket in a sum."""
    import ray

    @ray.remote(num_cpus=0, runtime_env=OFTEN)
    class Replica:
        def observe(self, values: list[float]) -> None:
            from sbi_dist import metrics

            labels = {"experiment": "measured", "operation": "sample"}
            metrics.observe("sbi_serve_request_seconds", values, labels)

    replica = Replica.remote()
    # Below the first bound, on a bound, within, and above the last one.
    ray.get(replica.observe.remote([0.0, 0.5, 0.4]))
    ray.get(replica.observe.remote([]))
    ray.get(replica.observe.remote([1.7, 100.0]))

    def counts() -> dict[tuple[str, str], float]:
        return samples(scrape, "sbi_serve_request_seconds", "measured")

    wait_until(lambda: counts().get(("_count", "")) == 5.0, "five values are exported")
    found = counts()
    buckets = {float(le): value for (suffix, le), value in found.items() if suffix == "_bucket"}
    at = {bound: buckets[bound] for bound in (0.001, 0.25, 0.5, 1.0, 2.5, 60.0, math.inf)}
    assert at == {0.001: 1, 0.25: 1, 0.5: 3, 1.0: 3, 2.5: 4, 60.0: 4, math.inf: 5}
    made_up = 0.0005 + 2 * (0.25 + 0.5) / 2 + (1.0 + 2.5) / 2 + 2 * 60.0
    assert found["_sum", ""] == pytest.approx(made_up)
    ray.kill(replica)


def test_the_driver_of_the_simulate_stage_is_scraped(scrape: Scrape, tmp_path: Path) -> None:
    import ray

    @ray.remote(num_cpus=0, runtime_env=OFTEN)
    def drive(folder: Path) -> int:
        import numpy as np

        from sbi_dist import BoxUniform, Problem
        from sbi_dist.simulation.driver import simulate
        from sbi_dist.simulation.options import SimulateOptions
        from sbi_dist.store import LocalStore

        def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
            if theta[0] > 0.75:
                raise ValueError("too large")
            return theta + rng.standard_normal(1)

        options = SimulateOptions(num_simulations=300, shard_size=100, max_failure_fraction=1.0)
        records = simulate(
            Problem(BoxUniform([0.0], [1.0]), simulator, version="1"),
            options,
            LocalStore(folder),
            show_progress=False,
            labels={"experiment": "simulated", "dataset": "d"},
        )
        time.sleep(3.0)  # the process is to live until it has told
        return sum(record.failures for record in records)

    failures = ray.get(drive.remote(tmp_path))
    assert 30 < failures < 130

    def stored() -> dict[tuple[str, str], float]:
        return samples(scrape, "sbi_simulate_simulations_total", "simulated")

    wait_until(lambda: sum(stored().values()) == 300, "300 simulations are told of")
    assert stored() == {("", "ok"): 300.0 - failures, ("", "error"): float(failures)}
    assert samples(scrape, "sbi_simulate_shards_total", "simulated") == {("", ""): 3.0}
    (busy,) = samples(scrape, "sbi_simulate_busy_seconds_total", "simulated").values()
    assert 0 < busy < 60
    (rate,) = samples(scrape, "sbi_simulate_simulations_per_second", "simulated").values()
    (left,) = samples(scrape, "sbi_simulate_seconds_left", "simulated").values()
    (actors,) = samples(scrape, "sbi_simulate_actors", "simulated").values()
    assert rate > 0 and left >= 0 and actors >= 0
