"""A dashboard is rows of panels, and a panel is expressions with what is needed to read them.

Where a panel goes follows from its place in the list. Ray's histograms have sums that are
approximate, so that there is no mean to be had of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = [
    "OF_EXPERIMENT",
    "OF_MODEL",
    "Panel",
    "dashboard",
    "gauge",
    "quantiles",
    "rate",
    "recorded",
    "total",
]

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _PANEL, _HEIGHT = 24, 8, 8


@dataclasses.dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: what is shown.
        description: how to read it.
        unit: Grafana's name of the unit.
        queries: pairs of an expression and the legend of its series.
        kind: Grafana's panel type.
        lines: values at which a line is drawn.
    """

    title: str
    description: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    lines: tuple[float, ...] = ()

    def json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """As Grafana reads it, at a place in the grid."""
        steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
        steps += [{"color": "red", "value": line} for line in self.lines]
        defaults: dict[str, Any] = {
            "unit": self.unit,
            "thresholds": {"mode": "absolute", "steps": steps},
        }
        options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"]}}
        options |= {"colorMode": "none", "textMode": "value_and_name"}
        if self.kind == "timeseries":
            style = "dashed" if self.lines else "off"
            defaults["custom"] = {"thresholdsStyle": {"mode": style}, "showPoints": "never"}
            options = {
                "legend": {"displayMode": "list", "placement": "bottom"},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": _SOURCE,
            "gridPos": {"x": x, "y": y, "w": _PANEL, "h": _HEIGHT},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": options,
            "targets": [
                {
                    "refId": "ABCDEFGH"[index],
                    "datasource": _SOURCE,
                    "expr": expression,
                    "legendFormat": legend,
                }
                for index, (expression, legend) in enumerate(self.queries)
            ],
        }


def dashboard(uid: str, title: str, models: str, rows: dict[str, list[Panel]]) -> dict[str, Any]:
    """A dashboard as Grafana reads it.

    Args:
        uid: its name in addresses, which links rely on.
        title: its title.
        models: the series whose labels the choices of experiment and model come from.
        rows: panels by heading.
    """
    panels: list[dict[str, Any]] = []
    y = 0
    for heading, content in rows.items():
        place = {"x": 0, "y": y, "w": _WIDTH, "h": 1}
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": heading,
                "collapsed": False,
                "gridPos": place,
                "panels": [],
            }
        )
        y += 1
        across = _WIDTH // _PANEL
        for index, panel in enumerate(content):
            x = index % across * _PANEL
            panels.append(panel.json(len(panels) + 1, x, y + index // across * _HEIGHT))
        y += -(-len(content) // across) * _HEIGHT
    return {
        "uid": uid,
        "title": title,
        "tags": ["sbi_dist"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "10s",
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "links": [
            {"type": "dashboards", "title": "sbi_dist", "tags": ["sbi_dist"], "asDropdown": False}
        ],
        "templating": {"list": _variables(models)},
        "panels": panels,
    }


def _variables(models: str) -> list[dict[str, Any]]:
    source = {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
    }
    queries = {
        "experiment": 'label_values({__name__=~"ray_sbi_.*"}, experiment)',
        "model": f'label_values({models}{{experiment=~"$experiment"}}, model)',
    }
    chosen = [
        {
            "name": name,
            "label": name.capitalize(),
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        }
        for name, query in queries.items()
    ]
    return [source, *chosen]


# Of the experiments and models that are chosen above a dashboard.
OF_EXPERIMENT = '{experiment=~"$experiment"}'
OF_MODEL = '{experiment=~"$experiment", model=~"$model"}'


def rate(metric: str, by: str, labels: str = OF_EXPERIMENT) -> str:
    """Growth of a counter a second."""
    return f"sum by ({by}) (rate(ray_{metric}{labels}[$__rate_interval]))"


def total(metric: str, by: str, labels: str = OF_EXPERIMENT) -> str:
    """A counter of rare events as it is: its first increment is no growth to Prometheus."""
    return f"sum by ({by}) (ray_{metric}{labels})"


def _quantile(q: float, metric: str, by: str, labels: str = OF_EXPERIMENT) -> str:
    return f"histogram_quantile({q:g}, {rate(f'{metric}_bucket', f'{by}, le', labels)})"


def quantiles(metric: str, by: str, labels: str = OF_EXPERIMENT) -> tuple[tuple[str, str], ...]:
    """Queries of the quantiles of a histogram."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return tuple(
        (_quantile(q, metric, by, labels), f"{legend} {100 * q:g} %") for q in (0.5, 0.95, 0.99)
    )


def gauge(metric: str, by: str, labels: str = OF_EXPERIMENT) -> str:
    """Value of a gauge, the largest of several processes."""
    return f"max by ({by}) (ray_{metric}{labels})"


def recorded(rule: str, labels: str = OF_EXPERIMENT) -> str:
    """What a recording rule has made."""
    return f"{rule}{labels}"
