"""The conditional affine layer, w = (u - m(c)) exp(a(c)) with |a| < limit, and its gradient."""

from __future__ import annotations

import numpy as np
import torch
from nflows.nn.nets import ResidualNet
from torch import Tensor, nn

from sbi_dist.estimation.fast.layout import Layout
from sbi_dist.estimation.fast.residual import ResidualRun
from sbi_dist.estimation.fast.stack import Binding, linear_rows

__all__ = ["Affine", "AffineRun"]

_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class Affine:
    """m and a are a linear function of the context plus a residual network of it.

    Args:
        linear, network: the two, each with 2 D outputs, m first.
        limit: bound of |a|.
        layout: the weights' places are added to it.
    """

    def __init__(
        self, linear: nn.Linear, network: ResidualNet, limit: float, layout: Layout
    ) -> None:
        context = linear.in_features
        self.features, self.limit = linear.out_features // 2, limit
        self.hidden = network.hidden_features
        self.rows = [
            linear_rows(layout, linear, context),
            linear_rows(layout, network.initial_layer, context),
        ]
        layers = [layer for block in network.blocks for layer in block.linear_layers]
        layout.stack("affine_square", [layer.weight for layer in layers])
        layout.add("affine_bias", np.stack([layout.of(layer.bias)[:, None] for layer in layers]))
        layout.add("affine_final", layout.of(network.final_layer.weight))
        layout.add("affine_final_bias", layout.of(network.final_layer.bias)[:, None])

    def bind(self, binding: Binding) -> AffineRun:
        return AffineRun(self, binding)


class AffineRun:
    """The layer bound to N rows: see :class:`sbi_dist.estimation.fast.stack.Run`."""

    def __init__(self, part: Affine, binding: Binding) -> None:
        self._weights, self._grads = binding.weights, binding.grads
        self._limit, self._by_log_det = part.limit, binding.by_log_det
        size, count = part.features, binding.rows.shape[1]
        weights, biases = (binding.weights[name] for name in ("affine_square", "affine_bias"))
        self._linear, self._hidden = binding.rows[: 2 * size], binding.rows[2 * size :]
        self._by_linear, self._by_hidden = binding.by_rows[: 2 * size], binding.by_rows[2 * size :]
        self._shift, self._raw = self._linear[:size], self._linear[size:]
        self._by_shift, self._by_logs = self._by_linear[:size], self._by_linear[size:]
        self._kept = binding.space(len(weights), part.hidden, count)
        self._kept_back = self._kept.transpose(1, 2)
        self._by_layers = binding.space(len(weights), part.hidden, count)
        spare, output = binding.space(2, part.hidden, count).unbind()
        self._network = ResidualRun(
            self._hidden,
            self._by_hidden,
            weights.unbind(),
            biases.unbind(),
            self._kept.unbind(),
            self._by_layers.unbind(),
            [output] * (len(weights) // 2),
            None,
            None,
            None,
            spare,
        )
        self._values = binding.space(5, size, count).unbind()

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        bounded, logs, scale, w, _ = self._values
        self._network.forward()
        self._linear.addmm_(self._weights["affine_final"], self._hidden)
        self._linear.add_(self._weights["affine_final_bias"])
        torch.div(self._raw, self._limit, out=bounded)
        bounded.tanh_()
        torch.mul(bounded, self._limit, out=logs)
        torch.exp(logs, out=scale)
        torch.sub(u, self._shift, out=w)
        w.mul_(scale)
        return w, logs.sum(0)

    def backward(self, grad: Tensor) -> Tensor:
        bounded, _, scale, w, by_u = self._values
        grads = self._grads
        torch.mul(grad, scale, out=by_u)
        torch.neg(by_u, out=self._by_shift)
        torch.addcmul(self._by_log_det, grad, w, out=self._by_logs)
        _tanh_backward(self._by_logs, bounded, grad_input=self._by_logs)
        torch.mm(self._by_linear, self._hidden.t(), out=grads["affine_final"])
        torch.sum(self._by_linear, 1, keepdim=True, out=grads["affine_final_bias"])
        torch.mm(self._weights["affine_final"].t(), self._by_linear, out=self._by_hidden)
        self._network.backward()
        torch.bmm(self._by_layers, self._kept_back, out=grads["affine_square"])
        torch.sum(self._by_layers, 2, keepdim=True, out=grads["affine_bias"])
        return by_u
