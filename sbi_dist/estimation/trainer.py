"""The train stage: a Ray Train job that fits a density estimator to stored simulations.

Each worker reads the shards from the store itself and runs ``loop.fit``; the first one writes
checkpoints, progress and, at the end, the bundle. The driver only waits and shows progress. A job
that was killed is run again with the same call and goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from sbi_dist.errors import InputError, StageError
from sbi_dist.estimation.bundle import BUNDLE, load_bundle, save_bundle
from sbi_dist.estimation.loop import Checkpoints, Workers, fit
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.progress import duration, say
from sbi_dist.session import require
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.store import ObjectStore

__all__ = ["METRICS", "STOP", "train"]

METRICS = "metrics.json"
STOP = "stop"
_CHECKPOINTS_KEPT = 2
_REPORT_EVERY_S = 1.0


def train(
    dataset: ObjectStore,
    shards: list[int],
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
        return json.loads(model.get(BUNDLE))
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = _resources(options)
    config = {
        "dataset": dataset,
        "shards": shards,
        "bounds": [bound.tolist() for bound in bounds],
        "model": model,
        "options": options,
        "about": about,
        "start": start,
        "stoppable": stoppable,
        "threads": max(1, int(resources["CPU"])),
    }
    # Ray's own bookkeeping of the run; what the stage needs to resume is in the store.
    scratch = tempfile.mkdtemp(prefix="sbi-dist-train-")

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, *_: Any, **__: Any) -> None:
            """Leave signals to the caller, who ends Ray and knows the exit code."""

    trainer = Trainer(
        _work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=options.workers,
            use_gpu=resources.get("GPU", 0) > 0,
            resources_per_worker=resources if options.workers else None,
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=3, controller_failure_limit=3),
        ),
    )
    model.delete(METRICS)
    try:
        with _shown(model, show_progress):
            trainer.fit()
    except (InputError, StageError):
        raise
    except Exception as error:
        if not model.exists(BUNDLE):
            raise StageError(
                f"train: the workers failed ({type(error).__name__}: {_last_line(error)}); run the "
                "command again to go on from the last checkpoint"
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    metrics = json.loads(model.get(METRICS)) if model.exists(METRICS) else {}
    if "failed" in metrics:
        kind = InputError if metrics["failed"]["kind"] == "InputError" else StageError
        raise kind(metrics["failed"]["message"])
    if not model.exists(BUNDLE):
        raise StageError("train: the workers ended without a model; run the command again")
    for key in [*model.list("checkpoints/"), STOP]:
        model.delete(key)
    return json.loads(model.get(BUNDLE))


def _resources(options: TrainOptions) -> dict[str, float]:
    import ray

    there = ray.cluster_resources()
    workers = max(1, options.workers)
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if there.get("GPU", 0) >= workers else 0.0
    cpus = options.cpus_per_worker
    if cpus is None:
        # The products of small networks are too short to be shared between cores.
        wide = options.hidden_features > 256 and not gpus
        cpus = min(8.0, max(1.0, there.get("CPU", 1.0) // workers)) if wide else 1.0
    if options.workers:
        wanted = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
        require(wanted, workers, "train.workers")
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


# ---- in the workers -------------------------------------------------------------------------


def _work(config: dict[str, Any]) -> None:
    """One Ray Train worker."""
    import ray.train
    import ray.train.torch
    import torch

    context = ray.train.get_context()
    options: TrainOptions = config["options"]
    in_driver = options.workers == 0
    workers = Workers(
        rank=0 if in_driver else context.get_world_rank(),
        count=1 if in_driver else context.get_world_size(),
        device=torch.device("cpu") if in_driver else ray.train.torch.get_device(),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    model: ObjectStore = config["model"]
    try:
        _fit_and_save(config, options, workers, model)
    except (InputError, StageError) as error:
        # Not a fault of the machine: to be told to the user, not tried again.
        if workers.rank == 0:
            failed = {"kind": type(error).__name__, "message": str(error)}
            model.put(METRICS, json.dumps({"failed": failed}).encode())
    finally:
        torch.set_num_threads(before)
    if workers.count > 1:
        ray.train.report({})


def _fit_and_save(
    config: dict[str, Any], options: TrainOptions, workers: Workers, model: ObjectStore
) -> None:
    simulations = Dataset(config["dataset"]).read_all(config["shards"])
    usable = simulations.ok
    low, high = (np.array(bound) for bound in config["bounds"])
    reporter = _Reporter(model) if workers.rank == 0 else None
    estimator, history = fit(
        simulations.theta[usable],
        simulations.x[usable],
        (low, high),
        options,
        workers,
        _checkpoints(model, options.checkpoint_every_s),
        reporter,
        None if config["start"] is None else load_bundle(config["start"])[0],
        _Stop(model) if config["stoppable"] else None,
    )
    if workers.rank == 0:
        model.put(METRICS, json.dumps(history).encode())
        summary = {
            key: history[key]
            for key in ("best_epoch", "best_validation_loss", "seconds", "training_simulations")
        }
        save_bundle(model, estimator, {**config["about"], "training": summary})


class _Stop:
    """Whether somebody asked for the end of the training; looks once a second."""

    def __init__(self, model: ObjectStore) -> None:
        self._model, self._last = model, 0.0

    def __call__(self) -> bool:
        if time.monotonic() - self._last < _REPORT_EVERY_S:
            return False
        self._last = time.monotonic()
        return self._model.exists(STOP)


class _Reporter:
    """Writes the history to the store every now and then, where anyone can follow it."""

    def __init__(self, model: ObjectStore) -> None:
        self._model, self._last = model, 0.0

    def __call__(self, history: dict[str, Any]) -> None:
        if time.monotonic() - self._last >= _REPORT_EVERY_S:
            self._model.put(METRICS, json.dumps(history).encode())
            self._last = time.monotonic()


def _checkpoints(model: ObjectStore, every_s: float) -> Checkpoints:
    def keys() -> list[str]:
        return sorted(model.list("checkpoints/"), reverse=True)

    def save(epoch: int, data: bytes) -> None:
        model.put(f"checkpoints/epoch-{epoch:06d}.pt", data)
        for key in keys()[_CHECKPOINTS_KEPT:]:
            model.delete(key)

    return Checkpoints(save, lambda: [model.get(key) for key in keys()], every_s)


# ---- in the driver --------------------------------------------------------------------------


@contextlib.contextmanager
def _shown(model: ObjectStore, enabled: bool) -> Iterator[None]:
    """Show the workers' progress while the block runs."""
    done = threading.Event()
    thread = threading.Thread(target=_follow, args=(model, done), daemon=True)
    if enabled:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if enabled:
            thread.join(timeout=5)


def _follow(model: ObjectStore, done: threading.Event) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    live = console.status("train: starting workers") if console.is_terminal else None
    last_line = time.monotonic()
    if live is not None:
        live.start()
    history: dict[str, Any] = {}
    while not done.wait(1.0):
        with contextlib.suppress(Exception):  # the file is being replaced; the next look sees it
            history = json.loads(model.get(METRICS))
        if "epoch" not in history:
            continue
        line = _describe(history)
        if live is not None:
            live.update(line)
        elif time.monotonic() - last_line >= 10:
            last_line = time.monotonic()
            say(line)
    if live is not None:
        live.stop()
    with contextlib.suppress(Exception):
        say(_describe(json.loads(model.get(METRICS))))


def _describe(history: dict[str, Any]) -> str:
    epochs = history["epoch"][-1]
    rate = history["training_simulations"] * epochs / max(history["seconds"], 1e-9)
    return (
        f"train: epoch {epochs}, validation loss {history['validation_loss'][-1]:.4f} "
        f"(best {history['best_validation_loss']:.4f} at {history['best_epoch']}), "
        f"learning rate {history['learning_rate'][-1]:.1e}, {rate:,.0f} simulations/s, "
        f"{duration(history['seconds'])}"
    )
