"""The optimizer's step: exact, whatever it is split into, and safe against what is no number."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.optimize import Optimization
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.workers import Workers


def made(**changes: Any) -> tuple[ConditionalFlow, TrainOptions]:
    options = TrainOptions(
        **{"transforms": 2, "hidden_features": 8, "blocks": 1, "bins": 4, **changes}
    )
    torch.manual_seed(0)
    flow = ConditionalFlow(options, 2, (3,))
    return flow, options


def rows(count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(count, 2, generator=generator),
        torch.randn(count, 3, generator=generator),
    )


def started(**changes: Any) -> Optimization:
    flow, options = made(**changes)
    optimization = Optimization(flow, options, Workers(), 12)
    flow.train()
    return optimization


def test_steps_are_those_of_torch_on_separate_parameters() -> None:
    optimization = started(clip_norm=0.5)
    flow, options = made()
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3, weight_decay=options.weight_decay)
    u, x = rows()
    for rate in (1e-3, 3e-3, 2e-3):
        loss = -flow.flow.log_prob(u, context=flow.embedding(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), 0.5)
        assert norm > 0.5
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        before = float(optimization.loss)
        optimization.step(u, x, rate, 1.0)
        assert float(optimization.loss) - before == pytest.approx(float(loss.detach()), rel=1e-5)
    for ours, theirs in zip(optimization.flow.parameters(), flow.parameters(), strict=True):
        # Adam divides by the root of a mean of squares: where a gradient is nothing but rounding,
        # so is the step, of at most the sum of the rates.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("parts", [2, 3, 5, 12, 50])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(parts: int) -> None:
    whole, split = started(), started(accumulate=parts)
    for each in (whole, split):
        each.step(*rows(), 1e-3, 1.0)
    torch.testing.assert_close(split.weights, whole.weights, rtol=1e-4, atol=1e-5)
    assert float(split.loss) == pytest.approx(float(whole.loss), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_no_number_changes_nothing(bad: float) -> None:
    optimization, calm = started(), started()
    u, x = rows()
    poisoned = u.clone()
    poisoned[3, 0] = bad
    for each in (optimization, calm):
        each.step(u, x, 1e-3, 0.1)
    before = optimization.weights.clone()
    optimization.step(poisoned, x, 1e-3, 0.1)
    assert int(optimization.skipped) == 1
    # The average goes on towards weights that have not moved.
    assert torch.isfinite(optimization.weights).all()
    assert math.isfinite(float(optimization.loss))
    assert not torch.equal(before, optimization.weights)
    optimization.step(u, x, 1e-3, 1.0)
    calm.step(u, x, 1e-3, 1.0)
    torch.testing.assert_close(optimization.weights, calm.weights, rtol=0, atol=0)


def test_the_average_is_what_is_judged() -> None:
    optimization = started()
    first = optimization.weights.clone()
    optimization.step(*rows(), 1e-2, 0.25)
    stepped = torch.nn.utils.parameters_to_vector(optimization.flow.parameters()).detach()
    with optimization.judged():
        inside = torch.nn.utils.parameters_to_vector(optimization.flow.parameters()).detach()
    after = torch.nn.utils.parameters_to_vector(optimization.flow.parameters()).detach()
    assert torch.equal(after, stepped)
    assert sorted(inside.tolist()) == sorted(optimization.weights.tolist())
    expected = first + 0.25 * (optimization._flat.values.detach() - first)
    torch.testing.assert_close(optimization.weights, expected)


def test_a_state_continues_bit_for_bit() -> None:
    straight, broken = started(), started()
    for number in range(4):
        straight.step(*rows(), 1e-2, 0.1)
        if number == 1:
            sink = io.BytesIO()
            torch.save(straight.state(), sink)
            broken.load_state(torch.load(io.BytesIO(sink.getvalue()), weights_only=True))
    for _ in range(2):
        broken.step(*rows(), 1e-2, 0.1)
    assert torch.equal(broken.weights, straight.weights)
    assert torch.equal(broken.loss, straight.loss)
    other = started(hidden_features=9)
    with pytest.raises(ValueError, match="another architecture"):
        other.load_state(straight.state())


def test_going_back_forgets_the_steps_before() -> None:
    optimization, fresh = started(), started()
    start = optimization.weights.clone()
    for _ in range(3):
        optimization.step(*rows(), 1e-2, 0.5)
    optimization.go_back(start)
    optimization.step(*rows(), 1e-2, 0.5)
    fresh.step(*rows(), 1e-2, 0.5)
    assert torch.equal(optimization.weights, fresh.weights)


LARGE = """
import resource
import torch
from tests.unit.test_optimize import made
from sbi_dist.errors import StageError
from sbi_dist.estimation.optimize import Optimization
from sbi_dist.estimation.workers import Workers

torch.set_num_threads(1)
flow, options = made(hidden_features=64, transforms=3)
count = 400_000
optimization = Optimization(flow, options, Workers(), count)
u, x = torch.randn(count, 2), torch.randn(count, 3)
optimization.step(u[:100], x[:100], 1e-4, 1.0)
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 300_000_000, resource.RLIM_INFINITY))
try:
    optimization.step(u, x, 1e-4, 1.0)
except StageError as error:
    print(error)
"""


def test_too_little_memory_is_told_with_what_fits() -> None:
    result = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "out of memory with 400,000 simulations at once on cpu" in result.stdout
    assert "train.accumulate=" in result.stdout and "train.batch_size=" in result.stdout
    parts = int(result.stdout.partition("train.accumulate=")[2].partition(",")[0])
    # 64 features of float32 for each layer's rows alone are 100 MB at 400,000 rows.
    assert 2 <= parts <= 512
