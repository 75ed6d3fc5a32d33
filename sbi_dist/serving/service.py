"""The service without HTTP: models, the queue, and what comes of questions.

A question becomes pieces of about a batch's cost. A large one has only a few of them in the queue
at a time, and makes no more than its reader takes, so that memory is bounded and others have their
turns between.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable

import numpy as np

from sbi_dist import metrics
from sbi_dist.catalog.rows import ABOUT_X, FAILED, STATUSES, Rows
from sbi_dist.serving.answer import Block, bytes_of, columns_of, slices
from sbi_dist.serving.drawing import Columns, Drawing, compute, summary_of
from sbi_dist.serving.models import Model, Models
from sbi_dist.serving.options import ServeOptions
from sbi_dist.serving.question import Limits, Question
from sbi_dist.serving.queue import Batch, DrawQueue, Piece, Ticket, past_deadline
from sbi_dist.serving.refusal import Refusal
from sbi_dist.serving.tokens import Tokens
from sbi_dist.store import ObjectStore

__all__ = ["Memory", "Service"]

_log = logging.getLogger("sbi_dist.serving")

# Pieces of one request in the queue: one is computed while the other's result is sent.
_PIECES_AHEAD = 2
# What an observation costs beside its draws, in draws: its conditions, its share of a call.
_COST_OF_OBSERVATION = 16
_GAUGES_EVERY_S = 5.0
_SUSPICIOUS = 0.01  # p-value below which an observation counts as out of distribution
_MB = 1_000_000


class Service:
    """Answers questions about the posteriors of one experiment's models.

    Args:
        store: the experiment's folder.
        experiment: its name, for the metrics.
        options: of the stage.
        replica: names this process in the metrics.
        device: where to compute.
    """

    def __init__(
        self,
        store: ObjectStore,
        experiment: str,
        options: ServeOptions,
        replica: str = "0",
        device: str = "cpu",
    ) -> None:
        self.options, self.experiment, self._replica = options, experiment, replica
        self.limits = Limits(options.max_observations, options.max_draws, options.max_total_draws)
        self.tokens = None if options.tokens_file is None else Tokens(options.tokens_file)
        self.models = Models(
            store,
            memory_mb=options.models_memory_mb,
            largest_model_mb=options.largest_model_mb,
            refresh_s=options.refresh_s,
            device=device,
            threads=max(1, int(options.cpus_per_replica)),
            on_event=self._loaded,
        )
        self.queue = DrawQueue(
            compute, options.max_wait_s, options.max_requests, watch=self._computed
        )
        self.memory = Memory(int(options.request_memory_mb * _MB))
        self._gauges: asyncio.Task[None] | None = None
        self._were_set: set[tuple[str, str, str]] = set()
        self._drawn: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self._waited: list[float] = []
        self._requests: collections.Counter[tuple[str, str]] = collections.Counter()
        self._request_s: dict[str, list[float]] = {}

    async def start(self) -> None:
        """Load and warm the promoted model, and begin to work."""
        await self.models.start()
        self.queue.start()
        self._gauges = asyncio.create_task(self._export())

    async def close(self) -> None:
        """End the work."""
        if self._gauges is not None:
            self._gauges.cancel()
        self.flush()
        await self.queue.close()
        await self.models.close()

    @property
    def is_ready(self) -> bool:
        """Whether a promoted model can be asked."""
        return self.queue.alive and self.models.promoted is not None

    async def model(self, name: str, deadline: float) -> Model:
        """The model of that id, or the promoted one.

        Raises:
            Refusal: there is none, it is not fit to be served, or it can't be had now.
        """
        ready = self.models.ready(name)
        if ready is not None:
            return ready
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await self.models.get(name)
        except TimeoutError:
            raise past_deadline() from None

    def cost(self, question: Question) -> float:
        """About as many draws as take the same time."""
        usable = len(question.rows.usable)
        return float(usable * (question.num_samples + _COST_OF_OBSERVATION))

    async def blocks(
        self, model: Model, question: Question, deadline: float
    ) -> AsyncIterator[Block]:
        """What comes of the observations, in their order, some at a time.

        Raises:
            Refusal: 503 too much is to be done; 504 the deadline is past.
        """
        rows, each = question.rows, self._rows_at_once(question)
        with self.queue.admitted(self.cost(question), deadline) as ticket:
            if len(rows) <= each:
                yield await self._block(model, question, rows, slice(None), ticket)
                return
            ahead: collections.deque[asyncio.Task[Block]] = collections.deque()
            left = slices(len(rows), each)
            try:
                while True:
                    while len(ahead) < _PIECES_AHEAD and (some := next(left, None)) is not None:
                        part = Rows(rows.ids[some], rows.x[some], rows.status[some])
                        work = self._block(model, question, part, some, ticket)
                        ahead.append(asyncio.create_task(work))
                    if not ahead:
                        return
                    yield await ahead.popleft()
            finally:
                for task in ahead:
                    task.cancel()

    async def block(self, model: Model, question: Question, deadline: float) -> Block:
        """All of it at once."""
        found = [block async for block in self.blocks(model, question, deadline)]
        if len(found) == 1:
            return found[0]
        names = found[0].columns
        columns = {name: np.concatenate([block.columns[name] for block in found]) for name in names}
        return Block(Rows.concatenate([block.rows for block in found]), columns)

    def is_small(self, question: Question) -> bool:
        """Whether an answer is one block."""
        return len(question.rows) <= self._rows_at_once(question)

    def _rows_at_once(self, question: Question) -> int:
        return max(1, int(self.queue.batch_cost // (question.num_samples + _COST_OF_OBSERVATION)))

    async def _block(
        self, model: Model, question: Question, rows: Rows, some: slice, ticket: Ticket
    ) -> Block:
        status, usable = rows.status.copy(), rows.usable
        found: Columns | None = None
        if len(usable):
            whole, theta = len(usable) == len(rows), question.theta
            if theta is not None:
                theta = (
                    np.broadcast_to(theta, (len(usable), *theta.shape[1:]))
                    if len(theta) == 1
                    else theta[some][usable]
                )
            drawing = Drawing(
                model.posterior,
                rows.x if whole else rows.x[usable],
                question.num_samples,
                question.seed,
                with_log_prob=question.with_log_prob,
                summarized=question.summarized,
                theta=theta,
            )
            found = await self._made(drawing, ticket)
        shapes = columns_of(question, model.posterior.estimator.num_parameters)
        columns = _in_place(found or {}, shapes | dict.fromkeys(ABOUT_X, ()), usable, len(rows))
        if found is None:
            status[usable] = FAILED
        else:
            if question.theta is None:
                first = found["mean" if question.summarized else "draws"]
                finite = np.isfinite(first.reshape(len(usable), -1)).all(axis=1)
            else:  # outside the support it is infinite
                finite = ~np.isnan(found["log_prob"]).all(axis=1)
            status[usable[~finite]] = FAILED
        self._tell(model, status, columns["out_of_distribution_p"])
        return Block(Rows(rows.ids, rows.x, status), columns)

    async def _made(self, drawing: Drawing, ticket: Ticket) -> Columns | None:
        """What is computed; None where these observations can't be drawn for."""
        count, most = drawing.count, int(self.queue.batch_cost)
        try:
            if drawing.theta is not None or count <= 2 * most:
                return await self._computed_piece(drawing, ticket)
            # Long: in ranges of the draws, so that others have their turns between.
            number = -(-count // most)
            ranges = list(slices(count, -(-count // number)))
            density = drawing.with_log_prob or drawing.summarized is not None
            parts: list[Columns] = []
            for some in ranges:
                part = dataclasses.replace(
                    drawing,
                    count=some.stop - some.start,
                    first=some.start,
                    with_log_prob=density,
                    summarized=None,
                )
                parts.append(await self._computed_piece(part, ticket))
            whole = dict(parts[0])
            for name in ("draws", "log_prob")[: 1 + density]:
                whole[name] = np.concatenate([part[name] for part in parts], axis=1)
            if drawing.summarized is not None:
                loop = asyncio.get_running_loop()
                return whole | await loop.run_in_executor(
                    None, summary_of, whole, drawing.summarized
                )
            return whole
        except (Refusal, MemoryError):
            raise
        except Exception as error:
            if len(drawing.x) > 1:
                return await self._halves(drawing, ticket)
            _log.warning("an observation can't be drawn for: %s: %s", type(error).__name__, error)
            return None

    async def _halves(self, drawing: Drawing, ticket: Ticket) -> Columns | None:
        """Each half alone, so that one bad observation fails alone; NaN where one can't be made."""
        half, parts = len(drawing.x) // 2, []
        for some in (slice(0, half), slice(half, None)):
            theta = drawing.theta if drawing.theta is None else drawing.theta[some]
            part = dataclasses.replace(drawing, x=drawing.x[some], theta=theta)
            parts.append((len(part.x), await self._made(part, ticket)))
        like = next((found for _, found in parts if found is not None), None)
        if like is None:
            return None
        return {
            name: np.concatenate(
                [
                    np.full((size, *values.shape[1:]), np.nan, np.float32)
                    if found is None
                    else found[name]
                    for size, found in parts
                ]
            )
            for name, values in like.items()
        }

    async def _computed_piece(self, drawing: Drawing, ticket: Ticket) -> Columns:
        cost = len(drawing.x) * (drawing.count + _COST_OF_OBSERVATION)
        return await self.queue.computed(Piece(ticket, drawing.key, cost, drawing))

    # ---- what is told ----

    def bytes_of(self, model: Model, question: Question) -> int:
        """Memory that an answer in one block takes."""
        return len(question.rows) * bytes_of(question, model.posterior.estimator.num_parameters)

    def count(self, operation: str, outcome: str, seconds: float) -> None:
        """Count a request that has ended."""
        self._requests[operation, outcome] += 1
        if outcome == "ok":
            self._request_s.setdefault(operation, []).append(seconds)

    def _tell(self, model: Model, status: np.ndarray, p: np.ndarray) -> None:
        for number, count in enumerate(np.bincount(status, minlength=len(STATUSES))):
            if count:
                self._drawn["sbi_serve_observations_total", model.id, STATUSES[number]] += int(
                    count
                )
        far = int(np.count_nonzero(p < _SUSPICIOUS))
        if far:
            self._drawn["sbi_serve_out_of_distribution_total", model.id, ""] += far

    def _loaded(self, outcome: str, _: str) -> None:
        metrics.add(
            "sbi_serve_model_loads_total", 1, {"experiment": self.experiment, "outcome": outcome}
        )

    def _computed(self, batch: Batch) -> None:
        of = {"experiment": self.experiment}
        self._waited += batch.waited
        key: tuple = batch.key  # type: ignore[assignment]
        model = next((each.id for each in self.models.loaded if id(each.posterior) == key[0]), "")
        labels = {**of, "model": model}
        self._drawn["sbi_serve_draws_total", model, ""] += int(batch.cost)
        metrics.add("sbi_serve_busy_seconds_total", batch.seconds, of)
        metrics.observe("sbi_serve_batch_draws", [batch.cost], labels)
        metrics.observe("sbi_serve_batch_pieces", [len(batch.waited)], labels)

    def flush(self) -> None:
        """Export what was counted: at intervals, as under a flood each export would be felt."""
        of = {"experiment": self.experiment}
        requests, self._requests = self._requests, collections.Counter()
        for (operation, outcome), amount in requests.items():
            labels = {**of, "operation": operation, "outcome": outcome}
            metrics.add("sbi_serve_requests_total", amount, labels)
        answered, self._request_s = self._request_s, {}
        for operation, seconds in answered.items():
            metrics.observe("sbi_serve_request_seconds", seconds, {**of, "operation": operation})
        counted, self._drawn = self._drawn, collections.Counter()
        for (name, model, status), amount in counted.items():
            labels = {"experiment": self.experiment, "model": model}
            if status:
                labels["status"] = status
            metrics.add(name, amount, labels)
        waited, self._waited = self._waited, []
        metrics.observe("sbi_serve_queue_seconds", waited, {"experiment": self.experiment})

    async def _export(self) -> None:
        while True:
            self.flush()
            self._set_gauges()
            await asyncio.sleep(_GAUGES_EVERY_S)

    def _set_gauges(self) -> None:
        of = {"experiment": self.experiment, "replica": self._replica}
        queue, models = self.queue, self.models
        metrics.set_gauge("sbi_serve_queued_draws", queue.queued, of)
        metrics.set_gauge("sbi_serve_queued_seconds", queue.queued / queue.rate, of)
        metrics.set_gauge("sbi_serve_requests_in_flight", queue.requests, of)
        metrics.set_gauge("sbi_serve_model_bytes", models.num_bytes, of)
        promoted = models.promoted
        now = {("sbi_serve_model_loaded", each.id, "") for each in models.loaded}
        if promoted is not None:
            now.add(("sbi_serve_model_promoted", promoted.id, ""))
            now.add(("sbi_serve_model_calibration", promoted.id, promoted.verdict))
        # One that is no more is 0 for once, and then forgotten.
        for name, model, verdict in now | self._were_set:
            labels = {"experiment": self.experiment, "model": model}
            labels |= {"verdict": verdict} if verdict else {"replica": self._replica}
            metrics.set_gauge(name, float((name, model, verdict) in now), labels)
        self._were_set = now


def _in_place(
    found: Columns, shapes: dict[str, tuple[int, ...]], usable: np.ndarray, rows: int
) -> Columns:
    """What was found for the usable ones of some rows, as columns of all; NaN elsewhere."""
    columns = {}
    for name, shape in shapes.items():
        if name in found and len(usable) == rows:
            columns[name] = np.ascontiguousarray(found[name], dtype=np.float32)
            continue
        columns[name] = np.full((rows, *shape), np.nan, np.float32)
        if name in found:
            columns[name][usable] = found[name]
    return columns


class Memory:
    """Bytes that bodies and answers may take together.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0

    def take(self, size: int) -> Callable[[], None]:
        """Take so many bytes; a function that gives them back.

        Raises:
            Refusal: 503 there is no room; 413 there never is.
        """
        if size > self.most:
            raise Refusal(
                413,
                "Request too large",
                f"the request needs {size / _MB:,.0f} MB of memory at once, and the service has "
                f"{self.most / _MB:,.0f}; divide it into several, or ask for a summary",
            )
        if self.used + size > self.most:
            raise Refusal(
                503,
                "Saturated",
                "the memory for requests is taken by others; try again later",
                retry_after=1.0,
            )
        self.used += size
        taken = size

        def give_back() -> None:
            nonlocal taken
            self.used -= taken
            taken = 0

        return give_back
