"""Several workers, as processes that torch connects: they take the steps of one."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing

from sbi_dist.estimation.loop import fit
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.workers import Workers

OPTIONS = TrainOptions(
    transforms=2, hidden_features=16, blocks=1, bins=6, batch_size=50, max_epochs=6
)


def simulations() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    theta = rng.standard_normal((700, 2), dtype=np.float32)
    return theta, theta**3 + np.float32(0.5) * rng.standard_normal((700, 2), dtype=np.float32)


def train(rank: int, count: int, folder: str, options: TrainOptions = OPTIONS) -> dict[str, Any]:
    """One worker; the first one leaves its history and weights in the folder."""
    torch.set_num_threads(1)
    if count > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count
        )
    unbounded = np.full(2, -math.inf), np.full(2, math.inf)
    estimator, history = fit(*simulations(), unbounded, options, Workers(rank, count))
    state = {"history": history, "weights": estimator.flow.state_dict()}
    torch.save(state, f"{folder}/worker-{rank}")
    if count > 1:
        torch.distributed.destroy_process_group()
    return state


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return train(0, 1, folder)


@pytest.mark.parametrize("count", [2, 4])
def test_workers_together_follow_one_alone(count: int, alone, tmp_path: Path) -> None:
    # Forked, as importing torch again takes them seconds each.
    torch.multiprocessing.start_processes(
        train, (count, str(tmp_path)), nprocs=count, start_method="fork"
    )
    states = [torch.load(tmp_path / f"worker-{rank}") for rank in range(count)]
    for state in states[1:]:
        for name, weights in states[0]["weights"].items():
            assert torch.equal(state["weights"][name], weights)
    together, single = states[0]["history"], alone["history"]
    assert together["epoch"] == single["epoch"]
    assert together["training_simulations"] == single["training_simulations"]
    # The same rows in the same steps: what differs is the order in which float32 numbers are
    # added up, some 1e-7 a step, which the 6 x 12 steps may magnify.
    for name in ("validation_loss", "training_loss"):
        ours, theirs = (np.array(each[name][1:]) for each in (together, single))
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert single["validation_loss"][-1] < single["validation_loss"][0] - 0.05
