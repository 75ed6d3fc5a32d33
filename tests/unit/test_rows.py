"""The rows of a shard: reproducible in any part and order, and one bad row costs one row."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
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
from sbi_dist.simulation.plan import Shard
from sbi_dist.simulation.rows import InProcess, Keep, describe, simulate_shard, simulate_theta
from sbi_dist.simulation.shard import Simulations, concatenate
from sbi_dist.simulator import SimulatorForm, row_streams

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
    return simulate_shard(problem, problem.form(), shard, seed, InProcess(simulator), batch_size)


def equal(first: Simulations, second: Simulations) -> bool:
    """All but the durations, bit for bit."""
    arrays = ("simulation_id", "theta", "x")
    return first.failed == second.failed and all(
        getattr(first, name).shape == getattr(second, name).shape
        and getattr(first, name).tobytes() == getattr(second, name).tobytes()
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

    class Record(InProcess):
        def batch(self, form: SimulatorForm, theta: np.ndarray, stream: Any) -> Any:
            calls.append(theta)
            return theta[:, 0], 1.0

    theta = np.arange(count, dtype=np.float32)[:, None]
    streams = Shard(0, 0, count).streams(0)[1:]
    form = SimulatorForm(True, "numpy", False, ())
    result = simulate_theta(theta, form, tuple(streams), Record(len), batch_size)
    np.testing.assert_array_equal(result.x, theta[:, 0])
    np.testing.assert_array_equal(np.concatenate(calls), theta)
    assert max(map(len, calls)) == min(batch_size, count)
    assert result.duration_s.sum() == pytest.approx(len(calls))


# ---- any part of a shard, in any order ----------------------------------------------------------


def parts_of(
    simulator: Any,
    form: SimulatorForm,
    shard: Shard,
    edges: list[int],
    batch_size: int | None = None,
    order: Callable[[list[int]], Any] = list,
) -> Simulations:
    """A shard whose parts between ``edges`` are simulated in some order by one process."""
    problem, call = Problem(PRIOR, simulator), InProcess(simulator)
    parts = {}
    for number in order(list(range(len(edges) - 1))):
        start, stop = edges[number], edges[number + 1]
        parts[number] = simulate_shard(
            problem, form, shard, 5, call, batch_size, start=start, stop=stop
        )
    return concatenate([parts[number] for number in sorted(parts)])


FORMS = {
    "row": (noisy_row, SimulatorForm(False, "numpy", False, (3,))),
    "row of a batch": (noisy_batch, SimulatorForm(True, "numpy", True, (3,))),
    "torch": (noisy_torch, SimulatorForm(True, "torch", False, (3,))),
}


@given(st.sampled_from(sorted(FORMS)), st.integers(1, 40), st.integers(1, 12), st.data())
@settings(deadline=None, max_examples=60)
def test_parts_of_a_shard_are_those_of_the_whole(name, size, batch_size, data) -> None:
    simulator, form = FORMS[name]
    step = batch_size if form.batched else 1
    inner = data.draw(st.sets(st.integers(0, (size - 1) // step).map(lambda i: i * step)))
    edges = [0, *sorted(inner - {0}), size]
    shard = Shard(2, 100, size)
    whole = parts_of(simulator, form, shard, [0, size], batch_size)
    shuffled = lambda numbers: data.draw(st.permutations(numbers))  # noqa: E731
    again = parts_of(simulator, form, shard, edges, batch_size, shuffled)
    assert equal(again, whole)
    assert whole.simulation_id.tolist() == list(range(100, 100 + size)) and whole.ok.all()


@given(st.sampled_from(sorted(FORMS)), st.integers(1, 40), st.integers(1, 12), st.integers(1, 50))
@settings(deadline=None, max_examples=60)
def test_what_is_interrupted_is_the_beginning_of_the_whole(name, size, batch, looks) -> None:
    simulator, form = FORMS[name]
    problem, shard = Problem(PRIOR, simulator), Shard(2, 100, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sbi_dist.simulation.rows._LOOK_EVERY_S", 0.0)
        asked = 0

        def interrupted() -> bool:
            nonlocal asked
            asked += 1
            return asked >= looks

        part = simulate_shard(
            problem, form, shard, 5, InProcess(simulator), batch, interrupted=interrupted
        )
    whole = parts_of(simulator, form, shard, [0, size], batch)
    reached = min(size, looks * batch if form.batched else looks)
    assert len(part) == reached
    parts = [part]
    if reached < size:  # the rest of it is what is missing
        call = InProcess(simulator)
        parts.append(simulate_shard(problem, form, shard, 5, call, batch, reached, size))
    assert equal(concatenate(parts), whole)


def test_a_failed_batch_is_interrupted_between_its_rows(monkeypatch) -> None:
    monkeypatch.setattr("sbi_dist.simulation.rows._LOOK_EVERY_S", 0.0)
    simulator = failing("raise")
    problem, form = Problem(PRIOR, simulator), SimulatorForm(True, "numpy", False, (3,))
    whole = simulate_shard(problem, form, Shard(0, 0, 40), 0, InProcess(simulator), 20)
    looks = iter(range(1000))
    part = simulate_shard(
        problem,
        form,
        Shard(0, 0, 40),
        0,
        InProcess(simulator),
        20,
        interrupted=lambda: next(looks) >= 6,
    )
    assert len(part) == 7
    failed = {row: failure for row, failure in whole.failed.items() if row < 7}
    assert part.failed == failed and part.x.tobytes() == whole.x[:7].tobytes()


# ---- a row is a function of its theta and its stream --------------------------------------------

GENERATORS: dict[str, tuple[Callable[[], float], Callable[[int], Any]]] = {
    "random": (random.random, random.seed),
    "gauss": (lambda: random.gauss(0, 1), random.seed),  # keeps one number for the next call
    "numpy": (np.random.random, np.random.seed),
    "normal": (np.random.standard_normal, np.random.seed),  # too
    "torch": (lambda: float(torch.rand(())), torch.default_generator.manual_seed),
}
# What rows with theta in an interval do: draw from a generator, or seed it themselves first.
branches = st.tuples(
    st.sampled_from([*GENERATORS, "rng"]),
    st.sampled_from([0.0, 0.0, 0.5, 0.8, 0.9, 0.95]),
    st.sampled_from([0.05, 0.1, 0.5, 1.0]),
    st.sampled_from(["draw", "draw", "draw twice", "seed", "seed and draw", "draw and raise"]),
)


class Program:
    """A simulator of one row that does what its branches say, in order.

    It overwrites its argument, and gives the same array for every row.
    """

    def __init__(self, steps: list[Any], with_rng: bool, library: str) -> None:
        self.steps = steps
        self.form = SimulatorForm(False, library, with_rng, (len(steps) + 1,))
        x = np.zeros(len(steps) + 1, dtype=np.float32)
        self.x: Any = torch.from_numpy(x) if library == "torch" else x

    def __call__(self, theta: Any, rng: Any = None) -> Any:
        place = float(theta[0])
        self.x[-1] = place
        theta *= 0
        for number, (generator, low, width, action) in enumerate(self.steps):
            self.x[number] = 0
            if not low <= place < low + width:
                continue
            if generator == "rng":
                draw, seed = (rng.random, len) if self.form.takes_rng else (float, len)
            else:
                draw, seed = GENERATORS[generator]
            if action.startswith("seed"):
                seed(7) if seed is not len else None
            if "draw" in action:
                self.x[number] = draw()
            if "twice" in action:
                self.x[number] += draw()
            if "raise" in action:
                raise ValueError(f"{float(self.x[number])!r}")
        return self.x


def seeding_everything(program: Program, theta: np.ndarray, keys: np.ndarray) -> list[Any]:
    """x or message of each row: all generators are seeded before it, whatever it uses."""
    outcomes: list[Any] = []
    for row, key in zip(theta, keys.tolist(), strict=True):
        random.seed(key[0])
        np.random.seed(key[0] & 0xFFFFFFFF)
        torch.default_generator.manual_seed(key[1] >> 1)
        rng = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))
        own: Any = row.astype(np.float64)
        if program.form.library == "torch":
            own = torch.from_numpy(row.copy())
        try:
            x = program(own, rng=rng) if program.form.takes_rng else program(own)
            outcomes.append((x.numpy() if torch.is_tensor(x) else x).tobytes())
        except ValueError as error:
            outcomes.append(f"ValueError: {error}")
    return outcomes


def outcomes_of(result: Simulations) -> list[Any]:
    return [
        result.failed[row][1] if row in result.failed else result.x[row].tobytes()
        for row in range(len(result))
    ]


@given(
    st.lists(branches, min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["numpy", "torch"]),
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 59), st.integers(1, 60), st.booleans()), max_size=4),
)
@settings(deadline=None, max_examples=150)
def test_rows_are_what_seeding_everything_for_each_of_them_gives(
    steps, with_rng, library, seed, ranges
) -> None:
    """Though a generator is seeded only once it is seen to be used: in a rare branch, say.

    Ranges of rows are simulated one after the other, each by the process of the one before (True)
    or by a new one, whose global generators are as the last row left them.
    """
    program = Program(steps, with_rng, library)
    theta = np.random.default_rng(seed).random((60, 2), dtype=np.float32)
    streams = tuple(Shard(0, 0, 60).streams(seed)[1:])
    expected = seeding_everything(program, theta, row_streams(streams[1], 60))
    call = InProcess(program)
    for start, length, same_process in [(0, 60, False), *ranges, (0, 60, True)]:
        stop = min(start + length, 60)
        if not same_process:
            call = InProcess(program)
        result = simulate_theta(theta, program.form, streams, call, start=start, stop=stop)
        assert outcomes_of(result) == expected[start:stop], (start, stop)


@pytest.mark.parametrize("with_rng", [False, True], ids=["no rng", "rng"])
@pytest.mark.parametrize(
    "used",
    [{"random"}, {"numpy"}, {"torch"}, {"random", "torch"}, {"random", "numpy", "torch"}],
    ids=lambda used: "+".join(sorted(used)) if isinstance(used, set) else None,
)
def test_a_generator_of_a_rare_branch_is_found_in_the_largest_block(used, with_rng) -> None:
    """One row of 2,000 draws, far into a block of 256, and one more much later."""
    steps = [(name, 0.9, 0.1, "draw") for name in sorted(used)]
    program = Program(steps, with_rng, "numpy")
    theta = np.full((2000, 1), 0.5, dtype=np.float32)
    theta[[1333, 1900]] = 0.95
    streams = tuple(Shard(0, 0, 2000).streams(0)[1:])
    expected = seeding_everything(program, theta, row_streams(streams[1], 2000))
    result = simulate_theta(theta, program.form, streams, InProcess(program))
    assert outcomes_of(result) == expected
    draws = result.x[[1333, 1900], : len(used)]
    assert len(np.unique(draws)) == draws.size  # noise of their own
    # Simulated alone, in another process, they are the same.
    for row in (1900, 1333):
        alone = simulate_theta(
            theta, program.form, streams, InProcess(program), start=row, stop=row + 1
        )
        assert outcomes_of(alone) == expected[row : row + 1]


@pytest.mark.parametrize("generator", ["random", "numpy", "torch"])
def test_a_generator_that_the_simulator_seeds_now_and_then(generator) -> None:
    """Most rows seed it themselves and leave it in one state; a rare one takes it as it is."""
    steps = [(generator, 0.0, 0.9, "seed and draw"), (generator, 0.9, 0.1, "draw")]
    program = Program(steps, False, "numpy")
    theta = np.full((300, 1), 0.5, dtype=np.float32)
    theta[[37, 170]] = 0.95
    streams = tuple(Shard(0, 0, 300).streams(0)[1:])
    expected = seeding_everything(program, theta, row_streams(streams[1], 300))
    assert expected[37] != expected[170]
    for _ in range(2):  # the second one begins in the state that the first one's rows left
        result = simulate_theta(theta, program.form, streams, InProcess(program))
        assert outcomes_of(result) == expected


def test_rows_of_a_failed_batch_are_seeded_as_well() -> None:
    """One by one they are functions of their streams, with global generators too."""

    def simulator(theta: torch.Tensor) -> torch.Tensor:
        if len(theta) > 1:
            raise ValueError("one at a time")
        return theta[:, 0] + torch.rand(len(theta)) + np.random.random() + random.random()

    form = SimulatorForm(True, "torch", False, ())
    problem = Problem(PRIOR, simulator)
    results = []
    for call in (InProcess(simulator), InProcess(simulator)):
        for start, stop in ((8, 16), (0, 24), (8, 16)):
            found = simulate_shard(problem, form, Shard(0, 0, 24), 0, call, 8, start, stop)
            results.append(found.x[8 - start : 16 - start].tobytes())
            assert len(np.unique(found.x)) == len(found)
    assert len(set(results)) == 1


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("batched", [False, True])
def test_rows_may_come_in_one_array_that_is_used_again(library, batched) -> None:
    kept = np.zeros((1, 2) if batched else 2, dtype=np.float32)
    shared: Any = torch.from_numpy(kept) if library == "torch" else kept

    def simulator(theta: Any) -> Any:
        if len(theta) > 1 and batched:
            raise ValueError("one at a time")
        shared[:] = theta
        theta *= 0
        return shared

    theta = np.random.default_rng(0).random((50, 2), dtype=np.float32)
    form = SimulatorForm(batched, library, False, (2,))
    streams = tuple(Shard(0, 0, 50).streams(0)[1:])
    result = simulate_theta(theta, form, streams, InProcess(simulator))
    np.testing.assert_array_equal(result.x, theta)
    np.testing.assert_array_equal(result.theta, theta)


def test_rows_are_told_of_in_order_until_nobody_wants_them() -> None:
    kept: list[int] = []

    def keep(row: int, outcome: Any, seconds: float) -> bool:
        kept.append(row)
        assert seconds >= 0 and outcome.shape == (2,)
        return row < 700

    wanted: Keep = keep
    theta = np.zeros((2000, 2), dtype=np.float32)
    form = SimulatorForm(False, "numpy", False, (2,))
    keys = row_streams(np.random.SeedSequence(0), 2000)
    InProcess(lambda theta: theta).rows(form, theta, keys, wanted)
    assert kept == list(range(701))


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
    call = InProcess(problem.simulator)
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
    result = simulate_theta(theta, form, streams, InProcess(problem.simulator))
    assert result.status == ["ok", "ok", "error", "ok", "ok", "ok"]
    assert len(np.unique(result.x[result.ok])) == 15
    theta[4] = 1.0
    again = simulate_theta(theta, form, streams, InProcess(problem.simulator))
    np.testing.assert_array_equal(again.x[[0, 1, 3, 5]], result.x[[0, 1, 3, 5]])


def test_interrupts_pass_through() -> None:
    def simulator(theta: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    streams = tuple(Shard(0, 0, 1).streams(0)[1:])
    for batched in (True, False):
        form = SimulatorForm(batched, "numpy", False, ())
        with pytest.raises(KeyboardInterrupt):
            simulate_theta(np.zeros((1, 1), np.float32), form, streams, InProcess(simulator))


def test_describe_is_one_short_line() -> None:
    assert describe(ValueError()) == ("error", "ValueError: ")
    assert describe(KeyError("k")) == ("error", "KeyError: 'k'")
    status, message = describe(RuntimeError("x" * 1000))
    assert status == "error" and len(message) == 300
    assert "\n" not in describe(RuntimeError("a\nb"))[1]
    describe(RuntimeError("\ud800"))[1].encode()  # which no encoding has


def test_an_exception_may_name_its_status() -> None:
    error = RuntimeError("took\n too  long")
    error.status = "timeout"
    assert describe(error) == ("timeout", "took too long")
    error.status = "of its own"
    assert describe(error) == ("error", "RuntimeError: took")


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
