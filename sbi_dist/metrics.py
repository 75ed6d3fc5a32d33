"""The one catalogue of metric names, and how processes of a Ray cluster export them.

A metric is exported on the metrics port of the node it is set on, in Prometheus' text format, with
Ray's prefix: ``sbi_train_loss`` is scraped as ``ray_sbi_train_loss``. Ray needs the packages of
``ray[default]`` for that port. In a process that is not connected to Ray nothing is exported, yet
names and labels are checked all the same.

Ray sends values to the port every ten seconds. It forgets a gauge that was not set again for about
twenty, so gauges are to be set on a timer; a value that is not finite is not exported. A counter is
there from its first increment on. What a metric means is decided by the stage that sets it.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["CATALOGUE", "Metric", "add", "set_gauge"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric: counters only grow and end with ``_total``, gauges go up and down."""

    name: str
    kind: Literal["gauge", "counter"]
    description: str
    labels: tuple[str, ...] = ("experiment", "model")


_BY_RANK = ("experiment", "model", "rank")
_OF_CATALOG = ("experiment", "catalog")

CATALOGUE: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "sbi_train_loss",
            "gauge",
            "Mean training loss of the epoch so far, in nats.",
        ),
        Metric(
            "sbi_train_validation_loss",
            "gauge",
            "Validation loss of the last epoch that ended, in nats.",
        ),
        Metric(
            "sbi_train_best_validation_loss",
            "gauge",
            "Lowest validation loss so far, in nats.",
        ),
        Metric("sbi_train_learning_rate", "gauge", "Learning rate of the last step."),
        Metric("sbi_train_epoch", "gauge", "Number of the epoch, from 1."),
        Metric(
            "sbi_train_simulations_total",
            "counter",
            "Simulations that training steps were taken on by all workers, anew in each epoch.",
        ),
        Metric(
            "sbi_train_simulations_per_second",
            "gauge",
            "Rate at which all workers together train on simulations.",
        ),
        Metric(
            "sbi_train_input_wait_seconds_total",
            "counter",
            "Time that a worker waited for simulations to train on.",
            _BY_RANK,
        ),
        Metric(
            "sbi_train_seconds_left",
            "gauge",
            "Expected time to the end of the training, at most.",
        ),
        Metric(
            "sbi_train_skipped_steps_total",
            "counter",
            "Steps that were not taken as their loss or gradient was not finite.",
        ),
        Metric("sbi_train_checkpoints_total", "counter", "Checkpoints written to the store."),
        Metric(
            "sbi_train_restarts_total",
            "counter",
            "Times that a training went on after its workers were lost.",
        ),
        Metric(
            "sbi_infer_observations_total",
            "counter",
            "Observations of a catalog whose results were stored, by status.",
            (*_OF_CATALOG, "status"),
        ),
        Metric(
            "sbi_infer_draws_total",
            "counter",
            "Posterior draws whose results were stored.",
            _OF_CATALOG,
        ),
        Metric(
            "sbi_infer_parts_total",
            "counter",
            "Parts of a catalog's results that were stored.",
            _OF_CATALOG,
        ),
        Metric(
            "sbi_infer_actor_deaths_total",
            "counter",
            "Times that an actor was lost while it drew for a part.",
            _OF_CATALOG,
        ),
        Metric(
            "sbi_infer_observations_per_second",
            "gauge",
            "Rate at which results of observations are stored, over the run so far.",
            _OF_CATALOG,
        ),
        Metric(
            "sbi_infer_seconds_left",
            "gauge",
            "Expected time to the end of the catalog.",
            _OF_CATALOG,
        ),
    )
}

_made: dict[str, Any] = {}
_making = threading.Lock()


def set_gauge(name: str, value: float, labels: Mapping[str, str]) -> None:
    """Set a gauge of the catalogue; nothing where this process is not connected to Ray.

    Raises:
        ValueError: no gauge of this name is in the catalogue, or its labels are others.
    """
    _check(name, "gauge", labels)
    if _in_ray():
        _exported(name).set(float(value), dict(labels))


def add(name: str, amount: float, labels: Mapping[str, str]) -> None:
    """Add to a counter of the catalogue; nothing where this process is not connected to Ray.

    Raises:
        ValueError: no counter of this name is in the catalogue, its labels are others, or the
            amount is negative.
    """
    _check(name, "counter", labels)
    if not amount >= 0:
        raise ValueError(f"{name} can't grow by {amount}; a counter never decreases")
    if amount > 0 and _in_ray():
        _exported(name).inc(float(amount), dict(labels))


def _check(name: str, kind: str, labels: Mapping[str, str]) -> None:
    metric = CATALOGUE.get(name)
    if metric is None or metric.kind != kind:
        raise ValueError(f"{name!r} is no {kind} of the catalogue in sbi_dist/metrics.py; add it")
    if set(labels) != set(metric.labels):
        raise ValueError(
            f"{name} has the labels {', '.join(metric.labels)}; given: {', '.join(labels)}"
        )


def _in_ray() -> bool:
    ray = sys.modules.get("ray")  # where it was never imported, it is not connected either
    return ray is not None and ray.is_initialized()


def _exported(name: str) -> Any:
    with _making:
        if name not in _made:
            from ray.util import metrics

            metric = CATALOGUE[name]
            kind = {"gauge": metrics.Gauge, "counter": metrics.Counter}[metric.kind]
            _made[name] = kind(name, metric.description, metric.labels)
        return _made[name]
