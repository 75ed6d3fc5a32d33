"""The train stage: Ray Train jobs that fit density estimators to stored simulations.

Each worker reads its share of the shards from the store itself and runs ``loop.fit_source``; the
first one writes checkpoints, progress and, at the end, the bundle. The driver only waits and shows
progress. A job that was killed is run again with the same call and goes on from its last
checkpoint. The members of an ensemble are jobs of their own, side by side as far as the cluster
holds them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
import threading
import time
import uuid
from typing import Any

import numpy as np
import torch

from sbi_dist.errors import InputError, StageError
from sbi_dist.estimation.bundle import (
    BUNDLE,
    OUT_OF_DISTRIBUTION,
    load_bundle,
    save_bundle,
)
from sbi_dist.estimation.checkpoint import stored_checkpoints
from sbi_dist.estimation.data import ShardSource, examples
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.ensemble import Ensemble
from sbi_dist.estimation.live import Live, shown
from sbi_dist.estimation.loop import fit_source
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.out_of_distribution import OutOfDistribution
from sbi_dist.estimation.placement import Placement, place
from sbi_dist.estimation.signals import PAUSE, STOP, Asked, Leave
from sbi_dist.estimation.snapshot import METRICS
from sbi_dist.estimation.workers import Workers
from sbi_dist.progress import say
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.failures import frequent_failures
from sbi_dist.simulation.shard import ShardRecord
from sbi_dist.store import ObjectStore

__all__ = ["remove_rest", "train"]

_FAILED = "failed.json"
_SUMMARY = ("best_epoch", "best_validation_loss", "seconds", "training_simulations", "notes")
_LEAVE_WITHIN_S = 2.0


def train(
    dataset: ObjectStore,
    records: list[ShardRecord],
    bounds: tuple[np.ndarray, np.ndarray],
    model: ObjectStore,
    options: TrainOptions,
    about: dict[str, Any],
    show_progress: bool = True,
    start: ObjectStore | None = None,
    stoppable: bool = False,
) -> dict[str, Any]:
    """Fit an estimator to the given shards of a dataset and write its bundle to ``model``.

    Returns the content of ``bundle.json``; at once where the bundle is there already. Ray must be
    connected. ``start`` is the folder of a model whose weights and standardization are taken up;
    where it is ``stoppable``, an object ``stop`` in ``model`` ends the training after its epoch.

    Raises:
        InputError: too few simulations, a damaged shard, or more workers than the cluster holds.
        StageError: training failed.
    """
    if model.exists(BUNDLE):
        remove_rest(model)
        return json.loads(model.get(BUNDLE))
    _check_usable(records)
    wanted = place(options)
    stop = model if stoppable else None
    jobs = _members(_Job(dataset, records, bounds, model, options, about, start, stop))
    with shown(jobs[0].model, show_progress):
        _run(jobs, wanted, max(1, wanted.members(len(jobs))))
    if show_progress:
        say(f"train: {json.loads(jobs[0].model.get(METRICS)).get('data', '')}")
    if options.ensemble > 1:
        _combine(jobs, model, about)
    remove_rest(model)
    return json.loads(model.get(BUNDLE))


def remove_rest(model: ObjectStore) -> None:
    """Remove what only an unfinished training needs; also one that was killed as it ended."""
    left = [*model.list("checkpoints/"), *model.list("members/")]
    # All that is kept of the members' own courses is for TensorBoard.
    left = [key for key in left if "/tensorboard/" not in key]
    for key in [*left, *([STOP] if model.exists(STOP) else [])]:
        model.delete(key)


def _check_usable(records: list[ShardRecord]) -> None:
    """Say it plainly where too few simulations succeeded; how many are too few, ``split`` knows.

    Raises:
        InputError: names the most frequent failure.
    """
    rows, failed = (sum(getattr(each, name) for each in records) for name in ("rows", "failures"))
    frequent = frequent_failures(records, 1)
    if frequent and rows - failed < 20 <= rows:
        (most,) = frequent
        raise InputError(
            f"train: {failed:,} of {rows:,} simulations failed, which leaves {rows - failed}; at "
            f"least 20 are needed. Most frequent: {most['count']:,} x {most['status']} "
            f"({most['message']}); mend the simulator or the prior"
        )


# ---- jobs -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Job:
    """One estimator's training; travels to the workers."""

    dataset: ObjectStore
    records: list[ShardRecord]
    bounds: tuple[np.ndarray, np.ndarray]
    model: ObjectStore
    options: TrainOptions
    about: dict[str, Any]
    start: ObjectStore | None
    stop: ObjectStore | None  # where an object `stop` ends it


def _members(job: _Job) -> list[_Job]:
    """The jobs of an ensemble's members; the job itself where it is of one estimator."""
    if job.options.ensemble == 1:
        return [job]
    return [
        dataclasses.replace(
            job,
            model=job.model.child(f"members/{number}"),
            # Far apart, so that the members of two ensembles are not the same.
            options=dataclasses.replace(
                job.options, ensemble=1, seed=job.options.seed + 1_000_003 * number
            ),
        )
        for number in range(job.options.ensemble)
    ]


def _run(jobs: list[_Job], wanted: Placement, at_once: int) -> None:
    """Run all jobs, some side by side; where one fails or the caller is interrupted, pause all."""
    waiting = list(jobs)
    # Events, as an interrupted Thread.join takes the thread for dead (Python 3.11).
    running: dict[threading.Event, _Job] = {}
    raised: list[BaseException] = []

    def work(job: _Job, ended: threading.Event) -> None:
        try:
            _fit(job, wanted)
        except BaseException as error:  # told by the caller's thread
            raised.append(error)
        finally:
            ended.set()

    try:
        while (waiting or running) and not raised:
            while waiting and len(running) < at_once:
                job, ended = waiting.pop(0), threading.Event()
                threading.Thread(target=work, args=(job, ended), daemon=True).start()
                running[ended] = job
            # Signals reach the main thread only while it is awake now and then.
            next(iter(running)).wait(0.1)
            running = {ended: job for ended, job in running.items() if not ended.is_set()}
    finally:
        if running:
            _pause(running)
    if raised:
        raise raised[0]


def _pause(running: dict[threading.Event, _Job]) -> None:
    """Let the jobs save a checkpoint before they are ended."""
    with contextlib.suppress(Exception):  # a store that is away: the checkpoint before it will do
        for job in running.values():
            job.model.put(PAUSE, b"")
        until = time.monotonic() + _LEAVE_WITHIN_S
        for ended in running:
            ended.wait(max(0.0, until - time.monotonic()))


def _combine(jobs: list[_Job], model: ObjectStore, about: dict[str, Any]) -> None:
    """Write the bundle of an ensemble from those of its members."""
    bundles = [load_bundle(job.model) for job in jobs]
    histories = [json.loads(job.model.get(METRICS)) for job in jobs]
    members = [estimator for estimator, _ in bundles]
    # What is shown is the first member's; the others are summed up beside it.
    losses = [history["best_validation_loss"] for history in histories]
    model.put(METRICS, json.dumps({**histories[0], "members": losses}).encode())
    summary = {name: histories[0][name] for name in _SUMMARY}
    summary["seconds"] = sum(history["seconds"] for history in histories)
    summary["members"] = losses
    # What x is like is told by the first member's part of the simulations, and of itself.
    reference = bundles[0][1].get(OUT_OF_DISTRIBUTION)
    about = {**about, "training": summary, OUT_OF_DISTRIBUTION: reference}
    save_bundle(model, Ensemble(members), about)


def _fit(job: _Job, wanted: Placement) -> None:
    """Train one estimator by Ray Train, from its last checkpoint on, until its bundle is there."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    model, options = job.model, job.options
    if model.exists(BUNDLE):
        return
    # Ray's own bookkeeping of the run; what the stage needs to resume is in the store.
    scratch = tempfile.mkdtemp(prefix="sbi-dist-train-")

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, *_: Any, **__: Any) -> None:
            """Leave signals to the caller, who ends Ray and knows the exit code."""

    elastic = 0 < wanted.least < wanted.workers
    trainer = Trainer(
        _work,
        train_loop_config={
            "job": job,
            "threads": max(1, int(wanted.resources["CPU"])),
            "in_driver": wanted.workers == 0,
        },
        scaling_config=ScalingConfig(
            num_workers=(wanted.least, wanted.workers) if elastic else wanted.workers,
            use_gpu=wanted.resources.get("GPU", 0) > 0,
            resources_per_worker=wanted.resources if wanted.workers else None,
            accelerator_type=options.accelerator,
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=options.restarts, controller_failure_limit=3),
        ),
    )
    for key in (METRICS, _FAILED, PAUSE):
        model.delete(key)
    try:
        trainer.fit()
    except (InputError, StageError):
        raise
    except Exception as error:
        if not model.exists(BUNDLE) and not model.exists(_FAILED):
            raise _explained(error, wanted) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if model.exists(_FAILED):
        failed = json.loads(model.get(_FAILED))
        model.delete(_FAILED)
        raise {"InputError": InputError, "StageError": StageError}[failed["kind"]](
            failed["message"]
        )
    if not model.exists(BUNDLE):
        raise StageError("train: the workers ended without a model; run the command again")


def _explained(error: Exception, wanted: Placement) -> StageError:
    texts = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = texts[-1] if texts else ""
    if "worker group startup timed out" in str(error):  # Ray's words; its type is not kept
        each = ", ".join(f"{amount:g} {name}" for name, amount in wanted.resources.items())
        return StageError(
            f"train: {max(1, wanted.least)} worker(s) with ({each}) did not start in time: the "
            "cluster has them, but other jobs hold them, or a node is not well; wait for these, "
            "or set train.workers lower, and run the command again"
        )
    return StageError(
        f"train: the workers failed ({type(error).__name__}: {last}); run the command again to go "
        "on from the last checkpoint"
    )


# ---- in the workers -------------------------------------------------------------------------


def _work(config: dict[str, Any]) -> None:
    """One Ray Train worker, or the caller's process in Ray Train's local mode."""
    import ray.train
    import ray.train.torch

    job: _Job = config["job"]
    context = ray.train.get_context()
    in_driver: bool = config["in_driver"]
    if in_driver:
        workers = Workers(device=torch.device("cuda" if job.options.gpus_per_worker else "cpu"))
    else:
        rank, count = context.get_world_rank(), context.get_world_size()
        workers = Workers(rank, count, ray.train.torch.get_device())
    if job.model.exists(BUNDLE) or job.model.exists(_FAILED):
        return  # this worker was started again after the others had finished
    before = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    try:
        _fit_and_save(job, workers, in_driver)
    except Leave:
        pass
    except (InputError, StageError) as error:
        # Not a fault of the machine: to be told to the user, not tried again.
        failed = {"kind": type(error).__name__, "message": str(error)}
        job.model.put_if_absent(_FAILED, json.dumps(failed).encode())
        if workers.count > 1:
            raise  # the others may wait for this one: Ray ends them
    finally:
        torch.set_num_threads(before)


def _fit_and_save(job: _Job, workers: Workers, in_driver: bool) -> None:
    model, options = job.model, job.options
    source = ShardSource(Dataset(job.dataset), job.records)
    with contextlib.ExitStack() as stack:
        live = signals = None
        if workers.rank == 0:
            labels = {
                "experiment": str(job.about.get("experiment", "")),
                "model": str(job.about.get("model", "")),
            }
            live = stack.enter_context(
                Live(model, labels, hyperparameters=dataclasses.asdict(options))
            )
        signals = stack.enter_context(
            Asked(model, job.stop, workers.rank == 0, None if in_driver else _going)
        )
        estimator, history = fit_source(
            source,
            job.bounds,
            options,
            workers,
            stack.enter_context(stored_checkpoints(model, options)),
            watch=live,
            start=_start(job.start, options),
            signals=signals,
        )
        if live is not None:
            trouble = live.close(history)
            if trouble:
                history["notes"].append(trouble)
    if workers.rank == 0:
        some = examples(source, options.validation_fraction, options.seed)
        reference = OutOfDistribution.fit(estimator, *map(torch.from_numpy, some))
        model.put(METRICS, json.dumps(history).encode())
        summary = {name: history[name] for name in _SUMMARY}
        about = {**job.about, "training": summary, OUT_OF_DISTRIBUTION: reference.to_data()}
        save_bundle(model, estimator, about)


def _going() -> bool:
    import ray.train

    return ray.train.get_preemption_info() is not None


def _start(start: ObjectStore | None, options: TrainOptions) -> DensityEstimator | None:
    if start is None:
        return None
    estimator = load_bundle(start)[0]
    if isinstance(estimator, Ensemble):
        # A member for each of ours, by its seed.
        number = (options.seed // 1_000_003) % len(estimator.members)
        return estimator.members[number]
    return estimator
