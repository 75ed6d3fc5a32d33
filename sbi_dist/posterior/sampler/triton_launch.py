"""Launches of the fused kernels: u from noise, or from the streams' keys, in one kernel each."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from sbi_dist.posterior.sampler.program import FlowProgram
from sbi_dist.posterior.sampler.triton_autoregressive import autoregressive_kernel
from sbi_dist.posterior.sampler.triton_coupling import coupling_kernel
from sbi_dist.posterior.sampler.triton_pack import pack

__all__ = ["FusedFlow"]


class FusedFlow:
    """A program in one kernel, in float32; with its weights as they are now.

    Args:
        program: the compiled flow.
        transform: its layers.
        device: a CUDA device.
        block: draws of a tile.
        warps: of 32 threads, for a tile; default: by the number of hidden units.
        stages: of loads that are under way at once, in loops over matrices; default: the same.

    Raises:
        Unknown: no kernel knows such a flow, or it is too large for one; says why.
    """

    def __init__(
        self,
        program: FlowProgram,
        transform: nn.Module,
        device: torch.device,
        block: int = 64,
        warps: int | None = None,
        stages: int | None = None,
    ) -> None:
        self._packed = pack(program, transform).to(device)
        self._device, self._block = device, block
        # Tensor cores take 64 rows from a group of 4 warps. Up to 64 hidden units a thread has 165
        # registers then, so that three tiles are on a multiprocessor of an H100 at once (65,536
        # registers); with the next two matrices under way they take 66 KB each of its 228 KB. With
        # 128 units 8 warps share the registers, and there is no room for the next matrices. An
        # autoregressive layer's loops over windows are too short for a second stage.
        wide = self._packed.sizes["HIDDEN"] > 64
        self._warps = warps or (8 if wide else 4)
        self._stages = stages or (1 if wide or self._packed.autoregressive else 2)
        self._kernel = autoregressive_kernel if self._packed.autoregressive else coupling_kernel
        self._nothing = torch.zeros(1, device=device)

    def sample(
        self, noise: Tensor, conditions: Tensor, with_log_q: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """u of standard normal noise.

        Args:
            noise: float32 (D, K, M), K draws for each of M observations.
            conditions: (rows, M) of the program.

        Returns:
            u, float32 (D, K, M); and log q(u | x), float32 (K, M), or None if not asked for.
        """
        draws, observations = noise.shape[1:]
        return self._launch(noise, None, None, 0, draws, observations, conditions, with_log_q)

    def sample_columns(self, noise: Tensor, conditions: Tensor, which: Tensor) -> Tensor:
        """u, float32 (D, n), of noise (D, n) for observations ``which`` (n,)."""
        which = which.to(torch.int32).contiguous()
        u, _ = self._launch(
            noise.unsqueeze(2), None, which, 0, noise.shape[1], 1, conditions, False
        )
        return u.squeeze(2)

    def draw(
        self, keys: Tensor, first: int, draws: int, conditions: Tensor, with_log_q: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`sample`, with the noise of ``normal_noise(keys, first, draws, D)``."""
        return self._launch(None, keys, None, first, draws, len(keys), conditions, with_log_q)

    def _launch(
        self,
        noise: Tensor | None,
        keys: Tensor | None,
        which: Tensor | None,
        first: int,
        draws: int,
        observations: int,
        conditions: Tensor,
        with_log_q: bool,
    ) -> tuple[Tensor, Tensor | None]:
        packed, block = self._packed, self._block
        count = draws * observations
        u = torch.empty((observations, draws, packed.sizes["SIZE"]), device=self._device)
        log_q = torch.empty((observations, draws), device=self._device) if with_log_q else None
        # A tile of one observation reads its conditions once; its last one may be part empty, which
        # is a fifth of the work at most.
        one = which is None and (observations == 1 or draws > 4 * block)
        tiles = observations * -(-draws // block) if one else -(-count // block)
        where = torch.cuda.device(self._device) if u.is_cuda else contextlib.nullcontext()
        if count:
            with where:
                self._kernel[(tiles,)](
                    self._nothing if noise is None else noise,
                    self._nothing if keys is None else keys.contiguous(),
                    self._nothing if which is None else which,
                    packed.conditions(conditions),
                    packed.singles,
                    packed.halves,
                    packed.table,
                    u,
                    self._nothing if log_q is None else log_q,
                    draws,
                    observations,
                    first,
                    *((0, 0, 0) if noise is None else noise.stride()),
                    **packed.sizes,
                    BLOCK=block,
                    ONE=one,
                    WHICH=which is not None,
                    GIVEN=noise is not None,
                    LOG_Q=with_log_q,
                    num_warps=self._warps,
                    num_stages=self._stages,
                )
        if log_q is not None:
            log_q += packed.log_density
            log_q = log_q.T
        return u.permute(2, 1, 0), log_q
