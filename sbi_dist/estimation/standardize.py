"""What is between the scientist's numbers and the network's: scales of theta and x.

x goes to a scale (linear, log or asinh) and then to mean 0 and sd 1 in each component. theta goes
through the prior's bijection to R^D and then to mean 0 and sd 1. The scale and the bijection are
chosen by a sample of the training simulations; means and sd are those of all of them, added up
from parts that may be in different processes. All of it is kept in the bundle as plain numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbi_dist.bijection import SupportBijection, matched_softness
from sbi_dist.estimation.moments import Moments

__all__ = ["Standardization", "Sums", "as_tensor", "chunk_rows", "sample_runs"]

_SAMPLE_ROWS, _SAMPLE_RUNS = 100_000, 1000
_SAMPLE_BYTES, _LEAST_ROWS = 64_000_000, 100
_CHUNK_FLOATS, _CHUNK_ROWS = 1 << 17, 8192
# The regression on more columns of x than this is on their leading components.
_MOST_COLUMNS = 1000
_COMPONENTS = 200


def sample_runs(rows: int, row_bytes: int) -> np.ndarray:
    """The training rows that scales are chosen by: int64 (K, 2), starts and ends of runs of them.

    All rows, or up to 100,000 of them and 64 MB, in up to 1,000 runs spread evenly.
    """
    size = min(rows, _SAMPLE_ROWS, max(_LEAST_ROWS, _SAMPLE_BYTES // row_bytes))
    if size == rows:
        return np.array([[0, rows]], dtype=np.int64)
    count = min(size, _SAMPLE_RUNS)
    number = np.arange(count + 1)
    ends = number * size // count
    # Rows left out before each run: as many as the runs before it have on average.
    starts = ends[:-1] + number[:-1] * (rows - size) // count
    return np.stack([starts, starts + np.diff(ends)], axis=1).astype(np.int64)


def chunk_rows(row_floats: int) -> int:
    """Rows to be transformed or added up at a time, for so many numbers in theta and x."""
    return max(16, min(_CHUNK_ROWS, _CHUNK_FLOATS // row_floats))


@dataclasses.dataclass(frozen=True)
class Sums:
    """What rows contribute to a standardization.

    Attributes:
        x: moments of x on its scale.
        z: moments of theta's image under the bijection.
        log_det: sum of log |d theta / d z|.
    """

    x: Moments
    z: Moments
    log_det: float

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.x + other.x, self.z + other.z, self.log_det + other.log_det)


@dataclasses.dataclass
class Standardization:
    """The maps theta <-> u and x -> standardized x.

    Attributes:
        bijection: between the prior's support and R^D.
        theta_mean, theta_sd: of the bijection's image, float64 of shape (D,).
        x_scale: ``linear``, ``log`` or ``asinh``.
        x_low, x_centre, x_width: for log, the smallest x seen; for asinh, median and
            interquartile range; shape x_shape, float64.
        x_mean, x_sd: of x on its scale, shape x_shape, float64.
    """

    bijection: SupportBijection
    theta_mean: Tensor
    theta_sd: Tensor
    x_scale: str
    x_low: Tensor
    x_centre: Tensor
    x_width: Tensor
    x_mean: Tensor
    x_sd: Tensor

    @classmethod
    def fit(
        cls, theta: np.ndarray, x: np.ndarray, low: np.ndarray, high: np.ndarray, x_scale: str
    ) -> Standardization:
        """Fit to training simulations: theta (N, D), x (N, *x_shape), bounds of the support."""
        floats = math.prod(theta.shape[1:]) + math.prod(x.shape[1:])
        runs = sample_runs(len(theta), 4 * floats)
        some = [np.concatenate([each[start:stop] for start, stop in runs]) for each in (theta, x)]
        fitted = cls.of_sample(some[0], some[1], low, high, x_scale)
        size = chunk_rows(floats)
        chunks = (slice(start, start + size) for start in range(0, len(theta), size))
        return fitted.completed(fitted.sums((theta[rows], x[rows]) for rows in chunks))

    @classmethod
    def of_sample(
        cls, theta: np.ndarray, x: np.ndarray, low: np.ndarray, high: np.ndarray, x_scale: str
    ) -> Standardization:
        """Choose scale and bijection by a sample of training simulations.

        ``completed`` puts in the means and sd of theta's image, and those of all x.
        """
        low_x, centre, width = (
            torch.from_numpy(np.concatenate(values).reshape(x.shape[1:]))
            for values in zip(*map(_spread, _columns(x)), strict=True)
        )
        fitted = cls(
            bijection=SupportBijection(low, high, 0.2),
            theta_mean=torch.zeros(theta.shape[1], dtype=torch.float64),
            theta_sd=torch.ones(theta.shape[1], dtype=torch.float64),
            x_scale=choose_scale(x) if x_scale == "auto" else x_scale,
            x_low=low_x,
            x_centre=centre,
            x_width=width,
            x_mean=torch.zeros_like(centre),
            x_sd=torch.ones_like(centre),
        )
        fitted._set_x(Moments.total(map(Moments.of, map(fitted._scaled, _float64(x)))))
        residual = _residual_sd(theta, x, fitted)
        fitted.bijection = SupportBijection(low, high, matched_softness(residual, low, high))
        return fitted

    def sums(self, chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> Sums:
        """What rows contribute: chunks of theta (n, D) and x (n, *x_shape), at least one.

        Which rows make a chunk matters to the last bits of the result.
        """
        parts = (self._sums(theta, x) for theta, x in chunks)
        total = next(parts)
        for part in parts:
            total += part
        return total

    def _sums(self, theta: np.ndarray, x: np.ndarray) -> Sums:
        z = self.bijection.unconstrain(as_tensor(theta))
        log_det = float(self.bijection.log_det(z).sum())
        return Sums(Moments.of(self._scaled(as_tensor(x).double())), Moments.of(z), log_det)

    def completed(self, total: Sums) -> Standardization:
        """The same scale and bijection, with the means and sd of all training rows."""
        fitted = dataclasses.replace(self)
        fitted._set_x(total.x)
        fitted.theta_mean = total.z.mean
        fitted.theta_sd = _positive(total.z.sd(), total.z.mean)
        return fitted

    def _set_x(self, moments: Moments) -> None:
        self.x_mean, self.x_sd = moments.mean, _positive(moments.sd(), moments.mean)

    def mean_log_det(self, log_det: float, rows: int) -> float:
        """Mean log |d u / d theta| of so many rows, from their sum of log |d theta / d z|."""
        return -(log_det / rows + float(self.theta_sd.log().sum()))

    def _scaled(self, x: Tensor) -> Tensor:
        if self.x_scale == "log":
            return torch.maximum(x, self.x_low).log()
        if self.x_scale == "asinh":
            return torch.asinh((x - self.x_centre) / self.x_width)
        return x

    def x(self, x: Tensor) -> Tensor:
        """Standardized x, float32, for x (N, *x_shape) of any real dtype."""
        return (self._scaled(x.double()) - self.x_mean).div_(self.x_sd).float()

    def u(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """u (N, D) float32 and log |d u / d theta| (N,) float64 for theta (N, D) in the support."""
        z = self.bijection.unconstrain(theta)
        return self._u_of(z), -(self.bijection.log_det(z) + self.theta_sd.log().sum())

    def u_alone(self, theta: Tensor) -> Tensor:
        """u (N, D) float32 for theta (N, D) in the support."""
        return self._u_of(self.bijection.unconstrain(theta))

    def _u_of(self, z: Tensor) -> Tensor:
        return (z - self.theta_mean).div_(self.theta_sd).float()

    def theta(self, u: Tensor) -> Tensor:
        """theta (..., D) float32, inside the support, for u (..., D); computed in u's dtype."""
        z = u * self.theta_sd.to(u) + self.theta_mean.to(u)
        return self.bijection.constrain(z, torch.float32)

    def log_det_of_theta(self, u: Tensor) -> Tensor:
        """log |d theta / d u|, float64 (...), at u (..., D)."""
        z = u.double() * self.theta_sd + self.theta_mean
        return self.bijection.log_det(z) + self.theta_sd.log().sum()

    def to(self, device: torch.device) -> Standardization:
        """The same for theta and x on a device."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return dataclasses.replace(self, **moved)

    def to_data(self) -> dict[str, Any]:
        """JSON-ready data; :meth:`from_data` is the inverse."""
        data: dict[str, Any] = {"bijection": self.bijection.to_data(), "x_scale": self.x_scale}
        for name in _TENSORS:
            data[name] = getattr(self, name).tolist()
        return data

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Standardization:
        """Read what :meth:`to_data` gave.

        Raises:
            ValueError, TypeError, LookupError or RuntimeError: it is no such data.
        """
        tensors = {name: torch.tensor(data[name], dtype=torch.float64) for name in _TENSORS}
        bijection, shape = SupportBijection.from_data(data["bijection"]), tensors["x_mean"].shape
        for name, values in tensors.items():
            if values.shape != ((bijection.size,) if name.startswith("theta") else shape):
                raise ValueError(f"{name} has shape {tuple(values.shape)}")
            fit = torch.isfinite(values)
            if name in _POSITIVE:
                fit &= values > 0
            if not bool(fit.all()):
                raise ValueError(f"{name} has numbers that are not in its range")
        if data["x_scale"] not in ("linear", "log", "asinh"):
            raise ValueError(f"x_scale is {data['x_scale']!r:.50}")
        return cls(bijection=bijection, x_scale=data["x_scale"], **tensors)


_TENSORS = ("theta_mean", "theta_sd", "x_low", "x_centre", "x_width", "x_mean", "x_sd")
_POSITIVE = ("theta_sd", "x_low", "x_width", "x_sd")


def choose_scale(x: np.ndarray) -> str:
    """The scale on which x (N, *x_shape) is closest to well-behaved.

    Log where all of x is positive and its central 98 % spans more than a factor of 100 in half of
    the components; asinh where the 99 % range is over 20 times the interquartile range in half of
    the components; else linear.
    """
    ratios, tails, positive = [], [], True
    for values in _columns(x):
        q005, q01, q25, q75, q99, q995 = np.quantile(
            values, [0.005, 0.01, 0.25, 0.75, 0.99, 0.995], axis=0
        )
        positive = positive and bool(values.min() > 0)
        if positive:
            ratios.append(q99 / q01)
        spread = np.maximum(q75 - q25, np.finfo(np.float32).tiny)
        tails.append((q995 - q005) / spread)
    if positive and np.median(np.concatenate(ratios)) > 100:
        return "log"
    return "asinh" if np.median(np.concatenate(tails)) > 20 else "linear"


def as_tensor(array: np.ndarray) -> Tensor:
    """The array's values as a tensor, which may share its memory: to be read only."""
    # torch warns of read-only memory, as that of a file.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _columns(x: np.ndarray) -> Iterator[np.ndarray]:
    """Components of x in float64, (N, some): as many at a time as a chunk holds."""
    flat = x.reshape(len(x), -1)
    size = max(1, 8 * _CHUNK_FLOATS // len(flat))
    for start in range(0, flat.shape[1], size):
        yield flat[:, start : start + size].astype(np.float64)


def _float64(x: np.ndarray) -> Iterator[Tensor]:
    """Rows of x in float64, a chunk at a time."""
    size = chunk_rows(max(1, x[:1].size))
    for start in range(0, len(x), size):
        yield torch.from_numpy(x[start : start + size].astype(np.float64))


def _spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smallest value fit for a logarithm, median and interquartile range of each column."""
    tiny = float(torch.finfo(torch.float32).tiny)
    centre = np.partition(values, (len(values) - 1) // 2, axis=0)[(len(values) - 1) // 2]
    quartiles = np.quantile(values, [0.25, 0.75], axis=0)
    width = quartiles[1] - quartiles[0]
    return np.maximum(values.min(0), tiny), centre, np.where(width > 0, width, 1.0)


def _positive(sd: Tensor, mean: Tensor) -> Tensor:
    """Standard deviations to divide by: a component constant to float32 rounding is left alone."""
    return torch.where(sd > 1e-7 * mean.abs(), sd, torch.ones_like(sd))


def _residual_sd(theta: np.ndarray, x: np.ndarray, fitted: Standardization) -> np.ndarray:
    """Standard deviation of theta about its linear regression on standardized x, shape (D,).

    Where x has over 1,000 components, the regression is on the leading ones of at most 200
    principal components, found by one step of subspace iteration from random directions (Halko,
    Martinsson & Tropp 2011): time and memory grow as the number of components then, and the rows
    are several times as many as the slopes.
    """

    centred = torch.from_numpy(theta.astype(np.float64))
    centred = centred - centred.mean(0)
    width = max(1, x[:1].size)
    size = chunk_rows(width)

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(x), size):
            part = centred[start : start + size]
            flat = fitted.x(as_tensor(x[start : start + size])).double()
            yield flat.reshape(len(part), -1), part

    if width > _MOST_COLUMNS:
        count = max(1, min(_COMPONENTS, len(x) // 10))
        random = torch.Generator().manual_seed(0)
        directions = torch.randn(width, count, generator=random, dtype=torch.float64)
        basis = torch.linalg.qr(torch.cat([flat @ directions for flat, _ in chunks()])).Q
        directions.zero_()
        for flat, rows in zip((flat for flat, _ in chunks()), basis.split(size), strict=True):
            directions += flat.T @ rows
        basis = torch.linalg.qr(torch.cat([flat @ directions for flat, _ in chunks()])).Q
        return Moments.of(centred - basis @ (basis.T @ centred)).sd(1 + count).numpy()
    gram = 1e-6 * len(x) * torch.eye(width, dtype=torch.float64)
    cross = torch.zeros(width, theta.shape[1], dtype=torch.float64)
    for flat, part in chunks():
        gram += flat.T @ flat
        cross += flat.T @ part
    slope = torch.linalg.solve(gram, cross)
    return Moments.total(Moments.of(part - flat @ slope) for flat, part in chunks()).sd(1).numpy()
