"""Rows a second of sbi's ``simulate_for_sbi`` on the Gaussian tutorial.

Prints one JSON line: at its best batch size with the simulations left in memory and saved to a
file, and in batches of 1,000.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings

import torch
from sbi.inference import simulate_for_sbi
from sbi.utils import BoxUniform
from sbi.utils.user_input_checks import process_prior, process_simulator


def simulator(theta: torch.Tensor) -> torch.Tensor:
    return theta + 1.0 + 0.1 * torch.randn(theta.shape)


def main(count: int, workers: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    prior, _, numpy = process_prior(BoxUniform(-2 * torch.ones(3), 2 * torch.ones(3)))
    wrapped = process_simulator(simulator, prior, numpy)
    best = {"in memory": 0.0, "stored": 0.0}
    small = count // 20
    started = time.perf_counter()
    simulate_for_sbi(
        wrapped,
        prior,
        num_simulations=small,
        num_workers=workers,
        simulation_batch_size=1000,
        show_progress_bar=False,
    )
    best["batches of 1,000"] = small / (time.perf_counter() - started)
    for batch in (10_000, 100_000, 1_000_000, count // workers):
        for _ in range(2):  # the first starts the worker processes
            started = time.perf_counter()
            theta, x = simulate_for_sbi(
                wrapped,
                prior,
                num_simulations=count,
                num_workers=workers,
                simulation_batch_size=batch,
                show_progress_bar=False,
            )
            simulated = time.perf_counter() - started
            with open("simulations.pt", "wb") as file:
                torch.save((theta, x), file)
                file.flush()
                os.fsync(file.fileno())
            stored = time.perf_counter() - started
            os.unlink("simulations.pt")
            best["in memory"] = max(best["in memory"], count / simulated)
            best["stored"] = max(best["stored"], count / stored)
    print(json.dumps(best))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
