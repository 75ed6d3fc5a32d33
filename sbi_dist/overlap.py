"""Train on the simulations that have landed while the others are being made.

Models are trained on the first shards of the dataset, on twice as many each time, each from the
weights of the one before. When the last simulation is in, the model of the whole dataset starts
from the latest of them. Which shards a model sees on the way depends on when they land, so that the
final weights are not those of a run without overlap; what they were trained on is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable

from sbi_dist.estimation.signals import STOP
from sbi_dist.experiment import Experiment
from sbi_dist.progress import say
from sbi_dist.rounds import Round, Rounds
from sbi_dist.session import capacity
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.shard import ShardRecord
from sbi_dist.store import ObjectStore

__all__ = ["end_overlap", "overlap_training", "warm_start"]

_POINTER = "overlap.json"
_LOOK_EVERY_S = 2.0
# A first model is worth its training when it has this part of the simulations, and so many.
_FIRST_PART, _FIRST = 0.1, 200


def overlap_training(
    this: Round,
    experiment: Experiment,
    simulate: Callable[[SimulateOptions, threading.Event], None],
    train: Callable[[list[ShardRecord], ObjectStore | None], ObjectStore],
    rounds: Rounds,
) -> None:
    """Run ``simulate`` in a thread and ``train`` on growing parts of what it makes.

    Returns when the simulations are there. Raises what ``simulate`` raises.
    """
    stop, done = threading.Event(), threading.Event()
    raised: list[BaseException] = []
    options = _leaving_room(experiment)

    def work() -> None:
        try:
            simulate(options, stop)
        except BaseException as error:  # told by the main thread
            raised.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work, name="sbi-dist-simulate", daemon=True)
    thread.start()
    try:
        wanted = _first_size(experiment.simulate)
        while not done.wait(_LOOK_EVERY_S):
            records = _first_shards(this)
            if sum(record.rows - record.failures for record in records) < wanted:
                continue
            size = sum(record.rows for record in records)
            say(f"train: begins on the first {size:,} simulations")
            before = warm_start(this, rounds)
            model = _train_until(this, records, train, rounds, done, 2 * size)
            this.store.put(_POINTER, json.dumps({"model": model}).encode())
            if before is not None and before.uri != rounds.model(model).uri:
                _remove(before)
            wanted = 2 * size
    finally:
        stop.set()
        thread.join(5.0)
    if raised:
        raise raised[0]


def _leaving_room(experiment: Experiment) -> SimulateOptions:
    """The stage's options with fewer actors than fill the cluster, for the training beside them."""
    options, training = experiment.simulate, experiment.train
    room = capacity(options.resources())
    workers = training.workers if isinstance(training.workers, int) else 1
    taken = max(1, workers) * max(1.0, training.cpus_per_worker or 1.0)
    left = max(1, int(room - -(-taken // max(options.cpus_per_actor, 1e-9))))
    if options.actors is not None:
        left = min(left, options.actors)
    return dataclasses.replace(options, actors=left)


def _first_size(options: SimulateOptions) -> int:
    return max(_FIRST, int(_FIRST_PART * (options.num_simulations or 0)))


def _first_shards(this: Round) -> list[ShardRecord]:
    """The records of the shards from the first one on, up to one that is not there yet.

    A prefix, so that the simulations that one model is validated on are not among those that its
    predecessor was trained on.
    """
    records = Dataset(this.store).stored().records
    prefix: list[ShardRecord] = []
    while len(prefix) in records:
        prefix.append(records[len(prefix)])
    return prefix


def _train_until(
    this: Round,
    records: list[ShardRecord],
    train: Callable[[list[ShardRecord], ObjectStore | None], ObjectStore],
    rounds: Rounds,
    done: threading.Event,
    enough: int,
) -> str:
    """Train on the given shards, until all simulations are there or ``enough`` for the next model.

    The model's name.
    """
    model_id = rounds.model_id(this, records)
    model = rounds.model(model_id)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_EVERY_S):
            with contextlib.suppress(Exception):  # the store is away; it is asked again
                if done.is_set() or Dataset(this.store).stored().rows >= enough:
                    model.put(STOP, b"")
                    return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        train(records, warm_start(this, rounds))
    finally:
        over.set()
        watcher.join(5.0)
    return model_id


def warm_start(this: Round, rounds: Rounds) -> ObjectStore | None:
    """The folder of the latest model that was trained while a round was simulated, if any."""
    try:
        return rounds.model(json.loads(this.store.get(_POINTER))["model"])
    except (KeyError, ValueError):
        return None


def end_overlap(this: Round, rounds: Rounds, final: ObjectStore) -> None:
    """Remove the models that only led to the final one."""
    start = warm_start(this, rounds)
    if start is None:
        return
    this.store.delete(_POINTER)
    if start.uri != final.uri:
        _remove(start)


def _remove(model: ObjectStore) -> None:
    for key in list(model.list()):
        model.delete(key)
