"""The driver of a catalog: keeps actors busy with parts until all are in the store.

The actors are those of the infer stage, or of another one whose work comes in such parts. It holds
records about parts, never their draws. Of a catalog that the actors can't read, it sends them the
rows of a part at a time.
"""

from __future__ import annotations

import collections
import contextlib
import time
from typing import Any, Protocol

from sbi_dist.catalog.actor import CatalogActor
from sbi_dist.catalog.live import Live
from sbi_dist.catalog.plan import Part
from sbi_dist.errors import InputError, StageError
from sbi_dist.progress import say
from sbi_dist.simulation.pool import Actor, ActorPool, Call, deaths

__all__ = ["draw_on_ray"]

_DEATHS_BEFORE_STOP = 4


class Divisible(Protocol):
    """A catalog, or what else is read by ranges; see ``Source``."""

    remote: bool
    on_disk: bool

    def read(self, start: int, stop: int) -> Any: ...

    def check(self) -> None: ...


class StageOptions(Protocol):
    """What the options of a stage say of its actors."""

    @property
    def actors(self) -> int | None: ...

    def resources(self) -> dict[str, float]: ...


def draw_on_ray(
    missing: list[Part],
    source: Divisible,
    options: StageOptions,
    arguments: tuple[Any, ...],
    live: Live,
    stage: str = "infer",
    kind: type = CatalogActor,
) -> None:
    """Have actors write the missing parts. Ray must be connected.

    Args:
        missing: the parts, which are begun in this order.
        source: the catalog.
        options: of the stage.
        arguments: of the actors, all but the last one.
        live: is told of the parts that land, and at least every second.
        stage: its name.
        kind: class of the actors, with the methods of ``CatalogActor``.

    Raises:
        InputError: the cluster is too small, or the store refuses.
        StageError: a part keeps ending its actors, the catalog was changed, or the store fails.
    """
    arguments = (*arguments, source if source.on_disk else None)
    pool = ActorPool(stage, kind, arguments, options.resources(), options.actors)
    run = _Run(missing, source, pool, live, stage)
    with contextlib.closing(run.pool):
        run.finish()


class _Run:
    """One run of the loop: the actors and what is left to do."""

    def __init__(
        self,
        missing: list[Part],
        source: Divisible,
        pool: ActorPool,
        live: Live,
        stage: str,
    ) -> None:
        self._source, self.pool, self._live, self._stage = source, pool, live, stage
        self._left = collections.deque(missing)
        self._calls: dict[Any, Call] = {}
        self._deaths: collections.Counter[int] = collections.Counter()
        self._finished: set[int] = set()

    def finish(self) -> None:
        """Run until no part is missing."""
        import ray

        while self._left or any(not actor.idle for actor in self.pool.actors):
            busy = sum(not actor.idle for actor in self.pool.actors)
            self.pool.staff(busy + len(self._left))
            self._hand_out()
            waiting = [*self.pool.starting, *self._calls]
            if not waiting:
                time.sleep(0.1)
            else:
                ready, _ = ray.wait(waiting, num_returns=1, timeout=1.0, fetch_local=False)
                for reference in ready:
                    self._collect(reference)
            self._live.landed()

    def _hand_out(self) -> None:
        for actor in self.pool.actors:
            if actor.calls:
                continue
            if self._left:
                part = self._left.popleft()
                self._call(actor, "draw", part, self._rows(part), piece=part)
            elif actor.writing:
                self._call(actor, "flush")
        if not self._left:
            self.pool.release_idle()

    def _rows(self, part: Part) -> Any:
        """The rows of a part, where the actors can't read them."""
        source = self._source
        # Of a file of this machine, when there are others; they may have come since the start.
        if source.remote or (source.on_disk and _nodes() == 1):
            return None
        rows = source.read(part.start, part.stop)
        source.check()
        return rows

    def _call(self, actor: Actor, method: str, *arguments: Any, **call: Any) -> None:
        reference = self.pool.call(actor, method, *arguments, **call)
        self._calls[reference] = actor.calls[reference]

    def _collect(self, reference: Any) -> None:
        import ray

        if reference in self.pool.starting:
            self.pool.started(reference)
            return
        call = self._calls.get(reference)
        if call is None:  # of an actor that died
            return
        try:
            records, _ = ray.get(reference)
        except deaths() as error:
            self._replace(call.actor, error)
            return
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, (InputError, StageError)):
                raise cause from None
            what = _named(call.piece) if call.piece else "a part"
            raise StageError(
                f"{self._stage}: {what} could not be drawn ({type(cause).__name__}: {cause}); the "
                "finished parts are kept"
            ) from error
        del self._calls[reference]
        actor = call.actor
        del actor.calls[reference]
        actor.idle_since = time.monotonic()
        stored = {record.number for record in records}
        if call.piece is not None:
            actor.writing.append(call.piece)
        actor.writing = [part for part in actor.writing if part.number not in stored]
        for record in records:
            if record.number not in self._finished:
                self._finished.add(record.number)
                self._live.landed(record)

    def _replace(self, actor: Actor, error: Exception) -> None:
        """An actor died: its parts are drawn again, by others."""
        running = [call.piece for call in actor.calls.values() if call.piece is not None]
        lost = [*actor.writing, *running]
        for reference in actor.calls:
            del self._calls[reference]
        self.pool.end(actor)
        self._live.died()
        for part in running:
            self._deaths[part.number] += 1
            if self._deaths[part.number] >= _DEATHS_BEFORE_STOP:
                raise StageError(
                    f"{self._stage}: {_named(part)} has ended its actor {_DEATHS_BEFORE_STOP} "
                    f"times ({_first_line(error)}); the finished parts are kept, run the command "
                    "again to go on"
                ) from error
            say(
                f"{self._stage}: an actor died at {_named(part)}; what it had not stored is drawn "
                "again"
            )
        self._left.extendleft(part for part in reversed(lost) if part.number not in self._finished)


def _nodes() -> int:
    import ray

    return sum(bool(node.get("Alive")) for node in ray.nodes())


def _first_line(error: Exception) -> str:
    # Ray goes on with the actor's particulars.
    return next((line for line in str(error).splitlines() if line.strip()), "no reason told")


def _named(part: Part) -> str:
    return f"part {part.number} (observations {part.start:,} to {part.stop - 1:,})"
