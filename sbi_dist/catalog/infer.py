"""The infer stage: posterior draws of a catalog as Parquet parts in the store.

A part is the unit of work: a range of the catalog, written once. Draws depend on the model, the
observation and the seed, not on the parts; a run that was killed takes up the missing parts.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sbi_dist.catalog.actor import PartRecord, PartWriter
from sbi_dist.catalog.draw import Drawer
from sbi_dist.catalog.live import Live, with_posterior
from sbi_dist.catalog.options import InferOptions
from sbi_dist.catalog.plan import Part, check_size, parts, rows_per_part
from sbi_dist.catalog.source import Source
from sbi_dist.catalog.table import read_counts
from sbi_dist.errors import InputError, StageError
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.problem import Problem
from sbi_dist.progress import Progress, say
from sbi_dist.session import connected
from sbi_dist.store import ObjectStore

__all__ = ["FORMAT", "MANIFEST", "PREDICTIVE", "infer"]

# Changes when the parts of the same request are others than before.
FORMAT = 2
MANIFEST = "manifest.json"  # written last: the results are complete
REQUEST = "request.json"  # written first
PREDICTIVE = "predictive.npy"  # simulations from the draws of the problem's own observation
_READERS = 16


def infer(
    posterior: Posterior,
    model: ObjectStore,
    source: Source,
    options: InferOptions,
    target: ObjectStore,
    problem: Problem | None = None,
    address: str | None = None,
    show_progress: bool = True,
    experiment: str = "",
) -> dict[str, Any]:
    """Draw from the posterior of every observation of a catalog; the manifest.

    Parts are ``part-000000.parquet`` and so on in catalog order. Their columns are
    ``observation_id``, ``status``, and those of ``Drawn``. A catalog of one part is drawn for
    here, one of several on Ray.

    With ``options.proposals`` the draws are importance-resampled by the likelihood of ``problem``.
    Where that leaves too small an effective sample size, the observation's status is ``low_ess``
    and its draws are the model's own.

    Raises:
        InputError: the target holds other results, the draws are too many, or the cluster is too
            small.
        StageError: see :func:`draw_on_ray`; also where no observation has a posterior.
    """
    Drawer(posterior, options, problem)  # refuses options that do not go with the problem
    size = posterior.estimator.num_parameters
    check_size(options, size)
    request = _begin(target, _request(posterior, source, options))
    if target.exists(MANIFEST):
        return json.loads(target.get(MANIFEST))
    began = time.monotonic()
    every = parts(request["observations"], request["rows_per_part"])
    stored = _stored(target, every)
    several = show_progress and len(every) > 1
    already = sum(sum(record.statuses.values()) for record in stored)
    with Progress("infer", len(source), "observations", already, several) as progress:
        labels = {"experiment": experiment, "catalog": source.name}
        live = Live(len(source), options.num_samples, labels, progress)
        live.already(stored)
        there = {record.number for record in stored}
        missing = [part for part in every if part.number not in there]
        weighing = problem if options.proposals is not None else None
        metadata = _metadata(request)
        if not missing:
            pass
        elif len(every) == 1:
            writer = PartWriter(posterior, options, target, metadata, weighing)
            (part,) = missing
            rows = source.read(part.start, part.stop)
            source.check()
            live.landed(writer.prepare(part, rows)())
        else:
            with connected(address):
                _on_ray(missing, source, options, (model, target, metadata, weighing), live)
    _say_failures(live, target)
    manifest = {
        **request,
        "statuses": dict(sorted(live.statuses.items())),
        "draws": with_posterior(live.statuses) * options.num_samples,
        "parts": len(every),
        "seconds": round(time.monotonic() - began, 3),
    }
    target.put(MANIFEST, _text(manifest))
    return manifest


def _say_failures(live: Live, target: ObjectStore) -> None:
    """Why observations failed.

    Raises:
        StageError: all did that could have had a posterior.
    """
    failed = live.statuses["failed"]
    if live.reason:
        say(f"infer: {failed:,} observation(s) failed: {live.reason}")
    if failed and not with_posterior(live.statuses):
        raise StageError(
            f"infer: none of {failed:,} usable observation(s) could be drawn for "
            f"({live.reason or 'as an earlier run said'}); mend that, remove {target.uri} and run "
            "the command again"
        )


def _on_ray(
    missing: list[Part],
    source: Source,
    options: InferOptions,
    what: tuple[ObjectStore, ObjectStore, dict[str, Any], Problem | None],
    live: Live,
) -> None:
    from sbi_dist.catalog.driver import draw_on_ray
    from sbi_dist.simulation.prepare import ship

    model, target, metadata, problem = what
    packed = None if problem is None else ship(problem, "problem", problem)
    draw_on_ray(missing, source, options, (model, options, target, metadata, packed), live)


def _request(posterior: Posterior, source: Source, options: InferOptions) -> dict[str, Any]:
    """What the parts are of."""
    count, size = len(source), posterior.estimator.num_parameters
    return {
        "format": FORMAT,
        "catalog": source.name,
        "model": posterior.identity,
        "observations": count,
        "num_samples": options.num_samples,
        "seed": options.seed,
        "output": options.output,
        "quantiles": list(options.quantiles),
        "hdi": options.hdi,
        "parameter_names": posterior.parameter_names,
        "proposals": options.proposals,
        "rows_per_part": rows_per_part(count, options, size, posterior.x_shape),
    }


def _metadata(request: dict[str, Any]) -> dict[str, Any]:
    """What every part says of itself."""
    names = ("catalog", "model", "parameter_names", "num_samples", "seed", "quantiles", "hdi")
    return {name: request[name] for name in names}


def _begin(target: ObjectStore, request: dict[str, Any]) -> dict[str, Any]:
    """Write what the parts are of before them: parts of two catalogs must not meet.

    The request, with the division into parts of a run before this one.
    """
    if target.put_if_absent(REQUEST, _text(request)):
        return request
    try:
        stored = json.loads(target.get(REQUEST))
        rows = int(stored["rows_per_part"])
    except (KeyError, TypeError, ValueError):
        stored, rows = None, 0
    if stored != {**request, "rows_per_part": rows} or rows < 1:
        raise InputError(
            f"infer: {target.uri} holds draws of another catalog, model or setting; give another "
            "folder with --output"
        )
    return stored


def _text(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True).encode()


def _stored(target: ObjectStore, every: list[Part]) -> list[PartRecord]:
    """Records of the parts that are there."""
    keys = set(target.list("part-"))
    there = [part for part in every if part.key in keys]
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda part: read_counts(target, part.key), there)
        return [
            PartRecord(part.number, statuses) for part, statuses in zip(there, found, strict=True)
        ]
