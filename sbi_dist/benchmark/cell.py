"""A cell of the benchmark's table: one problem at one number of simulations.

It is an ordinary experiment, so that what is measured is what a user gets; C2ST records lie beside
its model. No Ray here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from sbi_dist.benchmark.records import folder_of, write_record
from sbi_dist.calibration.c2st import c2st_each
from sbi_dist.experiment import Experiment, load_experiment
from sbi_dist.pipeline import Pipeline
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.problems.reference import load_reference
from sbi_dist.store import ObjectStore

__all__ = ["Cell", "Trained", "judge", "together"]

# Networks are trained side by side while their weights are no more than a cache holds.
_WEIGHTS_TOGETHER = 100_000
_MOST_TOGETHER = 5


@dataclasses.dataclass(frozen=True)
class Cell:
    """One problem at one number of simulations.

    Attributes:
        task: the problem.
        size: number of simulations.
        overrides: of the experiment's fields, as of ``--set``.
    """

    task: str
    size: int
    overrides: tuple[str, ...]

    @functools.cached_property
    def experiment(self) -> Experiment:
        """The shipped experiment of the problem, with this cell's size and name."""
        own = (f"name={self.task}-{self.size}", f"simulate.num_simulations={self.size}")
        return load_experiment(self.task, [*self.overrides, *own])[0]

    def pipeline(self) -> Pipeline:
        """The stages of its experiment."""
        return Pipeline(self.experiment)


@dataclasses.dataclass(frozen=True)
class Trained:
    """The model of a cell, and where its records are.

    Attributes:
        task: the problem.
        model: folder of the model.
        records: folder of the records.
        num_draws: draws of each observation.
    """

    task: str
    model: ObjectStore
    records: ObjectStore
    num_draws: int

    @classmethod
    def of(cls, cell: Cell, pipeline: Pipeline, model_id: str, num_draws: int) -> Trained:
        """A cell's model, by its name."""
        folder = folder_of(pipeline.store, model_id, num_draws)
        return cls(cell.task, pipeline.rounds.model(model_id), folder, num_draws)


def judge(trained: Trained, observations: Sequence[int]) -> dict[int, float]:
    """Draw from the model's posterior of each observation; its C2ST against the reference draws.

    Each has its record in the store when this returns.

    Raises:
        InputError: the model or the reference draws can't be read.
    """
    posterior = Posterior.from_store(trained.model)
    pairs = []
    for number in observations:
        reference = load_reference(trained.task, number)
        x = torch.from_numpy(reference.observation[None]).float()
        draws = posterior.draws(x, trained.num_draws, 0)[0][0]
        pairs.append((reference.draws[: trained.num_draws], draws.numpy()))
    found = dict(zip(observations, c2st_each(pairs), strict=True))
    for number, value in found.items():
        write_record(trained.records, trained.task, number, value)
    return found


def together(observations: Sequence[int], num_parameters: int) -> list[list[int]]:
    """The observations in groups that are judged at once."""
    hidden = 10 * num_parameters
    weights = 5 * (num_parameters + hidden) * hidden
    count = max(1, min(_MOST_TOGETHER, _WEIGHTS_TOGETHER // weights))
    every = list(observations)
    return [every[k : k + count] for k in range(0, len(every), count)]
