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
