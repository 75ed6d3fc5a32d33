"""Posterior draws of a catalog as Parquet parts in the store.

A part is the unit of work: a range of the catalog, written once. Draws depend on the model, the
observation and the seed, not on the parts; a run that was killed takes up the missing parts.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sbi_dist.catalog.observations import Catalog
from sbi_dist.catalog.options import InferOptions
from sbi_dist.errors import InputError, StageError
from sbi_dist.posterior.importance import Weighted, importance_sample
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.problem import Problem
from sbi_dist.progress import Progress
from sbi_dist.session import connected
from sbi_dist.store import ObjectStore

__all__ = ["LEAST_SAMPLE_SIZE", "MANIFEST", "PREDICTIVE", "Draws", "infer", "read_draws"]

MANIFEST = "manifest.json"  # written last: the draws are complete
REQUEST = "request.json"  # written first
PREDICTIVE = "predictive.npy"  # simulations from the draws of the problem's own observation
_PART_BYTES = 32 * 1024**2
# Fewer effective draws than this do not describe a posterior.
LEAST_SAMPLE_SIZE = 100


def infer(
    posterior: Posterior,
    model: ObjectStore,
    catalog: Catalog,
    options: InferOptions,
    target: ObjectStore,
    problem: Problem | None = None,
    address: str | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Draw from the posterior of every observation of a catalog; the manifest.

    Parts are ``part-000000.parquet`` and so on in catalog order, with columns ``observation_id``,
    ``status``, ``effective_sample_size`` and ``draws`` (num_samples, D) float32, which are NaN for
    an observation without a posterior. A catalog of one part is drawn here, one of several on Ray.

    With ``options.proposals`` the draws are importance-resampled by the likelihood of ``problem``.
    Where that leaves too small an effective sample size, the observation's status is ``low_ess``
    and its draws are the model's own.
    """
    weighing = options.proposals is not None
    if weighing and (problem is None or problem.log_likelihood is None):
        raise InputError(
            "infer.proposals is set, but the problem has no log_likelihood to weigh draws with; "
            "leave it out, or give Problem(log_likelihood=...)"
        )
    content: dict[str, Any] = {
        "catalog": catalog.name,
        "model": posterior.identity,
        "observations": len(catalog.ids),
        "num_samples": options.num_samples,
        "seed": options.seed,
        "parameter_names": posterior.parameter_names,
        "proposals": options.proposals,
        "rows_per_part": _rows_per_part(options.num_samples, posterior),
        "statuses": dict(Counter(catalog.status)),
    }
    # What the parts are of is written before them: parts of two catalogs must not meet.
    text = json.dumps(content, indent=2, sort_keys=True).encode()
    if not target.put_if_absent(REQUEST, text) and target.get(REQUEST) != text:
        raise InputError(
            f"infer: {target.uri} holds draws of another catalog, model or setting; give another "
            "folder with --output"
        )
    if target.exists(MANIFEST):
        return content
    rows = content["rows_per_part"]
    starts = range(0, len(catalog.ids), rows)
    missing = [start for start in starts if not target.exists(_key(start // rows))]
    done = len(catalog.ids) - sum(min(rows, len(catalog.ids) - start) for start in missing)
    with Progress(
        "infer", len(catalog.ids), "observations", done, show_progress and len(starts) > 1
    ) as progress:
        if len(missing) == 1 or weighing:
            for start in missing:
                part = _slice(catalog, start, rows)
                data = _encode_part(posterior, part, options, problem if weighing else None)
                target.put_if_absent(_key(start // rows), data)
                progress.update(start + len(part.ids))
        elif missing:
            with connected(address):
                _on_ray(model, catalog, missing, rows, options, target, progress, done)
    target.put(MANIFEST, text)
    return content


def _key(part: int) -> str:
    return f"part-{part:06d}.parquet"


def _rows_per_part(num_samples: int, posterior: Posterior) -> int:
    row = num_samples * posterior.estimator.num_parameters * 4
    return max(1, min(100_000, _PART_BYTES // row))


def _slice(catalog: Catalog, start: int, rows: int) -> Catalog:
    stop = min(start + rows, len(catalog.ids))
    return Catalog(
        catalog.name,
        catalog.ids[start:stop],
        catalog.x[start:stop],
        catalog.status[start:stop],
    )


def _encode_part(
    posterior: Posterior, part: Catalog, options: InferOptions, problem: Problem | None = None
) -> bytes:
    """The draws of a part's observations as Parquet; weighed by ``problem`` where it is given."""
    size = posterior.estimator.num_parameters
    draws = np.full((len(part.ids), options.num_samples, size), np.nan, dtype=np.float32)
    sample_sizes = np.full(len(part.ids), np.nan, dtype=np.float32)
    statuses = list(part.status)
    usable = part.usable
    if len(usable):
        x = torch.from_numpy(part.x[usable])
        theta = posterior.sample_batched((options.num_samples,), x, seed=options.seed)
        draws[usable] = theta.transpose(0, 1).numpy()
    for row in usable if problem is not None else ():
        weighted = _weighted(posterior, part.x[row], options, problem)
        sample_sizes[row] = weighted.effective_sample_size
        if weighted.effective_sample_size < LEAST_SAMPLE_SIZE:
            statuses[row] = "low_ess"
        else:
            draws[row] = weighted.draws
    table = pa.table(
        {
            "observation_id": pa.array(part.ids, pa.string()),
            "status": pa.array(statuses, pa.string()),
            "effective_sample_size": pa.array(sample_sizes, pa.float32()),
            "draws": pa.FixedShapeTensorArray.from_numpy_ndarray(draws),
        }
    ).replace_schema_metadata({"parameter_names": json.dumps(posterior.parameter_names)})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none")
    return sink.getvalue()


def _weighted(
    posterior: Posterior, x: np.ndarray, options: InferOptions, problem: Problem | None
) -> Weighted:
    assert problem is not None and problem.log_likelihood is not None
    assert options.proposals is not None
    return importance_sample(
        posterior,
        problem.log_likelihood,
        problem.prior,
        x,
        options.num_samples,
        options.proposals,
        options.seed,
    )


class PartWriter:
    """Holds the model and writes parts. A plain class; the driver makes Ray actors of it."""

    def __init__(self, model: ObjectStore, target: ObjectStore, options: InferOptions) -> None:
        torch.set_num_threads(1)
        self._posterior = Posterior.from_store(model)
        self._target, self._options = target, options

    def write(self, number: int, part: Catalog) -> int:
        """Draw and store part ``number``; the number of its observations."""
        if not self._target.exists(_key(number)):
            data = _encode_part(self._posterior, part, self._options)
            self._target.put_if_absent(_key(number), data)
        return len(part.ids)


def _on_ray(
    model: ObjectStore,
    catalog: Catalog,
    missing: list[int],
    rows: int,
    options: InferOptions,
    target: ObjectStore,
    progress: Progress,
    done: int,
) -> None:
    import ray

    count = min(len(missing), max(1, math.floor(ray.cluster_resources().get("CPU", 1))))
    actor_class = ray.remote(num_cpus=1)(PartWriter)
    idle = [actor_class.remote(model, target, options) for _ in range(count)]
    actors, queue = list(idle), list(reversed(missing))
    running: dict[Any, tuple[Any, int]] = {}
    deaths = 0
    try:
        while queue or running:
            while queue and idle:
                start, actor = queue.pop(), idle.pop()
                task = actor.write.remote(start // rows, _slice(catalog, start, rows))
                running[task] = (actor, start)
            ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
            for task in ready:
                actor, start = running.pop(task)
                try:
                    done += ray.get(task)
                    idle.append(actor)
                    progress.update(done)
                except ray.exceptions.RayActorError as error:
                    deaths += 1
                    if deaths > 3 * count:
                        raise StageError(
                            f"infer: actors died {deaths} times ({error}); the finished parts are "
                            "kept, run the command again to go on"
                        ) from error
                    queue.append(start)
                    replacement = actor_class.remote(model, target, options)
                    actors.append(replacement)
                    idle.append(replacement)
    finally:
        for actor in actors:
            ray.kill(actor)


@dataclasses.dataclass(frozen=True)
class Draws:
    """Draws read back: of B observations, ``draws`` (B, num_samples, D) float32."""

    ids: list[str]
    statuses: list[str]
    effective_sample_sizes: np.ndarray
    draws: np.ndarray


def read_draws(target: ObjectStore, most: int | None = None) -> Draws:
    """The draws of the first ``most`` observations (default: all) of a catalog's folder."""
    tables: list[pa.Table] = []
    rows = 0
    for key in target.list("part-"):
        table = pq.ParquetFile(io.BytesIO(target.get(key))).read(use_threads=False)
        tables.append(table if most is None else table.slice(0, most - rows))
        rows += len(tables[-1])
        if most is not None and rows >= most:
            break
    table = pa.concat_tables(tables)
    return Draws(
        table["observation_id"].to_pylist(),
        table["status"].to_pylist(),
        table["effective_sample_size"].to_numpy(),
        table["draws"].combine_chunks().to_numpy_ndarray(),
    )
