"""What a batch of pieces computes: draws, densities and summaries, for observations of one model.

Plain arrays in and out; no requests, no HTTP, no queue. Draws are those of ``Posterior.draws``,
whatever they are computed with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from sbi_dist.catalog.summary import of_highest_density, summarize
from sbi_dist.posterior.posterior import Posterior

__all__ = ["Drawing", "Summarized", "compute", "summary_of"]

Columns = dict[str, np.ndarray]


class Summarized(NamedTuple):
    """What a summary is of: levels of the quantiles, and the mass of the interval."""

    quantiles: tuple[float, ...]
    hdi: float


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Draws ``first`` to ``first + count - 1`` for B observations; or densities, given theta.

    Attributes:
        posterior: the model.
        x: float32 of shape (B, *x_shape), finite.
        seed: of the draws.
        with_log_prob: whether to give the density of each draw too.
        summarized: give summaries in place of the draws.
        theta: float32 of shape (B, N, D), of which the density is asked for in place of draws.
    """

    posterior: Posterior
    x: np.ndarray
    count: int
    seed: int = 0
    first: int = 0
    with_log_prob: bool = False
    summarized: Summarized | None = None
    theta: np.ndarray | None = None

    @property
    def key(self) -> tuple:
        """Drawings with the same key can be made in one call."""
        kind = (self.with_log_prob, self.summarized, self.theta is None)
        return (id(self.posterior), self.count, self.first, *kind)


def compute(_: object, drawings: list[Drawing]) -> Sequence[Columns | Exception]:
    """Columns of each of some drawings with the same key, by name, each of shape (B, ...).

    out_of_distribution and out_of_distribution_p (B,); draws (B, N, D) and log_prob (B, N), or
    mean, sd, map (B, D), covariance (B, D, D), quantiles (B, Q, D) and hdi (B, 2, D). An exception
    where a drawing alone can't be made.
    """
    try:
        return _together(drawings)
    except Exception as error:
        if len(drawings) == 1:
            return [error]
        half = len(drawings) // 2
        return [*compute(None, drawings[:half]), *compute(None, drawings[half:])]


def _together(drawings: list[Drawing]) -> list[Columns]:
    lead = drawings[0]
    sizes = [len(each.x) for each in drawings]
    x = torch.from_numpy(np.concatenate([each.x for each in drawings]))
    columns: Columns = {}
    if lead.theta is not None:
        theta = np.concatenate([each.theta for each in drawings])
        given = torch.from_numpy(theta).transpose(0, 1)
        columns["log_prob"] = lead.posterior.sampler.log_prob(given, x).T.numpy()
    else:
        density = lead.with_log_prob or lead.summarized is not None
        seeds = [each.seed for each, size in zip(drawings, sizes, strict=True) for _ in range(size)]
        draws, log_q = lead.posterior.draws(x, lead.count, seeds, lead.first, density)
        columns["draws"] = draws.numpy()
        if log_q is not None:
            columns["log_prob"] = log_q.numpy()
        if lead.summarized is not None:
            columns = summary_of(columns, lead.summarized)
    if lead.first == 0:
        score, p = lead.posterior.out_of_distribution(x)
        columns |= {"out_of_distribution": score, "out_of_distribution_p": p}
    ends = np.cumsum(sizes)
    return [
        {name: values[end - size : end] for name, values in columns.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]


def summary_of(columns: Columns, summarized: Summarized) -> Columns:
    """Summaries of ``draws`` with their ``log_prob``; NaN where a draw is not finite."""
    draws, log_q = columns["draws"], columns["log_prob"]
    finite = np.asarray(np.isfinite(draws).all(axis=(1, 2)))
    safe = draws if finite.all() else np.where(finite[:, None, None], draws, 0.0)
    summary = summarize(safe, summarized.quantiles, summarized.hdi)
    found = {field.name: getattr(summary, field.name) for field in dataclasses.fields(summary)}
    found["map"] = of_highest_density(safe, log_q)
    if not finite.all():
        for values in found.values():
            values[~finite] = np.nan
    return found
