"""What an actor of the infer stage does: read rows, draw, and store parts.

A plain class; the driver makes Ray actors of it, or uses it in its own process. Draws go from here
to the store, and only small records go back to the driver.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from sbi_dist.catalog.draw import Drawer
from sbi_dist.catalog.options import InferOptions
from sbi_dist.catalog.plan import Part
from sbi_dist.catalog.rows import Rows
from sbi_dist.catalog.source import Source
from sbi_dist.catalog.table import counts, encode, read_counts
from sbi_dist.errors import InputError
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.posterior.sampler import Sampler
from sbi_dist.problem import Problem
from sbi_dist.store import ObjectStore

__all__ = ["CatalogActor", "PartRecord", "PartWriter", "load_posterior"]


@dataclasses.dataclass(frozen=True)
class PartRecord:
    """What is known of a part that is in the store.

    Attributes:
        number: of the part.
        statuses: how many of its observations have each status.
        reason: why an observation failed, where one did in the process that tells.
    """

    number: int
    statuses: dict[str, int]
    reason: str = ""


class PartWriter:
    """Draws for the rows of parts and stores them.

    Args:
        posterior: the model.
        options: of the stage.
        target: folder of the parts.
        metadata: what every part says of itself.
        problem: to weigh draws by, if asked for.
    """

    def __init__(
        self,
        posterior: Posterior,
        options: InferOptions,
        target: ObjectStore,
        metadata: dict[str, Any],
        problem: Problem | None = None,
    ) -> None:
        self._draw = Drawer(posterior, options, problem)
        self._target, self._metadata = target, metadata

    def stored(self, part: Part) -> PartRecord | None:
        """The record of a part that is there already."""
        try:
            return PartRecord(part.number, read_counts(self._target, part.key))
        except KeyError:
            return None

    def prepare(self, part: Part, rows: Rows) -> Callable[[], PartRecord]:
        """Draw for a part's rows; a function that stores them and gives the record."""
        drawn = self._draw(rows)
        data, statuses = encode(drawn, self._metadata), counts(drawn)

        def put() -> PartRecord:
            if self._target.put_if_absent(part.key, data):
                return PartRecord(part.number, statuses, drawn.reason)
            return PartRecord(part.number, read_counts(self._target, part.key))

        return put


def load_posterior(model: ObjectStore, gpus: float, stage: str) -> Posterior:
    """The posterior of a model's folder, which draws on a GPU where there are any to use.

    Raises:
        InputError: there are none.
    """
    posterior = Posterior.from_store(model)
    if gpus:
        if not torch.cuda.is_available():
            raise InputError(
                f"{stage}.gpus_per_actor is {gpus:g}, but torch finds no GPU on the actor's "
                "machine; install a build of torch with CUDA, or use 0"
            )
        posterior.sampler = Sampler(posterior.estimator, "cuda")
    return posterior


class CatalogActor:
    """Writes parts of one catalog.

    Args:
        model: folder of the model.
        options: of the stage.
        target: folder of the parts.
        metadata: what every part says of itself.
        problem: pickled, where draws are weighed.
        source: the catalog; None where the driver sends all rows.
    """

    def __init__(
        self,
        model: ObjectStore,
        options: InferOptions,
        target: ObjectStore,
        metadata: dict[str, Any],
        problem: bytes | None,
        source: Source | None,
    ) -> None:
        torch.set_num_threads(max(1, int(options.cpus_per_actor)))
        posterior = load_posterior(model, options.gpus_per_actor, "infer")
        loaded = None if problem is None else pickle.loads(problem)
        self._writer = PartWriter(posterior, options, target, metadata, loaded)
        self._source = source
        # A part is written while the next one is drawn.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sbi-dist-put")
        self._writing: Future[PartRecord] | None = None

    def ready(self) -> int:
        """Process id, once the model is loaded."""
        return os.getpid()

    def draw(self, part: Part, rows: Rows | None = None) -> tuple[list[PartRecord], float]:
        """Draw for a part and begin to store it.

        The records of what is in the store since the last call, and the seconds that this took.
        """
        began = time.perf_counter()
        record = self._writer.stored(part)
        if record is not None:
            # By another driver, or by an actor that died before it could say so.
            return [*self.flush()[0], record], time.perf_counter() - began
        if rows is None:
            assert self._source is not None
            rows = self._source.read(part.start, part.stop)
            self._source.check()
        put = self._writer.prepare(part, rows)
        landed, _ = self.flush()
        self._writing = self._thread.submit(put)
        return landed, time.perf_counter() - began

    def flush(self) -> tuple[list[PartRecord], float]:
        """Wait for what is being written."""
        if self._writing is None:
            return [], 0.0
        writing, self._writing = self._writing, None
        return [writing.result()], 0.0
