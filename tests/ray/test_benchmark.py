"""``sbi-dist benchmark``: through kills to the same table, and on from what is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ray.conftest import command, environment, titled, wait_until

QUICK = (
    "benchmark", "two_moons", "gaussian_mixture", "--sizes", "400", "--observations", "3",
    "--num-draws", "1000", "--store", "runs", "--set", "train.hidden_features=16",
    "--set", "train.transforms=3",
)  # fmt: skip


def test_kills_change_nothing(
    ray_address: str, tmp_path: Path, sbi_dist: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    log = (tmp_path / "log").open("w")
    with subprocess.Popen(
        command(*QUICK), cwd=tmp_path, env=environment(ray_address), stdout=log, stderr=log
    ) as process:
        wait_until(lambda: titled("ray::_guarded"), "a task", 180)
        os.kill(titled("ray::_guarded")[0], signal.SIGKILL)
        wait_until(lambda: [*tmp_path.glob("runs/*/benchmark/*/observation-*")], "a record")
        process.kill()
    records = {
        path: path.read_bytes() for path in tmp_path.glob("runs/*/benchmark/*/observation-*")
    }
    assert 0 < len(records) < 6
    done = sbi_dist(*QUICK)
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.glob("runs/benchmark/*/table.json")
    rows = json.loads(table.read_text())["rows"]
    assert {(row["task"], len(row["observations"])) for row in rows} == {
        ("two_moons", 3),
        ("gaussian_mixture", 3),
    }
    assert all(path.read_bytes() == content for path, content in records.items())
    assert (table.parent / "c2st.png").stat().st_size > 10_000
    assert (table.parent / "table.txt").read_text() in done.stdout

    # Elsewhere, in one go.
    again = sbi_dist(*[part if part != "runs" else "calm" for part in QUICK])
    assert again.returncode == 0, again.stderr
    calm = json.loads(next(tmp_path.glob("calm/benchmark/*/table.json")).read_text())["rows"]
    for ours, theirs in zip(rows, calm, strict=True):
        assert ours["task"] == theirs["task"]
        assert ours["observations"] == pytest.approx(theirs["observations"], abs=1e-9)
        assert 0.45 < ours["c2st"] < 1.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("two_moon",), "TASK is 'two_moon' (did you mean 'two_moons'?)"),
        (("two_moons", "--sizes", "1e3"), "--sizes is '1e3'; it must be whole numbers"),
        (("two_moons", "--observations", "11"), "--observations is 11; it must be from 1 to 10"),
        (("two_moons", "--num-draws", "10"), "--num-draws is 10; it must be from 100"),
        (("two_moons", "--set", "problem=a:b"), "choose with TASK and --sizes"),
        (("two_moons", "--set", "train.bins=1"), "bins is 1; it must be at least 2"),
    ],
)
def test_what_it_refuses(
    given: tuple[str, ...],
    expected: str,
    tmp_path: Path,
    sbi_dist: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = sbi_dist("benchmark", *given)
    assert done.returncode == 2 and expected in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
