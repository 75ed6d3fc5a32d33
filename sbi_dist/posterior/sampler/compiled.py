"""One density estimator compiled: theta from noise, and its density, for a job's observations."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.posterior.noise import normal_noise
from sbi_dist.posterior.sampler.jobs import APART, tiles
from sbi_dist.posterior.sampler.nflows_run import NflowsProgram, NflowsRun
from sbi_dist.posterior.sampler.program import FlowProgram, FlowRun, compile_flow
from sbi_dist.posterior.sampler.step import Unknown, padding
from sbi_dist.posterior.sampler.triton_choice import Fused, fused_flow

__all__ = ["CompiledEstimator"]

# Columns of a tile: enough that an operation takes longer than its call, few enough for a cache.
_COLUMNS, _COLUMNS_ON_GPU = 4096, 2**18
# Numbers of the largest array of a tile, where networks are wide.
_OF_TILE, _OF_TILE_ON_GPU = 2**20, 2**28
# Columns that go through the bijection at once.
_MAPPED = 8192
# Numbers of the conditions of a job, and of its observations.
_NUMBERS, _NUMBERS_ON_GPU = 2**22, 2**26
_RUNS_KEPT = 8
_LEAST_COLUMNS = 256


class CompiledEstimator:
    """A density estimator with its weights as they are now; for several threads at once.

    Args:
        estimator: of which a copy is made where it is on another device.
        device: where to compute.

    Attributes:
        how: how it is computed, in a few words.
        rows_at_once: observations that a job may have at most.
    """

    def __init__(self, estimator: DensityEstimator, device: torch.device) -> None:
        weight = next(estimator.parameters())
        # Steps are made on the CPU, where the small maps are that they are merged with.
        transform = copy.deepcopy(estimator.flow.flow._transform).cpu()
        if weight.device != device:
            estimator = copy.deepcopy(estimator).to(device)
            estimator.standardization = estimator.standardization.to(device)
            weight = next(estimator.parameters())
        self._estimator, self._like = estimator, weight.detach()
        self.size = estimator.num_parameters
        self._program: FlowProgram | NflowsProgram
        self._fused: Fused | None = None
        try:
            self._program = compile_flow(transform, self.size).to(self._like)
            self._fused, self.how = fused_flow(self._program, transform, self._like)
        except Unknown as unknown:
            context = estimator.embed(torch.zeros(1, *estimator.x_shape, device=device)).shape[1]
            transform = estimator.flow.flow._transform
            self._program = NflowsProgram(transform, self.size, context)
            self.how = f"nflows' own modules, as no step is written for {unknown}"
        numbers = max(self._program.condition_rows, math.prod(estimator.x_shape))
        if device.type == "cpu":
            most, columns, of_tile, self._mapped = _NUMBERS, _COLUMNS, _OF_TILE, _MAPPED
        else:
            most, columns, of_tile = _NUMBERS_ON_GPU, _COLUMNS_ON_GPU, _OF_TILE_ON_GPU
            self._mapped = columns
        self.rows_at_once = max(1, most // numbers)
        self._columns = max(_LEAST_COLUMNS, min(columns, of_tile // self._program.width))
        self._free: dict[tuple[int, int], list[FlowRun | NflowsRun]] = {}
        self._lock = threading.Lock()

    def conditions(self, x: Tensor) -> Tensor:
        """All that draws need of observations x (M, *x_shape): (rows, M)."""
        count = len(x)
        if count and padding(count):
            x = torch.cat([x, x[:1].expand(padding(count), *x.shape[1:])])
        embedded = self._estimator.embed(x.to(self._like.device))
        return self._program.conditions(embedded)[:, :count]

    def sample(
        self, noise: Tensor, conditions: Tensor, with_log_prob: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """theta and log q(theta | x) of standard normal noise.

        Args:
            noise: (D, K, M), K draws for each of M observations.
            conditions: (rows, M) of :meth:`conditions`.

        Returns:
            theta, float32 (D, K, M); and log q, float32 (K, M), or None where it is not asked for.
        """
        if self._fused is not None:
            return self._theta(*self._fused.sample(noise, conditions, with_log_prob))
        u = noise.to(self._like.dtype, copy=True)
        log_q = self._log_normal(noise) if with_log_prob else None
        for run, values, log_det, (draws, rows) in self._runs(u.shape[1:], conditions):
            part = u[:, draws, rows]
            values.copy_(part)
            run.inverse(with_log_prob)
            part.copy_(values)
            if log_q is not None:
                log_q[draws, rows] -= log_det
        return self._theta(u, log_q)

    def _theta(self, u: Tensor, log_q: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """theta of u (D, K, M), and its density of that of u (K, M)."""
        standardization, flat = self._estimator.standardization, u.flatten(1)
        used = flat.shape[1]
        flat = torch.nn.functional.pad(flat, (0, padding(used)))
        theta = torch.empty_like(flat, dtype=torch.float32)
        parts = zip(theta.split(self._mapped, 1), flat.split(self._mapped, 1), strict=True)
        for out, part in parts:
            out.copy_(standardization.theta(part.T).T)
        if log_q is not None:
            log_q -= standardization.log_det_of_theta(flat.T)[:used].view_as(log_q)
        return theta[:, :used].view_as(u), log_q

    def draw(
        self,
        keys: Tensor,
        first: int,
        draws: int,
        conditions: Tensor,
        with_log_prob: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`sample`, of the noise of ``normal_noise(keys, first, draws, D)``."""
        if self._fused is not None:
            return self._theta(*self._fused.draw(keys, first, draws, conditions, with_log_prob))
        return self.sample(normal_noise(keys, first, draws, self.size), conditions, with_log_prob)

    def sample_columns(
        self, noise: Tensor, conditions: Tensor, which: Tensor, apart: bool
    ) -> Tensor:
        """theta, float32 (D, n), of noise (D, n) for observations ``which`` (n,) of the job.

        ``apart`` tells that the job is of one observation only, with many draws.
        """
        if self._fused is not None:
            u = self._fused.sample_columns(noise, conditions, which)
            return self._theta(u.unsqueeze(1), None)[0].squeeze(1)
        count = len(which)
        # Lengths that come back, so that memory can be used again.
        more = -count % (APART if apart else min(APART, self.rows_at_once))
        noise = torch.nn.functional.pad(noise, (0, more))
        if apart:
            return self.sample(noise.unsqueeze(2), conditions)[0].squeeze(2)[:, :count]
        which = torch.nn.functional.pad(which, (0, more))
        # Each of them has conditions of its own.
        columns = min(self._columns, self.rows_at_once)
        parts = zip(noise.split(columns, 1), which.split(columns), strict=True)
        theta = [
            self.sample(part.unsqueeze(1), conditions[:, of])[0].squeeze(1) for part, of in parts
        ]
        return torch.cat(theta, dim=1)[:, :count]

    def log_prob(self, theta: Tensor, conditions: Tensor) -> Tensor:
        """log q(theta | x), float32 (K, M), of theta (K, M, D); -inf outside the support."""
        shape = theta.shape[:2]
        flat = theta.to(self._like.device).flatten(0, 1)
        u = torch.empty((self.size, len(flat)), dtype=self._like.dtype, device=flat.device)
        log_q = torch.empty(len(flat), dtype=torch.float32, device=flat.device)
        standardization = self._estimator.standardization
        for start in range(0, len(flat), self._mapped):
            rows = slice(start, start + self._mapped)
            part, log_det = standardization.u(flat[rows])
            u[:, rows] = part.T
            log_q[rows] = log_det
        u, log_q = u.view(self.size, *shape), log_q.view(shape)
        for run, values, log_det, (draws, rows) in self._runs(shape, conditions):
            values.copy_(u[:, draws, rows])
            run.forward()
            log_q[draws, rows] += log_det
            log_q[draws, rows] += self._log_normal(values)
        inside = standardization.bijection.contains(flat.double()).view(shape)
        return log_q.masked_fill_(~inside, -math.inf)

    def _log_normal(self, noise: Tensor) -> Tensor:
        return (noise * noise).sum(0).mul_(-0.5).sub_(0.5 * self.size * math.log(2 * math.pi))

    def _runs(
        self, shape: torch.Size, conditions: Tensor
    ) -> Iterator[tuple[FlowRun | NflowsRun, Tensor, Tensor, tuple[slice, slice]]]:
        """Of each tile of (K, M): a run that knows its observations, its values and log_det, its
        place."""
        draws_in_all, observations = shape
        held: dict[tuple[int, int], FlowRun | NflowsRun] = {}
        place, knowing = slice(0), set[tuple[int, int]]()
        try:
            for draws, rows in tiles(observations, draws_in_all, self._columns):
                key = (draws.stop - draws.start, rows.stop - rows.start)
                if key not in held:
                    held[key] = self._take(key)
                if rows != place:
                    place, knowing = rows, set()
                if key not in knowing:
                    held[key].given(conditions[:, rows])
                    knowing.add(key)
                tile = held[key].tile
                values, log_det = map(tile.by_observation, (tile.features, tile.log_det[None]))
                yield held[key], values, log_det[0], (draws, rows)
        finally:
            for key, run in held.items():
                self._give_back(key, run)

    def _take(self, key: tuple[int, int]) -> FlowRun | NflowsRun:
        with self._lock:
            free = self._free.get(key)
            if free:
                return free.pop()
        return self._program.run(*key, self._like)

    def _give_back(self, key: tuple[int, int], run: FlowRun | NflowsRun) -> None:
        """Memory and views of a tile, to be used again: those of the shapes used last."""
        with self._lock:
            self._free[key] = [*self._free.pop(key, []), run]
            while sum(map(len, self._free.values())) > _RUNS_KEPT:
                oldest = next(iter(self._free))
                self._free[oldest] = self._free[oldest][1:]
                if not self._free[oldest]:
                    del self._free[oldest]
