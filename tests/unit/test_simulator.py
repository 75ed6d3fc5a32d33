"""How a scientist's simulator is called: the detection of its form, and reproducible calls."""

from __future__ import annotations

import functools
import math
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch

from sbi_dist.errors import InputError
from sbi_dist.simulator import (
    SimulatorForm,
    call_batch,
    call_rows,
    detect_form,
    row_streams,
    seed_stream,
)

DRAWS = {
    size: np.random.default_rng(size).normal(1.0, 1.0, (12, size)).astype(np.float32)
    for size in range(1, 7)
}


def detect(simulator: Any, size: int = 2, batched: bool | None = None) -> SimulatorForm:
    return detect_form(simulator, DRAWS[size], batched)


def rows_of(simulator: Any, form: SimulatorForm, theta: np.ndarray, seed: int = 0) -> list[Any]:
    """What each row gave: x, or the exception."""
    outcomes: list[Any] = []

    def keep(row: int, outcome: Any, seconds: float) -> bool:
        assert row == len(outcomes) and seconds >= 0
        outcomes.append(outcome)
        return True

    keys = row_streams(np.random.SeedSequence(seed), len(theta))
    call_rows(simulator, form, theta, keys, keep)
    return outcomes


def one_row(simulator: Any, form: SimulatorForm, theta: np.ndarray) -> np.ndarray:
    (outcome,) = rows_of(simulator, form, theta[None])
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


# ---- simulators of every form: x = (sum of theta, its first value, noise) ------------------------


def numpy_row(theta):
    return np.array([theta.sum(), float(theta[0]), np.random.standard_normal()])


def numpy_row_rng(theta, rng):
    return np.array([theta.sum(), float(theta[0]), rng.standard_normal()])


def numpy_batch(theta):
    return np.stack([theta.sum(1), theta[:, 0], np.random.standard_normal(len(theta))], axis=1)


def numpy_batch_rng(theta, rng):
    return np.stack([theta.sum(1), theta[:, 0], rng.standard_normal(len(theta))], axis=1)


def torch_row(theta):
    return torch.stack([theta.sum(), theta[0].clone(), torch.randn(())])


def torch_row_rng(theta, *, rng):
    return torch.stack([theta.sum(), theta[0].clone(), torch.tensor(rng.random()).to(theta)])


def torch_batch(theta):
    return torch.stack([theta.sum(dim=1), theta[:, 0], torch.randn(len(theta))], dim=1)


def torch_batch_rng(theta, rng):
    noise = torch.from_numpy(rng.standard_normal(len(theta))).to(theta)
    return torch.stack([theta.sum(dim=1), theta[:, 0], noise], dim=1)


FORMS = [
    (numpy_row, False, "numpy", False),
    (numpy_row_rng, False, "numpy", True),
    (numpy_batch, True, "numpy", False),
    (numpy_batch_rng, True, "numpy", True),
    (torch_row, False, "torch", False),
    (torch_row_rng, False, "torch", True),
    (torch_batch, True, "torch", False),
    (torch_batch_rng, True, "torch", True),
]
each_form = pytest.mark.parametrize(
    ("simulator", "batched", "library", "rng"), FORMS, ids=[form[0].__name__ for form in FORMS]
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch functions given numpy arrays
@each_form
@pytest.mark.parametrize("size", range(1, 7))
def test_form(simulator, batched, library, rng, size) -> None:
    form = detect(simulator, size)
    assert (form.batched, form.library, form.takes_rng) == (batched, library, rng)
    assert form.x_shape == (3,)
    assert ("batch of" in str(form)) == batched and "shape 3" in str(form) and library in str(form)
    assert detect(simulator, size, batched=batched) == SimulatorForm(batched, library, rng, (3,))


@each_form
def test_a_call_is_a_function_of_theta_and_stream(simulator, batched, library, rng) -> None:
    form = SimulatorForm(batched, library, rng, (3,))
    theta = DRAWS[2][:4]
    before = theta.copy()

    def run(seed: int, by_row: bool) -> np.ndarray:
        # Whatever was drawn before must not matter.
        random.seed(None), np.random.seed(None), torch.seed()
        if by_row:  # a batch simulator gets batches of one
            x = np.stack(rows_of(simulator, form, theta, seed + 100))
        else:
            x = call_batch(simulator, form, theta, np.random.SeedSequence(seed))
        assert x.dtype == np.float32 and x.flags.c_contiguous and x.shape == (4, 3)
        return x

    ways = (True, False) if batched else (True,)
    kinds = [(seed, by_row) for seed in (5, 6) for by_row in ways]
    results = [run(*kind) for kind in kinds]
    for kind, first in zip(kinds, results, strict=True):
        np.testing.assert_array_equal(run(*kind), first)
    noise = np.stack(results)[..., 2]
    assert len(np.unique(noise)) == noise.size  # other streams, other noise
    np.testing.assert_array_equal(theta, before)


def test_python_random_is_seeded_too() -> None:
    form = SimulatorForm(False, "numpy", False, ())
    results = [rows_of(lambda theta: random.random(), form, DRAWS[1]) for _ in range(2)]
    assert results[0] == results[1] and len(set(map(float, results[0]))) == 12
    form = SimulatorForm(True, "numpy", False, ())
    sequence = np.random.SeedSequence(5)

    def batch(theta: np.ndarray) -> list[float]:
        return [random.random() for _ in theta]

    first, again = (call_batch(batch, form, DRAWS[1], sequence) for _ in range(2))
    assert first.tolist() == again.tolist()
    assert seed_stream(sequence).random() == seed_stream(sequence).random()


def test_row_streams_do_not_depend_on_their_number() -> None:
    many = row_streams(np.random.SeedSequence(3), 100)
    np.testing.assert_array_equal(row_streams(np.random.SeedSequence(3), 7), many[:7])
    assert len(np.unique(many, axis=0)) == 100


# ---- which rows of x belong to which rows of theta ----------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda theta: theta - theta.mean(),
        lambda theta: theta / theta[0],
        lambda theta: theta / len(theta),
        lambda theta: theta[::-1],
        lambda theta: theta - theta.max(axis=0),
        lambda theta, rng: theta + theta[0] * rng.standard_normal(theta.shape),
    ],
    ids="mean first length reversed max scale".split(),
)
def test_functions_of_one_row_that_run_on_batches(function) -> None:
    form = detect(function, 4)
    assert not form.batched and form.x_shape == (4,)
    assert "set batched=True" in form.note and form.note in str(form)
    assert detect(function, 4, batched=True).batched


@pytest.mark.parametrize(
    "function",
    [
        lambda theta: theta**2,
        lambda theta: np.sort(theta),
        lambda theta: theta @ np.ones((4, 4)),
        lambda theta, rng: rng.normal(theta),
        # Draws as many numbers as its rows ask for, which moves the stream of the rows after.
        lambda theta, rng: rng.poisson(np.exp(theta)),
    ],
    ids="square sort matrix normal poisson".split(),
)
def test_functions_that_take_both_are_run_on_batches(function) -> None:
    form = detect(function, 4)
    assert form.batched and form.x_shape == (4,) and form.note == ""


def test_batch_that_takes_no_row_and_mixes_rows_is_noted() -> None:
    form = detect(lambda theta: theta[:, :1] - theta[:, :1].mean())
    assert form.batched and "changed with the other rows" in form.note


def test_noise_that_depends_on_the_size_of_the_batch_is_noted() -> None:
    form = detect(lambda theta, rng: theta + rng.standard_normal(theta.shape[::-1]).T)
    assert form.batched and "change with the size of its batch" in form.note


def test_a_fixed_length_is_not_taken_for_a_batch() -> None:
    for length in range(2, 9):  # also those of the batches that are tried
        form = detect(lambda theta, length=length: theta[0] * np.ones(length), 1)
        assert not form.batched and form.x_shape == (length,)


# ---- shapes of x --------------------------------------------------------------------------------


@pytest.mark.parametrize("scalar", [float, np.float64, torch.tensor, lambda value: int(value) + 1])
def test_scalar_x(scalar) -> None:
    form = detect(lambda theta: scalar(theta.sum()))
    assert not form.batched and form.x_shape == () and "scalar" in str(form)
    x = one_row(lambda theta: scalar(theta.sum()), form, DRAWS[2][0])
    assert x.shape == () and x.dtype == np.float32
    batched = detect(lambda theta: theta[:, 0])
    assert batched.batched and batched.x_shape == ()


def test_images_lists_and_booleans() -> None:
    image = detect(lambda theta: theta[0] * np.ones((3, 5, 4)))
    assert not image.batched and image.x_shape == (3, 5, 4) and "3 x 5 x 4" in str(image)
    batch = detect(lambda theta: theta[:, :1, None] * np.ones((5, 4)))
    assert batch.batched and batch.x_shape == (5, 4)
    assert detect(lambda theta: [float(theta[0]), 1, True]).x_shape == (3,)
    assert detect(lambda theta: [[theta[0] > 1]] * 2).x_shape == (2, 1)


def test_what_float32_can_not_hold_is_infinite() -> None:
    form = SimulatorForm(False, "numpy", False, (2,))
    for x in (np.array([1e300, 1.0]), [1e300, 1], torch.tensor([1e300, 1.0], dtype=torch.double)):
        # Also where a scientist made overflows raise.
        with np.errstate(all="raise"):
            found = one_row(lambda theta, x=x: x, form, DRAWS[1][0])
        assert found.tolist() == [math.inf, 1.0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda theta: None, "the simulator returned None"),
        (lambda theta: "x = 3", r"x has dtype <U5 \(str\), expected real numbers"),
        (lambda theta: theta + 1j, "x has dtype complex128"),
        (lambda theta: {"x": 3}, r"x has dtype object \(dict\)"),
        (lambda theta: [1.0, [2.0, 3.0]], "returned no array of numbers"),
        (lambda theta: [], r"x of shape \(0,\), with no number"),
        (lambda theta: theta @ np.ones(5), r"theta of shape \(2,\): .*5 is different from 2"),
        (lambda theta, rng: theta[7], r"theta of shape \(3, 2\): IndexError: index 7"),
        (lambda a, b: a, "missing 1 required positional argument: 'b'"),
        (lambda theta: sys.exit("no data"), "SystemExit: no data"),
        (lambda theta: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_simulators_that_can_not_be_used(function, message) -> None:
    with pytest.raises(InputError, match=message) as caught:
        detect(function)
    assert "which has 2 parameters" in str(caught.value)
    assert "check that the prior and the simulator have the same number" in str(caught.value)


def test_forced_form_that_does_not_run() -> None:
    with pytest.raises(InputError, match=r"of shape \(3, 2\).* whose first length is not 3"):
        detect(lambda theta: np.ones(7), batched=True)
    with pytest.raises(InputError, match=r"theta of shape \(2,\): .*Error"):
        detect(lambda theta: theta[:, 0], batched=False)
    with pytest.raises(InputError, match=r"problem\.simulator is int; it must be callable"):
        detect(3)


# ---- calls --------------------------------------------------------------------------------------


def test_an_x_of_another_shape_is_an_error_of_the_call() -> None:
    row, batch = (SimulatorForm(batched, "numpy", False, (2,)) for batched in (False, True))
    with pytest.raises(ValueError, match=r"x has shape \(3,\), expected \(2,\)"):
        one_row(lambda theta: np.ones(3), row, DRAWS[2][0])
    with pytest.raises(ValueError, match=r"x has shape \(2,\), expected \(1, 2\)"):
        one_row(lambda theta: np.ones(2), batch, DRAWS[2][0])
    with pytest.raises(ValueError, match=r"x has shape \(2,\), expected \(4, 2\)"):
        call_batch(lambda theta: np.ones(2), batch, DRAWS[2][:4], np.random.SeedSequence(0))


def test_a_simulator_may_overwrite_its_theta() -> None:
    def rude(theta):
        theta *= 0
        return theta + 1

    for library in ("numpy", "torch"):
        theta = DRAWS[2].copy()
        rows_of(rude, SimulatorForm(False, library, False, (2,)), theta)
        form = SimulatorForm(True, library, False, (2,))
        call_batch(rude, form, theta, np.random.SeedSequence(0))
        np.testing.assert_array_equal(theta, DRAWS[2])


def test_partial_and_callable_objects() -> None:
    class Scaled:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, theta, rng):
            return self.factor * theta[:, :1] + rng.standard_normal((len(theta), 3))

    assert detect(Scaled(2.0)) == SimulatorForm(True, "numpy", True, (3,))
    assert detect(functools.partial(numpy_row_rng)).takes_rng


def test_noise_of_one_row_is_not_shared_by_a_batch() -> None:
    """theta + noise of one row's shape runs on a batch too, where all rows would get one noise."""
    draws = np.random.default_rng(0).uniform(-1, 1, (12, 2)).astype(np.float32)

    def one_row(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return theta + rng.standard_normal(2)

    def batch(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return theta + rng.standard_normal(theta.shape)

    def counts(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.binomial(1, 0.5, theta.shape).astype(np.float64)

    form = detect_form(one_row, draws)
    assert not form.batched and "same noise" in form.note
    assert detect_form(batch, draws).batched
    assert detect_form(counts, draws).batched
    assert detect_form(one_row, draws, batched=True).batched
