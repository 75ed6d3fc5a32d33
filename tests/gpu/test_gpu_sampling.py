"""Draws on a GPU, by the steps and by the fused kernels: those of nflows and of a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.ensemble import Ensemble
from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.posterior.noise import normal_noise, stream_keys
from sbi_dist.posterior.sampler import Sampler
from sbi_dist.posterior.sampler.program import compile_flow
from tests.shipped import as_shipped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

CUDA = torch.device("cuda")
CASES = [
    (1, {}),
    (2, {"blocks": 1, "hidden_features": 11}),
    (3, {}),
    (5, {"bins": 5, "blocks": 3}),
    (10, {}),
    (3, {"hidden_features": 100}),
]


def stirred(module: Any) -> Any:
    """Its weights moved away from their start as training does."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return module.eval()


def estimator(kind: str, features: int = 3, **options: Any) -> DensityEstimator:
    rng = np.random.default_rng(0)
    theta, x = rng.uniform(-2, 2, (100, features)), rng.normal(size=(100, 4))
    box = np.full(features, -2.0), np.full(features, 2.0)
    scales = Standardization.fit(theta, x, *box, "linear")
    return stirred(DensityEstimator(TrainOptions(estimator=kind, **options), scales, (4,)))


def by_nflows(flow: nn.Module, noise: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """u (D, K, M) and log |du / dnoise| (K, M), in float64 on the CPU."""
    flat = noise.double().flatten(1).T
    repeated = context.double().repeat(noise.shape[1], 1)
    u, log_det = flow.double()._transform.inverse(flat, context=repeated)  # type: ignore
    return u.T.reshape(noise.shape), log_det.view(noise.shape[1:])


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    scale = tolerance * max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(ours.cpu().double(), theirs.double(), rtol=0, atol=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("features", "options"), CASES)
@pytest.mark.parametrize("kind", ["nsf", "maf"])
@torch.no_grad()
def test_the_steps_give_what_nflows_gives(kind, features, options, dtype) -> None:
    model = stirred(ConditionalFlow(TrainOptions(estimator=kind, **options), features, (4,)))
    context, noise = torch.randn(7, 4), torch.randn(features, 50, 7)
    u, log_det = by_nflows(as_shipped(model), noise, context)
    like = torch.zeros((), dtype=dtype, device=CUDA)
    program = compile_flow(model.to(dtype).flow._transform, features).to(like)
    run = program.run(50, 7, like)
    run.given(program.conditions(context.to(like)))
    run.tile.by_observation(run.tile.features).copy_(noise)
    run.inverse(True)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    close(run.tile.by_observation(run.tile.features), u, tolerance)
    close(run.tile.log_det.view(50, 7), log_det, tolerance)


@pytest.mark.parametrize(("draws", "observations"), [(1000, 1), (300, 3), (10, 200), (1, 300)])
@pytest.mark.parametrize(("features", "options"), CASES)
@pytest.mark.parametrize("kind", ["nsf", "maf"])
@torch.no_grad()
def test_the_kernels_give_what_nflows_gives(kind, features, options, draws, observations) -> None:
    pytest.importorskip("triton")
    from sbi_dist.posterior.sampler.triton_launch import FusedFlow

    model = stirred(ConditionalFlow(TrainOptions(estimator=kind, **options), features, (4,)))
    context, noise = torch.randn(observations, 4), torch.randn(features, draws, observations)
    shipped, transform = as_shipped(model), model.flow._transform
    program = compile_flow(transform, features).to(torch.zeros((), device=CUDA))
    fused = FusedFlow(program, transform, CUDA)
    expected, log_det = by_nflows(shipped, noise, context)
    conditions = program.conditions(context.to(CUDA))
    u, log_q = fused.sample(noise.to(CUDA), conditions, True)
    close(u, expected)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(noise.double()).sum(0)
    assert log_q is not None
    close(log_q, normal - log_det)
    keys = torch.randint(0, 2**32, (observations, 2))
    noise = normal_noise(keys, 5, draws, features)
    u, _ = fused.draw(keys.to(CUDA), 5, draws, conditions)
    close(u, by_nflows(shipped, noise, context)[0])


def test_noise_is_that_of_the_cpu() -> None:
    keys = stream_keys(np.arange(3.0, dtype=np.float32)[:, None], "model", 0)
    for first in (0, 2**32 - 5):
        on_gpu = normal_noise(keys.to(CUDA), first, 1000, 7)
        torch.testing.assert_close(on_gpu.cpu(), normal_noise(keys, first, 1000, 7))


@pytest.mark.parametrize(("observations", "draws"), [(1, 5000), (300, 20)])
@pytest.mark.parametrize("kind", ["nsf", "maf", "ensemble", "large"])
def test_a_gpu_draws_what_a_cpu_draws(kind, observations, draws) -> None:
    """For the same seed; the density too. No kernel takes the large one."""
    if kind == "ensemble":
        model: Any = Ensemble([estimator("nsf"), estimator("maf")])
    else:
        model = estimator("nsf" if kind == "large" else kind)
    if kind == "large":
        model = estimator("nsf", hidden_features=200)
    x = torch.randn(observations, 4)
    found = []
    for device in (torch.device("cpu"), CUDA):
        sampler = Sampler(model, device)
        theta, log_q = sampler.draw(x, draws, "model", 3, with_log_prob=True)
        assert log_q is not None
        again = sampler.log_prob(theta.transpose(0, 1).contiguous(), x).T
        found.append((theta, log_q, again))
    (theta, log_q, again), (theta_gpu, log_q_gpu, again_gpu) = found
    close(theta_gpu, theta)
    # A draw near an edge of the support is rounded to float32, and the density with it.
    for ours, theirs in ((log_q_gpu, log_q), (again_gpu, again)):
        error = (ours - theirs).abs()
        assert float(error.median()) < 1e-5 and float(error.quantile(0.99)) < 1e-3
    if kind == "large":
        assert "128 units" in Sampler(model, CUDA).how


@pytest.mark.parametrize(("observations", "draws"), [(1, 10_000_000), (1_000_000, 10)])
def test_big_batches_in_bounded_memory(observations, draws) -> None:
    sampler = Sampler(estimator("nsf"), CUDA)
    x = torch.randn(observations, 4)
    torch.cuda.reset_peak_memory_stats()
    theta, _ = sampler.draw(x, draws, "model", 0)
    assert theta.shape == (observations, draws, 3)
    assert theta.abs().max() <= 2
    assert torch.cuda.max_memory_allocated() < 4 * 2**30
    first, _ = sampler.draw(x[-1:], 5, "model", 0)
    torch.testing.assert_close(theta[-1:, :5], first, rtol=0, atol=4e-5)
