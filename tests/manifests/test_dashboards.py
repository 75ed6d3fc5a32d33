"""The dashboards: that they are what their source builds, and that they can be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.monitoring import DASHBOARDS, GRAFANA, dashboards, panels

UNITS = {"short", "s", "bytes", "reqps", "percentunit", "percent"}


def test_the_committed_files_are_what_the_source_builds(tmp_path: Path) -> None:
    build = [sys.executable, "-B", str(GRAFANA / "build.py"), str(tmp_path)]
    subprocess.run(build, check=True, timeout=60)
    built = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in DASHBOARDS.iterdir()}
    assert built == committed, f"run python {GRAFANA.relative_to(GRAFANA.parents[1])}/build.py"


@pytest.mark.parametrize("name", dashboards())
def test_panels_can_be_read(name: str) -> None:
    dashboard = dashboards()[name]
    assert dashboard["uid"] == f"sbi-dist-{name}" and dashboard["title"]
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(set(titles)) == len(titles) > 5
    for panel in panels(dashboard):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        letters = [target["refId"] for target in panel["targets"]]
        assert letters and len(set(letters)) == len(letters)
        assert all(target["legendFormat"] for target in panel["targets"])
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


@pytest.mark.parametrize("name", dashboards())
def test_panels_have_a_place_and_a_number_of_their_own(name: str) -> None:
    everything = dashboards()[name]["panels"]
    numbers = [panel["id"] for panel in everything]
    assert len(set(numbers)) == len(numbers)
    taken: dict[tuple[int, int], str] = {}
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} is over {taken[x, y]}"
                taken[x, y] = panel["title"]


@pytest.mark.parametrize("name", dashboards())
def test_experiment_and_model_are_chosen_above(name: str) -> None:
    variables = {entry["name"]: entry for entry in dashboards()[name]["templating"]["list"]}
    assert list(variables) == ["datasource", "experiment", "model"]
    expressions = [
        target["expr"] for panel in panels(dashboards()[name]) for target in panel["targets"]
    ]
    of_nodes = [text for text in expressions if "ray_node_" in text]
    for text in expressions:
        assert ('experiment=~"$experiment"' in text) != (text in of_nodes), text
    assert any('model=~"$model"' in text for text in expressions)
    # The default of both, with which everything is to be seen.
    assert variables["experiment"]["allValue"] == variables["model"]["allValue"] == ".*"
    assert variables["experiment"]["current"]["value"] == "$__all"


def test_provisioning_names_what_is_there() -> None:
    folder = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["isDefault"]
    (provider,) = yaml.safe_load((folder / "dashboards/sbi_dist.yml").read_text())["providers"]
    assert provider["type"] == "file" and provider["options"]["path"]
