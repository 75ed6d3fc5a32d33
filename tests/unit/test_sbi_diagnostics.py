"""sbi's own diagnostics take our posterior, and come to what our calibration comes to."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from sbi_dist.calibration.coverage import coverage
from sbi_dist.calibration.held_out import HeldOut
from sbi_dist.calibration.options import CalibrateOptions
from sbi_dist.calibration.reduce import reduce_block
from sbi_dist.calibration.reference import Scale
from sbi_dist.calibration.sbc import sbc
from sbi_dist.calibration.stage import RANKS, calibrate
from sbi_dist.calibration.table import Ranks, from_arrow
from sbi_dist.calibration.tarp import tarp_data
from sbi_dist.estimation.bundle import save_bundle
from sbi_dist.estimation.loop import fit
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.posterior import Posterior
from sbi_dist.priors import BoxUniform, prior_to_data
from sbi_dist.simulation.plan import Shard
from sbi_dist.simulation.shard import Simulations, encode_shard
from sbi_dist.store import LocalStore
from tests.unit.samples import about

ROWS, DRAWS, SIZE = 300, 400, 2
NOISE, HIGH = 0.3, 2.0
PRIOR = BoxUniform([-HIGH] * SIZE, [HIGH] * SIZE)
NAMES = ["a", "b"]
# A deviation that one of some hundred comparisons exceeds once in ten thousand runs of this file.
SURE = float(stats.norm.isf(0.5 * 1e-4 / 300))


@pytest.fixture(scope="module")
def sbi() -> SimpleNamespace:
    """Imported here: that takes seconds, which processes that only collect tests would take too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        from sbi import analysis, diagnostics
    return SimpleNamespace(**{**vars(analysis), **vars(diagnostics)})


class Case(NamedTuple):
    """A posterior trained for a moment, held-out simulations, and our calibration with them."""

    posterior: Posterior
    theta: torch.Tensor
    x: torch.Tensor
    ours: Ranks
    found: dict


def simulated(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    theta = rng.uniform(-HIGH, HIGH, (rows, SIZE)).astype(np.float32)
    x = theta + np.float32(NOISE) * rng.standard_normal((rows, SIZE), dtype=np.float32)
    return theta, x


def stored(folder: Path, theta: np.ndarray, x: np.ndarray) -> tuple:
    rows = len(theta)
    simulations = Simulations(np.arange(rows), theta, x, {}, np.zeros(rows, np.float32))
    data, record = encode_shard(simulations, about(0, x.shape[1:]))
    store = LocalStore(folder)
    store.put(Shard(0, 0, rows).key, data)
    return store, [record]


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("calibrated")
    training = simulated(1000, 0)
    options = TrainOptions(transforms=2, hidden_features=16, blocks=1, bins=6, max_epochs=6)
    bounds = np.full(SIZE, -HIGH), np.full(SIZE, HIGH)
    estimator = fit(*training, bounds, options)[0]
    model = LocalStore(folder / "model")
    save_bundle(model, estimator, {"prior": prior_to_data(PRIOR), "parameter_names": NAMES})
    theta, x = simulated(ROWS, 1)
    target = LocalStore(folder / "calibration")
    found = calibrate(
        model,
        HeldOut("held", *stored(folder / "held", theta, x)),
        stored(folder / "trained", *training),
        CalibrateOptions(num_simulations=ROWS, num_draws=DRAWS),
        target,
    )
    ours, _ = from_arrow(pq.read_table(io.BytesIO(target.get(RANKS))))
    return Case(
        Posterior.from_store(model), torch.from_numpy(theta), torch.from_numpy(x), ours, found
    )


def draws(case: Case, seed: int) -> torch.Tensor:
    """What sbi draws with torch's seed, (DRAWS, ROWS, SIZE)."""
    torch.manual_seed(seed)
    return case.posterior.sample_batched((DRAWS,), case.x)


def reduced(case: Case, seed: int, scale: Scale, reference: np.ndarray | None = None) -> Ranks:
    """Our ranks of the draws that sbi is given with torch's seed."""
    samples = draws(case, seed)
    log_q = case.posterior.log_prob_batched(samples, case.x)
    at_theta = case.posterior.log_prob_batched(case.theta[None], case.x)[0]
    return reduce_block(
        np.arange(ROWS),
        case.theta.numpy(),
        samples.transpose(0, 1).numpy(),
        log_q.T.numpy(),
        at_theta.numpy(),
        scale=scale,
        reference=reference,
    )


def within(first: np.ndarray, second: np.ndarray) -> None:
    """Two ranks among DRAWS draws of the same posterior: binomial with the same probability."""
    share = (first + second + 1) / (2 * DRAWS + 2)
    z = (first - second) / np.sqrt(2 * DRAWS * share * (1 - share))
    assert np.abs(z).max() < SURE + 1, "one simulation"  # the tails of few draws are not normal
    # Both have the same error: mean 0, and a mean square of 1 with sd sqrt(2 / rows) at most.
    assert np.abs(z.mean()) < SURE / np.sqrt(z.size)
    assert np.square(z).mean() < 1 + SURE * np.sqrt(2 / z.size)


def test_ranks_are_ours_draw_by_draw(case, sbi) -> None:
    torch.manual_seed(1)
    theirs, averaged = sbi.run_sbc(
        case.theta, case.x, case.posterior, DRAWS, show_progress_bar=False
    )  # fmt: skip
    ours = reduced(case, 1, Scale.of(case.theta.numpy()))
    np.testing.assert_array_equal(ours.rank, theirs.numpy())
    torch.testing.assert_close(averaged, draws(case, 1)[0], rtol=0, atol=0)
    checked = sbi.check_sbc(theirs, case.theta, averaged, DRAWS)
    # The job drew with other seeds. Its ranks have the same distribution, and so do its tests.
    within(case.ours.rank, theirs.numpy())
    for each, p, part in zip(
        case.ours.rank.T, checked["ks_pvals"], sbc(case.ours, NAMES).parts, strict=True
    ):
        theirs_d = _distance(float(p))
        ours_d = stats.kstest(each, stats.uniform(0, DRAWS).cdf).statistic
        assert abs(ours_d - theirs_d) < _noise_of_distance(each)
        # Ours looks at a hundred levels, where its steps are exact; sbi between all of them.
        assert abs(part.statistic - ours_d) < 0.02
    assert checked["c2st_dap"].shape == checked["c2st_ranks"].shape == (SIZE,)
    figure, _ = sbi.sbc_rank_plot(theirs, DRAWS, parameter_labels=NAMES)
    assert figure.axes


def _distance(p: float) -> float:
    """The distance that Kolmogorov and Smirnov's test of ROWS ranks gives this p-value."""
    return float(stats.kstwo.isf(p, ROWS))


def _noise_of_distance(ranks: np.ndarray) -> float:
    """How far two distances are at most, as far as two sets of draws for the same rows differ.

    At level t the two distribution functions differ by a mean of differences of indicators, each
    with the variance 2 p (1 - p), where p is the chance of a rank below t.
    """
    share = (ranks + 0.5) / (DRAWS + 1)
    levels = np.linspace(0, 1, 101)[1:-1]
    p = stats.binom.cdf(np.floor(levels[:, None] * DRAWS), DRAWS, share)
    return SURE * float(np.sqrt((2 * p * (1 - p)).sum(axis=1).max())) / ROWS


def test_ranks_one_observation_after_the_other(case, sbi) -> None:
    """As sbi has it without ``sample_batched``."""
    theirs, _ = sbi.run_sbc(
        case.theta, case.x, case.posterior, DRAWS,
        use_batched_sampling=False, show_progress_bar=False,
    )  # fmt: skip
    within(case.ours.rank, theirs.numpy())


def test_expected_coverage_is_ours(case, sbi) -> None:
    """sbi counts draws of a lower density than the truth, here those of a higher one count."""
    torch.manual_seed(2)
    theirs = sbi.run_sbc(
        case.theta, case.x, case.posterior, DRAWS, case.posterior.log_prob, show_progress_bar=False
    )[0].numpy()[:, 0]
    ours = reduced(case, 2, Scale.of(case.theta.numpy()))
    # A density comes out of a product of matrices of another size, and may be rounded otherwise.
    assert np.abs(ours.hpd_rank - (DRAWS - theirs)).max() <= 1
    within(case.ours.hpd_rank, DRAWS - theirs)
    found = coverage(ours)
    assert found is not None
    mean_coverage = 0.5 - np.mean((DRAWS - theirs + 0.5) / (DRAWS + 1))
    assert found.parts[0].statistic == pytest.approx(mean_coverage, abs=1 / DRAWS)


def test_tarp_is_ours(case, sbi) -> None:
    """With the same points, and distances in the unit that sbi takes: each parameter's range."""
    theta = case.theta.numpy()
    low, high = theta.min(axis=0), theta.max(axis=0)
    points = np.random.default_rng(3).uniform(low, high, theta.shape).astype(np.float32)
    torch.manual_seed(3)
    ecp, alpha = sbi.run_tarp(
        case.theta, case.x, case.posterior, torch.from_numpy(points), DRAWS,
        num_bins=30, show_progress_bar=False,
    )  # fmt: skip
    ours = reduced(case, 3, Scale(low.astype(float), (high - low).astype(float)), points)
    share = np.sort(ours.tarp_data_rank / DRAWS)
    # Theirs are shares of ranks below the ends of bins. A rank that is one off by rounding, or at
    # the end of a bin, counts in the next.
    ends = alpha.numpy()[1:-1].astype(float)
    fewest = np.searchsorted(share, ends - 1.5 / DRAWS) / ROWS
    most = np.searchsorted(share, ends + 1.5 / DRAWS) / ROWS
    assert (ecp.numpy()[1:-1] >= fewest - 1e-6).all() and (ecp.numpy()[1:-1] <= most + 1e-6).all()
    found = tarp_data(ours)
    assert found is not None
    theirs, _ = sbi.check_tarp(ecp, alpha)
    # A sum over a hundred levels, and one over the thirty ends of bins: a bin at both ends.
    assert abs(found.parts[0].statistic - theirs) < 1 / 30


def test_pairplot_takes_our_draws(case, sbi) -> None:
    case.posterior.set_default_x(case.x[0])
    figure, axes = sbi.pairplot(case.posterior.sample((500,)), points=case.theta[:1], labels=NAMES)
    assert np.shape(axes) == (SIZE, SIZE) and len(figure.axes) >= SIZE
