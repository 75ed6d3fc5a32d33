"""The models of a service: loaded when they are asked for, and the promoted one always.

All state is changed in the event loop; the store is read, and models are made, in threads. What is
in the store may be anyone's or may be out of reach: a model that was served goes on to be served.
No HTTP and no queue here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from sbi_dist.errors import InputError
from sbi_dist.serving.model import Model, load_model
from sbi_dist.serving.refusal import Refusal
from sbi_dist.serving.stored import Damaged, Stored, Tag, Unreachable, is_name
from sbi_dist.store import ObjectStore

__all__ = ["Model", "Models"]

_log = logging.getLogger("sbi_dist.serving")
_PROMOTED = "promoted"
_MB = 1e6
# How long a refusal stands without another look at the store; and while nothing has changed there.
_HOLD_S, _REMEMBER_S = 2.0, 600.0
_MOST_LOADING, _MOST_REFUSED = 64, 1000
# Loaded models, besides the promoted one, that are compared with the store each time.
_COMPARED = 3
_LONGEST_REASON = 300
T = TypeVar("T")
Identity = tuple[int, str]


@dataclasses.dataclass
class _Held:
    """A loaded model, and what in the store it was made of."""

    model: Model
    tag: Tag
    verdict: Identity | None


@dataclasses.dataclass
class _Refused:
    """Why a model can't be had, since when, and when that was last looked at."""

    refusal: Refusal
    tag: Tag | None
    since: float
    looked: float


class Models:
    """Models by id, in bounded memory, and the promoted one; to be used in one event loop.

    Args:
        store: of the experiment's folder.
        memory_mb: for all of them. The one used longest ago makes room, but never the promoted
            one, nor the one that was asked for last.
        largest_model_mb: weights of one; larger ones are not fetched.
        refresh_s: how often to look whether another model was promoted, or one was replaced.
        device, threads: of their samplers.
        on_event: called with ``ok``, ``refused`` or ``unreachable`` and the model's id after
            every load.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        memory_mb: float,
        largest_model_mb: float,
        refresh_s: float,
        device: str = "cpu",
        threads: int = 1,
        on_event: Callable[[str, str], None] | None = None,
    ) -> None:
        self._stored = Stored(store, largest_model_mb)
        self._most_bytes, self._refresh_s = memory_mb * _MB, refresh_s
        self._hold_s = min(refresh_s, _HOLD_S)
        self._device, self._threads = device, threads
        self._on_event = on_event or (lambda _outcome, _model: None)
        self._held: dict[str, _Held] = {}  # the one used longest ago comes first
        self._promoted: Model | None = None
        self._refused: dict[str, _Refused] = {}
        self._tasks: dict[str, asyncio.Future[Any]] = {}
        self._follower: asyncio.Task[None] | None = None
        # Loads take long, and looks may wait for the store: neither holds up the other.
        self._loads = ThreadPoolExecutor(1, "sbi-dist-load")
        self._looks = ThreadPoolExecutor(4, "sbi-dist-look")
        # Of promoted.json: its identity when it was read, the model named, what is wrong with it.
        self._note: Identity | None = None
        self._wanted: str | None = None
        self._note_problem: str | None = None
        self._problem: str | None = None
        self._unreachable = False
        self._looked = self._listed_at = -float("inf")
        self._names: list[str] | None = None
        self._turn = 0

    async def start(self) -> None:
        """Load the promoted model, if there is one, and follow what is promoted from now on."""
        await self._shared(_PROMOTED, self._look)
        self._follower = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Follow no more, and let go of all models."""
        tasks = [*self._tasks.values(), *([self._follower] if self._follower else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A thread that waits for a store is not waited for.
        for pool in (self._loads, self._looks):
            pool.shutdown(wait=False, cancel_futures=True)
        self._held.clear()
        self._promoted = None

    # ---- what there is ----

    @property
    def promoted(self) -> Model | None:
        """The promoted model that is served."""
        return self._promoted

    @property
    def promotion_problem(self) -> str | None:
        """Why the promoted model is not the one that ``promoted.json`` names."""
        return self._problem

    @property
    def loaded(self) -> list[Model]:
        """All models in memory, the one used last at the end."""
        return [held.model for held in self._held.values()]

    @property
    def num_bytes(self) -> int:
        """About how much memory they take."""
        return sum(held.model.num_bytes for held in self._held.values())

    def ready(self, name: str) -> Model | None:
        """The model of that id, or the ``promoted`` one, if it is loaded; counts as its use."""
        if name == _PROMOTED:
            return self._promoted
        held = self._held.pop(name, None)
        if held is None:
            return None
        self._held[name] = held
        return held.model

    async def get(self, name: str) -> Model:
        """The model of that id, or the ``promoted`` one, loaded if need be.

        Raises:
            Refusal: 404 there is none, 409 it is not fit to be served, 503 the store can't be
                reached or too many others are being loaded.
        """
        model = self.ready(name)
        if model is not None:
            return model
        if name == _PROMOTED:
            if time.monotonic() - self._looked >= self._hold_s:
                await self._shared(_PROMOTED, self._look)
            if self._promoted is None:
                raise self._none_promoted()
            return self._promoted
        if not is_name(name):
            raise _unknown(name)
        refused = self._refused.get(name)
        if refused is not None and time.monotonic() - refused.looked < self._hold_s:
            raise _again(refused.refusal)
        if len(self._tasks) >= _MOST_LOADING and _task_of(name) not in self._tasks:
            raise Refusal(503, "Busy", "too many models are being loaded; try again later", 2.0)
        outcome = await self._loaded(name)
        if isinstance(outcome, Refusal):
            raise _again(outcome)
        return outcome

    async def listed(self) -> list[dict[str, Any]]:
        """The models of the experiment, the promoted one first, and how they stand.

        Raises:
            Refusal: 503 where the store can't be reached and nothing is known of it.
        """
        if time.monotonic() - self._listed_at >= self._hold_s:
            await self._shared("list", self._list)
        if self._names is None and not self._held:
            raise _away()
        promoted = None if self._promoted is None else self._promoted.id
        names = {*(self._names or ()), *self._held}
        if self._wanted is not None:
            names.add(self._wanted)
        return [
            {
                "model": name,
                "promoted": name == promoted,
                "loaded": name in self._held,
                "refused": self._reason(name),
            }
            for name in sorted(names, key=lambda name: (name != promoted, name))
        ]

    def _reason(self, name: str) -> str | None:
        refused = self._refused.get(name)
        return None if refused is None or refused.refusal.status == 503 else refused.refusal.detail

    async def _list(self) -> None:
        try:
            known = set(self._names or ())
            self._names = await self._run(self._looks, self._stored.names, known)
        except Unreachable as error:
            _log.warning("models can't be listed: %s", error)
        self._listed_at = time.monotonic()

    # ---- loading ----

    async def _run(self, pool: Executor, work: Callable[..., T], *given: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *given)

    async def _shared(self, key: str, work: Callable[[], Any]) -> Any:
        """What the work gives: once for all who ask for it meanwhile, even if one asks no more."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.ensure_future(work())
            task.add_done_callback(lambda _: self._tasks.pop(key, None))
        return await asyncio.shield(task)

    async def _loaded(self, name: str) -> Model | Refusal:
        return await self._shared(_task_of(name), lambda: self._load(name))

    async def _load(self, name: str) -> Model | Refusal:
        """Load it, unless it is held or refused as it is in the store now."""
        tag: Tag | None = None
        try:
            tag = await self._run(self._looks, self._stored.tag, name)
            if tag is None:
                return self._refuse(name, _unknown(name), None)
            held, refused = self._held.get(name), self._refused.get(name)
            if held is not None and held.tag == tag:
                return held.model
            now = time.monotonic()
            if refused is not None and refused.tag == tag and now - refused.since < _REMEMBER_S:
                refused.looked = now
                return refused.refusal
            new = await self._run(self._loads, self._read, name, tag)
        except Unreachable as error:
            _log.warning("model %s can't be read: %s", name, error)
            self._on_event("unreachable", name)
            return self._refuse(name, _away(), None)
        except Damaged as error:
            refusal = _unfit(name, str(error))
            _log.warning("%s", refusal.detail)
            self._on_event("refused", name)
            return self._refuse(name, refusal, tag)
        self._refused.pop(name, None)
        self._hold(new)
        _log.info("model %s is loaded", name)
        self._on_event("ok", name)
        return new.model

    def _read(self, name: str, tag: Tag) -> _Held:
        """In the thread that loads."""
        text, weights = self._stored.files(name, tag)
        identity = self._stored.verdict_identity(name)
        verdict = None if identity is None else self._stored.verdict(name)
        try:
            model = load_model(name, text, weights, verdict, self._device, self._threads)
        except InputError as error:
            raise Damaged(str(error)) from None
        except BaseException as error:
            # No bundle ends the service: nor by memory, nor by what a library panics with.
            raise Damaged(f"it can't be loaded here ({type(error).__name__})") from None
        return _Held(model, tag, identity)

    def _refuse(self, name: str, refusal: Refusal, tag: Tag | None) -> Refusal:
        now = time.monotonic()
        self._refused.pop(name, None)
        self._refused[name] = _Refused(refusal, tag, now, now)
        while len(self._refused) > _MOST_REFUSED:
            del self._refused[next(iter(self._refused))]
        return refusal

    def _hold(self, new: _Held) -> None:
        name = new.model.id
        self._held.pop(name, None)
        self._held[name] = new
        if self._promoted is not None and self._promoted.id == name:
            self._promoted = new.model
        self._make_room(name)

    def _make_room(self, newest: str) -> None:
        kept = {newest, newest if self._promoted is None else self._promoted.id}
        for name in list(self._held):
            if self.num_bytes <= self._most_bytes:
                return
            if name not in kept:
                del self._held[name]

    # ---- following the store ----

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s)
            try:
                await self._shared(_PROMOTED, self._look)
            except Exception:  # what is served goes on
                _log.exception("looking for a newly promoted model failed")

    async def _look(self) -> None:
        """Take over what has changed in the store, as far as it is in order."""
        try:
            await self._look_at_promoted()
            for name in self._next_compared():
                await self._compare(name)
            self._unreachable = False
        except Unreachable as error:
            if not self._unreachable:
                _log.warning("the store can't be read, what is loaded is served: %s", error)
            # Each time: an alert looks whether it goes on.
            self._on_event("unreachable", self._wanted or _PROMOTED)
            self._unreachable = True
        finally:
            self._looked = time.monotonic()

    async def _look_at_promoted(self) -> None:
        note = await self._run(self._looks, self._stored.promoted_identity)
        if note is None and self._promoted is None:
            self._wanted = self._note_problem = None
        elif note is None:
            assert self._promoted is not None
            self._wanted = self._promoted.id
            self._note_problem = "models/promoted.json is gone; the model before is served on"
        elif note != self._note:
            try:
                self._wanted = await self._run(self._looks, self._stored.promoted)
                self._note_problem = None
            except Damaged as error:
                self._note_problem = str(error)
        self._note, problem, wanted = note, self._note_problem, self._wanted
        if wanted is not None and (self._promoted is None or self._promoted.id != wanted):
            outcome = self.ready(wanted) or await self._loaded(wanted)
            if isinstance(outcome, Model):
                self._promoted = outcome
                self._make_room(wanted)
                _log.info("model %s is promoted", wanted)
            else:
                problem = problem or outcome.detail
        if problem is not None and problem != self._problem:
            _log.warning("the promoted model: %s", problem)
        self._problem = problem

    def _next_compared(self) -> list[str]:
        """Models that may have been replaced: the promoted one, and a few others in turn."""
        promoted = None if self._promoted is None else self._promoted.id
        others = sorted(name for name in self._held if name != promoted)
        first = self._turn % max(1, len(others))
        self._turn = first + _COMPARED
        names = (others[first:] + others[:first])[:_COMPARED]
        return names if promoted is None else [promoted, *names]

    async def _compare(self, name: str) -> None:
        """Load a model again that was replaced, or read its verdict again."""
        held = self._held.get(name)
        if held is None:
            return
        bundle = await self._run(self._looks, self._stored.bundle_identity, name)
        verdict = await self._run(self._looks, self._stored.verdict_identity, name)
        if bundle is None:
            if self._held.get(name) is held and held.model is not self._promoted:
                del self._held[name]  # withdrawn
        elif bundle != held.tag[0]:
            await self._loaded(name)
        elif verdict != held.verdict:
            found = (
                None
                if verdict is None
                else await self._run(self._looks, self._stored.verdict, name)
            )
            if self._held.get(name) is held:
                promoted = held.model is self._promoted
                held.model, held.verdict = held.model.judged(found), verdict
                self._promoted = held.model if promoted else self._promoted

    def _none_promoted(self) -> Refusal:
        refused = self._refused.get(self._wanted or "")
        if refused is not None:
            return _again(refused.refusal)
        if self._unreachable:
            return _away()
        reason = self._problem or "no model is promoted yet; train one, or name a model by its id"
        return Refusal(404, "Unknown model", reason)


def _task_of(name: str) -> str:
    return f"model {name}"


def _unknown(name: str) -> Refusal:
    return Refusal(
        404, "Unknown model", f"there is no model {name[:100]!r}; GET /v1/models lists them"
    )


def _unfit(name: str, reason: str) -> Refusal:
    words = " ".join(reason.split())
    if len(words) > _LONGEST_REASON:
        words = f"{words[: _LONGEST_REASON - 3]}..."
    return Refusal(
        409, "Model refused", f"model {name} is not fit to be served: {words}; ask for another"
    )


def _away() -> Refusal:
    return Refusal(
        503,
        "Store unavailable",
        "the store that models are kept in does not answer; models that are loaded are served, "
        "others later",
        retry_after=5.0,
    )


def _again(refusal: Refusal) -> Refusal:
    """A copy: one that is raised keeps what it was raised in."""
    return Refusal(refusal.status, refusal.title, refusal.detail, refusal.retry_after)
