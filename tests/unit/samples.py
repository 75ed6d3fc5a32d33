"""Simulations, records and shards for tests of what is stored."""

from __future__ import annotations

from typing import Any

import numpy as np

from sbi_dist.simulation.plan import Shard
from sbi_dist.simulation.shard import ShardRecord, Simulations, encode_shard, versions
from sbi_dist.store import ObjectStore


def simulations(rows: int, x_shape: tuple[int, ...], seed: int = 0, start: int = 0) -> Simulations:
    rng = np.random.default_rng(seed)
    status = rng.choice(["ok", "error", "nonfinite"], rows).tolist()
    failed = {
        row: (each, f"{each}\N{HORIZONTAL ELLIPSIS}")
        for row, each in enumerate(status)
        if each != "ok"
    }
    x = rng.standard_normal((rows, *x_shape), dtype=np.float32)
    x[list(failed)] = np.nan
    return Simulations(
        simulation_id=start + np.arange(rows, dtype=np.int64),
        theta=rng.standard_normal((rows, 2), dtype=np.float32),
        x=x,
        failed=failed,
        duration_s=rng.random(rows, dtype=np.float32),
    )


def about(shard: int = 0, x_shape: tuple[int, ...] = (3,)) -> dict[str, Any]:
    return {
        "shard": shard,
        "x_shape": list(x_shape),
        "parameter_names": ["a", "b"],
        "parameter_units": ["1/s", ""],
        "versions": versions(),
    }


def put_shard(store: ObjectStore, shard: Shard) -> ShardRecord:
    rows = simulations(shard.size, (3,), shard.index, shard.start)
    data, record = encode_shard(rows, about(shard.index))
    store.put(shard.key, data)
    return record


def some_record(index: int, rows: int = 10, failed: int = 0, message: str = "E") -> ShardRecord:
    entry = {"status": "error", "message": message, "count": failed, "theta": [0.5, 1e-7]}
    errors = [{**entry, "simulation_id": rows * index}] if failed else []
    counts = {"ok": rows - failed, "error": failed}
    statuses = {status: count for status, count in counts.items() if count}
    return ShardRecord(index, rows, statuses, errors, 0.5, f"{index:032x}")
