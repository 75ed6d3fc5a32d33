"""The page's sentences, made from numbers.

Only text: no HTML, no plots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sbi_dist.report.arrays import FloatArray
from sbi_dist.report.content import (
    AgreementFacts,
    CalibrationFacts,
    DatasetFacts,
    ObservationFacts,
    RecoveryFacts,
    ReportContent,
)
from sbi_dist.report.coverage import chance_range, recovered


def duration(seconds: float) -> str:
    """A length of time in the units a person would use."""
    if not math.isfinite(seconds):
        return "an unknown time"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def plural(count: int, noun: str) -> str:
    """``1 simulation``, ``2,000 simulations``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def joined(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def summary(content: ReportContent) -> str:
    """What was done and what came out, in one paragraph."""
    names, dataset, model = content.parameter_names, content.dataset, content.model
    failed = dataset.simulations - dataset.status_counts.get("ok", 0)
    if failed <= 0:
        outcome = "all of which succeeded"
    else:
        share = 100 * failed / max(dataset.simulations, 1)
        outcome = f"{failed:,} of which ({share:.2g} %) failed and were left out"
    opening = (
        f"The posterior distribution of {plural(len(names), 'parameter')} was inferred from "
        f"{plural(len(content.observations), 'observation')}. "
        f"A conditional density estimator ({model.estimator}, {plural(model.weights, 'weight')}) "
        f"was trained in {duration(model.training_seconds)} on "
        f"{plural(dataset.simulations, 'simulation')}, {outcome}; "
        f"its best validation loss is {model.validation_loss:.3f} nats."
    )
    sentences = [opening]
    usable = [o for o in content.observations if len(o.draws) > 1 and np.isfinite(o.draws).all()]
    if len(usable) == 1:
        sentences.append(f"The results rest on {plural(len(usable[0].draws), 'posterior draw')}.")
    sentences += [s for s in (_contraction(content, usable), _truths(usable)) if s]
    return " ".join(sentences)


def _contraction(content: ReportContent, usable: Sequence[ObservationFacts]) -> str:
    """Which parameters the data speak about: posterior over prior standard deviation."""
    if content.prior_draws is None or len(content.prior_draws) < 2 or not usable:
        return ""
    prior_sd = np.std(content.prior_draws, axis=0)
    if not (np.isfinite(prior_sd).all() and (prior_sd > 0).all()):
        return ""
    ratio = np.mean([np.std(o.draws, axis=0) / prior_sd for o in usable], axis=0)
    best, worst = int(np.argmin(ratio)), int(np.argmax(ratio))
    name = content.parameter_names
    mean = " (mean over observations)" if len(usable) > 1 else ""
    data = "observations constrain" if len(usable) > 1 else "observation constrains"
    text = (
        f"The {data} {name[best]} most: its posterior standard deviation is "
        f"{100 * ratio[best]:.0f} % of the prior's{mean}"
    )
    if best == worst:
        return text + "."
    return text + f"; {name[worst]} is constrained least, at {100 * ratio[worst]:.0f} %."


def _truths(usable: Sequence[ObservationFacts]) -> str:
    inside = total = 0
    for observation in usable:
        if observation.true_parameters is None:
            continue
        truth = np.asarray(observation.true_parameters, dtype=np.float64)
        low, high = np.quantile(observation.draws, [0.05, 0.95], axis=0)
        known = np.isfinite(truth)
        inside += int((known & (truth >= low) & (truth <= high)).sum())
        total += int(known.sum())
    if not total:
        return ""
    return (
        f"Of the {total:,} known true values, {inside:,} {'lies' if inside == 1 else 'lie'} "
        "between the posterior's 5 % and "
        f"95 % quantiles (about {0.9 * total:.0f} expected)."
    )


def typicality(p_value: float) -> tuple[str, bool]:
    """How an observation compares with simulations, and whether that is a warning."""
    shown = f"p = {p_value:.2g}"
    if p_value < 0.01:
        return (
            "The observation is unlike the simulations that the model was trained on "
            f"({shown}): the simulator may be wrong about it, and the posterior too.",
            True,
        )
    if p_value < 0.05:
        return f"The observation is at the edge of what was simulated ({shown}).", False
    return f"The observation is like the simulations ({shown}).", False


def coverage_sentences(
    counts: Sequence[tuple[int, int]], names: Sequence[str] | None, draws: int, dropped: int = 0
) -> list[str]:
    """One sentence a series on how many observed values lie outside the 95 % band."""
    sentences = []
    for index, (inside, total) in enumerate(counts):
        who = ""
        if len(counts) > 1:
            label = names[index] if names else f"Series {index + 1}"
            who = f"{label}: "
        if total == 1 and len(counts) == 1:
            where = "inside" if inside else "outside"
            sentences.append(f"The observed value lies {where} the 95 % interval.")
            continue
        outside, expected = total - inside, 0.05 * total
        about = f"{expected:,.0f}" if expected >= 10 else f"{expected:.2g}"
        sentences.append(
            f"{who}{outside:,} of {total:,} observed values {'lies' if outside == 1 else 'lie'} "
            f"outside the 95 % band (5 % of them, about {about}, expected)."
        )
    lost = f"; {dropped:,} more failed and were left out" if dropped else ""
    sentences.append(f"Based on {plural(draws, 'simulation')} at posterior draws{lost}.")
    return sentences


def recovery_sentence(recovery: RecoveryFacts, names: Sequence[str]) -> str:
    """How often the posterior's interval holds the true value, and how the median follows it."""
    total = len(recovery.truth)
    low, high = chance_range(total, 0.9)
    parts = [
        f"{count:,} for {name} (correlation of posterior median and true value {correlation:.3f})"
        if index == 0
        else f"{count:,} for {name} ({correlation:.3f})"
        for index, (name, count, correlation) in enumerate(
            zip(names, *recovered(recovery), strict=True)
        )
    ]
    each = "the number" if len(names) == 1 else "each number"
    return (
        f"Of {total:,} simulations held out from training, the posterior's central 90 % interval "
        f"holds the true value in {joined(parts)}; with an exact posterior, {each} lies between "
        f"{low:,} and {high:,} with a probability of at least 95 %."
    )


def calibration_rows(calibration: CalibrationFacts) -> list[dict[str, str]]:
    """The tests as rows of text, those that did not pass first."""
    order = ("fail", "warn", "pass")
    tests = sorted(calibration.tests, key=lambda test: order.index(test["verdict"]))
    return [
        {
            "name": test["name"].replace("_", " "),
            "verdict": test["verdict"],
            "sentence": test["sentence"],
            **{
                field: "" if test[field] is None else f"{test[field]:.3g}"
                for field in ("effect", "threshold", "p_value")
            },
        }
        for test in tests
    ]


def shrinkage_rows(calibration: CalibrationFacts) -> list[dict[str, str]]:
    """How much each parameter's posterior is narrower than the prior, and its z-scores, as text."""
    parts = [
        part
        for test in calibration.tests
        if test["name"] == "shrinkage"
        for part in test.get("parameters", ())
    ]
    fields = ("shrinkage", "regression_shrinkage", "z_mean", "z_rms")
    return [
        {
            "name": part["name"],
            **{field: "" if part.get(field) is None else f"{part[field]:.3f}" for field in fields},
        }
        for part in parts
    ]


def calibration_sentences(calibration: CalibrationFacts, names: Sequence[str]) -> list[str]:
    """What is said besides the tests: of the observed data, and of simulations that failed."""
    local = [test["sentence"] for test in calibration.tests if test["name"] == "local"]
    often = [
        f"{message} ({count:,} times, for one with {example(theta, names)})"
        for message, count, theta in calibration.failures
    ]
    if not often:
        return local
    return [*local, f"Held-out simulations that failed are in no test; most often {joined(often)}."]


def agreement_sentence(agreement: AgreementFacts) -> str:
    """What C2ST is and what it came to."""
    values = list(agreement.c2st.values())
    published = (
        ""
        if agreement.published is None
        else f" Lueckmann et al. (2021) publish {agreement.published:.3f} for NPE after as many "
        "simulations, the mean of ten observations."
    )
    return (
        f"A classifier tells the draws of this model, trained on "
        f"{plural(agreement.simulations, 'simulation')}, from reference draws at a rate of "
        f"{np.mean(values):.3f} (C2ST, the mean of {plural(len(values), 'observation')}; 0.5: not "
        f"at all, 1: always).{published}"
    )


def simulations_caption(dataset: DatasetFacts) -> str:
    """What the picture of the simulations shows."""
    known = np.size(dataset.durations)
    if not known or known >= dataset.simulations:
        return "How the simulations ended and how long each took."
    return (
        f"How the simulations ended, and the run times of the first {plural(known, 'simulation')}."
    )


def labelled(names: Sequence[str], units: Sequence[str | None] | None) -> list[str]:
    """Names with their units where there are any: ``alpha [1/yr]``."""
    pairs = zip(names, units or [None] * len(names), strict=True)
    return [f"{name} [{unit}]" if unit else str(name) for name, unit in pairs]


def example(theta: Any, names: Sequence[str]) -> str:
    """Parameters of one simulation as ``name = value`` pairs."""
    values: FloatArray = np.asarray(theta, dtype=np.float64).ravel()
    if len(values) != len(names):
        return ", ".join(f"{value:.4g}" for value in values)
    return ", ".join(f"{name} = {value:.4g}" for name, value in zip(names, values, strict=True))


def flattened(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as ``("a.b", "value")`` pairs in their own order."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            rows += flattened(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
            rows += flattened({str(i): v for i, v in enumerate(value)}, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _setting(value)))
    return rows


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_setting(v) for v in value) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
