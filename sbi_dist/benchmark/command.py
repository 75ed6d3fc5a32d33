"""The ``benchmark`` command: what was asked for, the run, and its table and page in the store."""

from __future__ import annotations

import json
from collections.abc import Sequence

import yaml

from sbi_dist.benchmark.driver import run_cells
from sbi_dist.benchmark.options import Asked
from sbi_dist.benchmark.table import as_rows, as_text
from sbi_dist.errors import InputError
from sbi_dist.experiment import Experiment, digest
from sbi_dist.store import open_store

__all__ = ["benchmark"]


def benchmark(
    tasks: Sequence[str],
    sizes: str,
    observations: int,
    num_draws: int,
    overrides: Sequence[str],
    store: str | None,
    address: str | None,
) -> tuple[str, str]:
    """Run what is left of the benchmark; its table as text, and the folder of table and page.

    Raises:
        InputError: names the argument, its value and what is allowed.
        StageError: a cell failed; what is finished is kept.
    """
    # In full: Ray's tasks run in another folder.
    place = open_store(store if store is not None else Experiment.store).uri
    overrides = (*overrides, f"store={yaml.safe_dump(place).splitlines()[0]}")
    asked = Asked.of(tasks, _numbers(sizes), observations, num_draws, overrides)
    first = asked.cells[0].experiment
    # Of its own, so that a part of the benchmark does not replace the table of all.
    chosen = [[cell.task, cell.size] for cell in asked.cells]
    outcome = [first.train.outcome(), first.simulate.seed]
    name = digest([chosen, observations, num_draws, *outcome], 6)
    folder = open_store(first.store, first.store_patience_s).child(f"benchmark/{name}")
    rows = as_rows(run_cells(asked, address))
    table = as_text(rows)
    # Imported here: nothing else of it draws.
    from sbi_dist.benchmark.page import render

    for file, data in render(rows, first.train.outcome()).items():
        folder.put(file, data)
    about = {"train": first.train.outcome(), "num_draws": num_draws, "rows": rows}
    folder.put("table.json", json.dumps(about, indent=1).encode())
    folder.put("table.txt", f"{table}\n".encode())
    return table, folder.uri


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part.replace("_", "")) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise InputError(f"--sizes is {text!r}; it must be whole numbers from 1, as in 1000,10000")
    return found
