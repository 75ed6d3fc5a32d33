"""What is wanted of every observation, checked before a service is asked."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sbi_dist.catalog.options import InferOptions
from sbi_dist.errors import InputError

__all__ = ["Question", "as_array", "densities", "samples", "summaries"]


@dataclasses.dataclass(frozen=True)
class Question:
    """What is wanted of every observation.

    Attributes:
        operation: sample, summary or log_prob.
        draws: how many of each observation.
        params: the query of the request.
        levels, mass: of the quantiles and the interval of a summary.
        theta: of log_prob, (N, D) for all observations or (B, N, D).
    """

    operation: str
    draws: int
    params: dict[str, str]
    levels: list[float] = dataclasses.field(default_factory=list)
    mass: float = math.nan
    theta: np.ndarray | None = None


def samples(num_samples: int, seed: int, with_log_prob: bool) -> Question:
    """For posterior draws."""
    params = _drawing(num_samples, seed) | {"with_log_prob": str(bool(with_log_prob)).lower()}
    return Question("sample", int(num_samples), params)


def summaries(
    num_samples: int, seed: int, quantiles: Sequence[float] | None, hdi: float | None
) -> Question:
    """For summaries; what is None is as in catalogs."""
    usual = InferOptions()
    levels = [float(each) for each in (usual.quantiles if quantiles is None else quantiles)]
    mass = float(usual.hdi if hdi is None else hdi)
    rising = all(low < high for low, high in itertools.pairwise(levels))
    if not levels or not rising or not (levels[0] >= 0 and levels[-1] <= 1):
        raise InputError(
            f"quantiles is {levels}; it must be levels from 0 to 1, each above the one before"
        )
    if not 0 < mass < 1:
        raise InputError(f"hdi is {mass:g}; it must be between 0 and 1")
    params = _drawing(num_samples, seed, least=2)
    params |= {"quantiles": ",".join(map(repr, levels)), "hdi": repr(mass)}
    return Question("summary", int(num_samples), params, levels, mass)


def densities(theta: Any) -> Question:
    """For densities at theta (N, D) or (B, N, D)."""
    values = as_array(theta, "theta")
    if values.ndim not in (1, 2, 3) or not values.size:
        raise InputError(
            f"theta has shape {values.shape}; it must be (N, D) for all observations, or (B, N, D)"
        )
    values = np.atleast_2d(values).astype(np.float32)
    return Question("log_prob", values.shape[-2], {}, theta=values)


def _drawing(num_samples: int, seed: int, least: int = 1) -> dict[str, str]:
    for name, value, low in (("num_samples", num_samples, least), ("seed", seed, 0)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < low:
            raise InputError(f"{name} is {value!r}; it must be a whole number, at least {low}")
    return {"num_samples": str(int(num_samples)), "seed": str(int(seed))}


def as_array(values: Any, field: str) -> np.ndarray:
    """An array of real numbers."""
    if hasattr(values, "detach"):  # a torch tensor, known without importing torch
        tensor = values.detach().cpu()
        values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InputError(f"{field} is no array ({error}); rows must be of one length") from error
    if array.dtype.kind not in "fiu":
        raise InputError(f"{field} has dtype {array.dtype}; it must be of real numbers")
    return array
