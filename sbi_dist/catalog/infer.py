"""Posterior draws of a catalog as Parquet parts in the store.

A part is the unit of work: a range of the catalog, written once. Draws depend on the model, the
observation and the seed, not on the parts; a run that was killed takes up the missing parts.
"""

from __future__ import annotations

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
from sbi_dist.errors import StageError
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.progress import Progress
from sbi_dist.session import connected
from sbi_dist.store import ObjectStore, open_store

__all__ = ["MANIFEST", "infer", "read_draws"]

MANIFEST = "manifest.json"
_PART_BYTES = 32 * 1024**2


def infer(
    posterior: Posterior,
    model: ObjectStore,
    catalog: Catalog,
    options: InferOptions,
    target: ObjectStore,
    address: str | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Draw from the posterior of every observation of a catalog; the manifest.

    Parts are ``part-000000.parquet`` and so on in catalog order, with columns ``observation_id``,
    ``status`` and ``draws`` (num_samples, D) float32, which are NaN for an observation without a
    posterior. A catalog of one part is drawn here, one of several on Ray.
    """
    content = {
        "catalog": catalog.name,
        "model": posterior.identity,
        "observations": len(catalog.ids),
        "num_samples": options.num_samples,
        "seed": options.seed,
        "parameter_names": posterior.parameter_names,
        "rows_per_part": _rows_per_part(options.num_samples, posterior),
        "statuses": dict(Counter(catalog.status)),
    }
    if target.exists(MANIFEST) and json.loads(target.get(MANIFEST)) == content:
        return content
    rows = content["rows_per_part"]
    starts = range(0, len(catalog.ids), rows)
    missing = [start for start in starts if not target.exists(_key(start // rows))]
    done = len(catalog.ids) - sum(min(rows, len(catalog.ids) - start) for start in missing)
    with Progress(
        "infer", len(catalog.ids), "observations", done, show_progress and len(starts) > 1
    ) as progress:
        if len(missing) == 1:
            start = missing[0]
            data = _encode_part(posterior, _slice(catalog, start, rows), options)
            target.put_if_absent(_key(start // rows), data)
        elif missing:
            with connected(address):
                _on_ray(model, catalog, missing, rows, options, target, progress, done)
    target.put(MANIFEST, json.dumps(content, indent=2, sort_keys=True).encode())
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


def _encode_part(posterior: Posterior, part: Catalog, options: InferOptions) -> bytes:
    """The draws of a part's observations as Parquet."""
    size = posterior.estimator.num_parameters
    draws = np.full((len(part.ids), options.num_samples, size), np.nan, dtype=np.float32)
    usable = part.usable
    if len(usable):
        x = torch.from_numpy(part.x[usable])
        theta = posterior.sample_batched((options.num_samples,), x, seed=options.seed)
        draws[usable] = theta.transpose(0, 1).numpy()
    table = pa.table(
        {
            "observation_id": pa.array(part.ids, pa.string()),
            "status": pa.array(part.status, pa.string()),
            "draws": pa.FixedShapeTensorArray.from_numpy_ndarray(draws),
        }
    ).replace_schema_metadata({"parameter_names": json.dumps(posterior.parameter_names)})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none")
    return sink.getvalue()


class PartWriter:
    """Holds the model and writes parts. A plain class; the driver makes Ray actors of it."""

    def __init__(self, model_uri: str, target_uri: str, options: InferOptions) -> None:
        torch.set_num_threads(1)
        self._posterior = Posterior.load(model_uri)
        self._target, self._options = open_store(target_uri), options

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
    idle = [actor_class.remote(model.uri, target.uri, options) for _ in range(count)]
    actors, running, queue = list(idle), {}, list(reversed(missing))
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
                    replacement = actor_class.remote(model.uri, target.uri, options)
                    actors.append(replacement)
                    idle.append(replacement)
    finally:
        for actor in actors:
            ray.kill(actor)


def read_draws(target: ObjectStore, most: int | None = None) -> tuple[list[str], list[str], Any]:
    """Ids, statuses and draws (B, num_samples, D) of the first ``most`` observations (all)."""
    ids: list[str] = []
    statuses: list[str] = []
    draws = []
    for key in target.list("part-"):
        table = pq.read_table(io.BytesIO(target.get(key)))
        if most is not None:
            table = table.slice(0, most - len(ids))
        ids += table["observation_id"].to_pylist()
        statuses += table["status"].to_pylist()
        draws.append(table["draws"].combine_chunks().to_numpy_ndarray())
        if most is not None and len(ids) >= most:
            break
    return ids, statuses, np.concatenate(draws)
