"""Are the posteriors right? The shipped problems against exact and published posteriors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sbi_dist import NPE, Posterior, simulate_for_sbi
from sbi_dist.priors import sample_prior
from sbi_dist.problems import gaussian, lynx_hare
from sbi_dist.report import predictive_coverage
from tests.ray.conftest import Run
from tests.ray.test_pipeline import said


def train_gaussian(num_simulations: int) -> Posterior:
    prior = gaussian.problem.prior
    theta, x = simulate_for_sbi(
        gaussian.problem.simulator, prior, num_simulations, seed=11, show_progress_bar=False
    )
    inference = NPE(prior, show_progress_bars=False).append_simulations(theta, x)
    inference.train(seed=0)
    return inference.build_posterior()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("num_simulations", "mean_bound", "sd_bound"), [(2000, 0.15, 0.15), (10_000, 0.07, 0.07)]
)
def test_gaussian_against_the_exact_posterior(
    num_simulations: int, mean_bound: float, sd_bound: float
) -> None:
    """The bounds are the project's promise for 20 observations of the prior predictive.

    With 10,000 draws the sample mean's own error is 0.01 sd and the sample sd's 0.7 %, small
    beside them.
    """
    posterior = train_gaussian(num_simulations)
    torch.manual_seed(5)
    theta = sample_prior(gaussian.problem.prior, 20)
    x = gaussian.simulator(theta.astype(np.float64), np.random.default_rng(5))
    draws = posterior.sample_batched((10_000,), x, seed=0).double().numpy()
    mean, sd, _ = gaussian.analytic_posterior(x)
    assert np.abs((draws.mean(0) - mean) / sd).mean() <= mean_bound
    assert np.abs(draws.std(0) / sd - 1).mean() <= sd_bound
    assert (draws >= -2).all() and (draws <= 2).all()
    if num_simulations > 2000:
        return
    # In the middle of the prior, at its very corner, and where the noise led out of it.
    for centre in ([0.0, 0.3, -0.2], [2.0, -2.0, 2.0], [-2.05, 2.05, -1.95]):
        assert _integral(posterior, np.array(centre)) == pytest.approx(1.0, abs=0.01)


def _integral(posterior: Posterior, centre: np.ndarray, points: int = 80) -> float:
    """Integral of the density over the prior's box, by the midpoint rule around the posterior.

    The points have equal steps in a sinh scale, so that the rule resolves both the posterior's sd
    of 0.1 and the bend of the density at the prior's edge; further than 1 from ``centre`` (10 sd)
    there is no mass.
    """
    low, high = np.maximum(centre - 1.0, -2.0), np.minimum(centre + 1.0, 2.0)
    axes, widths = [], []
    for c, a, b in zip(np.clip(centre, -2, 2), low, high, strict=True):
        steps = np.linspace(np.arcsinh((a - c) / 0.01), np.arcsinh((b - c) / 0.01), points + 1)
        edges = c + 0.01 * np.sinh(steps)
        axes.append((edges[1:] + edges[:-1]) / 2)
        widths.append(np.diff(edges))
    grid = np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")], axis=1)
    cells = np.einsum("i,j,k->ijk", *widths).ravel()
    log_density = posterior.log_prob(grid.astype(np.float32), centre + gaussian.SHIFT)
    return float((log_density.double().exp().numpy() * cells).sum())


@pytest.mark.usefixtures("ray_session")
def test_tutorial_of_sbi_with_only_its_imports_changed() -> None:
    import sbi_dist
    from sbi_dist import (
        SNPE,
        BoxUniform,
        check_sbi_inputs,
        process_prior,
        process_simulator,
    )

    torch.manual_seed(3)
    num_dim = 3
    prior = BoxUniform(low=-2 * torch.ones(num_dim), high=2 * torch.ones(num_dim))

    def simulator(theta: torch.Tensor) -> torch.Tensor:
        return theta + 1.0 + torch.randn_like(theta) * 0.1

    prior, _, prior_returns_numpy = process_prior(prior)
    simulator = process_simulator(simulator, prior, prior_returns_numpy)
    check_sbi_inputs(simulator, prior)
    inference = SNPE(prior=prior)
    theta, x = simulate_for_sbi(simulator, proposal=prior, num_simulations=2000)
    assert theta.shape == x.shape == (2000, 3)
    # The noise's sd: its standard error over 6,000 numbers is 0.1 / sqrt(12,000) = 0.0009.
    assert float((x - theta - 1).std()) == pytest.approx(0.1, abs=0.004)
    inference = inference.append_simulations(theta, x)
    density_estimator = inference.train()
    posterior = inference.build_posterior(density_estimator)
    for _ in range(2):
        theta_true = prior.sample((1,))
        x_obs = simulator(theta_true)
        samples = posterior.sample((10000,), x=x_obs)
        assert samples.shape == (10000, 3)
        mean, sd, _ = gaussian.analytic_posterior(x_obs.numpy()[0])
        assert np.abs((samples.mean(0).numpy() - mean) / sd).max() < 0.5
        figure, axes = sbi_dist.pairplot(
            samples,
            limits=[[-2, 2], [-2, 2], [-2, 2]],
            figsize=(5, 5),
            labels=[r"$\theta_1$", r"$\theta_2$", r"$\theta_3$"],
            points=theta_true,
        )
        assert axes.shape == (3, 3) and figure.get_size_inches().tolist() == [5, 5]


def test_lynx_hare_against_the_published_posterior(program: Run, tmp_path: Path) -> None:
    """The shipped experiment as it is, against HMC on the same model (posteriordb)."""
    said(program("run", "lynx_hare", timeout=900), 0)
    folder = next((tmp_path / "runs/lynx_hare/posteriors").glob("observed-*"))
    table = pq.read_table(folder / "part-000000.parquet")
    assert table["status"].to_pylist() == ["ok"]
    draws = table["draws"].combine_chunks().to_numpy_ndarray()[0].astype(np.float64)
    published = np.array([lynx_hare.PUBLISHED[name] for name in lynx_hare.problem.parameter_names])
    difference = np.abs(draws.mean(0) - published[:, 0])
    assert (difference <= draws.std(0)).all()
    assert (draws.std(0) <= 2 * published[:, 1]).all()
    # Weighted draws: their error is that of some hundred independent ones at least.
    size = float(table["effective_sample_size"][0].as_py())
    assert size > 300
    assert (difference <= 5 / np.sqrt(size) * published[:, 1]).all()
    x = np.load(io.BytesIO((folder / "predictive.npy").read_bytes()))
    coverage = predictive_coverage(x, lynx_hare.problem.observed, 0.95)
    assert [total for _, total in coverage] == [21, 21]
    assert all(19 <= inside <= 21 for inside, _ in coverage)
