"""Whether a flow is sampled by one fused kernel on a GPU, or by the steps one after the other.

Triton is imported here only, when a GPU is asked for: torch has it where it has CUDA.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from sbi_dist.posterior.sampler.program import FlowProgram
from sbi_dist.posterior.sampler.step import Unknown

__all__ = ["Fused", "fused_flow"]


class Fused(Protocol):
    """See :class:`sbi_dist.posterior.sampler.triton_launch.FusedFlow`."""

    def sample(
        self, noise: Tensor, conditions: Tensor, with_log_q: bool = False
    ) -> tuple[Tensor, Tensor | None]: ...

    def sample_columns(self, noise: Tensor, conditions: Tensor, which: Tensor) -> Tensor: ...

    def draw(
        self, keys: Tensor, first: int, draws: int, conditions: Tensor, with_log_q: bool = False
    ) -> tuple[Tensor, Tensor | None]: ...


def fused_flow(
    program: FlowProgram, transform: nn.Module, like: Tensor
) -> tuple[Fused | None, str]:
    """The program as a fused kernel, or None, and how it is computed then, in a few words.

    Args:
        program: the compiled flow.
        transform: its layers.
        like: tells dtype and device.
    """
    if like.device.type != "cuda":
        return None, "compiled"
    if like.dtype != torch.float32:
        return None, f"compiled; the fused kernel is for float32, not {like.dtype}"
    try:
        from sbi_dist.posterior.sampler.triton_launch import FusedFlow
    except ImportError as error:
        return None, f"compiled; for the fused kernel, install triton ({error})"
    try:
        fused = FusedFlow(program, transform, like.device)
        # Compiles it, which takes a C compiler and a GPU that has what the kernel needs.
        fused.sample(like.new_zeros(program.features, 1, 1), _no_conditions(program, like))
        torch.cuda.synchronize(like.device)
    except Unknown as unknown:
        return None, f"compiled; no fused kernel is written for {unknown}"
    except Exception as error:
        return None, f"compiled; the fused kernel fails here ({type(error).__name__}: {error})"
    return fused, "compiled to one fused kernel"


def _no_conditions(program: FlowProgram, like: Tensor) -> Tensor:
    return like.new_zeros(program.condition_rows, 1)
