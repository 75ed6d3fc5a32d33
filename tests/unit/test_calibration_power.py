"""Calibration tests on posteriors that are known: what each finds, and how often it is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sbi_dist.calibration.reduce import reduce_block
from sbi_dist.calibration.reference import Regression, Scale
from sbi_dist.calibration.shrinkage import shrinkage
from sbi_dist.calibration.table import Ranks, from_arrow, merge, to_arrow
from sbi_dist.calibration.uniformity import band, curve, levels, p_value
from sbi_dist.calibration.verdict import curves, judge

NAMES = ["a", "b"]
NOISE = np.array([0.3, 1.0])  # sd of x around theta, which has sd 1


class Conjugate:
    """theta ~ N(0, 1), x ~ N(theta, NOISE), and posteriors for x that are exact or wrong.

    With ``skew`` the parameter is exp(skew theta), of a log-normal prior and posterior.
    """

    def __init__(self, rows: int, draws: int, seed: int, skew: float = 0.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.rows, self.count, self.skew = rows, draws, skew
        training = self.rng.normal(size=(2000, 2))
        self.scale = Scale.of(self.parameter(training))
        seen = training + NOISE * self.rng.normal(size=training.shape)
        self.regression = Regression.fit(self.parameter(training), seen, seed=0)
        self.theta = self.rng.normal(size=(rows, 2))
        self.x = self.theta + NOISE * self.rng.normal(size=(rows, 2))
        self.mean, self.sd = self.x / (1 + NOISE**2), NOISE / np.sqrt(1 + NOISE**2)

    def parameter(self, theta: np.ndarray) -> np.ndarray:
        return np.exp(self.skew * theta) if self.skew else theta

    def ranks(self, mean: np.ndarray, sd: np.ndarray | float) -> Ranks:
        """Of the posteriors N(mean, sd)."""
        draws = mean[:, None] + sd * self.rng.normal(size=(self.rows, self.count, 2))
        inside = -0.5 * (((draws - mean[:, None]) / sd) ** 2).sum(-1)
        at_theta = -0.5 * (((self.theta - mean) / sd) ** 2).sum(-1)
        guess = self.regression.predict(self.x)
        return reduce_block(
            np.arange(self.rows), self.parameter(self.theta), self.parameter(draws), inside,
            at_theta, scale=self.scale, reference=guess,
        )  # fmt: skip

    def exact(self) -> Ranks:
        return self.ranks(self.mean, self.sd)


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {test["name"]: test["verdict"] for test in found["tests"]}


def named(found: dict[str, Any], name: str) -> dict[str, Any]:
    (test,) = [test for test in found["tests"] if test["name"] == name]
    return test


def kinds(found: dict[str, Any], name: str) -> set[str]:
    parts = named(found, name)["parameters"]
    return {part["kind"] for part in parts if part["verdict"] == "fail"}


@pytest.mark.parametrize("seed", range(3))
def test_a_posterior_that_is_wrong_fails(seed) -> None:
    problem = Conjugate(1000, 1000, seed)
    mean, sd = problem.mean, problem.sd
    narrow = judge(problem.ranks(mean, 0.8 * sd), NAMES)
    assert narrow["verdict"] == "fail"
    for name in ("sbc", "coverage"):
        assert verdicts(narrow)[name] == "fail" and kinds(narrow, name) == {"over"}
    # Wider by a quarter: 90 % intervals hold 96 %. By how much is judged less harshly.
    wide = judge(problem.ranks(mean, 1.25 * sd), NAMES)
    assert wide["verdict"] == "fail" and kinds(wide, "coverage") == {"under"}
    for sign, kind in ((1, "bias_high"), (-1, "bias_low")):
        shifted = judge(problem.ranks(mean + sign * 0.3 * sd, sd), NAMES)
        assert verdicts(shifted)["sbc"] == "fail" and kinds(shifted, "sbc") == {kind}
    # The prior is calibrated, whatever x is: ranks and coverage are those of an exact posterior.
    prior = judge(problem.ranks(np.zeros_like(mean), np.ones(2)), NAMES)
    assert verdicts(prior)["sbc"] != "fail" and verdicts(prior)["coverage"] != "fail"
    assert verdicts(prior)["tarp_data"] == "fail" and verdicts(prior)["shrinkage"] == "fail"
    for found in (narrow, wide, shifted, prior):
        for test in found["tests"]:
            assert test["sentence"]
        assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("seed", range(3))
def test_each_test_catches_what_it_is_for(seed) -> None:
    problem = Conjugate(1000, 1000, seed)
    mean, sd = problem.mean, problem.sd
    lost = mean + 8 * sd * (problem.rng.random((1000, 1)) < 0.02)
    for name, ranks, kind, said in (
        ("tails", problem.ranks(lost, sd), "tail", "beyond 5 sd of their posterior"),
        ("data_averaged", problem.ranks(mean + 0.5 * sd, sd), "average", "differs from the prior"),
        ("tarp", problem.ranks(mean, 0.6 * sd), "over", "too narrow, or off to a side"),
        # Which way truths lie from random points depends on the side.
        ("tarp", problem.ranks(mean + 0.6 * sd, sd), "over or bias_high", "or off to a side"),
        ("tarp", problem.ranks(mean, 1.6 * sd), "bias_high", "nearer to random points"),
        ("tarp_data", problem.ranks(mean, 0.8 * sd), "over", "over-confident"),
        ("tarp_data", problem.ranks(mean + 0.6 * sd, sd), "under", "off to a side"),
        ("shrinkage", problem.ranks(mean, 1.5 * sd), "prior", "farther from the guesses"),
    ):
        found = judge(ranks, NAMES)
        assert verdicts(found)[name] == "fail", (name, kind)
        assert kinds(found, name) <= set(kind.split(" or ")), (name, kind)
        assert said in named(found, name)["sentence"]


@pytest.mark.parametrize("skew", [1.0, 2.0])
def test_long_tails_of_parameters_are_no_fault(skew) -> None:
    """Of an exact posterior for log-normal parameters."""
    repetitions, rejected = 100, 0
    for seed in range(repetitions):
        problem = Conjugate(300, 99, 500 + seed, skew)
        found = shrinkage(problem.exact(), NAMES)
        rejected += min(part.p_value for part in found.parts) < 0.05
    assert rejected <= stats.binom.ppf(1 - 1e-4, repetitions, 0.05)
    if skew == 1.0:  # beyond, a regression guesses little more than the mean
        prior = judge(problem.ranks(np.zeros_like(problem.mean), 1.0), NAMES)
        assert verdicts(prior)["shrinkage"] == "fail"


def test_an_exact_posterior_passes_as_often_as_is_said() -> None:
    repetitions, significant = 200, 0.05
    found = [judge(Conjugate(300, 199, 100 + seed).exact(), NAMES) for seed in range(repetitions)]
    worst = [each["verdict"] for each in found]
    # More than this many would come by chance once in ten thousand times.
    most = {rate: stats.binom.ppf(1 - 1e-4, repetitions, rate) for rate in (0.01, 0.05)}
    assert worst.count("fail") <= most[0.01]
    assert len(worst) - worst.count("pass") - _by_size(found) <= most[0.05]
    for name in ("sbc", "coverage", "tarp", "tarp_data", "shrinkage", "tails", "data_averaged"):
        p_values = np.array(
            [test["p_value"] for each in found for test in each["tests"] if test["name"] == name]
        )
        assert len(p_values) == repetitions
        rejected = int((p_values < significant).sum())
        assert rejected <= most[0.05], name
        if name in ("coverage", "tarp", "tarp_data"):  # whose p-values are exact
            least = stats.binom.ppf(1e-4, repetitions, significant)
            assert rejected >= max(1, least), name
            assert 0.3 < np.median(p_values) < 0.7, name


def _by_size(found: list[dict[str, Any]]) -> int:
    """How many do not pass for one reason alone: there are too few rows to tell."""
    return sum(
        {name for name, verdict in verdicts(each).items() if verdict != "pass"} == {"held_out"}
        for each in found
    )


@pytest.mark.parametrize(("rows", "draws"), [(50, 9), (300, 99), (1000, 1000)])
def test_bands_hold_uniform_ranks_at_all_levels_at_once(rows, draws) -> None:
    rng, alpha, repetitions = np.random.default_rng(5), 0.1, 2000
    low, high = band(rows, draws, alpha)
    outside, p_values = 0, []
    for _ in range(repetitions):
        found = curve(rng.integers(0, draws + 1, rows), draws)
        share = found.counts / rows
        outside += bool(((share < low - 1e-12) | (share > high + 1e-12)).any())
        p_values.append(p_value(found))
    # The bounds are whole numbers, so that they hold a little more than they have to.
    assert outside <= stats.binom.ppf(1 - 1e-4, repetitions, alpha)
    for level in (0.01, 0.05, 0.2):
        rejected = int((np.array(p_values) <= level).sum())
        assert rejected <= stats.binom.ppf(1 - 1e-4, repetitions, level)
    assert len(levels(draws)) == len(low) == len(high)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 59), max_size=6), st.randoms(use_true_random=False))
def test_any_division_into_blocks_gives_the_same_table(cuts, random) -> None:
    problem = Conjugate(60, 20, 1)
    draws = problem.mean[:, None] + problem.sd * problem.rng.normal(size=(60, 20, 2))
    draws[7, 3, 1] = np.nan
    inside, at_theta = draws.sum(-1), problem.theta.sum(-1)
    guess = problem.regression.predict(problem.x)

    def part(start: int, stop: int) -> Ranks:
        some = slice(start, stop)
        return reduce_block(
            np.arange(start, stop), problem.theta[some], draws[some], inside[some], at_theta[some],
            scale=problem.scale, reference=guess[some], seed=3,
        )  # fmt: skip

    ends = sorted({0, 60, *cuts})
    parts = [part(start, stop) for start, stop in itertools.pairwise(ends)]
    random.shuffle(parts)
    whole, merged = part(0, 60), merge(parts)
    again, names = from_arrow(to_arrow(merged, NAMES))
    assert names == NAMES
    for field in dataclasses.fields(Ranks):
        expected = getattr(whole, field.name)
        for found in (merged, again):
            assert np.array_equal(
                getattr(found, field.name), expected, equal_nan=field.name in FLOATS
            )
    assert judge(merged, NAMES) == judge(whole, NAMES)
    assert curves(merged, NAMES) == curves(whole, NAMES)
    assert judge(whole, NAMES)["failed"] == 1 and int((~whole.ok).sum()) == 1


FLOATS = {"theta", "reference", "mean", "sd", "averaged", "ood"}


def test_rows_without_draws_are_counted() -> None:
    problem = Conjugate(400, 99, 2)
    exact = problem.exact()
    status = exact.status.copy()
    status[::10] = 1
    found = judge(dataclasses.replace(exact, status=status), NAMES)
    assert found["failed"] == 40 and verdicts(found)["held_out"] == "fail"
    assert named(found, "held_out")["effect"] == pytest.approx(0.1)
    assert found["summary"].count("360") == 1
    nothing = judge(dataclasses.replace(exact, status=np.ones_like(status)), NAMES)
    assert nothing["verdict"] == "fail" and nothing["held_out"] == nothing["failed"] == 400


def test_ranks_of_equal_draws_are_shared_out() -> None:
    """As a simulator with few outcomes and a model of steps would have it."""
    rng = np.random.default_rng(3)
    theta = rng.integers(0, 4, (2000, 1)).astype(float)
    draws = rng.integers(0, 4, (2000, 99, 1)).astype(float)
    ranks = reduce_block(np.arange(2000), theta, draws, scale=Scale.of(theta))
    assert p_value(curve(ranks.rank[:, 0], 99)) > 0.001
