"""What the parts of a flow's computation have in common.

A part is described once, for the flow's weights (its places in the layout), and then bound to a
number of rows: all memory that it needs is set apart and every view of it made beforehand, so
that a pass is nothing but arithmetic into memory that is there.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from sbi_dist.estimation.fast.layout import Layout

__all__ = ["Binding", "ContextRows", "Run", "Stack", "draw_masks", "linear_rows"]


class ContextRows(NamedTuple):
    """Rows of the one matrix that the context is multiplied by: places of weights and biases."""

    weight: np.ndarray  # (rows, C)
    bias: np.ndarray  # (rows,)


def linear_rows(layout: Layout, layer: nn.Linear, context: int) -> ContextRows:
    """The part of a linear layer that acts on the context, its last inputs."""
    weight = layout.of(layer.weight)
    return ContextRows(weight[:, weight.shape[1] - context :], layout.of(layer.bias))


class Binding(NamedTuple):
    """The memory that a part shares with the others, for N rows.

    Attributes:
        weights, grads: arrays of the layout, and their gradients.
        rows, by_rows: (rows, N): the part's share of the products with the context, and their
            gradients.
        by_log_det: (N,), gradient of the log-determinant.
        keep: whether there will be backward passes.
        dropout: probability; 0 for none.
    """

    weights: dict[str, Tensor]
    grads: dict[str, Tensor]
    rows: Tensor
    by_rows: Tensor
    by_log_det: Tensor
    keep: bool
    dropout: float

    def space(self, *shape: int) -> Tensor:
        return self.rows.new_empty(shape)


def draw_masks(masks: Tensor, dropout: float) -> None:
    """Fill with dropout's factors: 0 with probability ``dropout``, else 1 / (1 - dropout)."""
    masks.bernoulli_(1 - dropout).mul_(1 / (1 - dropout))


class Run(Protocol):
    """A part bound to N rows. Its results lie in its own memory until the next pass."""

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The transformed w (D, N) and the log-determinants (N,); may overwrite ``rows``."""
        ...

    def backward(self, grad: Tensor) -> Tensor:
        """Gradient (D, N) of w from that of the transformed w; writes those of the weights."""
        ...


class Stack(Protocol):
    """Transforms that share a context."""

    rows: list[ContextRows]

    def bind(self, binding: Binding) -> Run: ...
