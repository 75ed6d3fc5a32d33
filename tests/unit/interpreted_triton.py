"""The fused kernels in Triton's interpreter, on a CPU; ``test_triton.py`` runs these tests."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.posterior.noise import normal_noise
from sbi_dist.posterior.sampler.compiled import CompiledEstimator
from sbi_dist.posterior.sampler.program import FlowProgram, compile_flow
from sbi_dist.posterior.sampler.triton_launch import FusedFlow
from tests.shipped import as_shipped

CPU = torch.device("cpu")
SMALL = {"transforms": 2, "hidden_features": 11, "blocks": 1, "bins": 4}


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    """Its weights moved away from their start as training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return module.eval()


def made(features: int, **options: Any) -> tuple[ConditionalFlow, FlowProgram, FusedFlow]:
    model: Any = ConditionalFlow(TrainOptions(**{**SMALL, **options}), features, (4,))
    transform = stirred(model).flow._transform
    program = compile_flow(transform, features).to(torch.zeros(()))
    return model, program, FusedFlow(program, transform, CPU)


def random_keys(observations: int) -> Tensor:
    return torch.randint(0, 2**32, (observations, 2))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


def by_nflows(model: ConditionalFlow, noise: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """u (D, K, M) and its log density (K, M), in float64."""
    size, draws, observations = noise.shape
    flat = noise.double().reshape(size, -1).T
    repeated = context.double().repeat(draws, 1)
    u, log_det = as_shipped(model).double()._transform.inverse(flat, context=repeated)
    log_q = -0.5 * (flat**2).sum(1) - 0.5 * size * math.log(2 * math.pi) - log_det
    return u.T.reshape(noise.shape), log_q.view(draws, observations)


# Features, draws and observations: tiles of one observation and of several, the last part empty.
@pytest.mark.parametrize(
    ("estimator", "features", "draws", "observations", "options"),
    [
        ("nsf", 1, 70, 1, {}),
        ("nsf", 2, 5, 7, {"blocks": 2, "bins": 17}),
        ("nsf", 3, 260, 2, {"transforms": 1}),
        ("nsf", 3, 13, 3, {"hidden_features": 50, "blocks": 2, "bins": 10}),
        ("nsf", 5, 3, 22, {"blocks": 3}),
        ("nsf", 10, 10, 4, {"hidden_features": 50, "bins": 10}),
        ("nsf", 3, 9, 3, {"hidden_features": 70, "transforms": 1}),
        ("maf", 1, 70, 1, {}),
        ("maf", 2, 5, 13, {"blocks": 2}),
        ("maf", 3, 13, 3, {"hidden_features": 50, "blocks": 2}),
        ("maf", 5, 3, 7, {"blocks": 3}),
        ("maf", 10, 10, 4, {"hidden_features": 50}),
        ("maf", 3, 9, 3, {"hidden_features": 70, "transforms": 1}),
    ],
)
@torch.no_grad()
def test_same_noise_same_draws(estimator, features, draws, observations, options) -> None:
    model, program, fused = made(features, estimator=estimator, **options)
    context = torch.randn(observations, 4)
    conditions = program.conditions(context)
    # Some points beyond the splines' interval.
    noise = 2 * torch.randn(features, draws, observations)
    u, log_q = fused.sample(noise, conditions, True)
    expected_u, expected_log_q = by_nflows(model, noise, context)
    assert u.dtype == torch.float32 and log_q is not None
    close(u, expected_u)
    scale = expected_log_q.abs().clamp_min(1)
    close(log_q / scale, expected_log_q / scale)


@pytest.mark.parametrize("first", [3, 2**32 - 2])
@torch.no_grad()
def test_noise_of_the_kernel_is_that_of_the_cpu(first) -> None:
    """The same draws of the keys' streams as of the noise that a CPU makes of them."""
    _, program, fused = made(10, estimator="maf", transforms=1)
    keys = random_keys(3)
    conditions = program.conditions(torch.randn(3, 4))
    u, log_q = fused.draw(keys, first, 5, conditions, True)
    expected_u, expected_log_q = fused.sample(normal_noise(keys, first, 5, 10), conditions, True)
    close(u, expected_u)
    assert log_q is not None and expected_log_q is not None
    close(log_q, expected_log_q)


@torch.no_grad()
def test_columns_of_any_observations() -> None:
    _, program, fused = made(3, estimator="nsf")
    conditions = program.conditions(torch.randn(5, 4))
    noise, which = torch.randn(3, 40), torch.randint(5, (40,))
    of_all, _ = fused.sample(noise[:, :, None].expand(3, 40, 5), conditions)
    expected = of_all[:, torch.arange(40), which]
    assert torch.equal(fused.sample_columns(noise, conditions, which), expected)


@torch.no_grad()
def test_part_of_more_noise_and_no_draws() -> None:
    """Noise whose numbers are not side by side, as of one number more than the flow takes."""
    _, program, fused = made(2, estimator="nsf")
    conditions = program.conditions(torch.randn(4, 4))
    noise = torch.randn(3, 6, 4)[:2, ::2]
    u, _ = fused.sample(noise, conditions)
    assert torch.equal(u, fused.sample(noise.clone(), conditions)[0])
    assert fused.sample(noise[:, :0], conditions)[0].shape == (2, 0, 4)


@pytest.mark.parametrize("estimator", ["nsf", "maf"])
@torch.no_grad()
def test_an_observation_far_from_all_others_gives_numbers(estimator) -> None:
    _, program, fused = made(2, estimator=estimator)
    conditions = program.conditions(torch.tensor([[1e30] * 4, [0.1] * 4]))
    u, _ = fused.sample(torch.randn(2, 3, 2), conditions)
    assert torch.isfinite(u).all()


@pytest.mark.parametrize("with_log_prob", [False, True])
@torch.inference_mode()
def test_an_estimator_draws_with_it(with_log_prob) -> None:
    rng = np.random.default_rng(0)
    theta, x = rng.uniform(size=(50, 2)), rng.normal(size=(50, 4))
    scales = Standardization.fit(theta, x, np.zeros(2), np.ones(2), "linear")
    with torch.inference_mode(False):
        estimator: Any = stirred(DensityEstimator(TrainOptions(**SMALL), scales, (4,)))
        steps, fused = CompiledEstimator(estimator, CPU), CompiledEstimator(estimator, CPU)
    program: Any = fused._program
    fused._fused = FusedFlow(program, estimator.flow.flow._transform, CPU)
    keys = random_keys(3)
    conditions = steps.conditions(torch.randn(3, 4))
    noise, which = normal_noise(keys, 2, 6, 2), torch.tensor([0, 2, 2])
    pairs = zip(
        [
            *fused.sample(noise, conditions, with_log_prob),
            *fused.draw(keys, 2, 6, conditions, with_log_prob),
            fused.sample_columns(noise[:, 0], conditions, which, apart=False),
        ],
        [
            *steps.sample(noise, conditions, with_log_prob),
            *steps.draw(keys, 2, 6, conditions, with_log_prob),
            steps.sample_columns(noise[:, 0], conditions, which, apart=False),
        ],
        strict=True,
    )
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            close(ours, theirs)
