"""Draws on a GPU: ``python -m tests.gpu.sampling``.

nflows as shipped, the compiled flow step by step, the same through torch.compile, and the fused
kernel. Counted are draws a second of theta on the device, the noise and the observations' share
included, and ``to host``: what :meth:`Sampler.draw` gives, in the host's memory. The last column is
the part that the networks' products make up of the device's rate at products as exact as float32:
of float16, three for one. With ``sweep``, other shapes of the kernel's tiles are timed.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.posterior.noise import normal_noise, stream_keys
from sbi_dist.posterior.sampler import Sampler
from sbi_dist.posterior.sampler.compiled import CompiledEstimator
from tests.shipped import as_shipped

CUDA = torch.device("cuda")
SIZES = [(3, 3), (10, 50)]  # of theta and x
SHAPES = [(1, 1_000_000), (100, 1000), (10_000, 100), (100_000, 10)]
# Rows that go through nflows, and columns through the steps, at once.
ROWS = 2**18


def seconds(work: Callable[[], object]) -> float:
    """Of a call, after two that warm up: the median of several."""
    for _ in range(2):
        work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.5 and len(times) < 50):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def peak(dtype: torch.dtype) -> float:
    """Floating-point operations a second of large matrix products."""
    matrix = torch.randn(8192, 8192, device=CUDA, dtype=dtype)
    return 2 * 8192**3 / seconds(lambda: matrix @ matrix)


def made(kind: str, features: int, numbers: int) -> DensityEstimator:
    """An estimator of the default sizes, away from its start."""
    rng = np.random.default_rng(0)
    theta, x = rng.uniform(-2, 2, (100, features)), rng.normal(size=(100, numbers))
    box = np.full(features, -2.0), np.full(features, 2.0)
    scales = Standardization.fit(theta, x, *box, "linear")
    estimator = DensityEstimator(TrainOptions(estimator=kind), scales, (numbers,))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in estimator.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return estimator.eval()


def by_nflows(member: CompiledEstimator, x: torch.Tensor, draws: int) -> Callable[[], None]:
    """nflows' own modules, as its ``sample`` uses them: the context repeated for each draw."""
    model = member._estimator
    transform: Any = as_shipped(model.flow).to(CUDA)._transform
    scales = model.standardization

    def work() -> None:
        context = model.embed(x.to(CUDA)).repeat_interleave(draws, 0)
        for part in context.split(ROWS):
            noise = torch.randn(len(part), model.num_parameters, device=CUDA)
            scales.theta(transform.inverse(noise, context=part)[0])

    return work


def by_steps(
    member: CompiledEstimator, x: torch.Tensor, keys: torch.Tensor, draws: int, compiled: bool
) -> Callable[[], None]:
    """The steps, eagerly or through torch.compile, a tile at a time."""
    each = min(draws, ROWS)
    rows = min(len(x), max(1, ROWS // each))
    run: Any = member._program.run(each, rows, member._like)
    inverse = torch.compile(run.inverse) if compiled else run.inverse
    values = run.tile.by_observation(run.tile.features)

    def work() -> None:
        for start in range(0, len(x) - rows + 1, rows):
            some = slice(start, start + rows)
            run.given(member.conditions(x[some]))
            for first in range(0, draws - each + 1, each):
                values.copy_(normal_noise(keys[some], first, each, member.size))
                inverse(False)
                member._theta(values, None)

    # What is left over at the ends is not computed: it counts less than it would take to compile.
    return work


def by_kernel(
    member: CompiledEstimator, x: torch.Tensor, keys: torch.Tensor, draws: int
) -> Callable[[], None]:
    return lambda: member.draw(keys, 0, draws, member.conditions(x))[0]  # type: ignore


def counted(draws: int, observations: int) -> int:
    """Draws that :func:`by_steps` computes."""
    each = min(draws, ROWS)
    rows = min(observations, max(1, ROWS // each))
    return observations // rows * rows * (draws // each * each)


def to_host(sampler: Sampler, x: torch.Tensor, draws: int) -> Callable[[], object]:
    return lambda: sampler.draw(x, draws, "model", 0)


def rate(total: int, make: Callable[..., Callable[[], object]], *given: Any) -> float | str:
    """Draws a second of what ``make`` makes of the rest, or why there are none."""
    try:
        return total / seconds(make(*given))
    except Exception as error:
        return type(error).__name__


def shown(value: float | str) -> str:
    return f"{value:>12,.0f}" if isinstance(value, float) else f"{value[:11]:>12}"


@torch.inference_mode()
def compare(kind: str, features: int, numbers: int, roof: float) -> None:
    with torch.inference_mode(False):
        estimator = made(kind, features, numbers)
        sampler = Sampler(estimator, CUDA)
    member = sampler._members[0]
    print(f"{kind}, D = {features}, x of {numbers}: {member.how}")
    for observations, draws in SHAPES:
        total, x = observations * draws, torch.randn(observations, numbers)
        keys = stream_keys(x.numpy(), "model", 0).to(CUDA)
        some, on_gpu = counted(draws, observations), x.to(CUDA)
        rates = [
            rate(total, by_nflows, member, on_gpu, draws),
            rate(some, by_steps, member, on_gpu, keys, draws, False),
            rate(some, by_steps, member, on_gpu, keys, draws, True),
            rate(total, by_kernel, member, on_gpu, keys, draws),
            rate(total, to_host, sampler, x, draws),
        ]
        theirs, best = rates[0], rates[3]
        line = f"  {f'{observations:,} x {draws:,}':18}" + "".join(map(shown, rates))
        if isinstance(theirs, float) and isinstance(best, float):
            line += f"{best / theirs:8.1f}{2 * member._program.products * best / roof:8.1%}"
        print(line, flush=True)
        torch._dynamo.reset()
        torch.cuda.empty_cache()


@torch.inference_mode()
def sweep(kind: str, features: int, numbers: int) -> None:
    """The kernel alone, for one observation and for many, in tiles of other shapes."""
    from sbi_dist.posterior.sampler.triton_launch import FusedFlow

    with torch.inference_mode(False), torch.no_grad():
        member = CompiledEstimator(made(kind, features, numbers), CUDA)
    program: Any = member._program
    transform = member._estimator.flow.flow._transform
    print(f"{kind}, D = {features}: draws a second of u, 1 x 1,000,000 and 100,000 x 10")
    for block in (64, 128, 256):
        for warps in (4, 8):
            for stages in (1, 2, 3):
                fused = FusedFlow(program, transform, CUDA, block, warps, stages)
                rates = []
                for observations, draws in (SHAPES[0], SHAPES[-1]):
                    x = torch.randn(observations, numbers, device=CUDA)
                    keys = torch.randint(0, 2**32, (observations, 2), device=CUDA)
                    conditions = member.conditions(x)
                    each = (fused.draw, keys, 0, draws, conditions)
                    rates.append(rate(observations * draws, functools.partial, *each))
                print(f"  {block} draws, {warps} warps, {stages} stages", *map(shown, rates))


def main() -> int:
    if not torch.cuda.is_available():
        print("there is no CUDA device")
        return 0
    if "sweep" in sys.argv[1:]:
        for kind in ("nsf", "maf"):
            for size in SIZES:
                sweep(kind, *size)
        return 0
    single, half = peak(torch.float32), peak(torch.float16)
    print(
        f"{torch.cuda.get_device_name()}: {single / 1e12:.0f} TFLOP/s at float32 products, "
        f"{half / 1e12:.0f} at float16"
    )
    names = ("nflows", "steps", "compiled", "fused", "to host")
    print(" " * 20 + "".join(f"{name:>12}" for name in names) + f"{'ratio':>8}{'roof':>8}")
    for kind in ("nsf", "maf"):
        for features, numbers in SIZES:
            compare(kind, features, numbers, max(single, half / 3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
