"""Residual networks of nflows (ReLU, gated by a context or not) and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ResidualRun"]

_relu_backward = torch.ops.aten.threshold_backward.grad_input


class ResidualRun:
    """The residual blocks of one network, which act on ``hidden`` (H, N) in place.

    Args:
        hidden, by_hidden: (H, N), and its gradient.
        weights, biases: two of (H, H) and (H, 1) for each block.
        kept: two of (H, N) for each block: inputs of its linear layers.
        by_layers: likewise, gradients of the outputs of its linear layers.
        outputs: (H, N) for each block: output of its second linear layer.
        gates, by_gates: (H, N) for each block: factors of its output and their gradients; None
            for no gates.
        masks: dropout's factors (H, N) for each block; None for no dropout.
        spare: (H, N).
    """

    def __init__(
        self,
        hidden: Tensor,
        by_hidden: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        kept: Sequence[Tensor],
        by_layers: Sequence[Tensor],
        outputs: Sequence[Tensor],
        gates: Sequence[Tensor] | None,
        by_gates: Sequence[Tensor] | None,
        masks: Sequence[Tensor] | None,
        spare: Tensor,
    ) -> None:
        self._hidden, self._by_hidden, self._spare = hidden, by_hidden, spare
        none = [None] * len(outputs)
        self._forward = list(
            zip(
                weights[::2], biases[::2], kept[::2], weights[1::2], biases[1::2], kept[1::2],
                outputs, gates or none, masks or none, strict=True,
            )
        )  # fmt: skip
        back = [weight.t() for weight in weights]
        self._backward = list(
            zip(
                back[::2], kept[::2], by_layers[::2], back[1::2], kept[1::2], by_layers[1::2],
                outputs, gates or none, by_gates or none, masks or none, strict=True,
            )
        )[::-1]  # fmt: skip

    def forward(self) -> None:
        """Pass ``hidden`` through the blocks."""
        hidden = self._hidden
        for weight0, bias0, first, weight1, bias1, second, output, gate, mask in self._forward:
            torch.clamp_min(hidden, 0, out=first)
            torch.addmm(bias0, weight0, first, out=second)
            second.relu_()
            if mask is not None:
                second.mul_(mask)
            torch.addmm(bias1, weight1, second, out=output)
            if gate is None:
                hidden.add_(output)
            else:
                hidden.addcmul_(output, gate)

    def backward(self) -> None:
        """Turn ``by_hidden`` from the gradient of the result into that of what came in."""
        grad, spare = self._by_hidden, self._spare
        for (
            back0, first, by_first, back1, second, by_second, output, gate, by_gate, mask,
        ) in self._backward:  # fmt: skip
            if gate is None:
                by_second.copy_(grad)
            else:
                torch.mul(grad, gate, out=by_second)
                torch.mul(grad, output, out=by_gate)
            torch.mm(back1, by_second, out=by_first)
            if mask is not None:
                by_first.mul_(mask)
            _relu_backward(by_first, second, 0, grad_input=by_first)
            torch.mm(back0, by_first, out=spare)
            _relu_backward(spare, first, 0, grad_input=spare)
            grad.add_(spare)
