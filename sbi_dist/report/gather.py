"""What an experiment has in its store, gathered for the report page and written beside it."""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
import math
from typing import Any

import numpy as np
import torch

from sbi_dist.benchmark.published import NPE
from sbi_dist.benchmark.records import read_best
from sbi_dist.catalog.draw import LEAST_SAMPLE_SIZE
from sbi_dist.catalog.infer import MANIFEST, PREDICTIVE
from sbi_dist.catalog.table import read_draws
from sbi_dist.estimation.snapshot import METRICS
from sbi_dist.experiment import Experiment
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.priors import describe, prior_from_data, sample_prior, support_bounds
from sbi_dist.problem import Problem
from sbi_dist.promotion import Promotion
from sbi_dist.report.content import (
    AgreementFacts,
    CalibrationFacts,
    DatasetFacts,
    FailureFacts,
    ModelFacts,
    ObservationFacts,
    PredictiveAxes,
    ReportContent,
    TuneFacts,
)
from sbi_dist.report.page import render
from sbi_dist.report.recovery import recover
from sbi_dist.report.table import format_table, posterior_table
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.failures import frequent_failures
from sbi_dist.simulation.shard import ShardRecord
from sbi_dist.store import ObjectStore
from sbi_dist.tuning.stage import latest_summary
from sbi_dist.tuning.table import HEADINGS

__all__ = ["Finished", "write_report"]

_ESTIMATORS = {"nsf": "neural spline flow", "maf": "masked autoregressive flow"}
_OBSERVATIONS = 6
_DRAWN = ("ok", "low_ess")  # statuses of an observation with draws
_PRIOR_DRAWS = 20_000


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a report is about: an experiment, its model in use, and draws of that."""

    experiment: Experiment
    problem: Problem
    store: ObjectStore
    model_id: str
    model: ObjectStore
    draws: ObjectStore


def write_report(finished: Finished) -> tuple[ObjectStore, str]:
    """Write ``report/`` of an experiment; its folder and the first posterior's table as text."""
    content = _content(finished)
    target = finished.store.child("report")
    for name, data in render(content, max_observations=_OBSERVATIONS).items():
        target.put(name, data)
    shown = next((each for each in content.observations if each.status in _DRAWN), None)
    if shown is None:
        return target, "no draws of an observation are kept that has a posterior"
    rows = posterior_table(
        shown.draws, list(content.parameter_names), content.units, shown.true_parameters
    )
    return target, format_table(rows)


def _content(finished: Finished) -> ReportContent:
    problem, experiment = finished.problem, finished.experiment
    posterior = Posterior.from_store(finished.model)
    about = posterior.about
    history = json.loads(finished.model.get(METRICS))
    history["training_loss"] = [
        float("nan") if loss is None else loss for loss in history["training_loss"]
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior_draws = sample_prior(problem.prior, _PRIOR_DRAWS)
    stored = Dataset(finished.store.child(f"simulations/{about['dataset']['id']}"))
    records = stored.stored().records
    dataset, notes = _dataset(stored, records, about)
    trained_prior = prior_from_data(about["prior"])
    if about["dataset"]["round"] > 1 and trained_prior is not None:
        notes.append(
            f"The model was trained in round {about['dataset']['round']} on simulations from the "
            "prior truncated to the box that holds the posterior of the observed data "
            f"({'; '.join(describe(trained_prior))}). It is valid for these data, not for others."
        )
    notes += [f"While the model was trained: {note}." for note in history.get("notes", [])]
    notes += _weighting_notes(finished.draws) + _summary_notes(finished.draws)
    description = "\n\n".join(part for part in (problem.title, problem.description) if part)
    axis = problem.axis
    return ReportContent(
        experiment=experiment.name,
        problem=description or f"Parameters of {experiment.problem} given its data.",
        reference=problem.reference or None,
        parameter_names=list(problem.parameter_names or ()),
        units=list(problem.parameter_units) if problem.parameter_units else None,
        prior_draws=prior_draws,
        prior_description=describe(problem.prior),
        bounds=np.stack(support_bounds(problem.prior), axis=1),
        dataset=dataset,
        model=ModelFacts(
            model_id=finished.model_id,
            estimator=_ESTIMATORS[about["estimator"]["estimator"]],
            weights=about["num_weights"],
            training_seconds=history["seconds"],
            history=history,
            validation_loss=history["best_validation_loss"],
        ),
        observations=_observations(problem, finished.draws, posterior),
        axes=PredictiveAxes()
        if axis is None
        else PredictiveAxes(
            coordinate=None if axis.values is None else np.asarray(axis.values, dtype=float),
            coordinate_label=axis.label or None,
            series_names=list(axis.series) or None,
            value_label=axis.value_label or None,
            log_scale=axis.log,
        ),
        recovery=recover(
            posterior, stored, records, weighted=_proposals(finished.draws) is not None
        ),
        calibration=_calibration(finished.store, finished.model_id),
        agreement=_agreement(finished, dataset.simulations),
        tune=_search(finished.store, about["dataset"]["id"]),
        settings=experiment.resolved(),
        versions=about["versions"],
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        notes=notes,
    )


def _dataset(
    dataset: Dataset, stored: dict[int, ShardRecord], about: dict[str, Any]
) -> tuple[DatasetFacts, list[str]]:
    """The simulations that the model was trained on."""
    used = {index for index, _ in about["dataset"]["shards"]}
    records = [stored[index] for index in sorted(used & stored.keys())]
    counts: dict[str, int] = {}
    for record in records:
        for name, count in record.statuses.items():
            counts[name] = counts.get(name, 0) + count
    total = sum(record.rows for record in records)
    failed = sum(record.failures for record in records)
    notes = []
    if failed:
        notes.append(
            f"{failed:,} of {total:,} simulations failed ({failed / total:.2%}) and were left out "
            "of the training: the posterior is conditional on a simulation that succeeds."
        )
    # Enough shards for a histogram of run times.
    durations = [dataset.read(record.index).duration_s for record in records[:8]]
    facts = DatasetFacts(
        dataset_id=about["dataset"]["id"],
        simulations=total,
        status_counts=counts,
        durations=np.concatenate(durations) if durations else np.zeros(0),
        failures=_failures(frequent_failures(records)),
    )
    return facts, notes


def _failures(entries: list[dict[str, Any]]) -> list[FailureFacts]:
    return [FailureFacts(entry["message"], entry["count"], entry["theta"]) for entry in entries]


def _calibration(store: ObjectStore, model_id: str) -> CalibrationFacts | None:
    """What the latest calibration of the model found, if any."""
    found = Promotion(store).calibration(model_id)
    try:
        return CalibrationFacts(
            verdict=found["verdict"],
            summary=found["summary"],
            held_out=found["held_out"],
            draws=found["draws"],
            tests=found["tests"],
            curves=found["curves"],
            created=f"{datetime.datetime.fromisoformat(found['created']):%Y-%m-%d %H:%M UTC}",
            failures=_failures(found.get("simulations", {}).get("failures", [])),
        )
    except (KeyError, TypeError, ValueError):  # none, or one of another version
        return None


def _agreement(finished: Finished, simulations: int) -> AgreementFacts | None:
    """What ``sbi-dist benchmark`` found of the model, if it is one of its own."""
    found = read_best(finished.store, finished.model_id)
    if found is None:
        return None
    task, c2st = found
    return AgreementFacts(c2st, simulations, NPE[task].get(simulations))


def _search(store: ObjectStore, dataset_id: str) -> TuneFacts | None:
    """The search on the model's simulations that ended last, if any."""
    summary = latest_summary(store, dataset_id)
    if summary is None:
        return None
    return TuneFacts(
        search_id=summary["search"],
        sentence=summary["verdict"],
        headings=HEADINGS,
        rows=[[row[name] for name in HEADINGS] for row in summary["rows"]],
        failures=[f"{row['trial']}: {row['reason']}" for row in summary["rows"] if row["reason"]],
    )


def _proposals(target: ObjectStore) -> int | None:
    """How many of the network's draws were weighted for each observation; None: they were not."""
    return json.loads(target.get(MANIFEST))["proposals"]


def _weighting_notes(target: ObjectStore) -> list[str]:
    """What importance weights did to the draws, where they were used."""
    proposals = _proposals(target)
    if proposals is None:
        return []
    read = read_draws(target, 1)
    size = float(read.effective_sample_sizes[0])
    if read.statuses[0] == "low_ess":
        return [
            f"Importance weights were given up: {proposals:,} draws had an effective "
            f"sample size of {size:,.0f}, less than {LEAST_SAMPLE_SIZE}. The draws are the "
            "network's own; train it longer or on more simulations."
        ]
    return [
        f"The draws are the network's, weighted by the known likelihood and resampled: "
        f"{proposals:,} draws have an effective sample size of {size:,.0f} "
        f"({size / proposals:.1%})."
    ]


def _summary_notes(target: ObjectStore) -> list[str]:
    """That there are no draws to show, where only summaries were kept."""
    manifest = json.loads(target.get(MANIFEST))
    if manifest["output"] != "summary":
        return []
    return [
        f"The posteriors of {manifest['observations']:,} observations are kept as summaries in "
        f"{target.uri}, without draws to show here."
    ]


def _observations(
    problem: Problem, target: ObjectStore, posterior: Posterior
) -> list[ObservationFacts]:
    manifest = json.loads(target.get(MANIFEST))
    of_problem = manifest["catalog"].startswith("observed-")
    p_value = None
    if of_problem:
        observed = torch.as_tensor(np.asarray(problem.observed, dtype=np.float32))
        found = float(posterior.out_of_distribution(observed[None])[1][0])
        p_value = None if math.isnan(found) else found
    read = read_draws(target, _OBSERVATIONS + 1)
    if "draws" not in read.columns:
        return []
    facts = []
    for number, (name, status) in enumerate(zip(read.ids, read.statuses, strict=True)):
        predictive = None
        if of_problem and target.exists(PREDICTIVE):
            predictive = np.load(io.BytesIO(target.get(PREDICTIVE)), allow_pickle=False)
        facts.append(
            ObservationFacts(
                observation_id=name,
                draws=read.draws[number],
                status=status,
                true_parameters=problem.true_parameters if of_problem else None,
                observed=problem.observed if of_problem else None,
                predictive=predictive,
                p_value=p_value,
            )
        )
    return facts
