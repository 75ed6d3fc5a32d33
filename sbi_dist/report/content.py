"""What a report is made from: plain numbers, strings, mappings and numpy arrays.

Nothing here knows where the data came from or how it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class FailureFacts(NamedTuple):
    """One kind of failed simulation: its message, how many times, and parameters that led to it."""

    message: str
    times: int
    example: Sequence[float]


@dataclass(frozen=True, eq=False)
class DatasetFacts:
    """The simulations the model was trained on.

    Attributes:
        dataset_id: identifier of the stored simulations.
        simulations: how many were run, failed ones included.
        status_counts: simulations by status (ok, nonfinite, error, timeout, crashed).
        durations: (N,) seconds a simulation, of the first N simulations; may be empty.
        failures: kinds of failure, most frequent first; plain tuples will do.
    """

    dataset_id: str
    simulations: int
    status_counts: Mapping[str, int]
    durations: np.ndarray
    failures: Sequence[FailureFacts | tuple[str, int, Sequence[float]]] = ()


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """The trained density estimator.

    Attributes:
        model_id: identifier of the stored model.
        estimator: its kind, for instance ``neural spline flow``.
        weights: number of trained weights.
        training_seconds: wall-clock time of training.
        history: as :func:`sbi_dist.report.training_curve` takes it.
        validation_loss: best validation loss in nats.
    """

    model_id: str
    estimator: str
    weights: int
    training_seconds: float
    history: Mapping[str, Any]
    validation_loss: float


@dataclass(frozen=True, eq=False)
class ObservationFacts:
    """One observation and its posterior.

    Attributes:
        observation_id: identifier, shown as a heading.
        draws: (N, D) posterior draws.
        status: ``ok``, or what went wrong in a word or a sentence.
        true_parameters: (D,) where known.
        observed: (*x_shape) the observation itself, if it is to be checked.
        predictive: (S, *x_shape) simulations from posterior draws.
        p_value: of the observation among simulations held out from training; None: not known.
    """

    observation_id: str
    draws: np.ndarray
    status: str = "ok"
    true_parameters: np.ndarray | None = None
    observed: np.ndarray | None = None
    predictive: np.ndarray | None = None
    p_value: float | None = None


@dataclass(frozen=True, eq=False)
class RecoveryFacts:
    """Posteriors of N simulations that the model was not trained on, and their parameters.

    Attributes:
        truth: (N, D) parameters that were simulated.
        low, median, high: (N, D) 5 %, 50 % and 95 % quantiles of the posteriors.
        notes: what to know about these simulations or posteriors, each a sentence.
    """

    truth: np.ndarray
    low: np.ndarray
    median: np.ndarray
    high: np.ndarray
    notes: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class CalibrationFacts:
    """What the calibration of the model found.

    Attributes:
        verdict: ``pass``, ``warn`` or ``fail``.
        summary: why, in a sentence or two.
        held_out: simulations that were drawn for.
        draws: for each of them.
        tests: each with name, verdict, effect, threshold, p_value and sentence.
        curves: distribution functions of ranks and their band, as
            ``sbi_dist.calibration.verdict.curves`` gives them.
        created: when, as it is to be shown.
        failures: of the held-out simulations, most frequent first.
    """

    verdict: str
    summary: str
    held_out: int
    draws: int
    tests: Sequence[Mapping[str, Any]]
    curves: Mapping[str, Any]
    created: str
    failures: Sequence[FailureFacts] = ()


@dataclass(frozen=True, eq=False)
class AgreementFacts:
    """How well draws agree with reference draws, where the problem has them.

    Attributes:
        c2st: of each observation, by its number.
        simulations: that the model was trained on.
        published: C2ST that is published for NPE after as many, if any.
    """

    c2st: Mapping[int, float]
    simulations: int
    published: float | None = None


@dataclass(frozen=True, eq=False)
class TuneFacts:
    """A search over settings of the density estimator on the model's simulations.

    Attributes:
        search_id: identifier of the stored search.
        sentence: what it found and what that is worth.
        headings: of the table's columns.
        rows: of the table, best first, as text.
        failures: why trials failed, a sentence each.
    """

    search_id: str
    sentence: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    failures: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class PredictiveAxes:
    """How observations are labelled; see :func:`sbi_dist.report.predictive_check`."""

    coordinate: np.ndarray | None = None
    coordinate_label: str | None = None
    series_names: Sequence[str] | None = None
    value_label: str | None = None
    log_scale: bool = False


@dataclass(frozen=True, eq=False)
class ReportContent:
    """Everything on one page.

    Attributes:
        experiment: name, the page's title.
        problem: what is inferred and from what, in a few sentences; blank lines part paragraphs.
        parameter_names: D names.
        dataset: the simulations.
        model: the density estimator.
        observations: in the order to show them.
        created: time of creation, as it is to be shown.
        reference: citation of the problem or data, shown as plain text.
        settings: resolved experiment settings, nested mappings.
        units: D units, each may be None.
        prior_draws: (M, D), the grey underlay of the pair plots.
        prior_description: the prior in lines of text.
        bounds: (D, 2) the prior's support, which may be infinite; None where it is not known.
        limits: (D, 2) plotted range of the parameters; None lets the draws decide.
        axes: how observations are labelled.
        recovery: how well known parameters are recovered; None leaves that section out.
        calibration: what it found; None where the model was not calibrated.
        agreement: with reference draws; None where it was not measured.
        tune: a search over the estimator's settings; None leaves that section out.
        versions: library name to version.
        notes: caveats, each a sentence or two, shown at the top.
    """

    experiment: str
    problem: str
    parameter_names: Sequence[str]
    dataset: DatasetFacts
    model: ModelFacts
    observations: Sequence[ObservationFacts]
    created: str
    reference: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    units: Sequence[str | None] | None = None
    prior_draws: np.ndarray | None = None
    prior_description: Sequence[str] = ()
    bounds: np.ndarray | None = None
    limits: np.ndarray | None = None
    axes: PredictiveAxes = field(default_factory=PredictiveAxes)
    recovery: RecoveryFacts | None = None
    calibration: CalibrationFacts | None = None
    agreement: AgreementFacts | None = None
    tune: TuneFacts | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
