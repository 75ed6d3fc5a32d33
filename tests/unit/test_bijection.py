"""The map between a prior's support and R^D."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from sbi_dist.bijection import SupportBijection, matched_softness
from sbi_dist.soft_uniform import SoftQuantile, soft_cdf, soft_log_density

few = settings(deadline=None, max_examples=50)
softnesses = st.floats(0.01, 2.0)
ends = st.floats(-1e6, 1e6)


def column(values: object) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64))[:, None]


def one(low: float, high: float, softness: float = 0.2) -> SupportBijection:
    return SupportBijection(np.array([low]), np.array([high]), softness)


def box(low: float, width: float, softness: float) -> SupportBijection:
    assume(width > 1e-5 * abs(low))  # else float32 has no number inside
    return one(low, low + width, softness)


# ---- the map and its inverse --------------------------------------------------------------------


@given(ends, st.floats(1e-6, 1e6), softnesses)
@few
def test_box_round_trip(low, width, softness) -> None:
    bijection = box(low, width, softness)
    unit = np.array([1e-9, 1e-6, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1 - 1e-6])
    theta = column(low + width * unit)
    again = bijection.constrain(bijection.unconstrain(theta))
    # Float64 places a point of the box to 1e-16 of the larger of the box and its distance from 0.
    scale = max(width, abs(low), abs(low + width))
    assert float((again - theta).abs().max()) <= 1e-13 * scale
    z = column(np.linspace(-1 - 3 * softness, 1 + 3 * softness, 41))
    back = bijection.unconstrain(bijection.constrain(z))
    # theta is off by 1e-16 scale, z by that over the slope, which is over 1e-4 width here.
    assert float((back - z).abs().max()) <= 1e-10 * scale / width


@given(ends, st.sampled_from([1.0, -1.0]), st.floats(-30.0, 30.0))
@few
def test_half_line_round_trip(edge, side, logarithm) -> None:
    assume(math.exp(logarithm) > 1e-8 * abs(edge))
    bijection = one(edge, math.inf) if side > 0 else one(-math.inf, edge)
    z = column([side * logarithm])
    theta = bijection.constrain(z)
    assert float(side * (theta - edge)) > 0
    np.testing.assert_allclose(bijection.unconstrain(theta), z, atol=1e-7)
    np.testing.assert_allclose(bijection.log_det(z), logarithm)


def test_components_do_not_mix() -> None:
    low = np.array([-1.0, 0.0, -math.inf, -math.inf])
    high = np.array([1.0, math.inf, 5.0, math.inf])
    bijection = SupportBijection(low, high, np.array([0.1, 0.2, 0.3, 0.4]))
    assert bijection.size == 4
    theta = torch.tensor([[0.3, 2.0, 4.0, -7.0], [-0.9, 0.1, -4.0, 1.0]], dtype=torch.float64)
    z = bijection.unconstrain(theta)
    for i in range(4):
        single = one(low[i], high[i], float(bijection.softness[i]))
        torch.testing.assert_close(z[:, i : i + 1], single.unconstrain(theta[:, i : i + 1]))
    torch.testing.assert_close(z[:, 3], theta[:, 3])  # a line is left as it is
    torch.testing.assert_close(bijection.constrain(z), theta)
    again = SupportBijection.from_data(json.loads(json.dumps(bijection.to_data())))
    assert torch.equal(again.unconstrain(theta), z)


@given(ends, st.floats(1e-6, 1e6), softnesses)
@few
def test_monotone(low, width, softness) -> None:
    bijection = box(low, width, softness)
    # Steps of the unit interval that float64 tells apart in theta.
    unit = np.linspace(0.0, 1.0, 501) if width > 1e-3 * abs(low) else np.linspace(0.0, 1.0, 51)
    assert (np.diff(bijection.unconstrain(column(low + width * unit))[:, 0]) > 0).all()
    z = np.linspace(-1 - 10 * softness, 1 + 10 * softness, 501)
    assert (np.diff(bijection.constrain(column(z))[:, 0]) >= 0).all()


@given(ends, st.floats(1e-6, 1e6), softnesses)
@few
def test_edges_have_finite_images(low, width, softness) -> None:
    bijection = box(low, width, softness)
    theta = column([low, low + width, low - width, low + 2 * width])
    z = bijection.unconstrain(theta)
    assert torch.isfinite(z).all() and torch.isfinite(bijection.log_det(z)).all()
    assert float(z[0]) < -1 < 1 < float(z[1])
    assert float(z[2]) == float(z[0]) and float(z[3]) == float(z[1])  # outside is the edge
    back = bijection.constrain(z)
    assert bijection.contains(back).all()
    np.testing.assert_allclose(back[:2], theta[:2], atol=1e-9 * width, rtol=1e-15)


@pytest.mark.parametrize("bounds", [(3.0, math.inf), (-math.inf, 3.0)])
def test_edge_of_a_half_line(bounds) -> None:
    bijection = one(*bounds)
    z = bijection.unconstrain(column([3.0]))
    assert torch.isfinite(z).all()
    assert bijection.contains(bijection.constrain(z, torch.float32).double()).all()


bound = st.floats(-1e30, 1e30) | st.sampled_from([-math.inf, math.inf])


@given(bound, bound, softnesses, st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=5))
@few
def test_float32_never_leaves_the_support(low, high, softness, z) -> None:
    size = max(abs(b) for b in (low, high, 1e-30) if not math.isinf(b))
    assume(high - low > 1e-5 * size)
    bijection = one(low, high, softness)
    fixed = [-1e4, -800.0, -100.0, -7.0, -1.0, 0.0, 1.0, 7.0, 100.0, 800.0, 1e4]
    theta = bijection.constrain(column([*z, *fixed]), torch.float32)
    assert theta.dtype == torch.float32
    assert torch.isfinite(theta).all()
    assert bijection.contains(theta.double()).all()


def test_contains() -> None:
    bijection = SupportBijection(np.array([0.0, -math.inf]), np.array([1.0, 2.0]), 0.1)
    theta = torch.tensor(
        [[0.5, 0.0], [0.0, 2.0], [-1e-7, 0.0], [0.5, 2.1], [math.nan, 0.0]], dtype=torch.float64
    )
    assert bijection.contains(theta).tolist() == [True, True, False, False, False]


# ---- the density --------------------------------------------------------------------------------


@given(ends, st.floats(1e-3, 1e6), softnesses, st.floats(0.001, 1.0))
@few
def test_log_det_is_the_derivative(low, width, softness, place) -> None:
    assume(width > 1e-3 * abs(low))
    bijection = box(low, width, softness)
    z = column([place * (1 + 3 * softness)]).requires_grad_()
    bijection.constrain(z).sum().backward()
    # Not at 0, where autograd takes the slope of |z| for 0.
    assert float(z.grad.log()) == pytest.approx(float(bijection.log_det(z.detach())), abs=1e-9)


@pytest.mark.parametrize("softness", [0.02, 0.2, 0.6, 2.0])
@pytest.mark.parametrize("place", [-1.0, -0.6, 0.0, 1.0])
def test_density_on_a_box_integrates_to_one(softness, place) -> None:
    bijection = one(-3.0, 1.0, softness)
    # A normal in z of 0.8 softnesses, whose image is finite at the edges. Its mass beyond
    # |z| = 1 + 7 softnesses, that float64 can't place inside the box, is below 1e-9 here.
    sd, centre = 0.8 * min(softness, 0.6), place * (1 + softness)
    edges = bijection.unconstrain(column([-3.0, 1.0]))[:, 0]
    kinks = np.clip(np.arange(-9, 10) * sd + centre, float(edges[0]), float(edges[1]))
    knots = bijection.constrain(column(np.unique(kinks)))[:, 0].numpy()
    points, weights = np.polynomial.legendre.leggauss(60)
    total = 0.0
    for start, stop in zip([-3.0, *knots], [*knots, 1.0], strict=True):
        theta = 0.5 * (start + stop) + 0.5 * (stop - start) * points
        z = bijection.unconstrain(column(theta))
        log_q = stats.norm.logpdf(z[:, 0], centre, sd) - bijection.log_det(z).numpy()
        total += 0.5 * (stop - start) * weights @ np.exp(log_q)
    assert total == pytest.approx(1.0, abs=1e-6)


def test_density_on_half_lines_is_log_normal() -> None:
    theta = np.linspace(0.01, 9.0, 50)
    for bijection, values in (
        (one(2.0, math.inf), 2.0 + theta),
        (one(-math.inf, 2.0), 2.0 - theta),
    ):
        z = bijection.unconstrain(column(values))
        log_q = stats.norm.logpdf(z[:, 0], 0.0, 0.7) - bijection.log_det(z).numpy()
        np.testing.assert_allclose(log_q, stats.lognorm(0.7).logpdf(theta), rtol=1e-10)


# ---- the interval with soft edges ----------------------------------------------------------------


def solved_quantile(unit: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The quantile without a table: bisection, then Newton steps kept inside the bracket."""
    lower_half = torch.minimum(unit, 1 - unit)
    left = (-1 - 7 * s).expand_as(unit).clone()
    right = (0.1 * s).expand_as(unit).clone()
    for _ in range(8):
        middle = 0.5 * (left + right)
        below = soft_cdf(middle, s) < lower_half
        left, right = torch.where(below, middle, left), torch.where(below, right, middle)
    z = 0.5 * (left + right)
    for _ in range(8):
        cdf = soft_cdf(z, s).clamp_min(1e-300)
        slope = torch.exp(soft_log_density(z, s)) / cdf
        step = (cdf.log() - lower_half.clamp_min(1e-300).log()) / slope
        z = (z - step).clamp(left, right)
    return torch.where(unit > 0.5, -z, z)


def units(seed: int) -> torch.Tensor:
    """Probabilities in the tails, down to 1e-300, at octaves' ends, and all over the interval."""
    rng = np.random.default_rng(seed)
    tail = np.concatenate([10.0 ** -rng.uniform(0, 20, 3000), 10.0 ** -rng.uniform(0, 300, 500)])
    octaves = 2.0 ** -np.arange(1, 60)
    octaves = np.concatenate([octaves, np.nextafter(octaves, 0), np.nextafter(octaves, 1)])
    middle = np.concatenate([rng.uniform(0, 1, 3000), 0.5 + 10.0 ** -rng.uniform(1, 16, 500)])
    lower = np.concatenate([tail, octaves, middle, [0.0, 0.5]])
    return torch.from_numpy(np.concatenate([lower, 1 - lower]))


@pytest.mark.parametrize("softness", [1e-4, 0.01, 0.03, 0.1, 0.25, 0.6, 1.0, 2.0])
def test_quantile_is_the_solution(softness) -> None:
    s = torch.tensor([softness], dtype=torch.float64)
    unit = units(0)[:, None]
    z, solved = SoftQuantile(s)(unit), solved_quantile(unit, s)
    # About zero z has the error of the distribution function that is inverted: a few roundings.
    rounding = 2.0**-52 * torch.minimum(unit, 1 - unit) / soft_log_density(solved, s).exp()
    assert ((z - solved).abs() <= 1e-12 * solved.abs() + 8 * rounding).all()
    straight = (2 * unit - 1).abs() < 1 - 10 * s
    assert torch.equal(z[straight], (2 * unit - 1)[straight])


@given(softnesses, st.floats(1e-13, 0.5))
@few
def test_quantile_by_another_library(softness, unit) -> None:
    s = torch.tensor([softness], dtype=torch.float64)
    z = float(SoftQuantile(s)(torch.tensor([unit], dtype=torch.float64)))
    # P(U + s N <= z) as the mean of the normal's over U.
    points, weights = np.polynomial.legendre.leggauss(80)
    edges = np.clip(z + softness * np.arange(-9, 10), -1, 1)
    total = 0.0
    for start, stop in zip([-1.0, *edges], [*edges, 1.0], strict=True):
        at = 0.5 * (start + stop) + 0.5 * (stop - start) * points
        total += 0.5 * (stop - start) * weights @ stats.norm.cdf((z - at) / softness)
    smallest = float(soft_cdf(-1 - 7 * s, s))
    assert total / 2 == pytest.approx(max(unit, smallest), rel=1e-11)


@pytest.mark.parametrize("softness", [0.01, 0.2, 2.0])
def test_log_density_far_from_the_interval(softness) -> None:
    beyond = np.array([0.0, 1.0, 7.0, 29.9999, 30.0, 30.0001, 36.0, 40.0, 1e3])
    z = torch.from_numpy(np.concatenate([1 + softness * beyond, -1 - softness * beyond]))
    value = soft_log_density(z, torch.tensor(softness, dtype=torch.float64))
    upper = stats.norm.logcdf((1 - z.abs()) / softness)
    lower = stats.norm.logcdf((-1 - z.abs()) / softness)
    expected = upper + np.log(-np.expm1(lower - upper)) - math.log(2)
    np.testing.assert_allclose(value, expected, rtol=1e-13, atol=1e-13)


def test_gradients() -> None:
    bijection = SupportBijection(np.array([-1.0, 0.0]), np.array([2.0, np.inf]), 0.2)
    theta = torch.tensor([[-0.99, 0.1], [0.3, 2.0], [1.97, 4.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(bijection.unconstrain, theta.requires_grad_())
    # The far branch must not spoil the gradient of the near one, nor the other way round.
    z = torch.tensor([[-9.0, 1.0], [0.3, 2.0], [1.1, 4.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(bijection.log_det, z.requires_grad_())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_do_not_depend_on_the_batch(mixed, dtype) -> None:
    """To the last bit, for batches of any size and place."""
    low = np.array([-1.0, 0.0, -math.inf] if mixed else [-1.0, 0.0, 3.0])
    high = np.array([1.0, 5.0, 7.0])
    bijection = SupportBijection(low, high, np.array([0.02, 0.2, 0.6]))
    rng = np.random.default_rng(0)
    theta = torch.from_numpy(rng.uniform(np.maximum(low, -9.0), high, (20011, 3))).to(dtype)
    z = bijection.unconstrain(theta)
    log_det = bijection.log_det(z)
    assert z.dtype == torch.float64 and z.shape == theta.shape
    for size in (1, 3, 7, 64, 1001, 16384):
        starts = range(0, min(len(theta), 200 * size), size)
        parts = [bijection.unconstrain(theta[start : start + size]) for start in starts]
        together = torch.cat(parts)
        assert torch.equal(together, z[: len(together)])
        dets = torch.cat([bijection.log_det(part) for part in parts])
        assert torch.equal(dets, log_det[: len(dets)])
    order = torch.randperm(len(theta), generator=torch.Generator().manual_seed(0))
    assert torch.equal(bijection.unconstrain(theta[order]), z[order])
    assert torch.equal(bijection.unconstrain(theta.T.contiguous().T), z)  # nor on the layout
    assert torch.equal(bijection.unconstrain(theta[:77].reshape(7, 11, 3)), z[:77].view(7, 11, 3))
    assert torch.equal(bijection.unconstrain(theta[5]), z[5])
    assert bijection.unconstrain(theta[:0]).shape == (0, 3)


@pytest.mark.parametrize("low", [-1.0, -math.inf])
def test_another_device_is_not_waited_for(low) -> None:
    """On a device without numbers: whatever asked for one would fail."""
    bijection = SupportBijection(np.array([0.0, low]), np.array([1.0, 2.0]), 0.1)
    theta = torch.empty(5, 2, device="meta")
    z = bijection.unconstrain(theta)
    assert z.shape == (5, 2) and z.dtype == torch.float64 and z.device.type == "meta"
    assert bijection.log_det(z).shape == (5,) and bijection.contains(theta).shape == (5,)
    assert bijection.constrain(z, torch.float32).dtype == torch.float32


def test_not_a_number_stays_one() -> None:
    z = one(-1.0, 1.0).unconstrain(column([math.nan, 0.5, math.nan]))
    assert torch.isnan(z[:, 0]).tolist() == [True, False, True]


@pytest.mark.parametrize("softness", [0.0, -0.1, math.nan, math.inf])
def test_softness_is_positive(softness) -> None:
    with pytest.raises(ValueError, match=r"softness is .*; it must be positive"):
        one(0.0, 1.0, softness)
    one(0.0, math.inf, softness)  # not used


# ---- softness -----------------------------------------------------------------------------------

UNIT = np.concatenate([np.logspace(-12, -3, 400), np.linspace(1e-3, 1 - 1e-3, 2001)[1:-1]])
UNIT = np.concatenate([UNIT, 1 - np.logspace(-3, -12, 400)])


def divergence(sd: float, inside: float, factor: float) -> float:
    """KL(p | q) of p, a normal on [-1, 1] whose centre is ``inside`` sd from an edge, from q.

    q is the image of the best normal in z at softness ``factor * sd``: the one with the mean and
    the variance of z under p. Expectations under p are integrals over its quantiles.
    """
    centre = 1 - inside * sd
    p = stats.truncnorm((-1 - centre) / sd, (1 - centre) / sd, loc=centre, scale=sd)
    theta = p.ppf(UNIT)
    bijection = one(-1.0, 1.0, factor * sd)
    z = bijection.unconstrain(column(theta))
    log_p_of_z = p.logpdf(theta) + bijection.log_det(z).numpy()
    value = z[:, 0].numpy()
    mean = np.trapezoid(value, UNIT)
    variance = np.trapezoid((value - mean) ** 2, UNIT)
    return np.trapezoid(log_p_of_z, UNIT) + 0.5 * math.log(2 * math.pi * math.e * variance)


@pytest.mark.parametrize("sd", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("inside", [-2.0, -1.0, 0.0, 0.5, 1.0])
def test_matched_softness(sd, inside) -> None:
    matched = matched_softness(np.array([2 * sd]), np.array([0.0]), np.array([4.0]))[0] / sd
    assert matched == pytest.approx(1.25)  # of the half-width, 2
    at = {factor: divergence(sd, inside, factor) for factor in (0.3, 0.8, 1.25, 4.0)}
    assert at[0.8] < at[1.25] < min(at[0.3], at[4.0])
    assert at[0.8] < 0.001 and at[1.25] < 0.0095
    if inside == 0.0:
        assert at[0.8] == pytest.approx(0.0004, abs=5e-5)
        assert at[1.25] == pytest.approx(0.0057, abs=1e-4)
        assert min(at[0.3], at[4.0]) > 0.03


def test_matched_softness_stays_in_its_range() -> None:
    sd = np.array([0.0, 1e-6, 0.1, 100.0, 0.1])
    low, high = np.zeros(5), np.array([2.0, 2.0, 2.0, 2.0, np.inf])
    np.testing.assert_allclose(matched_softness(sd, low, high), [0.01, 0.01, 0.125, 0.6, 0.125])
