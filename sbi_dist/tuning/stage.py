"""The tune stage: plan a search, run what is left of it, keep its table and its best settings.

``tune/<search>/`` holds ``search.json`` from the beginning, the records of ended trials
(``records.py``), and at the end ``summary.json`` and ``best.yaml``. A search has a name made of all
that its outcome depends on but the number of trials, so that asking for more of them goes on with
it. Nothing is trained with the best settings here: that is the user's choice.

All trials hold out the same simulations. The least of K losses is too good by its selection, by
s sqrt(2 ln K) at most on average, where s is the standard error of its difference to the loss of
the train section's own settings (``table.optimism``); and by a little for the choice of an epoch,
which all share. A smaller difference may be chance: train both with another ``train.seed``, which
holds out other simulations, and compare these losses.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from typing import Any

import numpy as np

from sbi_dist.estimation.options import TrainOptions
from sbi_dist.progress import say
from sbi_dist.simulation.shard import ShardRecord
from sbi_dist.store import ObjectStore
from sbi_dist.tuning.options import TuneOptions
from sbi_dist.tuning.records import read_losses, read_records
from sbi_dist.tuning.search import plan_search
from sbi_dist.tuning.table import (
    best_yaml,
    cells,
    make_rows,
    override_lines,
    settings_text,
    table_text,
    verdict,
)

__all__ = ["BEST", "Found", "Simulated", "latest_summary", "searches", "tune_settings"]

SEARCH, SUMMARY, BEST = "search.json", "summary.json", "best.yaml"


@dataclasses.dataclass(frozen=True)
class Simulated:
    """The simulations to search on.

    Attributes:
        dataset_id: the dataset's name.
        dataset: its folder.
        records: its shards.
        bounds: of the prior's support, lower and upper, each (D,).
    """

    dataset_id: str
    dataset: ObjectStore
    records: list[ShardRecord]
    bounds: tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found, as text.

    Attributes:
        store: its folder.
        table: one line for each trial.
        verdict: what it is worth.
        section: the train section to put into the experiment file.
        overrides: the same as arguments of the command line; none where nothing was better.
    """

    store: ObjectStore
    table: str
    verdict: str
    section: str
    overrides: list[str]


def tune_settings(
    options: TuneOptions,
    train: TrainOptions,
    simulated: Simulated,
    store: ObjectStore,
    address: str | None = None,
) -> Found:
    """Search over settings of the train section; at once where the search has ended.

    Args:
        options: the tune section.
        train: the train section.
        simulated: what to train on.
        store: the experiment's folder.
        address: Ray cluster; None starts a local one.

    Raises:
        InputError: settings that are refused, or a cluster that holds no trial.
        StageError: all trials failed.
    """
    # Imported here: Ray is needed only where something is left to run.
    from sbi_dist.tuning.trial import TrialJob
    from sbi_dist.tuning.tune import tune

    shards = [[record.index, record.digest] for record in simulated.records]
    data = {"dataset": simulated.dataset_id, "shards": shards}
    search = plan_search(options, train, data)
    folder = store.child(f"tune/{search.id}")
    if len(search.trials) < options.trials:
        say(
            f"tune: tune.space holds {len(search.trials)} different settings, of "
            f"tune.trials={options.trials}"
        )
    about = {
        "search": search.id,
        "dataset": simulated.dataset_id,
        "trials": [trial.id for trial in search.trials],
        "tune": dataclasses.asdict(options),
        "train": dataclasses.asdict(train),
    }
    folder.put(SEARCH, json.dumps(about, indent=2).encode())
    job = TrialJob(
        simulated.dataset,
        simulated.records,
        simulated.bounds,
        folder,
        {trial.id: trial for trial in search.trials},
        max(1, int(options.cpus_per_trial)),
    )
    records = tune(job, search, options, address)
    rows = make_rows(search, records, functools.cache(lambda name: read_losses(folder, name)))
    found = Found(
        folder, table_text(rows), verdict(rows), best_yaml(search, rows), override_lines(rows)
    )
    folder.put(BEST, found.section.encode())
    summary = {
        "search": search.id,
        "dataset": simulated.dataset_id,
        "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "trials": len(search.trials),
        "best_loss": rows[0].record.loss,
        "best_settings": rows[0].record.settings,
        "verdict": found.verdict,
        "rows": [{**cells(row), "reason": row.record.reason} for row in rows],
    }
    folder.put(SUMMARY, json.dumps(summary, indent=2).encode())
    say(f"tune: search {search.id} is complete in {folder.uri}")
    return found


def searches(store: ObjectStore) -> list[dict[str, Any]]:
    """The searches of an experiment: id, trials that have ended of all, and the best so far."""
    found = []
    for name in store.folders("tune/"):
        folder = store.child(f"tune/{name}")
        about = _json(folder, SEARCH)
        if about is None:
            continue
        records = read_records(folder, about["trials"])
        judged = [record for record in records.values() if record.loss is not None]
        best = min(judged, key=lambda record: record.loss or 0.0, default=None)
        found.append(
            {
                "search": name,
                "dataset": about["dataset"],
                "trials": f"{len(records)} of {len(about['trials'])}",
                "best_loss": None if best is None else best.loss,
                "best": None if best is None else settings_text(best.settings),
            }
        )
    return found


def latest_summary(store: ObjectStore, dataset_id: str) -> dict[str, Any] | None:
    """The summary of the search on a dataset that ended last, or None."""
    summaries = [_json(store.child(f"tune/{name}"), SUMMARY) for name in store.folders("tune/")]
    of_dataset = [each for each in summaries if each and each["dataset"] == dataset_id]
    return max(of_dataset, key=lambda each: each["ended"], default=None)


def _json(folder: ObjectStore, key: str) -> Any:
    try:
        return json.loads(folder.get(key))
    except (KeyError, ValueError):
        return None
