"""How a scientist's simulator is called: its form, found by running it, and its rows.

A simulator is a Python callable on one parameter vector (D,) or on a batch (N, D), numpy or
torch, with or without a keyword ``rng`` (a ``numpy.random.Generator``). Here is the detection of
which of these it is and the call of one batch or one row with reproducible random numbers. Where
the rows run (Ray actors, child processes) is in ``simulation/``.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sbi_dist.errors import InputError

__all__ = ["SimulatorForm", "call", "detect_form", "row_streams", "seed_stream"]


@dataclasses.dataclass(frozen=True)
class SimulatorForm:
    """What a simulator takes and gives back.

    Attributes:
        batched: takes (N, D) and gives (N, *x_shape); else takes (D,) and gives x_shape.
        library: ``numpy`` (gets float64 arrays) or ``torch`` (gets float32 tensors).
        takes_rng: has a parameter ``rng``.
        x_shape: shape of one simulation's data.
        note: why this form was chosen, where it was not the only one possible.
    """

    batched: bool
    library: str
    takes_rng: bool
    x_shape: tuple[int, ...]
    note: str = ""

    def __str__(self) -> str:
        rows = "a batch of parameter vectors" if self.batched else "one parameter vector at a time"
        rng = ", with rng" if self.takes_rng else ""
        shape = " x ".join(map(str, self.x_shape)) or "scalar"
        text = f"takes {rows} as {self.library}{rng}, gives x of shape {shape}"
        return f"{text} ({self.note})" if self.note else text


def seed_stream(sequence: np.random.SeedSequence) -> np.random.Generator:
    """A generator from ``sequence``; seeds python's, numpy's and torch's global ones as well."""
    state = sequence.generate_state(4, np.uint64)
    _seed_globals(state)
    return np.random.Generator(np.random.Philox(key=state[2:]))


def row_streams(sequence: np.random.SeedSequence, rows: int) -> np.ndarray:
    """Keys of one random stream a row, uint64 of shape (rows, 2): row i's depends on i only."""
    return sequence.generate_state(2 * rows, np.uint64).reshape(rows, 2)


def _seed_globals(state: np.ndarray) -> None:
    random.seed(int(state[0]))
    np.random.seed(int(state[0] & np.uint64(0xFFFFFFFF)))
    torch.default_generator.manual_seed(int(state[1] >> np.uint64(1)))


def call(
    simulator: Callable[..., Any], form: SimulatorForm, theta: np.ndarray, stream: Any
) -> np.ndarray:
    """Simulate theta, float32 of shape (N, D) for a batched form, (D,) for a form of one row.

    ``stream`` is a ``SeedSequence`` or a row's key of :func:`row_streams`. Returns float32 of
    shape (N, *x_shape) or x_shape; an x of another shape or type is a ``ValueError``, and what the
    simulator raises passes through.
    """
    if isinstance(stream, np.random.SeedSequence):
        rng = seed_stream(stream)
    else:
        if not form.takes_rng:
            _seed_globals(stream)
        rng = np.random.Generator(np.random.Philox(key=stream))
    result = _invoke(simulator, form.library, form.takes_rng, theta, rng)
    expected = (len(theta), *form.x_shape) if form.batched else form.x_shape
    if result.shape != expected:
        raise ValueError(f"x has shape {result.shape}, expected {expected}")
    return result


def _invoke(
    simulator: Callable[..., Any], library: str, takes_rng: bool, theta: np.ndarray, rng: Any
) -> np.ndarray:
    argument: Any = (
        theta.astype(np.float64) if library == "numpy" else torch.from_numpy(theta.copy())
    )
    with torch.no_grad():
        result = simulator(argument, rng=rng) if takes_rng else simulator(argument)
    return _as_float32(result)


def _as_float32(result: Any) -> np.ndarray:
    if isinstance(result, torch.Tensor):
        result = result.detach().cpu().numpy()
    if result is None:
        raise ValueError("the simulator returned None, expected an array of numbers")
    try:
        array = np.asarray(result)
    except ValueError as error:
        raise ValueError(f"the simulator returned no array of numbers ({error})") from error
    if array.dtype.kind not in "fiub":
        raise ValueError(
            f"x has dtype {array.dtype} ({type(result).__name__}), expected real numbers"
        )
    with np.errstate(over="ignore"):
        return np.asarray(array, dtype=np.float32, order="C")


def takes_rng(simulator: Callable[..., Any]) -> bool:
    """Whether the simulator has a parameter named ``rng``."""
    try:
        return "rng" in inspect.signature(simulator).parameters
    except (TypeError, ValueError):
        return False


def detect_form(
    simulator: Callable[..., Any], draws: np.ndarray, batched: bool | None = None
) -> SimulatorForm:
    """Find the simulator's form by running it on a few draws of the prior.

    Args:
        simulator: the callable.
        draws: parameter vectors to try, float32 of shape (at least 12, D).
        batched: force the form of a batch (True) or of one row (False) instead of finding it.

    Raises:
        InputError: no form works; says what came back and what was expected.
    """
    if not callable(simulator):
        raise InputError(
            f"problem.simulator is {type(simulator).__name__}; it must be callable as "
            "simulator(theta)"
        )
    size = draws.shape[1]
    rows = 3 if size != 3 else 4
    rng = takes_rng(simulator)
    failures: list[str] = []
    for library in ("numpy", "torch"):
        trial = _Trial(simulator, library, rng)
        single = None if batched is True else trial.run(draws[0])
        batch = None if batched is False else trial.run(draws[:rows])
        batch_shape = None
        if isinstance(batch, np.ndarray):
            if batch.shape[:1] == (rows,):
                batch_shape = batch.shape[1:]
            else:
                batch = (
                    f"given theta of shape ({rows}, {size}) it returned x of shape {batch.shape}, "
                    f"whose first length is not {rows}"
                )
        if batch_shape is not None:
            if batched:
                return SimulatorForm(True, library, rng, batch_shape)
            # A true batch simulator keeps its rows apart.
            apart, note = trial.keeps_rows_apart(draws, batch_shape, single)
            if apart or not isinstance(single, np.ndarray):
                return SimulatorForm(True, library, rng, batch_shape, note)
            return SimulatorForm(False, library, rng, single.shape, note)
        if isinstance(single, np.ndarray):
            return SimulatorForm(False, library, rng, single.shape)
        for theta_shape, outcome in (((size,), single), ((rows, size), batch)):
            if outcome is not None:
                failures.append(f"{library} theta of shape {theta_shape}: {outcome}")
    raise InputError(
        f"problem.simulator can't be run on a draw of the prior, which has {size} parameter"
        f"{'s' if size != 1 else ''}: {'; '.join(dict.fromkeys(failures))}. Expected an array of "
        "real numbers, the same shape for every theta (check that the prior and the simulator "
        "have the same number of parameters)"
    )


class _Trial:
    def __init__(self, simulator: Callable[..., Any], library: str, rng: bool) -> None:
        self.simulator, self.library, self.rng = simulator, library, rng

    def run(self, theta: np.ndarray, seed: int = 1) -> np.ndarray | str:
        stream = seed_stream(np.random.SeedSequence(seed))
        try:
            result = _invoke(self.simulator, self.library, self.rng, np.array(theta), stream)
        except (Exception, SystemExit) as error:  # whatever a stranger's code raises
            first_line = (str(error).splitlines() or [""])[0]
            return f"{type(error).__name__}: {first_line}"
        return result if result.size else f"it returned x of shape {result.shape}, with no number"

    def keeps_rows_apart(
        self, draws: np.ndarray, x_shape: tuple[int, ...], single: np.ndarray | str | None
    ) -> tuple[bool, str]:
        """Whether a batch gives what its rows would, and a note on what is not plain about it.

        ``single`` is what the first draw gave by itself.
        """
        rows = 5 if draws.shape[1] != 5 else 6
        with_others = np.concatenate([draws[:1], draws[rows : 2 * rows - 1]])
        first_rows = []
        for batch in (draws[:rows], with_others, draws[:1]):
            result = self.run(batch)
            if not isinstance(result, np.ndarray) or result.shape != (len(batch), *x_shape):
                return False, "a batch of another size came back with another shape"
            first_rows.append(result[0])
        first, second, alone = first_rows
        if not np.array_equal(first, second, equal_nan=True):
            return False, (
                "in a batch, a row's x changed with the other rows; set batched=True if it may"
            )
        # A function of one row that takes a batch for its row, such as theta / theta[0].
        if isinstance(single, np.ndarray) and not (
            single.shape != x_shape
            or np.allclose(single, alone, rtol=1e-3, atol=1e-6, equal_nan=True)
        ):
            return False, (
                "a batch of one gave another x than its row; set batched=True if that may be"
            )
        if self._rows_share_noise(draws[:1], x_shape):
            return (
                False,
                "in a batch, all rows get the same noise; set batched=True if so meant",
            )
        if not np.array_equal(first, alone, equal_nan=True):
            return True, "a row's random numbers change with the size of its batch"
        return True, ""

    def _rows_share_noise(self, theta: np.ndarray, x_shape: tuple[int, ...]) -> bool:
        """Whether noise drawn for one row is added to every row, as in theta + rng.normal(2)."""
        rows = 6
        same = np.repeat(theta, rows, axis=0)
        first, second = self.run(same, seed=1), self.run(same, seed=2)
        for result in (first, second):
            if not isinstance(result, np.ndarray) or result.shape != (rows, *x_shape):
                return False
        assert isinstance(first, np.ndarray) and isinstance(second, np.ndarray)
        first, second = first.reshape(rows, -1), second.reshape(rows, -1)
        random = first[0] != second[0]
        shared = random & (first == first[0]).all(axis=0)
        # Rows may have equal counts by chance, but not equal real numbers.
        real = random & (first != np.round(first)).any(axis=0)
        return bool((shared & real).any() or (random.any() and (shared == random).all()))
