"""The calibrate stage where one part is all there is: in this process, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbi_dist.calibration.held_out import HeldOut
from sbi_dist.calibration.options import CalibrateOptions
from sbi_dist.calibration.reference import Regression
from sbi_dist.calibration.stage import RANKS, calibrate, held_out_name
from sbi_dist.calibration.text import as_text
from sbi_dist.errors import InputError, StageError
from sbi_dist.estimation.bundle import save_bundle
from sbi_dist.problem import load_problem
from sbi_dist.promotion import Promotion
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.plan import Shard
from sbi_dist.simulation.shard import Simulations, encode_shard
from sbi_dist.store import LocalStore
from tests.unit.samples import about
from tests.unit.test_untrusted_bundle import made

OPTIONS = CalibrateOptions(num_simulations=120, num_draws=99)


def dataset(folder: Path, rows: int, failed: dict) -> tuple:
    rng = np.random.default_rng(rows)
    theta = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    x = rng.normal(0, 0.5, (rows, 3)).astype(np.float32)
    x[list(failed)] = np.nan
    shard = Simulations(np.arange(rows), theta, x, failed, np.zeros(rows, np.float32))
    data, record = encode_shard(shard, about(0))
    store = LocalStore(folder)
    store.put(Shard(0, 0, rows).key, data)
    return store, [record]


@pytest.fixture
def model(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "models/one")
    save_bundle(store, made(seed=1), {"parameter_names": ["a", "b"]})
    return store


@pytest.mark.parametrize("rows", [12, 60])
def test_one_part(model, tmp_path: Path, rows) -> None:
    """Also of a model of so few simulations that no regression is fitted to them."""
    failed = {3: ("error", "no"), 70: ("error", "no")}
    held_out = HeldOut("held", *dataset(tmp_path / "held", 120, failed))
    trained_on = dataset(tmp_path / "trained", rows, {})
    target = LocalStore(tmp_path / "calibration/one")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = calibrate(model, held_out, trained_on, OPTIONS, target)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert found["held_out"] == 118 and found["failed"] == 0 and found["draws"] == 99
    assert ("tarp_data" in {test["name"] for test in found["tests"]}) == (rows >= 20)
    promotion = Promotion(LocalStore(tmp_path))
    assert promotion.calibration("one") == json.loads(json.dumps(found))
    assert found["simulations"]["made"] == 120
    assert found["simulations"]["statuses"] == {"ok": 118, "error": 2}
    (failure,) = found["simulations"]["failures"]
    assert (failure["message"], failure["count"], failure["simulation_id"]) == ("no", 2, 3)
    assert "Of 120 held-out simulations 2 failed" in as_text(found)
    assert "2 x error (no)" in " ".join(as_text(found).split())
    # What is drawn is not drawn again, nor is anything read for it.
    stored = target.get(RANKS)
    trained_on[0].delete(Shard(0, 0, rows).key)
    again = calibrate(model, held_out, trained_on, OPTIONS, target)
    assert again["tests"] == found["tests"] and target.get(RANKS) == stored


def test_of_the_observed_data(model, tmp_path: Path, capsys) -> None:
    """A test by itself, which is kept; it changes nothing in the table."""
    held_out = HeldOut("held", *dataset(tmp_path / "held", 120, {}))
    trained_on = dataset(tmp_path / "trained", 60, {})
    target = LocalStore(tmp_path / "calibration/one")

    def calibrated(observed: Any) -> dict[str, Any]:
        return calibrate(model, held_out, trained_on, OPTIONS, target, observed=observed)

    without = calibrated(None)
    table = target.get(RANKS)
    one, other = calibrated([0.1, -0.2, 0.3]), calibrated(np.array([9.0, -9.0, 9.0]))
    assert "local" not in {test["name"] for test in without["tests"]}
    assert "is not tested by itself" not in capsys.readouterr().err
    local = [next(t for t in each["tests"] if t["name"] == "local") for each in (one, other)]
    assert 1 / 2000 <= local[0]["p_value"] <= 1 and local[0] != local[1]
    # One test more to correct for, and all else as before.
    assert one["alpha_fail"] < without["alpha_fail"] and target.get(RANKS) == table
    assert one["request"]["observed"] != other["request"]["observed"]
    trained_on[0].delete(Shard(0, 0, 60).key)
    assert calibrated([0.1, -0.2, 0.3])["tests"] == one["tests"]
    with pytest.raises(InputError, match=r"problem\.observed has shape \(2,\)"):
        calibrated([0.1, -0.2])


def test_of_the_observed_data_where_there_is_too_little(model, tmp_path: Path, capsys) -> None:
    few = HeldOut("few", *dataset(tmp_path / "few", 49, {}))
    held_out = HeldOut("held", *dataset(tmp_path / "held", 120, {}))
    for name, given, rows in (("few", few, 60), ("no regression", held_out, 12)):
        found = calibrate(
            model, given, dataset(tmp_path / f"trained {rows}", rows, {}), OPTIONS,
            LocalStore(tmp_path / name), observed=[0.0, 0.0, 0.0],
        )  # fmt: skip
        assert "local" not in {test["name"] for test in found["tests"]}
        assert "is not tested by itself" in capsys.readouterr().err


def test_how_many_are_held_out() -> None:
    """By itself ``run`` makes few where there are few to train on."""
    counts = [CalibrateOptions().count(rows) for rows in (20, 1000, 4000, 8000, 10**6, None)]
    assert counts == [100, 250, 1000, 2000, 2000, 2000]
    assert CalibrateOptions(num_simulations=300).count(20) == 300


def test_held_out_simulations_of_a_budget_of_time() -> None:
    """Their number is their own, whatever limits those to train on."""
    problem = load_problem("sbi_dist.problems.gaussian:problem")
    budget = SimulateOptions(num_simulations=None, max_seconds=60.0)
    names = {
        held_out_name(problem, CalibrateOptions(num_simulations=count), options)
        for count in (100, 5000)
        for options in (budget, SimulateOptions())
    }
    assert len(names) == 1


def test_where_every_simulation_failed(model, tmp_path: Path) -> None:
    failed = dict.fromkeys(range(120), ("error", "no"))
    held_out = HeldOut("held", *dataset(tmp_path / "held", 120, failed))
    with pytest.raises(StageError, match=r"gave data.* 120 x error \(no\)"):
        calibrate(model, held_out, dataset(tmp_path / "t", 60, {}), OPTIONS, LocalStore(tmp_path))


def test_a_long_x_is_looked_at_in_part() -> None:
    """The parameters are in every number of x, so that some of them tell as much."""
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(400, 1))
    x = (theta + 0.1 * rng.normal(size=(400, 50_000))).astype(np.float32)
    regression = Regression.fit(theta, x.reshape(400, 50, 1000), seed=0)
    assert len(regression.x_mean) <= 2048 and regression.r2[0] > 0.9
    assert regression.predict(x[:0].reshape(0, 50, 1000)).shape == (0, 1)
