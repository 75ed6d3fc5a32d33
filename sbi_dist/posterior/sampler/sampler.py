"""Draws and densities for many observations at once, in bounded memory and with all cores.

The noise is a function of (model, observation, seed, number of the draw), see ``noise.py``. The
rest is arithmetic whose order on a CPU depends on the number of draws, not on the observations that
they are computed with: the same bits come out alone, in a batch or in a catalog.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sbi_dist.estimation.ensemble import Ensemble, Estimator
from sbi_dist.posterior.noise import normal_noise, stream_keys
from sbi_dist.posterior.sampler.compiled import CompiledEstimator
from sbi_dist.posterior.sampler.jobs import APART, MOST_DRAWS, Job, in_threads, jobs

__all__ = ["Sampler"]

_DRAWS_ON_GPU = 2**20  # of a job: a launch takes as long as thousands of draws


class Sampler:
    """Draws and densities of an estimator, with its weights as they are now.

    Args:
        estimator: the density estimator, or the ensemble.
        device: where to compute.
        threads: how many to use on a CPU; default: as many as torch does.

    Attributes:
        how: how it is computed, in a few words; tells where that is by nflows' own modules.
    """

    def __init__(
        self,
        estimator: Estimator,
        device: str | torch.device = "cpu",
        threads: int | None = None,
    ) -> None:
        self._estimator, self._device = estimator, torch.device(device)
        self._threads = threads
        members = estimator.members if isinstance(estimator, Ensemble) else (estimator,)
        self._ensemble = estimator if isinstance(estimator, Ensemble) and len(members) > 1 else None
        with torch.inference_mode(False), torch.no_grad():
            self._members = [CompiledEstimator(member, self._device) for member in members]
        self.how = "; ".join(dict.fromkeys(member.how for member in self._members))

    def draw(
        self,
        x: Tensor,
        count: int,
        identity: str,
        seed: int | Sequence[int],
        first: int = 0,
        with_log_prob: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Posterior draws ``first`` to ``first + count - 1`` of each observation.

        Args:
            x: observations, float32 of shape (B, *x_shape), finite.
            count: draws of each.
            identity: the model's digest, part of the random stream.
            seed: seed of the random streams, one or one for each observation.
            with_log_prob: whether to give the density of each draw too.

        Returns:
            theta, float32 of shape (B, count, D), inside the prior's support; and log q(theta | x),
            float32 of shape (B, count), or None.
        """
        keys = stream_keys(x.numpy(), identity, seed).to(self._device)
        theta = torch.empty((len(x), count, self._estimator.num_parameters), dtype=torch.float32)
        log_q = torch.empty((len(x), count), dtype=torch.float32) if with_log_prob else None

        def work(job: Job) -> None:
            rows, draws = job
            noise = keys[rows], first + draws.start, draws.stop - draws.start
            conditions = [member.conditions(x[rows]) for member in self._members]
            if self._ensemble is None:
                values, density = self._members[0].draw(*noise, conditions[0], with_log_prob)
            else:
                values, density = self._mixed(*noise, conditions), None
            theta[rows, draws] = values.permute(2, 1, 0)
            if log_q is not None:
                if density is None:
                    density = self._log_density(values.permute(1, 2, 0), conditions)
                log_q[rows, draws] = density.T

        self._work(work, len(x), count)
        return theta, log_q

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        """log q(theta | x), float32 of shape (N, B); -inf outside the prior's support.

        Args:
            theta: float32 of shape (N, B, D): N parameter vectors for each observation.
            x: observations, float32 of shape (B, *x_shape).
        """
        log_q = torch.empty(theta.shape[:2], dtype=torch.float32)

        def work(job: Job) -> None:
            rows, draws = job
            conditions = [member.conditions(x[rows]) for member in self._members]
            log_q[draws, rows] = self._log_density(theta[draws, rows], conditions)

        self._work(work, len(x), len(theta))
        return log_q

    def _mixed(self, keys: Tensor, first: int, count: int, conditions: list[Tensor]) -> Tensor:
        """theta (D, K, M) of the member that the noise's last number chooses for each."""
        assert self._ensemble is not None
        noise = normal_noise(keys, first, count, self._ensemble.noise_size)
        which = self._ensemble.chosen(noise[-1])
        theta = torch.empty_like(noise[:-1])
        for number, member in enumerate(self._members):
            draws, rows = torch.nonzero(which == number, as_tuple=True)
            if len(rows):
                part = noise[:-1, draws, rows]
                theta[:, draws, rows] = member.sample_columns(
                    part, conditions[number], rows, apart=count >= APART
                )
        return theta

    def _log_density(self, theta: Tensor, conditions: list[Tensor]) -> Tensor:
        """Of the members' mean, (K, M), at theta (K, M, D)."""
        each = [
            member.log_prob(theta, of) for member, of in zip(self._members, conditions, strict=True)
        ]
        if len(each) == 1:
            return each[0]
        return torch.logsumexp(torch.stack(each), dim=0) - math.log(len(each))

    def _work(self, work: Callable[[Job], None], observations: int, draws: int) -> None:
        most_rows = min(member.rows_at_once for member in self._members)
        if self._ensemble is not None and draws >= APART:
            most_rows = 1  # so that a member's draws are of one observation
        on_cpu = self._device.type == "cpu"
        most_draws = MOST_DRAWS if on_cpu else _DRAWS_ON_GPU
        todo = list(jobs(observations, draws, most_rows, most_draws))
        threads = min(self._threads or torch.get_num_threads(), len(todo)) if on_cpu else 1

        @torch.inference_mode()
        def inferring(job: Job) -> None:
            work(job)

        in_threads(inferring, todo, threads)
