"""What a run of the benchmark is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sbi_dist.benchmark.cell import Cell
from sbi_dist.errors import InputError
from sbi_dist.options import nearest
from sbi_dist.problems.reference import DRAWS, OBSERVATIONS, PROBLEMS, load_reference

__all__ = ["Asked"]

_LEAST_DRAWS = 100
# One round: the reference draws are of ten observations, a second round is of one.
_OWN = ("name", "problem", "simulate.num_simulations", "simulate.rounds")


@dataclasses.dataclass(frozen=True)
class Asked:
    """Problems, numbers of simulations and observations to compare at.

    Attributes:
        cells: in the order of their size.
        observations: 1 to this one of each problem.
        num_draws: draws of each observation, and reference draws that they are compared with.
    """

    cells: list[Cell]
    observations: int
    num_draws: int

    @classmethod
    def of(
        cls,
        tasks: Sequence[str],
        sizes: Sequence[int],
        observations: int,
        num_draws: int,
        overrides: Sequence[str],
    ) -> Asked:
        """Check what was asked for.

        Raises:
            InputError: names the value and what is allowed.
        """
        for task in tasks:
            if task not in PROBLEMS:
                near = nearest(task, PROBLEMS)
                hint = f" (did you mean {near!r}?)" if near else ""
                raise InputError(
                    f"benchmark: TASK is {task!r}{hint}; it must be one of {', '.join(PROBLEMS)}"
                )
        if observations not in OBSERVATIONS:
            raise InputError(
                f"--observations is {observations}; it must be from 1 to {OBSERVATIONS[-1]}"
            )
        if not _LEAST_DRAWS <= num_draws <= DRAWS:
            raise InputError(
                f"--num-draws is {num_draws}; it must be from {_LEAST_DRAWS} to {DRAWS}"
            )
        for text in overrides:
            if text.partition("=")[0].strip() in _OWN:
                raise InputError(
                    f"--set {text!r}: the benchmark sets {', '.join(_OWN)} itself; choose with "
                    "TASK and --sizes"
                )
        # One worker, in the process of the cell: cells run side by side.
        given = (*overrides, "train.workers=0")
        chosen = list(dict.fromkeys(tasks)) or list(PROBLEMS)
        cells = [Cell(task, size, given) for size in sorted(set(sizes)) for task in chosen]
        for cell in cells:
            _ = cell.experiment
        # Before anything is computed, as it would be of no use without.
        load_reference(chosen[0], 1)
        return cls(cells, observations, num_draws)
