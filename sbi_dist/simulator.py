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
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sbi_dist.errors import InputError

__all__ = [
    "MOST_IN_BLOCK",
    "RowStreams",
    "SimulatorForm",
    "call_batch",
    "call_rows",
    "detect_form",
    "row_streams",
    "seed_stream",
]

# Rows whose outcomes wait for the look at the global generators, which takes as long as ten.
MOST_IN_BLOCK = 256
_LONGEST_BLOCK_S = 0.01


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
    _seed_globals(state.tolist())
    return np.random.Generator(np.random.Philox(key=state[2:]))


def row_streams(sequence: np.random.SeedSequence, rows: int) -> np.ndarray:
    """Keys of one random stream a row, uint64 of shape (rows, 2): row i's depends on i only."""
    return sequence.generate_state(2 * rows, np.uint64).reshape(rows, 2)


def _numpy_state() -> Any:
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    inner = state["state"]
    return inner["key"].tobytes(), inner["pos"], state["has_gauss"]


# Python's, numpy's and torch's global generators: how each is seeded, and its state.
_GLOBALS: dict[str, tuple[Callable[[Sequence[int]], Any], Callable[[], Any]]] = {
    "random": (lambda state: random.seed(state[0]), random.getstate),
    "numpy": (lambda state: np.random.seed(state[0] & 0xFFFFFFFF), _numpy_state),
    "torch": (
        lambda state: torch.default_generator.manual_seed(state[1] >> 1),
        lambda: torch.default_generator.get_state().numpy().tobytes(),
    ),
}


def _seed_globals(state: Sequence[int]) -> None:
    for seed, _ in _GLOBALS.values():
        seed(state)


class RowStreams:
    """One generator that is set to the start of any row's stream.

    Making a generator for each row, and seeding the global ones, takes longer than many a
    simulation. So a global generator is seeded for each row only once the simulator is seen to use
    it; :meth:`unseen` tells what rows must be run again for that.
    """

    def __init__(self) -> None:
        self._unused = set(_GLOBALS)
        self._seeds: list[Callable[[Sequence[int]], Any]] = []
        self._bits = np.random.Philox(key=np.zeros(2, dtype=np.uint64))
        self._start: Any = self._bits.state
        self._rng = np.random.Generator(self._bits)

    def at(self, key: Sequence[int]) -> np.random.Generator:
        """The generator at the start of the stream of ``key``, two integers.

        The global generators that the simulator uses are seeded as well.
        """
        self._start["state"]["key"] = key
        self._bits.state = self._start
        for seed in self._seeds:
            seed(key)
        return self._rng

    def states(self, key: Sequence[int]) -> dict[str, Any]:
        """States of the global generators that the simulator was not seen to use.

        They are set by ``key`` first: a simulator that seeds a generator itself, and not always,
        must not find and leave it in the same state.
        """
        for name in self._unused:
            _GLOBALS[name][0](key)
        return {name: _GLOBALS[name][1]() for name in self._unused}

    def unseen(self, before: dict[str, Any]) -> bool:
        """Whether the simulator used a generator that was not seeded since ``before``.

        That generator is seeded from now on.
        """
        used = {name for name, state in before.items() if _GLOBALS[name][1]() != state}
        self._unused -= used
        self._seeds += [_GLOBALS[name][0] for name in _GLOBALS if name in used]
        return bool(used)


def call_batch(
    simulator: Callable[..., Any],
    form: SimulatorForm,
    theta: np.ndarray,
    stream: np.random.SeedSequence,
) -> np.ndarray:
    """Simulate a batch, theta float32 of shape (N, D); float32 of shape (N, *x_shape).

    An x of another shape or type is a ``ValueError``, and what the simulator raises passes
    through.
    """
    result = _invoke(simulator, form.library, form.takes_rng, theta, seed_stream(stream))
    expected = (len(theta), *form.x_shape)
    if result.shape != expected:
        raise ValueError(f"x has shape {result.shape}, expected {expected}")
    return result


def call_rows(
    simulator: Callable[..., Any],
    form: SimulatorForm,
    theta: np.ndarray,
    keys: np.ndarray,
    keep: Callable[[int, Any, float], bool],
    streams: RowStreams | None = None,
    block: int = MOST_IN_BLOCK,
) -> None:
    """Simulate one row at a time, theta float32 of shape (N, D), in order.

    Row i is a function of ``theta[i]`` and of the stream of ``keys[i]``. ``keep`` is called with
    i, its float32 x of x_shape or the exception that it raised, and its seconds; where it gives
    False, no further row is simulated. A batch simulator gets batches of one.

    ``streams`` remembers from call to call which global generators the simulator uses. A row is
    kept when its block of at most ``block`` rows is done.
    """
    streams = RowStreams() if streams is None else streams
    library, with_rng, x_shape, batched = form.library, form.takes_rng, form.x_shape, form.batched
    expected = (1, *x_shape) if batched else x_shape
    # Copies: a simulator may write into its argument.
    rows: Any = theta.astype(np.float64) if library == "numpy" else torch.from_numpy(theta.copy())
    clock, at = time.perf_counter, streams.at

    def run(start: int, stop: int) -> list[tuple[Any, float]]:
        outcomes = []
        for row, key in zip(range(start, stop), keys[start:stop].tolist(), strict=True):
            argument = rows[row : row + 1] if batched else rows[row]
            started = clock()
            outcome: Any
            try:
                rng = at(key)
                result = simulator(argument, rng=rng) if with_rng else simulator(argument)
                outcome = _as_float32(result)
                if outcome.shape != expected:
                    raise ValueError(f"x has shape {outcome.shape}, expected {expected}")
                if batched:
                    outcome = outcome[0]
            except (Exception, SystemExit) as error:
                outcome = error
            outcomes.append((outcome, clock() - started))
        return outcomes

    start, size = 0, 1
    with torch.no_grad():
        while start < len(theta):
            stop = min(start + size, len(theta))
            before, began = streams.states(keys[start].tolist()), clock()
            outcomes = run(start, stop)
            if streams.unseen(before):
                rows[start:stop] = (torch.from_numpy if library == "torch" else np.asarray)(
                    theta[start:stop]
                )
                continue
            for row, (outcome, seconds) in enumerate(outcomes, start):
                if not keep(row, outcome, seconds):
                    return
            start = stop
            quick = clock() - began < _LONGEST_BLOCK_S
            size = min(2 * size, block) if quick else max(size // 2, 1)


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
    if type(result) is np.ndarray and result.dtype == np.float64:
        # The usual case first; what does not fit into a float32 becomes infinite.
        with np.errstate(over="ignore"):
            return np.asarray(result, dtype=np.float32, order="C")
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
        # A copy: a simulator may give the same array, with other numbers, for every row.
        return np.array(array, dtype=np.float32, order="C")


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
            return SimulatorForm(False, library, rng, trial.usual_shape(draws, single), note)
        if isinstance(single, np.ndarray):
            return SimulatorForm(False, library, rng, trial.usual_shape(draws, single))
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

    def usual_shape(self, draws: np.ndarray, first: np.ndarray) -> tuple[int, ...]:
        """The shape of x, of a simulator that gives another one now and then."""
        second = self.run(draws[1])
        if not isinstance(second, np.ndarray) or second.shape == first.shape:
            return first.shape
        third = self.run(draws[2])
        return third.shape if isinstance(third, np.ndarray) else first.shape

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
