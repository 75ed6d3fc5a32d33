"""Optimizer steps on a GPU: ``python -m tests.gpu.steps``.

nflows as shipped, the fast form taken step by step, and the same recorded as a CUDA graph, as
training takes it. Printed are milliseconds, simulations a second, the ratio to nflows, and the part
of the device's rate at matrix products of the same type (float32, TF32 allowed as torch allows it
by default) that the networks' products make up: forward and twice that backward.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.optimize import Optimization
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.workers import Workers
from tests.shipped import as_shipped

CUDA = torch.device("cuda")
FEATURES, NUMBERS = 5, 8
STEPS = 50


def timed(step: Callable[[], object]) -> float:
    """Seconds of a step, after some that warm up."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / STEPS


def products(flow: nn.Module) -> int:
    """Floating-point operations of a forward pass of one row, in its linear layers."""
    return sum(2 * each.weight.numel() for each in flow.modules() if isinstance(each, nn.Linear))


def peak() -> float:
    """Floating-point operations a second of large matrix products."""
    matrix = torch.randn(8192, 8192, device=CUDA)
    return 2 * 8192**3 / timed(lambda: matrix @ matrix)


def shipped(options: TrainOptions, u: torch.Tensor, x: torch.Tensor) -> Callable[[], None]:
    """A step through nflows' own modules and torch's optimizer."""
    model = ConditionalFlow(options, FEATURES, (NUMBERS,))
    flow = as_shipped(model).to(CUDA)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-4)

    def step() -> None:
        loss = -flow.log_prob(u, context=x).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()

    return step


def ours(
    options: TrainOptions, u: torch.Tensor, x: torch.Tensor, recorded: bool
) -> Callable[[], None]:
    """A step as training takes it."""
    flow = ConditionalFlow(options, FEATURES, (NUMBERS,)).to(CUDA)
    optimization = Optimization(flow, options, Workers(device=CUDA), len(u))
    if not recorded:
        optimization._gradient = optimization._accumulate  # type: ignore[method-assign]
    return lambda: optimization.step(u, x, 1e-4, 0.1)


def main() -> int:
    if not torch.cuda.is_available():
        print("there is no CUDA device")
        return 0
    rate = peak()
    print(f"{torch.cuda.get_device_name()}: {rate / 1e12:.1f} TFLOP/s at float32 products")
    print(f"{'':34}{'nflows':>10}{'by step':>10}{'graph':>10}{'ratio':>8}{'rows/s':>12}{'peak':>8}")
    for estimator in ("nsf", "maf"):
        for hidden in (50, 512):
            for batch in (200, 4096, 65_536):
                options = TrainOptions(estimator=estimator, hidden_features=hidden)
                u = torch.randn(batch, FEATURES, device=CUDA)
                x = torch.randn(batch, NUMBERS, device=CUDA)
                flops = 3 * batch * products(ConditionalFlow(options, FEATURES, (NUMBERS,)))
                theirs = timed(shipped(options, u, x))
                single = timed(ours(options, u, x, False))
                graph = timed(ours(options, u, x, True))
                print(
                    f"{f'{estimator}, hidden {hidden}, batch {batch:,}':34}"
                    f"{1e3 * theirs:7.2f} ms{1e3 * single:7.2f} ms{1e3 * graph:7.2f} ms"
                    f"{theirs / graph:8.1f}{batch / graph:12,.0f}{flops / graph / rate:8.1%}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
