"""The stages of one experiment, each reading from the store what the one before left there.

A stage's outcome lies under a name made of its fingerprint, so that running a stage again finds
finished work and a changed experiment never meets results that it did not make. The command line
and the job scripts call these methods; the work is done in the rooms of the stages.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from sbi_dist.catalog.infer import MANIFEST, PREDICTIVE, read_draws
from sbi_dist.catalog.infer import infer as infer_catalog
from sbi_dist.catalog.observations import Catalog, make_catalog, read_catalog
from sbi_dist.errors import InputError
from sbi_dist.estimation.bundle import BUNDLE, load_bundle
from sbi_dist.estimation.trainer import METRICS, train
from sbi_dist.experiment import Experiment, digest
from sbi_dist.posterior.posterior import PROMOTED, Posterior
from sbi_dist.priors import prior_from_data, prior_to_data, support_bounds, truncate
from sbi_dist.problem import Problem, load_problem
from sbi_dist.progress import say
from sbi_dist.session import connected
from sbi_dist.simulation.dataset import Dataset, ShardRecord, versions
from sbi_dist.simulation.driver import repair, simulate
from sbi_dist.simulation.plan import plan_shards
from sbi_dist.simulation.predictive import simulate_predictive
from sbi_dist.store import ObjectStore, open_store

__all__ = ["Pipeline"]

# A box that leaves out this much of the posterior on each side of each parameter, and a margin
# for an estimator that is not exact yet.
_TRUNCATED_TAIL = 3e-4
_TRUNCATION_DRAWS = 50_000
_TRUNCATION_MARGIN = 0.15


@dataclasses.dataclass(frozen=True)
class _Round:
    """One round of simulation: its problem and where its simulations are."""

    number: int
    problem: Problem
    dataset_id: str
    store: ObjectStore


class Pipeline:
    """The stages of an experiment.

    Args:
        experiment: the experiment.
        base: folder that a problem file is relative to.
        address: Ray cluster; None starts a local one where a stage needs Ray.

    Raises:
        InputError: the problem or the store can't be used.
    """

    def __init__(
        self, experiment: Experiment, base: Path | None = None, address: str | None = None
    ) -> None:
        self.experiment, self.address = experiment, address
        self.problem = load_problem(experiment.problem, base)
        if experiment.simulate.rounds > 1 and self.problem.observed is None:
            raise InputError(
                f"simulate.rounds is {experiment.simulate.rounds}, but the problem has no observed "
                "data to truncate the prior for; use 1, or give Problem(observed=...)"
            )
        self.store = open_store(experiment.store).child(experiment.name)

    # ---- where things are ----

    def _round(self, number: int, problem: Problem) -> _Round:
        identity = digest({"problem": problem.fingerprint(), **self.experiment.simulate.outcome()})
        return _Round(number, problem, identity, self.store.child(f"simulations/{identity}"))

    def _records(self, this: _Round) -> list[ShardRecord] | None:
        """The shards of a round's dataset, or None while it is not complete."""
        dataset = Dataset(this.store)
        manifest = dataset.manifest()
        if not manifest:
            return None
        stored = dataset.stored()
        rows = {index: record.rows for index, record in stored.items()}
        planned = plan_shards(
            self.experiment.simulate.num_simulations, manifest["shard_size"], rows
        )
        if any(shard.index not in stored for shard in planned):
            return None
        return [stored[shard.index] for shard in planned]

    def _model_id(self, this: _Round, records: list[ShardRecord]) -> str:
        return digest(
            {
                "dataset": this.dataset_id,
                "shards": [[record.index, record.digest] for record in records],
                **self.experiment.train.outcome(),
            }
        )

    def _model_store(self, model_id: str) -> ObjectStore:
        return self.store.child(f"models/{model_id}")

    def _next_round(self, this: _Round, model_id: str) -> _Round:
        """The round after one whose model is trained: its prior is truncated to the posterior."""
        model = self._model_store(model_id)
        key = f"truncation-{digest(np.asarray(self.problem.observed).tolist(), 8)}.json"
        # Kept, not computed again: another machine's rounding must not name another dataset.
        if not model.exists(key):
            prior = _truncated_prior(Posterior.from_store(model), this.problem)
            model.put_if_absent(key, json.dumps(prior_to_data(prior), indent=2).encode())
        prior = prior_from_data(json.loads(model.get(key)))
        problem = dataclasses.replace(this.problem, prior=prior, version=this.problem.source())
        return self._round(this.number + 1, problem)

    def _current(self) -> _Round:
        """The first round that is not simulated and trained in full, or else the last one."""
        this = self._round(1, self.problem)
        while this.number < self.experiment.simulate.rounds:
            records = self._records(this)
            if records is None:
                return this
            model_id = self._model_id(this, records)
            if not self._model_store(model_id).exists(BUNDLE):
                return this
            this = self._next_round(this, model_id)
        return this

    # ---- stages ----

    def simulate(self, repair_damaged: bool = False) -> _Round:
        """Simulate the current round; finished at once where it is complete."""
        if repair_damaged:
            # Before anything reads them.
            for identity in sorted({key.split("/")[1] for key in self.store.list("simulations/")}):
                folder = self.store.child(f"simulations/{identity}")
                for key in repair(folder):
                    say(f"simulate: {folder.uri}/{key} was damaged and is simulated again")
        this = self._current()
        options = self.experiment.simulate
        if self._records(this) is None:
            # A wrong simulator is told before Ray is started.
            this.problem.form()
            with connected(self.address):
                simulate(this.problem, options, this.store)
        rounds = f"round {this.number} of {options.rounds}, " if options.rounds > 1 else ""
        say(f"simulate: {rounds}dataset {this.dataset_id} is complete in {this.store.uri}")
        return this

    def train(self) -> str:
        """Train on the current round's simulations, promote the last round's model; the model."""
        this = self._current()
        records = self._records(this)
        if records is None:
            stored = sum(record.rows for record in Dataset(this.store).stored().values())
            raise InputError(
                f"train: {this.store.uri} holds {stored:,} of the "
                f"{self.experiment.simulate.num_simulations:,} simulations that "
                "simulate.num_simulations asks for; run `sbi-dist simulate` first"
            )
        model_id = self._model_id(this, records)
        model = self._model_store(model_id)
        if model.exists(BUNDLE):
            try:
                load_bundle(model)
            except InputError as error:
                say(f"{error}; it is trained again")
                model.delete(BUNDLE)
        if not model.exists(BUNDLE):
            with connected(self.address):
                train(
                    this.store,
                    [record.index for record in records],
                    support_bounds(this.problem.prior),
                    model,
                    self.experiment.train,
                    self._about(this, records, model_id),
                )
        say(f"train: model {model_id} is complete in {model.uri}")
        if this.number == self.experiment.simulate.rounds:
            self.store.put(PROMOTED, json.dumps({"model": model_id}).encode())
        return model_id

    def _about(self, this: _Round, records: list[ShardRecord], model_id: str) -> dict[str, Any]:
        return {
            "model": model_id,
            "experiment": self.experiment.name,
            "prior": prior_to_data(this.problem.prior),
            "parameter_names": list(this.problem.parameter_names or ()),
            "parameter_units": list(this.problem.parameter_units or ()),
            "dataset": {
                "id": this.dataset_id,
                "round": this.number,
                "shards": [[record.index, record.digest] for record in records],
            },
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
        }

    def promoted(self) -> tuple[str, ObjectStore]:
        """The model in use and its folder.

        Raises:
            InputError: no model was trained to the end.
        """
        try:
            model_id = json.loads(self.store.get(PROMOTED))["model"]
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{self.store.uri} holds no trained model; run `sbi-dist train` first"
            ) from None
        return model_id, self._model_store(model_id)

    def infer(self, output: str | None = None) -> tuple[ObjectStore, dict[str, Any]]:
        """Draw from the posterior of the catalog; the folder of the draws and its manifest."""
        model_id, model = self.promoted()
        posterior = Posterior.from_store(model)
        options = self.experiment.infer
        catalog = self._catalog(posterior)
        target = open_store(output) if output else self._draws(catalog, model_id)
        manifest = infer_catalog(
            posterior, model, catalog, options, target, self.problem, self.address
        )
        if options.observations is None and options.predictive_simulations:
            self._predict(target)
        statuses = ", ".join(f"{count:,} {name}" for name, count in manifest["statuses"].items())
        say(
            f"infer: {options.num_samples:,} draws for each of {len(catalog.ids):,} observation(s) "
            f"({statuses}) are in {target.uri}"
        )
        return target, manifest

    def _draws(self, catalog: Catalog, model_id: str) -> ObjectStore:
        """Folder of a catalog's draws; another number or seed of draws is another folder."""
        chosen = self.experiment.infer.outcome()
        default = type(self.experiment.infer)().outcome()
        suffix = "" if chosen == default else f"-{digest(chosen, 6)}"
        return self.store.child(f"posteriors/{catalog.name}{suffix}-{model_id}")

    def drawn(self) -> ObjectStore:
        """The folder of the draws that the experiment asks for, or else others of its model.

        Raises:
            InputError: the model in use has no draws.
        """
        model_id, model = self.promoted()
        others = sorted(
            {
                key.split("/")[1]
                for key in self.store.list("posteriors/")
                if key.endswith(f"-{model_id}/{MANIFEST}")
                # Draws of data that the problem had before its observed data were changed.
                and not key.startswith("posteriors/observed-")
            }
        )
        asked = None
        if self.problem.observed is not None or self.experiment.infer.observations is not None:
            asked = self._draws(self._catalog(Posterior.from_store(model)), model_id)
        if asked is not None and asked.exists(MANIFEST):
            return asked
        if not others:
            raise InputError(
                f"{self.store.uri} holds no draws of model {model_id}; run `sbi-dist infer` first"
            )
        return self.store.child(f"posteriors/{others[0]}")

    def _catalog(self, posterior: Posterior) -> Catalog:
        path = self.experiment.infer.observations
        if path is not None:
            return read_catalog(path, posterior.x_shape)
        if self.problem.observed is None:
            raise InputError(
                "infer: the problem has no observed data; give --observations FILE, or "
                "Problem(observed=...)"
            )
        observed = np.asarray(self.problem.observed, dtype=np.float32)
        if observed.shape != posterior.x_shape:
            raise InputError(
                f"problem.observed has shape {observed.shape}; the model takes {posterior.x_shape}"
            )
        name = f"observed-{digest(observed.tolist(), 8)}"
        return make_catalog(name, ["observed"], observed[None])

    def _predict(self, target: ObjectStore) -> None:
        """Simulate from posterior draws of the observed data, for the predictive check."""
        if target.exists(PREDICTIVE):
            return
        options = self.experiment.infer
        draws = read_draws(target, 1).draws[0]
        chosen = np.linspace(0, len(draws) - 1, options.predictive_simulations).astype(int)
        x = simulate_predictive(self.problem, draws[chosen], options.seed)
        sink = io.BytesIO()
        np.save(sink, x)
        target.put(PREDICTIVE, sink.getvalue())

    def report(self) -> tuple[ObjectStore, str]:
        """Write the report page; its folder, and the table of the posterior as text."""
        # Imported here: the other stages draw nothing.
        from sbi_dist.report.gather import Finished, write_report

        model_id, model = self.promoted()
        finished = Finished(
            self.experiment, self.problem, self.store, model_id, model, self.drawn()
        )
        return write_report(finished)

    def run(self) -> tuple[ObjectStore, ObjectStore, str] | None:
        """All stages; folders of the draws and of the report, and the posterior's table.

        None where there are no observations to infer from: the model is trained all the same.
        """
        with connected(self.address):
            for _ in range(self.experiment.simulate.rounds):
                done = self.simulate()
                self.train()
                if done.number == self.experiment.simulate.rounds:
                    break
            if self.problem.observed is None and self.experiment.infer.observations is None:
                return None
            draws, _ = self.infer()
            page, table = self.report()
        return draws, page, table

    def status(self) -> dict[str, Any]:
        """What there is in the store for this experiment."""
        this = self._current()
        records = self._records(this)
        stored = Dataset(this.store).stored()
        model_id = self._model_id(this, records) if records is not None else None
        trained = model_id is not None and self._model_store(model_id).exists(BUNDLE)
        counts: dict[str, int] = {}
        for record in stored.values():
            for name, count in record.statuses.items():
                counts[name] = counts.get(name, 0) + count
        promoted = None
        if self.store.exists(PROMOTED):
            promoted = json.loads(self.store.get(PROMOTED))["model"]
        return {
            "experiment": self.experiment.resolved(),
            "store": self.store.uri,
            "round": f"{this.number} of {self.experiment.simulate.rounds}",
            "problem": self.problem.fingerprint(),
            "dataset": this.dataset_id,
            "simulations": sum(record.rows for record in stored.values()),
            "statuses": counts,
            "model": model_id,
            "trained": trained,
            "training": self._training_summary(model_id),
            "promoted": promoted,
            "posteriors": sorted({key.split("/")[1] for key in self.store.list("posteriors/")}),
        }

    def _training_summary(self, model_id: str | None) -> dict[str, Any] | None:
        if model_id is None or not self._model_store(model_id).exists(METRICS):
            return None
        history = json.loads(self._model_store(model_id).get(METRICS))
        if "epoch" not in history:
            return None
        return {
            "epochs": history["epoch"][-1],
            "best_validation_loss": history["best_validation_loss"],
            "seconds": round(history["seconds"], 1),
        }


def _truncated_prior(posterior: Posterior, problem: Problem) -> Any:
    """The prior restricted to the box of the observed data's posterior, with a margin."""
    draws = posterior.sample((_TRUNCATION_DRAWS,), problem.observed, seed=0).double().numpy()
    tails = np.quantile(draws, [_TRUNCATED_TAIL, 1 - _TRUNCATED_TAIL], axis=0)
    margin = _TRUNCATION_MARGIN * (tails[1] - tails[0])
    low, high = support_bounds(problem.prior)
    return truncate(
        problem.prior, np.maximum(low, tails[0] - margin), np.minimum(high, tails[1] + margin)
    )
