"""How processes of a Ray cluster export metrics of the catalogue."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from sbi_dist.metrics.catalogue import CATALOGUE

__all__ = ["add", "observe", "set_gauge"]

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


def observe(name: str, values: Sequence[float], labels: Mapping[str, str]) -> None:
    """Count values in a histogram of the catalogue; nothing where this process is not in Ray.

    Raises:
        ValueError: no histogram of this name is in the catalogue, or its labels are others.
    """
    _check(name, "histogram", labels)
    if values and _in_ray():
        exported, tags = _exported(name), dict(labels)
        for value in values:
            exported.observe(float(value), tags)


def _check(name: str, kind: str, labels: Mapping[str, str]) -> None:
    metric = CATALOGUE.get(name)
    if metric is None or metric.kind != kind:
        raise ValueError(
            f"{name!r} is no {kind} of the catalogue in sbi_dist/metrics/catalogue.py; add it"
        )
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
            about = (metric.name, metric.description)
            if metric.kind == "histogram":
                _made[name] = metrics.Histogram(*about, list(metric.boundaries), metric.labels)
            else:
                kind = {"gauge": metrics.Gauge, "counter": metrics.Counter}[metric.kind]
                _made[name] = kind(*about, metric.labels)
        return _made[name]
