"""Draws a second of sbi's batched sampler, or of zuko: a process of its own, to be ended in time.

``python -m tests.benchmarks.sampling_peers PEER KIND SIZE OBSERVATIONS DRAWS`` prints ``ready`` and
then millions of draws a second.
"""

from __future__ import annotations

import sys
import time

import torch

from tests.benchmarks.sampling import SIZES, flow_and_observations, in_calls
from tests.shipped import as_shipped


def main(peer: str, kind: str, size: int, observations: int, draws: int) -> None:
    model, x = flow_and_observations(kind, size, observations)
    if peer == "sbi":
        from sbi.inference.posteriors import DirectPosterior
        from sbi.neural_nets.estimators import NFlowsFlow

        # A prior without bounds, so that no draw is rejected.
        prior = torch.distributions.MultivariateNormal(torch.zeros(size), 100 * torch.eye(size))
        flow = as_shipped(model)
        flow._embedding_net = torch.nn.Identity()
        net = NFlowsFlow(flow, torch.Size([size]), torch.Size([SIZES[size]])).eval()
        posterior = DirectPosterior(net, prior)

        def sample(count: int, x: torch.Tensor) -> torch.Tensor:
            return posterior.sample_batched((count,), x, show_progress_bars=False)

        # It divides a request itself.
        work = lambda: sample(draws, x).shape[:2].numel()  # noqa: E731
    else:
        import zuko

        sizes = {"transforms": 5, "hidden_features": (50, 50)}
        if kind == "nsf":
            zuko_flow = zuko.flows.NSF(size, SIZES[size], bins=10, passes=2, **sizes)
        else:
            zuko_flow = zuko.flows.MAF(size, SIZES[size], **sizes)

        def sample(count: int, x: torch.Tensor) -> torch.Tensor:
            return zuko_flow(x).sample((count,))

        work = in_calls(sample, draws, x)

    with torch.no_grad():
        sample(10, x[:5])
        print("ready", flush=True)
        began = time.perf_counter()
        number = work()
        print(number / (time.perf_counter() - began) / 1e6)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
