"""The infer stage on Ray, while actors and drivers are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sbi_dist import BoxUniform, Problem, metrics
from sbi_dist.catalog import driver, plan
from sbi_dist.catalog.infer import infer
from sbi_dist.catalog.options import InferOptions
from sbi_dist.catalog.source import ArraySource, open_catalog
from sbi_dist.catalog.table import read_draws
from sbi_dist.errors import InputError, StageError
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.store import LocalStore, ObjectStore
from tests.ray import catalogs
from tests.ray.catalogs import BAD, HIGH, LOW, NUM_SAMPLES, PARTS, ROWS
from tests.ray.conftest import command, environment, titled, wait_until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    return catalogs.save_model(LocalStore(tmp_path_factory.mktemp("model")))


def actors() -> list[int]:
    """Process ids of the actors that draw."""
    return titled("ray::CatalogActor")


@contextlib.contextmanager
def inferring(place: Path, address: str) -> Iterator[subprocess.Popen[str]]:
    """``sbi-dist infer`` in a folder."""
    with open(place / "log", "a") as log:
        process = subprocess.Popen(
            command("infer", "experiment.yaml", "--observations", "c.parquet", "--output", "out"),
            cwd=place,
            env=environment(address),
            stdout=log,
            stderr=log,
            text=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_kills_change_nothing(ray_address: str, tmp_path: Path) -> None:
    """An actor, the driver, and the driver by a signal; then bit for bit what is calmly drawn."""
    experiment = LocalStore(tmp_path / "runs/experiment")
    model = catalogs.save_model(experiment)
    catalogs.write_experiment(tmp_path)
    path = tmp_path / "c.parquet"
    path.write_bytes(catalogs.catalog())
    target = LocalStore(tmp_path / "out")
    catalogs.begin(model, str(path), target)
    expected = catalogs.calm(model, str(path), LocalStore(tmp_path / "calm"))
    assert len(expected) == PARTS

    def parts() -> dict[str, int]:
        return {each.name: each.stat().st_mtime_ns for each in target.root.glob("part-*")}

    def log() -> str:
        return (tmp_path / "log").read_text()

    with inferring(tmp_path, ray_address) as job:
        wait_until(lambda: len(parts()) >= 4 or job.poll() is not None, "parts")
        os.kill(wait_until(actors, "an actor")[0], signal.SIGKILL)
        at_kill = len(parts())
        wait_until(lambda: len(parts()) >= at_kill + 6 or job.poll() is not None, "parts")
        # Which Ray may take longer to notice than the others to go on.
        told = "an actor died at part"
        wait_until(lambda: told in log() or job.poll() is not None, "the death is told")
        assert job.poll() is None, log()
        job.kill()
        job.wait()
    wait_until(lambda: not actors(), "the actors are gone with their driver", 20)
    first = parts()
    with inferring(tmp_path, ray_address) as job:
        wait_until(lambda: len(parts()) >= len(first) + 4 or job.poll() is not None, "parts")
        assert job.poll() is None, (tmp_path / "log").read_text()
        began = time.monotonic()
        job.send_signal(signal.SIGTERM)
        assert job.wait(10) == 143
        assert time.monotonic() - began < 3.0
    assert "what is finished is kept" in (tmp_path / "log").read_text()
    assert len(parts()) < PARTS, "the signal was to come in the middle"
    with inferring(tmp_path, ray_address) as job:
        assert job.wait(120) == 0, (tmp_path / "log").read_text()

    assert catalogs.stored(target) == expected
    assert {name: parts()[name] for name in first} == first, "a part was written again"
    read = read_draws(target)
    assert read.ids == [f"galaxy {row}" for row in range(ROWS)]
    assert {row: read.statuses[row] for row in BAD} == BAD
    manifest = json.loads(target.get("manifest.json"))
    assert manifest["statuses"] == {"nonfinite": 1, "null": 2, "ok": ROWS - 4, "wrong_length": 1}
    assert manifest["draws"] == (ROWS - 4) * NUM_SAMPLES
    edge = read.draws[500]
    assert np.isfinite(edge).all() and (edge >= LOW).all() and (edge <= HIGH).all()
    good = [row for row in range(ROWS) if row not in BAD]
    assert np.isfinite(read.draws[good]).all() and np.isfinite(read.columns["map"][good]).all()
    wait_until(lambda: not actors(), "the actors are gone", 20)


# ---- in this process ----------------------------------------------------------------------------

X = np.random.default_rng(0).uniform(LOW, HIGH, (90, 2)).astype(np.float32)


@pytest.fixture
def run(ray_session: None, model: ObjectStore, tmp_path: Path, monkeypatch) -> Any:
    """Run the stage with parts of 10 rows, by default for observations in memory."""
    monkeypatch.setattr(plan, "_PART_ROWS", 10)

    def infer_into(folder: str, source: Any = None, problem: Any = None, **options: Any) -> Any:
        target = LocalStore(tmp_path / folder)
        infer(
            Posterior.from_store(model),
            model,
            source or ArraySource.of("c", X),
            InferOptions(**{"num_samples": 50, "actors": 2, **options}),
            target,
            problem,
            show_progress=False,
            experiment="e",
        )
        return read_draws(target)

    return infer_into


def simulator(theta: np.ndarray, rng: Any) -> np.ndarray:
    return theta + 0.1 * rng.standard_normal(2)


def likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    if x[0] > 50:
        os._exit(1)  # as a crash does
    return -0.5 * (((theta - x) / 0.1) ** 2).sum(1) - 2 * np.log(0.1 * np.sqrt(2 * np.pi))


PROBLEM = Problem(BoxUniform(LOW, HIGH), simulator, log_likelihood=likelihood)


def test_weights_on_actors_are_those_of_one_process(run: Any, monkeypatch, model) -> None:
    read = run("weighted", problem=PROBLEM, proposals=2000, output="both")
    monkeypatch.setattr(plan, "_PART_ROWS", 90)
    calm = run("calm", problem=PROBLEM, proposals=2000, output="both")
    assert read.statuses == calm.statuses and "ok" in read.statuses
    for name in ("effective_sample_size", "log_evidence", "mean", "map"):
        np.testing.assert_allclose(read.columns[name], calm.columns[name], rtol=1e-3, atol=1e-4)
    # The evidence is 1/4 where the likelihood lies within the prior's box, of area 4.
    inside = ((np.add(LOW, 0.4) < X) & (np.subtract(HIGH, 0.4) > X)).all(axis=1)
    good = inside & (np.array(read.statuses) == "ok")
    worth = read.effective_sample_sizes[good]
    # With S effective of N draws, the relative error of a mean weight is sqrt((N / S - 1) / N).
    error = np.sqrt((2000 / worth - 1) / 2000)
    assert good.sum() > 10
    assert (np.abs(read.columns["log_evidence"][good] + np.log(4)) < 5 * error).all()


def test_a_part_that_keeps_ending_its_actors_is_named(run: Any, tmp_path: Path) -> None:
    x = X.copy()
    x[47, 0] = 60.0
    with pytest.raises(
        StageError, match=r"part 4 \(observations 40 to 49\) has ended its actor 4 times.*are kept"
    ):
        run("out", ArraySource.of("c", x), PROBLEM, proposals=1000)
    left = {path.name for path in (tmp_path / "out").glob("part-*")}
    assert "part-000004.parquet" not in left and len(left) >= 4
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_file_that_is_replaced_is_noticed(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"

    def write(x: np.ndarray) -> None:
        pq.write_table(pa.table({"x": x.tolist()}), path)

    write(X)
    source = open_catalog(str(path), (2,))
    write(X + 0.1)
    with pytest.raises(StageError, match=r"c\.parquet was changed or removed while it was read"):
        run("out", source)
    assert not list((tmp_path / "out").glob("part-*"))


def test_rows_of_a_file_are_sent_to_other_machines(run: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(driver, "_nodes", lambda: 2)
    np.save(tmp_path / "c.npy", X)
    source = open_catalog(str(tmp_path / "c.npy"), (2,))
    read = source.read
    asked = []
    monkeypatch.setattr(source, "read", lambda *rows: asked.append(rows) or read(*rows))
    monkeypatch.setattr(type(source), "__getstate__", lambda self: {"on_disk": True}, raising=False)
    found = run("sent", source)
    assert sorted(asked) == [(start, start + 10) for start in range(0, 90, 10)]
    np.testing.assert_allclose(found.draws, run("memory").draws, atol=1e-5)


def test_metrics(run: Any, monkeypatch) -> None:
    told: dict[tuple[str, str], list[float]] = {}

    def note(name: str, value: float, labels: dict[str, str]) -> None:
        assert labels["experiment"] == "e" and labels["catalog"] == "c"
        told.setdefault((name, labels.get("status", "")), []).append(value)

    monkeypatch.setattr(metrics, "add", note)
    monkeypatch.setattr(metrics, "set_gauge", note)
    x = X.copy()
    x[5] = np.nan
    run("out", ArraySource.of("c", x))
    assert sum(told["sbi_infer_observations_total", "ok"]) == 89
    assert told["sbi_infer_observations_total", "nonfinite"] == [1]
    assert told["sbi_infer_draws_total", ""] and sum(told["sbi_infer_draws_total", ""]) == 89 * 50
    assert told["sbi_infer_parts_total", ""] == [1] * 9
    assert len(told["sbi_infer_observations_per_second", ""]) >= 9
    assert told["sbi_infer_seconds_left", ""][-1] == 0
    for name, _ in told:
        assert name in metrics.CATALOGUE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actors": 5000}, r"infer\.actors asks for 5000 x 1 = 5000 CPUs"),
        ({"gpus_per_actor": 64}, r"infer\.actors asks for 2 x 64 = 128 GPUs"),
        ({"actors": None, "cpus_per_actor": 999}, r"an actor of the infer stage asks for 1 x 999"),
    ],
)
def test_a_cluster_that_is_too_small_is_told(run: Any, options, message) -> None:
    with pytest.raises(InputError, match=message):
        run("out", **options)
