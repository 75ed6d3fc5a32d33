"""The actors of a stage on Ray: as many as there is work and room for, replaced when they die."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Collection
from typing import Any

from sbi_dist.errors import StageError
from sbi_dist.growth import PATIENCE_S, tells
from sbi_dist.progress import duration, say
from sbi_dist.session import capacity, is_own, require

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
    piece: Any = None  # what it works on
    rows: Any = None  # reference to the rows that it returns
    since: float = dataclasses.field(default_factory=time.monotonic)
    cancelled: bool = False


@dataclasses.dataclass(eq=False)
class Actor:
    """An actor that is alive."""

    handle: Any
    calls: dict[Any, Call] = dataclasses.field(default_factory=dict)
    writing: list[Any] = dataclasses.field(default_factory=list)
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
        stage: its name, which its options are under.
        kind: the class that actors are made of; its method ``ready`` returns when one can work.
        arguments: of the class.
        resources: what one actor takes, by Ray's names.
        actors: how many at most; default: as many as there is room for.
        autoscale: whether to ask for more than there is room for.
        pairs: methods that return a second value, which stays where it is.

    Raises:
        InputError: the cluster has no room for the actors, and gets none.
        StageError: the nodes of its autoscaler did not start in time.
    """

    def __init__(
        self,
        stage: str,
        kind: type,
        arguments: tuple[Any, ...],
        resources: dict[str, float],
        actors: int | None = None,
        autoscale: bool = False,
        pairs: Collection[str] = (),
    ) -> None:
        import ray

        self._stage, self._arguments, self._pairs = stage, arguments, pairs
        self._most_actors, self._autoscale = actors, autoscale
        self._resources = dict(resources)
        needed = 1 if autoscale else actors or 1
        field = f"{stage}.actors" if actors and not autoscale else f"an actor of the {stage} stage"
        # Of an autoscaler that tells nothing nodes are expected, for a while: see `staff`.
        if not autoscale or is_own() or tells():
            require(resources, needed, field)
        resources = dict(resources)
        cpus, gpus = resources.pop("CPU", 0), resources.pop("GPU", 0)
        memory = int(resources.pop("memory", 0)) or None
        self._class = ray.remote(
            num_cpus=cpus,
            num_gpus=gpus,
            memory=memory,
            resources=resources or None,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )(kind)
        self.actors: list[Actor] = []
        self.starting: dict[Any, Any] = {}  # reference to its being ready -> handle
        self._limit = 0
        self._looked = -math.inf
        self._began = self._said = time.monotonic()
        self._had_one = False
        self._lost_at_start = 0

    def staff(self, useful: int) -> None:
        """Bring the number of actors to what is useful and what there is room for.

        Raises:
            StageError: no node for the first one was added in time.
        """
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
        if self.actors or not self.starting:
            return
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in self._resources.items())
        if self._autoscale and not self._had_one and now - self._began > PATIENCE_S:
            raise StageError(
                f"{self._stage}: no node with {wanted} free for an actor came within "
                f"{duration(PATIENCE_S)}; `ray status` tells what the cluster's autoscaler may "
                "add; ask for less, or run the command again when it can"
            )
        if now - self._said > _SAY_EVERY_S:
            self._said = now
            say(f"{self._stage}: waiting for the cluster to have {wanted} free for an actor")

    def _most(self, useful: int) -> int:
        if self._autoscale:
            return self._most_actors or useful
        # At least one, that waits for a node to come back.
        return min(max(1, capacity(self._resources)), self._most_actors or useful)

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
                    f"{self._stage}: the actors can't load what they need ({reason})"
                ) from error
            # Its node is gone; another one is started.
            self._lost_at_start += 1
            if self._lost_at_start >= _MOST_LOST_AT_START:
                raise StageError(
                    f"{self._stage}: {self._lost_at_start} actors died one after the other while "
                    f"they started ({error}); what is finished is kept, run the command again"
                ) from error
            return
        self._lost_at_start, self._had_one = 0, True
        self.actors.append(Actor(handle))

    def call(self, actor: Actor, method: str, *arguments: Any, **call: Any) -> Any:
        """Call a method of an actor; a reference to its answer."""
        remote = getattr(actor.handle, method)
        paired = method in self._pairs
        references = remote.options(num_returns=2 if paired else 1).remote(*arguments)
        answer, rows = references if paired else (references, None)
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
