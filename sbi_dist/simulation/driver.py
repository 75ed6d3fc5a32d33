"""The driver of the simulate stage: keeps actors busy with shards until the dataset is whole.

It holds records about shards, never their rows. A shard is finished when it is in the store, so
that the driver, any actor or any machine may die at any time and the next run takes up what is
missing. Several drivers may work on one dataset at once. When no shard is left to begin, the rows
of those that still run are shared among the actors that are free.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Mapping
from typing import Any

from sbi_dist.errors import InputError, StageError
from sbi_dist.problem import Problem
from sbi_dist.progress import Progress, say
from sbi_dist.simulation import log
from sbi_dist.simulation.actor import Answer, Piece, SimulatorActor
from sbi_dist.simulation.backlog import Backlog
from sbi_dist.simulation.dataset import Dataset, Stored
from sbi_dist.simulation.failures import Failures
from sbi_dist.simulation.live import Live
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.plan import Shard, plan_shards
from sbi_dist.simulation.pool import Actor, ActorPool, Call, deaths
from sbi_dist.simulation.prepare import begin, find_form, ship
from sbi_dist.simulation.shard import ShardRecord
from sbi_dist.store import ObjectStore

__all__ = ["repair", "simulate"]

_DEATHS_BEFORE_STOP = 6
# A call that is shorter than this has the next one waiting behind it.
_QUICK_S = 0.25
# What is left of a call must be worth the messages of sharing it.
_WORTH_SHARING_S = 0.05
# Where the simulator has a process of its own, that is ended and started again.
_WORTH_A_PROCESS_S = 1.0
_LOOK_AGAIN_S = 5.0


def simulate(
    problem: Problem,
    options: SimulateOptions,
    store: ObjectStore,
    show_progress: bool = True,
    stop: threading.Event | None = None,
    labels: Mapping[str, str] | None = None,
) -> list[ShardRecord]:
    """Bring the dataset in ``store`` to ``options.num_simulations`` rows.

    Returns the records of its shards in order; with ``options.max_seconds``, of those that were
    finished in time. Stored shards are kept and not simulated again. Ray must be connected. Ends
    early, with what there is, once ``stop`` is set. Exports metrics with ``labels``, ``experiment``
    and ``dataset``; none without them.

    Raises:
        InputError: the simulator can't be run or shipped, or the cluster is too small.
        StageError: more simulations failed than ``max_failure_fraction`` allows.
    """
    form = find_form(problem, options)
    dataset = Dataset(store)
    manifest = begin(problem, options, dataset)
    for key in dataset.remove_cut():
        say(f"simulate: {store.uri}/{key} was cut short and is simulated again")
    stored = dataset.stored()
    extents = dataset.extents()
    if options.num_simulations is not None:
        dataset.agreeing(plan_shards(extents, options.num_simulations), stored)
    backlog = Backlog(plan_shards(extents, options.num_simulations), stored.records.keys())
    failures = Failures(options.max_failure_fraction, options.num_simulations)
    for record in stored.records.values():
        failures.add(record)
    failures.check()
    left = None if options.max_seconds is None else options.max_seconds - stored.seconds
    if len(backlog) and (left is None or left > 0):
        say(f"simulator: {form}")
        if log.drivers(store):
            backlog.jump()
        live = Live(labels, options.num_simulations)
        run = _Run(problem, options, dataset, manifest, backlog, stored, failures, live)
        run.finish(left, show_progress, stop or threading.Event())
        stored = dataset.stored()
    if options.num_simulations is None:
        return [stored.records[index] for index in sorted(stored.records)]
    return dataset.agreeing(plan_shards(extents, options.num_simulations), stored)


def repair(store: ObjectStore) -> list[str]:
    """Remove the damaged shards of a dataset, so that ``simulate`` makes them again; their keys."""
    damaged = Dataset(store).damaged()
    if damaged:
        log.forget(store)
    for key in damaged:
        store.delete(key)
    return damaged


class _Run:
    """One run of the loop: the actors, what they work on, and what is left to do."""

    def __init__(
        self,
        problem: Problem,
        options: SimulateOptions,
        dataset: Dataset,
        manifest: dict[str, Any],
        backlog: Backlog,
        stored: Stored,
        failures: Failures,
        live: Live,
    ) -> None:
        import ray

        self.options, self.dataset, self.backlog = options, dataset, backlog
        self.failures, self.live = failures, live
        self.form = problem.form()
        self.finished = set(stored.records)
        self.rows = self.already = stored.rows
        self.deaths: collections.Counter[int] = collections.Counter()
        self.isolate = False
        # Rows of shards that several actors simulate: by shard, first row -> (last, reference).
        self.parts: dict[Shard, dict[int, tuple[int, Any]]] = {}
        self.whole: list[Shard] = []  # those whose parts are all there
        self.calls: dict[Any, Call] = {}
        self.simulated_rows = 0
        self.simulated_s = 0.0
        self.simulated_calls = 0
        self.looked = time.monotonic()
        self.log = log.DriverLog(dataset.store, options.num_simulations)
        about = {key: manifest[key] for key in manifest if key not in ("extent", "columns")}
        self.pool = ActorPool(
            "simulate",
            SimulatorActor,
            (
                ray.put(ship(problem, "problem", problem)),
                ray.put(ship(problem.simulator, "problem.simulator", problem)),
                self.form,
                dataset.store,
                about,
                options,
            ),
            options.resources(),
            options.actors,
            options.autoscale,
            pairs=("simulate", "surrender"),
        )

    def finish(self, left_s: float | None, show_progress: bool, stop: threading.Event) -> None:
        """Run until no shard is missing, the time is up, or ``stop`` is set."""
        import ray

        deadline = float("inf") if left_s is None else time.monotonic() + left_s
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(
                Progress(
                    "simulate",
                    self.options.num_simulations,
                    "simulations",
                    self.already,
                    show_progress,
                )
            )
            stack.callback(self.pool.close)
            stack.push(self._close_log)
            while self._unfinished():
                if time.monotonic() >= deadline or stop.is_set():
                    self._abandon(time.monotonic() >= deadline)
                    return
                self.pool.staff(self._useful())
                self._hand_out()
                self._share()
                waiting = [*self.pool.starting, *self.calls]
                if not waiting:
                    time.sleep(0.1)
                    continue
                patience = max(0.0, min(1.0, deadline - time.monotonic()))
                ready, _ = ray.wait(waiting, num_returns=1, timeout=patience, fetch_local=False)
                if ready:
                    # Whatever else has come in by now.
                    ready, _ = ray.wait(
                        waiting, num_returns=len(waiting), timeout=0, fetch_local=False
                    )
                for reference in ready:
                    self._collect(reference)
                self.log.tick()
                self.live.tick(self.rows, len(self.pool.actors))
                progress.update(self.rows, f"{self.failures.failed:,} failed")
                self.failures.check()

    def _unfinished(self) -> bool:
        return bool(
            len(self.backlog) or self.parts or any(not actor.idle for actor in self.pool.actors)
        )

    def _close_log(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.log.close()
            return
        # The process is to end within seconds, also where the store does not answer.
        thread = threading.Thread(target=self.log.close, daemon=True)
        thread.start()
        thread.join(1.0)

    def _abandon(self, late: bool) -> None:
        """Keep what is on its way to the store, and let the rest go."""
        import ray

        writing = [actor for actor in self.pool.actors if actor.writing and not actor.calls]
        for actor in writing:
            self._call(actor, "flush")
        if self.calls:
            ray.wait(list(self.calls), num_returns=len(self.calls), timeout=2.0)
        if late:
            say(
                f"simulate: simulate.max_seconds={self.options.max_seconds:g} is up, with "
                f"{self.dataset.stored().rows:,} simulations"
            )

    # ---- giving out work ----

    def _useful(self) -> int:
        """How many actors could be busy now."""
        busy = sum(not actor.idle for actor in self.pool.actors)
        most = 100_000
        left = self.backlog.rows(most) if self._divisible() else min(len(self.backlog), most)
        left += len(self.whole)
        if left or not busy:
            return min(most, busy + left)
        # The rows of running calls may be shared.
        idle = len(self.pool.actors) - busy + len(self.pool.starting)
        return busy + (idle if self._surrendering() or self._to_share() else 0)

    def _divisible(self) -> bool:
        """Whether the rows of a shard can be simulated apart from each other."""
        return not self.form.batched or self.options.batch_size is not None

    def _hand_out(self) -> None:
        actors = [actor for actor in self.pool.actors if not actor.retiring]
        quick = 0 < self.simulated_s < _QUICK_S * self.simulated_calls
        depth = 2 if quick and len(self.backlog) > 4 * len(actors) else 1
        for level in range(1, depth + 1):
            for actor in actors:
                if len(actor.calls) >= level:
                    continue
                if self.whole:
                    shard = self.whole.pop()
                    parts = _tiles(self.parts[shard], shard.size)
                    assert parts is not None
                    whole = Piece(shard, 0, shard.size)
                    self._call(actor, "assemble", shard, *parts, piece=whole)
                elif (piece := self.backlog.take()) is not None:
                    if self.isolate and not piece.isolate:
                        piece = Piece(piece.shard, piece.start, piece.stop, isolate=True)
                    self._call(actor, "simulate", piece, piece=piece)
        for actor in list(self.pool.actors):
            if actor.writing and not actor.calls:
                self._call(actor, "flush")
            elif actor.retiring and actor.idle:
                self.pool.end(actor)
        if not len(self.backlog) and not self._surrendering() and not self._to_share():
            self.pool.release_idle()

    def _call(self, actor: Actor, method: str, *arguments: Any, **call: Any) -> None:
        reference = self.pool.call(actor, method, *arguments, **call)
        self.calls[reference] = actor.calls[reference]

    # ---- sharing the last shards ----

    def _to_share(self) -> list[tuple[float, Any, Call]]:
        """Running calls whose rows are worth sharing: seconds left, reference, call."""
        now = time.monotonic()
        mean = self.simulated_s / self.simulated_rows if self.simulated_rows else None
        found = []
        for reference, call in self.calls.items():
            piece = call.piece
            if call.method != "simulate" or call.cancelled or piece is None:
                continue
            if len(piece) <= self._step():
                continue
            ran = now - call.since
            left = ran if mean is None else max(len(piece) * mean - ran, 0.5 * ran)
            isolated = piece.isolate or self.options.timeout_s is not None
            if left > (_WORTH_A_PROCESS_S if isolated else _WORTH_SHARING_S):
                found.append((left, reference, call))
        return sorted(found, key=lambda each: -each[0])

    def _surrendering(self) -> int:
        """Calls whose rows were asked for, and are not back yet."""
        return sum(call.method == "surrender" for call in self.calls.values())

    def _step(self) -> int:
        """Rows that can't be parted."""
        if not self.form.batched:
            return 1
        return self.options.batch_size or 10**9

    def _share(self) -> None:
        """When there is nothing else to do, ask busy actors for the rows they have not begun."""
        import ray

        idle = sum(actor.idle and not actor.retiring for actor in self.pool.actors)
        if len(self.backlog) or self.whole or not idle:
            return
        idle -= self._surrendering()
        for _, reference, call in self._to_share()[: max(idle, 0)]:
            call.cancelled = True
            ray.cancel(reference)
            self._call(call.actor, "surrender", call.piece, piece=call.piece)

    def _divide(self, piece: Piece) -> list[Piece]:
        """A piece in as many as there are actors for."""
        step = self._step()
        free = sum(
            not any(call.method == "simulate" for call in actor.calls.values())
            for actor in self.pool.actors
            if not actor.retiring
        )
        steps = -(-len(piece) // step)
        count = max(1, min(steps, free))
        bounds = [piece.start + step * (steps * number // count) for number in range(count)]
        stops = [*bounds[1:], piece.stop]
        return [
            Piece(piece.shard, start, stop, piece.isolate)
            for start, stop in zip(bounds, stops, strict=True)
        ]

    # ---- taking in what was done ----

    def _collect(self, reference: Any) -> None:
        import ray

        if reference in self.pool.starting:
            self.pool.started(reference)
            return
        call = self.calls.get(reference)
        if call is None:  # of an actor that died
            return
        try:
            answer = ray.get(reference)
        except deaths() as error:
            self._replace(call.actor, error)
            return
        except ray.exceptions.TaskCancelledError:
            self._forget(reference, call)  # its rows come by the call to surrender
            return
        except ray.exceptions.ObjectLostError:
            # Parts that were on a node that is gone.
            self._forget(reference, call)
            if call.piece is not None:
                say(
                    f"simulate: rows of shard {call.piece.shard.index} went with their node and "
                    "are simulated again"
                )
            self._again([call.piece])
            return
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, (InputError, StageError)):
                raise cause from None
            what = f"shard {call.piece.shard.index}" if call.piece else "a shard"
            raise StageError(f"{what} could not be simulated: {cause}") from error
        self._forget(reference, call)
        self._take_in(call, answer)

    def _forget(self, reference: Any, call: Call) -> None:
        del self.calls[reference]
        del call.actor.calls[reference]
        call.actor.idle_since = time.monotonic()

    def _take_in(self, call: Call, answer: Answer) -> None:
        actor, piece = call.actor, call.piece
        for record, by_other in answer.stored:
            self._land(record, by_other, actor)
        if call.method in ("simulate", "surrender") and piece is not None and not call.cancelled:
            self._advance(call, piece, answer)
        elif call.method == "flush" and actor.writing:
            # Lost in a call that failed or was cancelled.
            lost, actor.writing = actor.writing, []
            self._again(list(lost))
        if answer.too_large and not actor.retiring:
            actor.retiring = True
            say(
                f"simulate: an actor holds {answer.held_bytes / 1e9:.3g} GB and is replaced "
                "(does the simulator leak memory?)"
            )

    def _advance(self, call: Call, piece: Piece, answer: Answer) -> None:
        """Rows of a piece were simulated."""
        done = answer.reached - piece.start
        if call.method == "simulate":
            self.simulated_rows += done
            self.simulated_s += answer.seconds
            self.simulated_calls += 1
        if piece.shard.index in self.finished:
            return
        if piece.whole and answer.reached == piece.stop:
            call.actor.writing.append(piece)
            return
        if done:
            parts = self.parts.setdefault(piece.shard, {})
            parts[piece.start] = (answer.reached, call.rows)
            if piece.shard not in self.whole and _tiles(parts, piece.shard.size):
                self.whole.append(piece.shard)
        if answer.reached < piece.stop:
            rest = Piece(piece.shard, answer.reached, piece.stop, piece.isolate)
            self.parts.setdefault(piece.shard, {})
            self.backlog.give_back(self._divide(rest))

    def _land(self, record: ShardRecord, by_other: bool, actor: Actor) -> None:
        """A shard is in the store."""
        actor.writing = [each for each in actor.writing if each.shard.index != record.index]
        if record.index in self.finished:
            return
        self._finish_shard(record)
        self.log.add(record)
        if not by_other:
            self.live.landed(record)
        if record.statuses.get("crashed") and not self.isolate:
            self.isolate = True
            say(
                "simulate: the simulator ends its process at some parameters; from now on it runs "
                "in a process of its own beside its actor"
            )
        if by_other:
            self._leave_to_others()

    def _finish_shard(self, record: ShardRecord) -> None:
        self.finished.add(record.index)
        self.rows += record.rows
        self.failures.add(record)
        # Nobody waits for parts of it any more.
        self.parts = {
            shard: parts for shard, parts in self.parts.items() if shard.index != record.index
        }
        self.whole = [shard for shard in self.whole if shard.index != record.index]

    def _leave_to_others(self) -> None:
        """Another driver is at work on the same shards: see what it has done, and go elsewhere."""
        if time.monotonic() - self.looked >= _LOOK_AGAIN_S:
            self.looked = time.monotonic()
            records = self.dataset.stored().records
            for index in records.keys() - self.finished:
                self._finish_shard(records[index])
            self.backlog.drop(self.finished)
        self.backlog.jump()

    # ---- deaths ----

    def _replace(self, actor: Actor, error: Exception) -> None:
        """An actor died: its pieces are simulated again, by others."""
        running = next(
            (call.piece for call in actor.calls.values() if call.method != "flush"), None
        )
        lost = [call.piece for call in actor.calls.values() if not call.cancelled]
        lost += actor.writing
        for reference in list(actor.calls):
            del self.calls[reference]
        self.pool.end(actor)
        self.live.died()
        if running is None:
            self._again(lost)
            return
        index = running.shard.index
        self.deaths[index] += 1
        say(
            f"simulate: an actor died at shard {index} ({self.deaths[index]} time(s)); what it had "
            "not stored is simulated again"
        )
        if self.deaths[index] >= _DEATHS_BEFORE_STOP:
            raise StageError(
                f"shard {index} has ended its actor {_DEATHS_BEFORE_STOP} times, in a process of "
                f"its own as well ({error}); the finished shards are kept"
            ) from error
        self._again(lost, isolate=running)

    def _again(self, pieces: list[Piece | None], isolate: Piece | None = None) -> None:
        """Put lost pieces back; the one that ran when its actor died in a process of its own."""
        back = {}
        for piece in pieces:
            if piece is None or piece.shard.index in self.finished:
                continue
            shard = piece.shard
            if piece.whole and shard in self.parts:
                # Its parts were being put together; they may be gone.
                del self.parts[shard]
                self.whole = [each for each in self.whole if each != shard]
            alone = piece.isolate or piece is isolate
            back[shard.index, piece.start] = Piece(shard, piece.start, piece.stop, alone)
        self.backlog.give_back(back.values())


def _tiles(parts: dict[int, tuple[int, Any]], size: int) -> list[Any] | None:
    """References to the parts that make up a shard, in order; None while rows are missing."""
    row, references = 0, []
    while row < size:
        if row not in parts:
            return None
        row, reference = parts[row]
        references.append(reference)
    return references
