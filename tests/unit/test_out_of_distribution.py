"""The out-of-distribution score: its p-values are calibrated, and it sees what is not simulated."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sbi_dist.errors import InputError
from sbi_dist.estimation.bundle import BUNDLE, OUT_OF_DISTRIBUTION, load_bundle, save_bundle
from sbi_dist.estimation.data import ArraySource, examples, split
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.ensemble import Ensemble
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.out_of_distribution import OutOfDistribution
from sbi_dist.estimation.scatter import Scatter
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.posterior import Posterior
from sbi_dist.store import LocalStore

Simulator = Callable[[np.random.Generator, int], np.ndarray]
FRACTION = 0.25


def gaussian(rng: np.random.Generator, count: int) -> np.ndarray:
    """Three correlated numbers."""
    return rng.standard_normal((count, 3)) @ np.array([[1, 2, 0], [0, 1, 1], [0, 0, 0.1]]) + 5


def skewed(rng: np.random.Generator, count: int) -> np.ndarray:
    """Five numbers with a common factor and tails to one side."""
    return rng.exponential(size=(count, 5)) ** 2 + rng.exponential(size=(count, 1))


def positive(rng: np.random.Generator, count: int) -> np.ndarray:
    """Two numbers over many orders of magnitude."""
    return np.exp(4 * rng.standard_normal((count, 1)) + rng.standard_normal((count, 2)))


def number(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_normal((count, 1))


def scalar(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.uniform(size=count)


def curve(rng: np.random.Generator, count: int) -> np.ndarray:
    """A random walk of 48 steps: more numbers than axes."""
    return np.cumsum(rng.standard_normal((count, 48)), axis=1)


def trials(rng: np.random.Generator, count: int) -> np.ndarray:
    """40 trials about a mean that varies."""
    return rng.standard_normal((count, 1)) + 2 * rng.standard_normal((count, 40))


def made(
    simulator: Simulator, count: int, seed: int = 0, **options: Any
) -> tuple[DensityEstimator, OutOfDistribution]:
    """An untrained estimator of simulations, and the scores of those held out."""
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal((count, 1), dtype=np.float32)
    x = simulator(rng, count).astype(np.float32)
    return fitted(theta, x, seed, **options)


def fitted(
    theta: np.ndarray, x: np.ndarray, seed: int = 0, **options: Any
) -> tuple[DensityEstimator, OutOfDistribution]:
    chosen = TrainOptions(transforms=1, hidden_features=8, blocks=1, **options)
    training, _ = split(len(x), FRACTION, seed)
    line = np.full(1, -math.inf), np.full(1, math.inf)
    standardization = Standardization.fit(theta[training], x[training], *line, chosen.x_scale)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        estimator = DensityEstimator(chosen, standardization, x.shape[1:]).eval()
    some = examples(ArraySource(theta, x), FRACTION, seed)
    return estimator, OutOfDistribution.fit(estimator, *map(torch.from_numpy, some))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two that wait for each other cost more than these small matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fresh(simulator: Simulator, count: int, seed: int = 1) -> torch.Tensor:
    x = simulator(np.random.default_rng((seed, 1)), count).astype(np.float32)
    return torch.from_numpy(x)


CASES: dict[str, tuple[Simulator, dict[str, Any]]] = {
    "gaussian": (gaussian, {}),
    "gaussian, embedded": (gaussian, {"embedding": "fully_connected"}),
    "skewed": (skewed, {"x_scale": "linear"}),
    "skewed, asinh, embedded": (skewed, {"x_scale": "asinh", "embedding": "fully_connected"}),
    "log": (positive, {"x_scale": "log"}),
    "one number": (number, {}),
    "a scalar": (scalar, {"x_scale": "linear"}),
    "more numbers than axes": (curve, {}),
    "trials, embedded": (trials, {"embedding": "permutation_invariant"}),
}


# ---- calibration --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_p_values_of_simulations_are_uniform(name: str) -> None:
    simulator, options = CASES[name]
    estimator, reference = made(simulator, 8000, **options)
    held_out, count = 2000, 3000
    assert reference.simulations == pytest.approx(held_out, abs=1)
    scores, p_values = reference.evaluate(estimator, fresh(simulator, count))
    assert scores.dtype == p_values.dtype == np.float32 and scores.shape == (count,)
    # Two empirical distributions about the same one, each within sqrt(log(2 / 1e-6) / 2 / n) of
    # it (Dvoretzky, Kiefer & Wolfowitz; Massart 1990). Those kept leave out 2 of 3 scores
    # outside the tail.
    apart = sum(math.sqrt(math.log(2e6) / 2 / n) for n in (held_out, count)) + 3 / held_out
    levels = (np.arange(count) + 0.5) / count
    assert np.abs(np.sort(p_values) - levels).max() < apart
    assert 0.85 < np.median(scores) < 1.15
    assert p_values.min() >= np.float32(1 / (1 + reference.simulations))


def test_p_values_are_valid_with_few_simulations() -> None:
    """Of 50, 12 or 13 are held out: the least p-value is 1/14 or so, and none is too low."""
    below, steps = [], (1, 3, 6)
    for seed in range(60):
        estimator, reference = made(curve, 50, seed)  # 48 numbers a row
        assert reference.simulations in (12, 13)
        _, p_values = reference.evaluate(estimator, fresh(curve, 30, seed))
        ranks = np.rint(p_values * (1 + reference.simulations))
        np.testing.assert_allclose(p_values, ranks / (1 + reference.simulations), rtol=1e-6)
        below.append([(ranks <= step).mean() * (1 + reference.simulations) for step in steps])
    # Among 1 + n exchangeable rows each rank is as probable. The bound: five standard errors.
    mean, error = np.mean(below, axis=0), np.std(below, axis=0) / math.sqrt(len(below))
    assert (np.abs(mean - steps) < 5 * error).all()


def test_kept_scores_round_p_values_up() -> None:
    estimator, reference = made(number, 16_000)
    count = reference.simulations
    assert count == pytest.approx(4000, abs=5) and len(reference.scores) == 1000
    rng = np.random.default_rng(0)
    theta, x = rng.standard_normal((16_000, 1), dtype=np.float32), number(rng, 16_000)
    _, held_out = examples(ArraySource(theta, x), FRACTION, 0)
    all_scores = np.sort(reference._scores(estimator, torch.from_numpy(held_out)).numpy())
    scores, p_values = reference.evaluate(estimator, fresh(number, 3000))
    exact = (1 + count - np.searchsorted(all_scores, scores)) / (1 + count)
    # float32 scores, so that one more or less may be counted.
    assert (p_values > exact - 1.5 / count).all()
    assert (p_values < exact + 1.5 / count + (count - 500) / 500 / count).all()
    tail = p_values < 500 / count
    assert tail.any() and (np.abs(p_values - exact)[tail] < 1.5 / count).all()


# ---- what it sees -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_shifts_are_seen(name: str) -> None:
    simulator, options = CASES[name]
    estimator, reference = made(simulator, 2000, **options)
    rows = fresh(simulator, 200)
    far = rows.max() ** 3 + 10  # beyond all that was simulated, on a log scale too
    scores, p_values = reference.evaluate(estimator, torch.full_like(rows, float(far)))
    assert (p_values == np.float32(1 / (1 + reference.simulations))).all() and (scores > 1).all()


def test_broken_correlation_is_seen() -> None:
    estimator, reference = made(gaussian, 2000)
    rows = fresh(gaussian, 200)
    swapped = torch.stack([rows[:, 0], rows.roll(1, 0)[:, 1], rows[:, 2]], dim=1)
    assert (reference.evaluate(estimator, swapped)[1] < 0.01).mean() > 0.5


def test_what_is_left_of_the_axes_is_seen() -> None:
    estimator, reference = made(curve, 1000)
    rough = fresh(curve, 100) + 5 * torch.tensor([1.0, -1.0]).repeat(24)
    assert (reference.evaluate(estimator, rough)[1] < 0.01).all()


def test_an_embedding_hides_nothing_of_x_and_adds_to_it() -> None:
    """A network that gives the same for all x leaves what x alone tells; and one that averages."""
    estimator, _ = made(gaussian, 2000, embedding="fully_connected")
    with torch.no_grad():
        for weights in estimator.flow.embedding.parameters():
            weights.zero_()
    training, held_out = fresh(gaussian, 1000, 5), fresh(gaussian, 500, 6)
    reference = OutOfDistribution.fit(estimator, training, held_out)
    plain, alone = made(gaussian, 2000)
    alone = OutOfDistribution.fit(plain, training, held_out)
    x = fresh(gaussian, 300) * 1.5
    np.testing.assert_array_equal(reference.evaluate(estimator, x)[1], alone.evaluate(plain, x)[1])
    # Of 40 noisy trials the mean says most: 6 is 5.7 sd of it, and 2.7 sd of a trial.
    shifted = fresh(trials, 300) / 3 + 6
    network, embedded = made(trials, 2000, embedding="permutation_invariant")
    plain, alone = made(trials, 2000)
    power = [
        (each.evaluate(model, shifted)[1] < 0.01).mean()
        for model, each in ((network, embedded), (plain, alone))
    ]
    assert power[0] > 0.9 and power[0] >= power[1]


def test_a_log_scale_goes_on_below_what_was_simulated() -> None:
    estimator, reference = made(positive, 2000, x_scale="log")
    low = float(estimator.standardization.x_low.min())
    rows = torch.tensor([[0.0, 0.0], [-low, -low], [-1.0, 1.0], [-1e30, 1.0]])
    scores, p_values = reference.evaluate(estimator, rows)
    assert (np.diff(scores[[0, 1, 2, 3]]) > 0).all()
    assert (p_values[1:] == p_values.min()).all() and p_values.min() < 0.003


# ---- extremes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_extreme_values(name: str) -> None:
    simulator, options = CASES[name]
    estimator, reference = made(simulator, 500, **options)
    one = fresh(simulator, 1)[0]
    first = (0,) * one.ndim
    rows = []
    for value in (1e30, -1e30, 3.4e38, 1e10, math.nan, math.inf, -math.inf):
        row = one.clone()
        row[first] = value
        rows.append(row)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores, p_values = reference.evaluate(estimator, torch.stack(rows))
    least = np.float32(1 / (1 + reference.simulations))
    assert np.isfinite(scores[:4]).all() and (p_values[:4] == least).all()
    assert np.isnan(scores[4:]).all() and np.isnan(p_values[4:]).all()


@pytest.mark.parametrize("column", [0.0, 5.0, 1e-20, 1e20])
def test_a_constant_column(column: float) -> None:
    def simulator(rng: np.random.Generator, count: int) -> np.ndarray:
        return np.concatenate([gaussian(rng, count), np.full((count, 1), column)], axis=1)

    estimator, reference = made(simulator, 1000)
    rows = fresh(simulator, 1000)
    assert (reference.evaluate(estimator, rows)[1] < 0.01).mean() < 0.05
    rows[:, 3] += max(1.0, 1e-3 * column)
    assert (reference.evaluate(estimator, rows)[1] < 0.01).all()


@pytest.mark.parametrize("size", [1, 50])
def test_simulations_that_are_all_the_same(size: int) -> None:
    estimator, reference = made(lambda rng, count: np.full((count, size), 2.0), 100)
    scores, p_values = reference.evaluate(estimator, torch.tensor([[2.0] * size, [2.5] * size]))
    assert p_values[0] == 1 and p_values[1] == p_values.min() < 0.05
    assert np.isfinite(scores).all()


def test_the_least_number_of_simulations() -> None:
    estimator, reference = made(curve, 20)
    _, p_values = reference.evaluate(
        estimator, torch.cat([fresh(curve, 3), 1e6 * torch.ones(1, 48)])
    )
    assert np.isfinite(p_values).all()
    assert p_values[3] == np.float32(1 / (1 + reference.simulations))


def test_no_observations() -> None:
    estimator, reference = made(gaussian, 100)
    assert [each.shape for each in reference.evaluate(estimator, torch.zeros(0, 3))] == [(0,), (0,)]


def test_many_observations_are_those_one_by_one() -> None:
    for name in ("gaussian, embedded", "more numbers than axes"):
        simulator, options = CASES[name]
        estimator, reference = made(simulator, 500, **options)
        rows = fresh(simulator, 10_000 if simulator is gaussian else 1000)
        together, _ = reference.evaluate(estimator, rows)
        for place in (0, 437, len(rows) - 1):
            alone, _ = reference.evaluate(estimator, rows[place : place + 1])
            np.testing.assert_allclose(alone[0], together[place], rtol=1e-4)


# ---- from a dataset -----------------------------------------------------------------------------


def test_examples_are_training_rows_and_held_out_rows() -> None:
    for count, fraction in ((20, 0.1), (50, 0.1), (3000, 0.3), (30_000, 0.1), (30_000, 1e-4)):
        number = np.arange(count, dtype=np.float32)
        found = examples(ArraySource(number[:, None], number[:, None]), fraction, 4)
        for x, rows, most in zip(found, split(count, fraction, 4), (1000, 10_000), strict=True):
            assert len(np.unique(x)) == len(x) == min(most, len(rows))
            assert np.isin(x[:, 0], rows).all()
            if len(rows) > 100:  # from all over the dataset
                assert abs(x.mean() / count - 0.5) < 5 / math.sqrt(12 * len(x))


def test_examples_of_large_rows_are_few() -> None:
    x = np.broadcast_to(np.float32(0), (2000, 100_000))  # 400 kB a row

    class Large(ArraySource):
        def __init__(self) -> None:
            super().__init__(np.zeros((2000, 1)), np.zeros((2000, 1)))
            self.x_shape = (100_000,)

        def read_rows(self, k: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            assert stop - start <= 10
            return np.zeros((stop - start, 1), np.float32), x[start:stop]

    training, held_out = examples(Large(), 0.1, 0)
    assert len(training) == 100 and 140 <= len(held_out) <= 160


def test_many_are_read_of_which_few_are_held_out() -> None:
    """A fraction of 1e-6: 200,000 rows are read, and one that is held out."""

    class Long(ArraySource):
        def __init__(self) -> None:
            super().__init__(np.zeros((1, 1)), np.zeros((1, 1)))
            self.counts, self.read_in_all = np.array([5_000_000]), 0

        def read_rows(self, k: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            self.read_in_all += stop - start
            x = np.arange(start, stop, dtype=np.float32)[:, None]
            return x, x

    source = Long()
    training, held_out = examples(source, 1e-6, 0)
    assert len(training) == 1000 and len(held_out) >= 1 and source.read_in_all < 201_000


def test_is_the_same_again_and_draws_no_random_numbers() -> None:
    before = torch.random.get_rng_state()
    first, second = (made(curve, 400, embedding="fully_connected")[1] for _ in range(2))
    torch.set_rng_state(torch.random.get_rng_state())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert json.dumps(first.to_data()) == json.dumps(second.to_data())


# ---- the bundle ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> tuple[DensityEstimator, OutOfDistribution]:
    return made(curve, 100, embedding="fully_connected")


def stored(estimator: Any, reference: OutOfDistribution, folder: Any) -> LocalStore:
    store = LocalStore(folder)
    save_bundle(store, estimator, {OUT_OF_DISTRIBUTION: reference.to_data()})
    return store


@pytest.mark.parametrize("name", CASES)
def test_bundle_round_trip(name: str, tmp_path) -> None:
    simulator, options = CASES[name]
    estimator, reference = made(simulator, 5000, **options)
    store = stored(estimator, reference, tmp_path)
    assert len(store.get(BUNDLE)) < 500_000
    rows = fresh(simulator, 500)
    expected = reference.evaluate(estimator, rows)
    found = Posterior.from_store(store).out_of_distribution(rows)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_ensemble(tmp_path) -> None:
    """Its first member's reference, which is that of the mixture."""
    members = [made(trials, 500, seed, embedding="permutation_invariant") for seed in range(2)]
    store = stored(Ensemble([member for member, _ in members]), members[0][1], tmp_path)
    rows = fresh(trials, 50)
    found = Posterior.from_store(store).out_of_distribution(rows)
    expected = members[0][1].evaluate(members[0][0], rows)
    np.testing.assert_array_equal(found, expected)


def test_a_bundle_without_a_reference(tmp_path) -> None:
    estimator, reference = made(gaussian, 200)
    store = LocalStore(tmp_path)
    save_bundle(store, estimator, {})
    other, _ = made(gaussian, 200, 1)
    about = save_bundle(
        LocalStore(tmp_path / "2"), other, {OUT_OF_DISTRIBUTION: reference.to_data()}
    )
    # Neither an older bundle, nor one of other weights, nor none.
    for posterior in (
        Posterior.from_store(store),
        Posterior(estimator, None, about),
        Posterior(estimator),
    ):
        for values in posterior.out_of_distribution(torch.zeros(4, 3)):
            assert values.shape == (4,) and values.dtype == np.float32 and np.isnan(values).all()


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in nested JSON data; of long lists, of a few."""
    if not isinstance(value, (dict, list)):
        return [at]
    some = list(enumerate(value))[:2] + list(enumerate(value))[2:][-1:]
    items = value.items() if isinstance(value, dict) else some
    return [at, *(path for key, each in items for path in places(each, (*at, key)))]


@pytest.mark.parametrize(
    "wrong",
    [None, -1, "x", [], math.nan, 1e300, 10**400],
    ids=lambda value: str(value)[:5],
)
def test_damaged_values_are_refused(wrong: Any, embedded, tmp_path) -> None:
    """Or do no harm."""
    store = stored(*embedded, tmp_path)
    content = json.loads(store.get(BUNDLE))
    rows = fresh(curve, 5)
    refused = 0
    for path in places(content[OUT_OF_DISTRIBUTION]):
        changed = copy.deepcopy(content)
        owner, last = changed, (OUT_OF_DISTRIBUTION, *path)
        for key in last[:-1]:
            owner = owner[key]
        owner[last[-1]] = wrong
        store.put(BUNDLE, json.dumps(changed).encode())
        try:
            posterior = Posterior.from_store(store)
        except InputError:
            refused += 1
            continue
        scores, p_values = posterior.out_of_distribution(rows)
        assert np.isfinite(scores).all() or path == ()
        assert ((p_values > 0) & (p_values <= 1)).all() or path == ()
    assert refused >= 20


def test_lengths_that_do_not_fit_are_refused(tmp_path) -> None:
    estimator, reference = made(curve, 100)
    plain = stored(estimator, reference, tmp_path / "plain")
    other = stored(made(gaussian, 200)[0], reference, tmp_path / "other")
    embedded, _ = made(curve, 100, embedding="fully_connected")
    spaces = stored(embedded, reference, tmp_path / "spaces")
    load_bundle(plain)
    for store in (other, spaces):
        with pytest.raises(InputError, match="holds no valid model"):
            load_bundle(store)
    content = json.loads(plain.get(BUNDLE))
    for change in (
        {"ranks": content[OUT_OF_DISTRIBUTION]["ranks"][::-1]},
        {"scores": content[OUT_OF_DISTRIBUTION]["scores"][::-1]},
        {"scores": content[OUT_OF_DISTRIBUTION]["scores"][1:]},
        {"simulations": len(content[OUT_OF_DISTRIBUTION]["scores"]) - 1},
        {"simulations": True},
        {"scores": [], "ranks": []},
    ):
        changed = {**content, OUT_OF_DISTRIBUTION: {**content[OUT_OF_DISTRIBUTION], **change}}
        plain.put(BUNDLE, json.dumps(changed).encode())
        with pytest.raises(InputError, match="holds no valid model"):
            load_bundle(plain)


# ---- scatter ------------------------------------------------------------------------------------


def test_scatter_of_few_numbers_is_the_mahalanobis_distance() -> None:
    x = fresh(gaussian, 1000).double()
    scatter = Scatter.fit(x)
    assert scatter.residual is None
    centred = x - x.mean(0)
    inverse = torch.linalg.inv(centred.T @ centred / len(x))
    exact = torch.einsum("ni,ij,nj->n", centred, inverse, centred) / 3
    torch.testing.assert_close(scatter.distance(x), exact, rtol=1e-3, atol=1e-4)
    assert float(exact.mean()) == pytest.approx(1.0)


def test_scatter_of_more_numbers_than_rows() -> None:
    x = fresh(curve, 100).double()
    wide = Scatter.fit(x)
    assert wide.axes.shape == (10, 48)
    torch.testing.assert_close(
        wide.axes @ wide.axes.T, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-5
    )
    assert float(wide.distance(x).mean()) == pytest.approx(1.0, abs=1e-3)
    # The same axes by the other of the two matrices.
    tall = Scatter.fit(x.repeat(2, 1))
    torch.testing.assert_close(tall.sd[:10], wide.sd, rtol=1e-5, atol=0)
    assert Scatter.fit(torch.zeros(20, 40_000, dtype=torch.float64)).axes.shape == (0, 40_000)
