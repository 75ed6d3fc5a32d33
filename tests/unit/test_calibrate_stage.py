"""The calibrate stage where one part is all there is: in this process, without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sbi_dist.calibration.held_out import HeldOut
from sbi_dist.calibration.options import CalibrateOptions
from sbi_dist.calibration.reference import Regression
from sbi_dist.calibration.stage import RANKS, calibrate
from sbi_dist.errors import StageError
from sbi_dist.estimation.bundle import save_bundle
from sbi_dist.promotion import Promotion
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
    # What is drawn is not drawn again, nor is anything read for it.
    stored = target.get(RANKS)
    trained_on[0].delete(Shard(0, 0, rows).key)
    again = calibrate(model, held_out, trained_on, OPTIONS, target)
    assert again["tests"] == found["tests"] and target.get(RANKS) == stored


def test_where_every_simulation_failed(model, tmp_path: Path) -> None:
    failed = dict.fromkeys(range(120), ("error", "no"))
    held_out = HeldOut("held", *dataset(tmp_path / "held", 120, failed))
    with pytest.raises(StageError, match="no held-out simulation gave data"):
        calibrate(model, held_out, dataset(tmp_path / "t", 60, {}), OPTIONS, LocalStore(tmp_path))


def test_a_long_x_is_looked_at_in_part() -> None:
    """The parameters are in every number of x, so that some of them tell as much."""
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(400, 1))
    x = (theta + 0.1 * rng.normal(size=(400, 50_000))).astype(np.float32)
    regression = Regression.fit(theta, x.reshape(400, 50, 1000), seed=0)
    assert len(regression.x_mean) <= 2048 and regression.r2[0] > 0.9
    assert regression.predict(x[:0].reshape(0, 50, 1000)).shape == (0, 1)
