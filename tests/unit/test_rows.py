"""The rows of a shard: reproducible, and one bad row costs one row."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import Gamma, Normal

from sbi_dist.priors import BoxUniform, Truncated
from sbi_dist.problem import Problem
from sbi_dist.simulation.dataset import Simulations
from sbi_dist.simulation.plan import Shard
from sbi_dist.simulation.rows import describe, in_process, simulate_shard, simulate_theta
from sbi_dist.simulator import SimulatorForm

PRIOR = BoxUniform([0.0, -1.0], [1.0, 1.0])


def noisy_batch(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return theta[:, :1] + rng.standard_normal((len(theta), 3))


def noisy_row(theta: np.ndarray) -> np.ndarray:
    return theta[0] + np.random.standard_normal(3)


def noisy_torch(theta: torch.Tensor) -> torch.Tensor:
    return theta[:, :1] + torch.randn(len(theta), 3)


def run(
    simulator: Any, shard: Shard, seed: int = 0, batch_size: int | None = None, prior: Any = PRIOR
) -> Simulations:
    problem = Problem(prior, simulator)
    return simulate_shard(problem, problem.form(), shard, seed, in_process(simulator), batch_size)


def equal(first: Simulations, second: Simulations) -> bool:
    """All but the durations."""
    arrays = ("simulation_id", "theta", "x")
    return (first.status, first.error) == (second.status, second.error) and all(
        np.array_equal(getattr(first, name), getattr(second, name), equal_nan=True)
        for name in arrays
    )


# ---- reproducible -------------------------------------------------------------------------------


@pytest.mark.parametrize("simulator", [noisy_batch, noisy_row, noisy_torch])
def test_a_shard_is_a_function_of_problem_seed_and_number(simulator) -> None:
    shard = Shard(3, 30, 10)
    first = run(simulator, shard)
    assert first.simulation_id.tolist() == list(range(30, 40)) and first.ok.all()
    # Neither what was drawn before, nor other shards, nor the shard's place matter.
    torch.manual_seed(99), np.random.seed(99)
    run(simulator, Shard(0, 0, 10))
    assert equal(run(simulator, shard), first)
    moved = run(simulator, Shard(3, 0, 10))
    np.testing.assert_array_equal(moved.x, first.x)
    for other in (run(simulator, Shard(4, 30, 10)), run(simulator, shard, seed=1)):
        assert not np.isin(other.theta, first.theta).any()
        assert not np.isin(other.x - other.theta[:, :1], first.x - first.theta[:, :1]).any()


def test_rows_of_a_batch_have_noise_of_their_own() -> None:
    for batch_size in (1, 3, None):
        result = run(noisy_batch, Shard(0, 0, 20), batch_size=batch_size)
        noise = result.x - result.theta[:, :1]
        assert len(np.unique(noise)) == noise.size


def test_batch_size_leaves_theta_alone() -> None:
    whole = run(noisy_batch, Shard(0, 0, 10))
    parts = run(noisy_batch, Shard(0, 0, 10), batch_size=4)
    np.testing.assert_array_equal(whole.theta, parts.theta)
    assert equal(parts, run(noisy_batch, Shard(0, 0, 10), batch_size=4))


@given(st.integers(1, 30), st.integers(1, 40))
@settings(deadline=None, max_examples=25)
def test_batches_cover_every_row_once(count, batch_size) -> None:
    calls: list[np.ndarray] = []

    def record(form: SimulatorForm, theta: np.ndarray, stream: Any) -> Any:
        calls.append(theta)
        return theta[:, 0], 1.0

    theta = np.arange(count, dtype=np.float32)[:, None]
    streams = Shard(0, 0, count).streams(0)[1:]
    form = SimulatorForm(True, "numpy", False, ())
    result = simulate_theta(theta, form, tuple(streams), record, batch_size)
    np.testing.assert_array_equal(result.x, theta[:, 0])
    np.testing.assert_array_equal(np.concatenate(calls), theta)
    assert max(map(len, calls)) == min(batch_size, count)
    assert result.duration_s.sum() == pytest.approx(len(calls))


# ---- bad rows -----------------------------------------------------------------------------------


def failing(kind: str) -> Any:
    """A batch simulator with trouble wherever theta[0] > 0.7."""

    def simulator(theta: np.ndarray) -> Any:
        bad = theta[:, 0] > 0.7
        x = np.repeat(theta[:, :1], 3, axis=1)
        if kind == "nan":
            x[bad, 1] = np.nan
        elif kind == "infinite":
            x[bad] = 1e300  # too large for float32
        elif bad.any():
            if kind == "raise":
                raise ValueError("no\nsecond line")
            if kind == "exit":
                sys.exit("gave up")
            if kind == "shape":
                return x[:, :2]
            if kind == "none":
                return None
        return x

    return simulator


FAILURES = [
    ("raise", "error", "ValueError: no"),
    ("exit", "error", "SystemExit: gave up"),
    ("shape", "error", "ValueError: x has shape (1, 2), expected (1, 3)"),
    ("none", "error", "ValueError: the simulator returned None, expected an array of numbers"),
    ("nan", "nonfinite", "x is NaN or infinite"),
    ("infinite", "nonfinite", "x is NaN or infinite"),
]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("kind", "status", "message"), FAILURES, ids=[f[0] for f in FAILURES])
def test_one_bad_row_costs_one_row(kind, status, message, batched) -> None:
    batch = failing(kind)

    def row(theta: np.ndarray) -> Any:
        x = batch(theta[None])
        return None if x is None else x[0]

    problem = Problem(PRIOR, batch if batched else row)
    form = SimulatorForm(batched, "numpy", False, (3,))
    call = in_process(problem.simulator)
    result = simulate_shard(problem, form, Shard(0, 0, 40), 0, call, batch_size=8)
    bad = result.theta[:, 0] > 0.7
    assert 0 < bad.sum() < 40
    np.testing.assert_array_equal(result.ok, ~bad)
    if not batched:  # x of one row, (3,), instead of a batch of it, (1, 3)
        message = message.replace("(1, ", "(").replace("(2)", "(2,)").replace("(3)", "(3,)")
    assert {result.status[row] for row in np.flatnonzero(bad)} == {status}
    assert {result.error[row] for row in np.flatnonzero(bad)} == {message}
    np.testing.assert_array_equal(result.x[~bad], np.repeat(result.theta[~bad, :1], 3, axis=1))
    assert not np.isfinite(result.x[bad]).all(axis=1).any()
    assert all(result.error[row] is None for row in np.flatnonzero(~bad))
    assert np.isfinite(result.duration_s).all()


def test_a_row_of_a_failed_batch_does_not_depend_on_the_others() -> None:
    """Rows that are run one at a time have streams of their own."""

    def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if (theta[:, 0] > 0.9).any():
            raise ValueError("no")
        return theta[:, :1] + rng.standard_normal((len(theta), 3))

    problem = Problem(PRIOR, simulator)
    form = SimulatorForm(True, "numpy", True, (3,))
    theta = np.full((6, 2), 0.5, dtype=np.float32)
    theta[2] = 1.0
    streams = tuple(Shard(0, 0, 6).streams(0)[1:])
    result = simulate_theta(theta, form, streams, in_process(problem.simulator))
    assert result.status == ["ok", "ok", "error", "ok", "ok", "ok"]
    assert len(np.unique(result.x[result.ok])) == 15
    theta[4] = 1.0
    again = simulate_theta(theta, form, streams, in_process(problem.simulator))
    np.testing.assert_array_equal(again.x[[0, 1, 3, 5]], result.x[[0, 1, 3, 5]])


def test_interrupts_pass_through() -> None:
    def simulator(theta: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_process(simulator)(
            SimulatorForm(False, "numpy", False, ()), np.zeros(1), np.random.SeedSequence(0)
        )


def test_describe_is_one_short_line() -> None:
    assert describe(ValueError()) == "ValueError: "
    assert describe(KeyError("k")) == "KeyError: 'k'"
    assert len(describe(RuntimeError("x" * 1000))) == 300
    assert "\n" not in describe(RuntimeError("a\nb"))


# ---- the prior ----------------------------------------------------------------------------------


def test_theta_is_drawn_from_the_prior() -> None:
    prior = [Normal(1.0, 2.0), Gamma(3.0, 2.0), Truncated(Normal(0.0, 1.0), low=1.0)]
    marginals = [stats.norm(1, 2), stats.gamma(3, scale=0.5), stats.truncnorm(1, np.inf)]
    shards = [run(lambda theta: theta, Shard(index, 0, 250), prior=prior) for index in range(8)]
    theta = np.concatenate([shard.theta for shard in shards])
    assert theta.shape == (2000, 3) and len(np.unique(theta[:, 0])) > 1990
    for column, marginal in zip(theta.T, marginals, strict=True):
        # Kolmogorov: P(sqrt(n) D > 2) = 2 exp(-8) = 7e-4 for each, at a fixed seed.
        assert stats.kstest(column, marginal.cdf).statistic < 2.0 / math.sqrt(len(column))
    # A correlation of independent columns has sd 1 / sqrt(n); 4 of them.
    correlations = np.corrcoef(theta.T)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 4.0 / math.sqrt(len(theta))
