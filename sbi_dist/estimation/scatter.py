"""How vectors scatter: their leading principal components, and the length of what is left of them.

A model of few numbers for vectors of any length, by which the distance of another vector from them
is measured in standard deviations.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["LARGEST", "Scatter"]

# Numbers beyond are as far as these: their squares, and sums of many, are finite in float32.
LARGEST = 1e15
_MOST_AXES, _MOST_NUMBERS = 32, 1 << 15
_ROWS_AN_AXIS = 10
# Variance that no direction is below, as a part of the mean one: rounding is not structure.
_LEAST_VARIANCE, _TINY = 1e-6, 1e-12
_LEAST_SD = 0.9 * math.sqrt(_TINY)


@dataclasses.dataclass(frozen=True)
class Scatter:
    """Mean, principal axes and residual length of vectors of length C.

    Attributes:
        mean: (C,).
        axes: (K, C), orthonormal: those of the largest variances.
        sd: (K,), along the axes.
        residual: mean and standard deviation of the length of what the axes leave; None where
            they leave nothing (K = C).

    All are float64. K is C at most, and 32, 32,768 / C, and a tenth of the vectors fitted to.
    """

    mean: Tensor
    axes: Tensor
    sd: Tensor
    residual: tuple[float, float] | None

    @classmethod
    def fit(cls, vectors: Tensor) -> Scatter:
        """That of ``vectors`` (N, C), float64, finite, N >= 1."""
        count, size = vectors.shape
        # What is stored is what is used from here on.
        mean = _short(vectors.mean(0))
        centred = vectors - mean
        least = max(_LEAST_VARIANCE * float(centred.square().mean()), _TINY)
        most = min(size, _MOST_AXES, _MOST_NUMBERS // size, count // _ROWS_AN_AXIS)
        variances, axes = _leading(centred, most)
        axes = _short(axes)
        sd = _short(variances.clamp(min=least).sqrt())
        if len(axes) == size:
            return cls(mean, axes, sd, None)
        lengths = cls(mean, axes, sd, (0.0, 1.0))._left(centred, centred @ axes.T)
        spread = max(float(lengths.std(correction=0)), math.sqrt(least))
        return cls(mean, axes, sd, (float(lengths.mean()), spread))

    def distance(self, vectors: Tensor) -> Tensor:
        """Squared Mahalanobis distance per term, float64 (N,): about 1 for vectors fitted to.

        The terms are the K components and the residual's length, each by its own mean and sd.

        Args:
            vectors: (N, C), float64, none beyond ``LARGEST``.
        """
        centred = vectors - self.mean
        along = centred @ self.axes.T
        total = (along / self.sd).square_().sum(1)
        if self.residual is None:
            return total.div_(len(self.sd))
        mean, sd = self.residual
        total += ((self._left(centred, along) - mean) / sd).square_()
        return total.div_(len(self.sd) + 1)

    def _left(self, centred: Tensor, along: Tensor) -> Tensor:
        """Length of what the axes leave, (N,)."""
        return (centred.square().sum(1) - along.square().sum(1)).clamp_(min=0).sqrt_()

    def to_data(self) -> dict[str, Any]:
        """JSON-ready data; :meth:`from_data` is the inverse."""
        return {
            "mean": self.mean.tolist(),
            "axes": self.axes.tolist(),
            "sd": self.sd.tolist(),
            "residual": None if self.residual is None else list(self.residual),
        }

    @classmethod
    def from_data(cls, data: dict[str, Any], size: int) -> Scatter:
        """That of vectors of length ``size``.

        Raises:
            ValueError, TypeError, LookupError or ArithmeticError: it is no such data.
        """
        mean = torch.tensor(data["mean"], dtype=torch.float64)
        sd = torch.tensor(data["sd"], dtype=torch.float64)
        axes = torch.tensor(data["axes"], dtype=torch.float64)
        if sd.numel() == 0 == axes.numel():
            axes = axes.reshape(0, size)
        if mean.shape != (size,) or sd.ndim != 1 or axes.shape != (len(sd), size):
            raise ValueError("the lengths of a scatter do not fit")
        residual = data["residual"]
        if (residual is None) != (len(sd) == size):
            raise ValueError("a scatter has no residual where its axes leave nothing, else one")
        if residual is not None:
            left, spread = (float(value) for value in residual)
            residual = left, spread
            _check(torch.tensor([left, spread]), 0.0)
            _check(torch.tensor([spread]), _LEAST_SD)
        _check(mean, -LARGEST)
        _check(sd, _LEAST_SD)
        if not bool((axes.square().sum(1) - 1).abs().lt(1e-3).all()):
            raise ValueError("an axis of a scatter is not of length 1")
        return cls(mean, axes, sd, residual)


def _leading(centred: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Largest variances and their axes: (K,) and (K, C), K up to ``most``."""
    count, size = centred.shape
    if most == 0:
        return centred.new_empty(0), centred.new_empty(0, size)
    if size <= count:
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        return values.flip(0)[:most] / count, vectors.flip(1)[:, :most].T
    # Of the smaller matrix of the same values; where these vanish it tells no axes.
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
    kept = values > 1e-8 * max(float(values[0]), _TINY)
    axes = vectors[:, kept].T @ centred
    return values[kept] / count, axes / axes.square().sum(1, keepdim=True).sqrt()


def _short(values: Tensor) -> Tensor:
    """The values to six digits: a bundle of plain numbers stays small."""
    digits = [float(f"{value:.6g}") for value in values.flatten().tolist()]
    return torch.tensor(digits, dtype=torch.float64).reshape(values.shape)


def _check(values: Tensor, least: float) -> None:
    # No length of a vector of 1e6 numbers of up to LARGEST is beyond this.
    if not bool(((values >= least) & (values <= 1e3 * LARGEST)).all()):
        raise ValueError("a number of a scatter is not in its range")
