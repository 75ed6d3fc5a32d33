"""The report page: content in, one self-contained HTML file and its pictures out, as bytes.

Here: which pictures are made, what they are called, and what happens when one cannot be drawn.
The sentences are in ``wording``, the page in ``page.html.j2``, what all
pages have in ``layout.html.j2``.  Nothing is written to disk.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from sbi_dist.report import wording
from sbi_dist.report.content import ObservationFacts, ReportContent
from sbi_dist.report.coverage import arrange, inside
from sbi_dist.report.table import HEADINGS, format_row, posterior_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render(content: ReportContent, *, max_observations: int = 6) -> dict[str, bytes]:
    """Render a report.

    A picture or table that cannot be made (too few draws, say) is replaced on the page by the
    reason, so that the rest of a long run's results can still be read.

    Args:
        content: what to show.
        max_observations: observations shown in full; the page says how many more there are.

    Returns:
        File name to bytes: ``index.html``, which needs no other file, and its pictures:
        ``pairplot.png``, ``predictive.png`` (``pairplot-0001.png`` and so on where there are
        several observations), ``recovery.png``, ``calibration.png``,
        ``training.png`` and ``simulations.png``.

    Raises:
        ValueError: content whose lengths do not agree; the message names the field.
    """
    if isinstance(max_observations, bool) or max_observations < 1:
        raise ValueError(f"max_observations is {max_observations!r}; allowed: 1 or more")
    _check(content)
    from sbi_dist.report import plots, style
    from sbi_dist.report.calibration import calibration_panels

    pictures: dict[str, bytes] = {}

    def picture(name: str, alt: str, draw: Callable[[], Figure]) -> dict[str, str]:
        try:
            pictures[name] = style.to_png(draw())
        except ValueError as error:
            return {"problem": str(error)}
        return embedded(pictures[name], alt)

    with style.page_style():
        several = len(content.observations) > 1
        observations = [
            _observation(content, observation, f"-{index:04d}" if several else "", picture)
            for index, observation in enumerate(content.observations[:max_observations], start=1)
        ]
        dataset, recovery = content.dataset, content.recovery
        recovered = None
        if recovery is not None:
            recovered = picture(
                "recovery.png",
                "Posterior median and 90 % interval against the true value, by parameter",
                lambda: plots.recovery_panels(
                    recovery, wording.labelled(content.parameter_names, content.units)
                ),
            )
        calibration = content.calibration
        calibrated = None
        if calibration is not None:
            calibrated = picture(
                "calibration.png",
                "Deviation of ranks and of coverage from those of an exact posterior",
                lambda: calibration_panels(calibration.curves),
            )
        training = picture(
            "training.png",
            "Training and validation loss by epoch",
            lambda: plots.training_curve(content.model.history),
        )
        simulations = picture(
            "simulations.png",
            "Simulations by status and their durations",
            lambda: plots.simulation_outcomes(dataset.status_counts, dataset.durations),
        )
    html = template("page.html.j2").render(
        content=content,
        paragraphs=[p.strip() for p in content.problem.split("\n\n") if p.strip()],
        summary=wording.summary(content).replace(" %", "\u00a0%"),
        headings=HEADINGS,
        observations=observations,
        hidden=len(content.observations) - len(observations),
        recovered=recovered,
        recovery_sentence=None
        if recovery is None
        else wording.recovery_sentence(recovery, content.parameter_names),
        calibrated=calibrated,
        tests=[] if calibration is None else wording.calibration_rows(calibration),
        shrinkage=[] if calibration is None else wording.shrinkage_rows(calibration),
        calibration_sentences=[]
        if calibration is None
        else wording.calibration_sentences(calibration, content.parameter_names),
        agreement_sentence=None
        if content.agreement is None
        else wording.agreement_sentence(content.agreement),
        training=training,
        simulations=simulations,
        simulations_caption=wording.simulations_caption(dataset),
        training_time=wording.duration(content.model.training_seconds),
        outcomes=_outcomes(content),
        failures=[
            {
                "message": str(message),
                "count": f"{count:,}",
                "example": wording.example(theta, content.parameter_names),
            }
            for message, count, theta in dataset.failures
        ],
        settings=wording.flattened(content.settings),
    )
    return {"index.html": html.encode("utf-8"), **pictures}


def template(name: str) -> jinja2.Template:
    """One of the package's pages."""
    return _environment().get_template(name)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("sbi_dist.report", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def embedded(png: bytes, alt: str) -> dict[str, str]:
    """A picture as ``picture.html.j2`` shows it: in the page itself."""
    from sbi_dist.report import style

    width, height = style.shown_size(png)
    data = base64.b64encode(png).decode("ascii")
    size = {
        "width": str(width),
        "height": str(height),
        "kind": "wide" if width > 700 else "fit",
    }
    return {"src": f"data:image/png;base64,{data}", "alt": alt, **size}


def _check(content: ReportContent) -> None:
    dimension = len(content.parameter_names)
    if isinstance(content.parameter_names, str) or dimension == 0:
        raise ValueError(
            f"parameter_names is {content.parameter_names!r}; allowed: a list of at least 1 name"
        )
    if content.units is not None and len(content.units) != dimension:
        raise ValueError(f"units is {content.units!r}; allowed: None or {dimension} units")
    draws: dict[str, Any] = {
        f"observations[{index}].draws": observation.draws
        for index, observation in enumerate(content.observations)
    }
    if content.prior_draws is not None:
        draws["prior_draws"] = content.prior_draws
    for field, array in draws.items():
        shape = np.shape(array)
        if len(shape) != 2 or shape[1] != dimension:
            raise ValueError(
                f"{field} has shape {shape}; allowed: (N, {dimension}), one column for each of "
                "parameter_names"
            )
    recovery = content.recovery
    if recovery is not None:
        count = len(recovery.truth)
        for field in ("truth", "low", "median", "high"):
            shape = np.shape(getattr(recovery, field))
            if shape != (count, dimension) or count < 2:
                raise ValueError(
                    f"recovery.{field} has shape {shape}; allowed: (N, {dimension}) with N at "
                    "least 2, the same for truth, low, median and high"
                )
    for index, observation in enumerate(content.observations):
        truth = observation.true_parameters
        if truth is not None and np.shape(truth) != (dimension,):
            raise ValueError(
                f"observations[{index}].true_parameters has shape {np.shape(truth)}; allowed: "
                f"None or ({dimension},)"
            )


def _observation(
    content: ReportContent,
    observation: ObservationFacts,
    suffix: str,
    picture: Callable[[str, str, Callable[[], Figure]], dict[str, str]],
) -> dict[str, Any]:
    """One observation as the template shows it."""
    from sbi_dist.report import plots

    shown: dict[str, Any] = {
        "name": observation.observation_id,
        "status": observation.status,
        "count": f"{len(observation.draws):,}",
        "rows": [],
        "columns": [],
        "table_problem": None,
        "pairplot": None,
        "predictive": None,
        "coverage": [],
        "typicality": None,
    }
    if observation.p_value is not None:
        shown["typicality"], shown["unlike"] = wording.typicality(observation.p_value)
    truth = observation.true_parameters
    try:
        table = posterior_table(observation.draws, content.parameter_names, content.units, truth)
    except ValueError as error:
        shown["table_problem"] = str(error)
    else:
        shown["rows"] = [format_row(row) for row in table]
        shown["columns"] = [
            key
            for key in HEADINGS
            if key not in ("unit", "truth") or any(row[key] for row in shown["rows"])
        ]
        marks = truth if truth is not None and np.isfinite(truth).all() else None
        shown["pairplot"] = picture(
            f"pairplot{suffix}.png",
            f"Pair plot of the posterior draws for {observation.observation_id}",
            lambda: plots.pairplot(
                observation.draws,
                points=marks,
                limits=content.limits,
                labels=wording.labelled(content.parameter_names, content.units),
                prior_samples=content.prior_draws,
                bounds=content.bounds,
            )[0],
        )
    if observation.observed is None or observation.predictive is None:
        return shown
    axes = content.axes
    shown["predictive"] = picture(
        f"predictive{suffix}.png",
        f"Posterior predictive check for {observation.observation_id}",
        lambda: plots.predictive_check(
            observation.predictive,
            observation.observed,
            coordinate=axes.coordinate,
            coordinate_label=axes.coordinate_label,
            series_names=axes.series_names,
            value_label=axes.value_label,
            log_scale=axes.log_scale,
        ),
    )
    if "src" in shown["predictive"]:
        series = arrange(observation.predictive, observation.observed)
        shown["coverage"] = wording.coverage_sentences(
            inside(series, 0.95), axes.series_names, len(series.draws), series.dropped
        )
    return shown


def _outcomes(content: ReportContent) -> str:
    """The status counts in words, most frequent first."""
    counts = sorted(content.dataset.status_counts.items(), key=lambda item: -item[1])
    parts = [f"{count:,} {status}" for status, count in counts if count]
    total = wording.plural(content.dataset.simulations, "simulation")
    return f"{total}: {wording.joined(parts)}." if parts else f"{total}."
