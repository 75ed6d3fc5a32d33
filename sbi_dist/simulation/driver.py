"""The driver of the simulate stage: keeps actors busy with shards until the dataset is whole.

It holds records about shards, never their rows. A shard is finished when it is in the store, so
that the driver, any actor or the machine may die at any time and the next run takes up what is
missing.
"""

from __future__ import annotations

import collections
import contextlib
import math
from typing import Any

from sbi_dist.errors import InputError, StageError
from sbi_dist.priors import prior_to_data
from sbi_dist.problem import Problem, local_modules
from sbi_dist.progress import Progress, say
from sbi_dist.session import require
from sbi_dist.simulation.actor import SimulatorActor
from sbi_dist.simulation.dataset import Dataset, ShardRecord, versions
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.plan import Shard, plan_shards, shard_size_for
from sbi_dist.store import ObjectStore

__all__ = ["describe_failures", "failures", "frequent_failures", "repair", "ship", "simulate"]

# One shard running and one waiting, so that an actor never idles on the way to the driver.
_IN_FLIGHT = 2
# A shard that takes its actor with it twice is run in a child process, row by row.
_DEATHS_BEFORE_ISOLATION = 2
_DEATHS_BEFORE_STOP = 6


def simulate(
    problem: Problem, options: SimulateOptions, store: ObjectStore, show_progress: bool = True
) -> list[ShardRecord]:
    """Bring the dataset in ``store`` to ``options.num_simulations`` rows.

    Returns the records of its shards in order. Stored shards are kept and not simulated again.
    Ray must be connected.

    Raises:
        InputError: the simulator can't be run or shipped, or the cluster is too small.
        StageError: more simulations failed than ``max_failure_fraction`` allows.
    """
    dataset = Dataset(store)
    form = problem.form()
    manifest = dataset.manifest() or dataset.create(_manifest(problem, options, form.x_shape))
    records = dataset.stored()
    shards = plan_shards(
        options.num_simulations,
        manifest["shard_size"],
        {index: record.rows for index, record in records.items()},
    )
    missing = collections.deque(shard for shard in shards if shard.index not in records)
    kept = {shard.index: records[shard.index] for shard in shards if shard.index in records}
    _check_failures(kept, options)
    if missing:
        say(f"simulator: {form}")
        _Run(problem, options, store, manifest, shards, kept, missing).finish(show_progress)
    return [kept[shard.index] for shard in shards]


def repair(store: ObjectStore) -> list[str]:
    """Remove the damaged shards of a dataset, so that ``simulate`` makes them again; their keys."""
    damaged = Dataset(store).damaged()
    for key in damaged:
        store.delete(key)
    return damaged


def _manifest(
    problem: Problem, options: SimulateOptions, x_shape: tuple[int, ...]
) -> dict[str, Any]:
    return {
        "format": 1,
        "problem": problem.fingerprint(),
        "prior": prior_to_data(problem.prior),
        "parameter_names": list(problem.parameter_names or ()),
        "parameter_units": list(problem.parameter_units or ()),
        "x_shape": list(x_shape),
        "seed": options.seed,
        "shard_size": options.shard_size or shard_size_for(options.num_simulations),
        "versions": versions(),
    }


def ship(thing: Any, what: str, problem: Problem) -> bytes:
    """Pickle for the workers; code that they can't import travels by value.

    Raises:
        InputError: it can't be pickled.
    """
    from ray import cloudpickle

    for module in local_modules(problem.simulator):
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(thing)
    except Exception as error:
        raise InputError(
            f"{what} can't be sent to the workers ({type(error).__name__}: {error}); make what it "
            "needs inside the function, not outside of it"
        ) from error


class _Run:
    """One run of the loop: actors, the shards that they work on, and what is left to do."""

    def __init__(
        self,
        problem: Problem,
        options: SimulateOptions,
        store: ObjectStore,
        manifest: dict[str, Any],
        shards: list[Shard],
        records: dict[int, ShardRecord],
        missing: collections.deque[Shard],
    ) -> None:
        import ray

        self.options, self.records, self.missing = options, records, missing
        self.total = sum(shard.size for shard in shards)
        self.deaths: collections.Counter[int] = collections.Counter()
        self.assigned: dict[Any, tuple[int, Shard]] = {}  # task -> (actor number, shard)
        self.actors: dict[int, Any] = {}
        self.started = 0
        about = {key: manifest[key] for key in manifest if key != "shard_size"}
        self.arguments = (
            ray.put(ship(problem, "problem", problem)),
            ray.put(ship(problem.simulator, "problem.simulator", problem)),
            problem.form(),
            store.uri,
            about,
            options,
        )
        self.actor_class = ray.remote(
            num_cpus=options.cpus_per_actor, num_gpus=options.gpus_per_actor, max_restarts=0
        )(SimulatorActor)
        self.wanted = self._number_of_actors()

    def _number_of_actors(self) -> int:
        import ray

        options = self.options
        if options.actors is not None:
            require(
                options.cpus_per_actor, options.gpus_per_actor, options.actors, "simulate.actors"
            )
            return min(options.actors, len(self.missing))
        require(options.cpus_per_actor, options.gpus_per_actor, 1, "simulate.cpus_per_actor")
        there = ray.available_resources()
        room = there.get("CPU", 0.0) / options.cpus_per_actor
        if options.gpus_per_actor:
            room = min(room, there.get("GPU", 0.0) / options.gpus_per_actor)
        return min(max(1, math.floor(room)), len(self.missing))

    def finish(self, show_progress: bool) -> None:
        """Run until no shard is missing."""
        import ray

        done = sum(record.rows for record in self.records.values())
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(
                Progress("simulate", self.total, "simulations", done, show_progress)
            )
            stack.callback(self._stop_actors)
            for _ in range(self.wanted):
                self._start_actor()
            while self.missing or self.assigned:
                self._hand_out()
                ready, _ = ray.wait(list(self.assigned), num_returns=1, timeout=1.0)
                for task in ready:
                    self._collect(task)
                done = sum(record.rows for record in self.records.values())
                failed = sum(failures(record) for record in self.records.values())
                progress.update(done, f"{failed:,} failed")
                _check_failures(self.records, self.options)

    def _start_actor(self) -> None:
        number = self.started
        self.started += 1
        self.actors[number] = self.actor_class.remote(*self.arguments)

    def _stop_actors(self) -> None:
        import ray

        for actor in self.actors.values():
            ray.kill(actor)

    def _hand_out(self) -> None:
        load = collections.Counter(number for number, _ in self.assigned.values())
        # One each first, so that the last shards spread over the actors.
        for depth in range(1, _IN_FLIGHT + 1):
            for number, actor in self.actors.items():
                if self.missing and load[number] < depth:
                    shard = self.missing.popleft()
                    isolate = self.deaths[shard.index] >= _DEATHS_BEFORE_ISOLATION
                    task = actor.simulate.remote(shard, isolate)
                    self.assigned[task] = (number, shard)
                    load[number] += 1

    def _collect(self, task: Any) -> None:
        import ray

        if task not in self.assigned:
            return
        number, shard = self.assigned.pop(task)
        try:
            record = ray.get(task)
        except ray.exceptions.RayActorError as error:
            self._replace(number, shard, error)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, (InputError, StageError)):
                raise cause from None
            raise StageError(f"shard {shard.index} could not be simulated: {cause}") from error
        else:
            self.records[record.index] = record

    def _replace(self, number: int, shard: Shard, error: Exception) -> None:
        """An actor died: give its shards to the others and start another."""
        if "creation task" in str(error):
            reason = [line for line in str(error).splitlines() if line.strip()][-1].strip()
            raise StageError(f"simulate: the actors can't load the problem ({reason})") from error
        self.actors.pop(number, None)
        lost = [shard]
        for task, (owner, other) in list(self.assigned.items()):
            if owner == number:
                del self.assigned[task]
                lost.append(other)
        # Tasks of an actor run in order, so that the shard with the lowest index was running.
        lost.sort(key=lambda each: each.index)
        running = lost[0]
        self.deaths[running.index] += 1
        say(
            f"simulate: an actor died at shard {running.index} "
            f"({self.deaths[running.index]} time(s)); its shards are simulated again"
        )
        if self.deaths[running.index] >= _DEATHS_BEFORE_STOP:
            raise StageError(
                f"shard {running.index} has ended its actor {_DEATHS_BEFORE_STOP} times, in a "
                f"process of its own as well ({error}); the finished shards are kept"
            ) from error
        self.missing.extendleft(reversed(lost))
        self._start_actor()


def failures(record: ShardRecord) -> int:
    """Rows of a shard that did not give data."""
    return record.rows - record.statuses.get("ok", 0)


def _check_failures(records: dict[int, ShardRecord], options: SimulateOptions) -> None:
    """Stop once it is all but certain that more fail than allowed (lower Wilson bound, 4 sd)."""
    rows = sum(record.rows for record in records.values())
    failed = sum(failures(record) for record in records.values())
    if not failed:
        return
    z, fraction = 4.0, failed / rows
    spread = z * math.sqrt(fraction * (1 - fraction) / rows + z * z / (4 * rows * rows))
    bound = (fraction + z * z / (2 * rows) - spread) / (1 + z * z / rows)
    allowed = options.max_failure_fraction
    finished = rows >= options.num_simulations
    if bound <= allowed and not (finished and fraction > allowed):
        return
    raise StageError(
        f"{failed:,} of {rows:,} simulations failed, more than "
        f"simulate.max_failure_fraction={allowed:g} allows. Most frequent: "
        f"{describe_failures(list(records.values()))}. Mend the simulator or the prior, or raise "
        "simulate.max_failure_fraction; the finished shards are kept"
    )


def frequent_failures(records: list[ShardRecord], most: int = 3) -> list[dict[str, Any]]:
    """The most frequent failures over all shards, each with a theta that shows it."""
    merged: dict[str, dict[str, Any]] = {}
    for record in records:
        for entry in record.errors:
            known = merged.setdefault(entry["message"], {**entry, "count": 0})
            known["count"] += entry["count"]
    return sorted(merged.values(), key=lambda entry: -entry["count"])[:most]


def describe_failures(records: list[ShardRecord]) -> str:
    """The most frequent failures as one sentence."""
    return "; ".join(
        f"{entry['count']:,} x {entry['status']} ({entry['message']}), for one with theta = "
        f"{[float(f'{value:.6g}') for value in entry['theta']]}"
        for entry in frequent_failures(records)
    )
