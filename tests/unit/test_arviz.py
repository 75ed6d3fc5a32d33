"""Draws for ArviZ: its schema, its statistics of them, and the way to a file and back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbi_dist.catalog.arviz import stored_as_arviz
from sbi_dist.catalog.infer import PREDICTIVE, infer
from sbi_dist.catalog.options import InferOptions
from sbi_dist.catalog.source import ArraySource
from sbi_dist.catalog.table import read_draws
from sbi_dist.errors import InputError
from sbi_dist.estimation.bundle import save_bundle
from sbi_dist.posterior import Posterior
from sbi_dist.posterior.arviz import datatree, write
from sbi_dist.priors import BoxUniform
from sbi_dist.problem import Problem
from sbi_dist.store import LocalStore
from tests.unit.test_untrusted_bundle import made

PRIOR = BoxUniform([-2.0, -2.0], [2.0, 2.0])
ABOUT = {"parameter_names": ["rate", "a/b"], "parameter_units": ["1/s", ""], "experiment": "e"}
X = [0.1, -0.2, 0.3]


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return Posterior(made(seed=1), PRIOR, ABOUT)


def test_draws_of_one_observation(posterior) -> None:
    import arviz_stats  # here, as for all processes that collect tests it would be slow

    tree = posterior.to_arviz(X, 400, seed=3, chains=4)
    draws = posterior.sample((400,), X, seed=3).numpy()
    group = tree["posterior"]
    assert group["rate"].dims == ("chain", "draw") and group["rate"].shape == (4, 100)
    assert set(group.data_vars) == {"rate", "a_b"} and group["a_b"].attrs["long_name"] == "a/b"
    assert group["rate"].attrs["units"] == "1/s" and "units" not in group["a_b"].attrs
    np.testing.assert_array_equal(group["rate"].values.ravel(), draws[:, 0])
    np.testing.assert_array_equal(group["a_b"].values.ravel(), draws[:, 1])
    # At the bounds of the prior a draw is rounded, and its way back through the flow is another.
    inside = np.abs(draws).max(axis=1) < 1.99
    off = tree["sample_stats"]["lp"].values.ravel() - posterior.log_prob(draws, X).numpy()
    assert inside.mean() > 0.5 and np.abs(off[inside]).max() < 0.02
    np.testing.assert_allclose(tree["observed_data"]["x"], X, rtol=1e-6)
    assert tree["prior"]["rate"].shape == (1, 400) and abs(tree["prior"]["a_b"]).max() <= 2
    about = group.attrs
    assert (about["inference_library"], about["experiment"]) == ("sbi_dist", "e")
    assert about["model"] == posterior.identity and about["seed"] == 3
    # ArviZ's own numbers of them.
    table = arviz_stats.summary(tree, round_to="none")
    np.testing.assert_allclose(table["mean"], draws.mean(0), atol=1e-5)
    np.testing.assert_allclose(table["sd"], draws.std(0), rtol=1e-5)
    assert (table["r_hat"] < 1.05).all() and (table["ess_bulk"] > 200).all()


def test_draws_of_the_default_x_and_of_several(posterior) -> None:
    with pytest.raises(InputError, match="set_default_x"):
        Posterior(posterior.estimator, PRIOR, ABOUT).to_arviz()
    state = torch.random.get_rng_state()
    several = posterior.to_arviz(np.array([X, [0.0] * 3]), 50, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    group = several["posterior"]
    assert group["rate"].dims == ("chain", "draw", "observation")
    assert group["observation"].values.tolist() == ["0", "1"]
    expected = posterior.sample_batched((50,), np.array([X, [0.0] * 3]), seed=1).numpy()
    np.testing.assert_array_equal(group["a_b"].values[0], expected[:, :, 1])
    assert several["observed_data"]["x"].dims == ("observation", "x_dim_0")
    assert several["prior"]["rate"].dims == ("chain", "draw")
    named = posterior.to_arviz([X], 50, observations=["galaxy 1"])
    assert named["posterior"].sizes["observation"] == 1
    bare = Posterior(posterior.estimator).to_arviz(X, 50)
    assert "prior" not in bare.children and "theta_1" in bare["posterior"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_draws": 50, "chains": 3}, "chains is 3; it must be 1 or more, and divide 50 draws"),
        ({"chains": 0}, "chains is 0"),
        ({"num_draws": 0}, "num_draws is 0; it must be 1 or more"),
        ({"observations": ["a", "b"]}, "observations has 2 names; there are 1"),
        ({"x": [1.0, 2.0]}, "x has shape"),
    ],
)
def test_what_can_not_be(posterior, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        posterior.to_arviz(**{"x": X, **given})


@pytest.mark.parametrize("names", [["a/b", "a_b"], ["chain", "b"], ["observation", "b"]])
def test_names_that_arviz_can_not_tell_apart(names) -> None:
    with pytest.raises(InputError, match="ArviZ needs 2 different ones"):
        datatree(np.zeros((1, 9, 2)), names)


def test_file_of_stored_draws(posterior, tmp_path: Path) -> None:
    """Of the problem's own data, with the predictive check, and of a catalog with a bad row."""
    import xarray

    model, target = LocalStore(tmp_path / "model"), LocalStore(tmp_path / "draws")
    save_bundle(model, posterior.estimator, ABOUT)
    stored = Posterior.from_store(model)
    problem = Problem(PRIOR, lambda theta: theta, observed=X)
    options = InferOptions(num_samples=60)

    def inferred(rows: list[list[float]], names: list[str], target: LocalStore, **given) -> int:
        source = ArraySource.of("c", np.array(rows, dtype=np.float32), names)
        chosen = InferOptions(num_samples=60, **given)
        return infer(stored, model, source, chosen, target, problem)["observations"]

    prior = np.zeros((5, 2), dtype=np.float32)
    inferred([X], ["observed"], target)
    np.save(tmp_path / "draws" / PREDICTIVE, np.ones((7, 3)))
    one = stored_as_arviz(target, 1, stored, options.num_samples, prior, np.array(X))
    path = str(tmp_path / "new folder/one.nc")
    write(one, path)
    with xarray.open_datatree(path, engine="h5netcdf") as read:
        draws = read_draws(target).draws[0]
        np.testing.assert_array_equal(read["posterior"]["rate"].values, draws[None, :, 0])
        assert read["posterior_predictive"]["x"].shape == (1, 7, 3)
        assert read["observed_data"]["x"].shape == (3,)
        assert read["prior"]["a_b"].shape == (1, 5)
        assert read["posterior"].attrs["experiment"] == "e"

    catalog = LocalStore(tmp_path / "catalog")
    assert inferred([X, [np.nan] * 3, X], ["p", "q", "r"], catalog) == 3
    tree = stored_as_arviz(catalog, 3, stored, 60, prior)
    assert tree["posterior"]["observation"].values.tolist() == ["p", "q", "r"]
    rate = tree["posterior"]["rate"]
    assert rate.sel(observation="q").isnull().all() and not rate.sel(observation="r").isnull().any()
    assert "observed_data" not in tree.children

    summaries = LocalStore(tmp_path / "summaries")
    inferred([X, X], ["p", "q"], summaries, output="summary")
    with pytest.raises(InputError, match="has summaries and no draws; use infer"):
        stored_as_arviz(summaries, 2, stored, 60, prior)
    with pytest.raises(InputError, match="more than the 134,217,728 numbers for one file"):
        stored_as_arviz(catalog, 10**7, stored, 60, prior)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can't be written"):
        write(tree, str(tmp_path / "file/inside.nc"))
    with pytest.raises(InputError, match=r"--arviz is 's3://b/draws\.nc'; it must be a file"):
        write(tree, "s3://b/draws.nc")


def test_where_it_is_not_installed(tmp_path: Path) -> None:
    """In a process that can't import it, as in an environment without the extra."""
    script = (
        "import sys; sys.modules['arviz_base'] = None\n"
        "from sbi_dist.cli import main\n"
        "main(['infer', 'gaussian', '--arviz', 'out.nc', '--store', 'runs'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "sbi-dist: ArviZ is needed for this and not installed; `pip install 'sbi_dist[arviz]'`, or "
        "arviz-base, h5netcdf and h5py\n"
    )
    assert not list(tmp_path.iterdir())
