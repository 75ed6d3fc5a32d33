"""The calibrate stage: posterior draws for held-out simulations, the tests, and their verdict.

A part is the unit of work: a range of the held-out simulations, whose table is written once. A run
that was killed takes up the missing parts, and comes to the same outcome.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from sbi_dist.calibration.actor import CalibrationActor, Reference, decode, encode
from sbi_dist.calibration.held_out import HeldOut, HeldOutOptions
from sbi_dist.calibration.options import CalibrateOptions
from sbi_dist.calibration.reference import Regression, Scale
from sbi_dist.calibration.table import merge
from sbi_dist.calibration.verdict import curves, judge
from sbi_dist.catalog.actor import PartRecord
from sbi_dist.catalog.live import Live
from sbi_dist.catalog.plan import Part, parts
from sbi_dist.errors import StageError
from sbi_dist.experiment import digest
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.problem import Problem
from sbi_dist.progress import Progress
from sbi_dist.promotion import CALIBRATION
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.driver import simulate
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.prepare import FORMAT as SIMULATION_FORMAT
from sbi_dist.simulation.shard import ShardRecord
from sbi_dist.store import ObjectStore

__all__ = ["RANKS", "calibrate", "held_out_simulations"]

# Changes when the tables of the same request are others than before.
FORMAT = 1
RANKS = "ranks.parquet"
# A part is some seconds of work.
_PART_DRAWS = 10**6
# Simulations of the training that say what the parameters are like, and how x tells of them.
_REFERENCE_ROWS, _REFERENCE_BYTES = 10_000, 256 * 1024**2
_FEWEST = 20  # for a regression
_READERS = 16


def held_out_simulations(
    problem: Problem,
    options: CalibrateOptions,
    simulating: SimulateOptions,
    folder: ObjectStore,
    labels: dict[str, str],
) -> HeldOut:
    """Simulate what the options ask for, unless it is there. Ray must be connected.

    Args:
        simulating: how to run the simulator.
        folder: of all held-out simulations.
    """
    given = HeldOutOptions(**dataclasses.asdict(simulating))
    given = dataclasses.replace(
        given, num_simulations=options.num_simulations, max_seconds=None, seed=options.seed
    )
    identity = {"format": SIMULATION_FORMAT, "problem": problem.fingerprint(), **given.outcome()}
    name = digest(identity)
    store = folder.child(name)
    records = Dataset(store).complete(options.num_simulations)
    if records is None:
        records = simulate(problem, given, store, labels={**labels, "dataset": name})
    return HeldOut(name, store, records)


def _reference(dataset: ObjectStore, records: Sequence[ShardRecord], seed: int) -> Reference:
    """Of the simulations that a model was trained on: of up to 10,000 of them, or 256 MB."""
    theta: list[np.ndarray] = []
    x: list[np.ndarray] = []
    rows = 0
    for record in records:
        shard = Dataset(dataset).read(record)
        each = 4 * max(1, math.prod(shard.x.shape[1:]))
        most = min(_REFERENCE_ROWS, max(_FEWEST, _REFERENCE_BYTES // each))
        ok = np.flatnonzero(shard.ok)[: most - rows]
        theta.append(shard.theta[ok])
        x.append(shard.x[ok])
        rows += len(ok)
        if rows >= most:
            break
    together = np.concatenate(theta)
    if rows < _FEWEST:
        return Reference(Scale.of(together), None)
    return Reference(Scale.of(together), Regression.fit(together, np.concatenate(x), seed=seed))


def calibrate(
    model: ObjectStore,
    held_out: HeldOut,
    trained_on: tuple[ObjectStore, Sequence[ShardRecord]],
    options: CalibrateOptions,
    target: ObjectStore,
    experiment: str = "",
) -> dict[str, Any]:
    """Draw for all held-out simulations, test, and store the verdict; the verdict.

    Several parts are drawn on Ray, which must be connected then.

    Writes ``ranks.parquet`` and then ``calibration.json`` to ``target``, where those of an earlier
    calibration are replaced; the parts lie in a folder of their own for each setting.

    Args:
        trained_on: the dataset of the model, and its shards.

    Raises:
        InputError: the cluster is too small, or the store refuses.
        StageError: a part keeps ending its actors, the store fails, or nothing can be drawn for.
    """
    posterior = Posterior.from_store(model)
    request = {
        "format": FORMAT,
        "model": posterior.identity,
        "held_out_dataset": held_out.name,
        "num_simulations": len(held_out),
        "num_draws": options.num_draws,
        "seed": options.seed,
    }
    folder = target.child(f"parts-{digest(request)}")
    every = parts(len(held_out), max(1, _PART_DRAWS // options.num_draws))
    there = set(folder.list("part-"))
    missing = [part for part in every if part.key not in there]
    stored = [PartRecord(part.number, {"ok": len(part)}) for part in every if part.key in there]
    already = sum(record.statuses["ok"] for record in stored)
    with Progress("calibrate", len(held_out), "simulations", already, len(every) > 1) as progress:
        labels = {"experiment": experiment, "catalog": f"held-out-{held_out.name}"}
        live = Live(len(held_out), options.num_draws, labels, progress)
        live.already(stored)
        if missing:
            given = (model, options, folder, _reference(*trained_on, options.seed))
            if len(every) == 1:
                live.landed(_here(missing[0], given, held_out))
            else:
                _on_ray(missing, held_out, options, given, live)
    return _judged(posterior, folder, every, request, target)


def _here(part: Part, given: tuple[Any, ...], held_out: HeldOut) -> PartRecord:
    threads = torch.get_num_threads()  # which an actor sets for its process
    try:
        arguments = (*given, held_out)
        (record,), _ = CalibrationActor(*arguments).draw(part)
    finally:
        torch.set_num_threads(threads)
    return record


def _on_ray(
    missing: list[Part],
    held_out: HeldOut,
    options: CalibrateOptions,
    given: tuple[Any, ...],
    live: Live,
) -> None:
    from sbi_dist.catalog.driver import draw_on_ray

    draw_on_ray(missing, held_out, options, given, live, "calibrate", CalibrationActor)


def _judged(
    posterior: Posterior,
    folder: ObjectStore,
    every: list[Part],
    request: dict[str, Any],
    target: ObjectStore,
) -> dict[str, Any]:
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda part: decode(folder.get(part.key)), every))
    table, names = merge(tables), posterior.parameter_names
    if not len(table):
        raise StageError(
            "calibrate: no held-out simulation gave data that can be drawn for; see `sbi-dist "
            "status` for how simulations fail"
        )
    found = {
        **judge(table, names),
        "request": request,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "curves": curves(table, names),
    }
    target.put(RANKS, encode(table, names))
    target.put(CALIBRATION, json.dumps(found, indent=1).encode())
    return found
