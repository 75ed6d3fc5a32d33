"""``sbi-dist calibrate``: through kills to the same outcome; which model is in use then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from sbi_dist.calibration.table import from_arrow
from sbi_dist.experiment import load_experiment
from sbi_dist.pipeline import Pipeline
from sbi_dist.posterior.posterior import PROMOTED
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.store import LocalStore
from tests.ray.conftest import command, environment, titled, wait_until, write_experiment

HELD_OUT, DRAWS = 300, 50_000  # in 15 parts of a million draws
SIZE = (
    "--set", f"calibrate.num_simulations={HELD_OUT}", "--set", f"calibrate.num_draws={DRAWS}",
)  # fmt: skip


def actors() -> list[int]:
    """Process ids of the actors that draw."""
    return titled("ray::CalibrationActor")


def test_kills_change_nothing(
    ray_address: str, tmp_path: Path, sbi_dist: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """An actor and the driver are killed; the table is that of one process that is left alone."""
    write_experiment(tmp_path)
    for stage in ("simulate", "train"):
        done = sbi_dist(stage, "experiment.yaml")
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/experiment/calibration"

    def parts() -> list[Path]:
        return list(folder.glob("*/parts-*/part-*"))

    log = (tmp_path / "log").open("w")
    with subprocess.Popen(
        command("calibrate", "experiment.yaml", *SIZE),
        cwd=tmp_path, env=environment(ray_address), stdout=log, stderr=log,
    ) as process:  # fmt: skip
        wait_until(lambda: len(parts()) >= 2, "two parts")
        os.kill(actors()[0], signal.SIGKILL)
        wait_until(lambda: len(parts()) >= 6, "more parts")
        process.kill()
    assert not list(folder.glob("*/calibration.json"))
    kept = {path: path.stat().st_mtime_ns for path in parts()}
    done = sbi_dist("calibrate", "experiment.yaml", *SIZE)
    assert "Traceback" not in done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(parts()) == HELD_OUT * DRAWS // 10**6

    # The same by one process, in one part after the other.
    stored = next(folder.glob("*/ranks.parquet")).read_bytes()
    experiment, base = load_experiment(
        str(tmp_path / "experiment.yaml"),
        [f"store={tmp_path / 'runs'}", *SIZE[1::2], "calibrate.actors=1"],
    )
    for path in [*parts(), *folder.glob("*/ranks.parquet")]:
        path.unlink()
    Pipeline(experiment, base, ray_address).calibrate()
    assert next(folder.glob("*/ranks.parquet")).read_bytes() == stored

    found = json.loads(next(folder.glob("*/calibration.json")).read_text())
    assert done.returncode == (3 if found["verdict"] == "fail" else 0), done.stdout
    assert found["held_out"] == HELD_OUT and " ".join(found["summary"].split()) in " ".join(
        done.stdout.split()
    )
    held_out = Dataset(LocalStore(next((folder / "simulations").iterdir())))
    simulations = held_out.read_all(sorted(held_out.indexes()))
    trained_on = Dataset(LocalStore(next((tmp_path / "runs/experiment/simulations").iterdir())))
    theta = trained_on.read_all(sorted(trained_on.indexes())).theta
    assert len(simulations) == HELD_OUT
    assert not np.isin(simulations.theta[:, 0], theta[:, 0]).any()
    ranks, names = from_arrow(pq.read_table(next(folder.glob("*/ranks.parquet"))))
    assert names == ["a", "b"] and ranks.draws == DRAWS
    assert np.array_equal(ranks.theta.astype(np.float32), simulations.theta)


# Its posterior has two modes, which one epoch does not find.
SQUARED = """
from sbi_dist import BoxUniform, Problem


def simulator(theta, rng):
    return theta[:, :1] ** 2 + 0.05 * rng.standard_normal((len(theta), 1))


problem = Problem(BoxUniform([-1.0], [1.0]), simulator, observed=[0.25])
"""
LONG, SHORT = ("--set", "train.max_epochs=200"), ("--set", "train.max_epochs=1")


def test_run_calibrates_by_itself(
    tmp_path: Path, sbi_dist: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A first model that fails is drawn from, and not put in use; the exit code tells."""
    write_experiment(tmp_path, SQUARED, num_simulations=4000, shard_size=1000)
    given = ("experiment.yaml", "--set", "calibrate.enabled=true", *SHORT)
    store = tmp_path / "runs/experiment"
    for attempt in ("first", "again"):
        done = sbi_dist("run", *given)
        assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.count("failed its calibration (") == 1
        assert "; no model is in use; " in done.stderr and not (store / PROMOTED).exists()
        assert "posterior draws: " in done.stdout and "\nfail: Not calibrated" in done.stdout
        assert "<strong>Fail.</strong>" in (store / "report/index.html").read_text()
        (path,) = store.glob("calibration/*/calibration.json")
        found = json.loads(path.read_text())
        # A quarter of those to train on, and the observed data by themselves.
        assert found["held_out"] == 1000 and found["simulations"]["statuses"] == {"ok": 1000}
        assert "local" in {test["name"] for test in found["tests"]}
        if attempt == "first":
            stored = {each: each.stat().st_mtime_ns for each in path.parent.rglob("*.*")}
    assert {each: each.stat().st_mtime_ns for each in path.parent.rglob("*.*")} == stored

    refused = sbi_dist("infer", *given)
    assert refused.returncode == 2 and "has no model in use" in refused.stderr
    # It failed with 1,000, which fewer do not undo.
    fewer = sbi_dist("calibrate", *given, "--set", "calibrate.num_simulations=999")
    assert fewer.returncode == 2 and "with 1,000, which weighs more" in fewer.stderr

    # Nothing is left to simulate or to draw: no Ray is needed, here one that is not there.
    same = subprocess.run(
        command("calibrate", *given, "--set", "calibrate.num_simulations=1000"),
        cwd=tmp_path, env=environment("127.0.0.1:9"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert same.returncode == 3 and "no Ray cluster" not in same.stderr, same.stderr
    more = subprocess.run(
        command("calibrate", *given),
        cwd=tmp_path, env=environment("127.0.0.1:9"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert more.returncode == 2 and "no Ray cluster" in more.stderr, more.stderr


def test_only_a_model_that_passes_replaces_one_that_passed(
    tmp_path: Path, sbi_dist: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    write_experiment(tmp_path, SQUARED, num_simulations=4000, shard_size=1000)
    store = tmp_path / "runs/experiment"

    def run(command: str, *given: str) -> subprocess.CompletedProcess[str]:
        done = sbi_dist(command, "experiment.yaml", *given)
        assert "Traceback" not in done.stdout + done.stderr
        return done

    def promoted() -> str:
        return json.loads((store / PROMOTED).read_text())["model"]

    def verdict(model: str) -> str:
        return json.loads((store / f"calibration/{model}/calibration.json").read_text())["verdict"]

    early = run("calibrate")
    assert early.returncode == 2 and "run `sbi-dist simulate` first" in early.stderr
    assert run("simulate").returncode == 0
    untrained = run("calibrate")
    assert untrained.returncode == 2 and "run `sbi-dist train` first" in untrained.stderr
    assert run("train", *LONG).returncode == 0
    good = promoted()
    done = run("calibrate", *LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdict(good) in ("pass", "warn") and promoted() == good
    assert run("infer", *LONG).returncode == 0
    assert run("report", *LONG).returncode == 0
    page = (store / "report/index.html").read_text()
    assert "<h2>Calibration</h2>" in page and (store / "report/calibration.png").is_file()

    trained = run("train", *SHORT)
    bad = trained.stdout.strip().rpartition("/")[2]
    assert trained.returncode == 0 and f"model {good} stays in use" in trained.stderr
    failed = run("calibrate", *SHORT)
    assert failed.returncode == 3 and verdict(bad) == "fail", failed.stdout
    assert f"in use is {good}" in failed.stderr and promoted() == good
    whole = run("run", *SHORT)  # with a calibrated model in use, all that follow have to be
    assert whole.returncode == 3 and promoted() == good, whole.stderr
    by_hand = run("promote", "--model", bad)
    assert by_hand.returncode == 2 and "--force" in by_hand.stderr and promoted() == good
    assert run("calibrate", "--force", *SHORT).returncode == 0
    assert promoted() == bad
    forced = run("run", *SHORT, "--set", "calibrate.enabled=true")
    assert forced.returncode == 3 and promoted() == bad  # who forced it wants it
    assert "it is in use by force, and stays so" in forced.stderr
    assert run("calibrate", *SHORT).returncode == 3
    assert promoted() == good  # the one before it, which passed
