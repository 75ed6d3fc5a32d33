"""Weights of many modules rearranged into the few stacked arrays that the flow computes with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Layout", "PackedGradient", "Packing"]


class Layout:
    """Collects the stacked arrays: each element is a weight times a factor, or a constant.

    Args:
        parameters: the weights, in the order of the flat vector that they are read from.
        starts: where in that vector each one begins.
        total: length of that vector.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], starts: Sequence[int], total: int
    ) -> None:
        self._starts = {id(each): start for each, start in zip(parameters, starts, strict=True)}
        self._total = total
        self._arrays: list[tuple[str, tuple[int, ...], np.ndarray, np.ndarray, np.ndarray]] = []
        self._stacks: list[tuple[str, tuple[int, ...]]] = []
        self._masks: list[np.ndarray] = []
        self._blocks: list[tuple[int, int]] = []  # start and length in the flat vector

    def of(self, parameter: Tensor) -> np.ndarray:
        """Places in the flat vector of the parameter's elements, of its shape."""
        start = self._starts[id(parameter)]
        return np.arange(start, start + parameter.numel()).reshape(parameter.shape)

    def add(
        self,
        name: str,
        places: np.ndarray,
        factors: np.ndarray | float = 1.0,
        constants: np.ndarray | float = 0.0,
    ) -> None:
        """Add an array: ``factors`` times the weights at ``places``; where -1, the constants."""
        constant = places < 0
        self._arrays.append(
            (
                name,
                places.shape,
                np.where(constant, 0, places).reshape(-1),
                np.where(constant, 0.0, np.broadcast_to(factors, places.shape)).reshape(-1),
                np.where(constant, np.broadcast_to(constants, places.shape), 0.0).reshape(-1),
            )
        )

    def stack(
        self, name: str, parameters: Sequence[Tensor], masks: np.ndarray | None = None
    ) -> None:
        """Add the parameters, of one shape, as an array: for the large ones, which it suits best.

        Args:
            masks: factors of the elements, for a stack that is added after those without.
        """
        self._stacks.append((name, (len(parameters), *parameters[0].shape)))
        if masks is not None:
            self._masks.append(masks.reshape(-1))
        self._blocks += [(self._starts[id(each)], each.numel()) for each in parameters]

    def finish(self, like: Tensor) -> Packing:
        """The rearrangement, on the device and in the dtype of ``like``."""
        names = [*self._stacks, *((name, shape) for name, shape, *_ in self._arrays)]
        _, _, places, factors, constants = zip(*self._arrays, strict=True)
        index, of_arrays = np.concatenate(places), np.concatenate(factors)
        # Segments of the flat vector: blocks that are stacked, and what is between them.
        blocks = _joined(self._blocks)
        in_order = sorted((start, length, number) for number, (start, length) in enumerate(blocks))
        segments: list[tuple[int, int, int | None]] = []
        end = 0
        for start, length, number in in_order:
            if start > end:
                segments.append((end, start - end, None))
            segments.append((start, length, number))
            end = start + length
        if self._total > end:
            segments.append((end, self._total - end, None))
        # The way back for the gradient of what is between the blocks: each weight is at one place,
        # or its gradient is zero.
        before = np.cumsum([0, *(length for _, length, _ in in_order)])
        used = np.flatnonzero(of_arrays)
        rest = index[used] - before[np.searchsorted([start for start, *_ in in_order], index[used])]
        inverse = np.zeros(self._total - before[-1], dtype=np.int64)
        weights = np.zeros(len(inverse))
        inverse[rest], weights[rest] = used, of_arrays[used]
        masks = torch.from_numpy(np.concatenate(self._masks)).to(like) if self._masks else None
        return Packing(
            names,
            segments,
            masks,
            torch.from_numpy(index).to(like.device),
            torch.from_numpy(of_arrays).to(like),
            torch.from_numpy(np.concatenate(constants)).to(like),
            torch.from_numpy(inverse).to(like.device),
            torch.from_numpy(weights).to(like),
        )


def _joined(blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The blocks, where one that begins at the end of the one before is made part of it."""
    joined: list[tuple[int, int]] = []
    for start, length in blocks:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return joined


class Packing:
    """The rearrangement of a flat vector into arrays that lie end to end, the stacks first.

    Args:
        names: names and shapes of the arrays.
        segments: start, length and (for those that are stacked) place among the stacked ones, of
            the parts of the flat vector in their order.
        masks: factors of the last stacks' elements; None where all are one.
        index, factors, constants: of the other arrays' elements.
        inverse, weights: places among those and factors of what is not stacked.
    """

    def __init__(
        self,
        names: list[tuple[str, tuple[int, ...]]],
        segments: list[tuple[int, int, int | None]],
        masks: Tensor | None,
        index: Tensor,
        factors: Tensor,
        constants: Tensor,
        inverse: Tensor,
        weights: Tensor,
    ) -> None:
        self._names, self.segments, self.masks = names, segments, masks
        self._sizes = [math.prod(shape) for _, shape in names]
        self.size = sum(self._sizes)
        self.stacked = self.size - len(index)
        self._index, self._factors, self._constants = index, factors, constants
        self.inverse, self.weights = inverse, weights
        self._lengths = [length for _, length, _ in segments]
        blocks = [(number, n) for n, (_, _, number) in enumerate(segments) if number is not None]
        self._order = [n for _, n in sorted(blocks)]

    def blocks(self, flat: Tensor) -> list[Tensor]:
        """The parts of the flat vector that are stacked, in that order."""
        parts = flat.detach().split(self._lengths)
        return [parts[n] for n in self._order]

    def pack(self, flat: Tensor, blocks: list[Tensor], out: Tensor) -> None:
        """Write the arrays; ``blocks`` are those of the flat vector."""
        stacks, arrays = out[: self.stacked], out[self.stacked :]
        torch.cat(blocks, out=stacks)
        if self.masks is not None:
            stacks[-len(self.masks) :].mul_(self.masks)
        torch.index_select(flat, 0, self._index, out=arrays)
        arrays.mul_(self._factors).add_(self._constants)

    def views(self, packed: Tensor) -> dict[str, Tensor]:
        """The arrays by name."""
        parts = packed.split(self._sizes)
        return {
            name: part.view(shape) for (name, shape), part in zip(self._names, parts, strict=True)
        }


class PackedGradient:
    """Gradients of the arrays, end to end, and of the flat vector from them."""

    def __init__(self, packing: Packing, like: Tensor) -> None:
        self._packing = packing
        self.packed = like.new_zeros(packing.size)
        self._stacks = self.packed[: packing.stacked]
        self._arrays = self.packed[packing.stacked :]
        self._rest = like.new_empty(len(packing.inverse))
        lengths = sorted((number, n) for _, n, number in packing.segments if number is not None)
        stacks = self._stacks.split([length for _, length in lengths])
        rest = self._rest.split([n for _, n, number in packing.segments if number is None])
        others = iter(rest)
        self._parts = [
            next(others) if number is None else stacks[number] for *_, number in packing.segments
        ]

    def flat(self) -> Tensor:
        """Gradient of the flat vector, a new tensor."""
        packing = self._packing
        if packing.masks is not None:
            self._stacks[-len(packing.masks) :].mul_(packing.masks)
        torch.index_select(self._arrays, 0, packing.inverse, out=self._rest)
        self._rest.mul_(packing.weights)
        return torch.cat(self._parts)
