"""Training against sbi: the same simulations, architecture, held-out rows and machine, in one run.

``python -m tests.benchmarks training`` prints a table; ``python -m tests.benchmarks.training
gaussian slcp --sizes 2000 100000 --limit 480 --seeds 3`` chooses what is in it. All runs have one
thread. Seconds to a loss and of an epoch are those of epochs, training and validation; seconds in
all are those of the whole call. sbi trains first and tells which rows it held out, and sbi_dist is
given the simulations in an order in which it holds out the same ones. Losses are in nats of theta,
the fresh ones of 10,000 further simulations. A ``+`` marks a training that was stopped at the
limit: it would have gone on, to a better loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbi_dist.estimation.loop import fit, split
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.priors import sample_prior, support_bounds
from sbi_dist.problem import load_problem

__all__ = ["run"]

PROBLEMS = ("gaussian", "two_moons", "slcp")
SIZES = (2000, 10_000, 100_000)
LIMIT_S = 180.0  # of each of the two, for each problem and size
FRESH = 10_000
# sbi's architecture by default, so far as both have it: nsf, 5 layers, 50 hidden units, 2 blocks,
# 10 bins.
OPTIONS = TrainOptions(estimator="nsf", transforms=5, hidden_features=50, blocks=2, bins=10)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A training: validation loss and seconds so far after each epoch, and the results."""

    validation_loss: np.ndarray
    seconds: np.ndarray
    in_all_s: float
    best: float
    fresh: float
    finished: bool

    def until(self, loss: float) -> float | None:
        """Seconds until the validation loss is as good as ``loss``."""
        reached = np.flatnonzero(self.validation_loss <= loss)
        return float(self.seconds[reached[0]]) if len(reached) else None

    @property
    def epoch_s(self) -> float:
        return float(np.median(np.diff(self.seconds, prepend=0.0)))


def run(arguments: Sequence[str] = ()) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training")
    parser.add_argument("problems", nargs="*", default=PROBLEMS, help="shipped problems")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="simulations")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="most seconds of each")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each, one after another")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("\nTraining, sbi | sbi_dist: seconds to sbi's best validation loss, seconds of an epoch,")
    print("seconds in all, best validation loss, loss of fresh simulations")
    print(
        f"{'':20}{'to the same loss':>22}{'ratio':>7}{'an epoch':>18}{'ratio':>7}"
        f"{'in all':>16}{'validation':>18}{'fresh':>18}"
    )
    for size in chosen.sizes:
        for name in chosen.problems:
            for seed in range(chosen.seeds):
                print(f"{name:10}{size:9,} {_row(name, size, seed, chosen.limit)}", flush=True)


def _row(name: str, size: int, seed: int, limit_s: float) -> str:
    theirs, ours = _both(name, size, seed, limit_s)
    mark, our_mark = ("" if each.finished else "+" for each in (theirs, ours))
    peer = theirs.until(theirs.validation_loss.min())
    same = ours.until(theirs.best)
    assert peer is not None
    reached = "not reached" if same is None else f"{same:.2f}"
    ratio = "" if same is None else f"{peer / same:.1f}"
    return (
        f"{f'{peer:.1f}{mark} | {reached}':>22}{ratio:>7}"
        f"{f'{theirs.epoch_s:.3f} | {ours.epoch_s:.3f}':>18}{theirs.epoch_s / ours.epoch_s:7.1f}"
        f"{f'{theirs.in_all_s:.1f}{mark} | {ours.in_all_s:.1f}{our_mark}':>16}"
        f"{f'{theirs.best:.3f} | {ours.best:.3f}':>18}"
        f"{f'{theirs.fresh:.3f} | {ours.fresh:.3f}':>18}"
    )


def _both(name: str, size: int, seed: int, limit_s: float) -> tuple[_Run, _Run]:
    problem = load_problem(f"sbi_dist.problems.{name}:problem")
    low, high = support_bounds(problem.prior)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        theta = sample_prior(problem.prior, size + FRESH).astype(np.float32)
    # The simulators that come with the package are fast, and take a batch and a generator.
    x = problem.simulator(theta.astype(np.float64), np.random.default_rng(seed)).astype(np.float32)
    data = {
        "theta": theta[:size],
        "x": x[:size],
        "fresh_theta": theta[size:],
        "fresh_x": x[size:],
        "low": np.asarray(low, dtype=np.float64),
        "high": np.asarray(high, dtype=np.float64),
    }
    theirs, held_out = _sbi(data, seed, limit_s)
    return theirs, _sbi_dist(data, held_out, seed, limit_s)


def _sbi(data: dict[str, np.ndarray], seed: int, limit_s: float) -> tuple[_Run, np.ndarray]:
    script = Path(__file__).with_name("training_sbi.py")
    # sbi writes its logs into the working directory.
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "simulations.npz"), **data)  # type: ignore[arg-type]
        subprocess.run(
            [sys.executable, str(script), folder, OPTIONS.estimator, str(seed), str(limit_s)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=2 * limit_s + 300,
            check=True,
        )
        with np.load(Path(folder, "sbi.npz")) as found:
            result = _Run(
                found["validation_loss"],
                found["epoch_s"].cumsum(),
                float(found["seconds"]),
                float(found["best_validation_loss"]),
                float(found["fresh_loss"]),
                bool(found["finished"]),
            )
            return result, found["held_out"]


def _sbi_dist(data: dict[str, np.ndarray], held_out: np.ndarray, seed: int, limit_s: float) -> _Run:
    options = dataclasses.replace(OPTIONS, seed=seed, max_seconds=limit_s)
    order = _same_split(len(data["theta"]), held_out, options)
    seconds: list[float] = []
    bounds = (data["low"], data["high"])
    began = time.perf_counter()

    def note(history: dict[str, Any]) -> None:
        seconds.append(history["seconds"])

    estimator, history = fit(data["theta"][order], data["x"][order], bounds, options, report=note)
    in_all = time.perf_counter() - began
    with torch.no_grad():
        log_q = estimator.log_prob(
            torch.from_numpy(data["fresh_theta"]), torch.from_numpy(data["fresh_x"])
        )
    # The first loss is that of the linear regression that training starts from.
    losses = np.array(history["validation_loss"])[1:]
    return _Run(
        losses,
        np.array(seconds),
        in_all,
        float(history["best_validation_loss"]),
        -float(log_q.double().mean()),
        seconds[-1] < limit_s,
    )


def _same_split(count: int, held_out: np.ndarray, options: TrainOptions) -> np.ndarray:
    """An order of the rows in which ``fit`` holds out the rows that sbi did, as far as it can.

    Their numbers may differ by one: then a row more or less is held out here.
    """
    training, validation = split(count, options.validation_fraction, options.seed)
    rows = np.concatenate([held_out, np.setdiff1d(np.arange(count), held_out)])
    order = np.empty(count, dtype=np.int64)
    order[np.concatenate([validation, training])] = rows
    return order


if __name__ == "__main__":
    run(sys.argv[1:])
