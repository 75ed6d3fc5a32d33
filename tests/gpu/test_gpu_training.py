"""Training on a GPU: the same numbers as on a CPU, and in bounded steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.loop import fit
from sbi_dist.estimation.optimize import Optimization
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.workers import Workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

CUDA = torch.device("cuda")


def made(options: TrainOptions) -> ConditionalFlow:
    torch.manual_seed(0)
    flow = ConditionalFlow(options, 3, (4,))
    with torch.no_grad():  # away from the identity that it starts as
        for parameter in flow.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return flow


@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_density_and_gradient_are_those_of_the_cpu(estimator: str) -> None:
    u, x = torch.randn(257, 3).double(), torch.randn(257, 4).double()
    found = []
    for device in ("cpu", "cuda"):
        flow = made(TrainOptions(estimator=estimator, transforms=3)).double().to(device)
        log_q = flow(u.to(device), x.to(device))
        log_q.sum().backward()
        gradient = torch.cat([weight.grad.reshape(-1).cpu() for weight in flow.parameters()])
        found.append((log_q.detach().cpu(), gradient))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_recorded_steps_are_those_taken_one_by_one(estimator: str) -> None:
    options = TrainOptions(estimator=estimator, transforms=3)
    u, x = torch.randn(10, 200, 3, device=CUDA), torch.randn(10, 200, 4, device=CUDA)
    weights = []
    for recorded in (True, False):
        optimization = Optimization(made(options).to(CUDA), options, Workers(device=CUDA), 200)
        if not recorded:
            optimization._gradient = optimization._accumulate  # type: ignore[method-assign]
        for step in range(10):
            optimization.step(u[step], x[step], 1e-3, 0.5)
        weights.append(optimization.weights.clone())
    # float32 sums that a GPU may take in another order
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def simulate(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    theta = rng.uniform(-2, 2, (count, 3)).astype(np.float32)
    return theta, theta + 1 + np.float32(0.1) * rng.standard_normal((count, 3), dtype=np.float32)


@pytest.mark.parametrize("changes", [{}, {"embedding": "fully_connected"}, {"dropout": 0.1}])
def test_it_finds_what_a_cpu_finds(changes: dict[str, Any]) -> None:
    theta, x = simulate(10_000)
    box = np.full(3, -2.0), np.full(3, 2.0)
    options = TrainOptions(max_epochs=10, transforms=3, **changes)
    losses = []
    for device in ("cpu", "cuda"):
        estimator, history = fit(theta, x, box, options, Workers(device=torch.device(device)))
        assert next(estimator.flow.parameters()).device.type == "cpu"
        losses.append(history["best_validation_loss"])
    # Validation losses of the same 1,000 rows; training paths part by rounding, and dropout's
    # masks are others.
    assert abs(losses[0] - losses[1]) < 0.03
    assert losses[1] < 3 * (math.log(0.1) + 0.5 * math.log(2 * math.pi * math.e)) + 0.2
