"""log q(u | x) of a conditional flow, as one differentiable operation."""

from __future__ import annotations

import math
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nflows.transforms import LULinear, PiecewiseRationalQuadraticCouplingTransform
from torch import Tensor, nn

from sbi_dist.estimation.fast.affine import Affine
from sbi_dist.estimation.fast.autoregressive import AutoregressiveStack
from sbi_dist.estimation.fast.coupling import CouplingStack
from sbi_dist.estimation.fast.flat import flat_of
from sbi_dist.estimation.fast.layout import Layout, PackedGradient
from sbi_dist.estimation.fast.stack import Binding, Stack

if TYPE_CHECKING:
    from sbi_dist.estimation.flow import ConditionalFlow

__all__ = ["FastLogProb", "fast_log_prob"]

# Where no gradient is wanted: rows at a time, and numbers of the products with the context.
_MOST_ROWS, _LEAST_ROWS, _NUMBERS = 4096, 256, 2**22
_SIZES_KEPT = 4  # numbers of rows that memory is kept for where no gradient is wanted


def fast_log_prob(flow: ConditionalFlow) -> FastLogProb:
    """The function (u, context) -> log q of the flow: see :class:`FastLogProb`."""
    return FastLogProb(flow)


class FastLogProb:
    """log q(u | x), shape (N,), from u (N, D) and the embedded x (N, C).

    The same function as ``flow.flow.log_prob`` to rounding, and differentiable once by u, the
    context and the flow's weights. Where those are in :class:`FlatParameters` the gradient goes to
    its ``values`` in one piece (``torch.autograd.grad`` by single weights finds none then), else to
    each weight. Dropout is applied where the flow is in training mode, by masks of its own.

    Shapes are all that the course of the computation depends on, so that a CUDA graph can hold it.

    Args:
        flow: a flow as :class:`sbi_dist.estimation.flow.ConditionalFlow` builds it; the function
            follows its weights, and its moves to other devices and dtypes.
    """

    def __init__(self, flow: ConditionalFlow) -> None:
        self._flow = flow.flow
        self._program: _Program | None = None

    def __call__(self, u: Tensor, context: Tensor) -> Tensor:
        if len(u) != len(context):
            raise ValueError(f"u has {len(u)} rows and the context {len(context)}")
        program = self._current()
        flat, blocks = program.flat_weights()
        dropout = program.dropout if self._flow.training else 0.0
        if torch.is_grad_enabled() and (
            flat.requires_grad or u.requires_grad or context.requires_grad
        ):
            return _LogProb.apply(program, dropout, blocks, u, context, flat)
        chunk = program.rows_at_once
        parts = zip(u.split(chunk), context.split(chunk), strict=True)
        results = []
        for u_part, context_part in parts:
            run = program.take(len(u_part), False, dropout)
            results.append(run.forward(flat, blocks, u_part, context_part))
            program.give_back(run)
        return results[0] if len(results) == 1 else torch.cat(results)

    def _current(self) -> _Program:
        """The program for the flow's weights as they are now."""
        if self._program is None or not self._program.fits():
            with torch.inference_mode(False):
                self._program = _Program(self._flow)
        return self._program


class _Program:
    """The computation for one flow, and where its weights are."""

    def __init__(self, flow: Any) -> None:
        transform = flow._transform
        first, *layers = transform._transforms
        self._owner = first.linear  # has the first of the parameters
        self.parameters: list[nn.Parameter] = list(transform.parameters())
        self._flat = flat_of(self.parameters)
        if self._flat is None:
            starts = np.cumsum([0, *(weight.numel() for weight in self.parameters)]).tolist()
            layout = Layout(self.parameters, starts[:-1], starts[-1])
        else:
            flat = self._flat
            layout = Layout(flat.parameters, flat.starts, len(flat.values))
        like = self.parameters[0].detach()
        self.like = like
        self._free: dict[tuple[int, bool, float], list[_Run]] = {}
        self._lock = threading.RLock()  # the end of a graph may come at any time, in any thread
        self._pieces(first, layers, layout, like)
        self.packing = layout.finish(like)
        # Views of the flat vector stay what they are; those of a copy of it do not.
        self._blocks = [] if self._flat is None else self.packing.blocks(self._flat.values)

    def _pieces(self, first: Any, layers: list[Any], layout: Layout, like: Tensor) -> None:
        context = first.linear.in_features
        self.features, self.context = first.linear.out_features // 2, context
        self.affine = Affine(first.linear, first.network, first._LIMIT, layout)
        self.stack: Stack
        if isinstance(layers[0], PiecewiseRationalQuadraticCouplingTransform):
            linears = [layer for layer in layers if isinstance(layer, LULinear)]
            couplings = [layer for layer in layers if not isinstance(layer, LULinear)]
            self.stack = CouplingStack(couplings, linears, context, layout, like)
            self.dropout = couplings[0].transform_net.blocks[0].dropout.p
        else:
            self.stack = AutoregressiveStack(layers, context, layout)
            self.dropout = layers[0].autoregressive_net.blocks[0].dropout.p
        # The bias is a last column, multiplied by one.
        rows = [*self.affine.rows, *self.stack.rows]
        matrix = [np.hstack([weight, bias[:, None]]) for weight, bias in rows]
        layout.add("context", np.concatenate(matrix))
        self.affine_rows = sum(len(row.bias) for row in self.affine.rows)
        self.rows_at_once = max(_LEAST_ROWS, min(_MOST_ROWS, _NUMBERS // sum(map(len, matrix))))
        self.log_z = 0.5 * self.features * math.log(2 * math.pi)

    def fits(self) -> bool:
        """Whether the weights still are the same tensors, in the same place."""
        weight = self._owner.weight
        if weight is not self.parameters[0] or (weight.dtype, weight.device) != (
            self.like.dtype,
            self.like.device,
        ):
            return False
        return flat_of(self.parameters[:1]) is self._flat

    def flat_weights(self) -> tuple[Tensor, list[Tensor]]:
        """The vector that the packing reads, and the parts of it that are stacked."""
        if self._flat is not None:
            return self._flat.values, self._blocks
        flat = torch.cat([weight.reshape(-1) for weight in self.parameters])
        return flat, self.packing.blocks(flat)

    def take(self, count: int, keep: bool, dropout: float) -> _Run:
        """Memory and views for ``count`` rows; to be given back after the passes."""
        with self._lock:
            free = self._free.get((count, keep, dropout))
            if free:
                run = free.pop()
                if not free:
                    del self._free[run.key]
                return run
        with torch.inference_mode(False):  # its memory is written to in all modes
            return _Run(self, count, keep, dropout)

    def give_back(self, run: _Run) -> None:
        """To be used again. What graphs used stays, as a CUDA graph may hold it, whatever size."""
        with self._lock:
            free = self._free.pop(run.key, [])
            self._free[run.key] = [*free, run] if run.keep else [run]
            others = [key for key, (first, *_) in self._free.items() if not first.keep]
            for key in others[:-_SIZES_KEPT]:
                del self._free[key]


class _Run:
    """A program bound to N rows."""

    def __init__(self, program: _Program, count: int, keep: bool, dropout: float) -> None:
        self.key, self.keep = (count, keep, dropout), keep
        like, self._packing, self._log_z = program.like, program.packing, program.log_z
        self._packed = like.new_empty(self._packing.size)
        self._weights = self._packing.views(self._packed)
        self._grads = self._weights
        if keep:
            self._gradient = PackedGradient(self._packing, like)
            self._grads = self._packing.views(self._gradient.packed)
        self._given = like.new_ones((program.context + 1, count))
        self._matrix, self._by_matrix = self._weights["context"], self._grads["context"]
        self._rows = like.new_empty((len(self._matrix), count))
        self._by_rows = torch.empty_like(self._rows) if keep else self._rows
        self._by_log_det = like.new_empty(count)
        self._by_w = like.new_empty((program.features, count))
        first = program.affine_rows

        def binding(rows: slice) -> Binding:
            return Binding(
                self._weights,
                self._grads,
                self._rows[rows],
                self._by_rows[rows],
                self._by_log_det,
                keep,
                dropout,
            )

        self._affine = program.affine.bind(binding(slice(None, first)))
        self._stack = program.stack.bind(binding(slice(first, None)))

    def forward(self, flat: Tensor, blocks: list[Tensor], u: Tensor, context: Tensor) -> Tensor:
        """log q (N,), a new tensor."""
        self._packing.pack(flat, blocks, self._packed)
        self._given[:-1].copy_(context.t())
        torch.mm(self._matrix, self._given, out=self._rows)
        w, log_det = self._affine.forward(u.t())
        self._w, more = self._stack.forward(w)
        log_q = log_det.add_(more).sub_(self._log_z)
        return log_q.add_((self._w * self._w).sum(0), alpha=-0.5)

    def backward(
        self, grad: Tensor, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of u, of the context and of the flat weights, new tensors; None if unneeded."""
        self._by_log_det.copy_(grad)
        torch.mul(self._w, grad, out=self._by_w)
        back = self._stack.backward(self._by_w.neg_())
        back = self._affine.backward(back)
        by_u = back.t().clone() if needs[0] else None
        by_context = torch.mm(self._matrix.t(), self._by_rows)[:-1].t() if needs[1] else None
        if not needs[2]:
            return by_u, by_context, None
        self._by_matrix.copy_(torch.mm(self._given, self._by_rows.t()).t())
        return by_u, by_context, self._gradient.flat()


class _Lease:
    """The use of a run by one graph, which ends with its backward pass or with the graph."""

    def __init__(self, program: _Program, run: _Run) -> None:
        self.run = run
        self._end = weakref.finalize(self, program.give_back, run)
        self._end.atexit = False

    def end(self) -> None:
        self._end()


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        program: _Program,
        dropout: float,
        blocks: list[Tensor],
        u: Tensor,
        context: Tensor,
        flat: Tensor,
    ) -> Tensor:
        ctx.lease = _Lease(program, program.take(len(u), True, dropout))
        # Nothing of u is needed, but this makes a second backward pass an error as it should be.
        ctx.save_for_backward(u)
        return ctx.lease.run.forward(flat, blocks, u, context)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        gradients = ctx.lease.run.backward(grad, ctx.needs_input_grad[3:])
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.lease.end()
        return None, None, None, *gradients
