"""Rounds of simulation, and where in the store each keeps its dataset and its model.

A round's results lie under a name made of a fingerprint of what determines them. Every round after
the first draws from the prior truncated to the box that holds the posterior of the observed data
(Miller et al. 2021, arXiv:2107.01214), which is kept beside the model that it comes from.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from sbi_dist.estimation.bundle import BUNDLE
from sbi_dist.estimation.options import ARCHITECTURE
from sbi_dist.experiment import Experiment, digest
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.priors import prior_from_data, prior_to_data, support_bounds, truncate
from sbi_dist.problem import Problem
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.prepare import FORMAT
from sbi_dist.simulation.shard import ShardRecord
from sbi_dist.store import ObjectStore

__all__ = ["Round", "Rounds"]

# A box that leaves out this much of the posterior on each side of each parameter, and a margin
# for an estimator that is not exact yet.
_TRUNCATED_TAIL = 3e-4
_TRUNCATION_DRAWS = 50_000
_TRUNCATION_MARGIN = 0.15


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of simulation: its problem and where its simulations are."""

    number: int
    problem: Problem
    dataset_id: str
    store: ObjectStore


class Rounds:
    """The rounds of an experiment.

    Args:
        experiment: the experiment.
        problem: its problem.
        store: its folder.
    """

    def __init__(self, experiment: Experiment, problem: Problem, store: ObjectStore) -> None:
        self._experiment, self._problem, self._store = experiment, problem, store

    def current(self) -> Round:
        """The first round that is not simulated and trained in full, or else the last one."""
        this = self._round(1, self._problem)
        while this.number < self._experiment.simulate.rounds:
            records = self.records(this)
            if records is None:
                return this
            model_id = self.model_id(this, records)
            if not self.model(model_id).exists(BUNDLE):
                return this
            this = self._next(this, model_id)
        return this

    def records(self, this: Round) -> list[ShardRecord] | None:
        """The shards to train on, or None while there is more to simulate."""
        options, dataset = self._experiment.simulate, Dataset(this.store)
        records = None
        if options.num_simulations is not None:
            records = dataset.complete(options.num_simulations)
        if records is None and options.max_seconds is not None:
            records = dataset.ended(options.num_simulations, options.max_seconds)
        return records

    def model_id(self, this: Round, records: list[ShardRecord]) -> str:
        """Name of the model that is trained on the given shards of a round."""
        return digest(
            {
                "dataset": this.dataset_id,
                "shards": [[record.index, record.digest] for record in records],
                **self._experiment.train.outcome(),
            }
        )

    def model(self, model_id: str) -> ObjectStore:
        """A model's folder."""
        return self._store.child(f"models/{model_id}")

    def predecessor(self, this: Round, records: list[ShardRecord]) -> ObjectStore | None:
        """The folder of a model to start from, trained on fewer of the given shards, if any.

        It has the same architecture, and held out the same simulations of those that it saw, so
        that what it was trained on is not what its successor is validated on. Of several it is the
        one that saw most; the choice is kept, as others may be trained meanwhile.
        """
        model_id = self.model_id(this, records)
        key = f"models/{model_id}/start.json"
        if not self._store.exists(key):
            chosen = self._predecessor(this, records, model_id)
            self._store.put_if_absent(key, json.dumps({"model": chosen}).encode())
        chosen = json.loads(self._store.get(key))["model"]
        return None if chosen is None else self.model(chosen)

    def _predecessor(self, this: Round, records: list[ShardRecord], own: str) -> str | None:
        wanted = dataclasses.asdict(self._experiment.train)
        alike = (*ARCHITECTURE, "seed", "validation_fraction")
        shards = [[record.index, record.digest] for record in records]
        found: dict[str, int] = {}
        for name in self._store.folders("models/"):
            key = f"models/{name}/{BUNDLE}"
            if name == own or not self._store.exists(key):
                continue
            about = json.loads(self._store.get(key))
            dataset = about.get("dataset", {})
            seen = dataset.get("shards", [])
            if (
                dataset.get("id") == this.dataset_id
                and seen == shards[: len(seen)]
                and len(seen) < len(shards)
                and all(about["estimator"].get(field) == wanted[field] for field in alike)
            ):
                found[name] = len(seen)
        return max(found, key=lambda name: (found[name], name), default=None)

    def _round(self, number: int, problem: Problem) -> Round:
        identity = digest(
            {
                "format": FORMAT,
                "problem": problem.fingerprint(),
                **self._experiment.simulate.outcome(),
            }
        )
        return Round(number, problem, identity, self._store.child(f"simulations/{identity}"))

    def _next(self, this: Round, model_id: str) -> Round:
        """The round after one whose model is trained: its prior is truncated to the posterior."""
        model, observed = self.model(model_id), self._problem.observed
        key = f"truncation-{digest(np.asarray(observed).tolist(), 8)}.json"
        # Kept, not computed again: another machine's rounding must not name another dataset.
        if not model.exists(key):
            prior = _truncated_prior(Posterior.from_store(model), this.problem)
            model.put_if_absent(key, json.dumps(prior_to_data(prior), indent=2).encode())
        prior = prior_from_data(json.loads(model.get(key)))
        problem = dataclasses.replace(this.problem, prior=prior, version=this.problem.source())
        problem.known_form = this.problem.known_form
        return self._round(this.number + 1, problem)


def _truncated_prior(posterior: Posterior, problem: Problem) -> Any:
    """The prior restricted to the box of the observed data's posterior, with a margin."""
    draws = posterior.sample((_TRUNCATION_DRAWS,), problem.observed, seed=0).double().numpy()
    tails = np.quantile(draws, [_TRUNCATED_TAIL, 1 - _TRUNCATED_TAIL], axis=0)
    margin = _TRUNCATION_MARGIN * (tails[1] - tails[0])
    low, high = support_bounds(problem.prior)
    return truncate(
        problem.prior, np.maximum(low, tails[0] - margin), np.minimum(high, tails[1] + margin)
    )
