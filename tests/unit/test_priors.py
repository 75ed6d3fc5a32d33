"""Priors: what is taken as one, truncation, products, and priors as plain data."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import (
    Beta,
    Categorical,
    Cauchy,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    HalfNormal,
    Independent,
    Laplace,
    LogNormal,
    MultivariateNormal,
    Normal,
    Pareto,
    Poisson,
    StudentT,
    TransformedDistribution,
    Uniform,
    Weibull,
)
from torch.distributions.transforms import ExpTransform

from sbi_dist.errors import InputError
from sbi_dist.priors import (
    BoxUniform,
    Product,
    Truncated,
    as_prior,
    describe,
    prior_from_data,
    prior_to_data,
    sample_prior,
    support_bounds,
    truncate,
)
from sbi_dist.problem import Problem

few = settings(deadline=None, max_examples=25)
INF = math.inf


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


def exp_normal(size: int) -> Distribution:
    """A log-normal that torch does not know by that name, so that its data are opaque."""
    return Independent(TransformedDistribution(Normal(torch.zeros(size), 1.0), ExpTransform()), 1)


# ---- as_prior -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_prior", "size", "low", "high"),
    [
        (Normal(0.0, 1.0), 1, -INF, INF),
        (Truncated(Normal(0.0, 1.0), low=0.5), 1, 0.5, INF),
        (Gamma(torch.ones(4), 1.0), 4, 0.0, INF),
        (Uniform(torch.zeros(2), torch.ones(2)), 2, 0.0, 1.0),
        (Independent(LogNormal(torch.zeros(3), 1.0), 1), 3, 0.0, INF),
        (MultivariateNormal(torch.zeros(3), torch.eye(3)), 3, -INF, INF),
        (BoxUniform([-1.0, -1.0], [2.0, 2.0]), 2, -1.0, 2.0),
        ([Beta(2.0, 2.0), BoxUniform([0.0], [1.0]), Uniform(0.0, 1.0)], 3, 0.0, 1.0),
        ((Truncated(LogNormal(0.0, 1.0), high=3.0), Uniform(0.0, 3.0)), 2, 0.0, 3.0),
    ],
)
def test_as_prior_gives_one_distribution_of_a_vector(given_prior, size, low, high) -> None:
    prior = as_prior(given_prior)
    assert prior.batch_shape == () and prior.event_shape == (size,)
    np.testing.assert_array_equal(support_bounds(prior), [[low] * size, [high] * size])
    draws = prior.sample(torch.Size([7]))
    assert draws.shape == (7, size)
    assert prior.log_prob(draws).shape == (7,)
    assert torch.isfinite(prior.log_prob(draws)).all()
    assert sample_prior(prior, 5).dtype == np.float32
    assert as_prior(prior).event_shape == (size,)  # and again changes nothing


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Dirichlet(torch.ones(3)), "support of Dirichlet is Simplex"),
        (Poisson(3.0), "allowed are continuous supports"),
        (Categorical(torch.ones(3)), "allowed are continuous supports"),
        ([Normal(0.0, 1.0), Poisson(3.0)], "allowed are continuous supports"),
        ([Normal(0.0, 1.0), 3.0], "3.0 is not a torch distribution"),
        (Normal(torch.zeros(2, 2), 1.0), r"batch shape \(2, 2\)"),
        (MultivariateNormal(torch.zeros(2, 3), torch.eye(3)), r"batch shape \(2,\)"),
        (MultivariateNormal(torch.zeros(1, 3), torch.eye(3)), r"batch shape \(1,\)"),
        ([], "at least one distribution"),
        (stats.norm(0, 1), "is not a torch.distributions.Distribution"),
        (None, "NoneType is not a torch.distributions.Distribution"),
    ],
)
def test_as_prior_refuses(wrong, message) -> None:
    with pytest.raises(InputError, match=message):
        as_prior(wrong)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ([0.0], [1.0, 2.0], "they must be equal"),
        ([0.0, 1.0], [1.0, 1.0], "must be below high"),
        ([0.0], [INF], "must be finite"),
        ([math.nan], [1.0], "must be finite"),
    ],
)
def test_box_uniform_refuses(low, high, message) -> None:
    with pytest.raises(InputError, match=message):
        BoxUniform(low, high)


# ---- Truncated ----------------------------------------------------------------------------------

TRUNCATED = [
    Truncated(Normal(1.0, 2.0), -1.0, 4.0),
    Truncated(Normal(0.0, 1.0), low=3.0),
    Truncated(Normal(0.0, 1.0), high=-3.0),
    Truncated(LogNormal(0.5, 0.4), 0.2, 3.0),
    Truncated(LogNormal(0.5, 0.4), low=4.0),
    Truncated(Exponential(2.0), 0.5, 3.0),
    Truncated(Laplace(0.0, 1.0), -1.0, 2.0),
    Truncated(Cauchy(0.0, 1.0), -2.0, 9.0),
    Truncated(HalfNormal(1.0), high=1.5),
    Truncated(Weibull(1.0, 2.0), 0.3, 2.0),
    Truncated(Uniform(0.0, 1.0), -3.0, 0.5),
]


def ends(prior: Truncated) -> torch.Tensor:
    """The bounds, or where they are infinite the quantiles at 1e-9."""
    quantiles = prior.icdf(torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64))
    bounds = torch.tensor([prior.low, prior.high], dtype=torch.float64)
    return torch.where(bounds.isinf(), quantiles, bounds)


@pytest.mark.parametrize("prior", TRUNCATED, ids=lambda p: f"{p.base} {p.low} {p.high}")
def test_truncated_density_quantiles_and_draws(prior) -> None:
    grid = torch.linspace(*ends(prior).tolist(), 20_001, dtype=torch.float64)
    density = prior.log_prob(grid).exp()
    # The trapezoid rule is off by h^2/12 times the change of slope, some 1e-7 here; the parameters
    # are float32, whose rounding of 6e-8 enters the density.
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=3e-6)
    levels = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    torch.testing.assert_close(prior.cdf(prior.icdf(levels)), levels, rtol=0, atol=1e-6)
    np.testing.assert_allclose(prior.cdf(ends(prior)), [0.0, 1.0], atol=2e-9)
    outside = torch.tensor([prior.low - 0.1, prior.high + 0.1])
    assert (prior.log_prob(outside) == -INF).all()

    draws = prior.sample((2000,))
    assert ((draws >= prior.low) & (draws <= prior.high)).all()
    assert prior.support.check(draws).all()
    # Kolmogorov: P(sqrt(n) D > 2) = 2 exp(-8) = 7e-4, at a fixed seed.
    assert stats.kstest(prior.cdf(draws).numpy(), "uniform").statistic < 2.0 / math.sqrt(2000)


@pytest.mark.parametrize("distance", [1.0, 8.0, 20.0, 35.0])
@pytest.mark.parametrize("side", [1, -1])
def test_truncated_far_in_a_normal_tail(distance, side) -> None:
    bounds = {"low": distance} if side > 0 else {"high": -distance}
    prior = Truncated(Normal(0.0, 1.0), **bounds)
    exact = stats.truncnorm(distance, np.inf)
    levels = np.linspace(0.01, 0.99, 50)
    found = prior.icdf(torch.tensor(levels)).numpy()
    quantiles = exact.ppf(levels) if side > 0 else -exact.ppf(1 - levels)
    # In such a tail 1 / distance is the scale of the truncated normal.
    np.testing.assert_allclose(found, quantiles, atol=1e-9 / distance)
    np.testing.assert_allclose(
        prior.log_prob(torch.tensor(found)).numpy(),
        exact.logpdf(np.abs(found)),
        rtol=1e-12,
        atol=1e-12,
    )
    draws = prior.sample((500,)).double()
    assert torch.isfinite(draws).all()
    # Float32 of 35 has steps of 4e-6, which its 500 draws in 1/35 rarely share.
    assert len(draws.unique()) > 480


def test_truncated_in_the_upper_tail_of_a_log_normal() -> None:
    prior = Truncated(LogNormal(0.0, 0.5), low=math.exp(5.0))  # 10 sd above the median
    levels = np.linspace(0.01, 0.99, 50)
    expected = np.exp(0.5 * stats.truncnorm(10.0, np.inf).ppf(levels))
    np.testing.assert_allclose(prior.icdf(torch.tensor(levels)), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Normal(0.0, 1.0), 40.0, INF), "less than 1e-300; give bounds that hold more"),
        ((Laplace(0.0, 1.0), 35.0, INF), "less than 1e-12"),
        ((Exponential(1.0), -2.0, -1.0), "leaves nothing of the support of Exponential"),
        ((Uniform(0.0, 1.0), 2.0, 3.0), "leaves nothing of the support"),
        ((Normal(0.0, 1.0), 1.0, 1.0), "must be below high"),
        ((Normal(0.0, 1.0), math.nan, 1.0), "must be below high"),
        ((Normal(torch.zeros(2), 1.0), 0.0, 1.0), r"batch shape \(2,\)"),
        ((Beta(2.0, 2.0), 0.1, 0.5), "Beta can't be truncated"),
        ((Gamma(2.0, 2.0), 0.1, 0.5), "Gamma can't be truncated"),
        ((StudentT(3.0), 0.1, 0.5), "StudentT can't be truncated"),
        ((Poisson(3.0), 0.0, 2.0), "allowed are continuous supports"),
    ],
)
def test_truncated_refuses(arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        Truncated(*arguments)


# ---- Product ------------------------------------------------------------------------------------


@given(
    st.lists(
        st.sampled_from(
            [
                Normal(1.0, 2.0),
                Gamma(torch.tensor([2.0, 3.0]), 1.0),
                MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
                BoxUniform([-1.0, 0.0], [1.0, 3.0]),
                Truncated(Normal(0.0, 1.0), low=0.0),
            ]
        ),
        min_size=1,
        max_size=5,
    )
)
@few
def test_product_is_the_sum_of_its_blocks(blocks) -> None:
    product = Product(blocks)
    draws = product.sample((3,))
    assert product.sample().shape == product.event_shape
    total, start = torch.zeros(3), 0
    for block in blocks:
        size = block.event_shape[0] if block.event_shape else (block.batch_shape or (1,))[0]
        part = draws[:, start : start + size]
        log_prob = block.log_prob(part if block.event_shape or block.batch_shape else part[:, 0])
        total += log_prob.sum(-1) if log_prob.ndim > 1 else log_prob
        start += size
    assert start == product.event_shape[0]
    torch.testing.assert_close(product.log_prob(draws), total)
    assert product.support.check(draws).all()
    low, high = support_bounds(product)
    assert (draws.numpy() >= low).all() and (draws.numpy() <= high).all()


# ---- as data ------------------------------------------------------------------------------------

KNOWN = [
    BoxUniform([-1.0, 0.1], [1.0, 0.7]),
    Normal(0.1, 0.3),
    Gamma(torch.tensor([2.0, 3.0]), 1.5),
    MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
    Truncated(LogNormal(0.1, 0.7), 0.3, 5.0),
    [Truncated(Normal(0.0, 1.0), high=2.0), Beta(torch.ones(2), 2.0), Pareto(1.0, 3.0)],
    Product([Product([Normal(0.0, 1.0), Uniform(0.0, 1.0)]), Truncated(Laplace(0.0, 1.0), 1.0)]),
]


@pytest.mark.parametrize("given_prior", KNOWN, ids=lambda p: type(p).__name__)
def test_data_round_trip(given_prior) -> None:
    prior = as_prior(given_prior)
    data = json.loads(json.dumps(prior_to_data(prior)))
    again = prior_from_data(data)
    assert again is not None and again.event_shape == prior.event_shape
    assert prior_to_data(again) == data
    draws = prior.sample((20,))
    torch.testing.assert_close(again.log_prob(draws), prior.log_prob(draws), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(support_bounds(again), support_bounds(prior))
    assert len(describe(again)) == len(describe(prior))


@pytest.mark.parametrize(
    "given_prior", [exp_normal(2), [Normal(0.0, 1.0), exp_normal(2)]], ids=["itself", "a block"]
)
def test_a_foreign_distribution_is_opaque(given_prior) -> None:
    data = json.loads(json.dumps(prior_to_data(as_prior(given_prior))))
    assert "opaque" in json.dumps(data)
    assert prior_from_data(data) is None


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        "Normal",
        {"kind": "os.system", "command": "true"},
        {"kind": "Normal", "loc": 0.0},
        {"kind": "Normal", "loc": "zero", "scale": 1.0},
        {"kind": "Normal", "loc": 0.0, "scale": -1.0},
        {"kind": "Product", "blocks": []},
        {"kind": "BoxUniform", "low": [1.0], "high": [0.0]},
        {"kind": "Independent", "base": None},
    ],
)
def test_data_that_describe_no_prior(data) -> None:
    with pytest.raises(InputError, match="prior: "):
        prior_from_data(data)


def test_describe() -> None:
    prior = as_prior(
        [Truncated(Normal(1.0, 0.5), low=0.0), BoxUniform([0.0, -1.0], [1.0, 2.0]), Gamma(2.0, 3.0)]
    )
    assert describe(prior) == [
        "Normal(loc 1, scale 0.5) on [0, inf]",
        "Uniform(low 0, high 1)",
        "Uniform(low -1, high 2)",
        "Gamma(concentration 2, rate 3)",
    ]
    assert len(describe(MultivariateNormal(torch.zeros(2), torch.eye(2)))) == 1


# ---- truncate -----------------------------------------------------------------------------------


@given(st.floats(-1.9, 1.5), st.floats(0.01, 3.0))
@few
def test_truncate_is_the_prior_restricted_and_normalized(start, width) -> None:
    prior = as_prior(
        [Normal(0.0, 1.0), Truncated(Normal(0.0, 1.0), -1.9, 2.0), LogNormal(0.0, 1.0)]
    )
    low = np.array([start, start, 0.5])
    high = low + width
    cut = truncate(prior, low, high)
    expected = [[low[0], max(low[1], -1.9), low[2]], [high[0], min(high[1], 2.0), high[2]]]
    np.testing.assert_array_equal(support_bounds(cut), np.float32(expected))
    theta = cut.sample((10,))
    # A restriction only adds the logarithm of its mass, the same for every theta.
    gain = cut.log_prob(theta) - prior.log_prob(theta)
    masses = [
        stats.norm.cdf(high[0]) - stats.norm.cdf(low[0]),
        np.diff(stats.norm.cdf(np.array(expected)[:, 1])) / np.diff(stats.norm.cdf([-1.9, 2.0])),
        np.diff(stats.lognorm(1.0).cdf([low[2], high[2]])),
    ]
    # Of the order of float32's rounding of log_prob.
    np.testing.assert_allclose(gain, -np.log(np.hstack(masses)).sum(), atol=2e-5)
    assert prior_from_data(prior_to_data(cut)) is not None


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (MultivariateNormal(torch.zeros(2), torch.eye(2)), "MultivariateNormal can't be truncated"),
        ([Normal(0.0, 1.0), Gamma(2.0, 2.0)], "Gamma has no inverse cdf"),
        (BoxUniform([5.0, 0.0], [6.0, 1.0]), "leaves nothing of the support"),
    ],
)
def test_truncate_refuses(prior, message) -> None:
    with pytest.raises(InputError, match=message):
        truncate(as_prior(prior), np.zeros(2), np.ones(2))


# ---- of a problem -------------------------------------------------------------------------------


def test_a_parameter_may_have_no_unit() -> None:
    prior = BoxUniform([0.0, 0.0], [1.0, 1.0])
    problem = Problem(prior, np.sin, parameter_units=["m", None])
    assert problem.parameter_units == ("m", "")
