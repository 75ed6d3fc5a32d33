"""The spline coupling layers of a flow, with the linear layers between them, as one computation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from nflows.transforms import LULinear, PiecewiseRationalQuadraticCouplingTransform
from torch import Tensor

from sbi_dist.estimation.fast.layout import Layout
from sbi_dist.estimation.fast.linear import LinearLayers
from sbi_dist.estimation.fast.residual import ResidualRun
from sbi_dist.estimation.fast.spline import END_SLOPE, Spline, SplineRun
from sbi_dist.estimation.fast.stack import Binding, ContextRows, draw_masks, linear_rows

__all__ = ["CouplingRun", "CouplingStack"]

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input


class CouplingStack:
    """T couplings, each followed by a linear layer where there is more than one feature.

    Args:
        couplings: each transforms every other feature.
        linears: as many, or none.
        context: C.
        layout: the weights' places are added to it.
        like: tells dtype and device.
    """

    def __init__(
        self,
        couplings: Sequence[PiecewiseRationalQuadraticCouplingTransform],
        linears: Sequence[LULinear],
        context: int,
        layout: Layout,
        like: Tensor,
    ) -> None:
        self.count, self.features = len(couplings), couplings[0].features
        networks = [layer.transform_net for layer in couplings]
        self.hidden, self.blocks = networks[0].hidden_features, len(networks[0].blocks)
        self.spline = Spline(couplings[0].num_bins, float(couplings[0].tail_bound), like)
        blocks = [block for network in networks for block in network.blocks]
        self.rows: list[ContextRows] = [
            *(linear_rows(layout, network.initial_layer, context) for network in networks),
            *(linear_rows(layout, block.context_layer, context) for block in blocks),
        ]
        self.linears = LinearLayers(linears, layout) if linears else None
        # As a matrix that acts on all features, with zeros for those that are transformed.
        initial = np.full((self.count, self.hidden, self.features), -1)
        for number, (layer, network) in enumerate(zip(couplings, networks, strict=True)):
            columns = layer.identity_features.cpu().numpy()
            weight = layout.of(network.initial_layer.weight)
            initial[number][:, columns] = weight[:, : len(columns)]
        layout.add("initial", initial)
        layers = [layer for block in blocks for layer in block.linear_layers]
        layout.stack("square", [layer.weight for layer in layers])
        layout.add("square_bias", np.stack([layout.of(layer.bias)[:, None] for layer in layers]))
        self.slices = [
            _every_other(layer.transform_features.cpu().numpy(), self.features)
            for layer in couplings
        ]
        self.sizes = [layer.num_transform_features for layer in couplings]
        self._add_final(networks, layout)

    def _add_final(self, networks: Sequence, layout: Layout) -> None:
        """The last layers with rows in the order that the spline takes its parameters in."""
        bins = self.spline.bins
        weights, biases, factors, constants = [], [], [], []
        for network, size in zip(networks, self.sizes, strict=True):
            row = np.arange(size * (3 * bins - 1)).reshape(size, 3 * bins - 1)
            sizes = row[:, : 2 * bins].reshape(size, 2, bins).transpose(2, 1, 0)
            slopes = np.pad(row[:, 2 * bins :].T, ((1, 1), (0, 0)), constant_values=-1)
            rows = np.concatenate([sizes.reshape(-1), slopes.reshape(-1)])
            final = network.final_layer
            inner = (rows >= 0)[:, None]
            weights.append(np.where(inner, layout.of(final.weight)[rows], -1))
            biases.append(np.where(inner, layout.of(final.bias)[rows][:, None], -1))
            scale = np.ones_like(rows, dtype=np.float64)
            scale[: sizes.size] = self.hidden**-0.5
            factors.append(scale[:, None])
            constants.append(np.where(inner, 0.0, END_SLOPE))
        layout.add("final", np.concatenate(weights), np.concatenate(factors))
        layout.add(
            "final_bias",
            np.concatenate(biases),
            np.concatenate(factors),
            np.concatenate(constants),
        )

    def bind(self, binding: Binding) -> CouplingRun:
        return CouplingRun(self, binding)


class CouplingRun:
    """The layers bound to N rows: see :class:`sbi_dist.estimation.fast.stack.Run`."""

    def __init__(self, part: CouplingStack, binding: Binding) -> None:
        self._part, self._binding = part, binding
        transforms, blocks, size = part.count, part.blocks, part.features
        count, keep = binding.rows.shape[1], binding.keep
        weights, grads = binding.weights, binding.grads
        # Rows of the first layers, then of the gates.
        rows, by_rows = (
            tensor.view(transforms * (blocks + 1), part.hidden, count)
            for tensor in (binding.rows, binding.by_rows)
        )
        hidden, by_hidden = rows[:transforms], by_rows[:transforms]
        self._gates, self._by_gates = rows[transforms:], by_rows[transforms:]
        self._by_hidden = by_hidden

        def space(number: int, cycle: int = 1) -> tuple[Tensor, list[Tensor]]:
            """``number`` of (H, N); where nothing is kept, the same ``cycle`` again and again."""
            if keep:
                tensor = binding.space(number, part.hidden, count)
                return tensor, list(tensor.unbind())
            tensor = binding.space(cycle, part.hidden, count)
            return tensor, list(tensor.unbind()) * (number // cycle)

        total = transforms * blocks
        _, outputs = space(total)
        kept, each_kept = space(2 * total, 2)
        self._by_layers, by_layers = space(2 * total, 2)
        self._kept_back = kept.transpose(1, 2)
        self._masks = binding.space(total, part.hidden, count) if binding.dropout else None
        squares, biases = weights["square"].unbind(), weights["square_bias"].unbind()
        spare = binding.space(part.hidden, count)
        self._networks = []
        for number in range(transforms):
            one = slice(number * blocks, (number + 1) * blocks)
            two = slice(2 * number * blocks, 2 * (number + 1) * blocks)
            self._networks.append(
                ResidualRun(
                    hidden[number],
                    by_hidden[number],
                    squares[two],
                    biases[two],
                    each_kept[two],
                    by_layers[two],
                    outputs[one],
                    self._gates[one].unbind(),
                    self._by_gates[one].unbind(),
                    None if self._masks is None else self._masks[one].unbind(),
                    spare,
                )
            )
        # Inputs of the couplings, of the linear layers, and the result.
        states = binding.space(2, transforms + 1, size, count)
        self._inputs, self._mixed = states[0].unbind(), states[1].unbind()
        self._inputs_back = states[0, :-1].transpose(1, 2)
        self._mixed_back = states[1, :-1].transpose(1, 2)
        # [t]: gradient of the input of coupling t + 1, and that of its output.
        self._by_inputs = binding.space(transforms + 1, size, count)
        self._by_mixed = binding.space(size, count)
        self._each_by_input = self._by_inputs.unbind()
        self._matrices = binding.space(transforms, size, size)
        self._parameters = binding.space(part.spline.rows(max(part.sizes)), count)
        self._by_final = binding.space(len(weights["final"]), count)
        self._slopes = binding.space(sum(part.sizes), count)
        row_counts = [part.spline.rows(size) for size in part.sizes]
        self._by_linear = self._by_inputs[1:]
        splines = []
        for number, (by_final, slopes) in enumerate(
            zip(self._by_final.split(row_counts), self._slopes.split(part.sizes), strict=True)
        ):
            place = part.slices[number]
            splines.append(
                SplineRun(
                    part.spline,
                    self._inputs[number][place],
                    self._parameters[: row_counts[number]],
                    by_final,
                    self._mixed[number][place],
                    slopes,
                    self._by_mixed[place],
                    binding.by_log_det,
                )
            )
        self._steps = list(
            zip(
                self._networks,
                splines,
                weights["initial"].unbind(),
                hidden.unbind(),
                by_hidden.unbind(),
                weights["final"].split(row_counts),
                weights["final_bias"].split(row_counts),
                grads["final"].split(row_counts),
                [self._parameters[:rows] for rows in row_counts],
                self._by_final.split(row_counts),
                strict=True,
            )
        )
        self._each_matrix = self._matrices.unbind()
        linear = part.linears is not None
        self._linear_biases = weights["linear_bias"].unbind() if linear else ()

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        linears, inputs, mixed = self._part.linears, self._inputs, self._mixed
        self._gates.sigmoid_()
        if self._masks is not None:
            draw_masks(self._masks, self._binding.dropout)
        inputs[0].copy_(w)
        if linears is not None:
            log_det, self._saved = linears.forward(self._binding.weights, self._matrices)
        for number, step in enumerate(self._steps):
            network, spline, initial, hidden, _, final, bias, _, parameters, _ = step
            if linears is not None:
                hidden.addmm_(initial, inputs[number])
            network.forward()
            torch.addmm(bias, final, hidden, out=parameters)
            mixed[number].copy_(inputs[number])
            spline.forward()
            if linears is None:
                inputs[number + 1].copy_(mixed[number])
            else:
                torch.addmm(
                    self._linear_biases[number],
                    self._each_matrix[number],
                    mixed[number],
                    out=inputs[number + 1],
                )
        logs = self._slopes.log().sum(0)
        return inputs[-1], logs if linears is None else logs.add_(log_det)

    def backward(self, grad: Tensor) -> Tensor:
        linears, by_mixed, by_inputs = self._part.linears, self._by_mixed, self._each_by_input
        by_inputs[-1].copy_(grad)
        for number in reversed(range(len(self._steps))):
            network, spline, initial, hidden, back, final, _, by_final, _, by_raw = self._steps[
                number
            ]
            if linears is None:
                by_mixed.copy_(by_inputs[number + 1])
            else:
                torch.mm(self._each_matrix[number].t(), by_inputs[number + 1], out=by_mixed)
            spline.backward()
            torch.mm(by_raw, hidden.t(), out=by_final)
            torch.mm(final.t(), by_raw, out=back)
            network.backward()
            if linears is None:
                by_inputs[number].copy_(by_mixed)
            else:
                torch.addmm(by_mixed, initial.t(), back, out=by_inputs[number])
        _sigmoid_backward(self._by_gates, self._gates, grad_input=self._by_gates)
        grads = self._binding.grads
        torch.sum(self._by_final, 1, keepdim=True, out=grads["final_bias"])
        torch.bmm(self._by_layers, self._kept_back, out=grads["square"])
        torch.sum(self._by_layers, 2, keepdim=True, out=grads["square_bias"])
        torch.bmm(self._by_hidden, self._inputs_back, out=grads["initial"])
        if linears is not None:
            torch.sum(self._by_linear, 2, keepdim=True, out=grads["linear_bias"])
            linears.backward(
                self._binding.weights,
                torch.bmm(self._by_linear, self._mixed_back),
                self._binding.by_log_det.sum(),
                self._saved,
                grads,
            )
        return by_inputs[0]


def _every_other(features: np.ndarray, size: int) -> slice:
    """The features as a slice, whose views need no copy."""
    place = slice(int(features[0]), None, 2)
    if list(features) != list(range(size))[place]:
        raise ValueError(f"the coupling transforms features {features}, not every other one")
    return place
