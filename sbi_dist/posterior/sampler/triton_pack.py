"""A flow's weights in the order in which a fused kernel reads them.

The kernels know one form: layers of one kind and size, a linear map before each and one after the
last, and the conditional affine layer at the end. Units, features and bins are padded to powers of
two, with weights of zero. For each layer there are numbers of float32 (the linear map, biases, and
what is not worth a product on tensor cores) and matrices of float16, transposed: each as a high and
a low part, see ``triton_tile.py``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from nflows.transforms import (
    MaskedAffineAutoregressiveTransform,
    PiecewiseRationalQuadraticCouplingTransform,
)
from torch import Tensor, nn

from sbi_dist.posterior.sampler.affine import AffineStep
from sbi_dist.posterior.sampler.autoregressive import AutoregressiveStep
from sbi_dist.posterior.sampler.coupling import CouplingStep
from sbi_dist.posterior.sampler.linear import LinearStep
from sbi_dist.posterior.sampler.program import FlowProgram, flattened
from sbi_dist.posterior.sampler.step import Unknown, with_bias

__all__ = ["Packed", "pack"]

# What a tile of 64 draws has room for. Its hidden units take 32 of a thread's 255 registers, up to
# 64 units and with 128 threads as up to 128 with 256, and several such tensors are there at once;
# for an autoregressive layer, one for each hidden layer. At 64 units nothing is spilled to memory;
# at 128 units, some 0.7 KB a thread.
MOST_HIDDEN, MOST_FEATURES, MOST_BINS, MOST_HIDDEN_LAYERS = 128, 32, 32, 3
# Activations of ReLU networks are divided by this, so that float16 holds all up to 1.6e7; their
# smallest step, 2**-35 with the low part, is 7e-9 then.
_SCALE = 256.0
_LEAST = -1e30  # an exponent of a bin that is not there


@dataclasses.dataclass
class Packed:
    """What a kernel takes.

    Attributes:
        autoregressive: which kernel.
        sizes: its compile-time arguments that depend on the flow.
        singles, halves: weights, float32 and float16.
        table: int32, as the kernel says.
        sources: row of the program's conditions for each of the kernel's, and their number where
            there is none (a zero).
        log_density: what the linear maps add to the log density of each draw.
    """

    autoregressive: bool
    sizes: dict[str, Any]
    singles: Tensor
    halves: Tensor
    table: Tensor
    sources: Tensor
    log_density: float

    def to(self, device: torch.device) -> Packed:
        names = ("singles", "halves", "table", "sources")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})

    def conditions(self, conditions: Tensor) -> Tensor:
        """The program's conditions (rows, M) as the kernel reads them, (M, some)."""
        padded = torch.nn.functional.pad(conditions.T, (0, 1))
        return torch.index_select(padded, 1, self.sources)


@torch.no_grad()
def pack(program: FlowProgram, transform: nn.Module) -> Packed:
    """The weights of a flow for a fused kernel, on the CPU.

    Args:
        program: its steps, of which the conditions are.
        transform: its layers.

    Raises:
        Unknown: no kernel knows such a flow, or it is too large for one; says why.
    """
    affine, linears, steps = _in_order(program)
    layers = [
        each
        for each in reversed(flattened(transform))
        if isinstance(
            each, (PiecewiseRationalQuadraticCouplingTransform, MaskedAffineAutoregressiveTransform)
        )
    ]
    size = program.features
    _check(size <= MOST_FEATURES, f"more than {MOST_FEATURES} parameters")
    _check(steps[0].hidden <= MOST_HIDDEN, f"networks of over {MOST_HIDDEN} units")
    padded, hidden = _power(size), max(16, _power(steps[0].hidden))
    kind = _Autoregressive if isinstance(steps[0], AutoregressiveStep) else _Coupling
    packing = kind(steps, layers, padded, hidden)
    sizes = {"SIZE": size, "PADDED": padded, "LAYERS": len(steps), "HIDDEN": hidden}
    singles, halves = [], []
    for linear, step, layer in zip(linears, steps, layers, strict=False):
        more, matrices = packing.of(step, layer)
        singles += [_linear(linear, size, padded), *more]
        halves += matrices
    singles.append(_linear(linears[-1], size, padded))
    at, none = _condition_rows(program), program.condition_rows
    sources = _condition_sources(at[id(affine)], [0, size, 3 * size], size, padded, none)
    for step in steps:
        parts = [part * step.hidden for part in range(step.condition_rows // step.hidden)]
        sources += _condition_sources(at[id(step)], parts, step.hidden, hidden, none)
    weights = torch.cat([each.reshape(-1) for each in halves])
    _check(bool(torch.isfinite(weights).all()), "weights out of float16's range")
    return Packed(
        autoregressive=kind is _Autoregressive,
        sizes=sizes | packing.sizes,
        singles=torch.cat([each.reshape(-1) for each in singles]),
        halves=weights,
        table=torch.tensor(packing.table, dtype=torch.int32),
        sources=torch.tensor(sources),
        log_density=sum(each.log_det for each in linears if each is not None),
    )


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise Unknown(what)


def _in_order(program: FlowProgram) -> tuple[AffineStep, list[LinearStep | None], list[Any]]:
    """The affine step, the linear steps, if any, around each layer, and the layers' steps."""
    linears: list[LinearStep | None] = [None]
    layers: list[Any] = []
    *steps, affine = reversed(program.steps)
    for step in steps:
        if isinstance(step, LinearStep):
            _check(linears[-1] is None, "two linear layers in a row")
            linears[-1] = step
            continue
        same = not layers or type(layers[0]) is type(step)
        _check(same and not isinstance(step, AffineStep), "layers of different kinds")
        layers.append(step)
        linears.append(None)
    if not isinstance(affine, AffineStep) or not layers:
        raise Unknown("another order of layers")
    return affine, linears, layers


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _filled(block: Tensor, *shape: int) -> Tensor:
    """A matrix, or several, in the corner of zeros, float32 on the CPU."""
    filled = torch.zeros(shape)
    filled[tuple(slice(length) for length in block.shape)] = block.cpu()
    return filled


def _halves(matrix: Tensor) -> Tensor:
    """High and low part of a float32 matrix, (2, ...)."""
    high = matrix.half()
    return torch.stack([high, ((matrix - high.float()) * 2048).half()])


def _linear(step: LinearStep | None, size: int, padded: int) -> Tensor:
    """From noise to u: the matrix transposed, and the shift."""
    if step is None:
        step = LinearStep.of_order(list(range(size)))
    matrix = _filled(step.inverse.T, padded, padded)
    shift = _filled(-step.inverse @ step.bias, padded)
    return torch.cat([matrix.view(-1), shift])


def _condition_rows(program: FlowProgram) -> dict[int, int]:
    """Where each step's conditions begin among the program's."""
    at, start = {}, 0
    for step in program.steps:
        at[id(step)] = start
        start += step.condition_rows
    return at


def _condition_sources(
    start: int, parts: list[int], length: int, padded: int, none: int
) -> list[int]:
    """Rows of a step's conditions, each part padded."""
    sources: list[int] = []
    for part in parts:
        sources += [start + part + number for number in range(length)]
        sources += [none] * (padded - length)
    return sources


class _Coupling:
    """For each layer: first matrix by feature, biases, those of the bins; blocks, bins."""

    def __init__(
        self, steps: list[CouplingStep], layers: list[Any], padded: int, hidden: int
    ) -> None:
        step, layer = steps[0], layers[0]
        bins = layer.num_bins
        kinds = {
            (
                *(each.transform_net.hidden_features, len(each.transform_net.blocks)),
                *(each.num_bins, each.tail_bound),
                *(each.min_bin_width, each.min_bin_height, each.min_derivative),
            )
            for each in layers
        }
        _check(len(kinds) == 1, "layers of different sizes")
        _check(bins <= MOST_BINS, f"splines of over {MOST_BINS} bins")
        self._padded, self._hidden, self._bins = padded, hidden, max(16, _power(bins))
        self._moved = max(each.moved for each in steps)
        # Gives a slope of one.
        self._end = math.log(math.expm1(1 - layer.min_derivative))
        self.table = [each.moved for each in steps]
        self.sizes = {
            "BLOCKS": step.blocks,
            "MOVED": self._moved,
            "BINS": bins,
            "PADDED_BINS": self._bins,
            "BOUND": layer.tail_bound,
            "LEAST_WIDTH": layer.min_bin_width,
            "LEAST_HEIGHT": layer.min_bin_height,
            "LEAST_SLOPE": layer.min_derivative,
            "END": self._end,
        }

    def of(self, step: CouplingStep, layer: Any) -> tuple[list[Tensor], list[Tensor]]:
        network, hidden, bins = layer.transform_net, self._hidden, layer.num_bins
        initial = network.initial_layer.weight[:, : step.fixed]
        singles, halves = [_filled(initial.T, self._padded, hidden)], []
        for block in network.blocks:
            for each in block.linear_layers:
                singles.append(_filled(each.bias, hidden))
                halves.append(_halves(_filled(each.weight.T, hidden, hidden) * _SCALE))
        final = with_bias(network.final_layer.weight, network.final_layer.bias)
        rows = final.cpu().view(step.moved, 3 * bins - 1, -1)
        # By feature: widths and heights as logarithms to base 2, slopes at the upper ends.
        parts = torch.zeros(self._moved, 3, self._bins, 1 + hidden)
        for kind in range(3):
            some = rows[:, kind * bins : min((kind + 1) * bins, 3 * bins - 1)]
            factor = 1.0 if kind == 2 else 1 / (math.sqrt(network.hidden_features) * math.log(2))
            weights, biases = some[..., :-1] * factor, some[..., -1] * factor
            parts[: step.moved, kind, : some.shape[1], : weights.shape[2]] = weights
            parts[: step.moved, kind, : some.shape[1], -1] = biases
        parts[:, :2, bins:, -1] = _LEAST
        parts[:, 2, bins - 1, -1] = self._end
        halves.append(_halves(parts[..., :-1].transpose(2, 3) * _SCALE).permute(1, 2, 0, 3, 4))
        return [*singles, parts[..., -1]], halves


class _Autoregressive:
    """For each layer: first matrix by feature, biases, those of the parameters; matrices."""

    def __init__(
        self, steps: list[AutoregressiveStep], layers: list[Any], padded: int, hidden: int
    ) -> None:
        units = steps[0].units[0]
        same = all(
            each.eps == steps[0].eps
            and len(each.units) == len(steps[0].units)
            and all(counts == units for counts in each.units)
            for each in steps
        )
        _check(same, "layers of different sizes")
        _check(
            len(steps[0].units) <= MOST_HIDDEN_LAYERS + 1,
            f"autoregressive networks of over {MOST_HIDDEN_LAYERS} blocks",
        )
        self._padded, self._hidden, self._ends = padded, hidden, max(16, 2 * padded)
        self.table = []
        for start, stop in zip([0, *units], units, strict=False):
            windows = (start // 16, -(-stop // 16)) if stop > start else (0, 0)
            self.table += [start, stop, *windows]
        self.sizes = {
            "BLOCKS": len(steps[0].units) - 1,
            "ENDS": self._ends,
            "EPS": steps[0].eps,
        }

    def of(self, step: AutoregressiveStep, layer: Any) -> tuple[list[Tensor], list[Tensor]]:
        hidden = self._hidden
        singles = [_filled(step._initial.T, self._padded, hidden)]
        halves = []
        for layer in step._layers:
            singles.append(_filled(layer[:, 0], hidden))
            halves.append(_halves(_filled(layer[:, 1:].T, hidden, hidden)))
        # Scales of all features, and then shifts.
        ends = torch.zeros(2, self._padded, 1 + hidden)
        ends[:, : step.features, : 1 + step.hidden] = step._final.transpose(0, 1).cpu()
        ends = _filled(ends.view(2 * self._padded, -1), self._ends, 1 + hidden)
        halves.append(_halves(ends[:, 1:].T.contiguous()))
        return [*singles, ends[:, 0]], halves
