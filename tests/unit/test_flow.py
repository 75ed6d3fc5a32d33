"""The conditional flow: its splines, its layers, its start, and that its density is one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from nflows.transforms import LULinear
from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline
from torch import Tensor

from sbi_dist.errors import InputError
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.embedding import build_embedding
from sbi_dist.estimation.flow import ConditionalAffine, ConditionalFlow
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.spline import FastLULinear, rational_quadratic_spline
from sbi_dist.estimation.standardize import Standardization

SMALL = {"transforms": 3, "hidden_features": 12, "blocks": 1, "bins": 6}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def perturbed(module: torch.nn.Module, size: float) -> torch.nn.Module:
    """As if trained: layers that start as the identity are no longer."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(size * torch.randn_like(weight))
    return module.eval()


# ---- splines ------------------------------------------------------------------------------------

BINS, BOUND, SCALE = 7, 3.0, 2.5


def nflows_spline(inputs: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return unconstrained_rational_quadratic_spline(
        inputs,
        parameters[..., :BINS] / SCALE,
        parameters[..., BINS : 2 * BINS] / SCALE,
        parameters[..., 2 * BINS :],
        inverse=inverse,
        tails="linear",
        tail_bound=BOUND,
    )


def our_spline(inputs: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return rational_quadratic_spline(inputs, parameters, BINS, BOUND, SCALE, inverse)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_spline_is_that_of_nflows(inverse, spread) -> None:
    inputs = torch.linspace(-4.0, 4.0, 400, dtype=torch.float64).reshape(100, 4)
    parameters = spread * torch.randn(100, 4, 3 * BINS - 1, dtype=torch.float64)
    weights = torch.randn(2, 100, 4, dtype=torch.float64)
    results = []
    for spline in (our_spline, nflows_spline):
        point, shape = inputs.clone().requires_grad_(), parameters.clone().requires_grad_()
        outputs, log_derivative = spline(point, shape, inverse)
        (weights[0] * outputs + weights[1] * log_derivative).sum().backward()
        results.append([outputs, log_derivative, point.grad, shape.grad])
    for ours, theirs in zip(*results, strict=True):
        scale = max(float(theirs.detach().abs().max()), 1.0)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * scale)


def test_spline_at_the_ends_of_its_interval_and_beyond() -> None:
    inputs = torch.tensor([-BOUND, BOUND, -3.5, 1e6, -1e6], dtype=torch.float64)
    parameters = torch.randn(5, 3 * BINS - 1, dtype=torch.float64)
    for inverse in (False, True):
        outputs, log_derivative = our_spline(inputs, parameters, inverse)
        torch.testing.assert_close(outputs, inputs, rtol=0, atol=1e-12)
        torch.testing.assert_close(log_derivative, torch.zeros(5).double(), rtol=0, atol=1e-12)


def test_spline_inverse_is_its_inverse() -> None:
    inputs = 1.2 * BOUND * (2 * torch.rand(500, dtype=torch.float64) - 1)
    parameters = 2 * torch.randn(500, 3 * BINS - 1, dtype=torch.float64)
    outputs, forward = our_spline(inputs, parameters, False)
    again, backward = our_spline(outputs, parameters, True)
    torch.testing.assert_close(again, inputs, rtol=0, atol=1e-9)
    torch.testing.assert_close(forward + backward, torch.zeros(500).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("features", [1, 2, 6])
def test_linear_layer(features) -> None:
    layer = perturbed(FastLULinear(features, identity_init=True).double(), 0.5)
    reference = LULinear(features).double()
    reference.load_state_dict(layer.state_dict())
    inputs = torch.randn(50, features, dtype=torch.float64)
    outputs, log_det = layer(inputs)
    again, inverse_log_det = layer.inverse(outputs)
    torch.testing.assert_close(again, inputs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_det, -inverse_log_det)
    torch.testing.assert_close(log_det[0], layer.weight().det().abs().log())
    torch.testing.assert_close(reference(inputs)[0], outputs)


# ---- the flow -----------------------------------------------------------------------------------


def flow(estimator: str, features: int, embedding: str = "none") -> ConditionalFlow:
    options = TrainOptions(estimator=estimator, embedding=embedding, **SMALL)
    return perturbed(ConditionalFlow(options, features, (4,)).double(), 0.1)


@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_flow_and_its_inverse(estimator, features) -> None:
    model = flow(estimator, features)
    u = 2 * torch.randn(200, features, dtype=torch.float64)  # some beyond the splines' interval
    context = torch.randn(200, 4, dtype=torch.float64)
    noise, log_det = model.flow._transform(u, context=context)
    assert float((noise - u).detach().abs().mean()) > 0.05
    torch.testing.assert_close(model.push(noise, context), u, rtol=0, atol=1e-8)
    _, inverse_log_det = model.flow._transform.inverse(noise, context=context)
    torch.testing.assert_close(log_det, -inverse_log_det, rtol=0, atol=1e-7)
    for row in range(3):
        one, given = u[row : row + 1], context[row : row + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda v, given=given: model.flow._transform(v, context=given)[0][0], one
        )[:, 0]
        torch.testing.assert_close(jacobian.det().abs().log(), log_det[row], rtol=0, atol=1e-9)
    base = -0.5 * (noise**2).sum(1) - 0.5 * features * math.log(2 * math.pi)
    torch.testing.assert_close(model(u, context), base + log_det)


@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_flow_starts_as_its_affine_layer(estimator) -> None:
    """So that the first loss is that of the linear regression."""
    model = ConditionalFlow(TrainOptions(estimator=estimator, **SMALL), 3, (4,)).double()
    u, x = torch.randn(100, 3).double(), torch.randn(100, 4).double()
    model.initialize(u, x)
    expected, log_det = model.flow._transform._transforms[0](u, x)
    noise, total = model.flow._transform(u, context=x)
    if estimator == "maf":  # has reversed the components three times
        expected = expected.flip(1)
    torch.testing.assert_close(noise, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(total, log_det, rtol=0, atol=1e-6)


def test_initialize_is_the_regression() -> None:
    rng = np.random.default_rng(0)
    context = rng.normal(size=(300, 4)) * [1.0, 2.0, 0.5, 1.0] + [0.0, 1.0, -2.0, 0.0]
    u = context @ rng.normal(size=(4, 2)) + [3.0, -1.0] + rng.normal(size=(300, 2)) * [0.1, 2.0]
    layer = ConditionalAffine(2, 4, 8, 1).double()
    layer.initialize(torch.from_numpy(u), torch.from_numpy(context))
    solution, _, _, _ = np.linalg.lstsq(np.hstack([context, np.ones((300, 1))]), u, rcond=None)
    # The ridge moves each coefficient by less than a quarter of its standard error, which is
    # 2 / sqrt(300) over the context's sd of 0.5 at most.
    np.testing.assert_allclose(layer.linear.weight[:2].detach(), solution[:4].T, atol=0.05)
    residual = u - np.hstack([context, np.ones((300, 1))]) @ solution
    # Left-out residuals are larger than fitted ones, by about 5 rows of 300.
    sd = np.exp(-layer.linear.bias[2:].detach().numpy())
    np.testing.assert_allclose(sd / residual.std(0), 1 + 5 / 300, atol=0.01)
    # So the layer's output is u given x, standardized (|log scale| < 2.4 loses 1 % to the limit).
    noise, _ = layer(torch.from_numpy(u), torch.from_numpy(context))
    np.testing.assert_allclose(noise.detach().std(0), 1.0, atol=0.05)
    np.testing.assert_allclose(noise.detach().mean(0), 0.0, atol=1e-3)


def test_initialize_bears_constant_and_repeated_columns() -> None:
    u = torch.randn(50, 1)
    context = torch.cat([torch.ones(50, 1), u, u], dim=1)
    layer = ConditionalAffine(1, 3, 8, 1)
    layer.initialize(u, context)
    noise, log_det = layer(u, context)
    assert torch.isfinite(noise).all() and torch.isfinite(log_det).all()
    torch.testing.assert_close(
        layer.linear.weight[0, 1:].sum(), torch.tensor(1.0), atol=1e-3, rtol=0
    )


def test_affine_scale_is_limited() -> None:
    layer = perturbed(ConditionalAffine(2, 3, 8, 1), 1.0)
    context = 1e6 * torch.randn(100, 3)
    for transform in (layer, layer.inverse):
        _, log_det = transform(torch.randn(100, 2), context)
        assert torch.isfinite(log_det).all() and float(log_det.detach().abs().max()) <= 24.001


# ---- the density over the support ---------------------------------------------------------------


def estimator_on_box(kind: str, size: int) -> DensityEstimator:
    """Fitted to x = theta + 0.3 * noise with theta uniform on [-2, 2]^D, by regression alone."""
    rng = np.random.default_rng(0)
    theta = rng.uniform(-2, 2, (2000, size)).astype(np.float32)
    x = theta + 0.3 * rng.standard_normal((2000, size), dtype=np.float32)
    bounds = np.full(size, -2.0), np.full(size, 2.0)
    standardization = Standardization.fit(theta, x, *bounds, "linear")
    model = DensityEstimator(TrainOptions(estimator=kind, **SMALL), standardization, (size,))
    u, _ = standardization.u(torch.from_numpy(theta))
    model.flow.initialize(u, standardization.x(torch.from_numpy(x)))
    return perturbed(model, 0.02)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["nsf", "maf"])
@torch.no_grad()
def test_density_on_a_box_integrates_to_one(kind, size) -> None:
    model = estimator_on_box(kind, size)
    bijection = model.standardization.bijection
    # A grid in z, so that it is finer towards the edges: dtheta = exp(log_det) dz.
    end = 1 + 7 * float(bijection.softness.max())
    axis = torch.linspace(-end, end, 2001 if size == 1 else 161, dtype=torch.float64)
    z = axis[:, None] if size == 1 else torch.cartesian_prod(axis, axis)
    theta, cell = bijection.constrain(z), float(axis[1] - axis[0]) ** size
    for place in (0.0, 1.9, 2.4, 30.0, 1e4):
        x = torch.full((1, size), place)
        log_q = model.log_prob(theta, x.expand(len(theta), -1))
        total = float((log_q.double() + bijection.log_det(z)).exp().sum()) * cell
        assert not torch.isnan(log_q).any() and (log_q < math.inf).all()
        if place < 3:
            # A sum over a grid is exact for a smooth density, but for what lies beyond the grid:
            # less than 1e-3, as the image of x is at 1.2 and its sd 0.15 at most, the end at 2.2.
            assert total == pytest.approx(1.0, abs=2e-3)
        else:
            # x that no theta gives: all mass is nearer to the edge than float64 can resolve.
            assert total <= 1.0 + 2e-3
        noise = torch.randn(200, size)
        draws = model.push(noise, model.embed(x).expand(200, -1))
        assert ((draws >= -2) & (draws <= 2)).all()
    outside = torch.tensor([[-2.001] * size, [2.001] + [0.0] * (size - 1)])
    assert (model.log_prob(outside, torch.zeros(2, size)) == -math.inf).all()
    assert model.num_parameters == size
    assert model.num_weights == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("estimator", ["nsf", "maf"])
@torch.no_grad()
def test_density_far_from_all_training_data(estimator) -> None:
    """On R^D, where no edge is in the way: the density of a draw is that of its noise."""
    model = flow(estimator, 2)
    noise = torch.randn(500, 2, dtype=torch.float64)
    for place in (5.0, 30.0, 1e4):
        context = torch.full((500, 4), place, dtype=torch.float64)
        u, log_det = model.flow._transform.inverse(noise, context=context)
        assert torch.isfinite(u).all() and torch.isfinite(log_det).all()
        expected = -0.5 * (noise**2).sum(1) - math.log(2 * math.pi) - log_det
        torch.testing.assert_close(model(u, context), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_draws_follow_the_density() -> None:
    model = estimator_on_box("nsf", 1)
    x = torch.zeros(1, 1)
    draws = model.push(torch.randn(4000, 1), model.embed(x).expand(4000, -1))[:, 0]
    grid = torch.linspace(-2, 2, 8001)[:, None]
    density = model.log_prob(grid, x.expand(len(grid), -1)).exp().numpy()
    cdf = np.interp(draws.numpy(), grid[:, 0].numpy(), density.cumsum() / density.sum())
    # Kolmogorov: P(sqrt(n) D > 2) = 2 exp(-8) = 7e-4, at a fixed seed; 1e-3 for the grid.
    assert abs(np.sort(cdf) - np.arange(4000) / 4000).max() < 2 / math.sqrt(4000) + 1e-3


# ---- embeddings ---------------------------------------------------------------------------------

X_SHAPES = {
    "none": [(), (3,), (2, 4), (2, 3, 4)],
    "fully_connected": [(), (3,), (2, 4)],
    "permutation_invariant": [(7,), (7, 2)],
    "convolutional_1d": [(3,), (50,), (33, 2)],
    "convolutional_2d": [(3, 4), (17, 9), (2, 17, 9)],
}


@pytest.mark.parametrize(
    ("kind", "x_shape"), [(kind, shape) for kind in X_SHAPES for shape in X_SHAPES[kind]], ids=str
)
def test_embedding_shapes(kind, x_shape) -> None:
    options = TrainOptions(embedding=kind, embedding_features=5, embedding_hidden=16, **SMALL)
    network, size = build_embedding(options, x_shape)
    assert size == (math.prod(x_shape) if kind == "none" else 5)
    x = torch.randn(6, *x_shape)
    context = network(x)
    assert context.shape == (6, size)
    torch.testing.assert_close(network(x[2:3]), context[2:3])  # rows do not meet
    assert not torch.equal(context[0], context[1])
    model = ConditionalFlow(options, 2, x_shape)
    assert model(torch.randn(6, 2), x).shape == (6,)


@pytest.mark.parametrize("x_shape", [(7,), (7, 2)])
def test_permutation_invariance(x_shape) -> None:
    options = TrainOptions(embedding="permutation_invariant")
    network, _ = build_embedding(options, x_shape)
    x = torch.randn(4, *x_shape)
    torch.testing.assert_close(network(x[:, torch.randperm(7)]), network(x), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(network(x + 1), network(x))


@pytest.mark.parametrize(
    ("kind", "x_shape"),
    [
        ("permutation_invariant", ()),
        ("permutation_invariant", (2, 3, 4)),
        ("convolutional_1d", (2, 3, 4)),
        ("convolutional_2d", (5,)),
        ("convolutional_2d", (1, 2, 3, 4)),
    ],
)
def test_embedding_refuses(kind, x_shape) -> None:
    with pytest.raises(InputError, match=f"train.embedding={kind} takes x of shape .* but x has"):
        build_embedding(TrainOptions(embedding=kind), x_shape)
