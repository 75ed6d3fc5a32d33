"""Ensembles: the mixture's density and draws, its bundle, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.bijection import SupportBijection
from sbi_dist.catalog.infer import infer
from sbi_dist.catalog.options import InferOptions
from sbi_dist.catalog.source import ArraySource
from sbi_dist.catalog.table import read_draws
from sbi_dist.errors import InputError
from sbi_dist.estimation.bundle import (
    BUNDLE,
    WEIGHTS,
    load_bundle,
    save_bundle,
    weights_digest,
)
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.ensemble import Ensemble
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.posterior import Posterior
from sbi_dist.posterior.importance import weigh
from sbi_dist.posterior.sampler import Sampler
from sbi_dist.priors import BoxUniform, prior_to_data
from sbi_dist.store import LocalStore

PRIOR = BoxUniform([-2.0, -2.0], [2.0, 2.0])
ABOUT = {"prior": prior_to_data(PRIOR), "parameter_names": ["a", "b"]}
SMALL: dict[str, Any] = {"transforms": 2, "hidden_features": 8, "blocks": 1, "bins": 4}
X = [0.3, -0.2]


def member(
    mean: float,
    sd: float,
    softness: float = 0.02,
    seed: int | None = None,
    bounds: tuple[float, float] = (-2.0, 2.0),
    x_size: int = 2,
    **options: Any,
) -> DensityEstimator:
    """An estimator of two parameters.

    A new flow is the identity: without ``seed``, theta is normal of that mean and sd, as far as it
    is away from the edges. With a seed, the weights are random and it depends on x.
    """
    low, high = (np.full(2, bound) for bound in bounds)
    numbers = torch.zeros(x_size, dtype=torch.float64)
    standardization = Standardization(
        bijection=SupportBijection(low, high, softness),
        theta_mean=torch.full((2,), mean / 2, dtype=torch.float64),  # z = theta / 2 inside
        theta_sd=torch.full((2,), sd / 2, dtype=torch.float64),
        x_scale="linear",
        x_low=numbers + 1.0,
        x_centre=numbers,
        x_width=numbers + 1.0,
        x_mean=numbers + mean,
        x_sd=numbers + 1.0 + sd,
    )
    made = DensityEstimator(TrainOptions(**{**SMALL, **options}), standardization, (x_size,))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in made.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return made.eval()


LOW, HIGH = (-1.0, 0.1), (0.8, 0.16)  # mean and sd


@pytest.fixture
def apart() -> Ensemble:
    return Ensemble([member(*LOW, transforms=1), member(*HIGH, softness=0.03, transforms=1)])


@pytest.fixture
def random() -> Ensemble:
    """Three whose densities depend on x and reach the edges, of different architectures.

    Their sd in z, half of that in theta, is below the softness, so that their densities are finite
    at the edges.
    """
    return Ensemble(
        [
            member(-0.8, 0.5, 0.3, seed=0),
            member(0.5, 0.6, 0.5, seed=1, transforms=1, embedding="fully_connected"),
            member(1.7, 0.4, 0.4, seed=2, estimator="maf"),
        ]
    )


def close(first: torch.Tensor, second: torch.Tensor) -> None:
    """Equal but for the rounding of matrix products of another size."""
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


# ---- the density --------------------------------------------------------------------------------


@torch.no_grad()
def test_density_is_the_mean_of_the_members(random) -> None:
    rng = np.random.default_rng(0)
    theta = torch.from_numpy(rng.uniform(-2, 2, (500, 2)).astype(np.float32))
    theta[:2] = torch.tensor([[-2.0, 2.0], [2.0, 2.0]])
    x = torch.from_numpy(rng.standard_normal((500, 2), dtype=np.float32))
    each = torch.stack([each.log_prob(theta, x) for each in random.members])
    mean = each.double().exp().mean(0).log().float()
    log_q = random.log_prob(theta, x)
    assert log_q.dtype == torch.float32 and torch.isfinite(log_q).all()
    torch.testing.assert_close(log_q, mean, rtol=1e-5, atol=1e-5)
    assert float((each[0] - each[1]).abs().median()) > 0.1  # they do differ
    outside = torch.tensor([[2.001, 0.0], [0.0, -2.001], [math.nan, 0.0]])
    assert (random.log_prob(outside, x[:3]) == -math.inf).all()


@torch.no_grad()
def test_density_integrates_to_one(random) -> None:
    # Gauss-Legendre on 24 panels in each direction that are narrower towards the edges, where
    # members' densities may be steep on the scale of a softness of 0.1.
    ends = np.tanh(np.linspace(-4, 4, 25))
    ends = 2 * ends / ends[-1]
    points, weights = np.polynomial.legendre.leggauss(8)
    half = np.diff(ends)[:, None] / 2
    axis = torch.from_numpy(((ends[:-1, None] + half) + half * points).ravel())
    weight = torch.from_numpy((half * weights).ravel())
    theta = torch.cartesian_prod(axis, axis)
    for place in (X, [2.0, 1.5]):
        x = torch.tensor([place]).expand(len(theta), -1)
        density = random.log_prob(theta, x).double().exp().reshape(len(axis), -1)
        # float32's log density is good to 1e-5.
        assert float(weight @ density @ weight) == pytest.approx(1.0, abs=1e-3)


def test_properties(random) -> None:
    assert random.num_parameters == 2 and random.noise_size == 3 and random.x_shape == (2,)
    assert random.num_weights == sum(weight.numel() for weight in random.parameters())
    assert random.options.ensemble == 3 and random.options.transforms == 2
    assert [bound.tolist() for bound in random.support] == [[-2.0, -2.0], [2.0, 2.0]]
    assert random.embed(torch.zeros(5, 2)).shape == (5, 2 + 20 + 2)


def test_an_ensemble_of_one_is_its_member() -> None:
    alone = member(0.5, 0.6, 0.2, seed=3)
    one = Ensemble([alone])
    x = torch.tensor([X])
    theta, _ = Sampler(alone).draw(x, 400, "same", 1)
    assert torch.equal(Sampler(one).draw(x, 400, "same", 1)[0], theta)
    repeated = x.expand(400, -1)
    torch.testing.assert_close(one.log_prob(theta[0], repeated), alone.log_prob(theta[0], repeated))


# ---- draws --------------------------------------------------------------------------------------


def test_draws_come_from_both_members(apart) -> None:
    count = 20_000
    theta = Posterior(apart).sample((count,), X, seed=1).double()
    first = theta[:, 0] < 0  # ten sd of the one, five of the other away
    assert torch.equal(first, theta[:, 1] < 0)
    # Half of them from each: a binomial with sd sqrt(count) / 2.
    assert abs(int(first.sum()) - count / 2) < 5 * math.sqrt(count) / 2
    for chosen, (mean, sd) in ((first, LOW), (~first, HIGH)):
        part = theta[chosen]
        error = sd / math.sqrt(len(part))
        assert ((part.mean(0) - mean).abs() < 5 * error).all()
        assert ((part.std(0) - sd).abs() < 5 * error / math.sqrt(2)).all()
        # The number that chooses the member has nothing to do with those that it moves.
        assert abs(float(torch.corrcoef(part.T)[0, 1])) < 5 / math.sqrt(len(part))
    # Moments of the mixture; standard errors from its second and fourth central moments.
    mean = (LOW[0] + HIGH[0]) / 2
    variance = (LOW[1] ** 2 + HIGH[1] ** 2) / 2 + ((HIGH[0] - LOW[0]) / 2) ** 2
    assert ((theta.mean(0) - mean).abs() < 5 * math.sqrt(variance / count)).all()
    squares = (theta - mean) ** 2
    assert ((squares.mean(0) - variance).abs() < 5 * squares.std(0) / math.sqrt(count)).all()


@given(st.integers(1, 100), st.integers(1, 3000))
@settings(deadline=None, max_examples=20)
@torch.no_grad()
def test_members_are_chosen_equally(count, rows) -> None:
    """By a normal number's quantile: of evenly spaced quantiles each member gets its share."""
    levels = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    chosen = Ensemble([member(0.0, 0.1)] * count).chosen(torch.special.ndtri(levels).float())
    got = torch.bincount(chosen, minlength=count)
    assert len(got) == count
    # Between floor and ceiling of rows / count; a level on a boundary may round to either side.
    assert int(got.max()) <= rows // count + 2 and int(got.min()) >= rows // count - 1
    assert (chosen.diff() >= 0).all()


def test_draws_do_not_depend_on_the_batch(random) -> None:
    posterior = Posterior(random)
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    together = posterior.sample_batched((300,), x, seed=3)  # more than go through at once
    close(posterior.sample_batched((300,), x[:7], seed=3), together[:, :7])
    close(posterior.sample_batched((20,), x, seed=3), together[:20])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    close(posterior.sample_batched((20,), x[order], seed=3), together[:20, order])
    for row in (0, 39):
        close(posterior.sample((300,), x[row], seed=3), together[:, row])
    later, _ = posterior.draws(x[:2], 90, 3, first=150)
    close(later.transpose(0, 1), together[150:240, :2])
    other = posterior.sample((300,), x[0], seed=4)
    assert not (other[:, None] == together[:, 0]).all(dim=-1).any()


def test_draws_follow_the_density(random) -> None:
    """Shares of draws in cells of the box against the density's integral over them."""
    count = 8000
    theta = Posterior(random).sample((count,), X, seed=5).numpy()
    edges = np.linspace(-2, 2, 5)
    shares = np.histogram2d(theta[:, 0], theta[:, 1], bins=[edges, edges])[0] / count
    points, weights = np.polynomial.legendre.leggauss(60)
    nodes = torch.from_numpy((0.5 * (edges[:-1, None] + edges[1:, None] + points)).ravel())
    grid = torch.cartesian_prod(nodes, nodes)
    with torch.no_grad():
        log_q = random.log_prob(grid, torch.tensor([X]).expand(len(grid), -1))
    density = log_q.double().exp().numpy().reshape(4, 60, 4, 60)
    expected = np.einsum("iajb,a,b->ij", density, weights, weights) / 4
    assert expected.sum() == pytest.approx(1.0, abs=2e-3)
    error = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(shares - expected) < 5 * error + 1e-3).all()


# ---- the posterior ------------------------------------------------------------------------------


def test_log_prob_in_coordinates_without_bounds(random) -> None:
    x = torch.tensor([X]).expand(200, -1)
    u = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    for estimator in (random, random.members[0]):
        context = estimator.embed(x).detach()
        with torch.no_grad():
            theta = estimator.constrained(u)
            log_q = estimator.log_prob_unconstrained(u, context)
            inside = (theta.abs() < 1.9).all(1)  # theta in float32 is precise enough there
            expected = estimator.log_prob_given_context(theta, context)
            torch.testing.assert_close(
                log_q[inside].float(), expected[inside], rtol=1e-4, atol=1e-4
            )
            close(estimator.unconstrained(theta)[inside], u[inside])
        moved = u.clone().requires_grad_()
        estimator.log_prob_unconstrained(moved, context).sum().backward(inputs=[moved])
        step = 1e-2 * torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            ahead = estimator.log_prob_unconstrained(u + step, context)
            behind = estimator.log_prob_unconstrained(u - step, context)
        slope = (moved.grad * step).sum(1).double()
        change = (ahead - behind).double() / 2
        # A spline's second derivative jumps at its knots, so that a few rows are less close.
        assert torch.isfinite(slope).all()
        assert float((slope - change).abs().median()) < 1e-4
        assert float(torch.corrcoef(torch.stack([slope, change]))[0, 1]) > 0.999


def test_map_finds_the_higher_mode(apart) -> None:
    effort = {"num_init_samples": 300, "num_to_optimize": 20}
    best = Posterior(apart).map(X, **effort)
    # The mode of the narrower member; the other's density there is nothing: it is 11 sd away.
    assert best.shape == (1, 2)
    np.testing.assert_allclose(best[0], [LOW[0]] * 2, atol=0.02 * LOW[1])


def test_map_is_higher_than_all_draws(random) -> None:
    posterior = Posterior(Ensemble(random.members[:2]))
    best = posterior.map(X, num_init_samples=300, num_to_optimize=10)
    draws = posterior.sample((5000,), X, seed=0)
    highest = float(posterior.log_prob(draws, X).max())
    assert float(posterior.log_prob(best, X)) >= highest - 1e-3


def test_importance_sampling(apart) -> None:
    """The likelihood's posterior is the first member's: half of the draws have a weight, of 2."""
    mean, sd = LOW

    def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        scaled = (theta - mean) / sd
        return -0.5 * (scaled**2).sum(1) - 2 * math.log(sd * math.sqrt(2 * math.pi))

    count = 4000
    theta, log_q = Posterior(apart).draws(torch.tensor([X]), count, 0, with_log_prob=True)
    assert log_q is not None
    weighted = weigh(theta[0], log_q[0], log_likelihood, PRIOR, np.array(X), 500, seed=0)
    error = 1 / math.sqrt(count)  # relative, of a mean of weights that are 0 or 2
    assert weighted.effective_sample_size == pytest.approx(count / 2, rel=5 * error)
    assert weighted.log_evidence == pytest.approx(-math.log(16.0), abs=6 * error)
    assert (weighted.draws < 0).all()


def test_catalog(apart, tmp_path) -> None:
    x = np.random.default_rng(0).standard_normal((7, 2)).astype(np.float32)
    posterior = Posterior(apart, PRIOR, ABOUT)
    catalog, target = ArraySource.of("seven", x, list("abcdefg")), LocalStore(tmp_path / "draws")
    options = InferOptions(num_samples=50, seed=3)
    infer(posterior, LocalStore(tmp_path), catalog, options, target, show_progress=False)
    expected = posterior.sample_batched((50,), x, seed=3).transpose(0, 1)
    np.testing.assert_array_equal(read_draws(target).draws, expected.numpy())


# ---- the bundle ---------------------------------------------------------------------------------


@pytest.fixture
def store(random, tmp_path) -> LocalStore:
    saved = LocalStore(tmp_path / "model")
    save_bundle(saved, random, ABOUT)
    return saved


def test_bundle_round_trip(random, store) -> None:
    posterior, again = Posterior(random, PRIOR, ABOUT), Posterior.load(store.uri)
    assert isinstance(again.estimator, Ensemble)
    assert again.identity == posterior.identity
    assert not any(module.training for module in again.estimator.modules())
    draws = posterior.sample((50,), X, seed=1)
    assert torch.equal(again.sample((50,), X, seed=1), draws)
    assert torch.equal(again.log_prob(draws, X), posterior.log_prob(draws, X))
    assert again.estimator.options == random.options
    for mine, theirs in zip(random.members, again.estimator.members, strict=True):
        assert mine.options == theirs.options
        assert mine.standardization.to_data() == theirs.standardization.to_data()
    assert again.about["num_weights"] == again.estimator.num_weights
    assert "of 3 estimators" in repr(again) and "estimators" not in repr(Posterior(member(0, 1)))
    changed = copy.deepcopy(random)
    with torch.no_grad():
        next(changed.members[2].parameters()).add_(1e-6)
    assert weights_digest(changed) != weights_digest(random)


def test_combined_from_bundles(random, tmp_path) -> None:
    stores = [LocalStore(tmp_path / str(number)) for number in range(3)]
    for each, place in zip(random.members, stores, strict=True):
        save_bundle(place, each, ABOUT)
        assert json.loads(place.get(BUNDLE))["format"] == 1
    combined = Ensemble([load_bundle(place)[0] for place in stores])
    assert weights_digest(combined) == weights_digest(random)
    x = torch.tensor([X])
    theta, other = (Sampler(each).draw(x, 99, "m", 1)[0] for each in (combined, random))
    assert torch.equal(theta, other)


def test_damaged_weights(store) -> None:
    weights = store.get(WEIGHTS)
    flipped = bytearray(weights)
    flipped[len(weights) // 2] ^= 1
    for damaged in (b"", weights[:-1], bytes(flipped)):
        store.put(WEIGHTS, damaged)
        with pytest.raises(InputError, match=r"weights\.safetensors is damaged: .* checksum"):
            load_bundle(store)


def members_changed(content: dict[str, Any], kind: str) -> None:
    members = content["members"]
    if kind == "none":
        members.clear()
    elif kind == "one fewer":
        members.pop()
    elif kind == "one more":
        members.append(members[0])
    elif kind == "one fewer, and says so":
        members.pop()
        content["estimator"]["ensemble"] -= 1
    elif kind == "one more, and says so":
        members.append(members[0])
        content["estimator"]["ensemble"] += 1
    elif kind == "another order":
        members.reverse()  # the architectures differ
    elif kind == "another support":
        members[1]["standardization"]["bijection"]["low"] = [-3.0, -2.0]
    elif kind == "another size of theta":
        bijection = members[1]["standardization"]["bijection"]
        for name in ("low", "high", "softness"):
            bijection[name].append(1.0)
    elif kind == "a wide network":
        members[1]["estimator"]["hidden_features"] = 4096
    elif kind == "no number of members":
        content["estimator"]["ensemble"] = None
    elif kind == "one estimator's format":
        content["format"] = 1
    else:
        content["members"] = {"0": members[0], "-1": members[1], "x": members[2]}


@pytest.mark.parametrize(
    "kind",
    [
        "none",
        "one fewer",
        "one more",
        "one fewer, and says so",
        "one more, and says so",
        "another order",
        "another support",
        "another size of theta",
        "a wide network",
        "no number of members",
        "one estimator's format",
        "no list",
    ],
)
def test_inconsistent_bundles_are_refused(store, kind) -> None:
    content = json.loads(store.get(BUNDLE))
    members_changed(content, kind)
    store.put(BUNDLE, json.dumps(content).encode())
    with pytest.raises(InputError):
        load_bundle(store)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in nested JSON data."""
    if not isinstance(value, (dict, list)):
        return [at]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    inner = [path for key, each in items for path in places(each, (*at, key))]
    return [at, *inner] if at else inner


@pytest.mark.parametrize("wrong", [None, -1, "x", math.nan], ids=repr)
def test_wrong_values_in_the_json(store, wrong) -> None:
    """They are refused, or do no harm."""
    content = json.loads(store.get(BUNDLE))
    second = content["members"][1]
    architecture = ("estimator", "embedding", *SMALL)  # other options are not of the network
    needed = {
        "members": {
            **second,
            "estimator": {name: second["estimator"][name] for name in architecture},
        },
        "ensemble": content["estimator"]["ensemble"],
        "x_shape": content["x_shape"],
    }
    refused = 0
    for path in places(needed):
        changed = copy.deepcopy(content)
        owner: Any = {
            "members": {"members": changed["members"][1]},
            "ensemble": changed["estimator"],
            "x_shape": changed,
        }[path[0]]
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = wrong
        if path == ("members",):
            changed["members"][1] = wrong
        store.put(BUNDLE, json.dumps(changed).encode())
        try:
            posterior = Posterior.from_store(store)
        except InputError:
            refused += 1
            continue
        draws = posterior.sample((3,), X, seed=0)
        assert torch.isfinite(draws).all(), path
        assert posterior.log_prob(draws, X).shape == (3,)
    assert refused >= 8


def test_names_of_weights(random, store) -> None:
    """Weights that belong to no member are refused, though the checksum is right."""
    import hashlib

    from safetensors.torch import load, save

    weights, content = load(store.get(WEIGHTS)), json.loads(store.get(BUNDLE))
    some = next(iter(weights))
    for name in ("members.3.w", "members.-1.w", "members.00.w", "members.0.w", "w", "members.x.y"):
        changed = save({**weights, name: weights[some].clone()})
        content["weights_sha256"] = hashlib.sha256(changed).hexdigest()
        store.put(WEIGHTS, changed)
        store.put(BUNDLE, json.dumps(content).encode())
        with pytest.raises(InputError, match="holds no valid model"):
            load_bundle(store)


# ---- what is refused ----------------------------------------------------------------------------


def test_members_of_different_problems() -> None:
    one = member(*LOW)
    with pytest.raises(InputError, match="an ensemble has no members"):
        Ensemble([])
    with pytest.raises(InputError, match=r"takes x of shape \(3,\), member 0 of shape \(2,\)"):
        Ensemble([one, member(*LOW, x_size=3)])
    with pytest.raises(InputError, match="member 1 of an ensemble has another support"):
        Ensemble([one, member(*LOW, bounds=(-2.0, 3.0))])
    with pytest.raises(InputError, match="member 1 of an ensemble is a Ensemble; it must be"):
        Ensemble([one, Ensemble([one])])
