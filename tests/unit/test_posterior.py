"""The posterior: its bundle, its draws and densities, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbi_dist.errors import InputError
from sbi_dist.estimation.bundle import BUNDLE, WEIGHTS, load_bundle, save_bundle
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.loop import fit
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.posterior import Posterior
from sbi_dist.posterior.posterior import PROMOTED
from sbi_dist.priors import BoxUniform, prior_to_data
from sbi_dist.store import LocalStore

NOISE = 0.3
PRIOR = BoxUniform([-2.0, -2.0], [2.0, 2.0])
ABOUT = {"prior": prior_to_data(PRIOR), "parameter_names": ["a", "b"]}


@pytest.fixture(scope="module")
def estimator() -> DensityEstimator:
    """Of x = theta + NOISE * noise, with the uniform prior on a box."""
    rng = np.random.default_rng(0)
    theta = rng.uniform(-2, 2, (1000, 2)).astype(np.float32)
    x = theta + np.float32(NOISE) * rng.standard_normal((1000, 2), dtype=np.float32)
    bounds = np.full(2, -2.0), np.full(2, 2.0)
    options = TrainOptions(transforms=2, hidden_features=16, blocks=1, bins=6, max_epochs=6)
    return fit(theta, x, bounds, options)[0]


@pytest.fixture
def posterior(estimator) -> Posterior:
    return Posterior(estimator, PRIOR, ABOUT)


@pytest.fixture
def store(estimator, tmp_path) -> LocalStore:
    saved = LocalStore(tmp_path / "model")
    save_bundle(saved, estimator, ABOUT)
    return saved


def close(first: torch.Tensor, second: torch.Tensor) -> None:
    """Equal but for the rounding of matrix products of another size."""
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


# ---- the bundle ---------------------------------------------------------------------------------


def test_bundle_round_trip(store, posterior) -> None:
    again = Posterior.load(store.uri)
    assert again.identity == posterior.identity
    assert again.x_shape == (2,) and again.parameter_names == ["a", "b"]
    assert again.prior is not None and prior_to_data(again.prior) == ABOUT["prior"]
    x = [0.5, -1.9]
    assert torch.equal(again.sample((50,), x, seed=1), posterior.sample((50,), x, seed=1))
    theta = posterior.sample((50,), x, seed=2)
    assert torch.equal(again.log_prob(theta, x), posterior.log_prob(theta, x))
    assert again.about["num_weights"] == again.estimator.num_weights
    assert "a, b" in repr(again) and again.identity in repr(again)


def test_copies_and_pickles_draw_the_same(posterior) -> None:
    """As sbi's diagnostics send a posterior to other processes."""
    posterior.set_default_x([0.5, -1.0])
    expected = posterior.sample((50,), seed=1)
    for again in (pickle.loads(pickle.dumps(posterior)), copy.deepcopy(posterior)):
        assert torch.equal(again.sample((50,), seed=1), expected)


def test_bundle_of_an_unknown_prior(estimator, tmp_path) -> None:
    store = LocalStore(tmp_path)
    save_bundle(store, estimator, {})
    posterior = Posterior.from_store(store)
    assert posterior.prior is None and posterior.parameter_names == ["theta_1", "theta_2"]
    assert posterior.sample((3,), [0.0, 0.0]).shape == (3, 2)


def test_promoted_model_of_an_experiment(estimator, tmp_path) -> None:
    experiment = LocalStore(tmp_path)
    save_bundle(experiment.child("models/m1"), estimator, ABOUT)
    with pytest.raises(InputError, match=r"holds no model \(bundle\.json is missing\)"):
        Posterior.load(str(tmp_path))
    experiment.put(PROMOTED, b'{"model": "m1"}')
    assert Posterior.load(str(tmp_path)).x_shape == (2,)
    for damaged in (b"", b"{}", b"[]", b'{"model": "../../elsewhere"}', b"\xff"):
        experiment.put(PROMOTED, damaged)
        with pytest.raises(InputError, match=r"promoted\.json is damaged"):
            Posterior.load(str(tmp_path))
    experiment.put(PROMOTED, b'{"model": "m2"}')
    with pytest.raises(InputError, match=r"m2 holds no model"):
        Posterior.load(str(tmp_path))


def test_damaged_weights(store) -> None:
    weights = store.get(WEIGHTS)
    flipped = bytearray(weights)
    flipped[len(weights) // 2] ^= 1
    for damaged in (b"", weights[:-1], bytes(flipped), b"PK\x03\x04 a pickle"):
        store.put(WEIGHTS, damaged)
        with pytest.raises(InputError, match=r"weights\.safetensors is damaged: .* checksum"):
            load_bundle(store)
    store.delete(WEIGHTS)
    with pytest.raises(InputError, match=r"weights\.safetensors is missing"):
        load_bundle(store)


def test_damaged_json(store) -> None:
    text = store.get(BUNDLE)
    for damaged in (b"", text[:-2], b"\xff\xfe", b"null", b"[]", b"{}", b'"bundle"'):
        store.put(BUNDLE, damaged)
        with pytest.raises(InputError, match="holds no valid model"):
            load_bundle(store)
    store.put(BUNDLE, text.replace(b'"format": 1', b'"format": 3'))
    with pytest.raises(InputError, match="has format 3; this version reads 1 and 2"):
        load_bundle(store)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in nested JSON data."""
    if not isinstance(value, (dict, list)):
        return [at]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    inner = [path for key, each in items for path in places(each, (*at, key))]
    return [at, *inner] if at else inner


@pytest.mark.parametrize("wrong", [None, -1, "x", [], math.inf, math.nan, 10**6], ids=repr)
def test_wrong_values_in_the_json(store, wrong) -> None:
    """They are refused, or do no harm."""
    content = json.loads(store.get(BUNDLE))
    needed = {key: content[key] for key in ("estimator", "standardization", "x_shape", "prior")}
    refused = 0
    for path in places(needed):
        changed = copy.deepcopy(content)
        owner = changed
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = wrong
        store.put(BUNDLE, json.dumps(changed).encode())
        try:
            posterior = Posterior.from_store(store)
        except InputError:
            refused += 1
            continue
        draws = posterior.sample((3,), [0.5, 0.5], seed=0)
        assert torch.isfinite(draws).all(), path
        assert posterior.log_prob(draws, [0.5, 0.5]).shape == (3,)
    assert refused >= 8


def test_loading_needs_neither_ray_nor_a_simulator(store) -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'sbi_dist.problem', 'sbi_dist.simulator', 'pyarrow'):\n"
        "    sys.modules[name] = None\n"
        "from sbi_dist import Posterior\n"
        f"posterior = Posterior.load({store.uri!r})\n"
        "print(posterior.sample((3, 2), x=[0.1, 0.2], seed=5).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    close(
        torch.tensor(json.loads(done.stdout)),
        Posterior.load(store.uri).sample((3, 2), x=[0.1, 0.2], seed=5),
    )


# ---- draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,), 4], ids=repr)
def test_shapes_of_draws(posterior, shape) -> None:
    expected = (shape,) if isinstance(shape, int) else shape
    for x in ([0.5, 0.5], torch.tensor([[0.5, 0.5]]), np.array([0.5, 0.5])):
        draws = posterior.sample(shape, x=x)
        assert draws.shape == (*expected, 2) and draws.dtype == torch.float32
    assert posterior.sample_batched(shape, torch.zeros(3, 2)).shape == (*expected, 3, 2)
    assert posterior.sample_batched(shape, torch.zeros(1, 2)).shape == (*expected, 1, 2)


def test_seeds(posterior) -> None:
    x = [0.5, 0.5]
    one, two = (posterior.sample((500,), x, seed=seed) for seed in (1, 2))
    assert torch.equal(posterior.sample((500,), x, seed=1), one)
    # Of a million pairs of float32 numbers a few are equal by chance, of their rows none.
    assert not (one[:, None] == two).all(dim=-1).any()
    torch.manual_seed(7)
    first, second = posterior.sample((9,), x), posterior.sample((9,), x)
    assert not torch.isin(first, second).any()
    torch.manual_seed(7)
    assert torch.equal(posterior.sample((9,), x), first)
    # Another observation has noise of its own; a correlation has an sd of 1 / sqrt(500).
    other = posterior.sample((500,), [0.5, 0.6], seed=1)
    correlation = torch.corrcoef(torch.stack([one[:, 0], other[:, 0]]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(500)


def test_draws_do_not_depend_on_the_batch(posterior) -> None:
    x = 2 * torch.rand(40, 2, generator=torch.Generator().manual_seed(1)) - 1
    together = posterior.sample_batched((20,), x, seed=3)
    close(posterior.sample_batched((20,), x[:7], seed=3), together[:, :7])
    order = torch.randperm(40)
    close(posterior.sample_batched((20,), x[order], seed=3), together[:, order])
    for row in (0, 39):
        close(posterior.sample((20,), x[row], seed=3), together[:, row])


def test_draws_do_not_depend_on_their_number(posterior) -> None:
    many = posterior.sample((9000,), [0.5, 0.5], seed=3)  # more than go through the flow at once
    assert len(many.unique(dim=0)) > 8990
    close(posterior.sample((100,), [0.5, 0.5], seed=3), many[:100])
    later, _ = posterior.draws(torch.tensor([[0.5, 0.5]]), 90, 3, first=8150)
    close(later[0], many[8150:8240])
    close(posterior.sample((90, 100), [0.5, 0.5], seed=3).reshape(9000, 2), many)
    x = torch.zeros(30, 2)
    x[:, 0] = torch.linspace(-1, 1, 30)
    batched = posterior.sample_batched((500,), x, seed=3)  # nor on the chunks of observations
    close(posterior.sample_batched((10,), x, seed=3), batched[:10])


def test_draws_are_those_of_the_problem(posterior) -> None:
    for x in ([0.5, -0.5], [1.95, 0.0]):
        draws = posterior.sample((4000,), x, seed=1)
        assert ((draws >= -2) & (draws <= 2)).all()
    # Of the last x, whose first component is cut by the edge: a normal of sd NOISE around 1.95 up
    # to 2. The fit to 900 simulations places it to a fifth of its sd; see test_loop.py.
    low, high = (-2 - 1.95) / NOISE, (2 - 1.95) / NOISE
    phi = math.exp(-0.5 * high**2) / math.sqrt(2 * math.pi)
    mean = 1.95 - NOISE * phi / (0.5 * math.erfc(-high / math.sqrt(2)))
    assert low < -10
    assert float(draws[:, 0].mean()) == pytest.approx(mean, abs=0.2 * NOISE)
    assert float(draws[:, 1].std()) == pytest.approx(NOISE, rel=0.2)


# ---- densities ----------------------------------------------------------------------------------


def test_log_prob(posterior) -> None:
    x = torch.tensor([[0.5, -0.5], [1.0, 1.0]])
    theta = posterior.sample_batched((6,), x, seed=0)
    batched = posterior.log_prob_batched(theta, x)
    assert batched.shape == (6, 2)
    for row in range(2):
        close(posterior.log_prob(theta[:, row], x[row]), batched[:, row])
    assert posterior.log_prob(theta[0, 0], x[0]).shape == (1,)
    close(posterior.log_prob_batched(theta.reshape(2, 3, 2, 2), x), batched.reshape(2, 3, 2))
    outside = [[2.01, 0.0], [0.0, -2.01], [math.inf, 0.0], [math.nan, 0.0]]
    assert (posterior.log_prob(outside, x[0]) == -math.inf).all()
    assert torch.isfinite(posterior.log_prob([[2.0, 2.0], [-2.0, 2.0]], x[0])).all()


def test_map(posterior) -> None:
    x, effort = [0.5, -0.5], {"num_init_samples": 200, "num_to_optimize": 5}
    best = posterior.map(x, **effort)
    assert best.shape == (1, 2)
    # The exact mode is x; the fit places it to a third of the posterior's sd or better.
    np.testing.assert_allclose(best[0], x, atol=NOISE / 3)
    edge = [1.8, -1.9]  # where the map to R^D bends
    for observed, mode in ((x, best), (edge, posterior.map(edge, **effort))):
        highest = posterior.log_prob(mode, observed)
        draws = posterior.sample((5000,), observed, seed=0)
        assert float(highest) >= float(posterior.log_prob(draws, observed).max()) - 1e-3
    posterior.set_default_x(x)
    assert torch.equal(posterior.map(**effort), best)
    assert torch.equal(posterior.map(), best)  # known by now
    posterior.set_default_x([1.0, 1.0])
    assert not torch.equal(posterior.map(**effort), best)


# ---- observations -------------------------------------------------------------------------------


def test_default_x(posterior) -> None:
    with pytest.raises(InputError, match="x is missing; give x, or set one"):
        posterior.sample((3,))
    assert posterior.set_default_x([0.5, 0.5]) is posterior
    assert posterior.default_x.shape == (1, 2)
    expected = posterior.sample((3,), [0.5, 0.5], seed=1)
    assert torch.equal(posterior.sample((3,), seed=1), expected)
    with pytest.raises(InputError, match="default_x holds 2 observations; it must be one"):
        posterior.default_x = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([0.5], r"x has shape \(1,\); an observation has shape \(2,\), a batch .* \(B, 2\)"),
        (torch.zeros(2, 3), r"x has shape \(2, 3\)"),
        (torch.zeros(3, 2, 2), r"x has shape \(3, 2, 2\)"),
        (1.0, r"x has shape \(\)"),
        ([0.5, math.nan], "x holds NaN or infinite values in observation 0; every value"),
        ([[0.5, 0.5], [math.inf, 0.5], [0.5, math.nan]], r"in observation 1 and 1 more"),
        (torch.zeros(0, 2), "x holds no observation"),
        (["a", "b"], "x is no array of numbers"),
        ([[0.5], [0.5, 0.5]], "x is no array of numbers"),
    ],
)
def test_wrong_observations(posterior, x, message) -> None:
    for use in (
        lambda: posterior.sample((3,), x),
        lambda: posterior.sample_batched((3,), x),
        lambda: posterior.log_prob(torch.zeros(3, 2), x),
        lambda: posterior.map(x),
    ):
        with pytest.raises(InputError, match=message):
            use()


def test_more_than_one_observation(posterior) -> None:
    with pytest.raises(InputError, match="x holds 3 observations; sample takes one, use sample_b"):
        posterior.sample((3,), torch.zeros(3, 2))
    with pytest.raises(InputError, match=r"theta has shape \(5, 2\); for 3 observations it must"):
        posterior.log_prob_batched(torch.zeros(5, 2), torch.zeros(3, 2))
    with pytest.raises(InputError, match=r"theta has shape \(5, 3\); its last length must be"):
        posterior.log_prob(torch.zeros(5, 3), [0.5, 0.5])
    with pytest.raises(InputError, match="lengths must not be negative"):
        posterior.sample((-1,), [0.5, 0.5])
