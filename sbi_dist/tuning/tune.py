"""The search as a Ray Tune job: trials side by side, hopeless ones ended early by ASHA.

All that is needed to go on lies in the store (``records.py``), so a search that was interrupted is
run again with the same call: trials that have ended are not trained again, and the others go on
from their checkpoints. Ray Tune's own files are scratch.

ASHA (Li et al. 2020, arXiv:1810.05934) decides by when trials get to a rung, so which ones are
stopped may differ from run to run; the result of a trial that is trained to its end does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from sbi_dist.errors import StageError
from sbi_dist.progress import Progress
from sbi_dist.session import connected, require
from sbi_dist.tuning.options import TuneOptions
from sbi_dist.tuning.records import (
    FAILED,
    STOPPED,
    TrialRecord,
    keep_records,
    read_records,
    save_record,
    tidy,
)
from sbi_dist.tuning.search import Search
from sbi_dist.tuning.table import settings_text
from sbi_dist.tuning.trial import TrialJob, run_trial

__all__ = ["tune"]

# How often a trial whose process died, or could not reach the store, is begun again.
_ATTEMPTS = 3
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no files of results beside ours
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one says something even where it is asked to be silent
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the command line knows the exit code
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
}


def tune(
    job: TrialJob,
    search: Search,
    options: TuneOptions,
    address: str | None = None,
    show_progress: bool = True,
) -> dict[str, TrialRecord]:
    """Run what is left of a search; the records of all its trials, by their ids.

    Args:
        job: what the trials share.
        search: what is tried.
        options: the tune section.
        address: Ray cluster, where there is something left to run; None starts a local one.
        show_progress: False shows nothing.

    Raises:
        InputError: a trial asks for more than the cluster holds.
        StageError: no trial gave a loss; says the most frequent reason.
    """
    every = [trial.id for trial in search.trials]
    records = keep_records(job.search, every)
    left = [trial for trial in every if trial not in records]
    if left:
        with (
            connected(address),
            Progress(
                "tune", len(search.trials), "trials", already=len(records), enabled=show_progress
            ) as progress,
        ):
            _run(job, search, options, left, records, _watch(job, records, progress))
        records = read_records(job.search, every)
    # A process that was just ended may have written one more.
    tidy(job.search, records)
    if not any(record.loss is not None for record in records.values()):
        reasons = Counter(record.reason for record in records.values() if record.reason)
        reason = reasons.most_common(1)[0][0] if reasons else "they left no result"
        raise StageError(
            f"tune: all {len(search.trials)} trials failed, most often for this reason: {reason}"
        )
    return records


def _resources(options: TuneOptions) -> dict[str, float]:
    """What a trial takes.

    Raises:
        InputError: the cluster can never hold it.
    """
    import ray

    gpus = options.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0.0) >= 1 else 0.0
    resources = {"CPU": options.cpus_per_trial}
    require(resources, 1, "tune.cpus_per_trial")
    if gpus:
        resources["GPU"] = gpus
        require(resources, 1, "tune.gpus_per_trial")
    return resources


def _neighbours(resources: dict[str, float], left: int, options: TuneOptions) -> int:
    """The most trials that run at a time on one node."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node.get("Alive")]
    most = max(
        min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in resources.items())
        for node in nodes
    )
    return max(1, min(most, left, options.concurrent or left))


def _run(
    job: TrialJob,
    search: Search,
    options: TuneOptions,
    left: list[str],
    ended: dict[str, TrialRecord],
    watch: Any,
) -> None:
    """Run the given trials; how they end is kept in the store."""
    from ray import tune

    resources = _resources(options)
    job = dataclasses.replace(job, neighbours=_neighbours(resources, len(left), options))
    with _scratch() as scratch, _environment():
        trainable = tune.with_resources(tune.with_parameters(run_trial, job=job), resources)
        tuner = tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(left)},
            tune_config=tune.TuneConfig(
                scheduler=_scheduler(search, options, ended),
                max_concurrent_trials=options.concurrent,
                # A process of its own for each trial would cost more than a small training.
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=scratch,
                verbose=0,
                callbacks=[watch],
                failure_config=tune.FailureConfig(max_failures=_ATTEMPTS),
            ),
        )
        tuner.fit()


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="sbi-dist-tune-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Ray Tune reads its switches from the environment of the driver."""
    before = {name: os.environ.get(name) for name in _QUIET}
    os.environ.update(_QUIET)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Ended(NamedTuple):
    """A trial that has ended, as far as a scheduler looks."""

    trial_id: str


def _scheduler(search: Search, options: TuneOptions, ended: dict[str, TrialRecord]) -> Any:
    """ASHA, which knows the trials that have ended and never stops the train section's own."""
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

    first, last = search.trials[0].id, search.trials[0].options.max_epochs

    class Halving(ASHAScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: Any) -> str:
            decision = super().on_trial_result(tune_controller, trial, result)
            # What all are compared with is trained to its end; and what has got there has ended.
            own = getattr(trial, "config", {}).get("trial") == first
            return TrialScheduler.CONTINUE if own or result["epoch"] >= last else decision

    scheduler = Halving(
        time_attr="epoch",
        metric="loss",
        mode="min",
        max_t=last + 1,
        grace_period=min(options.grace_epochs, last),
        reduction_factor=options.reduction,
    )
    for record in ended.values():
        trial = _Ended(f"ended-{record.trial}")
        scheduler.on_trial_add(None, trial)
        for epoch, loss in enumerate(record.best_until()):
            if math.isfinite(loss):
                scheduler.on_trial_result(None, trial, {"epoch": epoch, "loss": loss})
    return scheduler


def _watch(job: TrialJob, ended: dict[str, TrialRecord], progress: Progress) -> Any:
    """A callback of Ray Tune that shows progress and keeps how trials end that can't tell it."""
    from ray.tune import Callback

    class Watch(Callback):
        def __init__(self) -> None:
            self.losses: dict[str, list[float | None]] = {}
            self.last: dict[str, dict[str, Any]] = {}
            self.done = len(ended)
            self.best, self.best_settings = math.inf, ""
            for record in ended.values():
                self._better(record.loss, record.settings)

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Ray Tune keeps a copy for a restart that is not made

        def _better(self, loss: float | None, settings: dict[str, Any]) -> None:
            if loss is not None and loss < self.best:
                self.best, self.best_settings = loss, settings_text(settings)

        def _show(self) -> None:
            found = math.isfinite(self.best)
            note = f"best loss {self.best:.4f} ({self.best_settings})" if found else ""
            progress.update(self.done, note)

        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any
        ) -> None:
            name, epoch = trial.config["trial"], result["epoch"]
            losses = self.losses.setdefault(name, [])
            del losses[epoch:]  # told once more after a restart
            losses.append(result["validation_loss"])
            self.last[name] = result
            self._better(result["loss"], job.trials[name].settings)
            self._show()

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            name = trial.config["trial"]
            last = self.last.get(name, {})
            if last:
                # Of a trial that has come to its own end there is a record, which stays.
                self._keep(name, STOPPED, loss=last["loss"])
            self._end(name)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            name = trial.config["trial"]
            self._keep(name, FAILED, reason=_reason(trial), again=True)
            self._end(name)

        def _keep(self, name: str, status: str, **more: Any) -> None:
            last = self.last.get(name, {})
            record = TrialRecord(
                trial=name,
                settings=job.trials[name].settings,
                status=status,
                epochs=last.get("epoch", 0),
                seconds=last.get("seconds", 0.0),
                weights=last.get("weights", 0),
                held_out=last.get("held_out", 0),
                validation_loss=self.losses.get(name, []),
                **more,
            )
            save_record(job.search, record)

        def _end(self, name: str) -> None:
            tidy(job.search, [name])
            self.done += 1
            self._show()

    return Watch()


def _reason(trial: Any) -> str:
    """Why Ray Tune gave a trial up, in a sentence."""
    lines = [line.strip() for line in str(trial.get_error() or "").splitlines() if line.strip()]
    died = any("ActorDied" in line or "worker process" in line for line in lines[-40:])
    what = "its process died" if died else (lines[-1] if lines else "it ended without a result")
    return f"tune: the trial was given up after {_ATTEMPTS + 1} attempts: {what}"
