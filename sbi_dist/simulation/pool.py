"""The simulator actors on Ray: as many as there is work and room for, replaced when they die."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

from sbi_dist.errors import StageError
from sbi_dist.progress import say
from sbi_dist.session import capacity, require
from sbi_dist.simulation.actor import Piece, SimulatorActor
from sbi_dist.simulation.options import SimulateOptions

__all__ = ["Actor", "ActorPool", "Call", "deaths"]

# How often the size of the cluster is looked at.
_LOOK_EVERY_S = 5.0
_SAY_EVERY_S = 30.0
_MOST_LOST_AT_START = 20
# An actor that has had nothing to do for so long gives its CPUs back.
_IDLE_S = 2.0


@dataclasses.dataclass(eq=False)
class Call:
    """A call of an actor that is under way."""

    actor: Actor
    method: str
    piece: Piece | None = None
    rows: Any = None  # reference to the rows that it returns
    since: float = dataclasses.field(default_factory=time.monotonic)
    cancelled: bool = False


@dataclasses.dataclass(eq=False)
class Actor:
    """A simulator actor that is alive."""

    handle: Any
    calls: dict[Any, Call] = dataclasses.field(default_factory=dict)
    writing: list[Piece] = dataclasses.field(default_factory=list)
    retiring: bool = False
    idle_since: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do, nor to write."""
        return not self.calls and not self.writing


def deaths() -> tuple[type[Exception], ...]:
    """What Ray raises for a call whose actor is gone."""
    from ray import exceptions

    # Ray ends processes itself on a node that runs out of memory.
    return (
        exceptions.RayActorError,
        exceptions.OutOfMemoryError,
        exceptions.NodeDiedError,
        exceptions.WorkerCrashedError,
    )


class ActorPool:
    """Starts and ends actors.

    Args:
        options: the stage's options.
        arguments: of the actor class.
    """

    def __init__(self, options: SimulateOptions, arguments: tuple[Any, ...]) -> None:
        import ray

        self._options, self._arguments = options, arguments
        resources = options.resources()
        self._resources = dict(resources)
        if not options.autoscale:
            count = options.actors or 1
            field = "simulate.actors" if options.actors else "an actor of the simulate stage"
            require(resources, count, field)
        cpus, gpus = resources.pop("CPU", 0), resources.pop("GPU", 0)
        memory = int(resources.pop("memory", 0)) or None
        self._class = ray.remote(
            num_cpus=cpus,
            num_gpus=gpus,
            memory=memory,
            resources=resources or None,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )(SimulatorActor)
        self.actors: list[Actor] = []
        self.starting: dict[Any, Any] = {}  # reference to its being ready -> handle
        self._limit = 0
        self._looked = -math.inf
        self._said = time.monotonic()
        self._lost_at_start = 0

    def staff(self, useful: int) -> None:
        """Bring the number of actors to what is useful and what there is room for."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY_S:
            self._looked = now
            self._limit = self._most(useful)
        target = min(useful, self._limit)
        there = sum(not actor.retiring for actor in self.actors)
        while there + len(self.starting) < target:
            handle = self._class.remote(*self._arguments)
            self.starting[handle.ready.remote()] = handle
        while self.starting and there + len(self.starting) > max(target, 1 if not there else 0):
            _, handle = self.starting.popitem()
            self._kill(handle)
        if not self.actors and self.starting and now - self._said > _SAY_EVERY_S:
            self._said = now
            wanted = ", ".join(f"{amount:g} {name}" for name, amount in self._resources.items())
            say(f"simulate: waiting for the cluster to have {wanted} free for an actor")

    def _most(self, useful: int) -> int:
        options = self._options
        if options.autoscale:
            return options.actors or useful
        # At least one, that waits for a node to come back.
        return min(max(1, capacity(self._resources)), options.actors or useful)

    def started(self, reference: Any) -> None:
        """An actor's ``ready`` call has ended.

        Raises:
            StageError: it can't load the problem.
        """
        import ray

        handle = self.starting.pop(reference)
        try:
            ray.get(reference)
        except deaths() as error:
            if "creation task" in str(error):
                reason = [line for line in str(error).splitlines() if line.strip()][-1].strip()
                raise StageError(
                    f"simulate: the actors can't load the problem ({reason})"
                ) from error
            # Its node is gone; another one is started.
            self._lost_at_start += 1
            if self._lost_at_start >= _MOST_LOST_AT_START:
                raise StageError(
                    f"simulate: {self._lost_at_start} actors died one after the other while they "
                    f"started ({error}); the finished shards are kept, run the command again"
                ) from error
            return
        self._lost_at_start = 0
        self.actors.append(Actor(handle))

    def call(self, actor: Actor, method: str, *arguments: Any, **call: Any) -> Any:
        """Call a method of an actor; a reference to its answer."""
        remote = getattr(actor.handle, method)
        references = remote.options(num_returns=_RETURNS[method]).remote(*arguments)
        answer, rows = references if _RETURNS[method] == 2 else (references, None)
        actor.calls[answer] = Call(actor, method, rows=rows, **call)
        return answer

    def end(self, actor: Actor) -> None:
        """End an actor, or forget one that has died."""
        self.actors.remove(actor)
        self._kill(actor.handle)

    def release_idle(self) -> None:
        """Give back what has had nothing to do for a while."""
        now = time.monotonic()
        for actor in [each for each in self.actors if each.idle]:
            if actor.retiring or now - actor.idle_since > _IDLE_S:
                self.end(actor)

    def close(self) -> None:
        """End all actors."""
        for handle in [actor.handle for actor in self.actors] + list(self.starting.values()):
            self._kill(handle)
        self.actors, self.starting = [], {}

    @staticmethod
    def _kill(handle: Any) -> None:
        import ray

        ray.kill(handle)


_RETURNS = {"simulate": 2, "surrender": 2, "flush": 1, "assemble": 1}
