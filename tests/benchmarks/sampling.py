"""Draws from many posteriors against nflows, sbi and zuko, with the same weights, in one run.

``python -m tests.benchmarks sampling`` prints a table; ``python -m tests.benchmarks.sampling nsf
--sizes 3 --requests 100x1000`` chooses what is in it. Each flow is that of the defaults (5 layers
of 50), its weights moved away from their start. nflows and sbi have the very same flow, of nflows'
unmodified modules; zuko one of the same sizes (its splines are autoregressive, with coupling
layers where it is told so, as here). All use all cores. nflows and zuko are given the first 200,000
draws of a request, in calls of 10,000, at which they are fastest. ``<`` marks what does not end
within the limit: a rate that is not reached.

The roofline is the rate of the networks' matrix products alone: those of one draw, for tiles of
the size that the sampler uses, with the threads that it uses.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.posterior.sampler import Sampler
from sbi_dist.posterior.sampler.jobs import in_threads
from tests.shipped import as_shipped

__all__ = ["flow_and_observations", "in_calls", "run"]

SIZES = {3: 3, 10: 50}  # D: numbers of x
REQUESTS = ((1, 1_000_000), (100, 1000), (10_000, 100), (100_000, 10))
LIMIT_S = 60.0  # of one request to sbi
MOST_DRAWS, AT_ONCE = 200_000, 10_000  # of a request to nflows or zuko, and of a call
COLUMNS = 4096
ROUNDS = 3


def flow_and_observations(
    estimator: str, size: int, observations: int
) -> tuple[ConditionalFlow, torch.Tensor]:
    """The flow and standardized observations of a case, the same in every process."""
    torch.manual_seed(0)
    model = ConditionalFlow(TrainOptions(estimator=estimator), size, (SIZES[size],)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model, torch.randn(observations, SIZES[size])


def run(arguments: Sequence[str] = ()) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sampling")
    parser.add_argument("estimators", nargs="*", default=["nsf", "maf"])
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--requests", nargs="+", help="as in 100x1000", default=None)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="most seconds of sbi")
    chosen = parser.parse_args(arguments)
    requests = REQUESTS
    if chosen.requests:
        requests = tuple(tuple(map(int, each.split("x"))) for each in chosen.requests)
    threads = torch.get_num_threads()
    print(f"\nMillions of draws a second, {threads} threads; x: how many times as fast sbi_dist is")
    print(
        f"{'':30}{'sbi_dist':>10}{'nflows':>10}{'x':>6}{'sbi':>10}{'x':>6}{'zuko':>10}{'x':>6}"
        f"{'roofline':>10}{'part':>6}"
    )
    for kind in chosen.estimators or ["nsf", "maf"]:
        for size in chosen.sizes:
            roofline = _roofline(kind, size, threads)
            for observations, draws in requests:
                ours = _ours(kind, size, observations, draws)
                nflows = _nflows(kind, size, observations, draws)
                sbi = _peer("sbi", kind, size, observations, draws, chosen.limit)
                zuko = _peer("zuko", kind, size, observations, draws, chosen.limit)
                name = f"{kind}, D={size}, {observations:,} x {draws:,}"
                cells = "".join(
                    f"{'<' * (rate < 0) + format(abs(rate), '.3f'):>10}{ours / abs(rate):>6.1f}"
                    if rate
                    else f"{'-':>10}{'':>6}"
                    for rate in (nflows, sbi, zuko)
                )
                print(
                    f"{name:30}{ours:>10.3f}{cells}{roofline:>10.2f}{ours / roofline:>6.2f}",
                    flush=True,
                )


def _best(work: Callable[[], int], rounds: int = ROUNDS) -> float:
    """Millions of draws a second, of the fastest round; the work gives their number."""
    rates = []
    for _ in range(rounds):
        began = time.perf_counter()
        draws = work()
        rates.append(draws / (time.perf_counter() - began) / 1e6)
    return max(rates)


def _ours(kind: str, size: int, observations: int, draws: int) -> float:
    """All of it: noise, flow, the map to theta on a box."""
    model, x = flow_and_observations(kind, size, observations)
    theta = torch.rand(2000, size).numpy() * 3.9 - 1.95
    bounds = torch.full((size,), 2.0).double().numpy()
    standardization = Standardization.fit(
        theta, torch.randn(2000, SIZES[size]).numpy(), -bounds, bounds, "linear"
    )
    estimator = DensityEstimator(
        TrainOptions(estimator=kind), standardization, (SIZES[size],)
    ).eval()
    estimator.flow.load_state_dict(model.state_dict())
    sampler = Sampler(estimator)
    sampler.draw(x[:300], min(draws, 300), "m", 0)
    return _best(lambda: sampler.draw(x, draws, "m", 0)[0].shape[:2].numel())


def in_calls(
    sample: Callable[[int, torch.Tensor], object], draws: int, x: torch.Tensor
) -> Callable[[], int]:
    """A request, or the first draws of it, in calls of the size at which nflows is fastest.

    The function gives the number of draws.
    """
    draws = min(draws, MOST_DRAWS)
    x = x[: max(1, MOST_DRAWS // draws)]
    each = min(draws, AT_ONCE)

    def work() -> int:
        for part in x.split(AT_ONCE // each):
            for first in range(0, draws, each):
                sample(min(each, draws - first), part)
        return draws * len(x)

    return work


def _nflows(kind: str, size: int, observations: int, draws: int) -> float:
    model, x = flow_and_observations(kind, size, observations)
    flow = as_shipped(model)
    work = in_calls(lambda count, part: flow.sample(count, context=part), draws, x)
    with torch.inference_mode():
        flow.sample(10, context=x[:10])
        return _best(work)


def _roofline(kind: str, size: int, threads: int) -> float:
    """One pass of each layer's network without the context."""
    model, _ = flow_and_observations(kind, size, 1)
    context = SIZES[size]
    shapes: list[tuple[int, int]] = []
    for layer in model.flow._transform._transforms[1:]:
        network = getattr(layer, "transform_net", getattr(layer, "autoregressive_net", None))
        if network is None:
            continue
        for name, each in network.named_modules():
            if isinstance(each, nn.Linear) and "context_layer" not in name:
                joined = kind == "nsf" and name == "initial_layer"
                shapes.append((each.out_features, each.in_features - context * joined))
    weights = [torch.randn(shape) for shape in shapes]
    tiles = 40

    def multiply(_: int) -> None:
        given = {columns: torch.randn(columns, COLUMNS) for _, columns in shapes}
        outs = {rows: torch.empty(rows, COLUMNS) for rows, _ in shapes}
        for _ in range(tiles):
            for weight in weights:
                torch.mm(weight, given[weight.shape[1]], out=outs[weight.shape[0]])

    def work() -> int:
        in_threads(multiply, range(threads), threads)
        return threads * tiles * COLUMNS

    return _best(work, 5)


def _peer(peer: str, kind: str, size: int, observations: int, draws: int, limit_s: float) -> float:
    """Of a process of its own; negative for a rate that it does not reach; 0: not installed."""
    given = map(str, (peer, kind, size, observations, draws))
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.sampling_peers", *given]
    # Its start is not counted.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        if process.stdout.readline().strip() != "ready":
            process.wait()
            return 0.0
        try:
            answer, _ = process.communicate(timeout=limit_s)
            return float(answer)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return -observations * draws / limit_s / 1e6


if __name__ == "__main__":
    run(sys.argv[1:])
