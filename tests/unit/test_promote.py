"""Which model of an experiment is in use: `sbi-dist promote`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sbi_dist.cli import run_command
from sbi_dist.estimation.bundle import WEIGHTS, save_bundle
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.posterior.posterior import PROMOTED
from sbi_dist.store import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """The store of ``gaussian`` with models one and two, of which none is promoted."""
    rng = np.random.default_rng(0)
    theta = rng.uniform(-2, 2, (50, 3)).astype(np.float32)
    ends = np.full(3, 2.0)
    standardization = Standardization.fit(theta, theta + 1, -ends, ends, "linear")
    options = TrainOptions(transforms=1, hidden_features=8, blocks=1)
    store = LocalStore(tmp_path)
    for name in ("one", "two"):
        estimator = DensityEstimator(options, standardization, (3,))
        save_bundle(store.child(f"gaussian/models/{name}"), estimator, {})
    return store.child("gaussian")


def promote(store: LocalStore, model: str) -> int:
    root = store.uri.rpartition("/")[0]
    return run_command(["promote", "gaussian", "--store", root, "--model", model])


def promoted(store: LocalStore) -> str:
    return json.loads(store.get(PROMOTED))["model"]


def test_promote_and_go_back(store, capsys) -> None:
    assert promote(store, "one") == 0 and promoted(store) == "one"
    assert promote(store, "two") == 0 and promoted(store) == "two"
    assert promote(store, "two") == 0  # again: the former one stays one
    capsys.readouterr()
    assert promote(store, "former") == 0 and promoted(store) == "one"
    assert capsys.readouterr().out == "one\n"
    assert promote(store, "former") == 0 and promoted(store) == "two"


def test_what_can_t_be_promoted(store, capsys) -> None:
    assert promote(store, "former") == 2
    assert "no model was in use before; give one of one, two" in capsys.readouterr().err
    assert promote(store, "ones") == 2
    assert "did you mean 'one'?" in capsys.readouterr().err
    for path in ("../models/one", "one/..", ""):
        assert promote(store, path) == 2
    store.put(f"models/two/{WEIGHTS}", b"nothing")
    assert promote(store, "one") == 0
    assert promote(store, "two") == 2
    assert "is damaged" in capsys.readouterr().err
    assert promoted(store) == "one"
