"""What the process of one trial does: a training on one worker, from its last checkpoint on."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from sbi_dist.errors import InputError, StageError
from sbi_dist.estimation.checkpoint import stored_checkpoints
from sbi_dist.estimation.data import ShardSource
from sbi_dist.estimation.data.held_out import HeldOut
from sbi_dist.estimation.data.memory import available_bytes
from sbi_dist.estimation.data.source import Source
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.loop import fit_source
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.workers import Workers
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.shard import ShardRecord
from sbi_dist.store import ObjectStore
from sbi_dist.tuning.records import FAILED, FINISHED, TrialRecord, save_losses, save_record
from sbi_dist.tuning.search import Trial

__all__ = ["TrialJob", "run_trial"]

# So many held-out simulations place the standard error of a difference to about 1 %.
_COMPARED = 5000


@dataclasses.dataclass(frozen=True)
class TrialJob:
    """What all trials of a search share; travels to their processes.

    Attributes:
        dataset, records: the simulations.
        bounds: of the prior's support, lower and upper, each (D,).
        search: the search's folder.
        trials: by id.
        threads: that a trial computes with.
        neighbours: how many trials share the memory of a machine.
    """

    dataset: ObjectStore
    records: list[ShardRecord]
    bounds: tuple[np.ndarray, np.ndarray]
    search: ObjectStore
    trials: dict[str, Trial]
    threads: int
    neighbours: int = 1


def run_trial(config: dict[str, Any], job: TrialJob) -> None:
    """Train with the settings of ``config["trial"]``, report each epoch to Ray Tune, keep the end.

    A training that fails for its settings has ended, too; what else goes wrong is raised, so that
    Ray Tune tries again.
    """
    import ray

    trial = job.trials[config["trial"]]
    torch.set_num_threads(job.threads)
    on_gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
    workers = Workers(device=torch.device("cuda" if on_gpu else "cpu"))
    told, options = _Told(), _sharing_memory(trial.options, job.neighbours)
    try:
        source = ShardSource(Dataset(job.dataset), job.records)
        told.weights = _weights(trial.options, source)
        with stored_checkpoints(job.search.child(trial.id), trial.options) as checkpoints:
            estimator, history = fit_source(source, job.bounds, options, workers, checkpoints, told)
        told(history)  # where the last checkpoint was made after the last epoch
        losses = _single_losses(estimator, source, trial.options)
    except (InputError, StageError) as error:
        message = str(error)
        # A store that is away speaks for itself; the next run may find it.
        again = isinstance(error, InputError) or not message.startswith("train: ")
        save_record(job.search, told.record(trial, FAILED, message, again))
        return
    save_losses(job.search, trial.id, losses)
    save_record(job.search, told.record(trial, FINISHED))


def _sharing_memory(options: TrainOptions, neighbours: int) -> TrainOptions:
    """The options with this trial's part of half of the free memory, unless they say how much."""
    free = available_bytes()
    if options.memory_gb is not None or free is None:
        return options
    return dataclasses.replace(options, memory_gb=max(1.0, free / 2 / neighbours) / 1e9)


class _Told:
    """What Ray Tune was told of a training: each epoch once, those before a restart as well."""

    def __init__(self) -> None:
        self.weights, self.held_out = 0, 0
        self._losses: list[float | None] = []
        self._best, self._seconds = math.inf, 0.0

    def __call__(self, history: dict[str, Any]) -> None:
        from ray import tune

        self._seconds = history["seconds"]
        self.held_out = history["validation_simulations"]
        for loss in history["validation_loss"][len(self._losses) :]:
            finite = loss is not None and math.isfinite(loss)
            self._best = min(self._best, loss) if finite else self._best
            self._losses.append(float(loss) if finite else None)
            tune.report(
                {
                    "epoch": len(self._losses) - 1,
                    "loss": self._best,
                    "validation_loss": self._losses[-1],
                    "seconds": self._seconds,
                    "weights": self.weights,
                    "held_out": self.held_out,
                }
            )

    def record(
        self, trial: Trial, status: str, reason: str = "", again: bool = False
    ) -> TrialRecord:
        """How the trial ended, as far as it was told of."""
        return TrialRecord(
            trial=trial.id,
            settings=trial.settings,
            status=status,
            reason=reason,
            again=again,
            loss=self._best if status == FINISHED else None,
            epochs=max(0, len(self._losses) - 1),
            seconds=self._seconds,
            weights=self.weights,
            held_out=self.held_out,
            validation_loss=self._losses,
        )


def _weights(options: TrainOptions, source: Source) -> int:
    with torch.random.fork_rng(devices=[]):
        flow = ConditionalFlow(options, source.theta_size, source.x_shape)
    return sum(weight.numel() for weight in flow.parameters())


@torch.no_grad()
def _single_losses(
    estimator: DensityEstimator, source: Source, options: TrainOptions
) -> np.ndarray:
    """-log q(theta | x) of the first held-out simulations, in nats; the same ones of all trials."""
    ends = np.cumsum(source.counts)
    held_out = HeldOut(int(ends[-1]), options.validation_fraction, options.seed)
    losses: list[np.ndarray] = []
    for k, end in enumerate(ends):
        start = int(end - source.counts[k])
        rows = held_out.rows(start, int(end)) - start
        if not len(rows):
            continue
        theta, x = source.read(k)
        chosen = estimator.log_prob(torch.from_numpy(theta[rows]), torch.from_numpy(x[rows]))
        losses.append(-chosen.double().numpy())
        if sum(map(len, losses)) >= _COMPARED:
            break
    return np.concatenate(losses)[:_COMPARED]
