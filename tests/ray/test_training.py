"""The train stage on Ray: disturbed at random it ends with the weights of a calm run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sbi_dist.errors import InputError, StageError
from sbi_dist.estimation.bundle import load_bundle
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.trainer import train
from sbi_dist.posterior import Posterior
from sbi_dist.simulation.shard import Simulations, encode_shard
from sbi_dist.store import LocalStore
from tests.ray.conftest import Nodes, wait_until
from tests.ray.faults import Disturbed, fit_in, weights_of


@pytest.fixture(scope="module")
def calm(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """A store with a model that was trained without disturbance, by two workers."""
    root = LocalStore(tmp_path_factory.mktemp("calm"))
    fit_in(root)
    return root


def test_killed_workers_and_drivers_are_not_seen_in_the_weights(
    calm: LocalStore, ray_address: str, tmp_path: Path
) -> None:
    """Kill -9 of a worker, of all workers and of the driver, and SIGTERM: bit for bit."""
    root = LocalStore(tmp_path)
    disturbed = Disturbed(root, ray_address, seed=1)
    disturbed.wait_for_progress()
    disturbed.kill_workers(1)
    disturbed.wait_for_progress()
    disturbed.kill_workers()
    disturbed.wait_for_progress()
    disturbed.kill()
    disturbed.wait_for_progress()
    disturbed.stop()
    disturbed.finish()
    assert weights_of(root) == weights_of(calm)
    history, other = (json.loads(store.get("model/metrics.json")) for store in (root, calm))
    assert history["validation_loss"] == other["validation_loss"]
    about, other = (json.loads(store.get("model/bundle.json")) for store in (root, calm))
    assert about["out_of_distribution"] == other["out_of_distribution"]
    assert about["out_of_distribution"]["simulations"] == history["validation_simulations"]
    assert not list(root.list("model/checkpoints/")) and not list(root.list("model/failed"))
    # 1,200 rows, of which 6 failed; two workers with half of each batch.
    assert history["training_simulations"] + history["validation_simulations"] == 1194
    # A finished job that is run again returns at once, and changes nothing.
    before = (tmp_path / "model/bundle.json").stat().st_mtime_ns
    fit_in(root)
    assert (tmp_path / "model/bundle.json").stat().st_mtime_ns == before


def test_a_machine_that_is_taken_away(cluster: Nodes, tmp_path: Path) -> None:
    """A notice brings a checkpoint, from which the job goes on with the workers that are left."""
    root = LocalStore(tmp_path)
    node = cluster.others[-1]
    disturbed = Disturbed(
        root,
        cluster.address,
        seed=3,
        workers=cluster.cpus(),
        min_workers=1,
        cpus_per_worker=1,
        max_epochs=70,
        checkpoint_every_s=1e6,
        dropout=0.0,
    )
    try:
        wait_until(lambda: root.exists("model/metrics.json"), "the first steps")
        assert not list(root.list("model/checkpoints/"))
        cluster.drain(node, 60.0)
        disturbed.wait_for_progress(30)
        cluster.remove(node)
        disturbed.finish()
    finally:
        disturbed.process.kill()
        if node not in cluster.others:
            cluster.add()
    history = json.loads(root.get("model/metrics.json"))
    assert history["epoch"] == list(range(71))
    # Batches are the same for any number of workers; float32 sums of others' order is all that
    # parts this from a calm run.
    alone = LocalStore(tmp_path / "alone")
    fit_in(alone, workers=0, max_epochs=70, dropout=0.0)
    calm = json.loads(alone.get("model/metrics.json"))
    assert abs(history["best_validation_loss"] - calm["best_validation_loss"]) < 0.02


def test_an_ensemble_trains_side_by_side(ray_session: None, tmp_path: Path) -> None:
    root = LocalStore(tmp_path)
    about = fit_in(root, ensemble=2, workers=1, max_epochs=4)
    assert len(about["training"]["members"]) == 2
    x = torch.tensor([[0.0, 0.0], [30.0, 0.0]])
    _, p_values = Posterior.from_store(root.child("model")).out_of_distribution(x)
    assert p_values[0] > 0.5 and p_values[1] < 0.01
    estimator, _ = load_bundle(root.child("model"))
    first, second = estimator.members
    assert not any(
        left.equal(right)
        for left, right in zip(first.flow.parameters(), second.flow.parameters(), strict=True)
        if left.ndim == 2 and left.abs().sum() > 0
    )
    left = [key.partition("/tensorboard/")[1] for key in root.list("model/members/")]
    assert set(left) == {"/tensorboard/"}


def test_workers_that_never_start(ray_session: None, tmp_path: Path, monkeypatch) -> None:
    import ray

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    root = LocalStore(tmp_path)
    with pytest.raises(InputError, match=r"train\.workers asks for 3 x 4 = 12 CPUs"):
        fit_in(root, workers=3, cpus_per_worker=4)

    @ray.remote(num_cpus=1)
    class Holder:
        def ready(self) -> bool:
            return True

    holders = [Holder.remote() for _ in range(int(ray.cluster_resources()["CPU"]))]
    try:
        ray.get([holder.ready.remote() for holder in holders])
        with pytest.raises(StageError, match=r"2 worker\(s\) .* did not start in time"):
            fit_in(root)
    finally:
        for holder in holders:
            ray.kill(holder)


def test_what_a_worker_finds_wrong_is_told_as_it_is(ray_session: None, tmp_path: Path) -> None:
    root = LocalStore(tmp_path)
    with pytest.raises(InputError, match=r"train\.workers is 2, more than"):
        fit_in(root, batch_size=1)  # which can't be shared
    assert not root.exists("model/bundle.json")


def test_simulations_that_all_failed(ray_session: None, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    rows = np.full((50, 2), np.nan, dtype=np.float32)
    failed = dict.fromkeys(range(50), ("error", "ValueError: no such rate"))
    ids, seconds = np.arange(50), np.zeros(50, dtype=np.float32)
    simulations = Simulations(ids, np.zeros_like(rows), rows, failed, seconds)
    data, record = encode_shard(simulations, {"shard": 0, "x_shape": [2]})
    store.put("dataset/shard-000000.parquet", data)
    unbounded = np.full(2, -np.inf), np.full(2, np.inf)
    with pytest.raises(InputError, match=r"50 of 50 simulations failed.*50 x error .*no such rate"):
        train(store.child("dataset"), [record], unbounded, store.child("model"), TrainOptions(), {})
