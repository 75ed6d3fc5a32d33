"""Settings of the density estimator, on the nine problems of the SBI benchmark.

Each is trained on the same simulations and judged by the mean of -log q(theta | x) over 10,000 new
ones, which is what C2ST follows at a hundredth of its cost. Printed are the default's value and by
how much the others are below it (more is better), in nats, and the CPU time of all trainings:
``python -m tests.benchmarks.defaults [--sizes 1000,10000] [PROBLEM ...]``. One thread each.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from typing import Any
from unittest import mock

import numpy as np
import torch

from sbi_dist.estimation import standardize
from sbi_dist.estimation.loop import fit
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.priors import sample_prior, support_bounds
from sbi_dist.problem import Problem
from sbi_dist.problems.reference import PROBLEMS, reference_problem

__all__ = ["run"]

SETTINGS: list[dict[str, Any]] = [
    {},
    {"estimator": "maf"},
    {"hidden_features": 100},
    {"transforms": 8},
    {"bins": 16},
    {"dropout": 0.1},
    {"weight_decay": 0.3},
    {"schedule": "plateau"},
    {"embedding": "fully_connected"},
    {"ensemble": 5},
    # Of the map from a prior's box to the flow's space, which fits them to the posterior's width:
    # almost straight, so that splines act on the box itself, and almost the probit.
    {"softness": 0.01},
    {"softness": 3.0},
]
NEW = 10_000


def run() -> None:
    """Print the table for all problems at 1,000 simulations, which takes minutes."""
    _table(list(PROBLEMS), [1000])


def _table(tasks: list[str], sizes: list[int]) -> None:
    torch.set_num_threads(1)
    names = [_named(setting) for setting in SETTINGS]
    for size in sizes:
        print(f"\nMean of -log q(theta | x) after {size:,} simulations: the default, and gains")
        print(f"{'':24}" + "".join(f"{name:>14.13}" for name in names), flush=True)
        seconds = np.zeros(len(SETTINGS))
        for task in tasks:
            problem = reference_problem(task)
            given, new = _simulated(problem, size, 1), _simulated(problem, NEW, 2)
            line, default = f"{task:24}", math.nan
            for number, setting in enumerate(SETTINGS):
                began = time.process_time()
                if "softness" in setting and not _has_box(problem):
                    line += f"{'':>14}"
                    continue
                loss = _loss(problem, given, new, setting)
                seconds[number] += time.process_time() - began
                default = loss if number == 0 else default
                line += f"{loss:>14.2f}" if number == 0 else f"{default - loss:>+14.2f}"
            print(line, flush=True)
        print(f"{'seconds':24}" + "".join(f"{each:>14.0f}" for each in seconds), flush=True)


def _has_box(problem: Problem) -> bool:
    return bool(np.isfinite(np.stack(support_bounds(problem.prior))).all(axis=0).any())


def _named(setting: dict[str, Any]) -> str:
    return " ".join(f"{key.partition('_')[0]} {value}" for key, value in setting.items()) or "-"


def _simulated(problem: Problem, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Parameters of the prior and x of the simulator, those that failed left out."""
    torch.manual_seed(seed)
    theta = np.asarray(sample_prior(problem.prior, size))
    form = problem.form()
    argument = torch.from_numpy(theta).float() if form.library == "torch" else theta.astype(float)
    keywords = {"rng": np.random.default_rng(seed)} if form.takes_rng else {}
    x = np.asarray(problem.simulator(argument, **keywords), dtype=np.float32)
    finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    return theta[finite].astype(np.float32), x[finite]


def _loss(
    problem: Problem,
    given: tuple[np.ndarray, np.ndarray],
    new: tuple[np.ndarray, np.ndarray],
    setting: dict[str, Any],
) -> float:
    """Mean of -log q over new simulations; of the mixture, for several estimators."""
    own = {"ensemble", "softness"}
    single = {key: value for key, value in setting.items() if key not in own}
    theta, x = map(torch.from_numpy, new)
    logs = []
    with contextlib.ExitStack() as changed:
        if "softness" in setting:
            fixed = mock.Mock(return_value=setting["softness"])
            changed.enter_context(mock.patch.object(standardize, "matched_softness", fixed))
        for seed in range(setting.get("ensemble", 1)):
            options = TrainOptions(seed=seed, **single)
            estimator, _ = fit(*given, support_bounds(problem.prior), options)
            with torch.no_grad():
                logs.append(estimator.log_prob(theta, x).double())
    return -float((torch.logsumexp(torch.stack(logs), 0) - math.log(len(logs))).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help="default: all")
    parser.add_argument("--sizes", default="1000", help="numbers of simulations")
    asked = parser.parse_args()
    _table(asked.problems or list(PROBLEMS), [int(size) for size in asked.sizes.split(",")])
