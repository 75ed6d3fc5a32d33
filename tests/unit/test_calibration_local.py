"""l-C2ST: posteriors that are right on average, and wrong where it is asked."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from scipy import stats

from sbi_dist.calibration.finding import Part
from sbi_dist.calibration.local import local_c2st
from sbi_dist.calibration.reduce import reduce_block
from sbi_dist.calibration.reference import Regression, Scale
from sbi_dist.calibration.sbc import sbc
from sbi_dist.calibration.table import Ranks
from sbi_dist.calibration.text import as_text
from sbi_dist.calibration.verdict import judge
from sbi_dist.calibration.wording import sentence

NOISE = 0.5


@functools.cache
def regression(size: int) -> Regression:
    rng = np.random.default_rng(99)
    theta = rng.standard_normal((500, size))
    return Regression.fit(theta, theta + NOISE * rng.standard_normal(theta.shape))


class Halves:
    """theta ~ N(0, 1), x ~ N(theta, 0.5^2); where x_0 > 0 and below, posteriors may be others."""

    def __init__(
        self,
        seed: int,
        rows: int = 2000,
        count: int = 50,
        size: int = 2,
        shift: tuple[float, float] = (0.0, 0.0),
        width: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        self.rng, self.shift, self.width = np.random.default_rng(seed), shift, width
        self.regression = regression(size)
        theta = self.rng.standard_normal((rows, size))
        x = theta + NOISE * self.rng.standard_normal(theta.shape)
        self.ranks: Ranks = reduce_block(
            np.arange(rows),
            theta,
            self.draws(x, count),
            scale=Scale(np.zeros(size), np.ones(size)),
            reference=self.regression.predict(x),
        )

    def draws(self, x: np.ndarray, count: int) -> np.ndarray:
        """(B, count, D): shift in sd and width of the exact posterior, below 0 and above."""
        side = (x[:, :1] > 0).astype(int)
        sd = NOISE / np.sqrt(1 + NOISE**2) * np.ones_like(x)
        mean = x / (1 + NOISE**2) + np.array(self.shift)[side] * sd
        sd *= np.array(self.width)[side]
        return mean[:, None] + sd[:, None] * self.rng.standard_normal((len(x), count, x.shape[1]))

    def test(self, at: float, count: int = 1000) -> Part:
        x = np.zeros((1, self.ranks.theta.shape[1]))
        x[0, 0] = at
        return local_c2st(self.ranks, self.draws(x, count)[0], self.regression.predict(x)[0])


def test_it_sees_where_a_posterior_is_wrong() -> None:
    """Shifts up and down nearly cancel out in the ranks of all; l-C2ST sees either."""
    problem = Halves(0, shift=(-0.3, 0.3))
    assert all(part.severity < 1 for part in sbc(problem.ranks, ["a", "b"]).parts)
    for at in (-1.2, 1.2):
        part = problem.test(at)
        assert part.p_value == 1 / 2000 and part.severity > 1
    narrow = Halves(1, width=(1.0, 0.6))
    assert narrow.test(1.2).severity > 1 and narrow.test(1.2).p_value == 1 / 2000
    assert narrow.test(-1.2).severity < 0.5


class Window(Halves):
    """Other than the exact posterior only for data near 1.2: one in ten."""

    def draws(self, x: np.ndarray, count: int) -> np.ndarray:
        near = np.exp(-0.5 * np.square((x[:, :1] - 1.2) / 0.3))
        sd = NOISE / np.sqrt(1 + NOISE**2) * np.ones_like(x)
        mean = x / (1 + NOISE**2) + near * self.shift[1] * sd
        sd *= 1 + near * (self.width[1] - 1)
        return mean[:, None] + sd[:, None] * self.rng.standard_normal((len(x), count, x.shape[1]))


@pytest.mark.parametrize("wrong", [{"shift": (0.0, 1.0)}, {"width": (1.0, 0.5)}])
@pytest.mark.parametrize("size", [1, 5])
def test_it_sees_a_posterior_that_is_wrong_near_the_data_alone(size, wrong) -> None:
    problem = Window(4, size=size, **wrong)
    names = [f"p{i}" for i in range(size)]
    here, elsewhere = problem.test(1.2), problem.test(-1.2)
    assert here.p_value == 1 / 2000 and here.severity > 1 > elsewhere.severity
    # Where it is asked decides: the tests of all simulations are the same.
    verdicts = [
        {test["name"]: test["verdict"] for test in judge(problem.ranks, names, part)["tests"]}
        for part in (here, elsewhere)
    ]
    assert verdicts[0].pop("local") == "fail" and verdicts[1].pop("local") != "fail"
    assert verdicts[0] == verdicts[1]


def test_what_it_says() -> None:
    part = Window(4, shift=(0.0, 1.0)).test(1.2)

    def said(part: Part, verdict: str) -> str:
        return sentence("local", verdict, [part], part, 2000)

    assert said(part, "fail").startswith("The posterior of the observed data (l-C2ST): for data")
    assert "simulate.rounds=2" in said(part, "fail") and "unlike" not in said(part, "fail")
    unlike = dataclasses.replace(part, more={"out_of_distribution_p": 0.001})
    for verdict in ("pass", "fail"):
        assert "unlike the simulations (p = 0.001)" in said(unlike, verdict)
    # Where the test passes, too, its user hears of it.
    passed = dataclasses.replace(unlike, p_value=0.5, effect=0.01)
    found = judge(Halves(5, rows=500).ranks, ["a", "b"], passed)
    (local,) = [test for test in found["tests"] if test["name"] == "local"]
    assert local["verdict"] == "warn" and "nothing that chance does not" in local["sentence"]
    words = " ".join(as_text(found).split())
    assert words.count("unlike the simulations (p = 0.001)") == 1


def test_an_exact_posterior_is_rejected_as_often_as_is_said() -> None:
    repetitions = 200
    parts = [
        Halves(100 + each, rows=300, count=20, size=1).test(0.01 * each - 1, 100)
        for each in range(repetitions)
    ]
    p_values = np.array([part.p_value for part in parts])
    # Rejections are binomial with the level as their probability, so few are beyond these bounds.
    for level in (0.01, 0.05, 0.2):
        rejected = int((p_values <= level).sum())
        low, high = stats.binom.ppf([1e-4, 1 - 1e-4], repetitions, level)
        assert low <= rejected <= high, level
    assert stats.kstest(p_values, "uniform").pvalue > 1e-4


def test_it_is_a_function_of_table_draws_and_seed() -> None:
    problem = Halves(2, rows=200)
    draws, guess = problem.draws(np.ones((1, 2)), 300)[0], np.ones(2)
    first = local_c2st(problem.ranks, draws, guess, seed=5)
    assert first == local_c2st(problem.ranks, draws, guess, seed=5)
    assert first != local_c2st(problem.ranks, draws, guess, seed=6)


def test_what_it_can_not_test() -> None:
    problem = Halves(3, rows=60)
    draws = np.zeros((9, 2))
    with pytest.raises(ValueError, match="parameters"):
        local_c2st(problem.ranks, draws[:, :1], np.zeros(2))
    few = dataclasses.replace(problem.ranks, status=(np.arange(60) > 40).astype(np.uint8))
    nowhere = dataclasses.replace(problem.ranks, reference=np.full((60, 2), np.nan))
    for ranks in (few, nowhere):
        with pytest.raises(ValueError, match="at least 50"):
            local_c2st(ranks, draws, np.zeros(2))
