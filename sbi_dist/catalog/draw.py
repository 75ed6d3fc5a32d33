"""Draws for the rows of a catalog: block by block, each observation by itself where one fails.

Nothing here knows of parts, stores or other processes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from sbi_dist.catalog.options import InferOptions
from sbi_dist.catalog.plan import rows_at_once
from sbi_dist.catalog.rows import ABOUT_X, FAILED, LOW_ESS, Rows
from sbi_dist.catalog.summary import Summary, of_highest_density, summarize
from sbi_dist.errors import InputError, StageError
from sbi_dist.posterior.importance import weigh
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.problem import Problem

__all__ = ["LEAST_SAMPLE_SIZE", "Drawer", "Drawn"]

# Fewer effective draws than this do not describe a posterior.
LEAST_SAMPLE_SIZE = 100
# Draws of one call of the sampler, where one observation has more.
_CALL_DRAWS = 2**20


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What came of N rows; NaN where an observation has no posterior.

    Attributes:
        rows: the rows, with their final statuses.
        columns: by name, float32 of shape (N, ...): effective_sample_size, log_evidence,
            out_of_distribution, out_of_distribution_p (N,); draws (N, num_samples, D) where they
            are kept; mean, sd, map (N, D), covariance (N, D, D), quantiles (N, Q, D) and hdi
            (N, 2, D) where summaries are.
        reason: why the first of those that failed did so; empty where none did.
    """

    rows: Rows
    columns: dict[str, np.ndarray]
    reason: str = ""


class Drawer:
    """Draws from the posteriors of rows, as the options ask.

    Args:
        posterior: the model.
        options: of the stage.
        problem: with ``options.proposals``, its likelihood and prior weigh the draws.
    """

    def __init__(
        self, posterior: Posterior, options: InferOptions, problem: Problem | None = None
    ) -> None:
        self._posterior, self._options, self._problem = posterior, options, problem
        self._size = posterior.estimator.num_parameters
        self._weighing = options.proposals is not None
        if self._weighing and (problem is None or problem.log_likelihood is None):
            raise InputError(
                "infer.proposals is set, but the problem has no log_likelihood to weigh draws "
                "with; leave it out, or give Problem(log_likelihood=...)"
            )

    def __call__(self, rows: Rows) -> Drawn:
        """Draw for the usable ones of some rows.

        Raises:
            StageError: none of them can be drawn for, which is not the observations' fault.
        """
        status = rows.status.copy()
        columns = {
            name: np.full((len(rows), *shape), np.nan, dtype=np.float32)
            for name, shape in self._shapes().items()
        }
        about_x = self._posterior.out_of_distribution(torch.from_numpy(rows.x))
        columns.update(zip(ABOUT_X, about_x, strict=True))
        drawn = Drawn(Rows(rows.ids, rows.x, status), columns)
        usable = rows.usable
        draws = max(self._options.num_samples, self._options.proposals or 0)
        at_once = rows_at_once(draws, self._size, self._posterior.x_shape)
        raised: list[str] = []
        for start in range(0, len(usable), at_once):
            raised += self._try(drawn, usable[start : start + at_once])
        if len(raised) == len(usable) > 0:
            raise StageError(
                f"infer: none of {len(usable):,} observation(s) from {rows.ids[usable[0]]} on "
                f"could be drawn for ({raised[0]}); the finished parts are kept, mend that or "
                "leave these out, and run the command again"
            )
        reason = "the draws are not finite" if (status == FAILED).any() else ""
        return dataclasses.replace(drawn, reason=raised[0] if raised else reason)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        options, size = self._options, self._size
        shapes: dict[str, tuple[int, ...]] = {"effective_sample_size": (), "log_evidence": ()}
        shapes |= dict.fromkeys(ABOUT_X, ())
        if options.keeps_draws:
            shapes["draws"] = (options.num_samples, size)
        if options.summarizes:
            shapes |= {"mean": (size,), "sd": (size,), "covariance": (size, size)}
            shapes |= {"quantiles": (len(options.quantiles), size), "hdi": (2, size)}
            shapes["map"] = (size,)
        return shapes

    def _try(self, drawn: Drawn, which: np.ndarray) -> list[str]:
        """Draw for the rows ``which``; where that raises, for each half of them by itself.

        What was raised for each row that it could not be done for.
        """
        try:
            if self._weighing:
                self._weigh(drawn, which)
            else:
                self._fill(drawn, which, *self._draw(drawn, which, self._options.num_samples))
            return []
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if len(which) == 1:
                self._fail(drawn, which)
                return [f"{type(error).__name__}: {error}"]
            half = len(which) // 2
            return self._try(drawn, which[:half]) + self._try(drawn, which[half:])

    def _fail(self, drawn: Drawn, which: np.ndarray) -> None:
        drawn.rows.status[which] = FAILED
        for name in self._shapes().keys() - set(ABOUT_X):
            drawn.columns[name][which] = np.nan

    def _draw(
        self, drawn: Drawn, which: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Draws (B, count, D) for the rows ``which``, and their density (B, count) if needed."""
        x = torch.from_numpy(drawn.rows.x[which])
        density = self._weighing or self._options.summarizes
        seed = self._options.seed
        if count <= _CALL_DRAWS:
            theta, log_q = self._posterior.draws(x, count, seed, with_log_prob=density)
            return theta.numpy(), None if log_q is None else log_q.numpy()
        all_theta = np.empty((len(which), count, self._size), dtype=np.float32)
        all_log_q = np.empty((len(which), count), dtype=np.float32) if density else None
        for first in range(0, count, _CALL_DRAWS):
            number = min(_CALL_DRAWS, count - first)
            theta, log_q = self._posterior.draws(x, number, seed, first, with_log_prob=density)
            all_theta[:, first : first + number] = theta.numpy()
            if all_log_q is not None and log_q is not None:
                all_log_q[:, first : first + number] = log_q.numpy()
        return all_theta, all_log_q

    def _fill(
        self,
        drawn: Drawn,
        which: np.ndarray,
        draws: np.ndarray,
        log_q: np.ndarray | None,
        best: np.ndarray | None = None,
    ) -> None:
        """Put down what is kept of the draws; ``best`` is the one of highest density of each."""
        finite = np.isfinite(draws).all(axis=(1, 2))
        if not finite.all():
            failed, which, draws = which[~finite], which[finite], draws[finite]
            log_q = None if log_q is None else log_q[finite]
            best = None if best is None else best[finite]
            self._fail(drawn, failed)
        if not len(which):
            return
        if self._options.keeps_draws:
            drawn.columns["draws"][which] = draws
        if self._options.summarizes:
            summary = summarize(draws, self._options.quantiles, self._options.hdi)
            for field in dataclasses.fields(Summary):
                drawn.columns[field.name][which] = getattr(summary, field.name)
            if best is None:
                assert log_q is not None
                best = of_highest_density(draws, log_q)
            drawn.columns["map"][which] = best

    def _weigh(self, drawn: Drawn, which: np.ndarray) -> None:
        """Weigh draws and resample them; the model's own where too few are worth anything."""
        problem, options = self._problem, self._options
        assert problem is not None and problem.log_likelihood is not None
        assert options.proposals is not None
        theta, log_q = self._draw(drawn, which, options.proposals)
        assert log_q is not None
        for row, proposals, density in zip(which, theta, log_q, strict=True):
            one = np.array([row])
            if not np.isfinite(proposals).all():
                self._fail(drawn, one)
                continue
            weighted = weigh(
                torch.from_numpy(proposals),
                torch.from_numpy(density),
                problem.log_likelihood,
                problem.prior,
                drawn.rows.x[row],
                options.num_samples,
                options.seed,
            )
            drawn.columns["effective_sample_size"][row] = weighted.effective_sample_size
            drawn.columns["log_evidence"][row] = weighted.log_evidence
            if weighted.effective_sample_size >= LEAST_SAMPLE_SIZE:
                self._fill(drawn, one, weighted.draws[None], None, weighted.best[None])
                continue
            drawn.rows.status[row] = LOW_ESS
            if options.num_samples <= options.proposals:
                count = options.num_samples
                own = proposals[None, :count], density[None, :count]
                self._fill(drawn, one, *own)
            else:
                self._fill(drawn, one, *self._draw(drawn, one, options.num_samples))
