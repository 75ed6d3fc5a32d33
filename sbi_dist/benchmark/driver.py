"""Runs the benchmark's cells on Ray, side by side; takes up what is there.

The simulations of a cell are made on the simulate stage's actors. Then one Ray task trains, and
others draw and judge. Whatever dies is run again by Ray and goes on from the store, as does another
run of the command.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sbi_dist.benchmark.cell import Cell, Trained, judge, together
from sbi_dist.benchmark.options import Asked
from sbi_dist.benchmark.published import NPE
from sbi_dist.benchmark.records import read_records
from sbi_dist.errors import InputError, StageError
from sbi_dist.problems.reference import reference_problem
from sbi_dist.progress import Progress, say
from sbi_dist.session import connected, require

__all__ = ["run_cells"]

_RETRIES = 5


def run_cells(asked: Asked, address: str | None) -> dict[Cell, dict[int, float]]:
    """C2ST of each cell by observation.

    Raises:
        InputError: a cell's settings do not fit, or the cluster has no CPU.
        StageError: a cell failed, after all others have ended; what is finished is kept.
    """
    numbers = list(range(1, asked.observations + 1))
    found: dict[Cell, dict[int, float]] = {cell: {} for cell in asked.cells}
    with connected(address):
        require({"CPU": 1.0}, 1, "benchmark")
        models = {}
        for cell in asked.cells:
            pipeline = cell.pipeline()
            this = pipeline.simulate()
            records = pipeline.rounds.records(this)
            assert records is not None
            model_id = pipeline.rounds.model_id(this, records)
            models[cell] = Trained.of(cell, pipeline, model_id, asked.num_draws)
            there = read_records(models[cell].records)
            found[cell] = {number: there[number] for number in numbers if number in there}
        total = len(asked.cells) * len(numbers)
        done = sum(map(len, found.values()))
        with Progress("benchmark", total, "observations", done) as progress, _Tasks() as tasks:
            for cell in asked.cells:
                if len(found[cell]) < len(numbers):
                    tasks.start(cell, _train, cell)
                else:
                    _say_cell(cell, found[cell])
            for cell, kind, result in tasks.ended():
                if kind is _train:
                    left = [number for number in numbers if number not in found[cell]]
                    for group in together(left, reference_problem(cell.task).num_parameters):
                        tasks.start(cell, judge, models[cell], group)
                    continue
                found[cell].update(result)
                progress.update(sum(map(len, found.values())), f"{cell.task} {cell.size:,}")
                if len(found[cell]) == len(numbers):
                    _say_cell(cell, found[cell])
    return found


def _say_cell(cell: Cell, found: dict[int, float]) -> None:
    mean = sum(found.values()) / len(found)
    published = NPE[cell.task].get(cell.size)
    beside = "" if published is None else f" (published NPE: {published:.3f})"
    say(f"benchmark: {cell.task} with {cell.size:,} simulations: C2ST {mean:.3f}{beside}")


def _train(cell: Cell) -> None:
    """Train a cell's model, unless it is there."""
    cell.pipeline().train()


def _guarded(function: Any, arguments: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    """Runs in a Ray task; errors that trying again would not mend come back as they are."""
    import torch

    torch.set_num_threads(1)
    try:
        return function(*arguments), None
    except (InputError, StageError) as error:
        return None, error


class _Tasks:
    """Ray tasks in flight; those that are left are cancelled at the end of the block."""

    def __enter__(self) -> _Tasks:
        import ray

        self._flying: dict[Any, tuple[Cell, Any]] = {}
        self._failed: list[tuple[Cell, Exception]] = []
        self._remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(_guarded)
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for reference in self._flying:
            with contextlib.suppress(Exception):
                ray.cancel(reference, force=True)

    def start(self, cell: Cell, function: Any, *arguments: Any) -> None:
        """Run ``function(*arguments)`` when there is a CPU."""
        self._flying[self._remote.remote(function, arguments)] = (cell, function)

    def ended(self) -> Iterator[tuple[Cell, Any, Any]]:
        """Cell, function and result of each as it ends, until none is left.

        Raises:
            InputError, StageError: of the first that failed, once all others have ended.
        """
        import ray

        while self._flying:
            (reference,), _ = ray.wait(list(self._flying), num_returns=1)
            cell, function = self._flying.pop(reference)
            try:
                result, error = ray.get(reference)
            except ray.exceptions.RayTaskError as raised:
                cause = raised.cause
                result, error = None, StageError(f"{type(cause).__name__}: {cause}")
            except ray.exceptions.RayError as lost:
                reason = (str(lost).strip().splitlines() or [type(lost).__name__])[0]
                result, error = (
                    None,
                    StageError(f"its process ended {_RETRIES + 1} times: {reason}"),
                )
            if error is None:
                yield cell, function, result
            else:
                say(f"benchmark: {cell.task} with {cell.size:,} simulations failed: {error}")
                self._failed.append((cell, error))
        if self._failed:
            cell, error = self._failed[0]
            raise type(error)(
                f"benchmark: {cell.task} with {cell.size:,} simulations: {error}; the other cells "
                "are finished, run the command again for the rest"
            )
