"""The compiled flow against nflows' unmodified modules; draws in whatever parts."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows import transforms
from nflows.nn.nets import ResidualNet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.ensemble import Ensemble
from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.posterior.noise import normal_noise, stream_keys
from sbi_dist.posterior.sampler import Sampler, compiled
from sbi_dist.posterior.sampler import sampler as sampler_module
from sbi_dist.posterior.sampler.compiled import CompiledEstimator
from sbi_dist.posterior.sampler.jobs import in_threads, jobs, tile_shape, tiles
from sbi_dist.posterior.sampler.program import compile_flow
from sbi_dist.posterior.sampler.step import Unknown
from tests.shipped import as_shipped

SMALL = {"transforms": 3, "hidden_features": 11, "blocks": 2, "bins": 6}
# What float32 gives is compared with what nflows gives in float64.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def stirred(module: nn.Module, spread: float = 0.2) -> nn.Module:
    """In float64, its weights moved away from their start as training does."""
    with torch.no_grad():
        for weight in module.double().parameters():
            weight.add_(spread * torch.randn_like(weight))
    return module.eval()


def build(features: int, x_shape: tuple[int, ...] = (4,), **options: Any) -> ConditionalFlow:
    model = ConditionalFlow(TrainOptions(**{**SMALL, **options}), features, x_shape)
    return stirred(model)  # type: ignore[return-value]


def agree(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    scale = max(float(theirs.abs().max()), 1.0)
    torch.testing.assert_close(
        ours.double(), theirs.double(), rtol=tolerance, atol=tolerance * scale,
        msg=lambda text: f"{what}: {text}",
    )  # fmt: skip


@torch.no_grad()
def compare(
    transform: nn.Module,
    reference: nn.Module,
    features: int,
    context: Tensor,
    draws: int,
    dtype: torch.dtype = torch.float64,
    spread: float = 1.5,
) -> None:
    """Both directions and both log-determinants, for the same noise and the same u."""
    tolerance, observations = TOLERANCE[dtype], len(context)
    noise = spread * torch.randn(draws, observations, features, dtype=torch.float64)
    repeated = context.repeat(draws, 1)
    u, log_det = reference.inverse(noise.flatten(0, 1), context=repeated)
    program = compile_flow(transform, features).to(torch.empty((), dtype=dtype))
    run = program.run(draws, observations, torch.empty((), dtype=dtype))
    conditions = program.conditions(context.to(dtype))
    run.given(conditions)
    used = draws * observations  # the rest is padding
    features_of, log_det_of = run.tile.features[:, :used], run.tile.log_det[:used]
    features_of.copy_(noise.flatten(0, 1).T)
    run.inverse(with_log_det=True)
    agree(features_of.T, u, tolerance, "u")
    agree(log_det_of, log_det, tolerance, "log det of u by noise")
    values = features_of.clone()
    features_of.copy_(noise.flatten(0, 1).T)
    run.inverse()
    assert torch.equal(features_of, values)
    noise, log_det = reference(u, context=repeated)
    features_of.copy_(u.T)
    run.forward()
    agree(features_of.T, noise, tolerance, "noise")
    agree(log_det_of, log_det, tolerance, "log det of noise by u")


# ---- against nflows -----------------------------------------------------------------------------


@pytest.mark.parametrize(("draws", "observations"), [(40, 1), (5, 8), (1, 7)])
@pytest.mark.parametrize("features", [1, 2, 3, 6])
@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_same_noise_same_draws(estimator, features, draws, observations) -> None:
    model = build(features, estimator=estimator)
    context = torch.randn(observations, 4, dtype=torch.float64)
    # sd 3: one point in ten lies beyond the splines' interval.
    compare(
        model.flow._transform, as_shipped(model)._transform, features, context, draws, spread=3.0
    )


@given(
    estimator=st.sampled_from(["nsf", "maf"]),
    features=st.integers(1, 5),
    context=st.integers(1, 6),
    transforms=st.integers(1, 4),
    hidden=st.integers(1, 9),
    blocks=st.integers(1, 3),
    bins=st.integers(2, 12),
    tail_bound=st.floats(0.6, 40),
    draws=st.integers(1, 9),
    observations=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=25)
def test_generated_sizes(
    estimator, features, context, transforms, hidden, blocks, bins, tail_bound, draws,
    observations, seed,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    model = build(
        features, (context,), estimator=estimator, transforms=transforms,
        hidden_features=hidden, blocks=blocks, bins=bins, tail_bound=tail_bound,
    )  # fmt: skip
    given_x = torch.randn(observations, context, dtype=torch.float64)
    compare(model.flow._transform, as_shipped(model)._transform, features, given_x, draws)


@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_in_float32(estimator) -> None:
    """The sizes that are used, at the start of training and after some: against float64."""
    for spread in (0.0, 0.05):
        model = ConditionalFlow(TrainOptions(estimator=estimator), 3, (4,))
        stirred(model, spread)
        context = torch.randn(20, 4, dtype=torch.float64)
        transform, reference = model.flow._transform, as_shipped(model)._transform
        compare(transform, reference, 3, context, 50, torch.float32, spread=1.0)


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_numbers_of_any_size(size) -> None:
    """Far from the training data a network's outputs are, and their exponentials overflow."""
    model = build(3)
    context = size * torch.randn(6, 4, dtype=torch.float64)
    transform, reference = model.flow._transform, as_shipped(model)._transform
    noise = torch.randn(8, 6, 3, dtype=torch.float64)
    with torch.no_grad():
        u, _ = reference.inverse(noise.flatten(0, 1), context=context.repeat(8, 1))
        for dtype in (torch.float64, torch.float32):
            like = torch.empty((), dtype=dtype)
            program = compile_flow(transform, 3).to(like)
            run = program.run(8, 6, like)
            run.tile.features[:, :48].copy_(noise.flatten(0, 1).T)
            run.given(program.conditions(context.to(dtype)))
            run.inverse(True)
            assert torch.isfinite(run.tile.features).all()
            assert torch.isfinite(run.tile.log_det).all()
            if dtype == torch.float64:
                agree(run.tile.features[:, :48].T, u, 1e-9, "u")


def test_layers_of_other_flows() -> None:
    """Any mask, permutation and affine layer, in any order."""

    def network(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, hidden_features=7, context_features=2)

    def coupling(mask: list[int]) -> nn.Module:
        return transforms.PiecewiseRationalQuadraticCouplingTransform(
            mask, network, 5, "linear", 2.5, min_bin_width=0.01, min_derivative=0.02
        )

    flow = transforms.CompositeTransform(
        [
            transforms.PointwiseAffineTransform(torch.arange(4.0), torch.tensor([2.0, 1, 0.5, 3])),
            transforms.RandomPermutation(4),
            coupling([1, 1, -1, -1]),
            transforms.CompositeTransform(
                [transforms.LULinear(4, identity_init=False), coupling([-1, 1, -1, -1])]
            ),
            coupling([1, -1, 1, 1]),
            transforms.MaskedAffineAutoregressiveTransform(
                4, 9, 2, num_blocks=1, use_residual_blocks=False, activation=torch.tanh
            ),
            transforms.IdentityTransform(),
        ]
    )
    stirred(flow)
    compare(flow, flow, 4, torch.randn(5, 2, dtype=torch.float64), 6)


# ---- how it is computed -------------------------------------------------------------------------


class _Calls(TorchDispatchMode):
    """Names of the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_inverting_an_autoregressive_layer_uses_each_weight_once() -> None:
    """Not D times: the products are those of one pass, and so are the layers' sizes."""
    model = build(6, estimator="maf")
    program = compile_flow(model.flow._transform, 6).to(torch.empty((), dtype=torch.float64))
    networks = [
        layer.autoregressive_net
        for layer in model.flow._transform._transforms
        if hasattr(layer, "autoregressive_net")
    ]
    masks = [
        each.mask
        for net in networks
        for each in net.modules()
        if getattr(each, "mask", None) is not None
    ]
    assert program.products == sum(int(mask.sum()) for mask in masks)
    run = program.run(4, 1, torch.empty((), dtype=torch.float64))
    run.given(program.conditions(torch.randn(1, 4, dtype=torch.float64)))

    flops = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal flops
            if "mm" in str(function):
                one, other = [each for each in args if each.ndim == 2][-2:]
                flops += one.shape[0] * one.shape[1] * other.shape[1]
            return function(*args, **(kwargs or {}))

    with Count():
        run.inverse()
    # Besides: a column of biases for each layer but the first, and the permutations.
    columns = run.tile.count
    most = columns * (program.products + 3 * (2 * 11 + 12) + 3 * 6 * 7)
    assert columns * program.products < flops <= most


@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_no_boolean_indexing_and_nothing_waits(estimator) -> None:
    """On a device: no operation whose shape depends on values, none that reads one back."""
    model = build(3, estimator=estimator)
    program = compile_flow(model.flow._transform, 3).to(torch.empty((), dtype=torch.float64))
    run = program.run(4, 5, torch.empty((), dtype=torch.float64))
    run.given(program.conditions(torch.randn(5, 4, dtype=torch.float64)))
    waits = ("nonzero", "_local_scalar_dense", "index.Tensor", "masked_select")

    def waiting() -> bool:
        with _Calls() as calls, torch.no_grad():
            run.inverse(True)
        return any(word in name for name in calls.names for word in waits)

    # On a CPU the splines look at the sizes of numbers, which shows that a look is seen.
    assert waiting() == (estimator == "nsf")
    for each in run._runs:
        if hasattr(each, "_spline"):
            each._spline._on_cpu = False
    assert not waiting()


class Newer(nn.Module):
    """A layer that there is no step for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(inputs, context)

    def inverse(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.inverse(inputs, context)


def test_a_flow_that_is_not_known_runs_through_nflows() -> None:
    estimator = make(2)
    known = Sampler(estimator)
    assert known.how == "compiled"
    x = torch.randn(3, 4)
    expected = known.draw(x, 50, "m", 1, with_log_prob=True)
    layers = estimator.flow.flow._transform._transforms
    layers[1] = Newer(layers[1])
    other = Sampler(estimator)
    assert other.how == f"nflows' own modules, as no step is written for {__name__}.Newer"
    theta, log_q = other.draw(x, 50, "m", 1, with_log_prob=True)
    assert log_q is not None and expected[1] is not None
    torch.testing.assert_close(theta, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_q, expected[1], rtol=1e-4, atol=1e-4)
    given_theta = theta.transpose(0, 1)
    torch.testing.assert_close(
        other.log_prob(given_theta, x), known.log_prob(given_theta, x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "layer",
    [
        transforms.MaskedAffineAutoregressiveTransform(3, 8, 2),  # residual blocks
        transforms.MaskedAffineAutoregressiveTransform(
            3, 8, 2, use_residual_blocks=False, activation=torch.relu
        ),
        transforms.MaskedAffineAutoregressiveTransform(
            3, 8, use_residual_blocks=False, activation=torch.tanh
        ),
        transforms.AffineCouplingTransform([1, -1, 1], lambda a, b: ResidualNet(a, b, 8)),
        transforms.PiecewiseRationalQuadraticCouplingTransform(
            [1, -1, 1], lambda a, b: ResidualNet(a, b, 8, 2, use_batch_norm=True), tails="linear"
        ),
        transforms.PiecewiseRationalQuadraticCouplingTransform(
            [1, -1, 1], lambda a, b: ResidualNet(a, b, 8, 2, activation=torch.tanh), tails="linear"
        ),
        transforms.PiecewiseRationalQuadraticCouplingTransform(
            [1, -1, 1], lambda a, b: ResidualNet(a, b, 8), tails="linear"
        ),
        transforms.PiecewiseRationalQuadraticCouplingTransform(
            [1, -1, 1], lambda a, b: ResidualNet(a, b, 8, 2)
        ),
        transforms.BatchNorm(3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_are_not_known(layer) -> None:
    with pytest.raises(Unknown):
        compile_flow(layer, 3)


def test_compiling_changes_nothing_of_the_estimator() -> None:
    estimator = make(3, estimator="maf")
    before = {name: value.clone() for name, value in estimator.state_dict().items()}
    modes = [module.training for module in estimator.modules()]
    Sampler(estimator).draw(torch.randn(2, 4), 20, "m", 0)
    assert all(torch.equal(value, before[name]) for name, value in estimator.state_dict().items())
    assert modes == [module.training for module in estimator.modules()]


# ---- draws of an estimator ----------------------------------------------------------------------


def make(features: int, x_shape: tuple[int, ...] = (4,), **options: Any) -> DensityEstimator:
    """An estimator of a box with one open side, if there are two parameters."""
    rng = np.random.default_rng(3)
    low, high = np.full(features, -2.0), np.full(features, 2.0)
    high[1:2] = math.inf
    theta = rng.uniform(-1.9, 1.9, (200, features)).astype(np.float32)
    x = rng.standard_normal((200, *x_shape)).astype(np.float32)
    standardization = Standardization.fit(theta, x, low, high, "linear")
    estimator = DensityEstimator(TrainOptions(**{**SMALL, **options}), standardization, x_shape)
    with torch.no_grad():
        for weight in estimator.flow.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return estimator.eval()


EMBEDDINGS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "none": ((4,), {}),
    "fully_connected": ((4,), {"embedding": "fully_connected"}),
    "convolutional_1d": ((12,), {"embedding": "convolutional_1d"}),
    "convolutional_2d": ((6, 6), {"embedding": "convolutional_2d"}),
    "permutation_invariant": ((5, 2), {"embedding": "permutation_invariant"}),
}


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_draws_and_densities_are_the_estimator_s(estimator, embedding) -> None:
    """Noise in, theta out, by the modules themselves."""
    x_shape, options = EMBEDDINGS[embedding]
    one = make(3, x_shape, estimator=estimator, **options)
    x = torch.randn(7, *x_shape)
    theta, log_q = Sampler(one).draw(x, 30, "m", 4, with_log_prob=True)
    noise = normal_noise(stream_keys(x.numpy(), "m", 4), 0, 30, 3)
    with torch.no_grad():
        context = one.embed(x.repeat_interleave(30, dim=0))
        u = one.flow.push(noise.permute(2, 1, 0).flatten(0, 1), context)
        density = one.log_prob_unconstrained(u, context).float()
    torch.testing.assert_close(theta.flatten(0, 1), one.constrained(u), rtol=1e-5, atol=1e-5)
    assert log_q is not None
    torch.testing.assert_close(log_q.flatten(), density, rtol=1e-4, atol=1e-4)
    # At an edge float32 has too few numbers for theta to tell its density.
    density = one.log_prob_given_context(theta.flatten(0, 1), context).detach()
    found = Sampler(one).log_prob(theta.transpose(0, 1), x)
    torch.testing.assert_close(found.T.flatten(), density, rtol=1e-4, atol=1e-4)


def test_densities_outside_the_support() -> None:
    estimator = make(2)
    theta = torch.tensor([[0.0, 0.0], [2.1, 0.0], [0.0, 50.0], [0.0, -2.5]])
    log_q = Sampler(estimator).log_prob(theta[:, None].expand(-1, 3, -1), torch.randn(3, 4))
    assert torch.isfinite(log_q[[0, 2]]).all() and torch.isinf(log_q[[1, 3]]).all()


@pytest.mark.parametrize("kind", ["nsf", "maf", "ensemble"])
def test_a_draw_is_the_same_in_whatever_part(kind, monkeypatch) -> None:
    """To rounding, for tiles and jobs of any shape, and any number of threads."""
    if kind == "ensemble":
        estimator: Any = Ensemble([make(2), make(2, estimator="maf"), make(2, transforms=2)])
    else:
        estimator = make(2, estimator=kind)
    x = torch.randn(90, 4)
    theta, log_q = Sampler(estimator, threads=1).draw(x, 70, "m", 2, with_log_prob=True)
    assert log_q is not None
    density_at = Sampler(estimator, threads=1).log_prob(theta[:, :9].transpose(0, 1), x)
    shapes = [(3, 50), (100, 1000), (64, 10**6)]  # columns of a tile, draws of a job
    for columns, draws in shapes:
        monkeypatch.setattr(compiled, "_COLUMNS", columns)
        monkeypatch.setattr(sampler_module, "MOST_DRAWS", draws)
        sampler = Sampler(estimator, threads=3)
        some, density = sampler.draw(x[20:60], 31, "m", 2, first=11, with_log_prob=True)
        torch.testing.assert_close(some, theta[20:60, 11:42], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(density, log_q[20:60, 11:42], rtol=1e-4, atol=1e-4)
        one, _ = sampler.draw(x[5:6], 70, "m", 2)
        torch.testing.assert_close(one[0], theta[5], rtol=1e-5, atol=1e-5)
        again = sampler.log_prob(theta[20:60, :9].transpose(0, 1), x[20:60])
        torch.testing.assert_close(again, density_at[:, 20:60], rtol=1e-4, atol=1e-4)


def test_the_same_call_gives_the_same_bits() -> None:
    """Also by several threads, which take the jobs in any order."""
    estimator = make(2)
    x = torch.randn(150, 4)
    first, second = (Sampler(estimator, threads=4).draw(x, 400, "m", 2)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(Sampler(estimator, threads=1).draw(x, 400, "m", 2)[0], first)


def test_draws_have_their_density() -> None:
    """E exp(g - log q) = integral of exp(g) over the support, for g a density: one."""
    estimator = make(1)
    x = torch.randn(2, 4)
    theta, log_q = Sampler(estimator).draw(x, 40_000, "m", 7, with_log_prob=True)
    assert log_q is not None
    # The uniform density on the inner half of the box, which q covers.
    inside = (theta.squeeze(-1).abs() < 1).double() / 2
    weights = inside / log_q.double().exp()
    error = weights.std(dim=1) / math.sqrt(weights.shape[1])
    assert ((weights.mean(dim=1) - 1).abs() < 5 * error).all() and (error < 0.05).all()


def test_nothing_to_draw() -> None:
    sampler = Sampler(make(2))
    theta, log_q = sampler.draw(torch.randn(3, 4), 0, "m", 1, with_log_prob=True)
    assert theta.shape == (3, 0, 2) and log_q is not None and log_q.shape == (3, 0)
    assert sampler.log_prob(torch.empty(0, 3, 2), torch.randn(3, 4)).shape == (0, 3)


# ---- jobs and tiles -----------------------------------------------------------------------------


@given(
    st.integers(0, 50),
    st.integers(0, 200),
    st.integers(1, 60),
    st.integers(1, 500),
    st.integers(1, 5000),
)
@settings(deadline=None, max_examples=100)
def test_jobs_and_tiles_cover_everything_once(
    observations, draws, most_rows, columns, most_draws
) -> None:
    seen = np.zeros((observations, draws), dtype=int)
    for job in jobs(observations, draws, most_rows, most_draws):
        part = seen[job.rows, job.draws]
        assert 0 < part.shape[0] <= most_rows and 0 < part.size <= most_draws
        for some, rows in tiles(*part.shape, columns):
            assert part[rows, some].size > 0
            part[rows, some] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("observations", "draws", "shape"),
    [
        (1, 10**7, (2048, 1)),
        (1, 5, (5, 1)),
        (100_000, 10, (10, 204)),
        (100_000, 1, (1, 2048)),
        (10_000, 100, (100, 20)),
        (100, 1500, (1500, 1)),
    ],
)
def test_tiles_are_of_one_size_whatever_there_is(observations, draws, shape) -> None:
    assert tile_shape(observations, draws, 2048) == shape


def bits(estimator: Any, x: Tensor, count: int, first: int, threads: int = 1) -> Any:
    sampler = Sampler(estimator, threads=threads)
    return sampler.draw(x, count, "m", 2, first=first, with_log_prob=True)


@pytest.mark.parametrize("count", [1, 7, 33, 255, 511, 512, 600, 1100, 5000])
@pytest.mark.parametrize(
    "kind", ["nsf 1", "nsf 2", "nsf 4", "maf 1", "maf 3", "ensemble", *list(EMBEDDINGS)[1:]]
)
def test_a_draw_is_the_same_to_the_last_bit_alone_and_in_a_batch(kind, count) -> None:
    x_shape, options = EMBEDDINGS.get(kind, ((4,), {}))
    if kind == "ensemble":
        estimator: Any = Ensemble([make(2), make(2, estimator="maf"), make(2, transforms=2)])
    elif kind in EMBEDDINGS:
        estimator = make(2, x_shape, **options)
    else:
        name, size = kind.split()
        estimator = make(int(size), estimator=name)
    x = torch.randn(37 if count < 600 else 5, *x_shape)
    theta, log_q = bits(estimator, x, count, 0, threads=2)
    for rows in (slice(0, 1), slice(3, 4), slice(1, 5), slice(2, len(x))):
        alone, density = bits(estimator, x[rows], count, 0)
        assert torch.equal(alone, theta[rows])
        assert torch.equal(density, log_q[rows])


@pytest.mark.parametrize(
    ("observations", "draws", "number"),
    [(1, 10_000, 1), (1, 30_000, 4), (100, 1000, 4), (1, 10**6, 32), (10_000, 100, 32)],
)
def test_jobs_are_of_one_size(observations, draws, number) -> None:
    """So that two or four threads end together."""
    sizes = [
        (job.rows.stop - job.rows.start) * (job.draws.stop - job.draws.start)
        for job in jobs(observations, draws, 10**6)
    ]
    assert len(sizes) == number and max(sizes) <= 1.05 * (sum(sizes) / number)


def test_threads_stop_at_an_error() -> None:
    done = []

    def work(item: int) -> None:
        if item == 3:
            raise ValueError("three")
        time.sleep(0.005)
        done.append(item)

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="three"):
        in_threads(work, range(400), 2)
    # The other thread ends what it was at.
    assert len(done) < 100 and torch.get_num_threads() == before


def test_memory_does_not_grow_with_the_request() -> None:
    """What is held for tiles is bounded, whatever shapes come."""
    estimator = CompiledEstimator(make(2), torch.device("cpu"))
    for draws in range(1, 60):
        conditions = estimator.conditions(torch.randn(2, 4))
        estimator.sample(torch.randn(2, draws, 2), conditions)
    assert sum(map(len, estimator._free.values())) <= compiled._RUNS_KEPT
