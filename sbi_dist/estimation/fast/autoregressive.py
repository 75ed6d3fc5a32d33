"""The masked affine autoregressive layers of a flow and their gradient, as one computation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from nflows.transforms import MaskedAffineAutoregressiveTransform, ReversePermutation
from torch import Tensor
from torch.nn import functional as F

from sbi_dist.estimation.fast.layout import Layout
from sbi_dist.estimation.fast.stack import Binding, ContextRows, draw_masks, linear_rows

__all__ = ["AutoregressiveRun", "AutoregressiveStack"]

_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_softplus_backward = torch.ops.aten.softplus_backward.grad_input


class AutoregressiveStack:
    """T masked affine autoregressive layers of tanh networks, permutations between them.

    The permutations move no data: each layer's weights are rearranged to the first one's order,
    which is also that of the result (whose density does not depend on the order).

    Args:
        layers: autoregressive layers and permutations in their order in the flow.
        context: C.
        layout: the weights' places are added to it; masked weights are zeros there.
    """

    def __init__(
        self,
        layers: Sequence[MaskedAffineAutoregressiveTransform | ReversePermutation],
        context: int,
        layout: Layout,
    ) -> None:
        order = np.arange(layers[0].features)  # where the features of the layer at hand are
        initial, final, final_bias, networks = [], [], [], []
        for layer in layers:
            if isinstance(layer, ReversePermutation):
                order = order[layer._permutation.cpu().numpy()]
                continue
            network = layer.autoregressive_net
            networks.append(network)
            back = np.argsort(order)
            initial.append(_masked(layout, network.initial_layer)[:, back])
            rows = np.concatenate([2 * back, 2 * back + 1])  # scales, then shifts
            final.append(_masked(layout, network.final_layer)[rows])
            final_bias.append(layout.of(network.final_layer.bias)[rows, None])
            self.eps = layer._epsilon
        self.count, self.features = len(networks), len(order)
        self.hidden, self.blocks = len(networks[0].initial_layer.bias), len(networks[0].blocks)
        self.rows: list[ContextRows] = [
            linear_rows(layout, network.context_layer, context) for network in networks
        ]
        # First layers' biases, then those of the first blocks, of the second ones, and so on.
        stages = [
            [network.initial_layer for network in networks],
            *([network.blocks[n].linear for network in networks] for n in range(self.blocks)),
        ]
        squares = [layer for stage in stages[1:] for layer in stage]
        biases = [layout.of(layer.bias)[:, None] for stage in stages for layer in stage]
        layout.stack(
            "square",
            [layer.weight for layer in squares],
            np.stack([layer.mask.cpu().numpy() for layer in squares]),
        )
        layout.add("bias", np.stack(biases).reshape(self.blocks + 1, self.count, self.hidden, 1))
        layout.add("initial", np.stack(initial))
        layout.add("final", np.stack(final))
        layout.add("final_bias", np.stack(final_bias))

    def bind(self, binding: Binding) -> AutoregressiveRun:
        return AutoregressiveRun(self, binding)


class AutoregressiveRun:
    """The layers bound to N rows: see :class:`sbi_dist.estimation.fast.stack.Run`."""

    def __init__(self, part: AutoregressiveStack, binding: Binding) -> None:
        self._binding, self._eps = binding, part.eps
        weights, count = binding.weights, binding.rows.shape[1]
        transforms, blocks, size = part.count, part.blocks, part.features
        shape = (transforms, part.hidden, count)
        self._given, self._by_given = binding.rows.view(shape), binding.by_rows.view(shape)
        # [n][t]: what belongs to the first layer, or to block n - 1, of network t.
        self._kept = binding.space(blocks + 1, *shape)
        self._by_stage = binding.space(blocks + 1, *shape)
        self._first_bias, self._first = weights["bias"][0], self._kept[0]
        self._masks = binding.space(blocks, *shape) if binding.dropout else None
        # What tanh gave, without dropout's factors.
        self._values = torch.empty_like(self._kept[1:]) if binding.dropout else self._kept[1:]
        inputs = binding.space(transforms + 1, size, count)
        raw = binding.space(transforms, 2 * size, count)
        self._scales = binding.space(transforms, size, count)
        self._by_final = binding.space(transforms, 2 * size, count)
        self._by_inputs = binding.space(2, size, count).unbind()
        self._inputs = inputs.unbind()
        self._inputs_back = inputs[:-1].transpose(1, 2)
        self._kept_back = self._kept[:-1].flatten(0, 1).transpose(1, 2)
        self._last_back = self._kept[-1].transpose(1, 2)
        squares = weights["square"].unflatten(0, (blocks, transforms))
        self._steps = []
        for number in range(transforms):
            layers = []
            for block in range(blocks):
                layers.append(
                    (
                        squares[block][number],
                        squares[block][number].t(),
                        weights["bias"][block + 1][number],
                        self._kept[block + 1][number],
                        self._values[block][number],
                        None if self._masks is None else self._masks[block][number],
                        self._by_stage[block][number],
                    )
                )
            final, initial = weights["final"][number], weights["initial"][number]
            self._steps.append(
                _Step(
                    initial=initial,
                    initial_back=initial.t(),
                    first=self._kept[0][number],
                    layers=layers,
                    final=final,
                    final_back=final.t(),
                    final_bias=weights["final_bias"][number],
                    raw=raw[number],
                    unconstrained=raw[number][:size],
                    shift=raw[number][size:],
                    scale=self._scales[number],
                    by_raw=self._by_final[number],
                    by_scale=self._by_final[number][:size],
                    by_shift=self._by_final[number][size:],
                    by_last=self._by_stage[blocks][number],
                )
            )

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self._inputs
        if self._masks is not None:
            draw_masks(self._masks, self._binding.dropout)
        self._given.tanh_()
        torch.add(self._given, self._first_bias, out=self._first)
        inputs[0].copy_(w)
        for number, step in enumerate(self._steps):
            hidden = step.first.addmm_(step.initial, inputs[number]).tanh_()
            for weight, _, bias, after, value, mask, _ in step.layers:
                if mask is None:
                    torch.addmm(bias, weight, hidden, out=after).tanh_()
                else:
                    torch.addmm(bias, weight, hidden, out=value).tanh_()
                    torch.mul(value, mask, out=after)
                hidden = after
            torch.addmm(step.final_bias, step.final, hidden, out=step.raw)
            F.softplus(step.unconstrained, out=step.scale)  # type: ignore[call-arg]
            step.scale.add_(self._eps)
            torch.addcmul(step.shift, step.scale, inputs[number], out=inputs[number + 1])
        return inputs[-1], self._scales.log().sum((0, 1))

    def backward(self, grad: Tensor) -> Tensor:
        by_log_det = self._binding.by_log_det
        for number in reversed(range(len(self._steps))):
            step = self._steps[number]
            torch.div(by_log_det, step.scale, out=step.by_scale)
            step.by_scale.addcmul_(grad, self._inputs[number])
            _softplus_backward(step.by_scale, step.unconstrained, 1, 20, grad_input=step.by_scale)
            step.by_shift.copy_(grad)
            back = torch.mm(step.final_back, step.by_raw, out=step.by_last)
            for _, weight_back, _, _, value, mask, before in reversed(step.layers):
                if mask is not None:
                    back.mul_(mask)
                _tanh_backward(back, value, grad_input=back)
                back = torch.mm(weight_back, back, out=before)
            _tanh_backward(back, step.first, grad_input=back)
            # Two places in turn, as the gradient of the one before is read here.
            by_input = self._by_inputs[number % 2]
            torch.mul(grad, step.scale, out=by_input)
            grad = by_input.addmm_(step.initial_back, back)
        _tanh_backward(self._by_stage[0], self._given, grad_input=self._by_given)
        grads, by_stage = self._binding.grads, self._by_stage
        torch.sum(by_stage, 3, keepdim=True, out=grads["bias"])
        torch.bmm(by_stage[1:].flatten(0, 1), self._kept_back, out=grads["square"])
        torch.bmm(by_stage[0], self._inputs_back, out=grads["initial"])
        torch.bmm(self._by_final, self._last_back, out=grads["final"])
        torch.sum(self._by_final, 2, keepdim=True, out=grads["final_bias"])
        return grad


class _Step(NamedTuple):
    """One autoregressive layer: its weights, and where its values and gradients are."""

    initial: Tensor  # (H, D)
    initial_back: Tensor
    first: Tensor  # (H, N)
    layers: list[tuple]  # weight, its transpose, bias, result, tanh, mask, gradient of the input
    final: Tensor  # (2 D, H)
    final_back: Tensor
    final_bias: Tensor
    raw: Tensor  # (2 D, N): unconstrained scales, shifts
    unconstrained: Tensor
    shift: Tensor
    scale: Tensor
    by_raw: Tensor
    by_scale: Tensor
    by_shift: Tensor
    by_last: Tensor


def _masked(layout: Layout, layer: Any) -> np.ndarray:
    """Places of a masked layer's weights; none for those that its mask makes zero."""
    return np.where(layer.mask.cpu().numpy() != 0, layout.of(layer.weight), -1)
