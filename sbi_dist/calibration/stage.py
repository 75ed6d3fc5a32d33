"""The calibrate stage: posterior draws for held-out simulations, the tests, and their verdict.

A part is the unit of work: a range of the held-out simulations, whose table is written once. A run
that was killed takes up the missing parts, and comes to the same outcome. Ray is connected to only
where there is something to simulate, or more than one part to draw.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from sbi_dist.calibration.actor import CalibrationActor, Reference, decode, encode
from sbi_dist.calibration.finding import Part as Tested
from sbi_dist.calibration.held_out import HeldOut, HeldOutOptions
from sbi_dist.calibration.local import FEWEST_ROWS, local_c2st
from sbi_dist.calibration.options import CalibrateOptions
from sbi_dist.calibration.reference import Regression, Scale
from sbi_dist.calibration.table import Ranks, merge
from sbi_dist.calibration.verdict import curves, judge
from sbi_dist.catalog.actor import PartRecord
from sbi_dist.catalog.live import Live
from sbi_dist.catalog.plan import Part, parts
from sbi_dist.errors import StageError
from sbi_dist.experiment import digest
from sbi_dist.posterior.observation import as_observations
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.problem import Problem
from sbi_dist.progress import Progress, say
from sbi_dist.promotion import CALIBRATION
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.driver import simulate
from sbi_dist.simulation.failures import frequent_failures
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.prepare import FORMAT as SIMULATION_FORMAT
from sbi_dist.simulation.shard import ShardRecord
from sbi_dist.store import ObjectStore

__all__ = ["RANKS", "calibrate", "held_out_name", "held_out_simulations", "request_of"]

# Changes when the tables of the same request are others than before.
FORMAT = 1
RANKS = "ranks.parquet"
# A part is some seconds of work.
_PART_DRAWS = 10**6
# Simulations of the training that say what the parameters are like, and how x tells of them.
_REFERENCE_ROWS, _REFERENCE_BYTES = 10_000, 256 * 1024**2
_FEWEST = 20  # for a regression
_READERS = 16


def _connected() -> None:
    """Ray is, or is not needed."""


def _held_out_options(options: CalibrateOptions, simulating: SimulateOptions) -> HeldOutOptions:
    given = HeldOutOptions(**dataclasses.asdict(simulating))
    return dataclasses.replace(
        given, num_simulations=options.count(), max_seconds=None, seed=options.seed
    )


def held_out_name(problem: Problem, options: CalibrateOptions, simulating: SimulateOptions) -> str:
    """Name of the dataset of held-out simulations; it grows where more of them are asked for."""
    given = _held_out_options(options, simulating)
    return digest(
        {"format": SIMULATION_FORMAT, "problem": problem.fingerprint(), **given.outcome()}
    )


def held_out_simulations(
    problem: Problem,
    options: CalibrateOptions,
    simulating: SimulateOptions,
    folder: ObjectStore,
    labels: dict[str, str],
    connect: Callable[[], object] = _connected,
) -> HeldOut:
    """Simulate what the options ask for, unless it is there.

    Args:
        simulating: how to run the simulator.
        folder: of all held-out simulations.
        connect: called before Ray is needed.
    """
    name, count = held_out_name(problem, options, simulating), options.count()
    store = folder.child(name)
    records = Dataset(store).complete(count)
    if records is None:
        connect()
        given = _held_out_options(options, simulating)
        records = simulate(problem, given, store, labels={**labels, "dataset": name})
    return HeldOut(name, store, records)


def request_of(
    model: str, held_out: str, options: CalibrateOptions, observed: Any = None
) -> dict[str, Any]:
    """What a calibration is of, as ``calibration.json`` names it.

    Args:
        model: identity of its weights.
        held_out: name of the dataset of held-out simulations.
        observed: the data whose posterior is tested by itself, if any.
    """
    return {
        "format": FORMAT,
        "model": model,
        "held_out_dataset": held_out,
        "num_simulations": options.count(),
        "num_draws": options.num_draws,
        "seed": options.seed,
        "observed": None if observed is None else digest(np.asarray(observed, float).tolist()),
    }


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
    observed: Any = None,
    connect: Callable[[], object] = _connected,
) -> dict[str, Any]:
    """Draw for all held-out simulations, test, and store the verdict; the verdict.

    Writes ``ranks.parquet`` and then ``calibration.json`` to ``target``, where those of an earlier
    calibration are replaced; the parts lie in a folder of their own for each setting.

    Args:
        trained_on: the dataset of the model, and its shards.
        observed: the data whose posterior is tested by itself too, shape x_shape.
        connect: called before Ray is needed.

    Raises:
        InputError: the cluster is too small, the store refuses, or ``observed`` does not fit.
        StageError: a part keeps ending its actors, the store fails, or nothing can be drawn for.
    """
    posterior = Posterior.from_store(model)
    request = request_of(posterior.identity, held_out.name, options, observed)
    request["num_simulations"] = len(held_out)
    # The table is the same whatever was observed.
    tabled = {name: value for name, value in request.items() if name != "observed"}
    folder = target.child(f"parts-{digest(tabled)}")
    reference = functools.cache(lambda: _reference(*trained_on, options.seed))
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
            given = (model, options, folder, reference())
            if len(every) == 1:
                live.landed(_here(missing[0], given, held_out))
            else:
                connect()
                _on_ray(missing, held_out, options, given, live)
    table = _table(folder, every, held_out)
    local = None
    if observed is not None:
        key = f"local-{request['observed']}.json"
        if not folder.exists(key):
            found = _local(posterior, table, observed, reference, options)
            note = None if found is None else dataclasses.asdict(found)
            folder.put(key, json.dumps(note).encode())
        note = json.loads(folder.get(key))
        local = None if note is None else Tested(**note)
        if local is None:
            say(
                f"calibrate: the posterior of the observed data is not tested by itself: that "
                f"takes {FEWEST_ROWS} held-out simulations with draws, and {_FEWEST} to train on"
            )
    return _judged(posterior, table, local, held_out, request, target)


def _local(
    posterior: Posterior,
    table: Ranks,
    observed: Any,
    reference: Callable[[], Reference],
    options: CalibrateOptions,
) -> Tested | None:
    """The test of the posterior of one observation; None where there is too little to test with."""
    x = as_observations(observed, posterior.x_shape, "problem.observed")
    if len(x) != 1 or int(table.ok.sum()) < FEWEST_ROWS:
        return None
    regression = reference().regression
    if regression is None:
        return None
    draws, _ = posterior.draws(x, options.num_draws, options.seed)
    guess = regression.predict(x.numpy())[0]
    found = local_c2st(table, draws[0].numpy(), guess, options.seed)
    unlike = float(posterior.out_of_distribution(x)[1][0])
    more = {} if math.isnan(unlike) else {"out_of_distribution_p": unlike}
    return dataclasses.replace(found, more=more)


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


def _table(folder: ObjectStore, every: list[Part], held_out: HeldOut) -> Ranks:
    with ThreadPoolExecutor(_READERS) as pool:
        table = merge(list(pool.map(lambda part: decode(folder.get(part.key)), every)))
    if not len(table):
        often = "; ".join(
            f"{each['count']:,} x {each['status']} ({each['message']})"
            for each in frequent_failures(held_out.records)
        )
        raise StageError(
            "calibrate: no held-out simulation gave data that can be drawn for; most frequent: "
            f"{often}; mend the simulator or the prior"
        )
    return table


def _judged(
    posterior: Posterior,
    table: Ranks,
    local: Tested | None,
    held_out: HeldOut,
    request: dict[str, Any],
    target: ObjectStore,
) -> dict[str, Any]:
    names = posterior.parameter_names
    statuses: Counter[str] = Counter()
    for record in held_out.records:
        statuses.update(record.statuses)
    found = {
        **judge(table, names, local),
        "simulations": {
            "made": len(held_out),
            "statuses": dict(statuses),
            "failures": frequent_failures(held_out.records),
        },
        "request": request,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "curves": curves(table, names),
    }
    target.put(RANKS, encode(table, names))
    target.put(CALIBRATION, json.dumps(found, indent=1).encode())
    return found
