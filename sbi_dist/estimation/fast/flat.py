"""All parameters of a model in one vector, and their gradients in another."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["FlatParameters", "flat_of"]

# For each parameter, the flat vector that it lies in: found by who computes with the whole vector.
_FLAT = WeakTensorKeyDictionary()


class FlatParameters:
    """Makes parameters views of one vector, so that one operation updates all of them.

    Modules go on as before: ``state_dict``, ``load_state_dict`` and the parameters themselves read
    and write the vector. Gradients have to be cleared with :meth:`zero_grad` (or
    ``grad.zero_()``), as setting them to None would part them from the vector. Moving the module
    to another device or dtype, and copying it, give ordinary parameters again.

    Args:
        parameters: of one dtype, on one device; those given twice are taken once.

    Attributes:
        parameters, starts: in their order in the vector, and where each one begins.
        values: (P,), a leaf that requires a gradient: what an optimizer is to be given.
        grad: (P,), also ``values.grad``, which each parameter's ``grad`` is a view of.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        # Those of one shape next to each other: a stack of them then is one piece of the vector.
        self.parameters = sorted(dict.fromkeys(parameters), key=lambda each: tuple(each.shape))
        self.starts: list[int] = []
        total = 0
        for parameter in self.parameters:
            self.starts.append(total)
            total += parameter.numel()
        self._start = dict(zip(map(id, self.parameters), self.starts, strict=True))
        with torch.no_grad():
            self.values = torch.cat([parameter.reshape(-1) for parameter in self.parameters])
            self.grad = torch.zeros_like(self.values)
        self.values.requires_grad_()
        self.values.grad = self.grad
        for parameter, start in zip(self.parameters, self.starts, strict=True):
            place = slice(start, start + parameter.numel())
            parameter.data = self.values.data[place].view(parameter.shape)
            parameter.grad = self.grad[place].view(parameter.shape)
            _FLAT[parameter] = weakref.ref(self)

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        self.grad.zero_()

    def clip_norm(self, limit: float) -> Tensor:
        """Scale the gradients so that their norm is at most the limit; the norm before, ()."""
        norm = torch.linalg.vector_norm(self.grad)
        self.grad.mul_((limit / (norm + 1e-6)).clamp_max_(1.0))
        return norm

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter still is a view of ``values``, in its place."""
        return (
            parameter.dtype == self.values.dtype
            and parameter.device == self.values.device
            and parameter.storage_offset() == self._start.get(id(parameter))
            and parameter.untyped_storage()._cdata == self.values.untyped_storage()._cdata
        )


def flat_of(parameters: Sequence[nn.Parameter]) -> FlatParameters | None:
    """The vector that all the parameters lie in, or None where there is none."""
    reference = _FLAT.get(parameters[0])
    flat = None if reference is None else reference()
    if flat is None or not all(map(flat.holds, parameters)):
        return None
    return flat
