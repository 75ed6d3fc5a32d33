"""One worker's training: what it finds, that it can be resumed, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.errors import InputError, StageError
from sbi_dist.estimation.checkpoint import Checkpoints
from sbi_dist.estimation.data import ArraySource
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.loop import fit, fit_source, split
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.signals import CHECKPOINT, FINISH, LEAVE, NOTHING, TOGETHER, Leave
from sbi_dist.estimation.workers import Workers

NOISE = 0.5
VARIANCE = NOISE**2 / (1 + NOISE**2)  # of the posterior, whose mean is x (1 - VARIANCE)


def simulate(count: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """theta ~ N(0, 1) in each component, x = theta + NOISE * noise."""
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal((count, size), dtype=np.float32)
    return theta, theta + np.float32(NOISE) * rng.standard_normal((count, size), dtype=np.float32)


def real_line(size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(size, -math.inf), np.full(size, math.inf)


def options(**changes: Any) -> TrainOptions:
    small = {"transforms": 2, "hidden_features": 16, "blocks": 1, "bins": 6, "max_epochs": 4}
    return TrainOptions(**{**small, **changes})


@torch.no_grad()
def draws(estimator: DensityEstimator, x: list[float], count: int) -> np.ndarray:
    noise = torch.randn(
        (count, estimator.num_parameters), generator=torch.Generator().manual_seed(1)
    )
    context = estimator.embed(torch.tensor([x])).expand(count, -1)
    return estimator.push(noise, context).numpy()


# ---- what it finds ------------------------------------------------------------------------------


@pytest.mark.parametrize(("estimator", "size"), [("nsf", 1), ("nsf", 2), ("maf", 2)])
def test_posterior_of_a_linear_gaussian_problem(estimator, size) -> None:
    count = 2000
    theta, x = simulate(count, size)
    fitted, history = fit(theta, x, real_line(size), options(estimator=estimator, max_epochs=8))
    sd = math.sqrt(VARIANCE)
    for place in ([0.0] * size, [1.5, -1.0][:size]):
        sample = draws(fitted, place, 4000)
        # A regression on 1,800 simulations places the mean at such x to sd sqrt((1 + 2) / 1800) =
        # 0.04 sd and the sd to 1 / sqrt(3600) = 0.017 sd; 4,000 draws add 0.016 and 0.011. Four
        # standard errors are 0.17 and 0.08; the networks, which start there, may add a little.
        mean = np.array(place) * (1 - VARIANCE)
        assert np.abs(sample.mean(0) - mean).max() < 0.2 * sd
        assert np.abs(sample.std(0) / sd - 1).max() < 0.1
        if size == 2:
            assert abs(np.corrcoef(sample.T)[0, 1]) < 0.15
    # The least possible loss is the posterior's entropy; its mean over the 200 held out
    # simulations has an sd of sqrt(size / 2 / 200), and the fit adds a few hundredths.
    entropy = 0.5 * size * math.log(2 * math.pi * math.e * VARIANCE)
    loss = history["best_validation_loss"]
    assert abs(loss - entropy) < 4 * math.sqrt(size / 400) + 0.05
    assert loss == min(history["validation_loss"])
    assert history["validation_loss"][history["best_epoch"]] == loss
    assert history["training_simulations"] == 1800


def test_the_best_weights_are_returned() -> None:
    theta, x = simulate(300, 1)
    fitted, history = fit(theta, x, real_line(1), options(learning_rate=0.5, patience=50))
    _, held_out = split(300, 0.1, 0)
    log_q = fitted.log_prob(torch.from_numpy(theta[held_out]), torch.from_numpy(x[held_out]))
    # float32 sums of a few numbers
    assert -float(log_q.detach().mean()) == pytest.approx(history["best_validation_loss"], abs=1e-5)
    assert history["best_validation_loss"] < history["validation_loss"][-1]


def test_draws_stay_in_a_box() -> None:
    theta, x = simulate(400, 2)
    inside = (np.abs(theta) < 1).all(axis=1)
    bounds = np.full(2, -1.0), np.full(2, 1.0)
    fitted, _ = fit(theta[inside], x[inside], bounds, options(max_epochs=2))
    for place in ([0.0, 0.0], [1.0, -3.0], [1e6, -1e6]):
        assert np.abs(draws(fitted, place, 500)).max() <= 1.0


@pytest.mark.parametrize("column", [0.0, 5.0, 1e-20, 1e20])
def test_a_constant_column_of_x_does_no_harm(column) -> None:
    theta, x = simulate(400, 1)
    wide = np.concatenate([x, np.full_like(x, column), x], axis=1)
    fitted, history = fit(theta, wide, real_line(1), options(max_epochs=2))
    assert np.isfinite(history["validation_loss"]).all()
    sample = draws(fitted, [1.0, column, 1.0], 500)
    assert abs(sample.mean() - (1 - VARIANCE)) < 0.5 * math.sqrt(VARIANCE)


@pytest.mark.parametrize("x_shape", [(), (1,), (4, 1), (2, 2)], ids=str)
def test_shapes_of_x(x_shape) -> None:
    theta, _ = simulate(60, 2)
    x = np.random.default_rng(0).standard_normal((60, *x_shape), dtype=np.float32)
    fitted, _ = fit(theta, x, real_line(2), options(max_epochs=1))
    assert fitted.x_shape == x_shape
    assert fitted.log_prob(torch.zeros(5, 2), torch.zeros(5, *x_shape)).shape == (5,)


# ---- reproducible and resumable -----------------------------------------------------------------


def same(first: tuple[DensityEstimator, dict], second: tuple[DensityEstimator, dict]) -> bool:
    """All weights bit for bit, and all of the history but its timing."""
    weights = [result[0].flow.state_dict() for result in (first, second)]
    histories = [
        {**result[1], "seconds": 0, "input_wait": 0, "data": ""} for result in (first, second)
    ]
    return histories[0] == histories[1] and all(
        torch.equal(weights[0][name], weights[1][name]) for name in weights[0]
    )


class Kept:
    """Checkpoints by step."""

    def __init__(self, *candidates: bytes) -> None:
        self.saved: dict[int, bytes] = {}
        self.candidates = list(candidates)

    def __call__(self) -> Checkpoints:
        return Checkpoints(self.saved.__setitem__, lambda: self.candidates, 0.0)


# Dropout draws random numbers in training; averages and counters are part of the state. Six steps
# an epoch.
RESUMABLE = options(
    dropout=0.1, max_epochs=9, batch_size=30, patience=6, decays=20, learning_rate=0.02, seed=3
)


@pytest.fixture(scope="module", params=["average", "plateau", "cosine"])
def uninterrupted(request) -> tuple[TrainOptions, tuple[DensityEstimator, dict], dict[int, bytes]]:
    kept = Kept()
    patience = 2 if request.param == "plateau" else 6
    chosen = dataclasses.replace(RESUMABLE, schedule=request.param, patience=patience)
    result = fit(*simulate(200, 2), real_line(2), chosen, Workers(), kept())
    assert len(set(result[1]["learning_rate"])) > 2
    return chosen, result, kept.saved


def resumed(
    chosen: TrainOptions, *candidates: bytes
) -> tuple[tuple[DensityEstimator, dict], dict[int, bytes]]:
    torch.manual_seed(99)  # as in another process
    kept = Kept(*candidates)
    return fit(*simulate(200, 2), real_line(2), chosen, Workers(), kept()), kept.saved


@pytest.mark.parametrize("step", [1, 5, 6, 7, 18, 23])
def test_resuming_at_any_step_is_not_seen_in_the_result(uninterrupted, step) -> None:
    chosen, result, saved = uninterrupted
    assert sorted(saved) == list(range(1, max(saved) + 1))
    again, rest = resumed(chosen, saved[step])
    assert same(again, result)
    assert min(rest) == step + 1  # it did not begin again
    assert rest.keys() | set(range(1, step + 1)) == saved.keys()


def test_a_run_without_checkpoints_is_the_same(uninterrupted) -> None:
    chosen, result, _ = uninterrupted
    reports: list[int] = []
    calm = fit(
        *simulate(200, 2),
        real_line(2),
        chosen,
        report=lambda history: reports.append(history["epoch"][-1]),
    )
    assert same(calm, result)
    assert reports == result[1]["epoch"][1:]


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty", "another architecture"])
def test_a_damaged_checkpoint_is_passed_over(uninterrupted, damage) -> None:
    chosen, result, saved = uninterrupted
    other = Kept()
    if damage == "another architecture":
        wider = dataclasses.replace(chosen, hidden_features=9, max_epochs=1)
        fit(*simulate(200, 2), real_line(2), wider, Workers(), other())
    bad = {
        "cut": saved[6][:-100],
        "foreign": b"not a checkpoint",
        "empty": b"",
        "another architecture": other.saved.get(6, b""),
    }[damage]
    again, rest = resumed(chosen, bad, saved[5])
    assert same(again, result) and min(rest) == 6
    if damage == "foreign":
        again, rest = resumed(chosen, bad)
        assert same(again, result) and min(rest) == 1


def test_checkpoints_come_by_epochs_or_by_the_clock() -> None:
    saved: list[int] = []

    def run(every_s: float, every_epochs: int | None) -> list[int]:
        saved.clear()
        checkpoints = Checkpoints(
            lambda step, data: saved.append(step), lambda: [], every_s, every_epochs
        )
        fit(*simulate(200, 2), real_line(2), RESUMABLE, Workers(), checkpoints)
        return saved

    assert run(1e9, None) == []
    assert run(1e9, 2)[:2] == [13, 25]  # after the first step of every other epoch


def test_seeds() -> None:
    def run(seed: int) -> tuple[DensityEstimator, dict]:
        return fit(*simulate(60, 1), real_line(1), options(max_epochs=1, seed=seed))

    assert same(run(1), run(1))
    assert not same(run(1), run(2))


# ---- going on from an earlier estimator ---------------------------------------------------------


def test_training_goes_on_from_the_weights_of_an_earlier_one() -> None:
    theta, x = simulate(600, 1)
    first, before = fit(theta[:300], x[:300], real_line(1), options(max_epochs=8))
    weights = {name: value.clone() for name, value in first.flow.state_dict().items()}
    second, after = fit(theta, x, real_line(1), options(max_epochs=2), start=first)
    # It begins where the first one ended, on the rows held out by both and 30 others: the mean
    # loss of 30 rows has an sd of about sqrt(1 / 2 / 30).
    start = after["validation_loss"][0]
    assert abs(start - before["best_validation_loss"]) < 4 * math.sqrt(1 / 2 / 30 + 1 / 2 / 60)
    _, held_out = split(600, 0.1, 0)
    log_q = first.log_prob(torch.from_numpy(theta[held_out]), torch.from_numpy(x[held_out]))
    assert -float(log_q.detach().mean()) == pytest.approx(start, abs=1e-5)
    # The standardization is taken up too, and the earlier estimator is left as it was.
    u = torch.linspace(-1, 1, 7)[:, None]
    for ours, theirs in zip(first.standardization.u(u), second.standardization.u(u), strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(value, weights[name]) for name, value in first.flow.state_dict().items())
    assert after["best_validation_loss"] <= start


# ---- stopping -----------------------------------------------------------------------------------


def test_stops_by_its_schedule_or_in_time() -> None:
    theta, x = simulate(60, 1)
    still = options(max_epochs=500, patience=1, decays=1, learning_rate=1e-9)
    _, history = fit(theta, x, real_line(1), dataclasses.replace(still, schedule="plateau"))
    assert history["epoch"][-1] < 100
    lowered = dataclasses.replace(still, schedule="plateau", max_epochs=500, patience=30)
    _, history = fit(theta, x, real_line(1), lowered)
    assert history["learning_rate"][-1] == pytest.approx(0.3e-9)
    _, history = fit(theta, x, real_line(1), options(max_epochs=500, max_seconds=1e-9))
    assert history["epoch"][-1] == 1
    _, history = fit(theta, x, real_line(1), options(max_epochs=7, schedule="cosine"))
    assert history["epoch"] == list(range(8))


class Asking:
    """Asks for something before a step, once."""

    def __init__(self, what: int, step: int) -> None:
        self.what, self.left, self.together_asked = what, step, 0

    def wanted(self) -> int:
        self.left -= 1
        return self.what if self.left == 0 else NOTHING

    def together(self) -> int:
        self.together_asked += 1
        return CHECKPOINT


def asked(what: int, step: int, kept: Kept | None = None) -> tuple[DensityEstimator, dict]:
    signals = Asking(what, step)
    checkpoints = None
    if kept is not None:
        checkpoints = Checkpoints(kept.saved.__setitem__, lambda: kept.candidates, 1e9)
    result = fit_source(
        ArraySource(*simulate(200, 2)),
        real_line(2),
        RESUMABLE,
        checkpoints=checkpoints,
        signals=signals,
    )
    assert (signals.together_asked > 0) == (what == TOGETHER)
    return result


def test_is_finished_from_outside_after_an_epoch() -> None:
    _, history = asked(FINISH, 8)
    assert history["epoch"] == [0, 1, 2]


def test_leaves_with_a_checkpoint_and_comes_back(uninterrupted) -> None:
    kept = Kept()
    with pytest.raises(Leave):
        asked(LEAVE, 8, kept)
    assert list(kept.saved) == [8]
    chosen, result, _ = uninterrupted
    if chosen == RESUMABLE:
        again, _ = resumed(chosen, kept.saved[8])
        assert same(again, result)


@pytest.mark.parametrize("what", [CHECKPOINT, TOGETHER])
def test_saves_a_checkpoint_when_asked(uninterrupted, what) -> None:
    kept = Kept()
    result = asked(what, 8, kept)
    assert list(kept.saved) == [8]
    if uninterrupted[0] == RESUMABLE:
        assert same(result, uninterrupted[1])


# ---- what it refuses ----------------------------------------------------------------------------


def test_too_few_simulations() -> None:
    theta, x = simulate(20, 1)
    fit(theta, x, real_line(1), options(max_epochs=1))
    with pytest.raises(InputError, match="19 usable simulations are too few; at least 20"):
        fit(theta[1:], x[1:], real_line(1), options())
    with pytest.raises(InputError, match="too few"):
        fit(theta[:0], x[:0], real_line(1), options())
    with pytest.raises(InputError, match="too few"):
        fit(theta, x, real_line(1), options(validation_fraction=0.9))


def test_more_workers_than_shares_of_a_batch() -> None:
    with pytest.raises(InputError, match=r"train\.workers is 5"):
        fit(*simulate(40, 1), real_line(1), options(batch_size=4), Workers(count=5))


def poisoned(monkeypatch, calls: Callable[[int], bool]) -> None:
    """The flow's density is no number in the calls of a training that are chosen by number."""
    forward, number = ConditionalFlow.forward, [0]

    def changed(self: ConditionalFlow, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            number[0] += 1
            if calls(number[0]):
                return forward(self, u, x) * math.nan
        return forward(self, u, x)

    monkeypatch.setattr(ConditionalFlow, "forward", changed)


def test_a_few_losses_that_are_no_number_are_skipped(monkeypatch) -> None:
    poisoned(monkeypatch, lambda number: number in (3, 7, 20))
    _, history = fit(*simulate(200, 2), real_line(2), RESUMABLE)
    assert history["skipped_steps"] == 3 and history["notes"] == []
    assert np.isfinite(history["validation_loss"]).all()
    assert np.isfinite(history["training_loss"][1:]).all()


def test_many_losses_that_are_no_number_lower_the_rate(monkeypatch) -> None:
    poisoned(monkeypatch, lambda number: 7 <= number <= 12)  # all steps of the second epoch
    _, history = fit(*simulate(200, 2), real_line(2), RESUMABLE)
    (note,) = history["notes"]
    assert note.startswith("epoch 2: the loss or its gradient became infinite or not a number")
    assert history["training_loss"][2] is None
    # As lowered by 0.3, but for its slow fall of about 1 % in these 6 steps.
    assert history["learning_rate"][3] < 0.35 * 0.02


def test_losses_that_stay_no_number_are_told(monkeypatch) -> None:
    poisoned(monkeypatch, lambda number: True)
    with pytest.raises(StageError, match=r"5th time, .* lower train\.learning_rate"):
        fit(*simulate(200, 2), real_line(2), RESUMABLE)


def test_a_density_that_is_no_number_from_the_start(monkeypatch) -> None:
    forward = ConditionalFlow.forward
    monkeypatch.setattr(
        ConditionalFlow, "forward", lambda self, u, x: forward(self, u, x) * math.nan
    )
    with pytest.raises(StageError, match=r"the loss is nan before the first step.*train\.x_scale"):
        fit(*simulate(60, 1), real_line(1), options())


def test_many_numbers_of_x() -> None:
    """10,000 numbers, of which the first two tell of theta, in 60 simulations."""
    theta, x = simulate(60, 2)
    noise = np.random.default_rng(1).standard_normal((60, 9_998), dtype=np.float32)
    _, history = fit(
        theta,
        np.concatenate([x, noise], axis=1),
        real_line(2),
        options(max_epochs=2, embedding="fully_connected", embedding_hidden=8),
    )
    assert np.isfinite(history["validation_loss"]).all()
    _, history = fit(theta, np.concatenate([x, noise], axis=1), real_line(2), options(max_epochs=1))
    assert np.isfinite(history["validation_loss"]).all()


# ---- the plan -----------------------------------------------------------------------------------


@given(st.integers(20, 5000), st.floats(0.01, 0.5), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_split(count, fraction, seed) -> None:
    training, held_out = split(count, fraction, seed)
    assert sorted([*training, *held_out]) == list(range(count))
    # One of each 1 / fraction rows; the last block may be cut, with its row in or out.
    assert int(count * fraction) <= len(held_out) <= int(count * fraction) + 1
    assert all(
        len(held_out[held_out < n / fraction]) >= int(n) for n in range(int(count * fraction))
    )
    again = split(count, fraction, seed)
    np.testing.assert_array_equal(training, again[0])
    np.testing.assert_array_equal(held_out, again[1])


@given(st.integers(40, 2000), st.integers(0, 2000), st.floats(0.05, 0.5), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_more_simulations_leave_the_held_out_ones_held_out(count, more, fraction, seed) -> None:
    """So that a model whose training goes on is not validated on what it was trained on."""
    training, held_out = split(count, fraction, seed)
    larger_training, larger_held_out = split(count + more, fraction, seed)
    np.testing.assert_array_equal(larger_held_out[larger_held_out < count], held_out)
    np.testing.assert_array_equal(larger_training[larger_training < count], training)


@given(st.sampled_from([0.1, 0.2, 0.25, 0.3]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_the_held_out_rows_are_spread_over_all_simulations(fraction, seed) -> None:
    _, held_out = split(1000, fraction, seed)
    counts, _ = np.histogram(held_out, bins=10, range=(0, 1000))
    # A bin's 100 rows are 100 * fraction blocks, of which those at its ends may be another's.
    assert np.abs(counts - 100 * fraction).max() <= 2


def test_any_row_may_be_held_out_and_seeds_hold_out_others() -> None:
    # Each of 40 rows is held out with a probability of 1/4: not once in 200 seeds is 1e-25.
    held_out = [split(40, 0.25, seed)[1] for seed in range(200)]
    assert set(np.concatenate(held_out).tolist()) == set(range(40))
    counts = np.bincount(np.concatenate(held_out), minlength=40)
    # Binomial(200, 1/4), 5 standard deviations
    assert np.abs(counts - 50).max() < 5 * math.sqrt(200 * 0.25 * 0.75)
