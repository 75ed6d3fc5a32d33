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
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbi_dist.catalog.infer import FORMAT, MANIFEST, PREDICTIVE
from sbi_dist.catalog.infer import infer as infer_catalog
from sbi_dist.catalog.options import InferOptions
from sbi_dist.catalog.source import ArraySource, Source, open_catalog
from sbi_dist.catalog.table import read_draws
from sbi_dist.errors import InputError, StageError
from sbi_dist.estimation.bundle import BUNDLE, load_bundle
from sbi_dist.estimation.snapshot import METRICS
from sbi_dist.estimation.trainer import remove_rest, train
from sbi_dist.experiment import Experiment, digest
from sbi_dist.gate import Gate, Judged
from sbi_dist.overlap import end_overlap, overlap_training, warm_start
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.priors import prior_to_data, sample_prior, support_bounds
from sbi_dist.problem import load_problem
from sbi_dist.progress import say
from sbi_dist.promotion import Promotion, calibration_key
from sbi_dist.rounds import Round, Rounds
from sbi_dist.session import connected
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.driver import repair, simulate
from sbi_dist.simulation.failures import frequent_failures
from sbi_dist.simulation.log import drivers
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.predictive import simulate_predictive
from sbi_dist.simulation.prepare import find_form
from sbi_dist.simulation.shard import ShardRecord, versions
from sbi_dist.simulation.verify import verify
from sbi_dist.store import ObjectStore, open_store
from sbi_dist.tuning.stage import Found, Simulated, searches, tune_settings

__all__ = ["Pipeline", "Ran"]


@dataclasses.dataclass(frozen=True)
class Ran:
    """What all stages came to.

    Attributes:
        model: folder of the model.
        judged: its calibration; None where it was not calibrated.
        draws: folder of the draws; None where there are no observations, or the model failed its
            calibration while another one is in use.
        page: folder of the report, where there are draws.
        table: the posterior as text, where there are draws.
    """

    model: ObjectStore
    judged: Judged | None
    draws: ObjectStore | None = None
    page: ObjectStore | None = None
    table: str = ""


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
        store = open_store(experiment.store, experiment.store_patience_s)
        store.check()
        self.store = store.child(experiment.name)
        self.rounds = Rounds(experiment, self.problem, self.store)
        self.promotion = Promotion(self.store)

    # ---- stages ----

    def simulate(self, repair_damaged: bool = False) -> Round:
        """Simulate the current round; finished at once where it is complete."""
        if repair_damaged:
            # Before anything reads them.
            for identity in self.store.folders("simulations/"):
                folder = self.store.child(f"simulations/{identity}")
                for key in repair(folder):
                    say(f"simulate: {folder.uri}/{key} was damaged and is simulated again")
        this = self.rounds.current()
        if self.rounds.records(this) is None:
            # A wrong simulator is told before Ray is started.
            find_form(this.problem, self.experiment.simulate)
            with connected(self.address):
                self._simulate(this, self.experiment.simulate)
        self._say_simulated(this)
        return this

    def _simulate(self, this: Round, options: SimulateOptions, **progress: Any) -> None:
        """Simulate a round and note what came of it."""
        labels = {"experiment": self.experiment.name, "dataset": this.dataset_id}
        records = simulate(this.problem, options, this.store, labels=labels, **progress)
        if not records:
            raise StageError(
                f"simulate: no shard was finished within simulate.max_seconds="
                f"{options.max_seconds:g}; allow more time, or set a smaller simulate.shard_size"
            )
        dataset = Dataset(this.store)
        snapshot = dataset.snapshot(records)
        wanted, rows = options.num_simulations, sum(record.rows for record in records)
        if options.max_seconds is not None and (wanted is None or rows < wanted):
            dataset.end(wanted, options.max_seconds, snapshot)

    def _overlap(self) -> None:
        """Simulate the current round, and train on what has landed meanwhile."""
        this = self.rounds.current()
        if self.rounds.records(this) is not None:
            return

        def simulated(options: SimulateOptions, stop: threading.Event) -> None:
            self._simulate(this, options, stop=stop)

        def trained(records: list[ShardRecord], start: ObjectStore | None) -> ObjectStore:
            return self._fit(this, records, start, stoppable=True)

        find_form(this.problem, self.experiment.simulate)
        overlap_training(this, self.experiment, simulated, trained, self.rounds)

    def _say_simulated(self, this: Round) -> None:
        options = self.experiment.simulate
        rounds = f"round {this.number} of {options.rounds}, " if options.rounds > 1 else ""
        say(f"simulate: {rounds}dataset {this.dataset_id} is complete in {this.store.uri}")

    def verify(self, num_rows: int) -> str:
        """Check every stored shard and simulate some rows again; what was found, in a sentence.

        Raises:
            InputError: nothing is simulated yet.
            StageError: a shard is damaged, or a row comes out differently.
        """
        this = self.rounds.current()
        if not Dataset(this.store).manifest():
            raise InputError(
                f"verify: {this.store.uri} holds no dataset; run `sbi-dist simulate` first"
            )
        find_form(this.problem, self.experiment.simulate)
        with connected(self.address):
            return verify(this.problem, self.experiment.simulate, this.store, num_rows)

    def train(self) -> str:
        """Train on the current round's simulations, promote the last round's model; the model."""
        this = self.rounds.current()
        records = self._simulated(this, "train")
        start = warm_start(this, self.rounds)
        if start is None and self.experiment.train.warm_start:
            start = self.rounds.predecessor(this, records)
            if start is not None:
                say(f"train: starts from the weights of {start.uri}")
        model = self._fit(this, records, start)
        model_id = self.rounds.model_id(this, records)
        end_overlap(this, self.rounds, model)
        say(f"train: model {model_id} is complete in {model.uri}")
        if this.number == self.experiment.simulate.rounds:
            self._put_in_use(model_id)
        return model_id

    def _put_in_use(self, model_id: str) -> None:
        if not self.promotion.trained(model_id):
            why = "it is calibrated; `sbi-dist calibrate` replaces it if the new one passes"
            if self.promotion.verdict(model_id) == "fail":
                why = "the new one failed its calibration"
            in_use = self.promotion.model
            stays = "no model is in use" if in_use is None else f"model {in_use} stays in use"
            say(f"train: {stays}: {why}")

    def calibrate(self, force: bool = False) -> Judged:
        """Check the trained model against held-out simulations, and put it in use if it passes.

        With ``force`` it is put in use whatever comes of it. Ray is started only where there is
        something to simulate or to draw.

        Raises:
            InputError: there is no trained model.
        """
        this = self.rounds.current()
        records = self._simulated(this, "calibrate")
        model_id = self.rounds.model_id(this, records)
        rounds = self.experiment.simulate.rounds
        if not self.rounds.model(model_id).exists(BUNDLE):
            which = f" of round {this.number} of {rounds}" if rounds > 1 else ""
            raise InputError(
                f"calibrate: the model{which} is not trained; run `sbi-dist train` first"
            )
        return self._gate().judge(this, records, model_id, force)

    def _gate(self) -> Gate:
        return Gate(self.experiment, self.store, self.promotion, self.address)

    def promote(self, model_id: str, force: bool = False) -> str:
        """Make a trained model the one in use, or go back to the ``former`` one; its name.

        Raises:
            InputError: there is no such model, it is damaged, or, without ``force``, it failed its
                calibration.
        """
        return self.promotion.choose(model_id, force)

    def _simulated(self, this: Round, stage: str) -> list[ShardRecord]:
        """The shards of a round that is simulated in full.

        Raises:
            InputError: it is not; says what there is.
        """
        records = self.rounds.records(this)
        if records is None:
            stored = Dataset(this.store).stored().rows
            options = self.experiment.simulate
            asked = (
                f"simulate.max_seconds={options.max_seconds:g} is not up"
                if options.num_simulations is None
                else f"simulate.num_simulations asks for {options.num_simulations:,}"
            )
            which = f" of round {this.number}" if options.rounds > 1 else ""
            raise InputError(
                f"{stage}: {this.store.uri} holds {stored:,} simulations{which} and {asked}; run "
                "`sbi-dist simulate` first"
            )
        return records

    def tune(self) -> Found:
        """Search over settings of the train section, on the current round's simulations."""
        this = self.rounds.current()
        records = self._simulated(this, "tune")
        bounds = support_bounds(this.problem.prior)
        return tune_settings(
            self.experiment.tune,
            self.experiment.train,
            Simulated(this.dataset_id, this.store, records, bounds),
            self.store,
            self.address,
        )

    def _fit(
        self,
        this: Round,
        records: list[ShardRecord],
        start: ObjectStore | None = None,
        stoppable: bool = False,
    ) -> ObjectStore:
        """Train on the given shards of a round, from the model ``start`` on; the model's folder."""
        model_id = self.rounds.model_id(this, records)
        model = self.rounds.model(model_id)
        if model.exists(BUNDLE):
            try:
                load_bundle(model)
            except InputError as error:
                say(f"{error}; it is trained again")
                model.delete(BUNDLE)
        if model.exists(BUNDLE):
            remove_rest(model)
        else:
            about = self._about(this, records, model_id)
            if start is not None:
                about["started_from"] = start.uri.rpartition("/")[2]
            with connected(self.address):
                train(
                    this.store,
                    records,
                    support_bounds(this.problem.prior),
                    model,
                    self.experiment.train,
                    about,
                    start=start,
                    stoppable=stoppable,
                )
        return model

    def _about(self, this: Round, records: list[ShardRecord], model_id: str) -> dict[str, Any]:
        return {
            "model": model_id,
            "experiment": self.experiment.name,
            "prior": prior_to_data(this.problem.prior),
            "parameter_names": list(this.problem.parameter_names or ()),
            "parameter_units": list(this.problem.parameter_units or ()),
            "dataset": {
                "id": this.dataset_id,
                "round": this.number,
                "snapshot": Dataset(this.store).snapshot(records),
                "shards": [[record.index, record.digest] for record in records],
            },
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {**versions(), **self.problem.package_versions()},
        }

    def promoted(self) -> tuple[str, ObjectStore]:
        """The model in use and its folder.

        Raises:
            InputError: none is; says why.
        """
        model_id = self.promotion.model
        if model_id is None:
            raise InputError(f"{self.store.uri} {self.promotion.why_none()}")
        return model_id, self.rounds.model(model_id)

    def _model(self, model_id: str | None) -> tuple[str, ObjectStore]:
        return self.promoted() if model_id is None else (model_id, self.rounds.model(model_id))

    def infer(
        self, output: str | None = None, model_id: str | None = None
    ) -> tuple[ObjectStore, dict[str, Any]]:
        """Draw from the posterior of the catalog; the folder of the draws and its manifest.

        Args:
            output: folder of the draws; default: in the experiment's own.
            model_id: a trained model; default: the one in use.
        """
        model_id, model = self._model(model_id)
        posterior = Posterior.from_store(model)
        options, source = self._kept(), self._catalog(posterior)
        target = (
            open_store(output, self.experiment.store_patience_s)
            if output
            else self._draws(source, model_id)
        )
        manifest = infer_catalog(
            posterior,
            model,
            source,
            options,
            target,
            self.problem,
            self.address,
            experiment=self.experiment.name,
        )
        if options.observations is None and options.predictive_simulations:
            self._predict(target)
        statuses = ", ".join(f"{count:,} {name}" for name, count in manifest["statuses"].items())
        kept = {"samples": "", "summary": "summaries of ", "both": "summaries and "}[options.output]
        say(
            f"infer: {kept}{options.num_samples:,} draws for each of {len(source):,} "
            f"observation(s) ({statuses}) are in {target.uri}"
        )
        return target, manifest

    def write_arviz(self, target: ObjectStore, manifest: dict[str, Any], path: str) -> None:
        """Write what :meth:`infer` left as a netCDF file for ArviZ.

        Raises:
            InputError: see ``stored_as_arviz``, or the file can't be written.
        """
        from sbi_dist.catalog.arviz import stored_as_arviz
        from sbi_dist.posterior.arviz import write

        options = self._kept()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed % 2**32)
            prior = sample_prior(self.problem.prior, 1000)
        tree = stored_as_arviz(
            target,
            manifest["observations"],
            Posterior.from_store(self.promoted()[1]),
            options.num_samples,
            prior,
            self.problem.observed if options.observations is None else None,
        )
        write(tree, path)
        say(f"infer: ArviZ reads these draws from {path}")

    def _kept(self) -> InferOptions:
        """The options, with which the draws for the problem's own data are kept."""
        options = self.experiment.infer
        if options.observations is None and not options.keeps_draws:
            return dataclasses.replace(options, output="both")
        return options

    def _draws(self, catalog: Source, model_id: str) -> ObjectStore:
        """Folder of a catalog's draws; another number or seed of draws is another folder."""
        chosen = self._kept().outcome()
        default = type(self.experiment.infer)().outcome()
        suffix = "" if chosen == default else f"-{digest(chosen, 6)}"
        return self.store.child(f"posteriors/{catalog.name}{suffix}-{model_id}")

    def drawn(self, model_id: str | None = None) -> ObjectStore:
        """The folder of the draws that the experiment asks for, or else others of its model.

        Raises:
            InputError: the model has no draws.
        """
        model_id, model = self._model(model_id)
        others = [
            name
            for name in self.store.folders("posteriors/")
            if name.endswith(f"-{model_id}")
            # Draws of data that the problem had before its observed data were changed.
            and not name.startswith("observed-")
            and self.store.exists(f"posteriors/{name}/{MANIFEST}")
        ]
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

    def _catalog(self, posterior: Posterior) -> Source:
        path = self.experiment.infer.observations
        if path is not None:
            return open_catalog(path, posterior.x_shape, self.experiment.store_patience_s)
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
        name = f"observed-{digest([FORMAT, observed.tolist()], 8)}"
        return ArraySource.of(name, observed[None], ["observed"])

    def _predict(self, target: ObjectStore) -> None:
        """Simulate from posterior draws of the observed data, for the predictive check."""
        if target.exists(PREDICTIVE):
            return
        options = self.experiment.infer
        draws = read_draws(target, 1, ["draws"]).draws[0]
        chosen = np.linspace(0, len(draws) - 1, options.predictive_simulations).astype(int)
        x = simulate_predictive(
            self.problem, draws[chosen], options.seed, self.experiment.simulate.timeout_s
        )
        sink = io.BytesIO()
        np.save(sink, x)
        target.put(PREDICTIVE, sink.getvalue())

    def report(self, model_id: str | None = None) -> tuple[ObjectStore, str]:
        """Write the report page; its folder, and the table of the posterior as text."""
        # Imported here: the other stages draw nothing.
        from sbi_dist.report.gather import Finished, write_report

        model_id, model = self._model(model_id)
        finished = Finished(
            self.experiment, self.problem, self.store, model_id, model, self.drawn(model_id)
        )
        return write_report(finished)

    def run(self, overlap: bool = False) -> Ran:
        """All stages.

        With ``overlap``, training begins on what has landed while simulation goes on. The new
        model is calibrated, unless ``calibrate.enabled`` is off and no calibrated model is in use.
        One that fails is drawn from and reported only where no other one is in use.
        """
        if self.rounds.records(self.rounds.current()) is None:
            find_form(self.problem, self.experiment.simulate)
        with connected(self.address):
            for _ in range(self.experiment.simulate.rounds):
                if overlap:
                    self._overlap()
                done = self.simulate()
                model_id = self.train()
                if done.number == self.experiment.simulate.rounds:
                    break
            judged = None
            if self.experiment.calibrate.enabled or self.promotion.model != model_id:
                records = self._simulated(done, "calibrate")
                judged = self._gate().judge(done, records, model_id, automatic=True)
            ran = Ran(self.rounds.model(model_id), judged)
            if self.promotion.model not in (None, model_id):
                return ran
            if self.problem.observed is None and self.experiment.infer.observations is None:
                return ran
            draws, _ = self.infer(model_id=model_id)
            page, table = self.report(model_id)
        return dataclasses.replace(ran, draws=draws, page=page, table=table)

    def status(self) -> dict[str, Any]:
        """What there is in the store for this experiment."""
        this = self.rounds.current()
        records = self.rounds.records(this)
        stored = Dataset(this.store).stored()
        model_id = self.rounds.model_id(this, records) if records is not None else None
        trained = model_id is not None and self.rounds.model(model_id).exists(BUNDLE)
        counts: dict[str, int] = {}
        for record in stored.records.values():
            for name, count in record.statuses.items():
                counts[name] = counts.get(name, 0) + count
        return {
            "experiment": self.experiment.resolved(),
            "store": self.store.uri,
            "round": f"{this.number} of {self.experiment.simulate.rounds}",
            "problem": self.problem.fingerprint(),
            "dataset": this.dataset_id,
            "simulations": stored.rows,
            "simulated": "complete" if records is not None else "not complete",
            "simulation_seconds": round(stored.seconds, 1),
            "statuses": counts,
            "failures": frequent_failures(stored.records.values()),
            "drivers": drivers(this.store),
            "model": model_id,
            "trained": trained,
            "training": self._training_summary(model_id),
            "promoted": self.promotion.model,
            "calibration": {
                name: self.promotion.calibration(name).get("verdict")
                for name in self.store.folders("calibration/")
                if self.store.exists(calibration_key(name))
            },
            "searches": searches(self.store),
            "posteriors": self.store.folders("posteriors/"),
        }

    def _training_summary(self, model_id: str | None) -> dict[str, Any] | None:
        if model_id is None or not self.rounds.model(model_id).exists(METRICS):
            return None
        history = json.loads(self.rounds.model(model_id).get(METRICS))
        if "epoch" not in history:
            return None
        return {
            "epochs": history["epoch"][-1],
            "best_validation_loss": history["best_validation_loss"],
            "seconds": round(history["seconds"], 1),
        }
