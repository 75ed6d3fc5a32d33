"""One optimizer step, and one pass without gradient: nflows as shipped, and the fast form.

Both in one process on one thread, in turn, so that the load of the machine falls on both alike.
Printed is the median CPU time of the thread, and the ratio: ``python -m tests.benchmarks.steps``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from sbi_dist.estimation.fast import FlatParameters
from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.options import TrainOptions
from tests.shipped import as_shipped

__all__ = ["run"]

FEATURES = 3
SECONDS = 4.0  # for each line


def run() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("\nOptimizer steps (D = 3, x of 3 numbers, default architecture, one thread)")
    print(f"{'':34}{'nflows as shipped':>20}{'sbi_dist':>14}{'ratio':>8}")
    for estimator in ("nsf", "maf"):
        for batch in (200, 1000):
            pairs = _passes(estimator, batch)
            for what in ("step", "pass without gradient"):
                theirs, ours = _medians([pair[what] for pair in pairs])
                print(
                    f"{estimator + ', batch ' + str(batch) + ', ' + what:34}"
                    f"{theirs:>17.2f} ms{ours:>11.2f} ms{theirs / ours:>8.1f}"
                )


def _passes(estimator: str, batch: int) -> list[dict[str, Callable[[], None]]]:
    """Steps and passes of nflows' flow and of ours, with the same weights."""
    torch.manual_seed(0)
    model = ConditionalFlow(TrainOptions(estimator=estimator), FEATURES, (FEATURES,))
    u, x = torch.randn(batch, FEATURES), torch.randn(batch, FEATURES)
    shipped = as_shipped(model).float()
    optimizer = torch.optim.AdamW(shipped.parameters(), lr=1e-4, fused=True)

    def their_step() -> None:
        optimizer.zero_grad()
        (-shipped.log_prob(u, context=x).mean()).backward()
        torch.nn.utils.clip_grad_norm_(shipped.parameters(), 5.0)
        optimizer.step()

    flat = FlatParameters(model.parameters())
    ours = torch.optim.AdamW([flat.values], lr=1e-4, fused=True)

    def our_step() -> None:
        flat.zero_grad()
        (-model(u, x).mean()).backward()
        flat.clip_norm(5.0)
        ours.step()

    @torch.no_grad()
    def their_pass() -> None:
        shipped.log_prob(u, context=x)

    @torch.no_grad()
    def our_pass() -> None:
        model(u, x)

    name = "pass without gradient"
    return [{"step": their_step, name: their_pass}, {"step": our_step, name: our_pass}]


def _medians(functions: list[Callable[[], None]]) -> list[float]:
    """Median time of each in ms, called in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        for _ in range(3):
            function()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[0]) < 5:
        for function, taken in zip(functions, times, strict=True):
            start = time.thread_time()
            function()
            taken.append(time.thread_time() - start)
    return [1e3 * statistics.median(taken) for taken in times]


if __name__ == "__main__":
    run()
