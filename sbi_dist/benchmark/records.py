"""C2ST records of a model: beside it in the store, one object for each observation."""

from __future__ import annotations

import json
from typing import Any

from sbi_dist.experiment import digest
from sbi_dist.store import ObjectStore

__all__ = ["folder_of", "read_best", "read_records", "write_record"]

# Changes when the same model gets other records than before.
_FORMAT = 1


def folder_of(experiment: ObjectStore, model_id: str, num_draws: int) -> ObjectStore:
    """Where a model's records are; a folder of their own for each number of draws."""
    name = digest({"format": _FORMAT, "num_draws": num_draws}, 6)
    return experiment.child(f"benchmark/{model_id}-{name}")


def read_records(folder: ObjectStore) -> dict[int, float]:
    """C2ST by the number of the observation, of those that have a record, in order."""
    return {record["observation"]: record["c2st"] for record in _records(folder)}


def read_best(experiment: ObjectStore, model_id: str) -> tuple[str, dict[int, float]] | None:
    """A model's problem and records, of the number of draws that has most; None: there is none."""
    names = [name for name in experiment.folders("benchmark/") if name.startswith(f"{model_id}-")]
    every = [_records(experiment.child(f"benchmark/{name}")) for name in names]
    found = max(every, key=len, default=[])
    if not found:
        return None
    return found[0]["task"], {record["observation"]: record["c2st"] for record in found}


def write_record(folder: ObjectStore, task: str, observation: int, c2st: float) -> None:
    """Store the record of an observation, unless there is one."""
    record = {"task": task, "observation": observation, "c2st": c2st}
    folder.put_if_absent(f"observation-{observation:02d}.json", json.dumps(record).encode())


def _records(folder: ObjectStore) -> list[dict[str, Any]]:
    return [json.loads(folder.get(key)) for key in sorted(folder.list("observation-"))]
