"""The fast form of the flow's density, against nflows' own modules; parameters in one vector."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows.transforms import (
    MaskedAffineAutoregressiveTransform,
    PiecewiseRationalQuadraticCouplingTransform,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sbi_dist.estimation.fast import FlatParameters, fast_log_prob
from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.options import TrainOptions
from tests.shipped import as_shipped

SMALL = {"transforms": 3, "hidden_features": 11, "blocks": 2, "bins": 6}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def build(
    features: int, x_shape: tuple[int, ...] = (4,), spread: float = 0.2, **options: Any
) -> ConditionalFlow:
    """A flow in float64, its weights moved away from their start as training does."""
    model = ConditionalFlow(TrainOptions(**{**SMALL, **options}), features, x_shape).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(spread * torch.randn_like(weight))
    return model.eval()


def gradients(
    log_q: Tensor, inputs: list[Tensor], flow: nn.Module, weights: Tensor
) -> dict[str, Tensor]:
    """Of a weighted sum of log q, by the inputs and by each parameter."""
    named = dict(flow.named_parameters())
    # nflows leaves out a spline's network where no point is inside; its gradients are zero.
    result = torch.autograd.grad(
        (weights * log_q).sum(), [*inputs, *named.values()], materialize_grads=True
    )
    return dict(zip(["u", "context", *named], result, strict=True))


def agree(ours: Tensor, theirs: Tensor, what: str = "", relative: float = 1e-9) -> None:
    scale = max(float(theirs.detach().abs().max()), 1.0)
    torch.testing.assert_close(
        ours, theirs, rtol=relative, atol=relative * scale, msg=lambda text: f"{what}: {text}"
    )


def compare(model: ConditionalFlow, u: Tensor, context: Tensor, relative: float = 1e-9) -> None:
    """Density and all gradients, with and without the parameters in one vector."""
    reference, weights = as_shipped(model), torch.randn(len(u), dtype=torch.float64)
    u, context = u.clone().requires_grad_(), context.clone().requires_grad_()
    expected = reference.log_prob(u, context=context)
    expected_gradients = gradients(expected, [u, context], reference, weights)
    log_prob = fast_log_prob(model)
    log_q = log_prob(u, context)
    agree(log_q, expected, "log q", relative)
    found = gradients(log_q, [u, context], model.flow, weights)
    for name, gradient in expected_gradients.items():
        agree(found[name], gradient, name, relative)
    with torch.no_grad():
        agree(log_prob(u, context), expected, "without gradient", relative)
    flat = FlatParameters(model.parameters())
    (weights * log_prob(u, context)).sum().backward()
    for name, parameter in model.flow.named_parameters():
        assert parameter.grad is not None
        agree(parameter.grad, expected_gradients[name], f"flat {name}", relative)
    agree(flat.grad.norm(), torch.cat([g.reshape(-1) for g in list(found.values())[2:]]).norm())


# ---- against nflows -----------------------------------------------------------------------------


@pytest.mark.parametrize("features", [1, 2, 3, 6])
@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_density_and_gradients(estimator, features) -> None:
    # sd 3: one point in ten lies beyond the splines' interval.
    u = 3 * torch.randn(70, features, dtype=torch.float64)
    compare(build(features, estimator=estimator), u, torch.randn(70, 4, dtype=torch.float64))


@given(
    estimator=st.sampled_from(["nsf", "maf"]),
    features=st.integers(1, 5),
    context=st.integers(1, 6),
    transforms=st.integers(1, 4),
    hidden=st.integers(1, 9),
    blocks=st.integers(1, 3),
    bins=st.integers(2, 12),
    tail_bound=st.floats(0.6, 40),
    rows=st.integers(1, 9),
    spread=st.sampled_from([0.0, 0.2, 0.6]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=25)
def test_all_sizes(
    estimator, features, context, transforms, hidden, blocks, bins, tail_bound, rows, spread, seed
) -> None:
    torch.manual_seed(seed)
    model = build(
        features,
        (context,),
        spread,
        estimator=estimator,
        transforms=transforms,
        hidden_features=hidden,
        blocks=blocks,
        bins=bins,
        tail_bound=tail_bound,
    )
    u = 0.5 * tail_bound * torch.randn(rows, features, dtype=torch.float64)
    compare(model, u, torch.randn(rows, context, dtype=torch.float64), 1e-7)


@pytest.mark.parametrize("bins", [2, 6])
@pytest.mark.parametrize("features", [1, 2])
def test_ends_of_the_interval_and_of_bins(features, bins) -> None:
    """At a start without the affine layer's part, so that u itself meets the first spline."""
    model = build(features, bins=bins, transforms=1, tail_bound=3.0)
    affine = model.flow._transform._transforms[0]
    with torch.no_grad():
        for layer in (affine.linear, affine.network.final_layer):
            layer.weight.zero_()
            layer.bias.zero_()
        # Equal bins: their ends are where they are expected, to rounding.
        final = model.flow._transform._transforms[1].transform_net.final_layer
        final.weight.zero_()
        final.bias.view(-1, 3 * bins - 1)[:, : 2 * bins] = 0.7
    ends = torch.linspace(-3.0, 3.0, bins + 1, dtype=torch.float64)
    nudge = torch.tensor([-1e-6, 0.0, 1e-6], dtype=torch.float64)
    places = torch.cat([(ends[:, None] + nudge).reshape(-1), torch.tensor([-1e6, 1e6, -3.0, 3.0])])
    u = places.double()[:, None].repeat(1, features)
    # The density and its gradients are continuous at a bin's end but for second derivatives, which
    # the gradient of log q by u and by the parameters has: there, a point within rounding of an end
    # may be given to either bin. Off the inner ends all must agree.
    inner = (u[:, :1] - ends[1:-1]).abs().min(1).values < 1e-9
    context = torch.randn(len(u), 4, dtype=torch.float64)
    compare(model, u[~inner], context[~inner])
    agree(model.log_prob(u, context), as_shipped(model).log_prob(u, context=context), "log q")
    assert inner.sum() == bins - 1


@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_after_training_steps(estimator) -> None:
    model = build(3, spread=0.0, estimator=estimator)
    u, x = torch.randn(300, 3).double(), torch.randn(300, 4).double()
    u[:, 0] += x[:, 0] ** 2
    model.initialize(u, x)
    flat = FlatParameters(model.parameters())
    optimizer = torch.optim.Adam([flat.values], lr=5e-3)
    first = last = float(-model(u, x).detach().mean())
    for _ in range(40):
        loss = -model(u, x).mean()
        flat.zero_grad()
        loss.backward()
        optimizer.step()
        last = float(loss.detach())
    assert last < first - 0.1
    compare(copy.deepcopy(model), u[:80], x[:80])


@pytest.mark.parametrize(
    ("embedding", "x_shape"),
    [
        ("none", ()),
        ("none", (2, 3)),
        ("fully_connected", (5,)),
        ("permutation_invariant", (4, 2)),
        ("convolutional_1d", (9,)),
        ("convolutional_2d", (6, 5)),
    ],
)
@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_embeddings_get_their_gradient(estimator, embedding, x_shape) -> None:
    model = build(
        2, x_shape, 0.1, estimator=estimator, embedding=embedding, embedding_hidden=8,
        embedding_features=3,
    )  # fmt: skip
    u, x = torch.randn(7, 2).double(), torch.randn(7, *x_shape).double()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(
        model.flow.log_prob(u, context=model.embedding(x)).sum(), parameters
    )
    FlatParameters(parameters)
    model(u, x).sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        agree(parameter.grad, gradient)


@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_float32(estimator) -> None:
    wide = build(3, estimator=estimator)
    model = copy.deepcopy(wide).float()
    u, x = torch.randn(500, 3), torch.randn(500, 4)
    log_q = model(u, x)
    assert log_q.dtype == torch.float32
    # Against float64 the fast form may be wrong by what nflows' own is, some 1e-5, not much more.
    exact = wide(u.double(), x.double()).detach()
    theirs = (model.flow.log_prob(u, context=x).detach() - exact).abs().max()
    assert float((log_q.detach() - exact).abs().max()) < 4 * float(theirs) + 1e-5
    log_q.sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in model.parameters())


def test_many_rows_without_gradient() -> None:
    model = build(2)
    u, context = torch.randn(9001, 2).double(), torch.randn(9001, 4).double()
    with torch.no_grad():
        agree(model.log_prob(u, context), model.flow.log_prob(u, context=context))
        # One context for all rows, and other sizes in turn.
        one = context[:1].expand(5, -1)
        agree(model.log_prob(u[:5], one), model.flow.log_prob(u[:5], context=one))
        assert model.log_prob(u[:0], context[:0]).shape == (0,)
        for rows in range(1, 9):
            model.log_prob(u[:rows], context[:rows])
        assert len(model._fast._program._free) <= 4  # memory is not kept for all of these
    with pytest.raises(ValueError, match="u has 3 rows and the context 2"):
        model.log_prob(u[:3], context[:2])


# ---- dropout ------------------------------------------------------------------------------------


class _Fixed(nn.Module):
    """Dropout with given factors (N, H)."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factors


def networks(flow: nn.Module) -> Iterator[nn.Module]:
    for layer in flow._transform._transforms[1:]:
        if isinstance(layer, MaskedAffineAutoregressiveTransform):
            yield layer.autoregressive_net
        elif isinstance(layer, PiecewiseRationalQuadraticCouplingTransform):
            yield layer.transform_net


@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_dropout_is_that_of_nflows_for_the_same_masks(estimator, monkeypatch) -> None:
    rate, rows = 0.3, 40
    model = build(3, estimator=estimator, dropout=rate).train()
    hidden, blocks = SMALL["hidden_features"], SMALL["blocks"]
    shape = (SMALL["transforms"], blocks, hidden, rows)
    factors = (torch.rand(shape, dtype=torch.float64) >= rate) / (1 - rate)
    # The fast form draws all masks at once: by network and block, or by block and network.
    drawn = factors if estimator == "nsf" else factors.transpose(0, 1)
    module = {"nsf": "coupling", "maf": "autoregressive"}[estimator]
    monkeypatch.setattr(
        f"sbi_dist.estimation.fast.{module}.draw_masks",
        lambda masks, dropout: masks.copy_(drawn.reshape(masks.shape)),
    )
    reference = as_shipped(model)
    for number, network in enumerate(networks(reference)):
        for block in range(blocks):
            network.blocks[block].dropout = _Fixed(factors[number, block].T)
    u, context = torch.randn(rows, 3).double(), torch.randn(rows, 4).double()
    u, context = u.requires_grad_(), context.requires_grad_()
    weights = torch.randn(rows, dtype=torch.float64)
    expected = reference.log_prob(u, context=context)
    log_q = model.log_prob(u, context)
    agree(log_q, expected)
    theirs = gradients(expected, [u, context], reference, weights)
    for name, gradient in gradients(log_q, [u, context], model.flow, weights).items():
        agree(gradient, theirs[name], name)


@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_dropout_is_of_training_alone_and_random(estimator) -> None:
    model = build(2, estimator=estimator, dropout=0.4)
    u, x = torch.randn(2000, 2).double(), torch.randn(2000, 4).double()
    agree(model(u, x), model.flow.log_prob(u, context=x))
    model.train()
    first, second = model(u, x).detach(), model(u, x).detach()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    once = model(u, x).detach()
    torch.manual_seed(0)
    assert torch.equal(once, model(u, x).detach())
    # Means over 2,000 rows, which have masks of their own, in the fast form and in nflows': they
    # differ by the standard errors of two such means, of which four are allowed.
    theirs = model.flow.log_prob(u, context=x).detach()
    error = float((theirs.var() + first.var()).sqrt()) / 2000**0.5
    assert abs(float(theirs.mean() - first.mean())) < 4 * error


# ---- use in training ----------------------------------------------------------------------------


def test_graphs_do_not_share_memory() -> None:
    """Two batches before either backward pass; each gradient is its own, also a second time."""
    model = build(2)
    u, x = torch.randn(2, 30, 2).double(), torch.randn(2, 30, 4).double()
    parameters = list(model.flow.parameters())
    expected = [
        torch.autograd.grad(model.flow.log_prob(u[k], context=x[k]).sum(), parameters)
        for k in (0, 1)
    ]
    sums = [model(u[k], x[k]).sum() for k in (0, 1)]
    for k in (1, 0):
        first = torch.autograd.grad(sums[k], parameters, retain_graph=True)
        again = torch.autograd.grad(sums[k], parameters)
        for ours, repeated, theirs in zip(first, again, expected[k], strict=True):
            agree(ours, theirs)
            assert torch.equal(ours, repeated)
        with pytest.raises(RuntimeError, match="a second time"):
            torch.autograd.grad(sums[k], parameters)
    kept = model(u[0], x[0])
    before = kept.detach().clone()
    model(u[1], x[1]).sum().backward()
    assert torch.equal(kept, before)


def test_only_the_gradients_that_are_wanted() -> None:
    model = build(2)
    u, x = torch.randn(9, 2).double().requires_grad_(), torch.randn(9, 4).double()
    expected = torch.autograd.grad(model.flow.log_prob(u, context=x).sum(), u)[0]
    model.requires_grad_(False)
    agree(torch.autograd.grad(model.log_prob(u, x).sum(), u)[0], expected)
    assert not model.log_prob(u.detach(), x).requires_grad


@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_inference_mode_leaves_nothing_behind(estimator) -> None:
    model = build(2, estimator=estimator)
    u, x = torch.randn(9, 2).double(), torch.randn(9, 4).double()
    with torch.inference_mode():
        inside = model(u, x)
    with torch.no_grad():
        assert torch.equal(model(u, x), inside)
    model(u, x).sum().backward()
    with torch.inference_mode():
        assert torch.equal(model(u, x), inside)


class _Calls(TorchDispatchMode):
    """What is computed: operations and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        self.calls.append((str(func), [tuple(tensor.shape) for tensor in tensors]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_the_course_depends_on_shapes_alone(estimator) -> None:
    """So that a CUDA graph can hold it: the same operations for any data, none that waits."""
    model = build(3, estimator=estimator, dropout=0.1).train()
    flat = FlatParameters(model.parameters())
    model(torch.zeros(20, 3).double(), torch.zeros(20, 4).double()).sum().backward()  # sets apart
    courses = []
    for scale in (0.0, 1.0, 100.0):
        u, x = scale * torch.randn(20, 3).double(), torch.randn(20, 4).double()
        with _Calls() as recorded:
            flat.zero_grad()
            model(u, x).sum().backward()
            flat.clip_norm(1.0)
        courses.append(recorded.calls)
    assert courses[1] == courses[0] == courses[2]
    waiting = (
        "local_scalar",
        "nonzero",
        "masked_select",
        "item",
        "index.Tensor",
        "unique",
        "equal",
    )
    names = [name for name, _ in courses[0]]
    assert not [name for name in names if any(word in name for word in waiting)]
    # Few operations are the point of it; nflows' own take some 3,000 here.
    with _Calls() as theirs:
        as_shipped(model).log_prob(u, context=x).sum().backward()
    assert len(names) < len(theirs.calls) / 2


# ---- parameters in one vector -------------------------------------------------------------------


def test_flat_parameters_share_their_values() -> None:
    model = build(2, embedding="fully_connected")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    flat = FlatParameters([*parameters, parameters[0]])
    assert flat.values.shape == (sum(each.numel() for each in parameters),)
    assert flat.values.grad is flat.grad and not flat.grad.any()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        flat.values.add_(1.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] + 1)
    model.load_state_dict(before)
    assert set(flat.parameters) == set(parameters)
    for parameter, start in zip(flat.parameters, flat.starts, strict=True):
        place = slice(start, start + parameter.numel())
        assert torch.equal(flat.values[place], parameter.reshape(-1))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    u, x = torch.randn(5, 2).double(), torch.randn(5, 4).double()
    agree(model(u, x), model.flow.log_prob(u, context=model.embedding(x)))


def test_flat_gradients() -> None:
    model = build(2, embedding="fully_connected")
    flat = FlatParameters(model.parameters())
    u, x = torch.randn(5, 2).double(), torch.randn(5, 4).double()
    model(u, x).sum().backward()
    once = flat.grad.clone()
    assert torch.equal(once, torch.cat([each.grad.reshape(-1) for each in flat.parameters]))
    assert float((once != 0).double().mean()) > 0.3  # many ReLUs are off, and weights masked
    model(u, x).sum().backward()
    agree(flat.grad, 2 * once)
    assert flat.values.grad is flat.grad
    norm = flat.clip_norm(0.1)
    agree(norm, 2 * once.norm())
    agree(flat.grad.norm(), torch.tensor(0.1).double(), relative=1e-4)
    agree(flat.clip_norm(1e9), flat.grad.norm())
    flat.zero_grad()
    assert not any(each.grad.any() for each in model.parameters())


@pytest.mark.parametrize("estimator", ["nsf", "maf"])
def test_a_step_on_the_vector_is_one_on_the_parameters(estimator) -> None:
    apart = build(2, embedding="fully_connected", estimator=estimator)
    together = copy.deepcopy(apart)
    flat = FlatParameters(together.parameters())
    u, x = torch.randn(50, 2).double(), torch.randn(50, 4).double()
    steps = {"lr": 1e-2, "weight_decay": 1e-2}
    one, many = (
        torch.optim.AdamW([flat.values], **steps),
        torch.optim.AdamW(apart.parameters(), **steps),
    )
    for _ in range(3):
        many.zero_grad()
        (-apart(u, x).mean()).backward()
        nn.utils.clip_grad_norm_(apart.parameters(), 0.5)
        many.step()
        flat.zero_grad()
        (-together(u, x).mean()).backward()
        flat.clip_norm(0.5)
        one.step()
    for ours, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        agree(ours, theirs)


def test_copies_and_moves_part_from_the_vector() -> None:
    model = build(2)
    u, x = torch.randn(5, 2).double(), torch.randn(5, 4).double()
    flat = FlatParameters(model.parameters())
    expected = model(u, x).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for weight in twin.parameters():
                weight.mul_(1.1)
        assert not torch.equal(twin(u, x), expected)
        agree(twin(u, x), twin.flow.log_prob(u, context=x))
        twin(u, x).sum().backward()
        assert all(weight.grad is not None for weight in twin.parameters())
        assert torch.equal(model(u, x), expected) and not flat.grad.any()
    model.float()
    with torch.no_grad():
        flat.values.zero_()
    agree(model(u.float(), x.float()).double(), expected, relative=1e-4)
    again = FlatParameters(model.parameters())
    with torch.no_grad():
        again.values.mul_(0.5)
    agree(model(u.float(), x.float()), model.flow.log_prob(u.float(), context=x.float()), "", 1e-4)
