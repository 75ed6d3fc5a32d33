"""``sbi-dist benchmark``: through kills to the same table, and on from what is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.ray.conftest import Run, command, environment, titled, wait_until

# Five observations are judged together: of six, the last one has a record long before the others,
# or long after.
QUICK = (
    "benchmark", "two_moons", "gaussian_mixture", "--sizes", "400", "--observations", "6",
    "--num-draws", "150", "--store", "runs", "--set", "train.hidden_features=16",
    "--set", "train.transforms=3", "--set", "train.max_epochs=20",
)  # fmt: skip


def test_kills_change_nothing(ray_address: str, tmp_path: Path, sbi_dist: Run) -> None:
    log = (tmp_path / "log").open("w")
    with subprocess.Popen(
        command(*QUICK), cwd=tmp_path, env=environment(ray_address), stdout=log, stderr=log
    ) as process:
        os.kill(wait_until(lambda: titled("ray::_guarded"), "a task", 180)[0], signal.SIGKILL)
        wait_until(lambda: [*tmp_path.glob("runs/*/benchmark/*/observation-*")], "a record")
        process.kill()
    records = {
        path: path.read_bytes() for path in tmp_path.glob("runs/*/benchmark/*/observation-*")
    }
    assert 0 < len(records) < 12
    done = sbi_dist(*QUICK)
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.glob("runs/benchmark/*/table.json")
    rows = json.loads(table.read_text())["rows"]
    assert {(row["task"], len(row["observations"])) for row in rows} == {
        ("two_moons", 6),
        ("gaussian_mixture", 6),
    }
    assert all(path.read_bytes() == content for path, content in records.items())
    assert (table.parent / "c2st.png").stat().st_size > 10_000
    assert (table.parent / "table.txt").read_text() in done.stdout
    page = (table.parent / "index.html").read_text()
    assert all(f"{row['c2st']:.3f}" in page for row in rows)

    # Elsewhere, in one go.
    again = sbi_dist(*[part if part != "runs" else "calm" for part in QUICK])
    assert again.returncode == 0, again.stderr
    calm = json.loads(next(tmp_path.glob("calm/benchmark/*/table.json")).read_text())["rows"]
    for ours, theirs in zip(rows, calm, strict=True):
        assert ours["task"] == theirs["task"]
        assert ours["observations"] == pytest.approx(theirs["observations"], abs=1e-9)
        assert 0.45 < ours["c2st"] < 1.0
